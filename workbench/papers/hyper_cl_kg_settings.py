"""Settings of Hyper-CL on knowledge graphs: a row of the table and the whole recipe."""

from typing import Literal

from pydantic import Field, model_validator

from workbench.config import Settings
from workbench.datasets.graphs import GraphData
from workbench.finetuning import Finetuning
from workbench.papers.comparison import ComparisonRecipe
from workbench.training import Training

UNTRAINED = ("frequency", "cosine")


class GraphModelSettings(Settings):
    """One row of the table."""

    name: str = Field(pattern="^[a-z][a-z0-9_]*$")
    kind: Literal["frequency", "cosine", "concat", "hadamard", "hyper"] = Field(
        description="frequency: the floor, tails ranked by how often train shows them under the relation"
    )
    rank: int | None = Field(default=None, gt=0, description="K; null for the full matrix")
    identity: bool = False
    start: Literal["scaled", "paper"] = "scaled"
    condition: Literal["text", "one_hot"] = Field(
        default="text", description="one_hot: a matrix learned per relation"
    )
    bottleneck: int | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    adapter: int | None = Field(default=None, gt=0, description="hidden width of (3); null for none")
    self_weight: bool = Field(default=False, description="equation (4)")
    self_negatives: bool = Field(default=True, description="the head as a negative of its own question")
    random_negatives: int = Field(default=0, ge=0, description="entities drawn per batch")
    pre_batch: int = Field(default=0, ge=0, description="past batches whose tails are negatives")
    both_ways: bool = Field(default=False, description="also tell a tail's question among the batch's")
    margin: float = Field(default=0.02, ge=0, description="gamma, while training")
    temperature: float = Field(default=0.05, gt=0, description="tau at the start; learned")
    unit_query: bool = Field(
        default=True, description="phi is a cosine, as written; false: a dot product, as coded"
    )
    learning_rate: float | None = Field(default=None, gt=0, description="instead of the recipe's")
    against: str | None = Field(
        default=None, description="the matched baseline, beside the recipe's reference"
    )
    keep_weights: bool = True

    @model_validator(mode="after")
    def _every_setting_has_a_use(self) -> "GraphModelSettings":
        if self.kind in UNTRAINED:
            fields = type(self).model_fields.items()
            changed = [key for key, field in fields if getattr(self, key) != field.default]
            unused = [key for key in changed if key not in ("name", "kind", "against", "keep_weights")]
            if unused:
                raise ValueError(f"model {self.name}: kind {self.kind} is not trained and has no {unused[0]}")
        if self.kind != "hyper" and (self.rank is not None or self.identity):
            raise ValueError(f"model {self.name}: rank and identity go with kind: hyper, not {self.kind}")
        generates = self.kind == "hyper" or self.self_weight
        if not generates and (self.bottleneck is not None or self.start != "scaled"):
            raise ValueError(
                f"model {self.name}: bottleneck and start belong to a generator, and kind {self.kind} has "
                "one only with self_weight: true"
            )
        if self.self_weight and not self.self_negatives:
            raise ValueError(
                f"model {self.name}: self_weight is learned from the head as a negative; set "
                "self_negatives: true or leave self_weight out"
            )
        return self


class Rerank(Settings):
    """Re-ranking by the train graph, reported beside the plain ranks."""

    hops: int = Field(default=5, gt=0)
    weight: float = Field(default=0.05, gt=0)


class HyperCLGraphRecipe(ComparisonRecipe):
    """Settings of one comparison on one graph."""

    paper: Literal["hyper_cl_kg"]
    data: GraphData
    finetuning: Finetuning | None = None
    training: Training
    models: tuple[GraphModelSettings, ...] = Field(min_length=1)
    group_by: tuple[Literal["direction", "relation", "entity"], ...] = ("direction", "entity", "relation")
    rerank: Rerank | None = None
    resamples: int = Field(default=1000, ge=100)

"""Settings of Hyper-CL's comparisons: a row of the table, the training of the encoder, the whole recipe."""

from typing import Literal

from pydantic import Field, model_validator

from workbench.config import Settings
from workbench.datasets.pairs import PairData
from workbench.finetuning import Finetuning
from workbench.papers.comparison import ComparisonRecipe
from workbench.training import Training

UNTRAINED = ("cosine", "prompt", "condition_only")
JOINT = ("bi_encoder", "cross_encoder")  # read sentence and condition together


class ModelSettings(Settings):
    """One row of the table: which head, and how it is trained."""

    name: str = Field(pattern="^[a-z][a-z0-9_]*$")
    kind: Literal[
        "cosine",
        "prompt",
        "condition_only",
        "shared",
        "concat",
        "hadamard",
        "hyper",
        "bi_encoder",
        "cross_encoder",
    ]
    rank: int | None = Field(
        default=None, gt=0, description="K of equation (2); null for the full matrix (1)"
    )
    identity: bool = Field(default=False, description="equation (7)")
    start: Literal["scaled", "paper"] = "scaled"
    condition: Literal["text", "one_hot"] = Field(
        default="text", description="one_hot: a learned row per condition"
    )
    pooling: Literal["sentence", "learned", "condition", "similarity"] = Field(
        default="sentence", description="equation (6), similarity: (8)"
    )
    pooling_heads: int = Field(default=1, gt=0, description="slices of the query with a softmax of their own")
    bottleneck: int | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    dropout_sides: Literal["shared", "apart"] = Field(
        default="shared",
        description="apart, as published: the two sentences see different dropout of a condition",
    )
    contrastive: float = Field(default=1.0, ge=0, description="weight of the second term of (5)")
    temperature: float = Field(default=1.5, gt=0)
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share by which labels shrink to their middle"
    )
    teacher: str | None = Field(
        default=None, description="a model trained before, whose scores are targets too"
    )
    teacher_share: float = Field(default=0.5, gt=0, le=1, description="of the teacher in the target")
    ties: Literal["keep", "drop"] = Field(
        default="drop", description="keep: push pairs of equal label apart too"
    )
    same_condition: float = Field(
        default=0.0, ge=0, description="weight of in-batch negatives of one condition"
    )
    learning_rate: float | None = Field(default=None, gt=0, description="instead of the recipe's")
    against: str | None = Field(
        default=None, description="the matched baseline, beside the recipe's reference"
    )
    keep_weights: bool = Field(default=True, description="keep the trained head of the first seed in the run")

    @model_validator(mode="after")
    def _only_hyper_generates_a_matrix(self) -> "ModelSettings":
        if self.kind != "hyper" and (self.rank is not None or self.identity):
            raise ValueError(f"model {self.name}: rank and identity go with kind: hyper, not {self.kind}")
        if self.kind in UNTRAINED + JOINT and self.pooling != "sentence":
            raise ValueError(f"model {self.name}: kind {self.kind} has no pooling to learn")
        if self.pooling == "similarity" and self.condition == "one_hot":
            raise ValueError(f"model {self.name}: no token is like a one_hot condition; use condition: text")
        if self.kind == "cross_encoder" and self.same_condition:
            raise ValueError(f"model {self.name}: a cross_encoder has no embeddings for same_condition")
        return self


class HyperCLRecipe(ComparisonRecipe):
    """Settings of one comparison on one data set."""

    paper: Literal["hyper_cl"]
    data: PairData
    finetuning: Finetuning | None = None
    training: Training
    models: tuple[ModelSettings, ...] = Field(min_length=1)
    group_by: tuple[str, ...] = Field(default=("condition_kind",), description="columns to report apart")
    resamples: int = Field(default=1000, ge=100)

    @model_validator(mode="after")
    def _teachers_stand_first_and_joint_readers_are_trained(self) -> "HyperCLRecipe":
        names = [model.name for model in self.models]
        for place, model in enumerate(self.models):
            if model.teacher and model.teacher not in names[:place]:
                raise ValueError(f"model {model.name}: its teacher {model.teacher!r} must stand before it")
            if model.teacher and self.models[names.index(model.teacher)].kind in UNTRAINED:
                raise ValueError(f"model {model.name}: its teacher {model.teacher!r} is not trained")
            if model.kind in JOINT and self.finetuning is None:
                raise ValueError(f"model {model.name}: kind {model.kind} trains its encoder; add finetuning")
        return self

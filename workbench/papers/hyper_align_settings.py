"""Settings of Hyper-Align's recipes: data, zoo, and the ways to connect it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from workbench.config import Settings
from workbench.datasets.caption_pairs import PairData
from workbench.papers.comparison import ComparisonRecipe
from workbench.training import Training
from workbench.zoo import ZooSettings

UNTRAINED = ("chance",)
CLOSED = ("relative", "ridge", "procrustes", "cca", "connector")


class AlignModelSettings(Settings):
    """One way to connect every pair of a zoo.

    ``ape`` trains each pair alone; ``direct`` trains all image encoders of a text encoder together;
    ``hyper_align`` generates the connectors from codes of the image encoders. ``ridge``, ``procrustes``,
    ``cca`` (maps both sides) and ``connector`` (its score as a map of texts) are closed forms. ``search``
    screens all pairs in closed form and trains fewer and fewer of them; ``hub`` learns one map per encoder
    into a shared space; ``relative`` compares cosines to the same items and learns nothing. ``chance``
    guesses.
    """

    name: str = Field(pattern="^[a-z][a-z0-9_]*$")
    kind: Literal[
        "chance", "ape", "direct", "hyper_align", "relative", "ridge", "procrustes", "cca", "connector",
        "search", "hub",
    ]  # fmt: skip
    training: Training | None = Field(default=None, description="null: the recipe's")
    logit_scale: float = Field(
        default=100.0, gt=0, description="inverse temperature, fixed; the papers' is 100"
    )
    connector_hidden: int | None = Field(
        default=None, gt=0, description="width of the connectors' hidden layer (ape, direct); null: linear"
    )
    warm_start: bool = Field(
        default=False, description="linear connectors start at the closed form (ape, direct)"
    )
    code: Literal["mean", "learned"] = "mean"
    code_width: int = Field(default=32, gt=0)
    hidden: tuple[int, ...] = Field(default=(128, 512), min_length=1, description="of the hypernetwork")
    encoders_per_step: int | None = Field(
        default=None, gt=0, description="B image encoders a step, in turn (hyper_align); null: all"
    )
    strength: float = Field(default=0.1, ge=0, description="of ridge, in units of the mean variance")
    strengths: tuple[float, float] = Field(
        default=(0.3, 1.0), description="of texts and images, for cca, connector and search"
    )
    kept: int = Field(default=128, gt=0, description="canonical directions (cca)")
    keep_share: float = Field(
        default=0.1, gt=0, lt=1, description="pairs that go on after each round of search"
    )
    rounds: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(1, 2), description="epochs of each round of search"
    )
    screen_width: int | None = Field(
        default=None, gt=0, description="image features wider than this are sketched for the screen (search)"
    )
    hub_width: int = Field(default=128, gt=0)
    centre: bool = Field(
        default=False,
        description="take every image encoder's mean away first (ape, direct, hyper_align): a failure mode",
    )
    texts: tuple[str, ...] | None = Field(
        default=None, description="text encoders this way is tried on; null: all"
    )
    against: str | None = Field(
        default=None, description="a matched baseline; differences to it are reported"
    )
    keep_weights: bool = Field(
        default=False, description="of linear connectors that leave images as they are"
    )

    @model_validator(mode="after")
    def _settings_go_with_the_kind(self) -> "AlignModelSettings":
        separate = ("ape", "direct")
        linear = ("ape", "direct", "hyper_align", "ridge", "procrustes", "connector", "search")
        for key, kinds in (
            ("connector_hidden", separate),
            ("warm_start", separate),
            ("centre", (*separate, "hyper_align")),
            ("encoders_per_step", ("hyper_align",)),
            ("screen_width", ("search",)),
            ("keep_weights", linear),
        ):
            if getattr(self, key) and self.kind not in kinds:
                raise ValueError(
                    f"model {self.name}: {key} goes with kind {', '.join(kinds)}, not {self.kind}"
                )
        if self.keep_weights and (self.connector_hidden or self.centre):
            raise ValueError(
                f"model {self.name}: keep_weights keeps linear connectors of features as they are; set "
                "connector_hidden: null and centre: false"
            )
        return self

    @model_validator(mode="after")
    def _only_linear_connectors_start_warm(self) -> "AlignModelSettings":
        if self.warm_start and self.connector_hidden:
            raise ValueError(
                f"model {self.name}: warm_start needs linear connectors; set connector_hidden: null"
            )
        return self


class HyperAlignRecipe(ComparisonRecipe):
    """Settings of one comparison of ways to connect a zoo."""

    paper: Literal["hyper_align"]
    data: PairData
    zoo: ZooSettings = ZooSettings()
    training: Training
    models: tuple[AlignModelSettings, ...] = Field(min_length=1)
    reference: str = Field(default="ape", description="the full grid that choices are held against")
    resamples: int = Field(default=1000, ge=100)

    @model_validator(mode="after")
    def _text_encoders_are_of_the_zoo(self) -> "HyperAlignRecipe":
        for model in self.models:
            unknown = sorted(set(model.texts or ()) - set(self.zoo.texts))
            if unknown and self.data.source != "features":
                raise ValueError(
                    f"model {model.name}: texts {unknown} are not among the zoo's {self.zoo.texts}"
                )
        if not self.zoo.images and self.data.source != "features":
            raise ValueError("zoo.images is empty; name at least one image encoder")
        return self

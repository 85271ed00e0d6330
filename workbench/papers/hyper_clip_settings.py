"""Settings of HyperCLIP's recipes: towers, models, data."""

from typing import Literal

from pydantic import Field, model_validator

from workbench.config import Settings
from workbench.datasets.photos import PhotoData
from workbench.datasets.scenes import SceneData
from workbench.datasets.shards import ShardData
from workbench.papers.comparison import ComparisonRecipe
from workbench.training import Training

UNTRAINED = ("chance",)


class ImageTower(Settings):
    """The image encoder: any of timm's, or a small pretrained one of the prepared data."""

    timm_model_name: str | None = Field(default=None, min_length=1, description="for example efficientnet_b0")
    encoder: str | None = Field(
        default=None, description="for example mobilenet_v1_050; has no norms of its own"
    )
    image_size: int = Field(default=64, ge=32, le=512)
    checkpointing: bool = Field(default=False, description="compute activations again in the backward pass")

    @model_validator(mode="after")
    def _one_of_both(self) -> "ImageTower":
        if (self.timm_model_name is None) == (self.encoder is None):
            raise ValueError("give either timm_model_name or encoder")
        return self


class TextTower(Settings):
    """The text encoder: a frozen sentence encoder with a projection, or a trained causal transformer."""

    kind: Literal["sentences", "transformer"] = "sentences"
    hidden: int = Field(default=256, gt=0, description="width of the projection's hidden layer (sentences)")
    width: int = Field(default=128, gt=0, description="of the transformer")
    layers: int = Field(default=4, gt=0, description="of the transformer")
    heads: int = Field(default=4, gt=0, description="of the transformer")
    context: int = Field(default=32, gt=2, le=77, description="tokens a text is cut at (transformer)")

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> "TextTower":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class ClipModelSettings(Settings):
    """One model of a comparison.

    ``siglip`` is the plain baseline. ``hyper`` generates weights of the image tower from the set of texts;
    ``token_control`` has the same machinery fed with learned vectors instead of texts; ``adapter`` spends as
    many parameters on a residual network behind the image tower. ``chance`` guesses.
    """

    name: str = Field(pattern="^[a-z][a-z0-9_]*$")
    kind: Literal["chance", "siglip", "hyper", "token_control", "adapter"]
    generates: Literal["norms", "linear", "convolutions"] = "norms"
    mode: Literal["replace", "residual"] = Field(
        default="replace", description="replace: only generated norms exist; residual: added to trained ones"
    )
    width: int = Field(
        default=128, gt=0, multiple_of=4, description="of the hypernetwork's transformer, with four heads"
    )
    layers: int = Field(default=1, gt=0)
    bottleneck: int = Field(default=32, gt=0)
    tokens: int = Field(default=32, gt=0, description="learned vectors of the token control")
    neutral: float = Field(
        default=0.0, ge=0, lt=1, description="share of steps without a condition (residual)"
    )
    calibration: int = Field(
        default=256,
        ge=0,
        le=1024,
        description="training images that BatchNorm statistics are fitted on per task",
    )
    detach_texts: bool = Field(default=False, description="no gradient to the text tower through the weights")
    most_texts: int | None = Field(default=None, gt=1, description="largest random subset the set is cut to")
    text_set: Literal["gathered", "local"] = Field(
        default="gathered", description="of all processes, or of each one's own images"
    )
    kinds_at_once: int | None = Field(default=None, gt=0, description="null: the recipe's")
    classes_at_once: int | None = Field(default=None, ge=0, description="null: the recipe's; 0: any images")
    against: str | None = Field(
        default=None, description="a matched baseline; differences to it are reported"
    )
    learning_rate: float | None = Field(default=None, gt=0)
    generator_rate: float = Field(default=1e-3, gt=0, description="learning rate of the hypernetwork")
    keep_weights: bool = True

    @model_validator(mode="after")
    def _one_class_is_no_task(self) -> "ClipModelSettings":
        if self.classes_at_once == 1:
            raise ValueError(
                f"model {self.name}: classes_at_once is 1; give 2 or more classes, 0 for any images, or null"
            )
        return self

    @model_validator(mode="after")
    def _only_residual_has_a_neutral_encoder(self) -> "ClipModelSettings":
        if self.neutral and (self.kind not in ("hyper", "token_control") or self.mode != "residual"):
            raise ValueError(f"model {self.name}: neutral steps need kind hyper and mode residual")
        return self


class HyperCLIPRecipe(ComparisonRecipe):
    """Settings of one comparison of image-text models."""

    paper: Literal["hyper_clip"]
    data: SceneData | PhotoData | ShardData = Field(discriminator="source")
    image: ImageTower
    kinds_at_once: int = Field(default=1, gt=0, description="most kinds of caption that a batch mixes")
    captions_at_once: int = Field(default=1, gt=0, description="captions of an image that a batch draws")
    classes_at_once: int | None = Field(
        default=None, gt=1, description="most classes that a batch's images are of; null: any images"
    )
    text: TextTower = TextTower()
    embed_dim: int = Field(default=64, gt=0)
    half: bool = Field(default=False, description="train the towers in bfloat16 (for accelerators)")
    logit_bias: float | None = Field(default=None, description="null: the log odds of a match in a batch")
    training: Training
    models: tuple[ClipModelSettings, ...] = Field(min_length=1)
    reference: str = "siglip"
    smallest_group: int = Field(
        default=30, gt=0, description="images; smaller groups are shown but not judged"
    )
    resamples: int = Field(default=1000, ge=100)

    @model_validator(mode="after")
    def _images_fit_the_tower(self) -> "HyperCLIPRecipe":
        if self.image.image_size != self.data.size:
            raise ValueError(
                f"image.image_size is {self.image.image_size} and data.size is {self.data.size}; "
                "give both the same side"
            )
        return self

    @model_validator(mode="after")
    def _captions_of_shards_are_tokenised(self) -> "HyperCLIPRecipe":
        if isinstance(self.data, ShardData) and self.text.kind != "transformer":
            raise ValueError("captions of shards are too many to embed first: set text.kind: transformer")
        return self

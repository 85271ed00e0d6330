"""Losses that pull matching pairs together, on one real task: which half of the columns belongs to which.

A digit of 8 x 8 pixels is seen twice: in its even columns and in its odd ones (left and right halves share
too little to tell losses apart). Two linear towers f and g map the views to unit vectors x and y, and what
belongs together is to lie together, by one of

    softmax   -log( e^(t x_i.y_i) / sum_j e^(t x_i.y_j) ), both ways                                     (1)
    sigmoid   -sum_j log sigmoid( z_ij (t x_i.y_j + b) ), z_ij = 1 if i = j, else -1                     (2)
    margin    max(0, |x_i - y_i|^2 - |x_i - y_j|^2 + m), both ways                                       (3)
    ratio     ( e^(t |x_i - y_i|) / (e^(t |x_i - y_i|) + e^(t |x_i - y_j|)) )^2, both ways               (4)

with learned t and b. Every loss is trained in batches of two sizes that see equally many pairs, so that large
batches make fewer steps, once for few epochs and once for many, each at a rate of its own, chosen on the
validation digits. The negatives of (1) and (2) are all others of the batch; those of (3) and (4) the next 31,
which in a batch of 32 are all.

Closed forms are the control: ``least_squares`` maps one view to the other, ``canonical`` (CCA) maps both, as
the towers do, by linear maps of the same width. ``untrained`` are the towers at their start.

``recall_at_1`` is the share of held-out views whose other view is nearest, both ways; ``recall_at_1_short``
the same after few epochs; ``recall_at_1_of_softmax_32`` what a row keeps of the softmax's. All seeds ask the
same digits, so that an interval over seeds does not say how much other digits would change.

Deviations: (4) is published for vectors of any norm; on unit vectors, without t, it learns little. Images and
texts are two halves of a picture here, networks are linear, batches are small.

Shape letters: N digits, B of a batch, D width of a view, R of the shared space.

Source: Radford et al. (2021), CLIP, arXiv 2103.00020, figure 3; Zhai et al. (2023), SigLIP, arXiv 2303.15343,
algorithm 1 (t from 10 and b from -10); Schroff, Kalenichenko and Philbin (2015), FaceNet, arXiv 1503.03832;
Hoffer and Ailon (2015), arXiv 1412.6622.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from workbench.datasets.digits import load_digits
from workbench.evaluation.retrieval import recall_values, retrieval_ranks
from workbench.families.comparison import FamilyModel, Outcome, SplitRecipe, comparison_of, needs_tokens
from workbench.geometry.closed_form import canonical, factor, ridge
from workbench.geometry.whitening import moments_of
from workbench.objectives import paired_contrastive, sigmoid_contrastive, triplet_margin, triplet_ratio
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit, seed_everything

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

TRAIN = (
    1024  # digits to train on: whole batches of 32 and of 256; the others left of the training set are valid
)
WIDTH = 16  # R
NEGATIVES = 31  # of an anchor in (3) and (4)
SCALE = 10.0  # t's start
STRENGTH = 0.01  # of the closed forms' load, in units of the mean variance; the best of four on valid
TRAINED = ("softmax", "sigmoid", "margin", "ratio")


class ObjectiveModel(FamilyModel):
    """One loss in batches of one size, or a row that is not trained."""

    kind: Literal[
        "chance", "untrained", "least_squares", "canonical", "softmax", "sigmoid", "margin", "ratio"
    ]
    batch_size: int = Field(default=32, gt=1, le=TRAIN)
    learning_rate: float | None = Field(default=None, gt=0, description="instead of the recipe's")
    short_rate: float | None = Field(default=None, gt=0, description="the same for few epochs")
    bias: float | None = Field(default=None, description="sigmoid: start of b; null: log odds of a match")

    @model_validator(mode="after")
    def _only_the_sigmoid_has_a_bias(self) -> "ObjectiveModel":
        if self.bias is not None and self.kind != "sigmoid":
            raise ValueError(f"model {self.name}: bias belongs to kind sigmoid, not {self.kind}")
        return self


class ObjectiveRecipe(SplitRecipe):
    """Settings of the comparison."""

    paper: Literal["objectives"]
    models: tuple[ObjectiveModel, ...] = Field(min_length=1)
    training: Training
    short: int = Field(gt=0, description="few epochs; training.epochs are many")


RECIPE = ObjectiveRecipe


@dataclass(frozen=True)
class Views:
    """Even and odd columns of the digits that are trained on, and of those asked about."""

    train: tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]
    asked: tuple[Float[Tensor, "M D"], Float[Tensor, "M D"]]


def load_data(recipe: ObjectiveRecipe) -> Loaded:
    """Cut the digits in two; the test digits are those of all families."""
    digits = load_digits()
    known = digits.inputs["train"]
    parts = known[:TRAIN], {"valid": known[TRAIN:], "test": digits.inputs["test"]}[recipe.split]
    views = Views(*((part[:, ::2], part[:, 1::2]) for part in parts))
    counts = {"train": {"digits": TRAIN}, recipe.split: {"digits": len(parts[1])}}
    return Loaded(views, digits.sha256, counts)


class Towers(nn.Module):
    """f and g, with the scale t and the bias b of a loss."""

    def __init__(self, width: int, bias: float) -> None:
        super().__init__()
        self.even, self.odd = nn.Linear(width, WIDTH), nn.Linear(width, WIDTH)
        self.log_scale, self.bias = (nn.Parameter(torch.tensor(at)) for at in (math.log(SCALE), bias))

    def forward(
        self, even: Float[Tensor, "B D"], odd: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
        """Map both views to unit vectors."""
        return functional.normalize(self.even(even), dim=-1), functional.normalize(self.odd(odd), dim=-1)


def loss_of(kind: str, net: Towers, x: Float[Tensor, "B R"], y: Float[Tensor, "B R"]) -> Float[Tensor, ""]:
    """Return equation (1), (2), (3) or (4) of a batch."""
    scale = net.log_scale.exp()
    if kind == "softmax":
        return paired_contrastive(scale * x, y, scale=1.0)
    if kind == "sigmoid":
        return sigmoid_contrastive(x, y, torch.eye(len(x), dtype=torch.bool), scale, net.bias)
    own, other = triplets(len(x))
    if kind == "margin":
        return (triplet_margin(x[own], y[own], y[other]) + triplet_margin(y[own], x[own], x[other])) / 2
    x, y = scale * x, scale * y
    return (triplet_ratio(x[own], y[own], y[other]) + triplet_ratio(y[own], x[own], x[other])) / 2


def triplets(count: int) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"]]:
    """Return each row of a batch beside those of the next rows, around its end, that are its negatives."""
    negatives = min(NEGATIVES, count - 1)
    own = torch.arange(count).repeat_interleave(negatives)
    return own, (own + torch.arange(1, negatives + 1).repeat(count)) % count


def recall(x: Float[Tensor, "N R"], y: Float[Tensor, "N R"]) -> float:
    """Return the share of views whose other view is the nearest by cosine, both ways; 0 to 1, ideal 1."""
    x, y = functional.normalize(x, dim=-1), functional.normalize(y, dim=-1)
    ranks = (found.numpy() for found in retrieval_ranks(x[:, None], y))
    return float(recall_values(*ranks)["recall_at_1"].mean())


def closed_form(kind: str, views: Views) -> float:
    """Return the recall of least squares from even to odd columns, or of CCA on both."""
    even, odd = (moments_of(side) for side in views.train)
    centred = [side.double() - moments.mean for side, moments in zip(views.train, (even, odd), strict=True)]
    cross = centred[0].T @ centred[1] / len(centred[0])
    if kind == "least_squares":
        return recall(ridge(even, odd, cross, STRENGTH)(views.asked[0]), views.asked[1])
    maps = canonical(even, odd, cross, (factor(even, STRENGTH), factor(odd, STRENGTH)), WIDTH)
    return recall(maps.of_text(views.asked[0]), maps.of_image(views.asked[1]))


def measure(recipe: ObjectiveRecipe, views: Views, model: ObjectiveModel, seed: int, folder: Path) -> Outcome:
    """Train one row twice, for many epochs and for few, and find the held-out pairs."""
    count, about, values = len(views.asked[0]), {"parameters": 0}, {}
    if model.kind == "chance":
        return Outcome({"recall_at_1": 1 / count}, count, about)
    if model.kind in ("least_squares", "canonical"):
        return Outcome({"recall_at_1": closed_form(model.kind, views)}, count, about)
    bias = -math.log(model.batch_size - 1) if model.bias is None else model.bias
    lengths = {"recall_at_1": (recipe.training.epochs, model.learning_rate)}
    if model.kind in TRAINED:
        lengths["recall_at_1_short"] = (recipe.short, model.short_rate)
    for name, (epochs, rate) in lengths.items():
        seed_everything(seed)  # the same start at both lengths
        net, own = Towers(views.train[0].shape[1], bias), folder / name
        if model.kind in TRAINED:
            own.mkdir(parents=True, exist_ok=True)
            changes = {"epochs": epochs, "batch_size": model.batch_size}
            training = recipe.training.at_rate(rate).model_copy(update=changes)

            def loss(items: Tensor, net: Towers = net) -> Tensor:
                return loss_of(model.kind, net, *net(*(side[items] for side in views.train)))

            history = fit(net, loss, TRAIN, training, own, seed=seed)
            about.setdefault("history", history)
            about["parameters"] = sum(one.numel() for one in net.parameters() if one.grad is not None)
        with torch.no_grad():
            values[name] = recall(*net(*views.asked))
    return Outcome(values, count, about)


compare = comparison_of(measure, shares=("recall_at_1",))

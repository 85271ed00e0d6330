"""Losses that pull matching pairs together: which half of the columns, or which caption, belongs to which.

A thing is seen twice: a digit of 8 x 8 pixels in its even and in its odd columns, or a photograph by an image
encoder and, in its captions, by a text encoder, both frozen. Two linear towers f and g map the views to unit
vectors x and y, and what belongs together is to lie together, by one of

    softmax   -log( e^(t x_i.y_i) / sum_j e^(t x_i.y_j) ), both ways                                     (1)
    sigmoid   -sum_j log sigmoid( z_ij (t x_i.y_j + b) ), z_ij = 1 if i = j, else -1                     (2)
    margin    max(0, |x_i - y_i|^2 - |x_i - y_j|^2 + m), both ways                                       (3)
    ratio     ( e^(t |x_i - y_i|) / (e^(t |x_i - y_i|) + e^(t |x_i - y_j|)) )^2, both ways               (4)

with learned t and b. Every loss is trained in batches of two sizes that see equally many pairs, so that large
batches make fewer steps, once for few epochs and once for many, each at a rate of its own, chosen on the
validation split. The negatives of (1) and (2) are all others of the batch; those of (3) and (4) the next 31,
which in a batch of 32 are all. A caption of each photograph is drawn in every epoch.

Closed forms are the control: ``least_squares`` maps one view to the other, ``canonical`` (CCA) maps both, as
the towers do, by linear maps of the same width. ``untrained`` are the towers at their start.

``recall_at_1`` is the share of held-out views whose other view is nearest, both ways (to a photograph, one of
its captions); ``recall_at_1_short`` the same after few epochs; ``recall_at_1_of_softmax_32`` what a row keeps
of the softmax's. All seeds ask the same things, so that an interval over seeds does not say how much others
would change.

Deviations: (4) is published for vectors of any norm; on unit vectors, without t, it learns little. Networks
are linear, over pixels or over frozen encoders, and batches are small.

Shape letters: B of a batch, K first views of a thing, D and E widths of the views, R of the shared space.

Source: Radford et al. (2021), CLIP, arXiv 2103.00020, figure 3; Zhai et al. (2023), SigLIP, arXiv 2303.15343,
algorithm 1 (t from 10 and b from -10) and section 4.2 (small batches); Schroff, Kalenichenko and Philbin
(2015), FaceNet, arXiv 1503.03832; Hoffer and Ailon (2015), arXiv 1412.6622.
"""

import math
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from workbench.evaluation.retrieval import recall_values, retrieval_ranks
from workbench.families.comparison import FamilyModel, Outcome, SplitRecipe, comparison_of, needs_tokens
from workbench.families.views import Views, captioned_photographs, digit_halves
from workbench.geometry.closed_form import canonical, factor, ridge
from workbench.geometry.uniformity import placement
from workbench.geometry.whitening import moments_of
from workbench.objectives import paired_contrastive, sigmoid_contrastive, triplet_margin, triplet_ratio
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit, seed_everything

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

NEGATIVES = 31  # of an anchor in (3) and (4)
SCALE = 10.0  # t's start
STRENGTH = 0.01  # of the closed forms' load, in units of the mean variance; the best of four on valid, digits
TRAINED = ("softmax", "sigmoid", "margin", "ratio")


class ObjectiveModel(FamilyModel):
    """One loss in batches of one size, or a row that is not trained."""

    kind: Literal[
        "chance", "untrained", "least_squares", "canonical", "softmax", "sigmoid", "margin", "ratio"
    ]
    batch_size: int = Field(default=32, gt=1, le=1024)
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
    width: int = Field(default=16, gt=0, description="R")
    pictures: str | None = Field(
        default=None, description="image encoder; data is a manifest of photographs then, else digits"
    )


RECIPE = ObjectiveRecipe


def load_data(recipe: ObjectiveRecipe) -> Loaded:
    """Read both views of what the recipe names."""
    if recipe.pictures is None:
        return digit_halves(recipe.split)
    return captioned_photographs(recipe.data.name, recipe.encoder, recipe.pictures, recipe.split)


class Towers(nn.Module):
    """f and g, with the scale t and the bias b of a loss."""

    def __init__(self, views: Views, width: int, bias: float) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(side.shape[-1], width) for side in views.train)
        self.log_scale, self.bias = (nn.Parameter(torch.tensor(at)) for at in (math.log(SCALE), bias))

    def forward(
        self, first: Float[Tensor, "B *K D"], second: Float[Tensor, "B E"]
    ) -> tuple[Float[Tensor, "B *K R"], Float[Tensor, "B R"]]:
        """Map both views to unit vectors."""
        found = self.first(first), self.second(second)
        return tuple(functional.normalize(side, dim=-1) for side in found)


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


def recall(x: Float[Tensor, "N K R"], y: Float[Tensor, "N R"]) -> float:
    """Return the share of views whose other view is the nearest by cosine, both ways; 0 to 1, ideal 1."""
    x, y = functional.normalize(x, dim=-1), functional.normalize(y, dim=-1)
    ranks = (found.numpy() for found in retrieval_ranks(x, y))
    return float(recall_values(*ranks)["recall_at_1"].mean())


def closed_form(kind: str, views: Views, width: int) -> float:
    """Return the recall of least squares from first to second views, or of CCA on both."""
    pairs, (first, second) = views.pairs(), views.asked
    one, other = (moments_of(side) for side in pairs)
    cross = (pairs[0].double() - one.mean).T @ (pairs[1].double() - other.mean) / len(pairs[0])
    if kind == "least_squares":
        of_first, of_second = ridge(one, other, cross, STRENGTH), lambda side: side
    else:
        maps = canonical(one, other, cross, (factor(one, STRENGTH), factor(other, STRENGTH)), width)
        of_first, of_second = maps.of_text, maps.of_image
    return recall(of_first(first.flatten(0, 1)).unflatten(0, first.shape[:2]), of_second(second))


def measure(recipe: ObjectiveRecipe, views: Views, model: ObjectiveModel, seed: int, folder: Path) -> Outcome:
    """Train one row twice, for many epochs and for few, and find the held-out pairs."""
    count, about, values = len(views.asked[1]), {"parameters": 0}, {}
    if model.kind == "chance":
        return Outcome({"recall_at_1": 1 / count}, count, about)
    if model.kind in ("least_squares", "canonical"):
        return Outcome({"recall_at_1": closed_form(model.kind, views, recipe.width)}, count, about)
    bias = -math.log(model.batch_size - 1) if model.bias is None else model.bias
    lengths = {"recall_at_1": (recipe.training.epochs, model.learning_rate)}
    if model.kind in TRAINED:
        lengths["recall_at_1_short"] = (recipe.short, model.short_rate)
    for name, (epochs, rate) in lengths.items():
        seed_everything(seed)  # the same start at both lengths
        net, own = Towers(views, recipe.width, bias), folder / name
        if model.kind in TRAINED:
            own.mkdir(parents=True, exist_ok=True)
            changes = {"epochs": epochs, "batch_size": model.batch_size}
            training = recipe.training.at_rate(rate).model_copy(update=changes)

            def loss(items: Tensor, net: Towers = net) -> Tensor:
                return loss_of(model.kind, net, *net(*views.drawn(items)))

            history = fit(net, loss, len(views.train[1]), training, own, seed=seed)
            about.setdefault("history", history)
            about["parameters"] = sum(one.numel() for one in net.parameters() if one.grad is not None)
        with torch.no_grad():
            x, y = net(*views.asked)
            values[name] = recall(x, y)
            about.setdefault("geometry", placement(x[:, 0], y, torch.cat([x.flatten(0, 1), y])))
    return Outcome(values, count, about)


compare = comparison_of(measure, shares=("recall_at_1",))

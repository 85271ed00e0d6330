"""Articulation: a state's code generates the network of its shape; states never seen lie between codes.

An arm of two links bends at the elbow. Occupancy of the plane is learned at K angles; a code z_k of each
state is turned into the weights of a small coordinate network:

    f(p; theta + H(z_k)) > 0 inside the arm in state k                                                  (1)
    f(p, z_k; theta) > 0, the control: the code is part of the input                                    (2)

The states halfway between two neighbours are never trained on. They are asked with the mean of the two codes

    z = (z_k + z_{k+1}) / 2                                                                             (3)

and what counts is the overlap with the true arm at the halfway angle. The codes are learned with the rest, or
they are the known angle. Further controls: ``nearest`` answers with the true arm of a neighbouring state, and
``table`` has a network of its own for every state, of which (3) takes the mean weights: no generator, so
nothing says that weights between two networks mean a state between.

Deviation: LEIA learns radiance fields of objects from pictures of a few states; here occupancy in the plane
is known, which leaves the one claim that can be measured in seconds, interpolation of states.

Shape letters: S states, K trained states, M points, C code width.

Source: Swaminathan et al. (2024), LEIA, arXiv 2409.06703: a learned code per state, a hypernetwork on it, and
linear interpolation of codes; without its loss on the manifold of codes.
"""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from workbench.families.comparison import FamilyModel, FamilyRecipe, Outcome, comparison_of, needs_tokens
from workbench.families.fields import (
    ConcatField,
    GeneratedField,
    TableField,
    drawn_curves,
    grid,
    overlap,
    to_segment,
)
from workbench.files import digest
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit_drawn

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

BEND = 80 * torch.pi / 180  # the elbow bends from minus this to this
SHOULDER, LENGTH, RADIUS = (-0.7, 0.0), 0.7, 0.12  # of the links; the elbow stands in the middle
CODE, POINTS, GRID = 4, 256, 48
CODE_RATE = {"codes": 0.03}  # codes move faster than weights: there are few, and all start alike
DRAWN = (0, 3)  # halfway states kept for pictures


class ArticulationModel(FamilyModel):
    """How a state becomes a shape."""

    kind: Literal["generated", "concat", "table", "nearest"]
    code: Literal["learned", "angle"] = "learned"
    width: int = Field(default=32, gt=0)
    learning_rate: float | None = Field(default=None, gt=0, description="null: the recipe's")


class ArticulationRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["articulation"]
    models: tuple[ArticulationModel, ...] = Field(min_length=1)
    training: Training
    states: int = Field(default=9, gt=1, description="angles to train on, evenly spaced")
    steps: int = Field(gt=0, description="of training; each sees every state")


RECIPE = ArticulationRecipe


def load_data(recipe: ArticulationRecipe) -> Loaded:
    """Return the angles of the trained states, in radians."""
    angles = torch.linspace(-BEND, BEND, recipe.states)
    counts = {
        "train": {"states": recipe.states},
        "test": {"states": recipe.states - 1, "points": GRID**2},
    }
    return Loaded(angles, digest(str(angles.tolist())), counts)


def arm(points: Float[Tensor, "#S M 2"], angles: Float[Tensor, " S"]) -> Bool[Tensor, "S M"]:
    """Tell which points lie within the radius of one of the arm's two links.

    Args:
        points: of the square [-1, 1] x [-1, 1].
        angles: of the elbow, in radians; 0 is a straight arm.
    """
    upper = torch.tensor(SHOULDER).expand(len(angles), 2)
    elbow = upper + torch.tensor((LENGTH, 0.0))
    hand = elbow + LENGTH * torch.stack([angles.cos(), angles.sin()], 1)
    return torch.minimum(to_segment(points, upper, elbow), to_segment(points, elbow, hand)) <= RADIUS


class Arm(nn.Module):
    """The shape of any mixture of trained states."""

    def __init__(self, recipe: ArticulationRecipe, model: ArticulationModel) -> None:
        super().__init__()
        widths, states = (2, model.width, model.width, model.width, 1), recipe.states
        if model.kind == "table":
            self.field = TableField(widths, states)
            # Every state starts from the same weights, which is kindest to their mean.
            nn.init.normal_(self.field.codes[:1])
            self.field.codes.data[1:] = self.field.codes.data[0]
            return
        width = 1 if model.code == "angle" else CODE
        if model.code == "angle":
            self.register_buffer("codes", torch.linspace(-1.7, 1.7, states)[:, None])  # about unit variance
        else:
            # Close together, so that the states order them: far apart they would stay in the order drawn.
            self.codes = nn.Parameter(0.1 * torch.randn(states, width))
        kind = GeneratedField if model.kind == "generated" else ConcatField
        self.field = kind(widths, width)

    def forward(self, points: Float[Tensor, "S M 2"], mixture: Float[Tensor, "S K"]) -> Float[Tensor, "S M"]:
        """Return the log odds that points lie inside, for states given as shares of the trained ones."""
        codes = self.field.codes if isinstance(self.field, TableField) else self.codes
        return self.field(points, mixture @ codes)


def halfway(states: int) -> Float[Tensor, "S K"]:
    """Return each halfway state as equal shares of its two neighbours; equation (3)."""
    every = torch.eye(states)
    return (every[:-1] + every[1:]) / 2


def measure(
    recipe: ArticulationRecipe, angles: Tensor, model: ArticulationModel, seed: int, folder: Path
) -> Outcome:
    """Train one row on the K states and ask it about the halfway ones."""
    between = (angles[:-1] + angles[1:]) / 2
    points = grid(GRID)[None].expand(len(angles), -1, -1)
    truth, trained = arm(points[1:], between), arm(points, angles)
    values, about = {}, {"parameters": 0}
    if model.kind == "nearest":
        answers = trained[:-1]  # both neighbours are as near
    else:
        own = Arm(recipe, model)
        about["history"] = train(own, recipe, angles, model, seed, folder)
        with torch.no_grad():
            answers = own(points[1:], halfway(len(angles))) > 0
            values["iou_trained"] = float(overlap(own(points, torch.eye(len(angles))) > 0, trained).mean())
        about |= card(own)
    values["iou"] = float(overlap(answers, truth).mean())
    shown = [number for number in DRAWN if number < len(between) and seed == recipe.seeds[0]]
    return Outcome(values, len(between), about, drawn_curves("arm", answers[shown], truth[shown]))


def train(
    own: Arm, recipe: ArticulationRecipe, angles: Tensor, model: ArticulationModel, seed: int, folder: Path
) -> list[dict[str, int | float]]:
    """Learn the K states, at new points in every step."""
    training = recipe.training.at_rate(model.learning_rate)
    pure = torch.eye(len(angles))

    def loss(_: int, draw: torch.Generator) -> Tensor:
        points = 2 * torch.rand(len(angles), POINTS, 2, generator=draw) - 1
        inside = arm(points, angles).float()
        return functional.binary_cross_entropy_with_logits(own(points, pure), inside)

    return fit_drawn(own, loss, recipe.steps, training, folder, seed=seed, rates=CODE_RATE)


def card(own: Arm) -> dict[str, object]:
    """Say what the row holds and, if it generates, whether the generator is alive."""
    about: dict[str, object] = {"parameters": sum(one.numel() for one in own.parameters())}
    if isinstance(own.field, GeneratedField):
        about |= own.field.shape.card(own.codes.detach(), grid(GRID))
    elif isinstance(own.field, TableField):
        about |= own.field.shape.card(torch.arange(len(own.field.codes)), grid(GRID))
    return about


compare = comparison_of(measure)

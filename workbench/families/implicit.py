"""Shapes from latent codes: a code generates the network that says which points lie inside.

A shape s is a superellipsoid: in its own axes a point p of the cube [-1, 1]^P is q = R_s p / a_s, and

    r_1 = |q_1|,   r_i = (r_{i-1}^{e_i} + |q_i|^{e_i})^{1 / e_i},   inside if r_P <= 1                  (1)

with half axes a_s, exponents e_i and a rotation R_s (:mod:`workbench.families.superellipsoids`). A network f
of few weights answers for a point, and a learned code z_s of each shape is turned into the network:

    f(p; theta + H(z_s)) > 0 inside                                                                     (2)
    f(p, z_s; theta) > 0 inside, the control: the code is part of the input                             (3)

All codes and weights are learned together from training shapes. A held-out shape is known at a few points;
its code is found by gradient descent while all else stays as it is (latent optimisation), and the overlap
with the truth is measured at other points. What generated weights buy is cheap queries: once generated, a
point costs the weights of f, while (3) has to be wider for the same quality.

More controls: ``alone`` trains the network (2) of each held-out shape from its few points, with no other
shape; ``nearest`` answers with the training shape that agrees best at these points; ``gradient_origin`` has
no codes to fit: z is minus the gradient of the loss at the code 0, one step in place of many.

Deviation: the papers learn ShapeNet categories and generate from images; here shapes follow rule (1), and a
training takes seconds.

Shape letters: S shapes, M points of each, P coordinates of a point, C code width.

Source: Littwin and Wolf (2019), arXiv 1908.06277, section 3; the comparison with concatenation follows
Sitzmann et al. (2020), MetaSDF, arXiv 2006.09662; equation (1) is Barr's superquadric (1981); the last
control follows Bond-Taylor and Willcocks (2021), arXiv 2007.02798.
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
    drawn_curves,
    fit_alone,
    fit_codes,
    origin_codes,
    overlap,
)
from workbench.families.superellipsoids import Shapes, cube, draw_shapes, middle_slice
from workbench.families.tasks import trained_parameters
from workbench.files import digest
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

CODE, POINTS = 8, 128  # numbers per shape; points of a shape in one step
GIVEN, ASKED = 256, 4096  # points at which a held-out shape is known, and others at which it is asked
# A code is seen once in a few steps and starts at nothing meaningful, so it has to move faster than weights.
CODE_RATE = {"codes": 0.03}
DRAWN, GRID = 3, 24  # held-out shapes kept for pictures: one slice each of 24 x 24 points


class ImplicitModel(FamilyModel):
    """How a code becomes a shape, and how wide the network is."""

    kind: Literal["generated", "concat", "alone", "nearest", "gradient_origin"]
    width: int = Field(default=32, gt=0)
    learning_rate: float | None = Field(default=None, gt=0, description="null: the recipe's")

    def widths(self, dimensions: int) -> tuple[int, ...]:
        """Return the layers' widths of the network that answers for a point."""
        return dimensions, self.width, self.width, self.width, 1


class ImplicitRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["implicit"]
    models: tuple[ImplicitModel, ...] = Field(min_length=1)
    training: Training
    dimensions: Literal[2, 3] = 3
    shapes: int = Field(default=96, gt=1, description="to train on")
    held_out: int = Field(default=24, gt=0)
    steps: int = Field(gt=0, description="of training; each sees batch_size shapes")
    code_steps: int = Field(default=200, gt=0, description="of fitting the code of a held-out shape")


RECIPE = ImplicitRecipe


def load_data(recipe: ImplicitRecipe) -> Loaded:
    """Draw the shapes; those held out come last."""
    shapes = draw_shapes(recipe.shapes + recipe.held_out, recipe.dimensions)
    counts = {"train": {"shapes": recipe.shapes}, "test": {"shapes": recipe.held_out, "points": ASKED}}
    return Loaded(shapes, digest(*(str(part.tolist()) for part in shapes)), counts)


class Family(nn.Module):
    """A field and one learned code per training shape."""

    def __init__(self, recipe: ImplicitRecipe, model: ImplicitModel) -> None:
        super().__init__()
        widths = model.widths(recipe.dimensions)
        self.codes = nn.Embedding(recipe.shapes, CODE)
        nn.init.normal_(self.codes.weight, std=0.3)
        if model.kind == "generated":
            self.field = GeneratedField(widths, CODE)
        elif model.kind == "concat":
            self.field = ConcatField(widths, CODE)
        else:
            self.field, self.codes = ConcatField(widths, CODE, nn.ELU), None  # a gradient of a gradient

    def codes_of(self, which: Tensor, points: Tensor, inside: Tensor) -> Float[Tensor, "S C"]:
        """Return the codes of training shapes: learned, or minus the gradient at the origin."""
        return origin_codes(self.field, CODE, points, inside) if self.codes is None else self.codes(which)


def measure(recipe: ImplicitRecipe, shapes: Shapes, model: ImplicitModel, seed: int, folder: Path) -> Outcome:
    """Train one row and ask it about shapes never trained on."""
    held_out = shapes.of(slice(recipe.shapes, None))
    size = recipe.held_out, recipe.dimensions
    given = held_out.sample(GIVEN, 7_000_003 + seed)
    asked = torch.cat([cube((size[0], ASKED, size[1]), 8_000_009 + seed), middle_slice(*size, GRID)], 1)
    inside = held_out.contain(given)
    values, about = {}, {"parameters": 0}
    if model.kind == "nearest":
        known = shapes.of(slice(0, recipe.shapes))
        agree = [(known.contain(own[None]) == truth).sum(1) for own, truth in zip(given, inside, strict=True)]
        answers = known.of(torch.stack(agree).argmax(1)).contain(asked)
    elif model.kind == "alone":
        widths, training = model.widths(recipe.dimensions), recipe.training.at_rate(model.learning_rate)
        alone, history = fit_alone(widths, given, inside, training, recipe.steps, folder, seed=seed)
        answers = alone(asked, alone.codes).detach() > 0
        about = {"parameters": trained_parameters(alone), "per_query": alone.per_query}
        about |= {"history": history, "cost": alone.shape.cost()}
    else:
        family, about["history"] = train(recipe, shapes, model, seed, folder)
        answers, values["iou_train"] = ask(recipe, family, shapes, given, inside, asked)
        about |= card(family, given)
    truth = held_out.contain(asked)
    values["iou"] = float(overlap(answers[:, :ASKED], truth[:, :ASKED]).mean())
    values |= {"weights_per_query": about["per_query"]} if "per_query" in about else {}
    first, slices = seed == recipe.seeds[0], (slice(DRAWN), slice(ASKED, None))
    curves = drawn_curves("shape", answers[slices], truth[slices]) if first else {}
    return Outcome(values, recipe.held_out, about, curves)


def train(
    recipe: ImplicitRecipe, shapes: Shapes, model: ImplicitModel, seed: int, folder: Path
) -> tuple[Family, list[dict[str, int | float]]]:
    """Learn codes and weights from the training shapes, at new points in every step."""
    family, training = Family(recipe, model), recipe.training.at_rate(model.learning_rate)

    def loss(items: Tensor) -> Tensor:
        which = items % recipe.shapes
        chosen = shapes.of(which)
        points = chosen.sample(POINTS, int(items[0]) * 1009 + seed)
        inside = chosen.contain(points)
        logits = family.field(points, family.codes_of(which, points, inside))
        return functional.binary_cross_entropy_with_logits(logits, inside.float())

    count = recipe.steps * training.batch_size
    history = fit(family, loss, count, training, folder, seed=seed, rates=CODE_RATE)
    return family, history


def ask(
    recipe: ImplicitRecipe, family: Family, shapes: Shapes, given: Tensor, inside: Tensor, asked: Tensor
) -> tuple[Bool[Tensor, "S M"], float]:
    """Answer for held-out shapes after finding their codes; the overlap on training shapes comes along."""
    known, points = shapes.of(slice(0, recipe.shapes)), asked[:1, :ASKED].expand(recipe.shapes, -1, -1)
    truth = known.contain(points)
    if family.codes is None:
        codes = origin_codes(family.field, CODE, given, inside).detach()
        own = known.sample(GIVEN, 9_000_011)
        own = origin_codes(family.field, CODE, own, known.contain(own)).detach()
    else:
        own = family.codes.weight
        start = own.mean(0).expand(len(given), -1)
        steps, rate = recipe.code_steps, 0.05
        codes = fit_codes(family.field, start, given, inside, steps=steps, learning_rate=rate)
    with torch.no_grad():
        seen = overlap(family.field(points, own) > 0, truth)
        return family.field(asked, codes) > 0, float(seen.mean())


def card(family: Family, given: Tensor) -> dict[str, object]:
    """Say what the row holds and, if it generates, whether the generator is alive."""
    about: dict[str, object] = {"parameters": trained_parameters(family)}
    about["per_query"] = family.field.per_query
    if isinstance(family.field, GeneratedField):
        about |= family.field.shape.card(family.codes.weight[:24].detach(), given[0])
    return about


compare = comparison_of(measure)

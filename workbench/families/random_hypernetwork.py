"""Random hypernetworks: a picture as a short code that a fixed random map turns into a network's weights.

A coordinate network f with P weights draws one picture, value f(p) at point p. In place of its weights, a
code z of k < P numbers is learned, and nothing else:

    theta = s * (A z / sqrt(k)),   A of P x k standard normal numbers, drawn once, never trained        (1)

with s the scale each layer wants at the start. A seed stands for A, so k numbers are the picture. The network
is a SIREN: sin(w_0 (W x + b)) between linear layers, with W's first bounds 1 / fan-in and later ones
sqrt(6 / fan-in) / w_0 (uniform; here numbers are normal, of the same variance).

Controls by the same path, one learned row of weights per picture in place of A z: the same SIREN with all its
weights learned, and small SIRENs of about as many weights as a code has numbers. The second is what has to be
beaten for (1) to be compression.

Shape letters: U pictures, M points, C code width.

Source: D'OH, Decoder-Only random Hypernetworks for Implicit Neural Representations (2024), arXiv 2403.19163,
section 3; SIREN: Sitzmann et al. (2020), arXiv 2006.09661, section 3.2. Deviation: 32 x 32 grey pictures, one
projection for all layers.
"""

import math
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from workbench.families.comparison import FamilyModel, FamilyRecipe, Outcome, comparison_of, needs_tokens
from workbench.families.fields import drawn_curves, grid, network
from workbench.files import digest
from workbench.hypernetworks import Conditioned, ParamSpec, RandomProjection, Table
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

SIZE = 32  # pixels along a side
FREQUENCY = 15.0  # w_0; Deviation: 30 in SIREN, for larger pictures


class RandomModel(FamilyModel):
    """Where the weights come from."""

    kind: Literal["random", "table"]
    code: int = Field(default=0, ge=0, description="numbers per picture; only for kind random")
    width: int = Field(default=24, gt=0, description="of the SIREN's three hidden layers")
    learning_rate: float | None = Field(default=None, gt=0, description="null: the recipe's")


class RandomRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["random_hypernetwork"]
    models: tuple[RandomModel, ...] = Field(min_length=1)
    training: Training
    steps: int = Field(gt=0, description="of training; each sees every pixel of every picture")


RECIPE = RandomRecipe


class Sine(nn.Module):
    """sin(w_0 x)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply it."""
        return torch.sin(FREQUENCY * inputs)


def load_data(recipe: RandomRecipe) -> Loaded:
    """Read scikit-learn's two photographs: the middle square, grey, 32 x 32, values from -1 to 1."""
    pictures = []
    for photo in load_sample_images().images:
        edge = min(photo.shape[:2])
        top, left = (photo.shape[0] - edge) // 2, (photo.shape[1] - edge) // 2
        square = Image.fromarray(photo).convert("L").crop((left, top, left + edge, top + edge))
        small = square.resize((SIZE, SIZE), Image.Resampling.BOX)
        pictures.append(torch.tensor(list(small.tobytes())) / 127.5 - 1)
    stacked = torch.stack(pictures)
    return Loaded(stacked, digest(str(stacked.tolist())), {"train": {"pictures": len(stacked)}})


def siren(width: int) -> tuple[nn.Sequential, ParamSpec]:
    """Return a SIREN and the spec of all its weights, with SIREN's scales."""
    target = network((2, width, width, width, 1), Sine)
    # U(-1/n, 1/n) has deviation 1 / (n sqrt(3)), which is gain / sqrt(n) with this gain for n = 2 inputs.
    first = ParamSpec.of(target, "0.*", joins="replace", gain=1 / math.sqrt(3 * 2))
    rest = ParamSpec.of(target, ["[246].*"], joins="replace", gain=math.sqrt(2) / FREQUENCY)
    return target, ParamSpec((*first.slots, *rest.slots))


class Pictures(nn.Module):
    """One network per picture; what is learned is its code or its weights."""

    def __init__(self, model: RandomModel, count: int, seed: int) -> None:
        """Build it.

        Raises:
            ValueError: a random hypernetwork without a code, or a table with one.
        """
        super().__init__()
        if (model.kind == "random") != (model.code > 0):
            raise ValueError(f"model {model.name}: code goes with kind 'random' and with no other")
        target, spec = siren(model.width)
        if model.kind == "random":
            self.codes = nn.Parameter(torch.randn(count, model.code))
            self.picture = Conditioned(target, RandomProjection(model.code, spec, seed))
        else:
            self.register_buffer("codes", torch.arange(count))
            self.picture = Conditioned(target, Table(count, spec))

    def forward(self, points: Float[Tensor, "M 2"]) -> Float[Tensor, "U M"]:
        """Return every picture's values at the same points."""
        inputs = points.expand(len(self.codes), -1, -1)
        return self.picture(inputs, self.picture.weights(self.codes))[..., 0]


def signal_to_noise(drawn: Float[Tensor, "U M"], true: Float[Tensor, "U M"]) -> Float[Tensor, " U"]:
    """Return the peak signal-to-noise ratio in dB for values from -1 to 1; higher is better, no upper end.

    10 log10(peak^2 / mean squared error), the peak being the range, 2.
    """
    return 10 * torch.log10(4 / (drawn - true).square().mean(1))


def measure(
    recipe: RandomRecipe,
    pictures: Tensor,
    model: RandomModel,
    seed: int,
    folder: Path,
) -> Outcome:
    """Fit one row to the pictures; psnr is of the fit, nothing is held out."""
    own, points = Pictures(model, len(pictures), seed), grid(SIZE)

    def loss(_: Tensor) -> Tensor:
        return (own(points) - pictures).square().mean()

    training = recipe.training.at_rate(model.learning_rate)
    history = fit(own, loss, recipe.steps * training.batch_size, training, folder, seed=seed)
    with torch.no_grad():
        drawn = own(points)
    learned = model.code or own.picture.spec.numel
    about = {"parameters": learned * len(pictures), "per_picture": learned, "cost": own.picture.cost(),
             "history": history}  # fmt: skip
    if model.kind == "table":
        about["health"] = own.picture.health(own.codes, points).to_dict()
    curves = drawn_curves("picture", drawn, pictures) if seed == recipe.seeds[0] else {}
    values = {"psnr": float(signal_to_noise(drawn, pictures).mean()), "numbers_per_picture": learned}
    return Outcome(values, pictures.numel(), about, curves)


compare = comparison_of(measure)

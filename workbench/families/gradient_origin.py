"""Gradient origin networks: a code without an encoder and without a generator, the gradient at the origin.

A decoder F turns a code into an image x. Its code is read off the decoder itself:

    z_0 = 0,   z = -grad_{z_0} |x - F(z_0)|^2                                                           (1)
    loss = |x - F(z)|^2                                                                                 (2)

and (2) is differentiated through (1), so activations need a second derivative (SiLU here). It is the control
of all shape families: what a hypernetwork or an encoder learns in order to find a code, one gradient step
gives for nothing.

Rows: the gradient origin network; an autoencoder with the same decoder and a mirrored encoder, so twice the
weights; a narrower autoencoder with as many weights as the first row; and principal components, the closed
form with a code of the same size.

Shape letters: N images, D pixels, C code width.

Source: Bond-Taylor and Willcocks (2021), Gradient Origin Networks, arXiv 2007.02798, section 3. Deviation:
the 8 x 8 digits that come with scikit-learn, fully connected layers.
"""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from workbench.datasets.digits import PIXELS, every_digit
from workbench.families.comparison import FamilyModel, FamilyRecipe, Outcome, comparison_of, needs_tokens
from workbench.families.fields import code_at_origin, drawn_curves, network
from workbench.files import digest
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

TRAIN, DRAWN = 1400, 4  # images trained on; test images kept for pictures


class GradientOriginModel(FamilyModel):
    """Where the code comes from."""

    kind: Literal["gradient_origin", "autoencoder", "components"]
    width: int = Field(default=128, gt=0)


class GradientOriginRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["gradient_origin"]
    models: tuple[GradientOriginModel, ...] = Field(min_length=1)
    training: Training
    code: int = Field(default=16, gt=0, le=PIXELS, description="width of the code")


RECIPE = GradientOriginRecipe


def load_data(recipe: GradientOriginRecipe) -> Loaded:
    """Read the digits, pixels from 0 to 1, in one fixed order; the last ones are the test images."""
    images = every_digit(torch.Generator().manual_seed(0))[0] / 16
    counts = {"train": {"images": TRAIN}, "test": {"images": len(images) - TRAIN}}
    return Loaded(images, digest(str(images.tolist())), counts)


class GradientOrigin(nn.Module):
    """A decoder and nothing else; equation (1)."""

    def __init__(self, code: int, width: int) -> None:
        super().__init__()
        self.code, self.decoder = code, network((code, width, width, PIXELS), nn.SiLU)

    def codes(self, images: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """Return each image's code; differentiable in the decoder."""

        def error(codes: Float[Tensor, "N C"]) -> Float[Tensor, ""]:
            return (images - self.decoder(codes)).square().sum()

        return code_at_origin(error, torch.zeros(len(images), self.code))

    def forward(self, images: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Return what the decoder makes of each image's code."""
        return self.decoder(self.codes(images))


class Autoencoder(nn.Module):
    """The control: a code from an encoder of its own."""

    def __init__(self, code: int, width: int) -> None:
        super().__init__()
        self.encoder = network((PIXELS, width, width, code), nn.SiLU)
        self.decoder = network((code, width, width, PIXELS), nn.SiLU)

    def forward(self, images: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Encode and decode."""
        return self.decoder(self.encoder(images))


def components(train: Float[Tensor, "N D"], test: Float[Tensor, "M D"], code: int) -> Float[Tensor, "M D"]:
    """Rebuild test images from their first principal components, fitted on the training images."""
    mean = train.mean(0)
    basis = torch.linalg.svd(train - mean, full_matrices=False).Vh[:code]
    return mean + (test - mean) @ basis.T @ basis


def measure(
    recipe: GradientOriginRecipe, images: Tensor, model: GradientOriginModel, seed: int, folder: Path
) -> Outcome:
    """Train one row and rebuild test images; the squared error is summed over an image's pixels (0 to 1)."""
    train, test = images[:TRAIN], images[TRAIN:]
    if model.kind == "components":
        rebuilt = components(train, test, recipe.code)
        about = {"parameters": PIXELS * (recipe.code + 1)}
    else:
        kind = GradientOrigin if model.kind == "gradient_origin" else Autoencoder
        net = kind(recipe.code, model.width)

        def loss(items: Tensor) -> Tensor:
            return (net(train[items]) - train[items]).square().mean()

        history = fit(net, loss, TRAIN, recipe.training, folder, seed=seed)
        rebuilt = net(test).detach()
        about = {"parameters": sum(one.numel() for one in net.parameters()), "history": history}
    error = (rebuilt - test).square().sum(1).mean()
    values = {"squared_error": float(error), "parameters": about["parameters"]}
    shown = DRAWN if seed == recipe.seeds[0] else 0
    return Outcome(values, len(test), about, drawn_curves("digit", rebuilt[:shown], test[:shown]))


compare = comparison_of(measure)

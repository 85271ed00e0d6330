"""The static hypernetwork: the kernels of all layers of one network from a few numbers per layer.

Nothing is conditioned on the input. A layer l has a code z_l in R^d, d = 8, and the kernel K_l, with N_in and
N_out channels and f x f places, is generated in two layers, one input channel i at a time:

    a_i = W_i z_l + B_i                                                                                   (1)
    K_l,i = W_out a_i + B_out                                                                             (2)

W_i and B_i belong to a channel and not to a layer, W_out and B_out to neither, so the generator holds
d (d + 1) N_in + f^2 N_out (d + 1) numbers and a layer only d. The network is residual,

    x <- x + K_l * relu(x),  l = 1 ... 6                                                                  (3)

The controls: every layer a kernel of its own ("free"), one kernel that all layers share ("tied", what is left
of equation (2) when all codes are equal, and often left out of comparisons), and free kernels for fewer
channels, so that they hold about as many numbers as the generator ("narrow").

What is claimed is fewer numbers, not better answers: in the paper the generated networks lose 1.3 and 1.6
points on CIFAR-10.

Deviations from the paper: digits of 8 x 8 pixels, no batch norm, codes and generator start at unit variance.

Shape letters: L layers, B batch, C channels, D code.

Source: Ha, Dai and Le (2016), HyperNetworks, arXiv 1609.09106, section 3.1.
"""

import math
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from workbench.datasets.digits import Digits, load_digits
from workbench.families.comparison import (
    FamilyModel,
    FamilyRecipe,
    Outcome,
    comparison_of,
    needs_tokens,
)
from workbench.hypernetworks import GeneratedWeights, ParamSpec, Slot, Table, health_of
from workbench.hypernetworks.generators import cost_of
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

SIDE, PLACES, LAYERS, CLASSES = 8, 3, 6, 10
CHANNELS, CODE, GAIN = 12, 8, 0.5


class StaticModel(FamilyModel):
    """Where the kernels come from."""

    kind: Literal["hyper", "free", "tied"]
    channels: int = Field(default=CHANNELS, gt=0)
    learning_rate: float | None = Field(default=None, gt=0, description="null for the recipe's")


class StaticRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["static"]
    models: tuple[StaticModel, ...] = Field(min_length=1)
    training: Training


RECIPE = StaticRecipe


def load_data(recipe: StaticRecipe) -> Loaded:
    """Read the digits; their split is the same for every seed."""
    digits = load_digits()
    return Loaded(digits, digits.sha256, digits.counts)


class KernelGenerator(nn.Module):
    """Equations (1) and (2): a code per layer gives that layer's kernel."""

    def __init__(self, spec: ParamSpec, channels: int) -> None:
        super().__init__()
        self.spec = spec
        self.enter = nn.Linear(CODE, channels * CODE)
        self.head = nn.Linear(CODE, channels * PLACES**2)
        for layer in (self.enter, self.head):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(CODE))
            nn.init.zeros_(layer.bias)

    def forward(self, codes: Float[Tensor, "L D"]) -> GeneratedWeights:
        """Generate one kernel per code."""
        by_input = self.head(self.enter(codes).unflatten(1, (-1, CODE)))
        kernels = by_input.unflatten(2, (-1, PLACES, PLACES)).transpose(1, 2)  # torch has outputs first
        return self.spec.compose(kernels.flatten(1))


class ResidualNet(nn.Module):
    """Equation (3), between a convolution that all rows have and a linear layer."""

    def __init__(self, model: StaticModel) -> None:
        super().__init__()
        shape = (model.channels, model.channels, PLACES, PLACES)
        # The residual sum grows with every layer; half the usual gain keeps it near its start.
        spec = ParamSpec((Slot("kernel", shape, "tensor", gain=GAIN * math.sqrt(2)),))
        self.enter = nn.Conv2d(1, model.channels, PLACES, padding=1)
        self.answer = nn.Linear(4 * model.channels, CLASSES)
        if model.kind == "hyper":
            self.codes, self.generator = nn.Embedding(LAYERS, CODE), KernelGenerator(spec, model.channels)
        else:
            self.codes, self.generator = None, Table(LAYERS if model.kind == "free" else 1, spec)

    def conditions(self) -> Tensor:
        """Return the layers' codes, or their numbers in a table; all 0 in a table of one row."""
        if self.codes is not None:
            return self.codes.weight
        return torch.arange(LAYERS).clamp_max(self.generator.head.num_embeddings - 1)

    def forward(self, images: Float[Tensor, "B 64"]) -> Float[Tensor, "B 10"]:
        """Return log odds of the digits."""
        hidden = self.enter(images.unflatten(1, (1, SIDE, SIDE)))
        for kernel in self.generator(self.conditions()).tensors["kernel"]:
            hidden = hidden + functional.conv2d(hidden.relu(), kernel, padding=1)
        return self.answer(functional.adaptive_avg_pool2d(hidden.relu(), 2).flatten(1))

    def convolution_numbers(self) -> int:
        """Count what the kernels of the residual layers are kept in, codes included."""
        parts = [self.generator] if self.codes is None else [self.generator, self.codes]
        return sum(one.numel() for part in parts for one in part.parameters())

    @torch.no_grad()
    def apartness(self) -> Float[Tensor, " L"]:
        """Return how far each layer's kernel lies from the layers' mean, over the mean's norm; 0 if tied."""
        kernels = self.generator(self.conditions()).tensors["kernel"].flatten(1)
        mean = kernels.mean(0)
        return torch.linalg.vector_norm(kernels - mean, dim=1) / torch.linalg.vector_norm(mean)


def measure(recipe: StaticRecipe, content: Digits, model: StaticModel, seed: int, folder: Path) -> Outcome:
    """Train one row on the digits and test it on others."""
    net, training = ResidualNet(model), recipe.training.at_rate(model.learning_rate)
    start = net.generator.head.weight.detach().clone()
    inputs, labels = content.inputs["train"], content.labels["train"]

    def loss(items: Tensor) -> Tensor:
        return functional.cross_entropy(net(inputs[items]), labels[items])

    history = fit(net, loss, len(labels), training, folder, seed=seed)
    with torch.no_grad():
        right = net(content.inputs["test"]).argmax(1) == content.labels["test"]
    numbers = net.convolution_numbers()
    values = {
        "accuracy": float(right.double().mean()),
        "convolution_numbers": float(numbers),
        "size_to_free": numbers / (LAYERS * CHANNELS**2 * PLACES**2),
    }
    about = {"parameters": sum(one.numel() for one in net.parameters()), "history": history}
    if model.kind == "hyper":
        conditions = net.conditions().detach()
        about |= {
            "cost": cost_of(net.generator),
            "health": health_of(net.generator, conditions, start).to_dict(),
        }
    curves = {
        "training loss": ([float(one["epoch"]) for one in history], [one["loss"] for one in history]),
        "distance of a layer's kernel to the layers' mean": (
            [float(layer) for layer in range(1, LAYERS + 1)],
            net.apartness().tolist(),
        ),
    }
    return Outcome(values, len(right), about, curves)


compare = comparison_of(measure)

"""The limit of weights generated from examples: lines, for which the best weights have a closed form.

A task is y = w x + noise with eight inputs and w from N(0, I/8); twelve points are shown. The weights are

    w_S = G(X'X, X'y)                                                                                   (1)
    w_S = (X'X + q I)^-1 X'y; least squares for q = 0, the Bayes estimate for q = 8 var(noise)           (2)

Shape letters: U tasks, S shown points, D inputs, C condition width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.families.comparison import Outcome
from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec
from workbench.training import DrawnLoss

INPUTS, POINTS, NOISE = 8, 12, 0.25
DRAWN = 10  # tasks for each item of a batch: they are cheap
CLOSED = {"least_squares": 0.0, "ridge": INPUTS * NOISE**2}  # q of equation (2)


def lines(
    count: int, draw: torch.Generator
) -> tuple[Float[Tensor, "U S D"], Float[Tensor, "U S 1"], Float[Tensor, "U D 1"]]:
    """Draw tasks: points, noisy answers, and the weights behind them."""
    weights = torch.randn(count, INPUTS, 1, generator=draw) / math.sqrt(INPUTS)
    x = torch.randn(count, POINTS, INPUTS, generator=draw)
    return x, x @ weights + NOISE * torch.randn(count, POINTS, 1, generator=draw), weights


def closed_form(
    x: Float[Tensor, "U S D"], y: Float[Tensor, "U S 1"], penalty: float
) -> Float[Tensor, "U D 1"]:
    """Equation (2)."""
    return torch.linalg.solve(x.mT @ x + penalty * torch.eye(x.shape[-1]), x.mT @ y)


class GeneratedLines(nn.Module):
    """Equation (1): eight weights from what a closed form needs to know."""

    def __init__(self) -> None:
        """Build the generator."""
        super().__init__()
        target = nn.Linear(INPUTS, 1, bias=False)
        spec = ParamSpec.of(target, joins="replace", gain=1.0)
        width = INPUTS * (INPUTS + 3) // 2
        self.task = Conditioned(target, MLPGenerator(width, spec, (128, 128), unit=True))

    def codes(self, x: Float[Tensor, "U S D"], y: Float[Tensor, "U S 1"]) -> Float[Tensor, "U C"]:
        """Return X'X, one entry per pair of inputs, and X'y, per point."""
        row, column = torch.triu_indices(INPUTS, INPUTS)
        return torch.cat([(x.mT @ x)[:, row, column], (x.mT @ y)[..., 0]], -1) / x.shape[1]

    def forward(self, x: Tensor, y: Tensor) -> Float[Tensor, "U D 1"]:
        """Return each task's weights."""
        return self.task.weights(self.codes(x, y)).tensors["weight"].mT


def measure_lines(
    penalty: float | None,
    tasks: int,
    seed: int,
    train: Callable[[nn.Module, DrawnLoss], dict[str, Any]],
) -> Outcome:
    """Answer new tasks; the expected error of an answer to N(0, I) inputs is |w_S - w|^2.

    Args:
        penalty: q of equation (2); None for equation (1), which is trained.
        tasks: how many new ones.
        seed: of the new tasks.
        train: trains a network by its loss and returns what the card says.
    """
    about: dict[str, Any] = {"parameters": 0}
    x, y, truth = lines(tasks, torch.Generator().manual_seed(10_000_019 + seed))
    if penalty is not None:
        found = closed_form(x, y, penalty)
    else:
        net = GeneratedLines()

        def loss(count: int, draw: torch.Generator) -> Tensor:
            x, y, truth = lines(DRAWN * count, draw)
            return (net(x, y) - truth).square().sum(1).mean()

        about = train(net, loss)
        with torch.no_grad():
            found = net(x, y)
        about |= net.task.card(net.codes(x[:64], y[:64]), x[0])
    error = float((found - truth).square().sum(1).mean())
    return Outcome({"mse_lines": error}, tasks, about)

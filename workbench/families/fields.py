"""Coordinate networks: a shape is a function of points, positive inside it, that a code changes.

What the families of shapes share. A code reaches the function in one of two ways: its weights are generated
from the code, or the code stands beside every point as more inputs (concatenation).

Shape letters: S shapes, M points of each, P coordinates of a point, C code width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec


def network(widths: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers of these widths, an activation between every two."""
    layers = [layer for one, two in pairwise(widths) for layer in (nn.Linear(one, two), activation())]
    return nn.Sequential(*layers[:-1])


class GeneratedField(nn.Module):
    """The weights of a coordinate network are its own plus what is generated from the code."""

    def __init__(self, widths: Sequence[int], code_width: int, hidden: Sequence[int] = (64,)) -> None:
        """Build the network of these widths and the generator of all its weights and biases."""
        super().__init__()
        target = network(widths)
        self.shape = Conditioned(target, MLPGenerator(code_width, ParamSpec.of(target), hidden, unit=True))
        self.per_query = sum(weight.numel() for weight in target.parameters())

    def forward(self, points: Float[Tensor, "S M P"], codes: Float[Tensor, "S C"]) -> Float[Tensor, "S M"]:
        """Return the log odds that each point lies inside its shape."""
        return self.shape(points, self.shape.weights(codes))[..., 0]


class ConcatField(nn.Module):
    """One coordinate network for all shapes; the code is part of its input."""

    def __init__(self, widths: Sequence[int], code_width: int, activation: type[nn.Module] = nn.ReLU) -> None:
        """Build the network; its first layer is wider by the code."""
        super().__init__()
        self.shape = network((widths[0] + code_width, *widths[1:]), activation)
        self.per_query = sum(weight.numel() for weight in self.shape.parameters())

    def forward(self, points: Float[Tensor, "S M P"], codes: Float[Tensor, "S C"]) -> Float[Tensor, "S M"]:
        """Return the log odds that each point lies inside its shape."""
        beside = codes[:, None].expand(-1, points.shape[1], -1)
        return self.shape(torch.cat([points, beside], -1))[..., 0]


def fit_codes(
    field: nn.Module,
    codes: Float[Tensor, "S C"],
    points: Float[Tensor, "S M P"],
    inside: Bool[Tensor, "S M"],
    *,
    steps: int,
    learning_rate: float,
) -> Float[Tensor, "S C"]:
    """Find the codes of shapes never trained on by gradient descent (Adam); the field stays as it is.

    Args:
        field: from points and codes to log odds.
        codes: where to start.
        points: of which it is known whether they lie inside.
        inside: the known occupancy.
        steps: of the optimiser, all points in each.
        learning_rate: of the codes.
    """
    codes = codes.detach().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([codes], lr=learning_rate)
    for _ in range(steps):
        optimiser.zero_grad()
        # A sum over shapes: the shapes are fitted side by side and do not slow each other down.
        loss = functional.binary_cross_entropy_with_logits(field(points, codes), inside.float())
        (codes.grad,) = torch.autograd.grad(loss * len(codes), [codes])
        optimiser.step()
    return codes.detach()


def overlap(predicted: Bool[Tensor, "S M"], inside: Bool[Tensor, "S M"]) -> Float[Tensor, " S"]:
    """Return the intersection over union of each shape; 0 to 1, higher is better, ideal 1.

    Two empty shapes are equal: 1.
    """
    both, either = (predicted & inside).sum(1), (predicted | inside).sum(1)
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def grid(size: int) -> Float[Tensor, "M 2"]:
    """Return size x size points of the square [-1, 1] x [-1, 1], row by row, the first coordinate fastest."""
    line = torch.linspace(-1, 1, size)
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)


def to_segment(
    points: Float[Tensor, "#S M 2"], start: Float[Tensor, "S 2"], end: Float[Tensor, "S 2"]
) -> Float[Tensor, "S M"]:
    """Return the distance of points to the segment from start to end."""
    # By coordinate: sums over a last axis of two cost six times as much.
    along_x, along_y = (end - start)[..., None].unbind(1)
    x, y = points[..., 0] - start[:, :1], points[..., 1] - start[:, 1:]
    share = ((x * along_x + y * along_y) / (along_x.square() + along_y.square())).clamp(0, 1)
    return ((x - share * along_x).square() + (y - share * along_y).square()).sqrt()


def drawn_curves(
    name: str, made: Shaped[Tensor, "S M"], true: Shaped[Tensor, "S M"]
) -> dict[str, tuple[list[float], list[float]]]:
    """Lay pictures out as an outcome's curves, a model's beside the true ones, point by point."""
    curves = {}
    for end, values in (("", made), ("_true", true)):
        for number, row in enumerate(values.float().tolist()):
            curves[f"{name}_{number}{end}"] = [float(place) for place in range(len(row))], row
    return curves

"""Coordinate networks: a shape is a function of points, positive inside it, that a code changes.

What the families of shapes share. A code reaches the function in one of three ways: its weights are generated
from the code, the code stands beside every point as more inputs (concatenation), or it is the weights (a
table of one network for every shape, where nothing is shared). The code of a shape never trained on is
fitted, or read off the gradient at the origin.

Shape letters: S shapes, M points of each, P coordinates of a point, C code width.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec, Table
from workbench.training import Training, fit


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


class TableField(nn.Module):
    """A coordinate network of its own for every shape; a code is all weights of one."""

    def __init__(self, widths: Sequence[int], shapes: int) -> None:
        """Build the networks of these widths."""
        super().__init__()
        target = network(widths)
        spec = ParamSpec.of(target, joins="replace", gain=2**0.5)
        self.shape = Conditioned(target, Table(shapes, spec))
        self.per_query = spec.numel

    @property
    def codes(self) -> Float[Tensor, "S C"]:
        """The weights of every shape's network."""
        return self.shape.generator.head.weight

    def forward(self, points: Float[Tensor, "S M P"], codes: Float[Tensor, "S C"]) -> Float[Tensor, "S M"]:
        """Return the log odds that each point lies inside its shape."""
        return self.shape(points, self.shape.spec.compose(codes))[..., 0]


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


def fit_alone(
    widths: Sequence[int],
    points: Float[Tensor, "S M P"],
    inside: Bool[Tensor, "S M"],
    training: Training,
    steps: int,
    folder: Path,
    *,
    seed: int,
) -> tuple[TableField, list[dict[str, int | float]]]:
    """Train a network of its own for every shape, from its known points and no other shape.

    Args:
        widths: of each network.
        points: of which it is known whether they lie inside.
        inside: the known occupancy.
        training: its batch size is not used, every step sees all points.
        steps: of each network.
        folder: for the checkpoint.
        seed: of this training.

    Returns:
        The networks, and the loss by part of the training, summed over shapes.
    """
    alone = TableField(widths, len(points))

    def loss(_: Tensor) -> Tensor:
        # A sum over shapes, as above.
        logits = alone(points, alone.codes)
        return functional.binary_cross_entropy_with_logits(logits, inside.float()) * len(points)

    training = training.model_copy(update={"batch_size": 1})
    return alone, fit(alone, loss, steps, training, folder, seed=seed)


def code_at_origin(
    loss: Callable[[Float[Tensor, "S C"]], Float[Tensor, ""]], origin: Float[Tensor, "S C"]
) -> Float[Tensor, "S C"]:
    """Return codes without fitting any: one step down the gradient of a loss from the code 0.

    Args:
        loss: of codes, summed over shapes.
        origin: zeros.

    Returns:
        Minus the gradient, which can be differentiated; it is taken where gradients are off, too.

    Source: Bond-Taylor and Willcocks (2021), arXiv 2007.02798, section 3.
    """
    with torch.enable_grad():
        origin = origin.requires_grad_(True)
        (slope,) = torch.autograd.grad(loss(origin), origin, create_graph=True)
    return -slope


def origin_codes(
    field: nn.Module, width: int, points: Float[Tensor, "S M P"], inside: Bool[Tensor, "S M"]
) -> Float[Tensor, "S C"]:
    """Return each shape's code of that width: one step down its mean loss over known points, from 0."""

    def loss(codes: Float[Tensor, "S C"]) -> Float[Tensor, ""]:
        logits, truth = field(points, codes), inside.to(points)
        return functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / points.shape[1]

    return code_at_origin(loss, points.new_zeros(len(points), width))


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

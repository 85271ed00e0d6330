"""Superellipsoids: shapes from diamond to box that a few numbers say exactly, drawn from a seed.

In the own axes of a shape s, a point p of the cube [-1, 1]^P is q = R_s p / a_s, and

    r_1 = |q_1|,   r_i = (r_{i-1}^{e_i} + |q_i|^{e_i})^{1 / e_i},   inside if r_P <= 1                  (1)

with half axes a_s, exponents e_i (1 a diamond, 2 an ellipse, more a box) and a rotation R_s in the plane of
the first two axes, so that a slice through the middle shows it.

Shape letters: S shapes, M points of each, P coordinates of a point, 2 or 3.

Source: Barr (1981), Superquadrics and angle-preserving transformations.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from workbench.families.fields import grid


class Shapes(NamedTuple):
    """What equation (1) needs of each shape."""

    axes: Float[Tensor, "S P"]
    exponents: Float[Tensor, "S P"]
    rotation: Float[Tensor, "S P P"]

    def of(self, which: Tensor | slice) -> "Shapes":
        """Return some of the shapes."""
        return Shapes(*(part[which] for part in self))

    def sample(self, count: int, seed: int) -> Float[Tensor, "S M P"]:
        """Draw points: half of them anywhere in the cube, half in the box around the shape."""
        anywhere = cube((*self.axes.shape[:1], count, self.axes.shape[1]), seed)
        around = (1.25 * self.axes[:, None] * anywhere) @ self.rotation
        return torch.where(torch.arange(count)[:, None] % 2 == 0, anywhere, around)

    def contain(self, points: Float[Tensor, "#S M P"]) -> Bool[Tensor, "S M"]:
        """Tell which points lie inside; equation (1)."""
        own = (points @ self.rotation.mT / self.axes[:, None]).abs()
        radius = own[..., 0]
        for axis in range(1, own.shape[-1]):
            power = self.exponents[:, axis, None]
            radius = (radius**power + own[..., axis] ** power) ** (1 / power)
        return radius <= 1


def draw_shapes(count: int, dimensions: int) -> Shapes:
    """Draw shapes, the same at every call."""
    draw = torch.Generator().manual_seed(0)
    axes = 0.3 + 0.5 * torch.rand(count, dimensions, generator=draw)
    exponents = 1.5 + 3 * torch.rand(count, dimensions, generator=draw)
    rotation = torch.eye(dimensions).repeat(count, 1, 1)
    turn = torch.pi * torch.rand(count, generator=draw)
    rotation[:, 0, 0] = rotation[:, 1, 1] = turn.cos()
    rotation[:, 0, 1], rotation[:, 1, 0] = turn.sin(), -turn.sin()
    return Shapes(axes, exponents, rotation)


def cube(shape: tuple[int, ...], seed: int) -> Float[Tensor, "... P"]:
    """Draw points of the cube [-1, 1]^P."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def middle_slice(shapes: int, dimensions: int, size: int) -> Float[Tensor, "S M P"]:
    """Return size x size points of the slice through the middle, the same for every shape."""
    return functional.pad(grid(size), (0, dimensions - 2)).expand(shapes, -1, -1)

"""Waves: regression tasks that are sines, each known by some of its points or by a few numbers.

    y = A sin(x + p)         A in 0.1..5, p in 0..pi, x in -5..5                                        (1)
    y = h sin(f x + p) + o   h in 0.5..2.5, f in 0.5..1.5, p in -pi/2..pi/2, o in -1..1, x in -3..3     (2)

A task of (1) is known by its points alone. A task of (2) has a descriptor, which says how large each of h, f,
p and o is, from -1 to 1, so that a task can be told without an example.

Shape letters: U tasks, M points, C descriptor.

Source: (1) Finn, Abbeel and Levine (2017), arXiv 1703.03400, section 5.1; (2) is ours.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

DESCRIPTOR = 4  # numbers that tell a task of equation (2)
Tasks = Float[Tensor, "U C"]
Points = tuple[Float[Tensor, "U M 1"], Float[Tensor, "U M 1"]]


def sinusoids(tasks: int, count: int, draw: torch.Generator) -> Points:
    """Draw tasks of equation (1) and points of each."""
    heights = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=draw)
    phases = math.pi * torch.rand(tasks, 1, 1, generator=draw)
    x = 10 * torch.rand(tasks, count, 1, generator=draw) - 5
    return x, heights * torch.sin(x + phases)


def descriptors(tasks: int, draw: torch.Generator) -> Tasks:
    """Draw tasks of equation (2)."""
    return 2 * torch.rand(tasks, DESCRIPTOR, generator=draw) - 1


def answers(tasks: Tasks, x: Float[Tensor, "U M 1"]) -> Float[Tensor, "U M 1"]:
    """Compute equation (2)."""
    height, frequency, phase, offset = tasks[:, :, None, None].unbind(1)
    return (1.5 + height) * torch.sin((1 + frequency / 2) * x + math.pi / 2 * phase) + offset


def points(tasks: Tasks, count: int, draw: torch.Generator) -> Points:
    """Draw points of each of these tasks."""
    x = 6 * torch.rand(len(tasks), count, 1, generator=draw) - 3
    return x, answers(tasks, x)

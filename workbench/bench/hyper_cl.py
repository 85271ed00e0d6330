"""Hyper-CL's generated projection, ours beside the published way, on the same inputs and with equal results.

The reference is written from the paper's description: the hypernetwork is run for every row and for both
sentences of it, and the low-rank product A B is formed before it is applied. Both start as published
(coefficients are not rescaled). Times are medians over repeats after a warm-up, forward and backward; memory
is what one pass allocates at its peak beyond what was there before.

How much there is to gain follows from the arithmetic. With C = D, generating A and B costs 4 D^2 K operations
a condition and forming A B 2 D^2 K more. The published way does both for each of 2 N sides, ours the first
for U conditions: a ratio of 2 N (4 + 2) / (4 U) = 3 N / U forward, 4.6 at 512 rows (N / U = 1.53). More than
that can only come from memory traffic and from calls saved. Memory: the gradient of the generator's own
weight (72 MiB at D = 384, K = 64) is part of both ways.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.bench.timing import row
from workbench.hypernetworks import LinearGenerator, ParamSpec, Rows, Slot, project

# Rows per unique condition in C-STS batches of so many rows.
MULTIPLICITY = {32: 1.07, 512: 1.53, 2048: 2.0}
CASES = [
    (384, 64, 32),
    (384, 64, 512),
    (384, 64, 2048),
    (768, 64, 32),
    (768, 64, 512),
    (384, None, 32),
    (384, None, 512),
    (768, None, 32),
]


def _ours(
    generator: LinearGenerator, conditions: Tensor, ids: Tensor, sides: tuple[Tensor, Tensor]
) -> Tensor:
    """Generate once per unique condition; both sentences of a row share it."""
    rows = Rows.of(ids.repeat(2))
    return project(torch.cat(sides), generator(conditions[rows.unique]), rows)


def _reference(
    generator: LinearGenerator, conditions: Tensor, ids: Tensor, sides: tuple[Tensor, Tensor]
) -> Tensor:
    """Generate per row and per sentence, form the matrix, apply it."""
    mapped = []
    for side in sides:
        weights = generator(conditions[ids])
        if "projection.down" in weights.tensors:
            matrix = weights.tensors["projection.down"] @ weights.tensors["projection.up"]
        else:
            matrix = weights.tensors["projection"]
        mapped.append(torch.bmm(side[:, None], matrix)[:, 0])
    return torch.cat(mapped)


def rows(device: str = "cpu") -> list[dict[str, Any]]:
    """Measure all cases; see :func:`workbench.bench.run_bench` for the columns."""
    return [_case(width, rank, count, device) for width, rank, count in CASES]


def _case(width: int, rank: int | None, count: int, device: str) -> dict[str, Any]:
    """Measure one width, rank and number of rows."""
    torch.manual_seed(0)
    slot = Slot("projection", (width, width), "lowrank" if rank else "full", rank)
    generator = LinearGenerator(width, ParamSpec((slot,), scaled=False), dropout=0.0).to(device)
    unique = max(1, round(count / MULTIPLICITY[count]))
    conditions = torch.randn(unique, width, device=device)
    ids = torch.cat([torch.arange(unique), torch.randint(unique, (count - unique,))]).to(device)
    sides = (torch.randn(count, width, device=device), torch.randn(count, width, device=device))

    def step(way: Callable[..., Tensor]) -> Tensor:
        generator.zero_grad(set_to_none=True)
        mapped = way(generator, conditions, ids, sides)
        mapped.square().mean().backward()
        return mapped.detach()

    torch.testing.assert_close(step(_ours), step(_reference), rtol=1e-3, atol=1e-3)  # orders of adding
    kind = f"K={rank}" if rank else "full"
    name = f"projection, forward and backward, D={width} {kind}, {count} rows, {unique} conditions"
    return row(name, lambda: step(_ours), lambda: step(_reference), device)

"""One training in several processes, as torchrun starts them: who leads, which rows are whose, sums over all.

All processes draw the same random numbers and go through the same batches. Each computes its own part of a
batch; gradients and losses are averaged, so that a step is that of the whole batch, except for batch
statistics: a tower with BatchNorm normalises by each process's own part, and the first process's running
statistics are the ones that are kept. Only the first process writes files. With one process, as always
without torchrun, nothing here does anything.

Shape letters: B rows of a batch, D width.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn

from workbench.errors import RunError


def world() -> int:
    """Number of processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def place() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if world() > 1 else 0


def leads() -> bool:
    """Whether this process writes files."""
    return place() == 0


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did.

    Args:
        device: as torch names devices; of "cuda" each process gets one of its own.

    Yields:
        The device of this process.

    Raises:
        RunError: the device cannot be shared by several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise RunError(f"several processes train on cpu or cuda, not on {device!r}; start one process")
    if kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def own_part(count: int) -> slice:
    """Return which of so many rows are this process's: parts differ by one row at most.

    Fewer rows than processes, as at the end of an epoch, are computed by every process.
    """
    if count < world():
        return slice(0, count)
    share, rest = divmod(count, world())
    start = place() * share + min(place(), rest)
    return slice(start, start + share + (place() < rest))


def gathered(rows: Int[Tensor, " B"], compute: Callable[[Tensor], Float[Tensor, "_ D"]]) -> Tensor:
    """Compute something of every row once among all processes, and give all of it, with gradients, to each.

    Args:
        rows: the same in every process.
        compute: from some of them to their values; parts are filled up to equal size with repeated rows.
    """
    if world() == 1:
        return compute(rows)
    size = -(-len(rows) // world())
    places = torch.arange(place() * size, (place() + 1) * size, device=rows.device).clamp(max=len(rows) - 1)
    return _Gathered.apply(compute(rows[places]))[: len(rows)]


class _Gathered(torch.autograd.Function):
    """The rows of all processes, one after the other; torch's own is named anew every few versions."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(world())]
        distributed.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> Tensor:
        total = upstream.contiguous().clone()
        distributed.all_reduce(total)  # every process has compared these rows with images of its own
        return total.chunk(world())[place()]


def weighed(loss: Float[Tensor, ""], own: int, count: int) -> Float[Tensor, ""]:
    """Weigh the mean over a process's own rows, so that the mean over processes is that over all rows."""
    return loss if own == count else loss * (own * world() / count)


def meet() -> None:
    """Wait until all processes are here."""
    if world() > 1:
        distributed.barrier()


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Replace every gradient by its mean over the processes; what got none in this one counts as zero."""
    if world() == 1:
        return
    for parameter in module.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)
            parameter.grad /= world()


@torch.no_grad()
def average(value: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the mean of a number over the processes."""
    if world() == 1:
        return value.detach()
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / world()

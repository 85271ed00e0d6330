"""Hyper-CL's generated projection, ours beside the published way, on the same inputs and with equal results.

The reference is written from the paper's description: the hypernetwork is run for every row and for both
sentences of it, and the low-rank product A B is formed before it is applied. Times are medians over repeats
after a warm-up, forward and backward; memory is what one pass allocates at its peak beyond what was there
before.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.hypernetworks import LinearGenerator, ParamSpec, Rows, Slot, project

# Rows per unique condition in C-STS batches of so many rows.
MULTIPLICITY = {32: 1.07, 512: 1.53}
CASES = [(384, 64, 32), (384, 64, 512), (384, None, 32), (768, 64, 32)]


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
    generator = LinearGenerator(width, ParamSpec((slot,)), dropout=0.0).to(device)
    unique = max(1, round(count / MULTIPLICITY[count]))
    conditions = torch.randn(unique, width, device=device)
    ids = torch.cat([torch.arange(unique), torch.randint(unique, (count - unique,))]).to(device)
    sides = (torch.randn(count, width, device=device), torch.randn(count, width, device=device))

    def step(way: Callable[..., Tensor]) -> Tensor:
        generator.zero_grad(set_to_none=True)
        mapped = way(generator, conditions, ids, sides)
        mapped.square().mean().backward()
        return mapped.detach()

    torch.testing.assert_close(step(_ours), step(_reference), rtol=1e-3, atol=1e-4)
    ours, reference = (_median_seconds(lambda way=way: step(way), device) for way in (_ours, _reference))
    ours_mib, reference_mib = (_peak_mib(lambda way=way: step(way), device) for way in (_ours, _reference))
    kind = f"K={rank}" if rank else "full"
    return {
        "name": f"projection D={width} {kind}, {count} rows, {unique} unique",
        "ours_s": ours,
        "reference_s": reference,
        "ratio": reference / ours,
        "ours_mib": ours_mib,
        "reference_mib": reference_mib,
    }


def _median_seconds(action: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Return the median duration of an action, in seconds, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _peak_mib(action: Callable[[], object], device: str) -> float:
    """Return the most memory that an action holds beyond what was held before, in MiB."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with torch.profiler.profile(profile_memory=True) as profile:
            action()
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20

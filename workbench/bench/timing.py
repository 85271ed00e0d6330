"""Seconds and peak memory of an action, and the row of a benchmark's table."""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def row(
    name: str, ours: Callable[[], object], reference: Callable[[], object], device: str, repeats: int = 3
) -> dict[str, Any]:
    """Measure two ways to the same result, a repeat of each in turn.

    Returns:
        name, ours_s and reference_s (medians, in seconds), ratio (reference over ours), ours_mib and
        reference_mib (the most each holds beyond what was held before).
    """
    seconds = medians_in_turn((ours, reference), device, repeats)
    memory = [peak_mib(action, device) for action in (ours, reference)]
    return laid_out(name, *seconds, *memory)


def laid_out(
    name: str, ours_s: float, reference_s: float, ours_mib: float, reference_mib: float
) -> dict[str, Any]:
    """Return one row of the table."""
    return {
        "name": name,
        "ours_s": ours_s,
        "reference_s": reference_s,
        "ratio": reference_s / ours_s,
        "ours_mib": ours_mib,
        "reference_mib": reference_mib,
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many of torch's threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def median_seconds(action: Callable[[], object], device: str, repeats: int = 3, warm: int = 1) -> float:
    """Return the median duration of an action, in seconds, after warming up."""
    return medians_in_turn((action,), device, repeats, warm)[0]


def medians_in_turn(
    actions: Sequence[Callable[[], object]], device: str, repeats: int = 3, warm: int = 1
) -> list[float]:
    """Return the median duration of each action, in seconds, after warming up.

    Every action has one repeat before any has its next, so that a machine that is busy for a while slows all
    of them and not one.
    """
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats + warm):
        for action, found in zip(actions, times, strict=True):
            found.append(_seconds(action, device))
    return [statistics.median(found[warm:]) for found in times]


def _seconds(action: Callable[[], object], device: str) -> float:
    """Return the duration of one time; what a GPU was given before is waited for, not counted."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def once(action: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the seconds and the peak memory in MiB of a single time, for what takes minutes.

    On a CPU the seconds include torch's memory profiler: for actions of few, large operations only.
    """
    seconds: list[float] = []
    peak = peak_mib(lambda: seconds.append(median_seconds(action, device, repeats=1, warm=0)), device)
    return seconds[0], peak


def peak_mib(action: Callable[[], object], device: str) -> float:
    """Return the most memory that an action holds beyond what was held before, in MiB."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()  # what is freed meanwhile would count against what is held
    for _ in range(3):  # the profiler may record nothing when it starts
        if peak := _traced_peak(action):
            break
    return peak / 2**20


def _traced_peak(action: Callable[[], object]) -> int:
    """Return the most bytes that an action holds, as torch's profiler sees them; 0 if it saw nothing."""
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
    return peak

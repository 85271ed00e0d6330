"""What every paper's comparison shares: one job per model and seed, and metrics in long form."""

import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from workbench.evaluation.similarity import Measured
from workbench.files import write_atomic

METRIC_COLUMNS = {
    "paper": pl.String,
    "recipe": pl.String,
    "dataset": pl.String,
    "split": pl.String,
    "model": pl.String,
    "group": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "count": pl.Int64,
    "seed": pl.Int64,
}


@dataclass(frozen=True)
class Loaded:
    """A recipe's data, read and checked.

    Attributes:
        content: what the paper's comparison works on.
        sha256: of the content; part of a run's identity.
        counts: rows and the like by split, for the provenance.
    """

    content: Any
    sha256: str
    counts: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Comparison:
    """What a recipe's run found.

    Attributes:
        metrics: long form; seed is null for the mean over seeds, and for models that have none.
        scores: one row per model, seed, split and data row; no text.
        cards: per trained model: settings, parameters, seconds, loss by epoch, health and cost.
    """

    metrics: pl.DataFrame
    scores: pl.DataFrame
    cards: list[dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """What one model gave under one seed: a tensor per split, and its card."""

    model: str
    seed: int | None
    results: dict[str, Tensor]
    card: dict[str, Any]


class Clock:
    """Seconds and peak memory of one training."""

    def __init__(self, device: torch.device | str) -> None:
        """Start; on an accelerator its peak is counted from here."""
        self.device, self.began = torch.device(device), time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def stop(self) -> dict[str, float | int]:
        """Return the seconds since the start, the process's peak, and the device's if there is one."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        found = {"seconds": round(time.perf_counter() - self.began, 2), "peak_process_mib": peak}
        if self.device.type == "cuda":
            found["peak_device_mib"] = torch.cuda.max_memory_allocated(self.device) // 2**20
        return found


def finished_or(
    folder: Path, compute: Callable[[Path], tuple[dict[str, Tensor], dict[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what an earlier process finished in a folder, or compute and keep it.

    Args:
        folder: of one model under one seed; its checkpoint is removed once all is kept.
        compute: gets the folder, returns results and card.
    """
    if (folder / "card.json").is_file():
        return load_file(folder / "results.safetensors"), json.loads(
            (folder / "card.json").read_text("utf-8")
        )
    folder.mkdir(parents=True, exist_ok=True)
    results, card = compute(folder)
    write_atomic(folder / "results.safetensors", save(results))
    write_atomic(folder / "card.json", json.dumps(card, indent=1))  # last: its presence means all is there
    for left in folder.glob("checkpoint.*"):
        left.unlink()
    return results, card


def metric_rows(
    metric: str, measured: Measured, found: list[Found], against: Mapping[str, str | None], reference: str
) -> list[dict[str, Any]]:
    """List one metric's rows: every seed, the mean over seeds, and the mean's differences to the baselines.

    Args:
        metric: its name.
        measured: one score per entry of ``found``, in its order.
        found: models and seeds.
        against: each model's matched baseline, or None.
        reference: the model that all are compared with.
    """
    rows, means = [], {}
    for name in dict.fromkeys(item.model for item in found):
        members = [index for index, item in enumerate(found) if item.model == name]
        if not np.isfinite(measured.value[members]).all():
            continue  # undefined: AUC of graded labels, a group with one class, a constant score
        means[name] = measured.value[members].mean(), measured.resampled[members].mean(0)
        for index in members:
            if found[index].seed is not None:
                row = _row(name, metric, measured.value[index], measured.resampled[index])
                rows.append({**row, "seed": found[index].seed})
    for name, (value, resampled) in means.items():
        rows.append(_row(name, metric, value, resampled))
        for other in sorted({reference, against[name]} & means.keys() - {name}):
            versus = f"{metric}_minus_{other}"
            rows.append(_row(name, versus, value - means[other][0], resampled - means[other][1]))
    return rows


def _row(name: str, metric: str, value: float, resampled: np.ndarray) -> dict[str, Any]:
    """Write one value with its interval; seed is left empty."""
    low, high = Measured.interval(resampled)
    return {"model": name, "metric": metric, "value": float(value), "low": low, "high": high, "seed": None}

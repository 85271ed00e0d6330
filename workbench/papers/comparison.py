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
from pydantic import Field, model_validator
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench.config import Recipe
from workbench.encoders import PACKAGED
from workbench.evaluation.similarity import Measured
from workbench.files import write_atomic
from workbench.processes import leads
from workbench.sharing import Taken, claimed, in_turn

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


class ComparisonRecipe(Recipe):
    """What every recipe that compares models has; a subclass declares ``models``."""

    encoder: str = Field(default=PACKAGED, min_length=1)
    reference: str = Field(default="hadamard", description="the model that differences are taken to")

    @model_validator(mode="after")
    def _models_are_named_once_and_known(self) -> "ComparisonRecipe":
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models: every name once, got {names}")
        for asked in (self.reference, *(model.against for model in self.models if model.against)):
            if asked not in names:
                raise ValueError(f"reference or against: {asked!r} is not one of the models {names}")
        return self


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


def run_models(
    recipe: ComparisonRecipe,
    untrained: tuple[str, ...],
    baseline: Callable[[str], dict[str, Tensor]],
    train: Callable[[Any, int], tuple[dict[str, Tensor], dict[str, Any]]],
    once: tuple[str, ...] = (),
) -> list[Found]:
    """Go through a recipe's models, the trained ones under every seed, with a progress bar.

    Args:
        recipe: whose models.
        untrained: kinds that need no training and have no seed.
        baseline: from such a kind to its results.
        train: from a model's settings and a seed to its results and card.
        once: kinds in which nothing is random; they run under the first seed only.
    """
    seeds = {**dict.fromkeys(once, recipe.seeds[:1]), **dict.fromkeys(untrained, (None,))}
    jobs = [(model, seed) for model in recipe.models for seed in seeds.get(model.kind, recipe.seeds)]
    bar = tqdm(total=len(jobs), desc=recipe.name, unit="model")

    def do(job: tuple[Any, int | None]) -> Found:
        model, seed = job
        bar.set_postfix_str(model.name if seed is None else f"{model.name}, seed {seed}")
        if seed is not None:
            return Found(model.name, seed, *train(model, seed))
        card = {"model": model.name, "seed": None, "settings": model.model_dump(mode="json")}
        return Found(model.name, None, baseline(model.kind), card)

    found: dict[int, Found] = {}
    with bar:
        for place, one in in_turn(jobs, do):
            found[place] = one
            bar.update()
    return [found[place] for place in range(len(jobs))]


def training_folder(workspace: Path, model: str, seed: int) -> Path:
    """Return the folder of one model's training under one seed."""
    return workspace / "training" / f"{model}-seed{seed}"


def card_of(
    model: Any, seed: int, module: nn.Module, cost: Mapping[str, Any], history: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what every trained model's card says: settings, parameters, cost, loss by epoch."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    about = {"model": model.name, "seed": seed, "settings": model.model_dump(mode="json")}
    return {**about, "parameters": parameters, **cost, "history": history}


def keep_head(folder: Path, head: nn.Module, about: Mapping[str, Any]) -> None:
    """Write a trained head, and what is needed to build it again, into a run."""
    keep_tensors(folder, head.state_dict(), about)


def keep_tensors(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write trained tensors, and what they belong to, into a run."""
    write_atomic(folder / "head.json", json.dumps(dict(about), indent=1, ensure_ascii=False))
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(folder / "head.safetensors", save(held))


def fill_in(head: nn.Module, path: Path, prefix: str = "") -> None:
    """Load a kept head's weights into one that was built from its card.

    Raises:
        ValueError: the weights hold NaN or infinity.
        RuntimeError: they belong to another head.
    """
    tensors = load_file(path)
    head.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("the weights hold NaN or infinity")


def finished_or(
    folder: Path, compute: Callable[[Path], tuple[dict[str, Tensor], dict[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what an earlier process finished in a folder, or compute and keep it.

    Args:
        folder: of one model under one seed; its checkpoint is removed once all is kept.
        compute: gets the folder, returns results and card.

    Raises:
        Taken: another process is at it, see :mod:`workbench.sharing`.
    """
    with claimed(folder):
        if (folder / "card.json").is_file():
            return load_file(folder / "results.safetensors"), json.loads(
                (folder / "card.json").read_text("utf-8")
            )
        folder.mkdir(parents=True, exist_ok=True)
        results, card = compute(folder)
        if not leads():
            return results, card
        write_atomic(folder / "results.safetensors", save(results))
        write_atomic(folder / "card.json", json.dumps(card, indent=1))  # last: now all is there
        for left in folder.rglob("checkpoint.*"):
            left.unlink()
        return results, card


def finished_results(workspace: Path, model: str, seed: int) -> dict[str, Tensor]:
    """Return the results of a training that another one builds on.

    Raises:
        Taken: another process is still at it.
    """
    folder = training_folder(workspace, model, seed)
    with claimed(folder):
        if not (folder / "card.json").is_file():
            raise Taken(folder.name)
        return load_file(folder / "results.safetensors")


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

"""What every family shares: its models under every seed, means with intervals over seeds, cards and curves.

A family's file has ``RECIPE`` (a subclass of :class:`FamilyRecipe`), ``load_data(recipe)`` and ``measure``,
from data, a model's settings and a seed to an :class:`Outcome`; ``compare = comparison_of(measure)`` makes it
a comparison like a paper's.

A value is the mean over seeds, and its interval is Student's t over them: a seed draws data order, start and,
where the family says so, the tasks. Differences are taken seed by seed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from pydantic import Field
from scipy import stats
from torch import Tensor

from workbench.config import Settings
from workbench.papers.comparison import (
    METRIC_COLUMNS,
    Clock,
    Comparison,
    ComparisonRecipe,
    Found,
    finished_or,
    run_models,
    training_folder,
)
from workbench.store import EmbeddingStore
from workbench.training import seed_everything

CURVES = {"model": pl.String, "seed": pl.Int64, "curve": pl.String, "x": pl.Float64, "y": pl.Float64}


class FamilyModel(Settings):
    """One row of a family's table; a family adds its ``kind`` and settings."""

    name: str = Field(pattern="^[a-z][a-z0-9_]*$")
    role: Literal["generated weights", "control", "closed form", "no training"] = "control"
    against: str | None = Field(default=None, description="a matched baseline; differences are reported")


class FamilyData(Settings):
    """What a family learns from: drawn from seeds, or a set that a package carries."""

    name: str
    path: None = None


class FamilyRecipe(ComparisonRecipe):
    """What every family's recipe has; a family adds ``models`` and its settings."""

    data: FamilyData
    claim: str = Field(default="", description="what was published, in one line, with its source")
    metric: str = Field(description="that models are ranked by")
    lower_is_better: bool = False


class SplitRecipe(FamilyRecipe):
    """What a family's recipe has whose set comes with a split to choose settings on."""

    split: Literal["valid", "test"] = Field(default="test", description="valid: to choose settings on")


@dataclass(frozen=True)
class Outcome:
    """What one model gave under one seed.

    Attributes:
        values: metric -> number, on data not trained on unless the metric's name says so.
        count: test items behind each value.
        about: for the card: parameters, cost, health, history and what else a reader should know.
        curves: name -> (x, y) of the same length, for pictures.
    """

    values: Mapping[str, float]
    count: int
    about: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, tuple[list[float], list[float]]] = field(default_factory=dict)


def needs_tokens(recipe: FamilyRecipe) -> bool:
    """No family reads texts through the store."""
    return False


def comparison_of(measure: Callable[..., Outcome], shares: tuple[str, ...] = ()) -> Callable[..., Comparison]:
    """Return a paper's ``compare`` for a family.

    Args:
        measure: from recipe, content, model, seed and a private folder to an outcome.
        shares: metrics that are also given as a share of the reference's, so that bars can ask for it.
    """

    def compare(
        recipe: FamilyRecipe, content: Any, store: EmbeddingStore, workspace: Path, device: str
    ) -> Comparison:
        """Run a recipe; finished models in the workspace are reused."""

        def train(model: Any, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
            def compute(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
                clock = Clock(device)
                seed_everything(seed)
                return _kept(model, seed, measure(recipe, content, model, seed, folder), clock)

            return finished_or(training_folder(workspace, model.name, seed), compute)

        found = run_models(recipe, (), lambda _: {}, train)
        return Comparison(_metrics(recipe, found, shares), _curves(found), [one.card for one in found])

    return compare


def _kept(model: Any, seed: int, outcome: Outcome, clock: Clock) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Lay an outcome out as tensors, which are kept, and a card."""
    tensors = {
        f"value.{name}": torch.tensor(value, dtype=torch.double) for name, value in outcome.values.items()
    }
    for name, curve in outcome.curves.items():
        tensors[f"curve.{name}"] = torch.tensor(curve, dtype=torch.double)
    about = {"model": model.name, "seed": seed, "settings": model.model_dump(mode="json")}
    return tensors, {**about, **outcome.about, "count": outcome.count, **clock.stop()}


def interval_over_seeds(values: np.ndarray) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean of some seeds; (nan, nan) for one seed."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def _metrics(recipe: FamilyRecipe, found: list[Found], shares: tuple[str, ...]) -> pl.DataFrame:
    """List every value: by seed, the mean with its interval, and differences to reference and baseline."""
    against = {model.name: model.against for model in recipe.models}
    values: dict[str, dict[str, np.ndarray]] = {name: {} for name in against}
    counts = {one.model: one.card["count"] for one in found}
    rows = []
    for one in found:
        for key, value in one.results.items():
            if key.startswith("value."):
                metric, number = key.removeprefix("value."), float(value)
                own = values[one.model].get(metric, np.empty(0))
                values[one.model][metric] = np.append(own, number)
                rows.append({"model": one.model, "metric": metric, "value": number, "seed": one.seed})
    for name, own in values.items():
        for metric, seeds in own.items():
            rows.append(_mean(name, metric, seeds))
            for other in sorted({recipe.reference, against[name]} - {name, None}):
                if metric in values[other]:
                    rows.append(_mean(name, f"{metric}_minus_{other}", seeds - values[other][metric]))
                    if metric in shares and other == recipe.reference:
                        rows.append(_mean(name, f"{metric}_of_{other}", seeds / values[other][metric]))
    fixed = {"paper": recipe.paper, "recipe": recipe.name, "dataset": recipe.data.name, "group": "all",
             "split": recipe.split if isinstance(recipe, SplitRecipe) else "test"}  # fmt: skip
    laid = [{**dict.fromkeys(METRIC_COLUMNS), **fixed, **row, "count": counts[row["model"]]} for row in rows]
    return pl.DataFrame(laid, schema=METRIC_COLUMNS)


def _mean(name: str, metric: str, seeds: np.ndarray) -> dict[str, Any]:
    low, high = interval_over_seeds(seeds)
    return {"model": name, "metric": metric, "value": float(seeds.mean()), "low": low, "high": high}


def _curves(found: list[Found]) -> pl.DataFrame:
    """List every point of every curve."""
    parts = [
        pl.DataFrame({"model": one.model, "seed": one.seed, "curve": key[6:], "x": curve[0].numpy(),
                      "y": curve[1].numpy()}, schema=CURVES)
        for one in found
        for key, curve in one.results.items()
        if key.startswith("curve.")
    ]  # fmt: skip
    return pl.concat([pl.DataFrame(schema=CURVES), *parts])

"""Accuracy by group, of a finished run and of pictures of one's own: tables with counts beside every value.

A group below the recipe's smallest size stays in every table, marked, and is never the worst.

Shape letters: N images.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl
import torch

from workbench.classifier import HyperCLIPModel
from workbench.datasets.class_sets import PLAIN_TEMPLATES, Questions
from workbench.datasets.images import ImageTable, group_column
from workbench.errors import DataError
from workbench.evaluation.fairness import by_group
from workbench.evaluation.similarity import Measured
from workbench.evaluation.zero_shot import accuracy_values
from workbench.papers.comparison import METRIC_COLUMNS, Found, metric_rows
from workbench.runs import Run
from workbench.tables import Table, last_split, with_interval

SMALL = "too few, not judged"
_ANSWERS = {"split", "set", "image", "model", "seed", "label", "predicted", "rank"}


def fair_columns(run: Run) -> list[str]:
    """Return the columns by which a run's images are grouped."""
    return [name for name in run.scores.columns if name not in _ANSWERS]


def answers(run: Run, asked: Questions) -> pl.DataFrame:
    """Return what every trained model said of every image, in words; first seed, whose weights are kept.

    Args:
        run: a finished run of an image-text recipe.
        asked: the questions of its last split, which hold the words.

    Returns:
        One row per model, class set and image, in the run's order: image, set, side (a side report's set),
        model, the run's group columns, truth and said (class names), right.
    """
    scores = run.scores.filter(
        pl.col("seed") == run.recipe["seeds"][0], split=last_split(run.metrics)
    ).with_columns(pl.col("label", "predicted").cast(pl.Int64))
    words = pl.DataFrame(
        [
            {"set": one.name, "side": one.side, "label": place, "truth": name}
            for one in asked.sets
            for place, name in enumerate(one.classes)
        ]
    )
    said = words.select("set", predicted="label", said="truth")
    told = scores.join(words, on=["set", "label"], how="left", maintain_order="left")
    told = told.join(said, on=["set", "predicted"], how="left", maintain_order="left")
    return told.select(
        "image", "set", "side", "model", *fair_columns(run), "truth", "said", right=pl.col("rank") == 1
    )


def group_rows(run: Run, column: str) -> pl.DataFrame:
    """Return top-1 by group, one row per model and group, with its difference to the reference.

    Args:
        run: a finished run of an image-text recipe.
        column: one of :func:`fair_columns`.

    Returns:
        model, group, count (images), judged (enough of them), value, low, high, difference, difference_low
        and difference_high; differences are null for the reference itself.

    Raises:
        DataError: the run has no groups by that column.
    """
    reference, smallest = run.recipe["reference"], run.recipe["smallest_group"]
    part = run.metrics.filter(
        pl.col("seed").is_null(), pl.col("group").str.starts_with(f"{column}="), split=last_split(run.metrics)
    )
    if part.is_empty():
        there = ", ".join(fair_columns(run)) or "none"
        raise DataError(f"run {run.folder.name} has no groups by {column!r}; its group columns: {there}")
    keys, numbers = ["model", "group", "count"], ["value", "low", "high"]
    told = part.filter(metric="top1").select(*keys, *numbers)
    versus = part.filter(metric=f"top1_minus_{reference}").select(
        "model",
        "group",
        *(pl.col(name).alias(f"difference_{name}".replace("_value", "")) for name in numbers),
    )
    joined = told.join(versus, on=["model", "group"], how="left", maintain_order="left")
    return joined.with_columns(
        pl.col("group").str.strip_prefix(f"{column}="), judged=pl.col("count") >= smallest
    )


def _guesses(run: Run) -> set[str]:
    """Return the models that guess: in every group alike, so a table by group says nothing of them."""
    return {model["name"] for model in run.recipe["models"] if model["kind"] == "chance"}


def group_table(run: Run, column: str) -> Table:
    """Print accuracy by group: for every trained model top-1 and its difference to the reference."""
    found = [
        [
            *(row["group"], row["count"], "yes" if row["judged"] else SMALL, row["model"]),
            with_interval(row["value"], row["low"], row["high"]),
            with_interval(row["difference"], row["difference_low"], row["difference_high"], sign="+"),
        ]
        for row in group_rows(run, column).sort("group", maintain_order=True).to_dicts()
        if row["model"] not in _guesses(run)
    ]
    columns = ["group", "images", "judged", "model", "top-1 (95 % interval)"]
    return Table([*columns, f"minus {run.recipe['reference']}"], found)


def worst_table(run: Run, column: str) -> Table:
    """Print every model's worst group and gap with the differences to the reference, among judged groups.

    Worst and gap are taken for each seed and then averaged; the group named is lowest in the mean over seeds.
    """
    reference = run.recipe["reference"]
    part = run.metrics.filter(
        pl.col("seed").is_null(), group=f"by={column}", split=last_split(run.metrics)
    ).to_dicts()
    told = {(row["model"], row["metric"]): row for row in part}
    judged = group_rows(run, column).filter("judged")
    names = ("worst_group_top1", "gap_top1")
    rows = []
    for model in dict.fromkeys(row["model"] for row in part if row["model"] not in _guesses(run)):
        own = judged.filter(pl.col("model") == model).sort("value")["group"].to_list()
        cells: list[str] = []
        for name in names:
            for metric, sign in ((name, ""), (f"{name}_minus_{reference}", "+")):
                row = told.get((model, metric), {"value": None, "low": None, "high": None})
                cells.append(with_interval(row["value"], row["low"], row["high"], sign))
        rows.append([model, own[0], *cells])
    minus = f"minus {reference}"
    columns = ["model", "lowest group", "worst group's top-1", minus, "gap, best minus worst", minus]
    return Table(columns, rows)


def random_gaps(run: Run, asked: Questions, column: str, draws: int = 300, seed: int = 0) -> pl.DataFrame:
    """Return every model's gap beside the gaps that groups of the same sizes have when drawn at random.

    A gap is never negative, so sampling alone makes one. Only a gap above what random groups have says that
    groups differ.

    Args:
        run: a finished run of an image-text recipe.
        asked: the questions of its last split, which say what is a side report.
        column: one of :func:`fair_columns`.
        draws: random assignments of images to groups.
        seed: of the drawing; the same assignments for all models.

    Returns:
        One row per trained model: model, gap (as in :func:`worst_table`), random (mean over draws) and
        random_high (95 % of the draws lie below); empty if fewer than two groups are large enough.
    """
    main = [one.name for one in asked.sets if not one.side]
    scores = run.scores.filter(
        pl.col(column).is_not_null(), pl.col("set").is_in(main), split=last_split(run.metrics)
    )
    return drawn_gaps(scores, column, run.recipe["smallest_group"], draws, seed)


def drawn_gaps(
    scores: pl.DataFrame, column: str, smallest: int, draws: int = 300, seed: int = 0
) -> pl.DataFrame:
    """Do what :func:`random_gaps` says for answers that are at hand.

    Args:
        scores: answers of one split as a run holds them, to the class sets that count; ``column`` not null.
        column: of the groups.
        smallest: images a group needs to be judged.
        draws: random assignments of images to groups.
        seed: of the drawing.
    """
    each = scores.group_by("model", "seed", "image", column, maintain_order=True)
    images = each.agg((pl.col("rank") == 1).sum().alias("right"), pl.len().alias("asked"))
    rng, found = np.random.default_rng(seed), []
    first = images.filter(pl.struct("model", "seed") == images.select(pl.struct("model", "seed")).row(0)[0])
    names, codes = np.unique(first[column].to_numpy(), return_inverse=True)
    judged = np.flatnonzero(np.bincount(codes) >= smallest)
    if len(judged) < 2:
        return pl.DataFrame(schema={"model": pl.String, "gap": float, "random": float, "random_high": float})
    orders = [np.arange(len(codes)), *(rng.permutation(len(codes)) for _ in range(draws))]
    members = [(codes[order][:, None] == judged).astype(float) for order in orders]
    weight = first["asked"].to_numpy().astype(float)
    for (model,), part in images.group_by("model", maintain_order=True):
        right = part["right"].to_numpy().reshape(-1, len(codes)).astype(float)  # [seeds, images]
        accuracy = np.stack([right @ one / (weight @ one) for one in members])
        gaps = (accuracy.max(-1) - accuracy.min(-1)).mean(-1)
        drawn = gaps[1:]
        found.append((model, gaps[0], drawn.mean(), np.quantile(drawn, 0.95)))
    return pl.DataFrame(found, schema=["model", "gap", "random", "random_high"], orient="row")


@torch.inference_mode()
def measure_groups(
    models: Mapping[str, HyperCLIPModel],
    table: ImageTable,
    column: str,
    *,
    top: int = 1,
    smallest: int = 30,
    resamples: int = 1000,
) -> pl.DataFrame:
    """Ask models for the labels of pictures of one's own, and break accuracy down by a column of their table.

    Args:
        models: by name; the first is the reference. Each is adapted to the labels once, all groups together.
        table: pictures with the columns label and ``column``.
        column: for example "region" of GeoDE, or the income quartile of Dollar Street.
        top: 1, or 5 as DataComp does for Dollar Street.
        smallest: images a group needs to be judged.
        resamples: of the bootstrap over images.

    Returns:
        Metrics in long form, as a run's: split "own", groups ``column=value`` and ``by=column``.

    Raises:
        DataError: no such column, no model, too few labels, or pictures of another size than a model's.
    """
    if not models:
        raise DataError("no model to measure; give at least one")
    groups, labels = group_column(table.about, column), group_column(table.about, "label").to_list()
    classes = sorted(set(labels) - {None})
    known = [row for row, label in enumerate(labels) if label is not None]
    label = torch.tensor([classes.index(labels[row]) for row in known])
    spelled = [name.replace("_", " ") for name in classes]
    ranks = [
        model.adapt(spelled, PLAIN_TEMPLATES).ranks(table.pixels[known], label) for model in models.values()
    ]
    correct = accuracy_values(torch.stack(ranks).numpy(), np.full(len(known), len(classes)))[f"top{top}"]
    parts = by_group(correct, [groups[row] for row in known], np.arange(len(known)), smallest, resamples)
    items = [Found(name, None, {}, {}) for name in models]
    rows = []
    for name, one, count in zip(parts.groups, parts.measured, parts.counts, strict=True):
        rows += _long(f"{column}={name}", f"top{top}", one, count, items)
    least = min((size for size, fine in zip(parts.counts, parts.judged, strict=True) if fine), default=0)
    for metric, one in ((f"worst_group_top{top}", parts.worst), (f"gap_top{top}", parts.gap)):
        rows += _long(f"by={column}", metric, one, least, items) if one is not None else []
    same = {"paper": "hyper_clip", "recipe": "-", "dataset": "own", "split": "own"}
    return pl.DataFrame([{**same, **row} for row in rows], schema=METRIC_COLUMNS)


def _long(group: str, metric: str, measured: Measured, count: int, items: list[Found]) -> list[dict]:
    """List one metric's rows, with differences to the first model."""
    rows = metric_rows(metric, measured, items, {item.model: None for item in items}, items[0].model)
    return [{**row, "group": group, "count": count} for row in rows]

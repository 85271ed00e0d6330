"""Tables of a Hyper-Align run: ways, agreement with the full grid, scale, encoders; and what they say."""

from typing import Any

import polars as pl

from workbench.runs import Run
from workbench.tables import Table, by_seed, flops_text, seed_differences, with_interval
from workbench.zoo_scores import (
    MAIN,
    best_of_groups,
    cost_of_way,
    image_order,
    metric_row,
    pair_means,
    scale_curve,
)


def _score(row: dict[str, Any] | None, signed: bool = False) -> str:
    """Print a metric row with its interval; a dash where there is none."""
    if row is None:
        return "-"
    return with_interval(row["value"], row["low"], row["high"], "+" if signed else "")


def _where(row: dict[str, Any] | None) -> str:
    """Say which pairs a row is about, if not all."""
    return "" if row is None or row["group"] == "all" else f" ({row['group'].removeprefix('text=')} only)"


def _ratio(one: float | None, other: float | None) -> str:
    return "-" if not one or not other else f"{one / other:.2f}" if one < 10 * other else f"{one / other:.0f}"


def _ranked(run: Run) -> list[dict[str, Any]]:
    """Return the ways that were measured, best first; those that miss some pairs come last."""
    known = [model for model in run.recipe["models"] if metric_row(run.metrics, model["name"], MAIN)]
    rows = {model["name"]: metric_row(run.metrics, model["name"], MAIN) for model in known}
    return sorted(
        known, key=lambda model: (rows[model["name"]]["group"] != "all", -rows[model["name"]]["value"])
    )


def larger_grid(run: Run) -> str | None:
    """Return the costliest way that trains each pair alone, if it is not the reference."""
    costs = {
        model["name"]: cost_of_way(run.metrics, model["name"], "flops_per_pair") or 0.0
        for model in run.recipe["models"]
        if model["kind"] == "ape"
    }
    found = max(costs, key=costs.get, default=None)
    return None if found == run.recipe["reference"] else found


def ways_table(run: Run) -> Table:
    """Print what each way reaches and what it costs, best first.

    Operations and seconds are those of the whole zoo; savings are per pair, so that a way that was tried on
    fewer pairs is held against what these would have cost.
    """
    metrics, reference, grid = run.metrics, run.recipe["reference"], larger_grid(run)
    against = [reference, *([grid] if grid else [])]
    rows = []
    for model in _ranked(run):
        name = model["name"]
        score = metric_row(metrics, name, MAIN)
        per_pair = cost_of_way(metrics, name, "flops_per_pair")
        saved = [_ratio(cost_of_way(metrics, other, "flops_per_pair"), per_pair) for other in against]
        seconds, parameters = (cost_of_way(metrics, name, what) for what in ("seconds", "parameters"))
        rows.append(
            [
                name + _where(score),
                _score(score),
                _score(metric_row(metrics, name, "rank_agreement")),
                _score(metric_row(metrics, name, "regret")),
                flops_text(cost_of_way(metrics, name, "flops")),
                *saved,
                "-" if seconds is None else f"{seconds:.1f}",
                "-" if parameters is None else f"{parameters:,.0f}",
            ]
        )
    columns = ["way", "R@10 (95 % interval)", "rank agreement", "regret", "operations"]
    saved = [f"x cheaper than {name}" for name in against]
    return Table([*columns, *saved, "seconds", "trained parameters"], rows)


def agreement_table(run: Run) -> Table:
    """Print how well each way ranks and chooses pairs, held against the full grid; best ranking first."""
    rows = []
    for model in _ranked(run):
        name = model["name"]
        agreement, regret = (metric_row(run.metrics, name, what) for what in ("rank_agreement", "regret"))
        gain, chosen = (metric_row(run.metrics, name, what) for what in ("ndcg_at_5", f"chosen_{MAIN}"))
        if regret is None:
            continue
        order = -2.0 if agreement is None else agreement["value"]
        cells = [_score(agreement), f"{gain['value']:.3f}", _score(regret), _score(chosen), regret["count"]]
        rows.append((order, [name + _where(regret), *cells, ", ".join(_picks(run, model))]))
    columns = ["way", "rank agreement", "NDCG@5", "regret", "R@10 of the chosen pair", "pairs", "chosen"]
    return Table(columns, [row for _, row in sorted(rows, key=lambda one: -one[0])])


def _picks(run: Run, model: dict[str, Any]) -> list[str]:
    """Name the pairs that a way chooses on valid, each once, over its seeds."""
    if model["kind"] == "chance":
        return ["-"]
    score = (pl.col(f"t2i_{MAIN}") + pl.col(f"i2t_{MAIN}")) / 2
    own = run.scores.filter(~pl.col("control"), model=model["name"], split="valid").with_columns(value=score)
    best = own.filter(pl.col("value") == pl.col("value").max().over("seed"))
    best = best.unique("seed", keep="first", maintain_order=True)
    return list(dict.fromkeys(f"{row['text']} -> {row['image']}" for row in best.to_dicts()))


def scale_table(run: Run) -> Table:
    """Print the test R@10 of the pair chosen on valid: of N image encoders, and within groups of encoders."""
    curve, groups = scale_curve(run.scores), best_of_groups(run.scores)
    largest = curve["size"].max()
    sizes = sorted({1, 2, *(round(largest * share) for share in (0.25, 0.5, 0.75)), largest} - {0})
    sizes = [size for size in sizes if size <= largest]
    labels = dict(groups.select("group", "encoders").unique(maintain_order=True).iter_rows())
    at = {(row["model"], row["size"]): row["value"] for row in curve.to_dicts()}
    within = {(row["model"], row["group"]): row["value"] for row in groups.to_dicts()}
    rows = [
        [
            model["name"] + _where(metric_row(run.metrics, model["name"], MAIN)),
            *(_value(at.get((model["name"], size))) for size in sizes),
            *(_value(within.get((model["name"], group))) for group in labels),
        ]
        for model in _ranked(run)
    ]
    columns = [*(f"N = {size}" for size in sizes), *(f"{name} ({count})" for name, count in labels.items())]
    return Table(["way", *columns], rows)


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def encoder_table(run: Run, way: str | None = None) -> Table:
    """Print the image encoders with R@10 by one way and by the reference, in the reference's order.

    Args:
        run: a finished run.
        way: the best that has all pairs unless given.
    """
    reference = run.recipe["reference"]
    way = way or _ranked(run)[0]["name"]
    means = pair_means(run.scores)
    about = {row["image"]: row for row in means.to_dicts()}
    best = {
        name: dict(means.filter(model=name).group_by("image").agg(pl.col("value").mean()).iter_rows())
        for name in (way, reference)
    }
    rows = []
    for image in image_order(run.scores, reference):
        row = about[image]
        count = row["image_parameters"]
        size = "not known" if count is None else f"{count:,}" if count else "none"
        kind = "control" if row["control"] else "encoder"
        rows.append([image, kind, row["image_width"], size, *(_value(best[one].get(image)) for one in best)])
    shown = [f"R@10 by {name}, mean over texts" for name in best]
    return Table(["image encoder", "is", "width", "parameters", *shown], rows)


def best_ways(run: Run) -> list[str]:
    """Return the best generated, the best jointly trained and the best closed-form way that has all pairs."""
    kinds = (("hyper_align",), ("direct",), ("ridge", "procrustes", "cca", "connector"))
    whole = [
        model
        for model in _ranked(run)
        if metric_row(run.metrics, model["name"], MAIN)["group"] == "all"
        and model["name"] != run.recipe["reference"]
    ]
    first = (next((model["name"] for model in whole if model["kind"] in kind), None) for kind in kinds)
    return [name for name in first if name]


def zoo_findings(run: Run) -> list[str]:
    """Say in sentences what generated, jointly trained and closed-form connectors save against the grid."""
    metrics, reference = run.metrics, run.recipe["reference"]
    grid = cost_of_way(metrics, reference, "flops_per_pair")
    ways, lines = best_ways(run), []
    kinds = {model["name"]: model["kind"] for model in run.recipe["models"]}
    for name in ways if grid else ():
        cost = cost_of_way(metrics, name, "flops_per_pair")
        change = metric_row(metrics, name, f"{MAIN}_minus_{reference}")
        seeds = by_seed(seed_differences(run, name, reference))
        told = "" if change is None else f"; R@10 minus {reference}: {_score(change, signed=True)}{seeds}"
        lines.append(
            f"{name}, the best of its kind ({kinds[name]}), takes {cost / grid:.2f} of {reference}'s "
            f"operations a pair{told}."
        )
    agreed = {
        model["name"]: row
        for model in run.recipe["models"]
        if model["name"] != reference
        and (row := metric_row(metrics, model["name"], "rank_agreement"))
        and row["group"] == "all"
    }
    if agreed:
        name = max(agreed, key=lambda one: agreed[one]["value"])
        lines.append(
            f"The ranking of the {agreed[name]['count']} pairs nearest to {reference}'s is {name}'s: "
            f"Spearman {_score(agreed[name])}."
        )
    return lines

"""Runs of the families -> one table: claim, bars, generated weights beside the controls, and the cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import RecipeError
from workbench.papers import FAMILIES, load_recipe
from workbench.runs import Run, finished_runs
from workbench.tables import Table, bar_table, best_first, main_metric, model_table, with_interval

GENERATED, CLOSED = "generated weights", ("no training", "closed form")
HOW_FAMILIES = (
    "One row per family: what was published, in our words; every bar, what was measured (mean over seeds) "
    "and whether it is met; the best row whose weights are generated (ours) beside the best trained control "
    "and the best row without training, each by the family's metric; seconds of all its rows and seeds on "
    "the machine that ran it. A dash: the family has no such row."
)


def families_among(newest: Mapping[str, Run]) -> dict[str, Run]:
    """Return those of some runs, by recipe, that are of families, in the order of the families."""
    found = {name: run for name, run in newest.items() if run.recipe["paper"] in FAMILIES}
    return dict(sorted(found.items(), key=lambda item: (FAMILIES.index(item[1].recipe["paper"]), item[0])))


def family_runs(out: Path) -> dict[str, Run]:
    """Return the newest finished run of every recipe of a family, by name, in the order of the families."""
    return families_among({run.recipe["name"]: run for run in finished_runs(out)})


def claim_of(run: Run) -> str:
    """Return what was claimed, as the recipe says it now; a run may be older than the words."""
    try:
        return load_recipe(run.recipe["name"]).claim
    except RecipeError:  # a recipe of the user's own, given by path
        return run.recipe.get("claim", "")


def family_table(runs: Sequence[Run]) -> Table:
    """Print one row per family: claim, bars, best generated weights beside the best controls, seconds.

    The best of several rows is chosen on the numbers it is reported with, on both sides alike.
    """
    rows = []
    for run in runs:
        main, roles = main_metric(run), {model["name"]: model["role"] for model in run.recipe["models"]}
        frame = model_table(run).sort(main, descending=best_first(run), nulls_last=True).to_dicts()
        sides = [
            [row for row in frame if roles[row["model"]] == GENERATED],
            [row for row in frame if roles[row["model"]] == "control"],
            [row for row in frame if roles[row["model"]] in CLOSED],
        ]
        seconds = sum(card.get("seconds", 0) for card in run.cards)
        name = run.recipe["name"].removeprefix("family_").replace("_", " ")
        cells = [_best(side, main) for side in sides]
        about = [name, claim_of(run) or "-", _bars(run)]
        rows.append([*about, *cells, main, len(run.recipe["seeds"]), f"{seconds:.0f}"])
    columns = ["family", "claim", "bar", "ours", "control", "control without training"]
    return Table([*columns, "metric", "seeds", "seconds"], rows)


def _bars(run: Run) -> str:
    """Print every bar with what was measured, its interval left to the family's own section."""
    found = [
        f"{model} {metric} {limit} → {value.partition(' (')[0]}, {verdict}"
        for model, metric, _, limit, value, verdict in bar_table(run).rows
    ]
    return "; ".join(found) or "-"


def _best(rows: list[dict[str, Any]], metric: str) -> str:
    """Print the first row that has the metric."""
    row = next((row for row in rows if row.get(metric) is not None), None)
    if row is None:
        return "-"
    return f"{row['model']} {with_interval(row[metric], row['low'], row['high'])}"

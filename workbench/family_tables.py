"""Runs of the families -> one table: generated weights beside the controls, bars met, and the cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.papers import FAMILIES
from workbench.runs import Run, finished_runs
from workbench.tables import Table, bar_table, best_first, main_metric, model_table, with_interval

GENERATED, CLOSED = "generated weights", ("no training", "closed form")


def family_runs(out: Path) -> dict[str, Run]:
    """Return the newest finished run of every recipe of a family, by name, in the order of the families."""
    found = {run.recipe["name"]: run for run in finished_runs(out) if run.recipe["paper"] in FAMILIES}
    return dict(sorted(found.items(), key=lambda item: (FAMILIES.index(item[1].recipe["paper"]), item[0])))


def family_table(runs: Sequence[Run]) -> Table:
    """Print one row per family: best generated weights beside the best control, trained and untrained.

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
        verdicts = [row[-1] for row in bar_table(run).rows]
        bars = f"{verdicts.count('met')} of {len(verdicts)}" if verdicts else "-"
        seconds = sum(card.get("seconds", 0) for card in run.cards)
        name = run.recipe["name"].removeprefix("family_").replace("_", " ")
        cells = [_best(side, main) for side in sides]
        rows.append([name, main, *cells, bars, len(run.recipe["seeds"]), f"{seconds:.0f}"])
    columns = ["family", "metric", GENERATED, "best trained control", "best without training"]
    return Table([*columns, "bars met", "seeds", "seconds"], rows)


def _best(rows: list[dict[str, Any]], metric: str) -> str:
    """Print the first row that has the metric."""
    row = next((row for row in rows if row.get(metric) is not None), None)
    if row is None:
        return "-"
    return f"{row['model']} {with_interval(row[metric], row['low'], row['high'])}"

"""Runs -> reports: reproduced beside published, bars, floors and failures as plainly as successes.

HTML pages open from disk with no network (plotly.js is inside the page); all text is escaped.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from workbench.figures import groups_figure, history_figure, models_figure
from workbench.files import write_atomic
from workbench.runs import Run, finished_runs

_HOW = (
    "Every value is the mean over seeds; the interval is a 95 % bootstrap over sentence pairs of that "
    "mean, so it covers which pairs were drawn, and the spread over seeds stands beside it. Differences are "
    "paired: the same resampled pairs for both models."
)


@dataclass(frozen=True)
class Table:
    """A table of a report: column names and rows of ready text."""

    columns: list[str]
    rows: list[list[Any]]

    def _repr_markdown_(self) -> str:
        """Let a notebook show the table."""
        return self.markdown()

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown; cells cannot break out of it."""

        def cell(value: Any) -> str:
            text = f"[{value['text']}]({value['href']})" if isinstance(value, dict) else str(value)
            return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")

        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


@dataclass(frozen=True)
class Section:
    """One heading with sentences, a figure and a table, each optional."""

    title: str
    lines: list[str]
    table: Table | None = None
    figure: Markup | None = None
    folded: bool = False


def main_metric(metrics: pl.DataFrame) -> str:
    """Return the metric a run is ranked by: AUC if the labels allow it, else pair order, else Spearman."""
    known = set(metrics.filter(split=_last_split(metrics), group="all")["metric"])
    return next(name for name in ("auc", "pair_order", "spearman") if name in known)


def _last_split(metrics: pl.DataFrame) -> str:
    """Return "test", or "valid" where the test labels are withheld."""
    return "test" if "test" in metrics["split"].unique() else "valid"


def model_table(run: Run, group: str = "all", split: str | None = None) -> pl.DataFrame:
    """Return a run's main table: per model all metrics with interval, spread over seeds, and the difference.

    Args:
        run: a finished run.
        group: which rows, for example "condition_kind=unseen".
        split: "test" unless its labels are withheld.
    """
    metrics, split = run.metrics, split or _last_split(run.metrics)
    main, reference = main_metric(metrics), run.recipe["reference"]
    part = metrics.filter(split=split, group=group)
    rows = []
    for model in run.recipe["models"]:
        own = part.filter(model=model["name"])
        means = {row["metric"]: row for row in own.filter(pl.col("seed").is_null()).to_dicts()}
        if not means:
            continue
        seeds = own.filter(pl.col("seed").is_not_null())
        row: dict[str, Any] = {"model": model["name"], "seeds": seeds["seed"].n_unique() or None}
        for name in ("spearman", "pearson", "auc", "pair_order"):
            if name in means:
                row[name] = means[name]["value"]
        values = seeds.filter(metric=main)["value"].to_list()
        ranked = means.get(main, {"low": None, "high": None, "count": next(iter(means.values()))["count"]})
        row |= {"low": ranked["low"], "high": ranked["high"]}
        row["spread"] = statistics.stdev(values) if len(values) > 1 else None
        versus = means.get(f"{main}_minus_{reference}", {})
        row |= {"difference": versus.get("value"), "difference_low": versus.get("low")}
        row |= {"difference_high": versus.get("high"), "matched": model["against"]}
        versus = means.get(f"{main}_minus_{model['against']}", {})
        row |= {f"matched_{key}": versus.get(key) for key in ("value", "low", "high")}
        row["count"] = ranked["count"]
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _number(value: float | None, sign: bool = False) -> str:
    """Print a score; a dash where there is none."""
    return "-" if value is None else f"{value:+.3f}" if sign else f"{value:.3f}"


def _difference(value: float | None, low: float | None, high: float | None) -> str:
    """Print a paired difference with its interval; a dash where there is none."""
    return "-" if value is None else f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def _as_table(run: Run, group: str = "all") -> Table:
    """Print the main table of one group, best model first."""
    frame, main = model_table(run, group), main_metric(run.metrics)
    if frame.is_empty():
        return Table(["model"], [])
    scores = [name for name in ("spearman", "pearson", "auc", "pair_order") if name in frame.columns]
    columns = [
        "model",
        *scores,
        f"{main}: 95 % interval",
        "sd over seeds",
        f"minus {run.recipe['reference']}",
        "minus matched baseline",
    ]
    rows = []
    for row in frame.sort(
        main if main in scores else "spearman", descending=True, nulls_last=True
    ).to_dicts():
        difference = _difference(row["difference"], row["difference_low"], row["difference_high"])
        matched = _difference(row["matched_value"], row["matched_low"], row["matched_high"])
        matched += f" {row['matched']}" if row["matched"] else ""
        interval = f"{_number(row['low'])} to {_number(row['high'])}"
        cells = [_number(row[name]) for name in scores]
        rows.append(
            [row["model"], *cells, interval, _number(row["spread"]), difference, matched, row["count"]]
        )
    return Table([*columns, "rows"], rows)


def _found(run: Run, item: dict[str, Any]) -> dict[str, Any] | None:
    """Return the mean that a bar or a published number is held against."""
    rows = run.metrics.filter(
        pl.col("seed").is_null(),
        model=item["model"], metric=item["metric"], split=item["split"], group=item.get("group", "all"),
    ).to_dicts()  # fmt: skip
    return rows[0] if rows else None


def bar_table(run: Run) -> Table:
    """Hold the project's own bars against the run."""
    rows = []
    for bar in run.recipe["bars"]:
        found = _found(run, bar)
        value = "-" if found is None else f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
        verdict = (
            "not measured" if found is None else "met" if found["value"] >= bar["at_least"] else "missed"
        )
        where = f"{bar['split']}, {bar.get('group', 'all')}"
        rows.append([bar["model"], bar["metric"], where, f">= {bar['at_least']:g}", value, verdict])
    return Table(["model", "metric", "split, group", "bar", "measured", "verdict"], rows)


def published_table(run: Run) -> Table:
    """Put reproduced beside published: difference, tolerance and verdict."""
    rows = []
    for item in run.recipe["published"]:
        found = _found(run, item)
        value = None if found is None else found["value"]
        difference = None if value is None else value - item["value"]
        if not item["comparable"]:
            verdict = "not comparable"
        elif difference is None:
            verdict = "not measured"
        else:
            verdict = "reproduced" if abs(difference) <= item["tolerance"] else "not reproduced"
        where = f"{item['table']}, {item['source']}"
        cells = [_number(item["value"]), _number(value), _number(difference, True), f"{item['tolerance']:g}"]
        rows.append(
            [item["model"], f"{item['split']} {item['metric']}", *cells, verdict, where, item["note"]]
        )
    return Table(
        ["model", "metric", "published", "ours", "difference", "tolerance", "verdict", "where", "note"], rows
    )


def _side(low: float, high: float) -> str:
    """Say on which side of zero an interval lies."""
    return "above" if low > 0 else "below" if high < 0 else "not distinguishable from"


def findings(run: Run) -> list[str]:
    """Say in sentences what the numbers say: winner, generated weights against baseline, floor."""
    frame, main, reference = model_table(run), main_metric(run.metrics), run.recipe["reference"]
    kinds = {model["name"]: model for model in run.recipe["models"]}
    best = frame.sort(main, descending=True, nulls_last=True).to_dicts()[0]
    lines = [
        f"Best of {frame.height} models by {main}: {best['model']} with {best[main]:.3f} "
        f"({best['low']:.3f} to {best['high']:.3f})."
    ]
    plain = [
        row for row in frame.to_dicts()
        if kinds[row["model"]]["kind"] == "hyper" and kinds[row["model"]]["pooling"] == "sentence"
        and row["difference"] is not None
    ]  # fmt: skip
    if plain and reference in kinds:
        top = max(plain, key=lambda row: row[main])
        low, high = top["difference_low"], top["difference_high"]
        lines.append(
            f"The best head of the paper's own form, {top['model']}, is {_side(low, high)} {reference}: "
            f"{_difference(top['difference'], low, high)}."
        )
    lines += [
        f"{row['model']} is {_side(row['matched_low'], row['matched_high'])} its matched baseline "
        f"{row['matched']}: "
        f"{_difference(row['matched_value'], row['matched_low'], row['matched_high'])}."
        for row in frame.to_dicts()
        if row["matched_value"] is not None
    ]
    floor = next((row for row in frame.to_dicts() if kinds[row["model"]]["kind"] == "condition_only"), None)
    if any(settings["kind"] == "condition_only" for settings in kinds.values()):
        alike = floor is None or floor[main] is None
        value = "undefined (it scores all rows alike)" if alike else f"{floor[main]:.3f}"
        lines.append(f"The condition-only floor, which never sees the sentences, has {main} {value}.")
    missed = [row[0] for row in bar_table(run).rows if row[-1] != "met"]
    lines.append(f"Bars missed: {', '.join(missed)}." if missed else "No bar of this recipe is missed.")
    return lines


def _card_table(run: Run) -> Table:
    """Print what each trained model costs and whether its generator is sound, first seed."""
    rows, seen = [], set()
    for card in run.cards:
        if card["seed"] is None or card["model"] in seen:
            continue
        seen.add(card["model"])
        health, cost = card.get("health"), card.get("cost")
        generator = (
            [f"{cost['generator_parameters']:,}", f"{cost['generated_parameters']:,}"] if cost else ["-", "-"]
        )
        alive = (
            [f"{health['effective_rank']:.1f} of {health['conditions']}", health["verdict"]]
            if health
            else ["-", "-"]
        )
        even = str(cost["break_even_conditions"]) if cost else "-"
        rows.append(
            [card["model"], f"{card['parameters']:,}", f"{card['seconds']:.1f}", *generator, even, *alive]
        )
    columns = ["model", "trained parameters", "seconds", "of the generator", "generated per condition"]
    return Table([*columns, "break-even conditions", "effective rank", "generator"], rows)


def run_sections(run: Run) -> list[Section]:
    """Lay out one run's report."""
    metrics, main = run.metrics, main_metric(run.metrics)
    split = _last_split(metrics)
    sections = [Section("What was found", findings(run))]
    if run.recipe["bars"]:
        sections.append(Section("Bars", ["Set by this project before the run."], bar_table(run)))
    if run.recipe["published"]:
        lines = [
            "Numbers on one scale, 0 to 1. Where encoder, split or protocol differ, the verdict is "
            "'not comparable'."
        ]
        sections.append(Section("Published beside reproduced", lines, published_table(run)))
    figure = _div(models_figure(metrics, run.recipe["models"], main, split))
    sections.append(Section("All models", [_HOW], _as_table(run), figure))
    columns = dict.fromkeys(
        g.split("=")[0] for g in metrics.filter(split=split)["group"].unique(maintain_order=True) if "=" in g
    )
    shown = model_table(run).sort(main, descending=True, nulls_last=True)["model"].to_list()[:3]
    shown = list(dict.fromkeys([*shown, run.recipe["reference"]]))
    for column in columns:
        values = [
            g
            for g in metrics.filter(split=split)["group"].unique(maintain_order=True)
            if g.startswith(f"{column}=")
        ]
        figure = _div(groups_figure(metrics, shown, main, column, split))
        sections.append(Section(f"By {column.replace('_', ' ')}", [], figure=figure))
        sections += [
            Section(value.replace("=", ": "), [], _as_table(run, value), folded=True) for value in values
        ]
    sections.append(
        Section("Cost and health of each head", ["One seed; seconds on this machine."], _card_table(run))
    )
    sections.append(Section("Training", [], figure=_div(history_figure(run.cards, shown))))
    return sections


def _div(figure: Any) -> Markup:
    """Turn a figure into HTML without the library, which the page brings once."""
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False))


def _page(title: str, lead: list[str], sections: list[Section], footer: list[str], plotly: bool) -> str:
    """Render a page; everything but our own figures is escaped."""
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("workbench"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    library = Markup(get_plotlyjs()) if plotly else None
    page = environment.get_template("report.html.j2")
    return page.render(title=title, lead=lead, sections=sections, footer=footer, plotly=library)


def footer_of(run: Run) -> list[str]:
    """Return what identifies a run: name, recipe, commit, data, encoder, versions, device, time, memory."""
    about = run.provenance
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    return [
        f"Run {run.folder.name} of recipe {run.recipe['name']} ({about['recipe_sha256'][:12]}), workbench "
        f"{about['workbench']}, commit {about['commit']}, seeds {about['seeds']}.",
        f"Data {run.recipe['data']['name']} ({about['data_sha256'][:12]}), encoder {run.recipe['encoder']} "
        f"({about['encoder_sha256'][:12]}); {json.dumps(about['data'])}.",
        f"{about['device']}, {about['threads']} threads, {about['platform']}, Python {about['python']}, "
        f"{packages}. Finished {about['finished'][:19]} UTC; {about['seconds_of_last_process']} s, peak "
        f"memory {about['peak_process_mib']} MiB.",
    ]


def write_run_report(run: Run) -> Path:
    """Write one run's HTML report beside the runs; return its path."""
    path = run.folder.parent.parent / "html" / f"{run.folder.name}.html"
    lead = [f"Recipe {run.recipe['name']}: {run.recipe['title']}."]
    write_atomic(path, _page(run.recipe["title"], lead, run_sections(run), footer_of(run), plotly=True))
    return path


def write_index(out: Path) -> Path:
    """Write the index over all finished runs, as HTML and as Markdown, and each run's report.

    Returns:
        The path of index.html.
    """
    newest = {run.recipe["name"]: run for run in finished_runs(out)}
    overview, sections = [], []
    for name, run in sorted(newest.items()):
        write_run_report(run)
        main = main_metric(run.metrics)
        best = model_table(run).sort(main, descending=True, nulls_last=True).to_dicts()[0]
        bars = [row[-1] for row in bar_table(run).rows]
        met = f"{bars.count('met')} of {len(bars)} met" if bars else "-"
        link = {"text": name, "href": f"html/{run.folder.name}.html"}
        pages = [out / "notebooks" / f"{notebook}-{name}.html" for notebook in run.recipe["notebooks"]]
        done = [page for page in pages if page.is_file()]
        shown = {"text": done[-1].stem, "href": f"notebooks/{done[-1].name}"} if done else "-"
        score = f"{best[main]:.3f} ({best['low']:.3f} to {best['high']:.3f})"
        overview.append([link, run.recipe["data"]["name"], main, best["model"], score, met, shown])
        sections.append(Section(name, findings(run), _as_table(run)))
        if run.recipe["bars"]:
            sections.append(Section(f"{name}: bars", [], bar_table(run)))
        if run.recipe["published"]:
            sections.append(Section(f"{name}: published", [], published_table(run)))
    columns = ["recipe", "data", "metric", "best model", "value (95 % interval)", "bars", "notebook"]
    first = Section(
        "Runs",
        [] if overview else ["No finished run yet; start with: workbench reproduce"],
        Table(columns, overview),
    )
    sections = [first, *sections]
    lead = ["What has been run, what it was held against, and what did not hold.", _HOW]
    footer = [line for run in newest.values() for line in footer_of(run)]
    write_atomic(out / "index.html", _page("Workbench report", lead, sections, footer, plotly=False))
    write_atomic(out / "index.md", _markdown("Workbench report", lead, sections, footer))
    return out / "index.html"


def _markdown(title: str, lead: list[str], sections: list[Section], footer: list[str]) -> str:
    """Render the index for reading in a repository."""
    parts = [f"# {title}", *lead]
    for section in sections:
        parts += [f"## {section.title}", *(line.replace("<", "&lt;") for line in section.lines)]
        if section.table and section.table.rows:
            parts.append(section.table.markdown())
    return "\n\n".join([*parts, "---", *footer]) + "\n"

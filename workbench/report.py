"""Runs -> reports: reproduced beside published, bars, floors and failures as plainly as successes.

HTML pages open from disk with no network (plotly.js is inside the page); all text is escaped.
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from workbench.family_tables import HOW_FAMILIES, families_among, family_table
from workbench.files import write_atomic
from workbench.papers import FAMILIES, encoder_is_read
from workbench.runs import Run, finished_runs
from workbench.sections import (
    HOW,
    HOW_SEEDS,
    Section,
    how_cards,
    is_current,
    reading_of,
    run_sections,
    said_of,
)
from workbench.tables import (
    Table,
    bar_table,
    best_first,
    card_table,
    main_metric,
    model_table,
    published_table,
    score_table,
    with_interval,
)

_NONE = "No finished run yet; start with: workbench reproduce"


def render_page(title: str, lead: list[str], sections: list[Section], footer: list[str], plotly: bool) -> str:
    """Render a page that opens offline; everything but our own figures is escaped."""
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
    several = about.get("workers", 1) > 1
    shared = f" in each of {about['workers']} processes that share the trainings" if several else ""
    encoder = f", encoder {run.recipe['encoder']} ({about['encoder_sha256'][:12]})"
    if run.recipe["paper"] in FAMILIES and not encoder_is_read(run.recipe):
        encoder = ""
    return [
        f"Run {run.folder.name} of recipe {run.recipe['name']} ({about['recipe_sha256'][:12]}), workbench "
        f"{about['workbench']}, commit {about['commit']}, seeds {about['seeds']}.",
        f"Data {run.recipe['data']['name']} ({about['data_sha256'][:12]}){encoder}; "
        f"{json.dumps(about['data'])}.",
        f"{about['device']}, {about['threads']} threads{shared}, {about['platform']}, Python "
        f"{about['python']}, {packages}. Finished {about['finished'][:19]} UTC; "
        f"{about['seconds_of_last_process']} s, peak "
        f"memory {about['peak_process_mib']} MiB.",
    ]


def write_run_report(run: Run) -> Path:
    """Write one run's HTML report beside the runs; return its path."""
    path = run.folder.parent.parent / "html" / f"{run.folder.name}.html"
    lead = [f"Recipe {run.recipe['name']}: {run.recipe['title']}."]
    write_atomic(path, render_page(run.recipe["title"], lead, run_sections(run), footer_of(run), plotly=True))
    return path


def write_index(out: Path) -> Path:
    """Write the index over all finished runs, as HTML and as Markdown, and each run's report.

    Returns:
        The path of index.html.
    """
    newest = {run.recipe["name"]: run for run in finished_runs(out)}
    runs = [run for _, run in sorted(newest.items())]
    for run in runs:
        write_run_report(run)
    columns = ["recipe", "data", "seeds", "metric", "best model", "value (95 % interval)", "bars", "notebook"]
    overview = Table(columns, [_overview_row(run, out) for run in runs])
    sections = [Section("Runs", [] if runs else [_NONE], overview)]
    families = families_among(newest)
    if families:
        table = family_table(list(families.values()))
        sections.append(Section("Families: claim, bar, control", [HOW_FAMILIES], table))
    sections += [section for run in runs for section in _index_sections(run, run.recipe["name"] in families)]
    lead = ["What has been run, what it was held against, and what did not hold.", HOW]
    if families:
        lead.append(f"Families of hypernetworks (family_...) differ: {HOW_SEEDS}")
    footer = [line for run in newest.values() for line in footer_of(run)]
    write_atomic(out / "index.html", render_page("Workbench report", lead, sections, footer, plotly=False))
    write_atomic(out / "index.md", _markdown("Workbench report", lead, sections, footer))
    return out / "index.html"


def _overview_row(run: Run, out: Path) -> list[Any]:
    """Print a run's line of the table of runs, with links to its pages."""
    name, main = run.recipe["name"], main_metric(run)
    best = model_table(run).sort(main, descending=best_first(run), nulls_last=True).to_dicts()[0]
    bars = [row[-1] for row in bar_table(run).rows]
    met = f"{bars.count('met')} of {len(bars)} met" if bars else "-"
    link = {"text": name, "href": f"html/{run.folder.name}.html"}
    pages = [out / "notebooks" / f"{notebook}-{name}.html" for notebook in run.recipe["notebooks"]]
    done = [page for page in pages if page.is_file()]
    shown = {"text": done[-1].stem, "href": f"notebooks/{done[-1].name}"} if done else "-"
    score = with_interval(best[main], best["low"], best["high"])
    seeds = f"{len(run.provenance['seeds'])}{'' if is_current(run) else ', earlier settings'}"
    return [link, run.recipe["data"]["name"], seeds, main, best["model"], score, met, shown]


def _index_sections(run: Run, family: bool) -> list[Section]:
    """Lay out what the index tells of one run; of a family also cost and health of each row."""
    name, reading = run.recipe["name"], reading_of(run)
    sections = [Section(name, [*said_of(run), *([reading] if reading else [])], score_table(run))]
    if run.recipe["bars"]:
        sections.append(Section(f"{name}: bars", [], bar_table(run)))
    if run.recipe["published"]:
        sections.append(Section(f"{name}: published", [], published_table(run)))
    if family:
        sections.append(Section(f"{name}: cost and health", how_cards(run), card_table(run)))
    return sections


def _markdown(title: str, lead: list[str], sections: list[Section], footer: list[str]) -> str:
    """Render the index for reading in a repository."""
    parts = [f"# {title}", *lead]
    for section in sections:
        parts += [f"## {section.title}", *(line.replace("<", "&lt;") for line in section.lines)]
        if section.table and section.table.rows:
            parts.append(section.table.markdown())
    return "\n\n".join([*parts, "---", *(line.replace("<", "&lt;") for line in footer)]) + "\n"

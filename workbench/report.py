"""Runs -> reports: reproduced beside published, bars, floors and failures as plainly as successes.

HTML pages open from disk with no network (plotly.js is inside the page); all text is escaped.
"""

import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from workbench.files import write_atomic
from workbench.runs import Run, finished_runs
from workbench.sections import HOW, HOW_SEEDS, Section, is_current, reading_of, run_sections, said_of
from workbench.tables import (
    Table,
    bar_table,
    best_first,
    main_metric,
    model_table,
    published_table,
    score_table,
    with_interval,
)


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
    return [
        f"Run {run.folder.name} of recipe {run.recipe['name']} ({about['recipe_sha256'][:12]}), workbench "
        f"{about['workbench']}, commit {about['commit']}, seeds {about['seeds']}.",
        f"Data {run.recipe['data']['name']} ({about['data_sha256'][:12]}), encoder {run.recipe['encoder']} "
        f"({about['encoder_sha256'][:12]}); {json.dumps(about['data'])}.",
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
    overview, sections = [], []
    for name, run in sorted(newest.items()):
        write_run_report(run)
        main = main_metric(run)
        best = model_table(run).sort(main, descending=best_first(run), nulls_last=True).to_dicts()[0]
        bars = [row[-1] for row in bar_table(run).rows]
        met = f"{bars.count('met')} of {len(bars)} met" if bars else "-"
        link = {"text": name, "href": f"html/{run.folder.name}.html"}
        pages = [out / "notebooks" / f"{notebook}-{name}.html" for notebook in run.recipe["notebooks"]]
        done = [page for page in pages if page.is_file()]
        shown = {"text": done[-1].stem, "href": f"notebooks/{done[-1].name}"} if done else "-"
        score = with_interval(best[main], best["low"], best["high"])
        seeds = f"{len(run.provenance['seeds'])}{'' if is_current(run) else ', earlier settings'}"
        overview.append([link, run.recipe["data"]["name"], seeds, main, best["model"], score, met, shown])
        reading = [reading_of(run)] if reading_of(run) else []
        sections.append(Section(name, [*said_of(run), *reading], score_table(run)))
        if run.recipe["bars"]:
            sections.append(Section(f"{name}: bars", [], bar_table(run)))
        if run.recipe["published"]:
            sections.append(Section(f"{name}: published", [], published_table(run)))
    columns = ["recipe", "data", "seeds", "metric", "best model", "value (95 % interval)", "bars", "notebook"]
    first = Section(
        "Runs",
        [] if overview else ["No finished run yet; start with: workbench reproduce"],
        Table(columns, overview),
    )
    sections = [first, *sections]
    lead = ["What has been run, what it was held against, and what did not hold.", HOW]
    if any("metric" in run.recipe for run in newest.values()):
        lead.append(f"Families of hypernetworks (family_...) differ: {HOW_SEEDS}")
    footer = [line for run in newest.values() for line in footer_of(run)]
    write_atomic(out / "index.html", render_page("Workbench report", lead, sections, footer, plotly=False))
    write_atomic(out / "index.md", _markdown("Workbench report", lead, sections, footer))
    return out / "index.html"


def _markdown(title: str, lead: list[str], sections: list[Section], footer: list[str]) -> str:
    """Render the index for reading in a repository."""
    parts = [f"# {title}", *lead]
    for section in sections:
        parts += [f"## {section.title}", *(line.replace("<", "&lt;") for line in section.lines)]
        if section.table and section.table.rows:
            parts.append(section.table.markdown())
    return "\n\n".join([*parts, "---", *(line.replace("<", "&lt;") for line in footer)]) + "\n"

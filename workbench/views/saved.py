"""A view as one HTML report that opens offline: its figures, texts, tables and pictures, in their order."""

import base64
import io

import panel as pn
import polars as pl
from markupsafe import Markup

from workbench.report import render_page
from workbench.sections import Section
from workbench.tables import Table

MOST_ROWS = 2000  # of a table


def saved_page(title: str, content: pn.viewable.Viewable) -> io.StringIO:
    """Write what a view shows as a report; all text is escaped, plotly.js is inside.

    Args:
        title: of the report.
        content: what is shown; controls in it are left out, and texts at its end become the footer.
    """
    sections, lines = [], []
    every = content.select(pn.viewable.Viewable)
    hidden = {id(inner) for part in every if not part.visible for inner in part.select()}
    for part in every:
        if id(part) in hidden or getattr(part, "object", "") is None or "live" in part.css_classes:
            continue
        if isinstance(part, pn.pane.Markdown | pn.pane.Str) and not isinstance(part, pn.pane.HTML):
            lines += str(part.object).lstrip("# ").splitlines()
        elif (drawn := _drawn(part)) is not None or isinstance(part, pn.widgets.Tabulator):
            table = _table(part) if isinstance(part, pn.widgets.Tabulator) else None
            sections.append(Section("", lines, table, drawn))
            lines = []
    return io.StringIO(render_page(title, [], sections, lines, plotly=True))


def _drawn(part: pn.viewable.Viewable) -> Markup | None:
    """Return a figure, a picture or markup of our own as it stands in a page; None for everything else."""
    if isinstance(part, pn.pane.Plotly):
        return Markup(part.object.to_html(full_html=False, include_plotlyjs=False))
    if isinstance(part, pn.pane.image.ImageBase):
        raw = base64.b64encode(part._data(part.object)).decode()
        kind = "svg+xml" if part.filetype == "svg" else part.filetype
        return Markup('<img alt="{}" src="data:image/{};base64,{}">').format(part.alt_text or "", kind, raw)
    return Markup(part.object) if isinstance(part, pn.pane.HTML) else None


def _table(shown: pn.widgets.Tabulator) -> Table:
    """Return the columns that are seen, with four decimals; a long table is cut and says so."""
    values = shown.value.drop(columns=shown.hidden_columns)
    frame = pl.DataFrame({name: values[name].tolist() for name in values}, strict=False)
    rows = [
        [f"{cell:.4f}" if isinstance(cell, float) else "" if cell is None else cell for cell in row]
        for row in frame.head(MOST_ROWS).iter_rows()
    ]
    cut = [[f"{frame.height - MOST_ROWS:,} more rows", *[""] * (frame.width - 1)]] * (
        frame.height > MOST_ROWS
    )
    return Table(frame.columns, rows + cut)

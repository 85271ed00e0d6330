"""Tables of a view: plain text, one row to choose, where every number comes from, and downloads.

A number says on hover where it comes from: :func:`fill` is told once for the whole table (the run, the model,
the rows it is taken over) and for each column how it is computed. The header says so of the column, a cell of
its own row. Both are text: names and conditions in them are shown and never read as markup.
"""

import html
import io
import json
from collections.abc import Callable, Mapping

import pandas as pd
import panel as pn
import polars as pl
from bokeh.models import HTMLTemplateFormatter

from workbench.groups import with_interval

_PAGE = 10  # rows
_DIGITS = 4
_LETTER, _WIDE = 8, 260  # pixels of a letter, and of the widest column of texts
_NARROW = r"[ .,:()]"  # letters of half the width
_ARROW = 3  # letters that the arrow in a header takes
_MEANINGS = {  # of columns that tables share, unless a table says more
    "row": "number of the row",
    "rank": "place, 1 is first",
    "count": "how many it is taken over",
    "value": "mean over the count",
    "low": "lower end of the 95 % bootstrap interval",
    "high": "upper end of the 95 % bootstrap interval",
    "floor": "what chance gives",
    "seeds": "trainings that the mean is taken over",
}
_TELLER = (
    '<span title="<%- {told} %>"><%- Number.isNaN(value) ? "" : typeof value == "number" ? '
    'value.toLocaleString("en", {{maximumFractionDigits: {digits}}}) : value %></span>'
)


def table_of(pick: Callable[[int], None] | None = None, column: str = "row") -> pn.widgets.Tabulator:
    """Make an empty table; :func:`fill` puts rows into it.

    Args:
        pick: is told the value of a column in the row a person clicks.
        column: which column.
    """
    table = pn.widgets.Tabulator(
        pd.DataFrame(), disabled=True, selectable=1, show_index=False, pagination="remote", page_size=_PAGE,
        layout="fit_data_fill", sizing_mode="stretch_width",
    )  # fmt: skip
    if pick is not None:
        table.on_click(lambda event: pick(int(table.value[column].iloc[event.row])))
    return table


def fill(
    table: pn.widgets.Tabulator,
    frame: pl.DataFrame,
    chosen: int | None = None,
    column: str = "row",
    *,
    meanings: Mapping[str, str] | None = None,
    origin: str = "",
) -> None:
    """Show other rows; numbers are rounded, texts stay texts, and the chosen row is selected.

    Args:
        table: made by :func:`table_of`.
        frame: its rows.
        chosen: value of a column in the row to select; None for none.
        column: which column.
        meanings: how the numbers of a column are computed, by its name; usual names are known.
        origin: where all numbers come from, as :func:`workbench.views.page.origin` says it.
    """
    rounded = frame.with_columns(pl.selectors.float().round(_DIGITS))
    # Tables take pandas alone, and its text columns of objects are shown with the plain-text formatter.
    values = pd.DataFrame(rounded.to_dict(as_series=False))
    places = [] if chosen is None else [*rounded.with_row_index("at").filter(pl.col(column) == chosen)["at"]]
    texts = [name for name, kind in rounded.schema.items() if kind == pl.String]
    numbers = [name for name, kind in rounded.schema.items() if kind.is_numeric()]
    told = {name: _told(name, meanings or {}, origin) for name in rounded.columns}
    key = next((name for name in ("row", *texts) if name in rounded.columns), "")
    cells = {name: _cell(told[name], key) for name in numbers}
    wide = pl.col(texts).str.len_chars() - pl.col(texts).str.count_matches(_NARROW) / 2
    longest = rounded.select(wide.max().fill_null(0)).to_dicts()[0] if texts else {}
    table.param.update(
        formatters={name: {"type": "plaintext"} for name in texts} | cells,
        text_align=dict.fromkeys(numbers, "right"),
        # Headers are markup to the browser, and a column may be named by somebody's file.
        titles={name: html.escape(name) for name in rounded.columns},
        header_tooltips={name: html.escape(said) for name, said in told.items()},
        # Long texts are broken into lines.
        widths={
            name: min(_WIDE, round(24 + _LETTER * max(len(name) + _ARROW, letters)))
            for name, letters in longest.items()
        },
        selection=[],
        # A person may have sorted by a column that is shown no more, which pandas would look for.
        sorters=[one for one in table.sorters if one["field"] in rounded.columns],
    )
    table.value = values
    table.selection = [int(place) for place in places]
    if places:
        table.page = int(places[0]) // _PAGE + 1


def _told(name: str, meanings: Mapping[str, str], origin: str) -> str:
    """Say what a column is and where it comes from."""
    meaning = meanings.get(name) or _MEANINGS.get(name, "")
    return "; ".join(part for part in (f"{name}: {meaning}" if meaning else name, origin) if part)


def _cell(told: str, key: str) -> HTMLTemplateFormatter:
    """Show a number that says on hover which row it belongs to and where it comes from.

    Args:
        told: of its column.
        key: column that names the row; empty for none.
    """

    def quoted(text: str) -> str:  # no end of a template in it
        return json.dumps(text).replace("%", "\\u0025")

    row = f"obj[{quoted(key)}] + {quoted(': ' if key != 'row' else ', ')} + " if key else ""
    row = f"{quoted('row ')} + {row}" if key == "row" else row
    return HTMLTemplateFormatter(template=_TELLER.format(told=row + quoted(told), digits=_DIGITS))


def compact(frame: pl.DataFrame) -> pl.DataFrame:
    """Write every value and its interval into one cell, so that a table fits a page; empty columns go."""
    intervals = {"low": ("value", "effect", "share", "distance", "overall")}
    intervals |= {name: (name.removesuffix("_low"),) for name in frame.columns if name.endswith("_low")}
    for low, values in intervals.items():
        for value in (one for one in values if one in frame.columns and low in frame.columns):
            ends = frame.select(value, low, low.replace("low", "high")).rows()
            cells = ["" if row[0] is None else with_interval(*row) for row in ends]
            frame = frame.with_columns(pl.Series(value, cells, pl.String))
    ends = pl.selectors.ends_with("_low", "_high") | pl.selectors.by_name("low", "high", require_all=False)
    frame = frame.select(pl.exclude("name", "exact", "seeds")).select(~ends)
    told = [one.name for one in frame if not {*one} <= {"", None}]
    return frame.select(told).rename(lambda name: name.replace("_", " "))


def downloads(name: str, frame: Callable[[], pl.DataFrame]) -> pn.Row:
    """Return buttons that download a table with all its digits, as CSV and as Parquet."""

    def button(kind: str, write: Callable[[pl.DataFrame, io.BytesIO], object]) -> pn.widgets.FileDownload:
        def written() -> io.BytesIO:
            file = io.BytesIO()
            write(frame(), file)
            file.seek(0)
            return file

        return pn.widgets.FileDownload(
            callback=written, filename=f"{name}.{kind}", label=f"Numbers as {kind}", variant="outline",
            width=145,
        )  # fmt: skip

    return pn.Row(button("csv", pl.DataFrame.write_csv), button("parquet", pl.DataFrame.write_parquet))

"""Tables of a view: plain text, one row to choose, where every number comes from, and downloads.

A number says on hover where it comes from: :meth:`TablePlace.show` is told once for the whole table (the
run, the model, the rows it is taken over) and for each column how it is computed. The header says so of the
column, a cell of its own row. Both are text: names and conditions in them are shown and never read as markup.
"""

import html
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import panel as pn
import polars as pl
from bokeh.models import HTMLTemplateFormatter

from workbench.tables import with_interval

_PAGE = 10  # rows
_DIGITS = 4
_LETTER, _WIDE = 8, 240  # pixels of a letter, and of the widest column of texts
_NARROW = r"[ .,:()]"  # letters of half the width
_ARROW = 3.25  # letters that the arrow in a header takes
_NUMBER, _TRUTH = 7, 5  # letters of a number with digits behind the point, and of true or false
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


class TablePlace(pn.Column):
    """Holds a table once there are rows.

    A table whose columns or settings change is made anew: while a slow browser builds a table, other columns
    for it end in an error that takes the rest of the page's changes with it (``setColumns`` in Panel 1.9's
    ``models/tabulator.ts``).
    """

    def __init__(
        self, pick: Callable[[int], None] | None = None, column: str = "row", **settings: Any
    ) -> None:
        """Make an empty place.

        Args:
            pick: is told the value of a column in the row a person clicks.
            column: which column; :meth:`show` selects by it, too.
            settings: of the table, before those that follow from its rows.
        """
        super().__init__(visible=False, sizing_mode="stretch_width")
        self._pick, self._column, self._settings = pick, column, settings
        self._made: dict[str, Any] = {}

    def show(
        self,
        frame: pl.DataFrame,
        chosen: int | None = None,
        *,
        meanings: Mapping[str, str] | None = None,
        origin: str = "",
    ) -> None:
        """Show other rows; numbers are rounded, texts stay texts, and the chosen row is selected.

        Args:
            frame: the rows.
            chosen: value of the place's column in the row to select; None for none.
            meanings: how the numbers of a column are computed, by its name; usual names are known.
            origin: where all numbers come from, as :func:`workbench.views.page.origin` says it.
        """
        rounded = frame.with_columns(pl.selectors.float().round(_DIGITS))
        # Tables take pandas alone, and its text columns of objects are shown with the plain-text formatter.
        values = pd.DataFrame(rounded.to_dict(as_series=False))
        places = [] if chosen is None else (frame[self._column] == chosen).arg_true().to_list()
        made = _settings(rounded, meanings or {}, origin)
        if made == self._made:
            self[0].param.update(selection=[], value=values)
            self._select(places)
        else:
            self[:] = [self._new(values, places, made)]
            self._made = made
        self.visible = True

    def choose(self, row: int) -> None:
        """Select a row by its place, and turn to its page."""
        if self[0].selection != [row]:
            self._select([row])

    def _select(self, places: list[int]) -> None:
        page = {"page": places[0] // _PAGE + 1} if places else {}
        self[0].param.update(selection=places, **page)

    def _new(self, values: pd.DataFrame, places: list[int], made: dict[str, Any]) -> pn.widgets.Tabulator:
        """Make a table of rows; it stays sorted as a person sorted the one before, where it can."""
        sorters = [one for one in self[0].sorters if one["field"] in values.columns] if len(self) else []
        cells = {name: HTMLTemplateFormatter(template=text) for name, text in made["templates"].items()}
        formatters = {name: {"type": "plaintext"} for name in made["widths"]} | cells
        settings = {
            "formatters": formatters, "text_align": dict.fromkeys(cells, "right"), "layout": "fit_data_fill",
            **{name: made[name] for name in ("titles", "header_tooltips", "widths")}, **self._settings,
        }  # fmt: skip
        table = pn.widgets.Tabulator(
            values, disabled=True, selectable=1, show_index=False, pagination="remote", page_size=_PAGE,
            page=places[0] // _PAGE + 1 if places else 1, selection=places, sorters=sorters,
            sizing_mode="stretch_width", **settings,
        )  # fmt: skip
        if self._pick is not None:
            table.on_click(lambda event: self._pick(int(table.value[self._column].iloc[event.row])))
        return table

    @property
    def table(self) -> pn.widgets.Tabulator | None:
        """The table; None where the place is empty."""
        return self[0] if len(self) else None


def _settings(frame: pl.DataFrame, meanings: Mapping[str, str], origin: str) -> dict[str, Any]:
    """Return all of a table but its rows: what headers and cells say, and how wide columns are."""
    texts = [name for name, kind in frame.schema.items() if kind == pl.String]
    numbers = [name for name, kind in frame.schema.items() if kind.is_numeric()]
    told = {name: _told(name, meanings, origin) for name in frame.columns}
    key = next((name for name in ("row", *texts) if name in frame.columns), "")
    wide = pl.col(texts).str.len_chars() - pl.col(texts).str.count_matches(_NARROW) / 2
    longest = frame.select(wide.max().fill_null(0)).to_dicts()[0] if texts else {}
    for name, kind in frame.schema.items():  # a table that sizes them itself cuts headers in another theme
        if kind.is_integer():
            longest[name] = len(f"{frame[name].abs().max() or 0:,}")
        elif kind.is_float() or kind == pl.Boolean:
            longest[name] = _NUMBER if kind.is_float() else _TRUTH
    return {
        "templates": {name: _cell(told[name], key) for name in numbers},
        # Headers are markup to the browser, and a column may be named by somebody's file.
        "titles": {name: html.escape(name) for name in frame.columns},
        "header_tooltips": {name: html.escape(said) for name, said in told.items()},
        # Long texts are broken into lines.
        "widths": {
            name: min(_WIDE, round(24 + _LETTER * max(len(name) + _ARROW, letters)))
            for name, letters in longest.items()
        },
    }


def _told(name: str, meanings: Mapping[str, str], origin: str) -> str:
    """Say what a column is and where it comes from."""
    meaning = meanings.get(name) or _MEANINGS.get(name, "")
    return "; ".join(part for part in (f"{name}: {meaning}" if meaning else name, origin) if part)


def _cell(told: str, key: str) -> str:
    """Return the template of a number that says on hover which row it belongs to and where it comes from.

    Args:
        told: of its column.
        key: column that names the row; empty for none.
    """

    def quoted(text: str) -> str:  # no end of a template in it
        return json.dumps(text).replace("%", "\\u0025")

    row = f"obj[{quoted(key)}] + {quoted(': ' if key != 'row' else ', ')} + " if key else ""
    row = f"{quoted('row ')} + {row}" if key == "row" else row
    return _TELLER.format(told=row + quoted(told), digits=_DIGITS)


def compact(frame: pl.DataFrame) -> pl.DataFrame:
    """Write every value and its interval into one cell, so that a table fits a page; empty columns go."""
    intervals = {"low": ("value", "effect", "share", "distance", "overall")}
    intervals |= {name: (name.removesuffix("_low"),) for name in frame.columns if name.endswith("_low")}
    for low, values in intervals.items():
        for value in (one for one in values if one in frame.columns and low in frame.columns):
            rows = frame.select(value, *_ends(low)).rows()
            cells = ["" if row[0] is None else with_interval(*row) for row in rows]
            frame = frame.with_columns(pl.Series(value, cells, pl.String))
    ends = pl.selectors.by_name(*(end for low in intervals for end in _ends(low)), require_all=False)
    frame = frame.select(pl.exclude("name", "exact", "seeds")).select(~ends)
    told = [one.name for one in frame if not {*one} <= {"", None}]
    return frame.select(told).rename(lambda name: name.replace("_", " "))


def _ends(low: str) -> tuple[str, str]:
    """Return the columns of an interval's two ends."""
    return low, f"{low.removesuffix('low')}high"


def downloads(name: str, frame: Callable[[], pl.DataFrame | None]) -> pn.Row:
    """Return buttons that download a table with all its digits, as CSV and as Parquet.

    Args:
        name: of the file.
        frame: returns what is shown, without computing; None while there is nothing.
    """

    def button(kind: str, write: Callable[[pl.DataFrame, io.BytesIO], object]) -> pn.widgets.FileDownload:
        def written() -> io.BytesIO:
            file, found = io.BytesIO(), frame()
            write(pl.DataFrame() if found is None else found, file)
            file.seek(0)
            return file

        return pn.widgets.FileDownload(
            callback=written, filename=f"{name}.{kind}", label=f"Numbers as {kind}", variant="outline",
            width=145,
        )  # fmt: skip

    return pn.Row(button("csv", pl.DataFrame.write_csv), button("parquet", pl.DataFrame.write_parquet))

"""Tables of a view: shown as plain text, one row to choose, and downloads of what is shown."""

import io
from collections.abc import Callable

import pandas as pd
import panel as pn
import polars as pl

_PAGE = 10  # rows
_DIGITS = 4
_LETTER, _WIDE = 8, 260  # pixels of a letter, and of the widest column of texts


def table_of(pick: Callable[[int], None] | None = None, column: str = "row") -> pn.widgets.Tabulator:
    """Make an empty table; :func:`fill` puts rows into it.

    Args:
        pick: is told the value of a column in the row a person clicks.
        column: which column.
    """
    table = pn.widgets.Tabulator(
        pd.DataFrame(), disabled=True, selectable=1, show_index=False, pagination="remote", page_size=_PAGE,
        layout="fit_data_stretch", sizing_mode="stretch_width",
    )  # fmt: skip
    if pick is not None:
        table.on_click(lambda event: pick(int(table.value[column].iloc[event.row])))
    return table


def fill(
    table: pn.widgets.Tabulator, frame: pl.DataFrame, chosen: int | None = None, column: str = "row"
) -> None:
    """Show other rows; numbers are rounded, texts stay texts, and the chosen row is selected."""
    rounded = frame.with_columns(pl.selectors.float().round(_DIGITS))
    # Tables take pandas alone, and its text columns of objects are shown with the plain-text formatter.
    values = pd.DataFrame(rounded.to_dict(as_series=False))
    places = [] if chosen is None else [*rounded.with_row_index("at").filter(pl.col(column) == chosen)["at"]]
    table.formatters = {
        name: {"type": "plaintext"} for name, kind in rounded.schema.items() if kind == pl.String
    }
    longest = {name: rounded[name].str.len_chars().max() or 0 for name in table.formatters}
    # Texts have their width said, else the last column is squeezed into what the others leave.
    table.widths = {
        name: min(_WIDE, 24 + _LETTER * max(len(name), letters)) for name, letters in longest.items()
    }
    table.selection = []
    table.value = values
    table.selection = [int(place) for place in places]
    if places:
        table.page = int(places[0]) // _PAGE + 1


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
            width=155,
        )  # fmt: skip

    return pn.Row(button("csv", pl.DataFrame.write_csv), button("parquet", pl.DataFrame.write_parquet))

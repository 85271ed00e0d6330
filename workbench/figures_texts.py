"""Sentences before and after a condition -> plotly figure."""

import plotly.graph_objects as go
import polars as pl

from workbench.figures import LAYOUT, plain

# Okabe and Ito's palette and, beyond eight values, other shapes in the same colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_SHAPES = ("circle", "diamond", "square", "cross", "x", "triangle-up", "star")
_BLANK = "not said"


def moved_figure(
    frame: pl.DataFrame, attribute: str, titles: tuple[str, str], clicked: int | None
) -> go.Figure:
    """Draw all sentences where the condition puts them, a line from where they were; colours by an attribute.

    Args:
        frame: text, the attribute, and the places x0, y0 (before) and x1, y1 (after).
        attribute: column to colour by.
        titles: of the condition and of the map's axes.
        clicked: row of a sentence to mark, None for none.
    """
    figure = go.Figure()
    figure.add_scatter(
        x=[value for row in frame.select("x0", "x1").iter_rows() for value in (*row, None)],
        y=[value for row in frame.select("y0", "y1").iter_rows() for value in (*row, None)],
        mode="lines", line={"color": "rgba(120,120,120,0.18)", "width": 1}, hoverinfo="skip", name="from",
    )  # fmt: skip
    rows = frame.with_row_index("row").with_columns(pl.col(attribute).cast(pl.String).fill_null(_BLANK))
    for place, value in enumerate(sorted(rows[attribute].unique(), key=lambda one: (one == _BLANK, one))):
        part = rows.filter(pl.col(attribute) == value)
        colour = "#cccccc" if value == _BLANK else _COLOURS[place % len(_COLOURS)]
        shape = _SHAPES[place // len(_COLOURS) % len(_SHAPES)]
        figure.add_scatter(
            x=part["x1"].to_list(), y=part["y1"].to_list(), mode="markers", name=plain(value),
            marker={"color": colour, "symbol": shape, "size": 9, "opacity": 0.9},
            customdata=part["row"].to_list(), text=[plain(text) for text in part["text"]],
            hovertemplate="%{text}<extra>" + plain(value) + "</extra>",
        )  # fmt: skip
    if clicked is not None and clicked < frame.height:
        figure.add_scatter(
            x=[frame["x1"][clicked]], y=[frame["y1"][clicked]], mode="markers", name="chosen",
            marker={"symbol": "circle-open", "size": 18, "color": "#000000"}, hoverinfo="skip",
        )  # fmt: skip
    figure.update_layout(**LAYOUT, title=plain(titles[0]), height=560, transition={"duration": 400})
    for axis, name in ((figure.update_xaxes, "first"), (figure.update_yaxes, "second")):
        axis(title=f"{name} principal axis ({plain(titles[1])})", zeroline=False)
    return figure


def purity_figure(purity: pl.DataFrame, attribute: str) -> go.Figure:
    """Draw which share of the nearest sentences agrees in an attribute, before and after, beside chance.

    Args:
        purity: as :meth:`workbench.session.Moved.purity` returns it.
        attribute: for the title.
    """
    rows = purity.to_dicts()
    figure = go.Figure()
    figure.add_scatter(
        x=[row["value"] for row in rows], y=[row["side"] for row in rows], mode="markers+text",
        text=[f"{row['value']:.3f}" for row in rows], textposition="top center",
        marker={"size": 11, "color": ["#999999", "#0072B2"]}, showlegend=False,
        error_x={"type": "data", "symmetric": False, "array": [row["high"] - row["value"] for row in rows],
                 "arrayminus": [row["value"] - row["low"] for row in rows]},
        hovertext=[f"95 % bootstrap {row['low']:.3f} to {row['high']:.3f}" for row in rows],
    )  # fmt: skip
    figure.add_vline(
        x=rows[0]["floor"], line={"dash": "dot", "color": "#D55E00"}, annotation_text="at random"
    )
    figure.update_layout(**{**LAYOUT, "margin": {"l": 60, "r": 20, "t": 40, "b": 60}})
    title = f"share of the ten nearest that agree in {plain(attribute)} ({rows[0]['count']} sentences)"
    figure.update_xaxes(title=title, range=[0, 1])
    figure.update_yaxes(autorange="reversed")
    return figure

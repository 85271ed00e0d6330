"""Sentences before and after a condition -> plotly figure."""

import numpy as np
import plotly.graph_objects as go
import polars as pl

from workbench.figures import LAYOUT, plain

# Okabe and Ito's palette and, beyond eight values, other shapes in the same colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_SHAPES = ("circle", "diamond", "square", "cross", "x", "triangle-up", "star")
_BLANK = "not said"
_MANY = 4000  # sentences beyond which the graphics card draws, without paths and animation


def moved_figure(
    frame: pl.DataFrame, attribute: str, titles: tuple[str, str], clicked: int | None
) -> go.Figure:
    """Draw all sentences where the condition puts them, a line from where they were; colours by an attribute.

    Args:
        frame: text, the attribute, and the places x0, y0 (before) and x1, y1 (after).
        attribute: column to colour by; empty for one colour.
        titles: of the condition and of the map's axes.
        clicked: row of a sentence to mark, None for none.
    """
    many, gap = frame.height > _MANY, np.full(frame.height, np.nan)
    figure = go.Figure()
    figure.add_scatter(
        x=[] if many else np.column_stack([frame["x0"], frame["x1"], gap]).ravel(),
        y=[] if many else np.column_stack([frame["y0"], frame["y1"], gap]).ravel(),
        mode="lines", line={"color": "rgba(120,120,120,0.18)", "width": 1}, hoverinfo="skip", name="from",
        showlegend=not many,
    )  # fmt: skip
    value_of = pl.col(attribute).cast(pl.String).fill_null(_BLANK) if attribute else pl.lit("sentences")
    rows = frame.select("text", "x1", "y1", value=value_of).with_row_index("row")
    add = figure.add_scattergl if many else figure.add_scatter
    for place, value in enumerate(sorted(rows["value"].unique(), key=lambda one: (one == _BLANK, one))):
        part = rows.filter(pl.col("value") == value)
        colour = "#cccccc" if value == _BLANK else _COLOURS[place % len(_COLOURS)]
        shape = _SHAPES[place // len(_COLOURS) % len(_SHAPES)]
        add(
            x=part["x1"].to_numpy(), y=part["y1"].to_numpy(), mode="markers", name=plain(value),
            marker={"color": colour, "symbol": shape, "size": 5 if many else 9, "opacity": 0.9},
            customdata=part["row"].to_numpy(), text=[plain(text) for text in part["text"]],
            hovertemplate="%{text}<extra>" + plain(value) + "</extra>",
        )  # fmt: skip
    if clicked is not None and clicked < frame.height:
        figure.add_scatter(
            x=[frame["x1"][clicked]], y=[frame["y1"][clicked]], mode="markers", name="chosen",
            marker={"symbol": "circle-open", "size": 18, "color": "#000000"}, hoverinfo="skip",
        )  # fmt: skip
    figure.update_layout(**LAYOUT, title=plain(titles[0]), height=560)
    if not many:
        figure.update_layout(transition={"duration": 400})
    for axis, name in ((figure.update_xaxes, "first"), (figure.update_yaxes, "second")):
        axis(title=f"{name} principal axis ({plain(titles[1])})", zeroline=False)
    return figure


def purity_figure(
    purity: pl.DataFrame, attribute: str, what: str = "share of the ten nearest that agree"
) -> go.Figure:
    """Draw how far neighbours or clusters agree in an attribute, before and after, beside chance.

    Args:
        purity: as :meth:`workbench.moved.Moved.purity` or ``clusters`` returns it.
        attribute: for the title.
        what: was measured.
    """
    rows = purity.to_dicts()
    figure = go.Figure()
    figure.add_scatter(
        x=[row["floor"] for row in rows], y=[row["side"] for row in rows], mode="markers", name="at random",
        marker={"symbol": "line-ns", "size": 22, "line": {"color": "#D55E00", "width": 2}},
        hovertemplate="at random %{x:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[row["value"] for row in rows], y=[row["side"] for row in rows], mode="markers+text",
        text=[f"{row['value']:.3f}" for row in rows], textposition="top center",
        name="measured, 95 % bootstrap", marker={"size": 11, "color": ["#999999", "#0072B2"]},
        error_x={"type": "data", "symmetric": False, "array": [row["high"] - row["value"] for row in rows],
                 "arrayminus": [row["value"] - row["low"] for row in rows]},
        hovertext=[f"95 % bootstrap {row['low']:.3f} to {row['high']:.3f}" for row in rows],
    )  # fmt: skip
    figure.update_layout(**{**LAYOUT, "margin": {"l": 60, "r": 20, "t": 10, "b": 95}}, height=230)
    # Two short lines: a phone cuts a long one.
    title = f"{what}<br>in {plain(attribute)} (0 to 1, ideal 1; {rows[0]['count']:,} sentences)"
    figure.update_xaxes(title=title, range=[0, 1.03], title_font_size=13)
    figure.update_yaxes(range=[1.5, -0.8])
    return figure

"""Sentences before and after a condition -> plotly figure."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import polars as pl

from workbench.figures import LAYOUT, PALETTE, error_bars, plain

# For values that are colours: "white" drawn black would be read wrongly. The palette's where it has them;
# what would vanish on a light or a dark page has a rim.
_OWN_COLOURS = {
    "blue": "#0072B2", "red": "#D55E00", "green": "#009E73", "pink": "#CC79A7", "purple": "#AA4499",
    "orange": "#E69F00", "yellow": "#F0E442", "brown": "#6B4226", "grey": "#999999", "gray": "#999999",
    "black": "#111111", "white": "#FFFFFF",
}  # fmt: skip
_RIM = {"line": {"color": "#777777", "width": 1}}
_RIMMED = ("#111111", "#FFFFFF", "#F0E442")
_SHAPES = ("circle", "diamond", "square", "cross", "x", "triangle-up", "star")
_BLANK = "not said"
_TEMPLATE = pio.templates[LAYOUT["template"]].to_plotly_json()
PURITY_HEIGHT = 230  # pixels
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
    kind = "scattergl" if many else "scatter"
    traces: list[dict[str, Any]] = [{
        "type": "scatter", "mode": "lines", "name": "from", "hoverinfo": "skip", "showlegend": not many,
        "x": [] if many else np.column_stack([frame["x0"], frame["x1"], gap]).ravel(),
        "y": [] if many else np.column_stack([frame["y0"], frame["y1"], gap]).ravel(),
        "line": {"color": "rgba(120,120,120,0.18)", "width": 1},
    }]  # fmt: skip
    x, y = frame["x1"].to_numpy(), frame["y1"].to_numpy()
    # All at once; no text holds the character between them, which normalising refuses.
    texts = np.array(plain("\0".join(frame["text"])).split("\0"), object)
    known = frame[attribute].cast(pl.String).fill_null(_BLANK) if attribute else ["sentences"] * frame.height
    values = np.array(known, object)
    found = sorted(set(values), key=lambda one: (one == _BLANK, one))
    for value, look in zip(found, _looks(found), strict=True):
        rows = np.flatnonzero(values == value).astype(np.uint32)
        traces.append({
            "type": kind, "mode": "markers", "name": plain(value), "x": x[rows], "y": y[rows],
            "marker": {**look, "size": 5 if many else 9, "opacity": 0.9},
            "customdata": rows, "text": texts[rows],
            "hovertemplate": "%{text}<extra>" + plain(value) + "</extra>",
        })  # fmt: skip
    if clicked is not None and clicked < frame.height:
        traces.append({
            "type": "scatter", "mode": "markers", "name": "chosen", "hoverinfo": "skip",
            "x": [x[clicked]], "y": [y[clicked]],
            "marker": {"symbol": "circle-open", "size": 18, "color": "#000000"},
        })  # fmt: skip
    layout: dict[str, Any] = {
        **LAYOUT,
        "template": _TEMPLATE,
        "title": {"text": plain(titles[0])},
        "margin": {**LAYOUT["margin"], "l": 70, "b": 110},
        "height": 560,
    }
    if not many:
        layout["transition"] = {"duration": 400}
    for axis, name in (("xaxis", "first"), ("yaxis", "second")):
        title = {"text": f"{name} principal axis ({plain(titles[1])})"}
        # Of fixed room: measuring labels would have the browser lay out all points before it draws them.
        layout[axis] = {"title": title, "zeroline": False, "automargin": False, "ticklabeloverflow": "allow"}
    # At once and unchecked: plotly copies all it checks, texts one by one, at every change of a condition.
    return go.Figure(traces, layout, _validate=False)


def _looks(values: list[str]) -> list[dict[str, Any]]:
    """Return colour and shape of each value's markers; beyond eight values, shapes change too."""
    names = [value.casefold() for value in values]
    told = [name for name in names if name != _BLANK]
    own = 2 * sum(name in _OWN_COLOURS for name in told) > len(told)  # colours; a few may have none here
    looks: list[dict[str, Any]] = []
    for place, name in enumerate(names):
        if name == _BLANK:
            looks.append({"color": "#cccccc", "symbol": "circle"})
        elif own and name in _OWN_COLOURS:
            colour = _OWN_COLOURS[name]
            looks.append({"color": colour, "symbol": "circle", **(_RIM if colour in _RIMMED else {})})
        else:  # among colours in another shape: their own are taken
            shape = _SHAPES[max(place // len(PALETTE), int(own)) % len(_SHAPES)]
            looks.append({"color": PALETTE[place % len(PALETTE)], "symbol": shape})
    return looks


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
        error_x=error_bars(purity["value"], purity["low"], purity["high"]),
        hovertext=[f"95 % bootstrap {row['low']:.3f} to {row['high']:.3f}" for row in rows],
    )  # fmt: skip
    figure.update_layout(**{**LAYOUT, "margin": {"l": 60, "r": 20, "t": 10, "b": 95}}, height=PURITY_HEIGHT)
    # Two short lines: a phone cuts a long one.
    title = f"{what}<br>in {plain(attribute)} (0 to 1, ideal 1; {rows[0]['count']:,} sentences)"
    figure.update_xaxes(title=title, range=[0, 1.03], title_font_size=13)
    figure.update_yaxes(range=[1.5, -0.8])
    return figure

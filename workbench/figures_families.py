"""Curves and pictures that the families keep -> plotly figures."""

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench.figures import LAYOUT, PALETTE, plain

_DASHES = ("solid", "dash", "dot")
_TRUE = "_true"  # ends the name of the curve that holds what a picture should be


def curves_figure(scores: pl.DataFrame, curve: str, title: str, axes: tuple[str, str]) -> go.Figure:
    """Draw one curve of every model that kept it: the mean over seeds, and the range of the seeds behind it.

    Args:
        scores: as a family's run holds them: model, seed, curve, x, y.
        curve: its name.
        title: of the figure.
        axes: titles of both axes, with units.
    """
    part, figure = scores.filter(curve=curve), go.Figure()
    for place, model in enumerate(part["model"].unique(maintain_order=True)):
        rows = part.filter(model=model).group_by("x").agg(
            pl.col("y").mean().alias("mean"), pl.col("y").min().alias("low"), pl.col("y").max().alias("high")
        ).sort("x")  # fmt: skip
        colour = PALETTE[place % len(PALETTE)]
        figure.add_scatter(
            x=[*rows["x"], *rows["x"].reverse()], y=[*rows["high"], *rows["low"].reverse()], fill="toself",
            fillcolor=colour, opacity=0.15, line={"width": 0}, hoverinfo="skip", showlegend=False,
        )  # fmt: skip
        dash = _DASHES[place // len(PALETTE) % len(_DASHES)]
        figure.add_scatter(
            x=rows["x"], y=rows["mean"], name=plain(model), mode="lines+markers",
            line={"color": colour, "dash": dash},
        )  # fmt: skip
    figure.update_layout(**LAYOUT, title=plain(title), height=420)
    figure.update_xaxes(title=axes[0])
    figure.update_yaxes(title=axes[1])
    return figure


def pictures_figure(scores: pl.DataFrame, models: Sequence[str], title: str, count: int = 4) -> go.Figure:
    """Draw pictures as they should be and as some models make them, first seed.

    Args:
        scores: as a family's run holds them; a picture is a curve ``name`` whose y are its cells, row by row,
            and ``name_true`` what it should be.
        models: one row of pictures each, below the true ones.
        title: of the figure.
        count: pictures in a row.
    """
    kept = scores.filter(pl.col("curve").str.ends_with(_TRUE), seed=scores["seed"].min())
    names = [name.removesuffix(_TRUE) for name in kept["curve"].unique(maintain_order=True).to_list()[:count]]
    shown = [model for model in models if model in kept["model"]]
    labels = ["true", *shown]
    figure = make_subplots(
        len(labels), len(names), row_titles=[plain(label) for label in labels], horizontal_spacing=0.02,
        vertical_spacing=0.02,
    )  # fmt: skip
    for row, label in enumerate(labels):
        for column, name in enumerate(names):
            model, curve = (shown[0], name + _TRUE) if row == 0 else (label, name)
            cells = scores.filter(model=model, curve=curve, seed=scores["seed"].min()).sort("x")["y"]
            side = math.isqrt(len(cells))
            cells = np.flipud(cells.to_numpy()[: side * side].reshape(side, side))
            figure.add_heatmap(z=cells, colorscale="Greys", zmin=0, zmax=1, showscale=False,
                               row=row + 1, col=column + 1)  # fmt: skip
    figure.update_layout(**LAYOUT, title=plain(title), height=80 + 150 * len(labels))
    figure.update_xaxes(visible=False, constrain="domain")
    # Each to its own x: held to the first one, all other pictures are stretched.
    figure.for_each_yaxis(
        lambda axis: axis.update(visible=False, scaleanchor=axis.anchor, constrain="domain")
    )
    return figure

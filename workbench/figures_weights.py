"""Generated weights -> plotly figure: matrices, spectra, distances with their tree, what is kept."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import polars as pl
from torch import Tensor

from workbench.figures import AMOUNTS, LAYOUT, PALETTE, SIGNED, plain
from workbench.geometry.matrices import block_means, tree_of
from workbench.geometry.rank import spectrum_rank

_LABEL = 24  # letters of a name on an axis; the hover says it in full
_CUT = 99.0  # percentile at which the colours end: a few large values would hide all others


def short_names(names: Sequence[str], most: int = _LABEL) -> list[str]:
    """Shorten names for an axis; places on it are numbers, so that two equal short names stay two."""
    return [plain(name if len(name) <= most else f"{name[: most - 3]}...") for name in names]


def weight_figure(matrix: Tensor, title: str, most: int = 96) -> go.Figure:
    """Draw a matrix around zero; a large one as the means of blocks, and the axes say so.

    Args:
        matrix: rows are read, columns are written.
        title: whose it is.
        most: rows and columns drawn.
    """
    values, tall, wide = block_means(matrix, most)
    limit = float(np.percentile(np.abs(values), _CUT)) or float(np.abs(values).max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values.astype(np.float32), x0=0, dx=wide, y0=0, dy=tall, zmin=-limit, zmax=limit, zmid=0,
            colorscale=SIGNED, colorbar={"thickness": 12, "title": "weight", "tickformat": "~g"},
            hovertemplate="in %{y}, out %{x}: %{z:.4f}<extra></extra>",
        )
    )  # fmt: skip
    shrunk = f"; means of {tall} x {wide}" if tall * wide > 1 else ""
    shape = " x ".join(str(size) for size in matrix.shape)
    figure.update_layout(
        **{**LAYOUT, "margin": {"l": 10, "r": 10, "t": 70, "b": 50}},
        title=f"{plain(_cut(title, 60))}<br><sub>{shape}{shrunk}; colours to the 99th percentile</sub>",
        height=250 if values.shape[0] == 1 else 440,
    )  # fmt: skip
    figure.update_xaxes(title="direction written (number)")
    figure.update_yaxes(title="direction read (number)", autorange="reversed")
    if values.shape[0] == 1:
        figure.update_yaxes(visible=False)
    return figure


def spectrum_figure(spectra: dict[str, np.ndarray]) -> go.Figure:
    """Draw singular values from largest to smallest, each name with its effective rank.

    Args:
        spectra: by name.
    """
    figure = go.Figure()
    for place, (name, values) in enumerate(spectra.items()):
        label = f"{plain(_cut(name, 40))}: effective rank {spectrum_rank(values):.1f} of {len(values)}"
        some = values > 1e-9 * values.max()
        figure.add_scatter(
            x=np.arange(1, len(values) + 1)[some], y=values[some], name=label, mode="lines+markers",
            line={"color": PALETTE[place % 3], "dash": ("solid", "dash", "dot")[place % 3]},
            marker={"size": 4}, hovertemplate="number %{x}: %{y:.4g}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(**LAYOUT, title="Singular values, as the matrix acts", height=400, showlegend=True)
    figure.update_xaxes(title="number, from the largest")
    figure.update_yaxes(title="singular value (log scale)", type="log", exponentformat="power")
    return figure


def distances_figure(names: Sequence[str], distances: np.ndarray, title: str) -> go.Figure:
    """Draw the distances between all names, those that lie near each other side by side.

    Args:
        names: two or more.
        distances: symmetric, 0 on the diagonal.
        title: what they are, with the range.
    """
    order, labels = tree_of(distances).order, short_names(names)
    values, places = distances[np.ix_(order, order)], [*range(len(order))]
    told = [plain(_cut(names[place], 80)) for place in order]
    figure = go.Figure(
        go.Heatmap(
            z=values, x=places, y=places, zmin=0, colorscale=AMOUNTS,
            colorbar={"thickness": 12, "title": "distance", "tickformat": "~g"},
            text=[[f"{one}<br>{other}" for other in told] for one in told],
            hovertemplate="%{text}<br>distance %{z:.4g}<extra></extra>",
        )
    )  # fmt: skip
    ticks = [labels[place] for place in order]
    figure.update_layout(
        **{**LAYOUT, "margin": {"l": 10, "r": 10, "t": 70, "b": 40}}, height=200 + 18 * len(names),
        title=f"Distances between weights<br><sub>{plain(title)}</sub>",
    )  # fmt: skip
    # The names once: on a phone they would stand on each other along the bottom.
    figure.update_xaxes(title="the same, in the same order", showticklabels=False, showgrid=False)
    figure.update_yaxes(tickvals=places, ticktext=ticks, autorange="reversed", showgrid=False)
    return figure


def tree_figure(names: Sequence[str], distances: np.ndarray, typed: int, title: str) -> go.Figure:
    """Draw the distances as a tree: what joins further left is more alike.

    Args:
        names: two or more; the first ``typed`` were typed and are set in bold.
        distances: symmetric, 0 on the diagonal.
        typed: how many.
        title: what the distances are.
    """
    tree, labels = tree_of(distances), short_names(names)
    figure = go.Figure()
    figure.add_scatter(
        x=[value for row in tree.heights for value in (*row, None)],
        y=[value for row in tree.across for value in (*row, None)],
        mode="lines", line={"color": PALETTE[0], "width": 2}, showlegend=False,
        hovertemplate="joined at %{x:.4g}<extra></extra>",
    )  # fmt: skip
    ticks = [f"<b>{labels[place]}</b>" if place < typed else labels[place] for place in tree.order]
    figure.update_layout(
        **{**LAYOUT, "margin": {"l": 10, "r": 10, "t": 70, "b": 50}}, height=220 + 22 * len(names),
        title=f"The same as a tree{'; bold: typed' if typed else ''}<br><sub>{plain(title)}</sub>",
    )  # fmt: skip
    figure.update_xaxes(title="mean distance of two sides", rangemode="tozero")
    figure.update_yaxes(
        tickvals=[*range(len(names))], ticktext=ticks, range=[len(names) - 0.5, -0.5], showgrid=False
    )
    return figure


def directions_figure(kept: pl.DataFrame, name: str) -> go.Figure:
    """Draw how the variance of the sentences spreads over the matrix's directions, before and after.

    Args:
        kept: as :func:`workbench.geometry.matrices.kept_directions` gives it.
        name: of the condition.
    """
    figure = go.Figure()
    for column, label, colour, dash in (
        ("before", "before", "#888888", "dash"), ("after", "after", PALETTE[0], "solid"),
    ):  # fmt: skip
        figure.add_scatter(
            x=kept["direction"], y=kept[column].cum_sum(), name=label, mode="lines",
            line={"color": colour, "dash": dash, "width": 3},
            customdata=kept.select(column, "singular_value").to_numpy(),
            hovertemplate="the first %{x}: %{y:.1%}<br>number %{x} alone: %{customdata[0]:.2%}, "
            "singular value %{customdata[1]:.3g}<extra>" + label + "</extra>",
        )  # fmt: skip
    removed = max(0.0, 1 - float(kept["before"].sum())) if kept.height else 1.0
    figure.update_layout(
        **{**LAYOUT, "margin": {**LAYOUT["margin"], "t": 80}}, height=420,
        title="Directions that are kept<br>"
        f"<sub>{plain(_cut(name, 40))}: {removed:.0%} of the variance goes to zero</sub>",
    )  # fmt: skip
    figure.update_xaxes(title="directions, by singular value (number)", rangemode="tozero")
    figure.update_yaxes(title="variance so far (share, 0 to 1)", range=[0, 1.02])
    return figure


def attributes_figure(shares: pl.DataFrame, name: str) -> go.Figure:
    """Draw for every attribute how much of what sentences differ in it is, before and after a condition.

    Args:
        shares: as :func:`workbench.generated.attribute_shares` gives them.
        name: of the condition.
    """
    rows, places = shares.to_dicts(), [*range(shares.height)]
    figure = go.Figure()
    figure.add_scatter(
        x=[value for row in rows for value in (row["before"], row["after"], None)],
        y=[value for place in places for value in (place, place, None)],
        mode="lines", line={"color": "#888888", "width": 2}, hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    for column, label, colour, symbol in (
        ("before", "before", "#888888", "circle"), ("after", "after", PALETTE[0], "diamond"),
        ("floor", "dealt at random", PALETTE[1], "line-ns-open"),
    ):  # fmt: skip
        figure.add_scatter(
            x=shares[column], y=places, name=label, mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2}},
            customdata=shares["count"],
            hovertemplate="%{x:.3f} of %{customdata} sentences<extra>" + label + "</extra>",
        )  # fmt: skip
    figure.update_layout(
        **{**LAYOUT, "margin": {**LAYOUT["margin"], "t": 80}}, height=220 + 24 * len(rows),
        title=f"Attributes that are kept<br><sub>{plain(_cut(name, 50))}</sub>",
    )  # fmt: skip
    figure.update_xaxes(title="share of the variance (0 to 1)", rangemode="tozero")
    figure.update_yaxes(
        tickvals=places, ticktext=[plain(row["attribute"]) for row in rows], range=[len(rows) - 0.5, -0.5]
    )
    return figure


def nearest_figure(nearest: pl.DataFrame, name: str, most: int = 10) -> go.Figure:
    """Draw the distances of the nearest known names from one.

    Args:
        nearest: as :meth:`workbench.generated.Inspected.nearest` gives them.
        name: what they are near to.
        most: names drawn.
    """
    rows = nearest.head(most)
    places = [*range(rows.height)]
    figure = go.Figure(
        go.Bar(
            x=rows["distance"], y=places, orientation="h", marker={"color": PALETTE[0]},
            text=[f"{value:.3g}" for value in rows["distance"]],
            hovertext=[plain(_cut(text, 120)) for text in rows["name"]], hoverinfo="text+x",
        )
    )  # fmt: skip
    figure.update_layout(
        **{**LAYOUT, "margin": {"l": 10, "r": 20, "t": 70, "b": 50}}, height=170 + 24 * rows.height,
        title=f"Nearest weights<br><sub>to {plain(_cut(name, 50))}</sub>",
    )  # fmt: skip
    figure.update_xaxes(title="distance", rangemode="tozero")
    figure.update_yaxes(tickvals=places, ticktext=short_names(rows["name"].to_list()), autorange="reversed")
    return figure


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."

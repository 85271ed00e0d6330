"""Figures of image-text models: pictures in a grid, norms by layer, class sets beside each other.

Pictures are one raster image; every word is plotly text, escaped, so that nothing written in data can act.

Shape letters: N pictures, S side in pixels.
"""

import base64
import textwrap
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import plotly.graph_objects as go
import polars as pl
from jaxtyping import UInt8
from PIL import Image
from plotly.subplots import make_subplots
from torch import Tensor

from workbench.figures import LAYOUT, PALETTE, plain

RIGHT, WRONG = "#0072B2", "#D55E00"  # frames; a mark in the caption says the same without colour
_SIDE, _CELL, _LINE, _HEADING, _FRAME = 112, 146, 15, 28, 4  # pixels on the page


def picture_grid(
    pixels: UInt8[Tensor, "N 3 S S"],
    captions: Sequence[str],
    *,
    columns: int = 5,
    right: Sequence[bool] | None = None,
    headings: Sequence[str] | None = None,
    title: str = "",
) -> go.Figure:
    """Lay pictures out in rows with a caption below each.

    Args:
        pixels: RGB, 0 to 255.
        captions: one per picture; line breaks are kept, long lines wrapped, and eight lines shown at most.
        columns: pictures in a row.
        right: whether each was classified right: a blue frame, else an orange one; None for no frames.
        headings: of each picture's group; a new one starts a new row below it.
        title: of the figure.
    """
    told = [_wrapped(caption) for caption in captions]
    rows: list[list[int]] = []
    for index in range(len(captions)):
        fresh = headings is not None and (index == 0 or headings[index] != headings[index - 1])
        if not rows or fresh or len(rows[-1]) == columns:
            rows.append([])
        rows[-1].append(index)
    places, row_heads, top = [], [], 0
    for row in rows:
        if headings is not None and (row[0] == 0 or headings[row[0]] != headings[row[0] - 1]):
            row_heads.append((top, headings[row[0]]))
            top += _HEADING
        places += [(column * _CELL, top) for column in range(len(row))]
        top += _SIDE + 12 + _LINE * max(len(told[index]) for index in row)
    width, height = columns * _CELL, max(top, 1)
    figure = go.Figure()
    figure.add_image(source=_raster(pixels, places, width, height, right), hoverinfo="skip")
    for (left, above), lines in zip(places, told, strict=True):
        figure.add_annotation(
            x=left, y=above + _SIDE + 4, text="<br>".join(map(plain, lines)), showarrow=False, align="left",
            xanchor="left", yanchor="top", font={"size": 11}, yshift=2,
        )  # fmt: skip
    for above, text in row_heads:
        figure.add_annotation(
            x=0, y=above + 2, text=f"<b>{plain(text)}</b>", showarrow=False, xanchor="left", yanchor="top"
        )
    figure.update_layout(
        template="plotly_white", title=plain(title), width=width + 20, height=height + (56 if title else 16),
        margin={"l": 10, "r": 10, "t": 46 if title else 6, "b": 10}, font={"size": 13},
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[0, width], fixedrange=True)
    figure.update_yaxes(
        visible=False, range=[height, 0], fixedrange=True, scaleanchor="x", constrain="domain"
    )
    return figure


def _wrapped(caption: str) -> list[str]:
    """Break a caption into at most eight lines that fit below a picture."""
    lines = [part for line in caption.split("\n") for part in textwrap.wrap(line, 24) or [""]]
    return lines if len(lines) <= 8 else [*lines[:7], f"{lines[7][:22]} …"]


def _raster(
    pixels: Tensor, places: list[tuple[int, int]], width: int, height: int, right: Sequence[bool] | None
) -> str:
    """Paste pictures, framed, on white, as a PNG in a data address."""
    sheet = Image.new("RGB", (width, height), "white")
    for row, (left, above) in enumerate(places):
        one = Image.fromarray(np.ascontiguousarray(pixels[row].permute(1, 2, 0).cpu().numpy()))
        inner = _SIDE - 2 * _FRAME if right is not None else _SIDE
        if right is not None:
            sheet.paste(RIGHT if right[row] else WRONG, (left, above, left + _SIDE, above + _SIDE))
        # Small pictures keep their pixels: what the model sees is what is shown.
        how = Image.Resampling.NEAREST if one.width < inner else Image.Resampling.LANCZOS
        offset = (_SIDE - inner) // 2
        sheet.paste(one.resize((inner, inner), how), (left + offset, above + offset))
    raw = BytesIO()
    sheet.save(raw, "PNG")
    return "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()


def layer_changes_figure(changes: pl.DataFrame) -> go.Figure:
    """Draw by layer how far class sets move scales and shifts on average over channels.

    Args:
        changes: of a few class sets, as :func:`workbench.inspection.layer_changes` gives them.
    """
    parts = changes["part"].unique(maintain_order=True).to_list()
    layers = _short(changes)
    figure = make_subplots(rows=len(parts), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for place, name in enumerate(changes["set"].unique(maintain_order=True)):
        for row, part in enumerate(parts, start=1):
            own = changes.filter(set=name, part=part)
            figure.add_scatter(
                x=[layers[layer] for layer in own["layer"]], y=own["mean_absolute"], name=plain(name),
                legendgroup=name, showlegend=row == 1, mode="lines+markers",
                marker={"color": PALETTE[place % len(PALETTE)], "size": 7},
                hovertemplate="%{x}: %{y:.4f}", row=row, col=1,
            )  # fmt: skip
    for row, part in enumerate(parts, start=1):
        figure.update_yaxes(title=f"mean |change|, {part}", rangemode="tozero", row=row)
    figure.update_xaxes(tickangle=-45)
    figure.update_xaxes(title="norm layer, from the image on", row=len(parts))
    figure.update_layout(
        **{**LAYOUT, "margin": {**LAYOUT["margin"], "b": 150}},
        title="How far each layer's norms are moved", height=270 + 190 * len(parts),
    )  # fmt: skip
    return figure


def scale_changes_figure(changes: pl.DataFrame) -> go.Figure:
    """Draw the mean change of the first generated part by layer and class set, and what sets differ in.

    Above, the change from each layer's own value; below, what is left when the mean over class sets is taken
    away. Both maps are centred on zero, each with limits of its own.

    Args:
        changes: of some class sets, as :func:`workbench.inspection.layer_changes` gives them.
    """
    part = changes["part"][0]
    rows, layers = changes.filter(part=part), _short(changes)
    names = rows["set"].unique(maintain_order=True).to_list()
    values = rows["mean"].to_numpy().reshape(len(names), -1)
    panels = {f"change of the {part}": values, "minus the mean over class sets": values - values.mean(0)}
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, subplot_titles=list(panels)
    )
    for row, found in enumerate(panels.values(), start=1):
        limit = float(np.abs(found).max()) or 1.0
        figure.add_heatmap(
            z=found.astype(np.float32), x=list(layers.values()), y=[plain(name) for name in names],
            colorscale="RdBu_r", zmin=-limit, zmax=limit, zmid=0, row=row, col=1,
            colorbar={"len": 0.42, "y": (0.79, 0.21)[row - 1], "thickness": 14, "tickformat": "~g"},
            hovertemplate="%{y}<br>%{x}<br>%{z:+.4f}<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickangle=-45)
    figure.update_xaxes(title="norm layer, from the image on", row=2)
    figure.update_layout(
        **{**LAYOUT, "margin": {**LAYOUT["margin"], "t": 80}},
        title=f"Generated change of the {part}, mean over a layer's channels", height=300 + 36 * len(names),
    )  # fmt: skip
    return figure


def statistics_figure(ratios: dict[str, pl.DataFrame]) -> go.Figure:
    """Draw by layer how a task's own deviations differ from BatchNorm's running ones, channel by channel.

    Args:
        ratios: per class set what :func:`workbench.inspection.statistics_ratios` gives.
    """
    figure = go.Figure()
    for place, (name, rows) in enumerate(ratios.items()):
        layers = _short(rows)
        figure.add_box(
            x=[layers[layer] for layer in rows["layer"]], y=rows["ratio"], name=plain(name),
            marker={"color": PALETTE[place % len(PALETTE)], "size": 3}, line={"width": 1.5},
        )  # fmt: skip
    figure.add_hline(y=1, line_dash="dot", line_color="#555555")
    figure.update_layout(
        **{**LAYOUT, "margin": {**LAYOUT["margin"], "b": 150}},
        title="One task's deviation over the running one, by channel", height=480, boxmode="group",
    )  # fmt: skip
    ticks = [0.01, 0.05, 0.1, 0.2, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 5, 10, 20, 100]
    figure.update_yaxes(title="ratio (log scale; 1: they agree)", type="log", tickvals=ticks)
    figure.update_xaxes(title="norm layer, from the image on", tickangle=-45)
    return figure


def set_distances_figure(names: Sequence[str], distances: Tensor) -> go.Figure:
    """Draw the distance between the generated weights of each two class sets."""
    labels = [plain(name) for name in names]
    figure = go.Figure(
        go.Heatmap(
            z=distances.float().numpy(), x=labels, y=labels, colorscale="Viridis", zmin=0,
            colorbar={"thickness": 14, "tickformat": "~g"},
            hovertemplate="%{y}<br>%{x}<br>%{z:.4f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(
        template="plotly_white", font={"size": 13},
        title="Euclidean distance between all generated numbers",
        height=240 + 24 * len(names),
        margin={"l": 10, "r": 20, "t": 60, "b": 10},
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickangle=-45)
    return figure


def random_gaps_figure(gaps: pl.DataFrame, column: str) -> go.Figure:
    """Draw each model's gap between groups beside what groups drawn at random have.

    Args:
        gaps: as :func:`workbench.groups.random_gaps` gives them.
        column: what groups are.
    """
    figure = go.Figure()
    figure.add_bar(
        y=gaps["model"], x=gaps["random_high"], orientation="h", name="random groups: 95 % lie below",
        marker_color="#DDDDDD", hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        y=gaps["model"], x=gaps["gap"], mode="markers", name="the gap",
        marker={"color": "#D55E00", "size": 11}, hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        **LAYOUT, title=f"Gap between groups by {plain(column.replace('_', ' '))}, and by nothing",
        height=210 + 34 * gaps.height,
    )  # fmt: skip
    figure.update_xaxes(title="best minus worst judged group's top-1 (0 to 1, ideal 0)", rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    return figure


def counts_figure(counts: pl.DataFrame, rows: str, columns: str, title: str) -> go.Figure:
    """Draw how many there are of each of two columns' values together, every number written out.

    Args:
        counts: one row per pair of values, with the columns named below and ``count``.
        rows: name of the column drawn from top to bottom.
        columns: name of the column drawn from left to right.
        title: of the figure.
    """
    down, across = (counts[name].unique(maintain_order=True).to_list() for name in (rows, columns))
    found = {(row[rows], row[columns]): row["count"] for row in counts.to_dicts()}
    grid = [[found.get((one, other), 0) for other in across] for one in down]
    shade = np.log10(np.maximum(np.array(grid, dtype=np.float32), 1))
    figure = go.Figure(
        go.Heatmap(
            z=shade, text=[[f"{number:,}" for number in line] for line in grid], texttemplate="%{text}",
            x=[plain(str(one)) for one in across], y=[plain(str(one)) for one in down], colorscale="Blues",
            showscale=False, hovertemplate="%{y}, %{x}: %{text}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(
        template="plotly_white", font={"size": 13}, title=plain(title), height=170 + 44 * len(down),
        margin={"l": 10, "r": 20, "t": 60, "b": 10},
    )  # fmt: skip
    figure.update_xaxes(title=columns.replace("_", " "), side="bottom")
    figure.update_yaxes(title=rows.replace("_", " "), autorange="reversed")
    return figure


def _short(rows: pl.DataFrame) -> dict[str, str]:
    """Name layers without what all their paths begin with; escaped."""
    layers = rows["layer"].unique(maintain_order=True).to_list()
    parts = [layer.split(".") for layer in layers]
    shared = 0
    while len(parts) > 1 and all(len(one) > shared + 1 and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    return {layer: plain(".".join(one[shared:])) for layer, one in zip(layers, parts, strict=True)}

"""Figures of a zoo of encoders: pairs, cost against quality, scale, agreement with the full grid.

Every way to connect a zoo has the colour of its family (:func:`workbench.figures.family`) and within it a
symbol or a dash of its own. Names of encoders come from data: they are escaped, shown and never act.
"""

import math
import textwrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench.figures import (
    AMOUNTS,
    CHANGES,
    FAMILY_COLOURS,
    LAYOUT,
    METRIC_TITLES,
    error_bars,
    family,
    plain,
)
from workbench.tables import with_interval
from workbench.zoo_scores import (
    MAIN,
    best_of_groups,
    cost_of_way,
    metric_row,
    pair_axes,
    pair_means,
    scale_curve,
)

_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_PLACES = ("middle right", "top center", "bottom center", "middle left")
_ROOM = 0.16  # beside the outermost points, as a share of their distance
_SUBTITLE, _PANEL = 52, 16  # letters of a line below a title, and of a panel's title, on a phone
_PHONE = 250.0  # pixels that the cost figure is wide on a phone
_SHORT = "recall at 10 (0 to 1, ideal 1)"


def _lines(text: str, letters: int) -> str:
    """Break a text into lines short enough for a phone; it shows as it is."""
    return "<br>".join(plain(line) for line in textwrap.wrap(text, letters))


def _head(title: str, told: str, panels: int = 0, below: int = 100) -> dict[str, Any]:
    """Return a layout with a title and what is told below it, which grows downwards.

    Args:
        title: short enough for a phone.
        told: of any length.
        panels: lines of the panels' titles.
        below: margin at the bottom.
    """
    under = _lines(told, _SUBTITLE)
    top = 66 + 22 * under.count("<br>") + 16 * panels
    text = {"text": f"{title}<br><sub>{under}</sub>", "yref": "container", "y": 1, "yanchor": "top",
            "pad": {"t": 14}}  # fmt: skip
    return {**LAYOUT, "title": text, "margin": {**LAYOUT["margin"], "t": top, "b": below}}


def _styles(models: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Give each way its family, colour, symbol and dash."""
    used: dict[str, int] = {}
    found = {}
    for model in models:
        kind = family(model)
        place = used.setdefault(kind, 0)
        used[kind] += 1
        found[model["name"]] = {
            "family": kind,
            "colour": FAMILY_COLOURS[kind],
            "symbol": _SYMBOLS[place % len(_SYMBOLS)],
            "dash": _DASHES[place % len(_DASHES)],
        }
    return found


def pair_matrix_figure(
    scores: pl.DataFrame, model: str, reference: str, chosen: tuple[str, str] | None = None
) -> go.Figure:
    """Draw R@10 of every pair by one way, the best pair framed, and beside it what the reference lacks.

    Image encoders stand in the reference's order, best on top, so that one way's map can be laid over
    another's; controls stand apart below. A pair that a way was not tried on stays empty.

    Args:
        scores: of a run.
        model: the way.
        reference: differences are taken to it; the same name leaves them out.
        chosen: text and image encoder of a pair to mark; None for none.
    """
    means = pair_means(scores)
    own = {(row["text"], row["image"]): row for row in means.filter(model=model).to_dicts()}
    other = {(row["text"], row["image"]): row["value"] for row in means.filter(model=reference).to_dicts()}
    texts, images, controls = pair_axes(scores, reference)
    rows = [*images, *([None, *controls] if controls else [])]
    values = np.full((len(rows), len(texts)), np.nan)
    change = values.copy()
    for row, image in enumerate(rows):
        for column, text in enumerate(texts):
            if (text, image) in own:
                values[row, column] = own[text, image]["value"]
                change[row, column] = values[row, column] - other.get((text, image), np.nan)
    panels = [("R@10", values)]
    if model != reference and np.isfinite(change).any():
        panels.append((f"minus {reference}", change))
    figure = make_subplots(
        rows=1, cols=len(panels), shared_yaxes=True, horizontal_spacing=0.04,
        subplot_titles=[plain(name) for name, _ in panels],
    )  # fmt: skip
    labels = [plain(image or "") for image in rows]
    for column, (_, table) in enumerate(panels, start=1):
        _add_map(figure, table, ([plain(text) for text in texts], labels), len(images), column)
    best = np.unravel_index(np.nanargmax(values[: len(images)]), (len(images), len(texts)))
    row, column = (int(place) for place in best)
    _frame(figure, row, column, 1, {"color": "#D55E00", "width": 4})
    if chosen is not None and chosen[0] in texts and chosen[1] in rows:
        for panel in range(1, len(panels) + 1):
            here = rows.index(chosen[1]), texts.index(chosen[0])
            _frame(figure, *here, panel, {"color": "#000000", "width": 2, "dash": "dot"})
    told = f"best pair (framed): {texts[column]} and {rows[row]}, {values[row, column]:.3f}"
    head = _head(f"{plain(model)}: test R@10 of every pair", told, 1, 70)
    figure.update_layout(**head, height=220 + 26 * len(rows))
    figure.update_yaxes(
        tickvals=[*range(len(rows))], ticktext=labels, range=[len(rows) - 0.5, -0.5],
        showgrid=False, zeroline=False,
    )  # fmt: skip
    figure.update_yaxes(title="image encoder; controls below the gap" if controls else "image encoder", col=1)
    # Upright names: on a phone plotly would turn them by another angle in each panel.
    figure.update_xaxes(
        title="text<br>encoder", tickvals=[*range(len(texts))], ticktext=[plain(text) for text in texts],
        tickangle=-90, showgrid=False, zeroline=False,
    )  # fmt: skip
    if len(panels) == 1:
        figure.update_xaxes(domain=[0, 0.48])  # as wide as beside differences
        figure.layout.annotations[0].x = 0.24
    return figure


def _frame(figure: go.Figure, row: int, column: int, panel: int, line: dict[str, Any]) -> None:
    """Draw a line around a cell."""
    corners = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
    figure.add_shape(type="rect", **corners, line=line, row=1, col=panel)


def _add_map(
    figure: go.Figure, table: np.ndarray, names: tuple[list[str], list[str]], real: int, col: int
) -> None:
    """Add one map; the first shows values, a second one differences around zero.

    The first ``real`` rows set the limits of the colours: a control that has read the captions would leave
    one colour for all others.
    """
    signed = col > 1
    known = np.isfinite(table)
    written = [[f"{cell:+.2f}" if signed else f"{cell:.2f}" for cell in line] for line in table]
    limit = float(np.nanmax(np.abs(table[:real]))) or 1.0
    how: dict[str, Any] = {"colorscale": AMOUNTS, "zmin": 0, "zmax": limit}
    if signed:
        how = {"colorscale": CHANGES, "zmin": -limit, "zmax": limit, "zmid": 0}
    texts, images = names
    told = [[f"{text}, {image}" for text in texts] for image in images]
    figure.add_heatmap(
        z=np.where(known, table, None), x=[*range(len(texts))], y=[*range(len(images))],
        text=[[cell if seen else "" for cell, seen in zip(*line, strict=True)]
              for line in zip(written, known, strict=True)],
        texttemplate="%{text}", customdata=told, showscale=False, xgap=2, ygap=2, hoverongaps=False,
        hovertemplate="%{customdata}: %{z:.3f}<extra></extra>", row=1, col=col, **how,
    )  # fmt: skip


def cost_figure(
    metrics: pl.DataFrame, models: list[dict[str, Any]], metric: str = MAIN, group: str = "all"
) -> go.Figure:
    """Draw a metric of every way against its operations per pair; seconds are told on hovering.

    Args:
        metrics: of a run.
        models: the ways to draw, in the recipe's form; those that do not cost anything give a line.
        metric: which metric of the group.
        group: "all", or "text=NAME" for the pairs of one text encoder: there, ways that were tried on that
            encoder only can be compared.
    """
    rows = metrics.filter(pl.col("seed").is_null(), split="test", metric=metric, group=group)
    told = {model["name"] for model in models}
    values = {row["model"]: row for row in rows.to_dicts() if row["model"] in told}
    styles, figure, points = _styles(models), go.Figure(), {}
    for model in models:
        name, row = model["name"], values.get(model["name"])
        flops = cost_of_way(metrics, name, "flops_per_pair")
        if row and flops:
            points[name] = (math.log10(flops), row["value"], row["low"], row["high"])
        elif row:
            figure.add_hline(
                y=row["value"], line_dash="dot", line_color="#555555",
                annotation_text=plain(name), annotation_position="top right",
            )  # fmt: skip
    xs = _limits([point[0] for point in points.values()], _ROOM, 1.0)
    ys = _limits([row[end] for row in values.values() for end in ("low", "high")], 0.06, 0.01)
    places, seen = _label_places(points, xs, ys), set()
    for name, (flops, value, _, _) in points.items():
        row, style = values[name], styles[name]
        seconds = cost_of_way(metrics, name, "seconds_per_pair")
        figure.add_scatter(
            x=[10**flops], y=[value], mode="markers+text", name=style["family"], text=[plain(name)],
            textposition=places[name], textfont={"size": 11}, legendgroup=style["family"],
            showlegend=style["family"] not in seen,
            marker={"color": style["colour"], "symbol": style["symbol"], "size": 11},
            error_y={"type": "data", "symmetric": False, "array": [row["high"] - value],
                     "arrayminus": [value - row["low"]], "thickness": 1.5, "width": 3},
            hovertemplate=f"{plain(name)}: {with_interval(value, row['low'], row['high'])}<br>"
            f"%{{x:.3s}}FLOP and {seconds:.2f} s a pair<extra></extra>",
        )  # fmt: skip
        seen.add(style["family"])
    missing = [model["name"] for model in models if model["name"] not in values]
    told = "test; bar: 95 % bootstrap over images" + (
        "" if group == "all" else f"; {group.replace('=', ' ')} only"
    )
    told += f"; undefined, or not tried on all of these pairs: {', '.join(missing)}" if missing else ""
    figure.update_layout(**_head("What connectors cost and are worth", told), height=580)
    figure.update_xaxes(
        title="operations of training, per pair<br>(log scale; features not counted)",
        type="log", tickformat="~s", dtick=1, minor={"dtick": "D2", "ticks": "outside"},
    )  # fmt: skip
    figure.update_xaxes(range=xs)
    figure.update_yaxes(title=_lines(METRIC_TITLES.get(metric, metric.replace("_", " ")), 32), range=ys)
    return figure


def _limits(values: list[float], room: float, least: float) -> tuple[float, float]:
    """Return the limits of an axis: all values, and a share of their distance more on both sides."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    more = room * max(high - low, least)
    return low - more, high + more


def _label_places(
    points: dict[str, tuple[float, float, float, float]], xs: tuple[float, float], ys: tuple[float, float]
) -> dict[str, str]:
    """Choose for each point's name the side on which it covers least of other names, points and intervals.

    Args:
        points: x, y, and the ends of the interval of y.
        xs: limits of the axis.
        ys: likewise.
    """
    # Pixels a unit, about: names that do not meet on a phone do not on a wider screen.
    wide, high = _PHONE / (xs[1] - xs[0]), 250 / (ys[1] - ys[0])
    at = {
        name: ((x - xs[0]) * wide, *((end - ys[0]) * high for end in ends))
        for name, (x, *ends) in points.items()
    }
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _, _ in at.values()]
    taken += [(x - 2, low, x + 2, top) for x, _, low, top in at.values()]
    taken += [(-900.0, -900.0, 0.0, 900.0), (_PHONE, -900.0, 1800.0, 900.0)]  # beyond the plot
    found = {}
    for name, (x, y, _, _) in sorted(at.items(), key=lambda item: -item[1][0]):
        size = 5.5 * len(name)
        boxes = {
            "middle right": (x + 8, y - 7, x + 8 + size, y + 7),
            "top center": (x - size / 2, y + 8, x + size / 2, y + 22),
            "bottom center": (x - size / 2, y - 22, x + size / 2, y - 8),
            "middle left": (x - 8 - size, y - 7, x - 8, y + 7),
        }
        covered = {place: sum(_meet(boxes[place], box) for box in taken) for place in _PLACES}
        found[name] = min(_PLACES, key=covered.get)
        taken.append(boxes[found[name]])
    return found


def _meet(one: tuple[float, ...], two: tuple[float, ...]) -> float:
    """Return the area that two boxes (left, bottom, right, top) share."""
    wide = min(one[2], two[2]) - max(one[0], two[0])
    high = min(one[3], two[3]) - max(one[1], two[1])
    return max(wide, 0.0) * max(high, 0.0)


def scale_figure(scores: pl.DataFrame, models: list[dict[str, Any]]) -> go.Figure:
    """Draw the best pair against the number of image encoders, and by width and size of the encoder.

    Args:
        scores: of a run.
        models: the ways to draw, in the recipe's form.
    """
    names, styles = [model["name"] for model in models], _styles(models)
    curve = scale_curve(scores).filter(pl.col("model").is_in(names))
    groups = best_of_groups(scores).filter(pl.col("model").is_in(names))
    labels = dict(groups.select("group", "encoders").unique(maintain_order=True).iter_rows())
    titles = ["of N encoders, any subset alike", "within a group (image encoders)"]
    titles = [_lines(title, _PANEL) for title in (titles if labels else titles[:1])]
    figure = make_subplots(
        rows=1, cols=len(titles), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=titles
    )
    drawn = [name for name in names if name in curve["model"]]
    for index, name in enumerate(drawn):
        own, style = curve.filter(model=name), styles[name]
        shared = {"name": name, "legendgroup": name}
        figure.add_scatter(
            x=own["size"], y=own["value"], mode="lines+markers", **shared, row=1, col=1,
            line={"color": style["colour"], "dash": style["dash"], "width": 2},
            marker={"symbol": style["symbol"], "size": 6}, customdata=own.select("low", "high").to_numpy(),
            hovertemplate="N = %{x}: %{y:.3f} (seeds %{customdata[0]:.3f} to %{customdata[1]:.3f})",
        )  # fmt: skip
        if not labels:
            continue
        own = groups.filter(model=name)
        shift = 0.7 * ((index + 0.5) / len(drawn) - 0.5)
        figure.add_scatter(
            x=[[*labels].index(group) + shift for group in own["group"]], y=own["value"], mode="markers",
            **shared, showlegend=False, row=1, col=2, text=own["group"],
            marker={"color": style["colour"], "symbol": style["symbol"], "size": 8},
            error_y=error_bars(own["value"], own["low"], own["high"], thickness=1.5, width=2),
            hovertemplate="%{text}: %{y:.3f}",
        )  # fmt: skip
    figure.update_annotations(font_size=12)
    told = "mean over seeds; bars: lowest and highest seed"
    figure.update_layout(**_head("Best pair by valid: its test R@10", told, 2, 150), height=620)
    figure.update_yaxes(title=_SHORT, col=1)
    largest = int(curve["size"].max()) if curve.height else 1
    figure.update_xaxes(
        title="N image encoders<br>to choose from", dtick=1 if largest < 8 else 2, tickangle=0, col=1
    )
    if labels:
        # Many groups stand upright, few in lines of one word or two.
        many = len(labels) > 3
        told = [f"{group} ({count})" for group, count in labels.items()]
        told = told if many else [_lines(label, 10) for label in told]
        figure.update_xaxes(
            tickvals=[*range(len(told))], ticktext=told, range=[-0.5, len(told) - 0.5], showgrid=False,
            tickangle=-90 if many else 0, tickfont={"size": 11}, col=2,
        )  # fmt: skip
        for place in range(1, len(told)):
            figure.add_vline(x=place - 0.5, line_color="#DDDDDD", line_width=1, row=1, col=2)
    return figure


def agreement_figure(
    scores: pl.DataFrame, metrics: pl.DataFrame, models: list[dict[str, Any]], reference: str
) -> go.Figure:
    """Draw each way's R@10 of every pair against the full grid's, one panel per family.

    Args:
        scores: of a run.
        metrics: of the same run; its rank agreement is told in the legend.
        models: the ways to draw, in the recipe's form; the reference and ways without a seed are left out.
        reference: the full grid.
    """
    means = pair_means(scores).filter(~pl.col("control"))
    truth = means.filter(model=reference).select("text", "image", pl.col("value").alias("truth"))
    told = {model["name"]: metric_row(metrics, model["name"], "rank_agreement") for model in models}
    drawn = [model for model in models if model["name"] != reference and told[model["name"]] is not None]
    styles = _styles(drawn)
    families = list(dict.fromkeys(style["family"] for style in styles.values()))
    columns = min(3, max(1, len(families)))
    rows = max(1, math.ceil(len(families) / columns))
    figure = make_subplots(
        rows=rows, cols=columns, shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.03,
        vertical_spacing=0.16, subplot_titles=[_lines(name, _PANEL) for name in families],
    )  # fmt: skip
    top = 1.05 * max([0.1, *means["value"]])
    for place in range(len(families)):
        where = {"row": place // columns + 1, "col": place % columns + 1}
        figure.add_shape(
            type="line", x0=0, y0=0, x1=top, y1=top, line={"color": "#999999", "dash": "dot"}, **where
        )
    for model in drawn:
        name, style = model["name"], styles[model["name"]]
        place = families.index(style["family"])
        own = means.filter(model=name).join(truth, on=["text", "image"], maintain_order="left")
        row = told[name]
        of = "" if row["group"] == "all" else f", {plain(row['group'].replace('=', ' '))}"
        figure.add_scatter(
            x=own["truth"], y=own["value"], mode="markers", name=f"{name}: {row['value']:.2f}{of}",
            marker={"color": style["colour"], "symbol": f"{style['symbol']}-open", "size": 8,
                    "line": {"width": 1.7}},
            text=[f"{plain(one['text'])}, {plain(one['image'])}" for one in own.to_dicts()],
            hovertemplate="%{text}: %{y:.3f}, grid %{x:.3f}",
            row=place // columns + 1, col=place % columns + 1,
        )  # fmt: skip
    told = f"test R@10, dotted: as {reference}; in the legend: Spearman of the rankings, mean over seeds"
    figure.update_annotations(font_size=12)
    head = _head("Every pair, against the full grid", f"{told} (ideal 1)", 3, 150)
    figure.update_layout(**head, height=260 + 260 * rows, legend_font_size=11)
    figure.update_xaxes(range=[0, top], tickangle=0, nticks=4)
    figure.update_yaxes(range=[0, top])
    figure.update_xaxes(title=f"R@10<br>by {plain(reference)}", row=rows)
    figure.update_yaxes(title="R@10 by the way", col=1)
    return figure

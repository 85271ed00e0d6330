"""Figures of groups and of bias tests: a dot with its interval for each of two sides, counts in the labels.

Shape letters: none.
"""

import textwrap
from collections.abc import Mapping

import plotly.graph_objects as go
import polars as pl

from workbench.figures import LAYOUT, METRIC_TITLES, error_bars, plain
from workbench.text_bias import CONDITIONED, PLAIN

_SIDES = {  # colour and mark: the second side, like the conditioned one, is not told by colour alone
    "A": ("#0072B2", "circle"), "B": ("#E69F00", "diamond"),
    PLAIN: ("#999999", "circle"), CONDITIONED: ("#0072B2", "diamond"),
}  # fmt: skip
_WRAP = 26  # characters of a label on a phone


def _dots(
    rows: pl.DataFrame,
    labels: Mapping[str, str],
    value: str,
    names: Mapping[str, str],
    *,
    line: float | None = None,
    hollow: frozenset[str] = frozenset(),
) -> go.Figure:
    """Draw one dot with its interval per label and side, sides one below the other.

    Args:
        rows: the label's key as first column, side, ``value`` and its interval.
        labels: what stands on the axis, by key, from top to bottom.
        value: name of the column; its interval is in low and high, or in ``value_low`` and ``value_high``.
        names: of the sides, for the legend.
        line: a dotted line at this value.
        hollow: keys that are drawn hollow.
    """
    key, places = rows.columns[0], {one: place for place, one in enumerate(labels)}
    low, high = (f"{value}_{one}" if f"{value}_{one}" in rows.columns else one for one in ("low", "high"))
    figure = go.Figure()
    for index, (side, name) in enumerate(names.items()):
        own = rows.filter(pl.col(value).is_not_null(), side=side)
        colour, symbol = _SIDES[side]
        shift = 0.36 * ((index + 0.5) / len(names) - 0.5) * 2
        figure.add_scatter(
            x=own[value], y=[places[one] + shift for one in own[key]], name=plain(name), mode="markers",
            marker={"color": colour, "size": 10, "line": {"width": 1.5, "color": colour},
                    "symbol": [symbol + "-open" * (one in hollow) for one in own[key]]},
            error_x=error_bars(own[value], own[low], own[high], thickness=1.5, width=3),
            customdata=own.select(low, high).to_numpy(), text=[plain(one) for one in own[key]],
            hovertemplate="%{text}: %{x:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})",
        )  # fmt: skip
    if line is not None:
        figure.add_vline(x=line, line_dash="dot", line_color="#777777")
    wrapped = ["<br>".join(plain(part) for part in textwrap.wrap(text, _WRAP)) for text in labels.values()]
    figure.update_yaxes(
        tickvals=[*places.values()], ticktext=wrapped, range=[len(places) - 0.5, -0.5], automargin=True
    )
    margin = {**LAYOUT["margin"], "t": 70, "b": 60 + 22 * (len(names) + 1)}
    figure.update_layout(**{**LAYOUT, "margin": margin}, height=200 + 62 * len(places))
    figure.update_layout(legend={"orientation": "v"}, showlegend=True, title={"font": {"size": 14}})
    return figure


def _group_labels(rows: pl.DataFrame, smallest: int) -> tuple[dict[str, str], frozenset[str]]:
    """Return what stands beside each group, with its counts, and which are too small to judge."""
    labels, small = {}, set()
    for group in sorted(rows["group"].unique()):
        own = rows.filter(pl.col("group") == group)
        counts = " / ".join(f"{count:,}" for count in own["count"].unique(maintain_order=True))
        few = not own["judged"].all()
        labels[group] = f"{group} ({counts}{f', fewer than {smallest}' if few else ''})"
        small |= {group} if few else set()
    return labels, frozenset(small)


def group_accuracy_figure(rows: pl.DataFrame, column: str, smallest: int) -> go.Figure:
    """Draw the accuracy of one or two models by group; groups too small to judge are hollow.

    Args:
        rows: as :func:`workbench.group_sides.compare_groups` gives them.
        column: what groups are.
        smallest: images a group needs to be judged.
    """
    labels, small = _group_labels(rows, smallest)
    names = {
        side: f"{side}: {name}" for side, name in rows.select("side", "name").unique().sort("side").rows()
    }
    figure = _dots(rows.select("group", pl.exclude("group")), labels, "value", names, hollow=small)
    figure.update_layout(
        title=f"Accuracy by {plain(column.replace('_', ' '))} (images)<br>bar: 95 % bootstrap"
    )
    figure.update_xaxes(title=METRIC_TITLES["top1"])
    return figure


def group_difference_figure(rows: pl.DataFrame, difference: str, to: str, smallest: int) -> go.Figure:
    """Draw each group's difference to something, around zero.

    Args:
        rows: as :func:`workbench.group_sides.compare_groups` gives them.
        difference: "to_overall", "to_best" or "to_other".
        to: what that is, in words.
        smallest: images a group needs to be judged.
    """
    labels, small = _group_labels(rows, smallest)
    told = rows.filter(pl.col(difference).is_not_null())
    names = {
        side: f"{side}: {name}" for side, name in told.select("side", "name").unique().sort("side").rows()
    }
    figure = _dots(
        rows.select("group", pl.exclude("group")), labels, difference, names, line=0.0, hollow=small
    )
    figure.update_layout(title=f"Difference to {plain(to)}<br>bar: 95 % bootstrap")
    figure.update_xaxes(title="difference (-1 to 1, 0: none)")
    _centre(figure, rows, difference, 0.0)
    return figure


def _centre(figure: go.Figure, rows: pl.DataFrame, value: str, middle: float) -> None:
    """Put the value that means nothing into the middle of the axis."""
    ends = rows.select(pl.col(f"{value}_low", f"{value}_high")).drop_nulls().to_numpy().ravel()
    reach = max((abs(one - middle) for one in ends), default=0.05)
    figure.update_xaxes(range=[middle - 1.08 * reach - 1e-3, middle + 1.08 * reach + 1e-3])


def association_figure(rows: pl.DataFrame) -> go.Figure:
    """Draw WEAT effect sizes of the plain encoder and under a condition.

    Args:
        rows: as :func:`workbench.text_bias.association_rows` gives them.
    """
    labels = {}
    for test in rows["test"].unique(maintain_order=True):
        p = " to ".join(_p(one) for one in rows.filter(pl.col("test") == test)["p"])
        labels[test] = f"{test} (p {p})"
    figure = _dots(rows, labels, "effect", {side: side for side in (PLAIN, CONDITIONED)}, line=0.0)
    figure.update_layout(title="Effect size d, and p plain to conditioned<br>bar: 95 % bootstrap over words")
    figure.update_xaxes(title="d (-2 to 2, 0: no association)", range=[-2.05, 2.05])
    return figure


def _kinds(rows: pl.DataFrame, value: str, line: float) -> go.Figure:
    """Draw one dot for each kind of pair, plain and under the condition, with the number of pairs."""
    first = rows.unique("kind", keep="first", maintain_order=True)
    labels = {kind: f"{kind} ({pairs} pairs)" for kind, pairs in first.select("kind", "pairs").iter_rows()}
    return _dots(rows, labels, value, {side: side for side in (PLAIN, CONDITIONED)}, line=line)


def preference_figure(rows: pl.DataFrame) -> go.Figure:
    """Draw how often the stereotypical sentence of a pair lies nearer to a neutral context.

    Args:
        rows: as :func:`workbench.text_bias.preference_rows` gives them.
    """
    figure = _kinds(rows, "share", line=0.5)
    figure.update_layout(title="Stereotype nearer to the context<br>bar: 95 % Wilson interval")
    figure.update_xaxes(title="share (0 to 1, 0.5: none)", range=[-0.02, 1.02])
    return figure


def distance_figure(rows: pl.DataFrame) -> go.Figure:
    """Draw how far apart sentences lie that only differ in the group they speak of.

    Args:
        rows: as :func:`workbench.text_bias.distance_rows` gives them.
    """
    figure = _kinds(rows, "distance", line=0.0)
    figure.update_layout(title="Distance of sentences that differ in the group<br>bar: 95 % bootstrap")
    figure.update_xaxes(title="1 - cosine (0 to 2, 0: the group is not seen)")
    return figure


def _p(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"

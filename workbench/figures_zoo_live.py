"""Figures of what a notebook computes itself: the poster's count, few epochs, an encoder that comes later."""

from typing import Any

import plotly.graph_objects as go
import polars as pl

from workbench.figures import FAMILY_COLOURS, LAYOUT, METRIC_TITLES, family, plain

_POSTER = {  # what a way's name begins with -> family
    "APE": "each pair trained alone",
    "Hyper-Align": "connectors generated from a code",
    "direct": "all connectors trained together",
    "closed": "closed form",
}
_LATER = {  # what the name of a way for a new encoder begins with -> family, symbol
    "hypernetwork, never": ("connectors generated from a code", "circle-open"),
    "hypernetwork, code": ("connectors generated from a code", "circle"),
    "connector": ("each pair trained alone", "diamond"),
    "closed": ("closed form", "square"),
}
_DASHES = ("solid", "dash", "dot")
_LABELLED = {**LAYOUT, "margin": {**LAYOUT["margin"], "t": 80}}


def poster_figure(counted: pl.DataFrame) -> go.Figure:
    """Draw what one encoder's epoch costs in each way, on a log scale.

    Args:
        counted: as :func:`workbench.zoo_poster.poster_flops` gives it.
    """
    colours = [
        FAMILY_COLOURS[next(kind for start, kind in _POSTER.items() if way.startswith(start))]
        for way in counted["way"]
    ]
    figure = go.Figure(
        go.Bar(
            y=[plain(way) for way in counted["way"]], x=counted["per_encoder"], orientation="h",
            marker_color=colours, textposition="outside", cliponaxis=False,
            text=[f"{row['per_encoder']:.2f} (1 / {row['saving']:.1f})" for row in counted.to_dicts()],
            hovertemplate="%{y}: %{x:.3f} TFLOP<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(
        **{**_LABELLED, "margin": {**_LABELLED["margin"], "b": 60}}, height=140 + 42 * counted.height,
        title="One epoch of one encoder, poster's sizes<br>"
        "<sub>in brackets: share of APE's; closed form: once, not by epoch</sub>",
    )  # fmt: skip
    figure.update_xaxes(
        title="TFLOP per encoder and epoch (log scale; features not counted)", type="log",
        tickvals=[0.5, 1, 2, 5, 10, 20, 50], range=[-0.5, 1.75],
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    return figure


def budget_figure(found: pl.DataFrame, models: list[dict[str, Any]]) -> go.Figure:
    """Draw quality against operations, one training per number of epochs, which stands at its point.

    Args:
        found: as :func:`workbench.zoo_analysis.quality_by_budget` gives it.
        models: the ways to draw, in the recipe's form.
    """
    figure, used = go.Figure(), {}
    for model in models:
        kind, own = family(model), found.filter(model=model["name"])
        used[kind] = used.get(kind, -1) + 1
        figure.add_scatter(
            x=own["flops"], y=own["value"], name=model["name"], mode="lines+markers+text",
            text=[str(epochs or model["name"]) for epochs in own["epochs"]],
            textposition=("bottom center", "top center")[used[kind] % 2],
            line={"color": FAMILY_COLOURS[kind], "dash": _DASHES[used[kind] % len(_DASHES)]},
            marker={"size": 9, "symbol": "circle" if own["epochs"].max() else "square"},
            hovertemplate="%{x:.3s}FLOP: %{y:.3f}, epochs %{text}",
        )  # fmt: skip
    figure.update_layout(
        **_LABELLED, height=470,
        title="What few epochs reach<br><sub>mean over the pairs of one text encoder, one seed; "
        "numbers: epochs, each a training of its own</sub>",
    )  # fmt: skip
    figure.update_xaxes(
        title="floating-point operations of the whole training, all pairs (log scale)", type="log",
        tickformat="~s", dtick=1, minor={"dtick": "D2", "ticks": "outside"},
    )  # fmt: skip
    figure.update_yaxes(title=METRIC_TITLES["recall_at_10"], rangemode="tozero")
    return figure


def onboarding_figure(found: pl.DataFrame, floor: float) -> go.Figure:
    """Draw what each way gives an image encoder that the hypernetwork has not seen.

    Args:
        found: as :func:`workbench.zoo_analysis.onboarding` gives it, of one or several encoders.
        floor: what a guess gives.
    """
    figure, most = go.Figure(), max(found["epochs"].max(), 1)
    newcomers = found["newcomer"].unique(maintain_order=True).to_list()
    ways = found["way"].unique(maintain_order=True).to_list()
    for place, way in enumerate(ways):
        own = found.filter(way=way)
        kind, symbol = next(look for start, look in _LATER.items() if way.startswith(start))
        shift = 0.6 * ((place + 0.5) / len(ways) - 0.5)
        few = 0 < own["epochs"][0] < most
        figure.add_scatter(
            x=own["value"], y=[newcomers.index(name) + shift for name in own["newcomer"]], name=plain(way),
            mode="markers", hovertemplate="%{x:.3f}",
            marker={"color": FAMILY_COLOURS[kind], "size": 8 if few else 12, "line": {"width": 1.5},
                    "symbol": f"{symbol}-open-dot" if "both" in way else symbol},
        )  # fmt: skip
    figure.add_vline(x=floor, line_dash="dot", line_color="#555555", annotation_text="chance")
    figure.update_layout(
        **{**_LABELLED, "margin": {**_LABELLED["margin"], "b": 150}}, height=290 + 100 * len(newcomers),
        title="An image encoder that comes later<br>"
        "<sub>the hypernetwork was trained on all others; one seed; small: fewer epochs</sub>",
    )  # fmt: skip
    figure.update_xaxes(title="test R@10 of the newcomer (0 to 1, ideal 1)", rangemode="tozero")
    figure.update_yaxes(
        title="left out", tickvals=[*range(len(newcomers))], ticktext=[plain(name) for name in newcomers],
        range=[len(newcomers) - 0.5, -0.5],
    )  # fmt: skip
    return figure

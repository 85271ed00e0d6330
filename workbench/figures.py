"""Data frame in, plotly figure out; shared by notebooks, reports and pages.

One colour means one thing everywhere (Okabe and Ito's palette, safe for colour-blind readers), changes are
drawn on a zero-centred diverging map, and every axis says what it measures.
"""

import html
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

# Okabe and Ito's; black is the page's ink, which is light on a dark page.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
FAMILY_COLOURS = {
    "no training": "#999999",
    "baseline": "#E69F00",
    "reads sentence and condition together": "#56B4E9",
    "generated projection": "#0072B2",
    "generated query, baseline head": "#D55E00",
    "generated query, shared map": "#CC79A7",
    "generated query and projection": "#009E73",
    "same machinery, told nothing": "#000000",
    "generated norms": "#0072B2",
    "generated norms, added to trained ones": "#009E73",
    "generated kernels or projection": "#CC79A7",
    "each pair trained alone": "#E69F00",
    "all connectors trained together": "#D55E00",
    "connectors generated from a code": "#0072B2",
    "closed form": "#009E73",
    "closed form, then a few pairs trained": "#CC79A7",
    "one map per encoder": "#56B4E9",
    "generated weights": "#0072B2",
    "control": "#E69F00",
}
_CONNECTIONS = {  # ways to connect a zoo
    "ape": "each pair trained alone",
    "direct": "all connectors trained together",
    "hyper_align": "connectors generated from a code",
    **dict.fromkeys(("relative", "ridge", "procrustes", "cca", "connector"), "closed form"),
    "search": "closed form, then a few pairs trained",
    "hub": "one map per encoder",
}
METRIC_TITLES = {
    "top1": "top-1 accuracy (0 to 1, ideal 1)",
    "top5": "top-5 accuracy (0 to 1, ideal 1)",
    "mean_per_class": "mean recall over classes (0 to 1, ideal 1)",
    "worst_group_top1": "top-1 accuracy of the worst group (0 to 1, ideal 1)",
    "gap_top1": "gap: best minus worst group's top-1 (0 to 1, ideal 0)",
    "spearman": "Spearman correlation",
    "pearson": "Pearson correlation",
    "auc": "area under the ROC curve",
    "pair_order": "pair order (share of a pair's two conditions ranked right)",
    "mrr": "mean reciprocal rank (filtered, realistic)",
    "hits_at_1": "hits at 1 (filtered)",
    "hits_at_3": "hits at 3 (filtered)",
    "hits_at_10": "hits at 10 (filtered)",
    "mr": "mean rank (filtered, realistic)",
    "recall_at_1": "recall at 1, mean of both directions (0 to 1, ideal 1)",
    "recall_at_10": "recall at 10, mean of both directions (0 to 1, ideal 1)",
    "t2i_recall_at_10": "recall at 10, caption to image (0 to 1, ideal 1)",
    "i2t_recall_at_10": "recall at 10, image to caption (0 to 1, ideal 1)",
    "rank_agreement": "Spearman with the full grid's ranking of the pairs (-1 to 1, ideal 1)",
    "ndcg_at_5": "NDCG at 5 of the pairs' order (0 to 1, ideal 1)",
    "chosen_recall_at_10": "recall at 10 of the pair chosen on valid (0 to 1, ideal 1)",
    "regret": "recall at 10 lost by the chosen pair (0 to 1, ideal 0)",
    "hit_rate": "hit rate (share of lookups that the cache answers)",
    "cache_mib": "cache, MiB",
    "cache_mib_768": "cache at width 768, MiB",
    "cache_mib_1024": "cache at width 1024, MiB",
    "seconds_batch_1": "seconds at batch 1",
    "seconds_batch_128": "seconds at batch 128",
}
# One meaning each: amounts from zero, quantities with a sign, and changes of something around zero.
AMOUNTS, SIGNED, CHANGES = "Viridis", "RdBu_r", "PuOr_r"
CHANCE = {"spearman": 0.0, "pearson": 0.0, "auc": 0.5, "pair_order": 0.5}
LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"size": 13},
    "margin": {"l": 10, "r": 20, "t": 60, "b": 100},
    "legend": {"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom", "x": 0},
}


def plain(text: str) -> str:
    """Make a text show as it is: plotly would read tags, links and formulas in titles and labels."""
    return html.escape(text).replace("$", "&#36;")


def family(settings: dict[str, Any]) -> str:
    """Say which family a model of a table belongs to; decides its colour."""
    if "role" in settings:
        return settings["role"]
    if settings["kind"] in ("cosine", "prompt", "condition_only", "frequency", "chance"):
        return "no training"
    if settings["kind"] in _CONNECTIONS:
        return _CONNECTIONS[settings["kind"]]
    if settings["kind"] in ("token_control", "adapter"):
        return "same machinery, told nothing"
    if settings["kind"] == "hyper" and "generates" in settings:
        added = " norms, added to trained ones" if settings["mode"] == "residual" else " norms"
        return "generated" + (added if settings["generates"] == "norms" else " kernels or projection")
    if settings["kind"] in ("bi_encoder", "cross_encoder"):
        return "reads sentence and condition together"
    if settings.get("pooling") == "condition":
        heads = {"hyper": "generated query and projection", "shared": "generated query, shared map"}
        return heads.get(settings["kind"], "generated query, baseline head")
    return "generated projection" if settings["kind"] == "hyper" else "baseline"


def error_bars(values: pl.Series, low: pl.Series, high: pl.Series, **style: Any) -> dict[str, Any]:
    """Return the error bars of values with their intervals.

    Lists, not arrays: Panel takes arrays inside a trace's parts out of the figure that it shows.
    """
    above, below = (high - values).to_list(), (values - low).to_list()
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, **style}


def models_figure(
    metrics: pl.DataFrame, models: list[dict[str, Any]], metric: str, split: str = "test", group: str = "all"
) -> go.Figure:
    """Draw every model's mean over seeds with its interval, and its single seeds, best on top.

    Args:
        metrics: long form, as a run holds them.
        models: those of the recipe's models to draw.
        metric: which metric.
        split: which split.
        group: which group of rows.
    """
    drawn = pl.col("model").is_in([model["name"] for model in models])
    rows = metrics.filter(drawn, split=split, group=group, metric=metric)
    means = rows.filter(pl.col("seed").is_null()).sort("value")
    families = {model["name"]: family(model) for model in models}
    figure = go.Figure()
    for name, colour in FAMILY_COLOURS.items():
        members = means.filter(pl.col("model").replace_strict(families) == name)
        if members.is_empty():
            continue
        seeds = rows.filter(pl.col("seed").is_not_null(), pl.col("model").is_in(members["model"].to_list()))
        figure.add_scatter(
            x=seeds["value"],
            y=seeds["model"],
            mode="markers",
            marker={"color": colour, "size": 5, "opacity": 0.45},
            showlegend=False,
            customdata=seeds["seed"],
            hovertemplate="%{y}, seed %{customdata}: %{x:.3f}<extra></extra>",
        )
        figure.add_scatter(
            x=members["value"],
            y=members["model"],
            name=name,
            mode="markers",
            marker={"color": colour, "size": 10},
            error_x=error_bars(members["value"], members["low"], members["high"], thickness=2),
            customdata=members.select("low", "high").to_numpy(),
            hovertemplate="%{y}: %{x:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>",
        )
    if metric in CHANCE:
        figure.add_vline(x=CHANCE[metric], line_dash="dot", line_color="#555555", annotation_text="chance")
    count = rows["count"][0] if rows.height else 0
    interval = "interval over seeds" if any("role" in model for model in models) else "bootstrap"
    figure.update_layout(
        **LAYOUT,
        title=f"{split} split, {group}: {count} rows; dot: mean over seeds, bar: 95 % {interval}",
        height=180 + 26 * means.height,
    )
    figure.update_xaxes(title=METRIC_TITLES.get(metric, plain(metric)))
    figure.update_yaxes(categoryorder="array", categoryarray=means["model"].to_list())
    return figure


def groups_figure(
    metrics: pl.DataFrame, models: list[str], metric: str, column: str, split: str = "test"
) -> go.Figure:
    """Draw some models side by side over the values of one grouping column."""
    palette = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999"]
    figure = go.Figure()
    rows = metrics.filter(
        pl.col("split") == split,
        pl.col("metric") == metric,
        pl.col("seed").is_null(),
        pl.col("group").str.starts_with(f"{column}="),
    ).with_columns(
        label=pl.col("group").str.strip_prefix(f"{column}=") + " (" + pl.col("count").cast(pl.String) + ")"
    )
    for index, model in enumerate(models):
        part = rows.filter(model=model)
        figure.add_bar(
            x=part["label"],
            y=part["value"],
            name=model,
            marker_color=palette[index % len(palette)],
            error_y=error_bars(part["value"], part["low"], part["high"]),
        )
    if metric in CHANCE:
        figure.add_hline(y=CHANCE[metric], line_dash="dot", line_color="#555555", annotation_text="chance")
    figure.update_layout(
        **LAYOUT, title=f"{split} split by {column.replace('_', ' ')} (rows)", height=420, barmode="group"
    )
    figure.update_yaxes(title=METRIC_TITLES.get(metric, plain(metric)).split(" (")[0])
    return figure


def similarity_change_figure(
    labels: list[str], before: list[list[float]], after: dict[str, list[list[float]]]
) -> go.Figure:
    """Draw similarity matrices: the plain encoder's, then one under each condition, on one colour scale.

    Args:
        labels: short names of the sentences.
        before: cosines of the plain encoder.
        after: cosines under each condition.
    """
    labels = [plain(label) for label in labels]
    figure = make_subplots(
        rows=1,
        cols=1 + len(after),
        subplot_titles=["plain encoder", *map(plain, after)],
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    for column, values in enumerate([before, *after.values()], start=1):
        figure.add_heatmap(
            z=values, x=labels, y=labels, coloraxis="coloraxis", row=1, col=column,
            hovertemplate="%{y}<br>%{x}<br>cosine %{z:.2f}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        **LAYOUT,
        height=460,
        coloraxis={"colorscale": SIGNED, "cmin": -1, "cmax": 1, "colorbar": {"title": "cosine"}},
    )
    figure.update_yaxes(autorange="reversed")
    return figure


def condition_distance_figure(labels: list[str], distances: list[list[float]]) -> go.Figure:
    """Draw the Frobenius distance between the weights of conditions."""
    labels = [plain(label) for label in labels]
    figure = go.Figure(
        go.Heatmap(
            z=distances, x=labels, y=labels, colorscale=AMOUNTS, colorbar={"title": "distance"},
            hovertemplate="%{y}<br>%{x}<br>distance %{z:.2f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(**LAYOUT, title="Frobenius distance between generated weights", height=560)
    figure.update_yaxes(autorange="reversed")
    return figure


def strength_figure(strengths: list[float], curves: dict[str, list[float]]) -> go.Figure:
    """Draw how the similarity of sentence pairs moves from the plain encoder (0) past the model (1)."""
    figure = go.Figure()
    for name, values in curves.items():
        figure.add_scatter(x=strengths, y=values, name=plain(name), mode="lines+markers")
    figure.add_vline(x=1, line_dash="dot", line_color="#555555", annotation_text="the model")
    figure.update_layout(**LAYOUT, title="Similarity as the condition is let in", height=420)
    figure.update_xaxes(title="strength (0: plain encoder, 1: trained model)")
    figure.update_yaxes(title="cosine similarity")
    return figure


def history_figure(cards: list[dict[str, Any]], models: list[str]) -> go.Figure:
    """Draw the training loss over the epochs, first seed, of some models; a family's colour, a dash each."""
    dashes, figure = ("solid", "dash", "dot", "dashdot"), go.Figure()
    seen: dict[str, str] = {}
    for card in cards:
        if card["model"] in models and card["model"] not in seen and card.get("history"):
            kind = family(card["settings"])
            dash = dashes[list(seen.values()).count(kind) % len(dashes)]
            seen[card["model"]] = kind
            figure.add_scatter(
                x=[entry["epoch"] for entry in card["history"]],
                y=[entry["loss"] for entry in card["history"]],
                name=card["model"],
                mode="lines+markers",
                line={"color": FAMILY_COLOURS[kind], "dash": dash},
            )
    figure.update_layout(**LAYOUT, title="Training loss, first seed", height=420)
    figure.update_xaxes(title="epoch", rangemode="tozero")
    figure.update_yaxes(title="training loss, mean since the last point")
    return figure


def intervals_figure(
    metrics: pl.DataFrame,
    models: list[dict[str, Any]],
    metric: str,
    column: str,
    split: str = "test",
    *,
    reference: str = "",
    smallest: int = 0,
) -> go.Figure:
    """Draw models over the groups of one column: values left, differences to a reference right.

    Args:
        metrics: long form, as a run holds them.
        models: those of the recipe's models to draw, in this order within each group.
        metric: which metric.
        column: groups are ``column=value``.
        split: which split.
        reference: differences to this model; empty for none.
        smallest: groups of fewer rows are drawn hollow and marked.
    """
    rows = metrics.filter(
        pl.col("seed").is_null(), pl.col("group").str.starts_with(f"{column}="), split=split
    ).with_columns(pl.col("group").str.strip_prefix(f"{column}="))
    counts = dict(rows.filter(metric=metric).select("group", "count").iter_rows())
    labels = {
        group: f"{plain(group)} ({count:,}{', too few' if count < smallest else ''})"
        for group, count in counts.items()
    }
    panels = [(metric, METRIC_TITLES.get(metric, plain(metric)))]
    panels += [(f"{metric}_minus_{reference}", f"difference to {reference}")] if reference else []
    figure = make_subplots(rows=1, cols=len(panels), shared_yaxes=True, horizontal_spacing=0.06)
    small = [group for group, count in counts.items() if count < smallest]
    for place, (name, title) in enumerate(panels, start=1):
        # How far a guess lies below everything would stretch the axis of the differences.
        told = [model for model in models if place == 1 or family(model) != "no training"]
        shown = rows.filter(pl.col("model").is_in([model["name"] for model in told]), metric=name)
        _dodge(figure, shown, list(counts), models, place, small)
        figure.update_xaxes(title=title, col=place)
    if reference:
        figure.add_vline(x=0, line_dash="dot", line_color="#555555", col=2)
    hollow = f"; hollow: fewer than {smallest}" if small else ""
    shown = plain(column.replace("_", " "))
    figure.update_layout(
        **LAYOUT,
        title=f"{split} split by {shown} (count){hollow}; bar: 95 % bootstrap",
        height=190 + (24 + 17 * len(models)) * len(counts),
    )
    places = list(range(len(counts)))
    figure.update_yaxes(tickvals=places, ticktext=[*labels.values()], range=[len(counts) - 0.5, -0.5])
    return figure


def _dodge(
    figure: go.Figure, rows: pl.DataFrame, groups: list[str], models: list[dict], col: int, small: list[str]
) -> None:
    """Draw one dot with its interval per model and group, models one below the other within a group."""
    symbols = ("circle", "diamond", "square", "triangle-up", "cross", "x")
    used: dict[str, int] = {}
    for index, model in enumerate(models):
        kind = family(model)
        symbol = symbols[used.setdefault(kind, 0) % len(symbols)]
        used[kind] += 1
        own = rows.filter(pl.col("model") == model["name"], pl.col("group").is_in(groups))
        shift = 0.7 * ((index + 0.5) / len(models) - 0.5)
        figure.add_scatter(
            x=own["value"], y=[groups.index(group) + shift for group in own["group"]],
            name=model["name"], legendgroup=model["name"], showlegend=col == 1, mode="markers",
            marker={"color": FAMILY_COLOURS[kind], "size": 9, "line": {"width": 1.5},
                    "symbol": [symbol + "-open" * (group in small) for group in own["group"]]},
            error_x=error_bars(own["value"], own["low"], own["high"], thickness=1.5, width=3),
            customdata=own.select("low", "high").to_numpy(),
            text=[plain(group) for group in own["group"]],
            hovertemplate="%{text}: %{x:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})",
            row=1, col=col,
        )  # fmt: skip


def sides_figure(
    metrics: pl.DataFrame, models: list[dict[str, Any]], reference: str, split: str = "test"
) -> go.Figure:
    """Draw top-1 over all questions as generators answer them, and when one thing about the weights differs.

    Args:
        metrics: long form, as a run holds them.
        models: those of the recipe's models to draw.
        reference: its value is the dotted line.
        split: which split.
    """
    rows = metrics.filter(pl.col("seed").is_null(), metric="top1", split=split)
    single = pl.col("group").str.starts_with("side=") & ~pl.col("group").str.contains(", ", literal=True)
    sides = rows.filter(single).with_columns(pl.col("group").str.strip_prefix("side="))
    asked = sides["model"].unique()
    own = rows.filter(pl.col("model").is_in(asked.implode()), group="all")
    own = own.with_columns(group=pl.lit("as it is used: its own weights, fitted statistics"))
    rows_drawn = pl.concat([own, sides])
    groups = rows_drawn["group"].unique(maintain_order=True).to_list()
    drawn = [model for model in models if model["name"] in asked]
    figure = make_subplots(rows=1, cols=1)
    _dodge(figure, rows_drawn, groups, drawn, 1, [])
    for row in rows.filter(group="all", model=reference).to_dicts():
        figure.add_vline(
            x=row["value"], line_dash="dot", line_color="#555555", annotation_text=plain(reference)
        )
    figure.update_layout(
        **LAYOUT, title=f"{split} split, all class sets", height=210 + (24 + 17 * len(drawn)) * len(groups)
    )
    figure.update_xaxes(title=METRIC_TITLES["top1"])
    labels = [plain(group) for group in groups]
    figure.update_yaxes(tickvals=[*range(len(groups))], ticktext=labels, range=[len(groups) - 0.5, -0.5])
    return figure

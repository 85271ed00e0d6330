"""Figures of how embeddings lie, what can be read off them, and what a score is made of."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import polars as pl
from jaxtyping import Float, UInt8
from plotly.subplots import make_subplots
from torch import Tensor

from workbench.figures import AMOUNTS, CHANGES, LAYOUT, PALETTE, SIGNED, plain
from workbench.geometry.attribution import Attribution, PairAttribution
from workbench.geometry.text_attribution import Words
from workbench.geometry.uniformity import uniform_sphere

_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#999999"


def spread_figure(table: pl.DataFrame, width: int) -> go.Figure:
    """Draw alignment over uniformity, plain and under each attribute's condition.

    Args:
        table: as :func:`workbench.sentence_geometry.alignment_table` gives it.
        width: of the embeddings, which says how even they can be at most.
    """
    figure = go.Figure()
    plain_rows, under = (
        table.filter(side=side).sort("attribute") for side in ("plain", "under its condition")
    )
    for column, dash in (("alignment", "solid"), ("apart", "dot")):
        ends = zip(
            plain_rows["uniformity"], plain_rows[column], under["uniformity"], under[column], strict=True
        )
        lines = [(x, y, u, v) for x, y, u, v in ends]
        figure.add_scatter(
            x=[value for x, _, u, _ in lines for value in (x, u, None)],
            y=[value for _, y, _, v in lines for value in (y, v, None)],
            mode="lines", line={"color": _GREY, "width": 1, "dash": dash}, hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    marks = ((plain_rows, "plain", _GREY, "circle"), (under, "under its condition", _BLUE, "diamond"))
    for rows, side, colour, symbol in marks:
        for column, told, open_ in (("alignment", "agree", ""), ("apart", "differ", "-open")):
            figure.add_scatter(
                x=rows["uniformity"], y=rows[column], name=f"{side}: sentences that {told}",
                mode="markers+text" if side != "plain" else "markers",
                text=[plain(name) for name in rows["attribute"]],
                textposition=[f"middle {('right', 'left')[place % 2]}" for place in range(rows.height)],
                marker={"color": colour, "symbol": symbol + open_, "size": 11, "line": {"width": 2}},
                hovertemplate="%{text}: uniformity %{x:.2f}, mean squared distance %{y:.2f}<extra></extra>",
            )  # fmt: skip
    figure.add_vline(
        x=uniform_sphere(width), line_dash="dot", line_color="#555555", annotation_text="evenly filled"
    )
    figure.add_annotation(x=0, y=0, text="one point", showarrow=True, ax=-30, ay=-25)
    figure.update_layout(
        **{**LAYOUT, "margin": {**LAYOUT["margin"], "b": 130}}, title="Alignment and uniformity", height=520
    )
    figure.update_xaxes(title="uniformity (lower: more even)", range=[-4.3, 0.3])
    figure.update_yaxes(title="mean squared distance (0 to 4)", rangemode="tozero")
    return figure


def slices_figure(table: pl.DataFrame, bar: float = 0.97) -> go.Figure:
    """Draw what the first entries of embeddings keep of the whole's score.

    Args:
        table: as :func:`workbench.sentence_geometry.slice_table` gives it.
        bar: the share sought at half the width.
    """
    figure = go.Figure()
    lines = table.select("embeddings", "depth").unique(maintain_order=True).rows()
    for place, (name, depth) in enumerate(lines):
        rows = table.filter(embeddings=name, depth=depth)
        figure.add_scatter(
            x=rows["width"], y=rows["share"], name=f"{plain(name)}, after layer {depth}",
            mode="lines+markers", line={"color": PALETTE[place % len(PALETTE)]},
            customdata=rows["spearman"],
            hovertemplate="%{x} entries: %{y:.1%} of the whole, Spearman %{customdata:.3f}<extra></extra>",
        )  # fmt: skip
    figure.add_hline(
        y=bar,
        line_dash="dot",
        line_color="#555555",
        annotation_text="bar at half the width",
        annotation_position="bottom left",
    )
    figure.update_layout(**LAYOUT, title="Slices of embeddings", height=420)
    figure.update_xaxes(
        title="entries kept, from the first", type="log", tickvals=table["width"].unique().sort().to_list()
    )
    figure.update_yaxes(title="share of the whole's Spearman", rangemode="tozero")
    return figure


def probes_figure(table: pl.DataFrame) -> go.Figure:
    """Draw what linear probes read off embeddings plain and under each condition.

    Args:
        table: as :func:`workbench.geometry.probes.probe_conditions` gives it.
    """
    table = table.with_columns(pl.col("condition").fill_null("no condition"))
    conditions, names = (
        table[key].unique(maintain_order=True).to_list() for key in ("condition", "attribute")
    )
    cells = {(row["condition"], row["attribute"]): row for row in table.to_dicts()}
    rows = [[cells[condition, name] for name in names] for condition in conditions]
    figure = go.Figure(
        go.Heatmap(
            z=[[cell["change"] for cell in row] for row in rows],
            x=[plain(name) for name in names],
            y=[plain(condition) for condition in conditions],
            text=[[f"{cell['accuracy']:.2f} ({cell['control']:.2f})" for cell in row] for row in rows],
            texttemplate="%{text}", zmid=0, zmin=-0.6, zmax=0.6, colorscale=CHANGES,
            colorbar={"title": "change of<br>accuracy"},
            hovertemplate="read off: %{x}<br>condition: %{y}<br>change %{z:+.2f}<extra></extra>",
        )
    )  # fmt: skip
    count = table["count"][0]
    figure.update_layout(
        **LAYOUT, height=200 + 50 * len(conditions),
        title=f"Linear probes: accuracy (control task), {count} sentences",
    )  # fmt: skip
    figure.update_xaxes(title="attribute that is read off")
    figure.update_yaxes(title="condition asks for", autorange="reversed")
    return figure


def stitching_figure(table: pl.DataFrame) -> go.Figure:
    """Draw how well each space's head reads every space, by each way of bringing one to the other.

    Args:
        table: as :func:`workbench.geometry.relative.stitching` gives it.
    """
    titles = {"absolute": "as it is", "relative": "relative to anchors", "mapped": "mapped by least squares"}
    names = table["head"].unique(maintain_order=True).to_list()
    labels = [plain(name) for name in names]
    figure = make_subplots(
        rows=1, cols=len(titles), subplot_titles=[*titles.values()], shared_yaxes=True,
        horizontal_spacing=0.03,
    )  # fmt: skip
    for column, kind in enumerate(titles, start=1):
        cells = {(row["head"], row["encoder"]): row["accuracy"] for row in table.filter(kind=kind).to_dicts()}
        values = [[cells[head, name] for name in names] for head in names]
        figure.add_heatmap(
            z=values, x=labels, y=labels, coloraxis="coloraxis", row=1, col=column,
            text=[["-" if value is None else f"{value:.2f}" for value in row] for row in values],
            texttemplate="%{text}",
            hovertemplate="head of %{y}<br>on %{x}<br>accuracy %{z:.3f}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        **{**LAYOUT, "margin": {**LAYOUT["margin"], "t": 90}}, height=300 + 40 * len(names),
        title="A head of one space on another",
        coloraxis={"colorscale": AMOUNTS, "cmin": 0, "cmax": 1, "colorbar": {"title": "accuracy"}},
    )  # fmt: skip
    figure.update_xaxes(title="embeddings of", tickangle=-40)
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title="head trained on", col=1)
    return figure


def words_figure(found: Mapping[str, tuple[Words, Attribution]]) -> go.Figure:
    """Draw what each word of a text adds to a score, one panel per text.

    Args:
        found: words and their values, by what the text is.
    """
    titles = [
        f"{plain(name)}: {one.reference:+.2f} without its words, {one.score:+.2f} with them"
        for name, (_, one) in found.items()
    ]
    figure = make_subplots(rows=len(found), cols=1, subplot_titles=titles, vertical_spacing=0.3 / len(found))
    for row, (words, one) in enumerate(found.values(), start=1):
        values, places = one.values.tolist(), [*range(len(words.words))]
        colours = [_BLUE if value >= 0 else _ORANGE for value in values]
        figure.add_bar(
            x=places, y=values, marker_color=colours, text=[f"{value:+.2f}" for value in values],
            textposition="outside", cliponaxis=False,
            hovertemplate="%{y:+.3f}<extra></extra>", row=row, col=1,
        )  # fmt: skip
        ticks = [plain(word) for word in words.words]
        figure.update_xaxes(tickvals=places, ticktext=ticks, row=row, col=1)
    figure.update_layout(
        **{**LAYOUT, "margin": {**LAYOUT["margin"], "t": 90, "b": 50}}, height=120 + 220 * len(found),
        title="What each word adds to the cosine", showlegend=False,
    )  # fmt: skip
    figure.update_yaxes(title="added to the cosine")
    return figure


def word_pairs_figure(one: Words, other: Words, found: PairAttribution, condition: str) -> go.Figure:
    """Draw what each pair of words adds to the cosine of two sentences under a condition.

    Args:
        one: words of the first sentence.
        other: words of the second.
        found: values of their pairs.
        condition: under which.
    """
    across, down = [*range(len(other.words))], [*range(len(one.words))]
    most = float(found.values.abs().max())
    figure = go.Figure(
        go.Heatmap(
            z=found.values.tolist(), x=across, y=down, zmin=-most, zmax=most, zmid=0, colorscale=SIGNED,
            colorbar={"title": "added to<br>the cosine"},
            text=[[f"{plain(a)} / {plain(b)}" for b in other.words] for a in one.words],
            hovertemplate="%{text}: %{z:+.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(
        **{**LAYOUT, "margin": {**LAYOUT["margin"], "t": 80}}, height=260 + 34 * len(one.words),
        title=f"Pairs of words: {plain(condition)}<br><sub>cosine {found.score:.3f}: pairs "
        f"{float(found.values.sum()):+.3f}, references {found.reference:+.3f}, error "
        f"{found.incompleteness:.0e}</sub>",
    )  # fmt: skip
    figure.update_xaxes(
        tickvals=across, ticktext=[plain(word) for word in other.words], title="second sentence"
    )
    figure.update_yaxes(
        tickvals=down, ticktext=[plain(word) for word in one.words], title="first sentence",
        autorange="reversed",
    )  # fmt: skip
    return figure


def heat_figure(
    pixels: UInt8[Tensor, "3 S S"], maps: Sequence[tuple[str, Float[Tensor, "H W"]]], title: str
) -> go.Figure:
    """Draw a picture, and over it where its cosine with each of some prompts comes from.

    Args:
        pixels: RGB, 0 to 255.
        maps: prompts with their maps; parts of one cosine each, on one colour scale.
        title: of the figure.
    """
    headings = ["the picture", *(f"{plain(name)}: {float(heat.sum()):+.2f}" for name, heat in maps)]
    figure = make_subplots(rows=1, cols=len(headings), subplot_titles=headings, horizontal_spacing=0.03)
    side = pixels.shape[-1]
    for column in range(1, len(headings) + 1):
        figure.add_image(z=pixels.permute(1, 2, 0).numpy(), hoverinfo="skip", row=1, col=column)
    most = max(float(heat.abs().max()) for _, heat in maps)
    for column, (_, heat) in enumerate(maps, start=2):
        high, wide = (side / size for size in heat.shape)
        figure.add_heatmap(
            z=heat.tolist(), x0=wide / 2 - 0.5, dx=wide, y0=high / 2 - 0.5, dy=high, opacity=0.65,
            coloraxis="coloraxis", hovertemplate="%{z:+.3f} of the cosine<extra></extra>", row=1, col=column,
        )  # fmt: skip
    figure.update_layout(
        **{**LAYOUT, "margin": {"l": 10, "r": 20, "t": 90, "b": 20}}, title=plain(title), height=360,
        coloraxis={"colorscale": SIGNED, "cmin": -most, "cmax": most, "cmid": 0,
                   "colorbar": {"title": "part of<br>the cosine"}},
    )  # fmt: skip
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure

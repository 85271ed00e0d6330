"""Pairs of sentences before and after a condition -> plotly figure.

Rows of a table carry their number as ``row``; every mark carries it on as ``customdata``, so that a click
finds its pair again.
"""

import textwrap

import plotly.graph_objects as go
import polars as pl

from workbench.figures import AMOUNTS, CHANGES, LAYOUT, SIGNED, plain

TOGETHER, PARTED, CHOSEN = "#0072B2", "#D55E00", "#009E73"
_QUADRANTS = {  # place of the label of each quadrant: x, y as shares of the axes, and its anchors
    "brought together": (0.01, 0.99, "left", "top"),
    "stays alike": (0.99, 0.99, "right", "top"),
    "stays apart": (0.01, 0.01, "left", "bottom"),
    "parted": (0.99, 0.01, "right", "bottom"),
}
_COSINE = "cosine (-1 to 1)"


def slopes_figure(movers: pl.DataFrame, condition: str, chosen: int | None = None) -> go.Figure:
    """Draw pairs as lines from their plain cosine to the conditioned one.

    Args:
        movers: rows to draw, as :func:`workbench.pair_changes.movers` gives them.
        condition: for the axis.
        chosen: row to mark; None for none.
    """
    figure = go.Figure()
    for name, colour, dash, kept in (
        ("more alike", TOGETHER, "solid", pl.col("change") >= 0),
        ("less alike", PARTED, "dash", pl.col("change") < 0),
    ):
        _add_lines(figure, movers.filter(kept), name, {"color": colour, "dash": dash, "width": 1.5})
    if chosen is not None:
        _add_lines(figure, movers.filter(row=chosen), "chosen", {"color": CHOSEN, "width": 5})
    figure.update_layout(**LAYOUT, title=f"The {movers.height} pairs that move most", height=480)
    figure.update_xaxes(
        tickvals=[0, 1], ticktext=["plain", plain(_shortened(condition, 30))], range=[-0.12, 1.12]
    )
    figure.update_yaxes(title=_COSINE)
    return figure


def _add_lines(figure: go.Figure, rows: pl.DataFrame, name: str, line: dict) -> None:
    if rows.is_empty():
        return
    told = _told(rows)
    figure.add_scatter(
        x=[0, 1, None] * rows.height,
        y=[value for row in rows.select("plain", "conditioned").iter_rows() for value in (*row, None)],
        customdata=[row for row in rows["row"] for _ in range(3)],
        text=[text for text in told for _ in range(3)],
        name=name, mode="lines+markers", line=line, marker={"size": 7},
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip


def quadrants_figure(changed: pl.DataFrame, condition: str, chosen: int | None = None) -> go.Figure:
    """Draw every pair's conditioned cosine over its plain one, in four fields around the two medians.

    Args:
        changed: as :func:`workbench.pair_changes.with_changes` gives it, with row and perhaps gold.
        condition: for the axis.
        chosen: row to mark; None for none.
    """
    gold = "gold" in changed.columns and changed["gold"].null_count() < changed.height
    colour = {"color": TOGETHER}
    if gold:
        colour = {"color": changed["gold"].to_list(), "colorscale": AMOUNTS, "cmin": 0, "cmax": 1,
                  "showscale": True, "colorbar": {"title": "gold<br>score", "thickness": 12}}  # fmt: skip
    figure = go.Figure()
    figure.add_scatter(
        x=changed["plain"].to_list(), y=changed["conditioned"].to_list(), customdata=changed["row"].to_list(),
        text=_told(changed), hovertemplate="%{text}<extra></extra>", mode="markers", showlegend=False,
        # Edges of a grey between the page's two papers: the darkest dots would be lost on the dark one.
        marker={"size": 7, "opacity": 0.75, "line": {"width": 0.5, "color": "#888888"}, **colour},
    )  # fmt: skip
    if chosen is not None:
        own = changed.filter(row=chosen)
        figure.add_scatter(
            x=own["plain"].to_list(), y=own["conditioned"].to_list(), mode="markers", name="chosen",
            marker={"symbol": "circle-open", "size": 18, "line": {"width": 4}, "color": CHOSEN},
            hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    middle = changed["plain"].median(), changed["conditioned"].median()
    figure.add_vline(x=middle[0], line_dash="dot", line_color="#888888")
    figure.add_hline(y=middle[1], line_dash="dot", line_color="#888888")
    counts = dict(changed["quadrant"].value_counts().iter_rows())
    for name, (x, y, left, top) in _QUADRANTS.items():
        figure.add_annotation(
            text=f"{name.replace(' ', '<br>')}: {counts.get(name, 0):,}", align=left, x=x, y=y,
            xref="paper", yref="paper", xanchor=left, yanchor=top, showarrow=False,
        )  # fmt: skip
    title = f"{changed.height:,} pairs; dotted: the medians"
    figure.update_layout(**{**LAYOUT, "margin": {**LAYOUT["margin"], "b": 60}}, title=title, height=480)
    figure.update_xaxes(title=f"plain {_COSINE}", zeroline=False)
    low, high = changed["conditioned"].min(), changed["conditioned"].max()
    room = 0.18 * max(high - low, 0.1)  # for the words in the corners, above and below all dots
    figure.update_yaxes(
        title=f"conditioned {_COSINE}<br>{plain(_shortened(condition, 40))}", zeroline=False,
        range=[low - room, high + room],
    )  # fmt: skip
    return figure


def separations_figure(found: pl.DataFrame, condition: str = "") -> go.Figure:
    """Draw how far every known condition moves one pair, the one that parts it most on top.

    Args:
        found: as :func:`workbench.pair_changes.separations` gives it.
        condition: a condition whose name is set in bold, if it is among them.
    """
    rows = found.to_dicts()
    labels = [plain(row["condition"]) for row in rows]
    figure = go.Figure(
        go.Bar(
            x=found["change"].to_list(), y=[*range(len(rows))], orientation="h",
            marker={"color": [PARTED if row["change"] < 0 else TOGETHER for row in rows],
                    "pattern": {"shape": ["/" if row["change"] < 0 else "" for row in rows]}},
            text=[f"{row['cosine']:.2f}" for row in rows],
            hovertext=[f"{label}<br>cosine {row['plain']:+.3f} plain, {row['cosine']:+.3f} under it"
                       f"<br>{row['less_alike']:.0%} of the other pairs are less alike under it"
                       for label, row in zip(labels, rows, strict=True)],
            hoverinfo="text", textposition="outside", cliponaxis=False, textfont={"size": 11},
        )
    )  # fmt: skip
    ticks = [
        f"<b>{label}</b>" if row["condition"] == condition else label
        for label, row in zip(labels, rows, strict=True)
    ]
    figure.update_layout(
        **{**LAYOUT, "margin": {**LAYOUT["margin"], "b": 60}}, height=140 + 22 * len(rows),
        title="What parts the chosen pair most",
    )  # fmt: skip
    figure.add_vline(x=0, line_color="#888888")
    # Room for the numbers at the ends of the bars: they would stand on the names.
    low, high = min([0.0, *found["change"]]), max([0.0, *found["change"]])
    room = 0.25 * (high - low)
    figure.update_xaxes(title="change of the cosine (-2 to 2)", range=[low - room, high + room])
    figure.update_yaxes(tickvals=[*range(len(rows))], ticktext=ticks, autorange="reversed")
    return figure


def cosines_figure(
    texts: list[str],
    values: list[list[float]],
    title: str,
    pairs: dict[tuple[int, int], int] | None = None,
    *,
    change: bool = False,
    chosen: tuple[int, int] | None = None,
) -> go.Figure:
    """Draw one matrix of cosines, or of their changes, of a few sentences that stand as numbers from 1.

    Cosines are always drawn from -1 to 1, so that a matrix before and one after share their colours; changes
    are drawn around zero, as far as the largest goes.

    Args:
        texts: the sentences, for the hover.
        values: one row per sentence.
        title: of the matrix.
        pairs: the row that a cell, given by its two places, belongs to.
        change: whether the values are changes.
        chosen: cell to frame; None for none.
    """
    limit = max((abs(value) for row in values for value in row), default=0) or 1 if change else 1
    places = [*range(len(texts))]
    told = [plain(_shortened(text, 80)) for text in texts]
    known, value = pairs or {}, "change %{z:+.3f}" if change else "cosine %{z:.3f}"
    figure = go.Figure(
        go.Heatmap(
            z=values, x=places, y=places, zmin=-limit, zmax=limit, zmid=0,
            colorscale=CHANGES if change else SIGNED,
            colorbar={"thickness": 12, "title": "change" if change else "cosine"},
            customdata=[[known.get((min(row, col), max(row, col)), -1) for col in places] for row in places],
            text=[[f"{row + 1}: {told[row]}<br>{col + 1}: {told[col]}" for col in places] for row in places],
            hovertemplate="%{text}<br>" + value + "<extra></extra>",
        )
    )  # fmt: skip
    for row, col in {chosen, chosen[::-1]} if chosen else ():
        figure.add_shape(
            type="rect", x0=col - 0.5, x1=col + 0.5, y0=row - 0.5, y1=row + 0.5,
            line={"color": CHOSEN, "width": 4},
        )  # fmt: skip
    figure.update_layout(
        **{**LAYOUT, "margin": {"l": 10, "r": 10, "t": 50, "b": 50}}, title=plain(_shortened(title, 30)),
        height=340,
    )  # fmt: skip
    numbers = [str(place + 1) for place in places]
    figure.update_xaxes(
        tickvals=places,
        ticktext=numbers,
        title="sentence",
        constrain="domain",
        showgrid=False,
        tickangle=0,
        tickfont={"size": 9},
    )
    figure.update_yaxes(
        tickvals=places, ticktext=numbers, autorange="reversed", scaleanchor="x", showgrid=False
    )
    return figure


def words_figure(words: list[str], added: list[float], title: str, told: str, limit: float) -> go.Figure:
    """Draw what each word adds to a cosine, in the order of reading.

    Args:
        words: as written.
        added: by each, in units of the cosine; below 0 it lowers it.
        title: whose words they are.
        told: below the title.
        limit: of the axis on both sides, shared by figures that stand beside each other.
    """
    places = [*range(len(words))]
    figure = go.Figure(
        go.Bar(
            x=added, y=places, orientation="h",
            marker={"color": [PARTED if value < 0 else TOGETHER for value in added],
                    "pattern": {"shape": ["/" if value < 0 else "" for value in added]}},
            text=[plain(word) for word in words], textposition="none",
            hovertemplate="%{text}: %{x:+.4f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(
        **{**LAYOUT, "margin": {"l": 10, "r": 10, "t": 70, "b": 50}}, height=150 + 17 * len(words),
        title=f"{plain(title)}<br><sub>{plain(told)}</sub>",
    )  # fmt: skip
    figure.add_vline(x=0, line_color="#888888")
    room = 1.05 * (limit or 1.0)
    figure.update_xaxes(title="added to the cosine (-2 to 2)", range=[-room, room], nticks=5)
    figure.update_yaxes(
        tickvals=places, ticktext=[plain(_shortened(word, 18)) for word in words],
        range=[len(words) - 0.5, -0.5], showgrid=False, tickfont={"size": 11},
    )  # fmt: skip
    return figure


def _told(rows: pl.DataFrame) -> list[str]:
    """Say about each pair what the hover shows: its texts where they may be shown, and its numbers."""
    found = []
    for row in rows.to_dicts():
        texts = [row[name] for name in ("sentence1", "sentence2") if row.get(name)]
        lines = [part for text in texts for part in textwrap.wrap(_shortened(text, 160), 60)]
        asked = [row["condition"]] if row.get("condition") else []
        gold = f", gold {row['gold']:.2f}" if row.get("gold") is not None else ""
        numbers = f"row {row['row']}: {row['plain']:+.3f} plain, {row['conditioned']:+.3f} conditioned{gold}"
        found.append("<br>".join(plain(line) for line in [*lines, *asked, numbers]))
    return found


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."

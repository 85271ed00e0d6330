"""Figures of geometry: what is drawn where, and that words in data are shown and never act."""

import polars as pl
import pytest
import torch

from workbench.figures import plain
from workbench.figures_geometry import (
    heat_figure,
    probes_figure,
    slices_figure,
    spread_figure,
    stitching_figure,
    word_pairs_figure,
    words_figure,
)
from workbench.geometry.attribution import Attribution, PairAttribution
from workbench.geometry.text_attribution import Words
from workbench.geometry.uniformity import uniform_sphere

HOSTILE = "<a href='http://example.invalid'>x</a> $y$"


def words(*texts: str) -> Words:
    owner = torch.arange(len(texts))
    return Words(list(texts), owner, torch.zeros(len(texts), 2), torch.zeros(len(texts), 2))


def titles(figure) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def test_alignment_is_drawn_over_uniformity_for_both_sides_and_both_kinds_of_pairs():
    table = pl.DataFrame(
        {
            "attribute": [HOSTILE, HOSTILE], "side": ["plain", "under its condition"],
            "alignment": [1.5, 0.3], "apart": [1.6, 2.1], "uniformity": [-3.0, -2.2], "pairs": [10, 10],
        }
    )  # fmt: skip
    figure = spread_figure(table, 384)
    marks = {trace.name: trace for trace in figure.data if trace.name}
    assert list(marks["under its condition: sentences that agree"].x) == [-2.2]
    assert list(marks["under its condition: sentences that agree"].y) == [0.3]
    assert list(marks["plain: sentences that differ"].y) == [1.6]
    assert marks["plain: sentences that agree"].text == (plain(HOSTILE),)
    assert figure.layout.shapes[0].x0 == uniform_sphere(384)


def test_slices_are_one_line_for_each_kind_and_depth():
    rows = [("plain", 3, 96, 0.1, 0.4), ("plain", 6, 96, 0.2, 0.8), ("conditioned", 6, 96, 0.6, 0.99)]
    figure = slices_figure(
        pl.DataFrame(rows, ["embeddings", "depth", "width", "spearman", "share"], orient="row")
    )
    assert [trace.name for trace in figure.data] == [
        "plain, after layer 3",
        "plain, after layer 6",
        "conditioned, after layer 6",
    ]
    assert [trace.y[0] for trace in figure.data] == [0.4, 0.8, 0.99]
    assert figure.layout.shapes[0].y0 == 0.97


def test_probes_are_coloured_by_their_change_around_zero_and_tell_the_control():
    rows = [
        {
            "condition": asked,
            "attribute": name,
            "accuracy": 0.5,
            "control": 0.25,
            "change": change,
            "count": 9,
        }
        for asked, change in ((None, 0.0), (HOSTILE, -0.2))
        for name in ("colour", "size")
    ]
    [heat] = probes_figure(pl.DataFrame(rows)).data
    assert heat.y == ("no condition", plain(HOSTILE))
    assert [list(row) for row in heat.z] == [[0.0, 0.0], [-0.2, -0.2]]
    assert heat.zmid == 0
    assert heat.zmin == -heat.zmax
    assert heat.text[1][0] == "0.50 (0.25)"


def test_stitching_is_one_panel_for_each_way_on_one_scale():
    rows = [
        {"kind": kind, "head": head, "encoder": encoder,
         "accuracy": None if kind == "absolute" and head != encoder else 0.9}
        for kind in ("absolute", "mapped", "relative")
        for head in ("a", HOSTILE)
        for encoder in ("a", HOSTILE)
    ]  # fmt: skip
    figure = stitching_figure(pl.DataFrame(rows))
    assert len(figure.data) == 3
    assert [list(row) for row in figure.data[0].text] == [["0.90", "-"], ["-", "0.90"]]
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert figure.data[0].x[1] == plain(HOSTILE)


def test_every_word_has_its_bar_also_when_it_comes_twice():
    found = Attribution(torch.tensor([0.2, -0.1, 0.3]), 0.9, 0.5)
    figure = words_figure({HOSTILE: (words("the", "red", "the"), found)})
    [bars] = figure.data
    assert list(bars.y) == pytest.approx([0.2, -0.1, 0.3])
    assert len(set(bars.x)) == 3
    assert figure.layout.xaxis.ticktext == ("the", "red", "the")
    assert bars.marker.color[0] == bars.marker.color[2] != bars.marker.color[1]
    assert titles(figure) == [f"{plain(HOSTILE)}: +0.50 without its words, +0.90 with them"]


def test_pairs_of_words_are_drawn_around_zero():
    found = PairAttribution(torch.tensor([[0.5, -0.8]]), 0.9, 1.2)
    figure = word_pairs_figure(words(HOSTILE), words("a", "b"), found, HOSTILE)
    [heat] = figure.data
    assert (heat.zmin, heat.zmax, heat.zmid) == (pytest.approx(-0.8), pytest.approx(0.8), 0)
    assert figure.layout.yaxis.ticktext == (plain(HOSTILE),)
    assert plain(HOSTILE) in figure.layout.title.text
    assert HOSTILE not in figure.to_json().encode().decode("unicode_escape")


def test_heat_lies_over_the_picture_where_it_belongs():
    heat = torch.tensor([[0.4, -0.1], [0.0, 0.1]])
    figure = heat_figure(torch.zeros(3, 8, 8, dtype=torch.uint8), [(HOSTILE, heat)], HOSTILE)
    pictures = [trace for trace in figure.data if trace.type == "image"]
    [drawn] = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(pictures) == 2
    # Two cells over eight pixels: 0 to 3 and 4 to 7, with the middles 1.5 and 5.5.
    assert (drawn.x0, drawn.dx) == (1.5, 4)
    assert titles(figure) == ["the picture", f"{plain(HOSTILE)}: +0.40"]
    assert figure.layout.coloraxis.cmin == pytest.approx(-0.4)

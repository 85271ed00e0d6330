"""Figures of image-text models: what is drawn where, and that words in data are shown and never act."""

import base64
from io import BytesIO

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from workbench.figures import FAMILY_COLOURS, family, history_figure, intervals_figure, sides_figure
from workbench.figures_images import (
    RIGHT,
    WRONG,
    counts_figure,
    layer_changes_figure,
    picture_grid,
    random_gaps_figure,
    scale_changes_figure,
    set_distances_figure,
    statistics_figure,
)

HOSTILE = "<a href='http://example.invalid'>x</a> $y$"
MODELS = [
    {"name": "siglip", "kind": "siglip", "generates": "norms", "mode": "replace"},
    {"name": "ours", "kind": "hyper", "generates": "norms", "mode": "replace"},
    {"name": "ours_too", "kind": "hyper", "generates": "norms", "mode": "replace"},
]


def metric(model, group, value, count=100, name="top1", split="test", seed=None):
    return {
        "model": model, "group": group, "value": value, "low": value - 0.1, "high": value + 0.2,
        "count": count, "metric": name, "split": split, "seed": seed,
    }  # fmt: skip


def sheet(figure):
    """Return the figure's one raster image."""
    source = figure.data[0].source
    return Image.open(BytesIO(base64.b64decode(source.split(",")[1])))


def pictures(count, size=8):
    return torch.full((count, 3, size, size), 100, dtype=torch.uint8)


# --- pictures in a grid -------------------------------------------------------------------------------------


def test_a_frame_says_whether_a_picture_was_classified_right():
    figure = picture_grid(pictures(2), ["one", "two"], right=[True, False])
    image = sheet(figure)
    colours = ["#{:02X}{:02X}{:02X}".format(*image.getpixel((left + 1, 1))) for left in (0, 146)]
    assert colours == [RIGHT, WRONG]
    assert image.getpixel((56, 56)) == (100, 100, 100)


def test_without_marks_a_picture_fills_its_place():
    assert sheet(picture_grid(pictures(1), ["one"])).getpixel((1, 1)) == (100, 100, 100)


def test_a_full_row_and_a_new_heading_both_start_a_new_row():
    figure = picture_grid(pictures(4), list("abcd"), columns=2, headings=["x", "x", "x", "y"])
    places = {note.text: (note.x, note.y) for note in figure.layout.annotations}
    assert places["a"][1] == places["b"][1] < places["c"][1] < places["<b>y</b>"][1] < places["d"][1]
    assert places["a"][0] == places["c"][0] == places["d"][0] < places["b"][0]
    assert [note.text for note in figure.layout.annotations].count("<b>x</b>") == 1


def test_words_below_and_above_pictures_are_shown_as_they_are():
    figure = picture_grid(pictures(1), [HOSTILE], headings=[HOSTILE], title=HOSTILE)
    texts = [note.text for note in figure.layout.annotations] + [figure.layout.title.text]
    assert len(texts) == 3
    for text in texts:
        assert "<a" not in text
        assert "$" not in text


def test_long_captions_are_wrapped_and_cut():
    note = picture_grid(pictures(1), ["word " * 100]).layout.annotations[0]
    lines = note.text.split("<br>")
    assert len(lines) == 8
    assert max(map(len, lines)) <= 24
    assert lines[-1].endswith("…")
    assert picture_grid(pictures(1), ["one\n\ntwo"]).layout.annotations[0].text == "one<br><br>two"


def test_no_picture_is_an_empty_figure():
    assert sheet(picture_grid(pictures(0), [])).height == 1


def test_a_grid_fits_the_width_of_a_page():
    assert picture_grid(pictures(7), ["x"] * 7).layout.width <= 760


# --- norms by layer -----------------------------------------------------------------------------------------

CHANGES = pl.DataFrame(
    [
        {"set": one, "layer": f"trunk.{layer}", "part": part, "mean_absolute": abs(value), "mean": value}
        for one, sign in (("colour", 1), (HOSTILE, -2))
        for layer, value in (("bn1", sign * 0.5), ("blocks.0.bn1", sign * 0.25))
        for part in ("scale", "shift")
    ]
)


def test_every_class_set_is_one_line_in_each_panel():
    figure = layer_changes_figure(CHANGES)
    assert [(line.xaxis, tuple(line.x), tuple(line.y)) for line in figure.data] == [
        ("x", ("bn1", "blocks.0.bn1"), (0.5, 0.25)),
        ("x2", ("bn1", "blocks.0.bn1"), (0.5, 0.25)),
        ("x", ("bn1", "blocks.0.bn1"), (1.0, 0.5)),
        ("x2", ("bn1", "blocks.0.bn1"), (1.0, 0.5)),
    ]
    assert [line.showlegend for line in figure.data] == [True, False, True, False]
    assert "<a" not in figure.data[2].name


def test_changes_are_drawn_on_maps_centred_on_zero():
    upper, lower = scale_changes_figure(CHANGES).data
    assert upper.z.tolist() == [[0.5, 0.25], [-1.0, -0.5]]
    # means over the two sets are -0.25 and -0.125
    assert lower.z.tolist() == [[0.75, 0.375], [-0.75, -0.375]]
    assert (upper.zmin, upper.zmax, lower.zmin, lower.zmax) == (-1.0, 1.0, -0.75, 0.75)
    assert "<a" not in upper.y[1]


def test_a_generator_that_changes_nothing_draws_too():
    still = CHANGES.with_columns(pl.lit(0.0).alias("mean"))
    assert scale_changes_figure(still).data[0].zmax == 1.0


def test_statistics_are_drawn_by_layer_with_agreement_marked():
    rows = pl.DataFrame({"layer": ["trunk.a", "trunk.b", "trunk.b"], "ratio": [0.5, 1.0, 2.0]})
    figure = statistics_figure({HOSTILE: rows})
    assert tuple(figure.data[0].x) == ("a", "b", "b")
    assert figure.layout.shapes[0].y0 == 1
    assert "<a" not in figure.data[0].name


def test_distances_are_drawn_as_they_are():
    figure = set_distances_figure(
        ["one", HOSTILE], torch.tensor([[0.0, 2.5], [2.5, 0.0]], dtype=torch.float64)
    )
    assert figure.data[0].z.tolist() == [[0.0, 2.5], [2.5, 0.0]]
    assert "<a" not in figure.data[0].x[1]


# --- models beside each other -------------------------------------------------------------------------------


def test_each_kind_of_image_text_model_has_a_colour():
    about = {"generates": "norms", "mode": "replace"}
    found = {
        name: family({**about, **more})
        for name, more in {
            "chance": {"kind": "chance"},
            "siglip": {"kind": "siglip"},
            "control": {"kind": "token_control"},
            "adapter": {"kind": "adapter"},
            "replace": {"kind": "hyper"},
            "residual": {"kind": "hyper", "mode": "residual"},
            "kernels": {"kind": "hyper", "generates": "convolutions", "mode": "residual"},
        }.items()
    }
    assert found == {
        "chance": "no training",
        "siglip": "baseline",
        "control": "same machinery, told nothing",
        "adapter": "same machinery, told nothing",
        "replace": "generated norms",
        "residual": "generated norms, added to trained ones",
        "kernels": "generated kernels or projection",
    }
    assert set(found.values()) <= set(FAMILY_COLOURS)


def test_groups_that_are_too_small_are_drawn_hollow_and_named_so():
    rows = [metric(one["name"], group, 0.5, count) for one in MODELS
            for group, count in (("region=Asia", 100), ("region=Africa", 9))]  # fmt: skip
    figure = intervals_figure(pl.DataFrame(rows), MODELS, "top1", "region", smallest=30)
    assert figure.layout.yaxis.ticktext == ("Asia (100)", "Africa (9, too few)")
    assert tuple(figure.data[0].marker.symbol) == ("circle", "circle-open")
    assert tuple(figure.data[2].marker.symbol) == ("diamond", "diamond-open")  # of a family that has a circle
    assert "fewer than 30" in figure.layout.title.text


def test_differences_to_the_reference_stand_in_a_panel_of_their_own():
    rows = [metric(one["name"], "region=Asia", 0.5) for one in MODELS]
    rows += [metric("ours", "region=Asia", 0.25, name="top1_minus_siglip")]
    figure = intervals_figure(pl.DataFrame(rows), MODELS, "top1", "region", reference="siglip")
    right = [(dots.name, tuple(dots.x)) for dots in figure.data if dots.xaxis == "x2" and len(dots.x)]
    assert right == [("ours", (0.25,))]
    drawn = next(dots for dots in figure.data if dots.xaxis == "x2" and len(dots.x))
    assert (drawn.error_x.array[0], drawn.error_x.arrayminus[0]) == pytest.approx((0.2, 0.1))


def test_a_guess_has_no_place_among_differences():
    models = [{"name": "chance", "kind": "chance"}, *MODELS]
    rows = [metric(one["name"], "region=Asia", 0.5) for one in models]
    rows += [metric(one, "region=Asia", -0.4, name="top1_minus_siglip") for one in ("chance", "ours")]
    figure = intervals_figure(pl.DataFrame(rows), models, "top1", "region", reference="siglip")
    drawn = {panel: {dots.name for dots in figure.data if dots.xaxis == panel and len(dots.x)}
             for panel in ("x", "x2")}  # fmt: skip
    assert drawn == {"x": {"chance", "siglip", "ours", "ours_too"}, "x2": {"ours"}}


def test_losses_have_the_colour_of_a_models_family_and_a_dash_each():
    cards = [{"model": one["name"], "seed": seed, "settings": one, "history": [{"epoch": 1, "loss": 2.0}]}
             for one in MODELS for seed in (0, 1)]  # fmt: skip
    drawn = history_figure(cards, ["ours", "ours_too"]).data
    lines = [(line.name, line.line.color, line.line.dash) for line in drawn]
    blue = FAMILY_COLOURS["generated norms"]
    assert lines == [("ours", blue, "solid"), ("ours_too", blue, "dash")]


def test_models_of_a_group_never_cover_each_other():
    rows = [metric(one["name"], group, 0.5) for one in MODELS for group in ("region=Asia", "region=Africa")]
    figure = intervals_figure(pl.DataFrame(rows), MODELS, "top1", "region")
    heights = sorted(height for dots in figure.data for height in dots.y)
    assert len(set(heights)) == 6
    assert [round(height) for height in heights] == [0, 0, 0, 1, 1, 1]


def test_groups_of_another_column_split_or_seed_are_left_out():
    rows = [
        metric("ours", "region=Asia", 0.5),
        metric("ours", "regions=x", 0.1),
        metric("ours", "region=Asia", 0.2, split="valid"),
        metric("ours", "region=Asia", 0.3, seed=1),
    ]
    figure = intervals_figure(pl.DataFrame(rows), MODELS, "top1", "region")
    assert [tuple(dots.x) for dots in figure.data if len(dots.x)] == [(0.5,)]


def test_side_reports_stand_below_what_is_used_and_leave_families_out():
    rows = [metric("siglip", "all", 0.3), metric("ours", "all", 0.5), metric("ours", "side=neutral", 0.4),
            metric("ours", "side=neutral, held out", 0.1)]  # fmt: skip
    figure = sides_figure(pl.DataFrame(rows), MODELS, "siglip")
    (dots,) = figure.data
    assert tuple(dots.x) == (0.5, 0.4)
    assert figure.layout.yaxis.ticktext[1] == "neutral"
    assert figure.layout.shapes[0].x0 == 0.3


def test_a_group_named_by_others_is_shown_as_it_is():
    rows = [metric("ours", f"region={HOSTILE}", 0.5)]
    figure = intervals_figure(pl.DataFrame(rows), MODELS, "top1", "region")
    assert "<a" not in figure.layout.yaxis.ticktext[0]
    assert "$" not in figure.layout.yaxis.ticktext[0]


def test_pairs_that_do_not_occur_are_written_as_zero():
    counts = pl.DataFrame({"row": ["a", "b"], "column": ["x", "y"], "count": [1200, 3]})
    (drawn,) = counts_figure(counts, "row", "column", "title").data
    assert np.array(drawn.text).tolist() == [["1,200", "0"], ["0", "3"]]


def test_a_gap_stands_beside_that_of_random_groups():
    gaps = pl.DataFrame({"model": ["ours"], "gap": [0.2], "random": [0.1], "random_high": [0.15]})
    bar, dot = random_gaps_figure(gaps, "region").data
    assert (tuple(bar.x), tuple(dot.x)) == ((0.15,), (0.2,))

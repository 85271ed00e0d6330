"""Figures of a zoo of encoders: what is drawn where, and that names from data are shown and never act."""

import numpy as np
import polars as pl
import pytest

from workbench.figures import FAMILY_COLOURS
from workbench.figures_zoo import agreement_figure, cost_figure, pair_matrix_figure, scale_figure
from workbench.figures_zoo_live import budget_figure, onboarding_figure, poster_figure

HOSTILE = "<a href='http://example.invalid'>x</a> $y$"
MODELS = [
    {"name": "chance", "kind": "chance"},
    {"name": "grid", "kind": "ape"},
    {"name": "grid_large", "kind": "ape"},
    {"name": "made", "kind": "hyper_align"},
    {"name": "solved", "kind": "cca"},
]


def score(model, image, value, text="words", split="test", seed=0, **more):
    about = {"image_width": 128, "image_parameters": 0, "control": False, **more}
    sides = {"t2i_recall_at_10": value, "i2t_recall_at_10": value}
    return {"model": model, "seed": seed, "split": split, "text": text, "image": image, **about, **sides}


def row(model, metric, value, group="all"):
    return {
        "model": model, "metric": metric, "value": value, "low": value - 0.1, "high": value + 0.2,
        "group": group, "count": 4, "seed": None, "split": "test",
    }  # fmt: skip


def frame(rows):
    return pl.DataFrame(rows, infer_schema_length=None)


@pytest.fixture
def scores():
    """Two image encoders and a control; one of the ways was tried with one text encoder only."""
    rows = []
    for model, (one, two) in {"grid": (0.4, 0.6), "made": (0.5, 0.2), "grid_large": (0.7, 0.1)}.items():
        for split in ("valid", "test"):
            for text in ("words", HOSTILE)[: 1 if model == "grid_large" else 2]:
                shift = 0.0 if text == "words" else 0.1
                rows += [score(model, "a", one - shift, text, split), score(model, HOSTILE, two, text, split)]
                rows.append(score(model, "copy", 0.9, text, split, control=True))
    return frame(rows)


def texts_of(figure):
    """Everything of a figure that a browser would read as markup."""
    layout = figure.layout
    found = [layout.title.text, *(note.text for note in layout.annotations)]
    found += [label for axis in figure.select_xaxes() for label in axis.ticktext or ()]
    found += [label for axis in figure.select_yaxes() for label in axis.ticktext or ()]
    for trace in figure.data:
        found += [trace.name, *np.ravel(trace.text if trace.text is not None else [])]
        found += [trace.hovertemplate, *np.ravel(trace.customdata if trace.customdata is not None else [])]
    return [text for text in found if isinstance(text, str)]


def check_plain(figure):
    shown = " ".join(texts_of(figure))
    assert "<a" not in shown
    assert "$" not in shown
    assert "&lt;a" in shown


# --- pairs --------------------------------------------------------------------------------------------------


def test_encoders_stand_in_the_references_order_and_controls_below_a_gap(scores):
    figure = pair_matrix_figure(scores, "made", "grid")
    labels = figure.layout.yaxis.ticktext
    assert [label[:4] for label in labels] == ["&lt;", "a", "", "copy"]
    assert figure.layout.yaxis.range == (3.5, -0.5)
    assert [*map(list, figure.data[0].text)] == [["0.20"] * 2, ["0.50", "0.40"], ["", ""], ["0.90"] * 2]


def test_the_best_pair_is_framed_and_is_no_control(scores):
    figure = pair_matrix_figure(scores, "made", "grid")
    (frame_of_best,) = figure.layout.shapes
    assert (frame_of_best.x0, frame_of_best.y0) == (-0.5, 0.5)  # first text, second row
    assert "words and a, 0.500" in figure.layout.title.text


def test_differences_to_the_reference_are_centred_on_zero(scores):
    values, change = pair_matrix_figure(scores, "made", "grid").data
    assert change.z[:2].astype(float).tolist() == pytest.approx(np.array([[-0.4, -0.4], [0.1, 0.1]]))
    assert (change.zmin, change.zmax, change.zmid) == pytest.approx((-0.4, 0.4, 0.0))
    assert (values.zmin, values.zmax) == (0, 0.5)  # of encoders: the control's 0.9 would leave one colour


def test_a_pair_that_was_not_tried_stays_empty(scores):
    values, change = pair_matrix_figure(scores, "grid_large", "grid").data
    assert list(values.text[0]) == ["0.10", ""]
    assert values.z[0][1] is None
    assert change.z[0][1] is None


def test_the_reference_has_no_differences_to_itself(scores):
    figure = pair_matrix_figure(scores, "grid", "grid")
    assert len(figure.data) == 1
    assert tuple(figure.layout.xaxis.domain) == (0, 0.48)


def test_one_text_encoder_and_no_control_draw_too(scores):
    few = scores.filter(~pl.col("control"), text="words")
    figure = pair_matrix_figure(few, "made", "grid")
    assert figure.data[0].z.shape == (2, 1)
    assert figure.layout.yaxis.title.text == "image encoder"


def test_names_of_encoders_in_a_map_are_shown_as_they_are(scores):
    check_plain(pair_matrix_figure(scores, "made", "grid"))


# --- cost ---------------------------------------------------------------------------------------------------


@pytest.fixture
def metrics():
    group = f"text={HOSTILE}"
    rows = [row("chance", "recall_at_10", 0.1), row("chance", "recall_at_10", 0.1, group)]
    for model, value, flops in (("grid", 0.5, 1e9), ("made", 0.4, 1e8), ("solved", 0.6, 1e7)):
        rows += [row(model, "recall_at_10", value), row(model, "recall_at_10", value, group)]
        rows += [row(model, "rank_agreement", value)]
        rows += [row(model, "flops_per_pair", flops, "cost"), row(model, "seconds_per_pair", 1.5, "cost")]
    rows += [row("grid_large", "recall_at_10", 0.7, group), row("grid_large", "rank_agreement", 0.3, group)]
    rows += [
        row("grid_large", "flops_per_pair", 1e10, "cost"),
        row("grid_large", "seconds_per_pair", 9, "cost"),
    ]
    return frame(rows)


def test_every_way_is_a_point_with_its_interval_in_its_familys_colour(metrics):
    figure = cost_figure(metrics, MODELS)
    points = {dot.text[0]: dot for dot in figure.data}
    assert {name: (dot.x[0], dot.y[0]) for name, dot in points.items()} == {
        "grid": (pytest.approx(1e9), 0.5),
        "made": (pytest.approx(1e8), 0.4),
        "solved": (pytest.approx(1e7), 0.6),
    }  # fmt: skip
    assert (points["made"].error_y.array[0], points["made"].error_y.arrayminus[0]) == pytest.approx(
        (0.2, 0.1)
    )
    assert points["made"].marker.color == FAMILY_COLOURS["connectors generated from a code"]
    assert "1.50 s a pair" in points["made"].hovertemplate
    assert figure.layout.xaxis.type == "log"
    assert "per pair" in figure.layout.xaxis.title.text


def test_what_costs_nothing_is_a_line(metrics):
    figure = cost_figure(metrics, MODELS)
    (line,) = figure.layout.shapes
    assert line.y0 == line.y1 == 0.1
    assert figure.layout.annotations[0].text == "chance"


def test_a_way_that_misses_pairs_is_named_and_drawn_with_those_it_has(metrics):
    assert "grid_large" in cost_figure(metrics, MODELS).layout.title.text
    figure = cost_figure(metrics, MODELS, group=f"text={HOSTILE}")
    assert "grid_large" in {dot.text[0] for dot in figure.data}
    assert "not tried" not in figure.layout.title.text
    check_plain(figure)


def test_names_of_near_points_are_set_on_different_sides():
    rows = []
    for name, value in zip("abcde", (0.5, 0.501, 0.502, 0.503, 0.9), strict=True):
        rows += [row(name, "recall_at_10", value), row(name, "flops_per_pair", 1e9, "cost")]
        rows.append(row(name, "seconds_per_pair", 1, "cost"))
    figure = cost_figure(frame(rows), [{"name": name, "kind": "ridge"} for name in "abcde"])
    assert len({dot.textposition for dot in figure.data[:-1]}) >= 2


def test_a_metric_that_is_undefined_for_all_draws_an_empty_figure(metrics):
    assert len(cost_figure(metrics, MODELS, "nothing").data) == 0


# --- scale --------------------------------------------------------------------------------------------------


def test_each_way_is_a_line_over_the_number_of_encoders(scores):
    figure = scale_figure(scores, MODELS)
    lines = {line.name: (tuple(line.x), tuple(line.y)) for line in figure.data}
    assert lines["grid"] == ((1, 2), pytest.approx((0.5, 0.6)))  # 0.4 and 0.6, then the better
    assert set(lines) == {"grid", "grid_large", "made"}
    assert figure.layout.xaxis.title.text == "N image encoders<br>to choose from"


def test_groups_of_encoders_stand_beside_the_lines(scores):
    wide = pl.when(pl.col("image") == "a").then(1000).otherwise(128)
    figure = scale_figure(scores.with_columns(image_width=wide), MODELS)
    assert figure.layout.xaxis2.ticktext == (
        "65 to 512<br>numbers<br>wide (1)",
        "513 to<br>1,024<br>numbers<br>wide (1)",
    )
    dots = next(dots for dots in figure.data if dots.name == "made" and dots.mode == "markers")
    assert dots.y == pytest.approx((0.2, 0.5))
    assert [round(place) for place in dots.x] == [0, 1]


# --- agreement ----------------------------------------------------------------------------------------------


def test_each_family_has_a_panel_and_each_way_its_agreement_in_the_legend(scores, metrics):
    figure = agreement_figure(scores, metrics, MODELS, "grid")
    drawn = {dots.name: dots for dots in figure.data}
    assert [name.split(":")[0] for name in drawn] == ["grid_large", "made", "solved"]
    assert "made: 0.40" in drawn
    (limited,) = (name for name in drawn if name.startswith("grid_large"))
    assert limited.startswith("grid_large: 0.30, text &lt;a")
    assert len({dots.xaxis for dots in figure.data}) == 3
    pairs = sorted(zip(drawn["made: 0.40"].x, drawn["made: 0.40"].y, strict=True))
    assert np.array(pairs) == pytest.approx(np.array([(0.3, 0.4), (0.4, 0.5), (0.6, 0.2), (0.6, 0.2)]))
    check_plain(figure)


def test_panels_share_their_limits_and_show_where_both_are_equal(scores, metrics):
    figure = agreement_figure(scores, metrics, MODELS, "grid")
    ranges = {axis.range for axis in (*figure.select_xaxes(), *figure.select_yaxes())}
    assert len(ranges) == 1
    assert len([line for line in figure.layout.shapes if line.x1 == line.y1]) == 3


# --- live ---------------------------------------------------------------------------------------------------


def test_the_posters_count_is_drawn_per_encoder():
    counted = pl.DataFrame(
        {"way": ["APE, all", "closed form"], "per_encoder": [20.0, 0.5], "saving": [1.0, 40.0]}
    )
    (bars,) = poster_figure(counted).data
    assert tuple(bars.x) == (20.0, 0.5)
    assert bars.text == ("20.00 (1 / 1.0)", "0.50 (1 / 40.0)")
    assert bars.marker.color[0] == FAMILY_COLOURS["each pair trained alone"]


def test_budgets_are_lines_with_the_epochs_at_their_points():
    found = pl.DataFrame({"model": ["made", "made", "solved"], "epochs": [1, 5, 0], "flops": [10, 50, 20],
                          "value": [0.1, 0.3, 0.4]})  # fmt: skip
    made, solved = budget_figure(found, MODELS[3:]).data
    assert (tuple(made.x), tuple(made.text)) == ((10, 50), ("1", "5"))
    assert (tuple(solved.text), solved.marker.symbol) == (("solved",), "square")


def test_what_a_newcomer_gets_is_drawn_by_encoder_with_the_floor():
    ways = ["hypernetwork, never told of it", "connector of its own, 1 epoch", "closed form"]
    found = pl.DataFrame([{"newcomer": name, "way": way, "epochs": place == 1, "value": 0.1 * place}
                          for name in ("a", HOSTILE) for place, way in enumerate(ways)])  # fmt: skip
    figure = onboarding_figure(found.with_columns(pl.col("epochs").cast(pl.Int64)), 0.02)
    assert [dots.name for dots in figure.data] == ways
    assert [[round(place) for place in dots.y] for dots in figure.data] == [[0, 1]] * 3
    assert figure.layout.shapes[0].x0 == 0.02
    check_plain(figure)

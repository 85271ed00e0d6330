"""Places and agreement against scikit-learn, which computes the same in more time."""

import json

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize

from workbench.figures import PALETTE
from workbench.figures_texts import moved_figure
from workbench.model import HyperCL
from workbench.moved import ConditionedTexts, Moved, two_axes


def drawn(rows, seed):
    """Unit vectors whose variances differ, so that axes have an order."""
    wide = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)) * torch.arange(6, 0, -1)
    return normalize(wide + seed, dim=1)


class Drawn(HyperCL):
    """One draw for the plain side, one for every condition."""

    def __init__(self):
        """Nothing is loaded."""

    def prepare(self, texts, told=None):
        return texts

    def encode(self, texts, condition, strength=1.0):
        return drawn(len(texts), int(strength))


def texts_of(rows):
    return ConditionedTexts(Drawn(), pl.DataFrame({"text": [f"text {row}" for row in range(rows)]}))


@pytest.mark.parametrize("rows", [30, 1500])  # all are fitted on, and some of many
def test_the_map_shows_the_principal_components_of_both_sides(rows):
    moved = texts_of(rows).move("the kind")
    sides = [(side - side.mean(0)).numpy() for side in (moved.before, moved.after)]
    some = np.linspace(0, rows - 1, min(1000, rows)).astype(int)
    fitted = PCA(2, svd_solver="full").fit(np.vstack([side[some] for side in sides]))
    for side, (x, y) in zip(sides, (("x0", "y0"), ("x1", "y1")), strict=True):
        expected = fitted.transform(side)
        found = moved.frame.select(x, y).to_numpy()
        turned = np.sign((found * expected).sum(0))  # which end of an axis is up is nobody's truth
        np.testing.assert_allclose(found * turned, expected, atol=1e-5)
    assert moved.shown == pytest.approx(fitted.explained_variance_ratio_.sum(), abs=1e-5)


def test_the_plain_side_is_the_same_object_whatever_is_asked():
    texts = texts_of(30)
    assert texts.move("the kind").before is texts.move("the size").before


@pytest.mark.parametrize("rows", [12, 300])
def test_purity_is_the_share_that_scikit_learns_neighbours_agree(rows):
    frame = pl.DataFrame({"kind": ["a", "b", "c"] * (rows // 3)})
    before, after = drawn(rows, 2), drawn(rows, 3)
    found = Moved(frame, before, after, 0.0).purity("kind")
    for side, row in zip((before, after), found.to_dicts(), strict=True):
        near = NearestNeighbors(n_neighbors=10).fit(side.numpy()).kneighbors(return_distance=False)
        values = frame["kind"].to_numpy()
        agree = (values[near] == values[:, None]).mean(1)
        assert row["value"] == pytest.approx(agree.mean())
        resampled = np.random.default_rng(0).choice(agree, (500, rows)).mean(1)
        assert (row["low"], row["high"]) == pytest.approx(np.quantile(resampled, [0.025, 0.975]))


@pytest.mark.parametrize("rows", [30, 4100])  # lines and circles, and what the graphics card draws
def test_the_unchecked_map_is_one_that_plotly_accepts(rows):
    frame = (
        texts_of(rows).move("the kind").frame.with_columns(kind=pl.Series(["a", "b<i>", None] * rows)[:rows])
    )
    figure = moved_figure(frame, "kind", ("the <b>kind</b>", "both hold 50%"), 3)
    accepted = go.Figure(figure.to_dict())
    assert json.loads(accepted.to_json()) == json.loads(figure.to_json())


@pytest.mark.parametrize("rank", [0, 1, 2, 12])
def test_two_axes_are_the_last_two_of_a_whole_decomposition(rank):
    rows = np.random.default_rng(rank).normal(size=(rank, 12)).astype(np.float32)
    covariance = rows.T @ rows
    variances, axes = two_axes(covariance)
    whole = np.linalg.eigvalsh(covariance.astype(np.float64))
    assert variances == pytest.approx(whole[-2:], abs=1e-4)
    assert axes.T @ axes == pytest.approx(np.eye(2), abs=1e-5)
    assert covariance @ axes == pytest.approx(axes * variances, abs=1e-4)
    assert (variances.dtype, axes.dtype) == (np.float32, np.float32)


def test_values_that_are_colours_are_drawn_in_their_own():
    values = ["white", "Blue", None, "black", "yellow"]
    frame = texts_of(30).move("the kind").frame.with_columns(kind=pl.Series(values * 6))
    looks = {one.name: one.marker for one in moved_figure(frame, "kind", ("", ""), None).data[1:]}
    assert looks["white"].color == "#FFFFFF"
    assert looks["white"].line.width == 1  # else it would vanish on a light page
    assert (looks["Blue"].color, looks["Blue"].line.width) == (PALETTE[0], None)
    assert looks["not said"].color == "#cccccc"


def test_beyond_eight_values_shapes_change_and_one_word_that_is_no_colour_takes_the_palette():
    values = ["red", *(f"value {number}" for number in range(9))]
    frame = texts_of(30).move("the kind").frame.with_columns(kind=pl.Series(values * 3))
    looks = [one.marker for one in moved_figure(frame, "kind", ("", ""), None).data[1:]]
    assert [look.color for look in looks] == [*PALETTE, *PALETTE[:2]]
    assert [look.symbol for look in looks] == ["circle"] * 8 + ["diamond"] * 2

"""Alignment and uniformity on points whose distances are known, and on the uniform sphere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from torch.nn.functional import normalize

from workbench.errors import DataError
from workbench.geometry.uniformity import alignment, placement, spaced, uniform_sphere, uniformity

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=40, deadline=None, database=None)


def drawn(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_alignment_by_hand():
    # (1, 0) with (0, 3): |(1, -1)|^2 = 2; (2, 0) with (5, 0): 0. Their mean is 1, of distances sqrt(2) / 2.
    first, second = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 3.0], [5.0, 0.0]])
    assert float(alignment(first, second)) == pytest.approx(1)
    assert float(alignment(first, second, power=1.0)) == pytest.approx(math.sqrt(2) / 2)


def test_uniformity_by_hand():
    # Three points at right angles or opposite: squared distances 2, 4, 2.
    points = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert float(uniformity(points)) == pytest.approx(expected, rel=1e-5)
    # With t = 1 the exponents halve.
    assert float(uniformity(points, 1.0)) == pytest.approx(
        math.log((2 * math.exp(-2) + math.exp(-4)) / 3), rel=1e-5
    )


def test_identical_points_give_zero_and_zero():
    points = torch.ones(5, 3, dtype=torch.double)
    assert float(alignment(points, points)) == 0
    assert float(uniformity(points)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("width", [2, 8, 64])
def test_points_drawn_evenly_reach_the_value_of_the_uniform_sphere(width):
    assert float(uniformity(drawn(4000, width))) == pytest.approx(uniform_sphere(width), abs=1e-2)


def test_the_lowest_value_nears_minus_two_t_with_the_width():
    assert uniform_sphere(100_000) == pytest.approx(-4, abs=1e-3)
    assert uniform_sphere(100_000, 3.0) == pytest.approx(-6, abs=1e-3)
    assert uniform_sphere(3) > uniform_sphere(30) > uniform_sphere(300) > -4


def test_blocks_of_rows_count_every_pair_once():
    points = drawn(2300, 4)  # three blocks
    squares = pdist(normalize(points, dim=1).numpy()) ** 2
    expected = math.log(torch.from_numpy(squares).mul(-2).exp().mean())
    assert float(uniformity(points)) == pytest.approx(expected, rel=1e-9)


@quick
@given(st.integers(2, 12), st.integers(2, 6), st.integers(0, 10_000))
def test_turning_and_stretching_change_neither_and_both_stay_in_range(count, width, seed):
    points, others = drawn(count, width, seed), drawn(count, width, seed + 1)
    turn = torch.linalg.qr(drawn(width, width, seed + 2)).Q
    for measure, inputs in ((uniformity, (points,)), (alignment, (points, others))):
        value = float(measure(*inputs))
        assert float(measure(*(3 * rows @ turn for rows in inputs))) == pytest.approx(value, abs=1e-9)
    assert -8 <= float(uniformity(points)) <= 1e-9
    assert 0 <= float(alignment(points, others)) <= 4 + 1e-9


def test_both_have_finite_gradients_where_positives_are_equal():
    points = drawn(4, 3).requires_grad_()
    (alignment(points, points.detach()) + uniformity(points)).backward()
    assert points.grad.isfinite().all()
    assert points.grad.norm() > 0


def test_a_step_against_uniformity_spreads_points():
    points = normalize(drawn(64, 8) + 3, dim=1).requires_grad_()
    before = uniformity(points)
    before.backward()
    assert float(uniformity(points.detach() - points.grad)) < before.item()


def test_too_few_rows_are_refused():
    with pytest.raises(DataError, match="give at least 2"):
        uniformity(torch.ones(1, 3))
    with pytest.raises(DataError, match="at least one positive pair"):
        alignment(torch.ones(0, 3), torch.ones(0, 3))


def test_a_card_says_both_and_how_many_rows_they_are_of():
    first, second = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 3.0], [5.0, 0.0]])
    found = placement(first, second, torch.cat([first, second, -first]))
    assert found["alignment"] == pytest.approx(1)  # as above
    points = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0], [-1, 0], [-1, 0]])
    assert found["uniformity"] == pytest.approx(float(uniformity(points)))
    assert (found["positives"], found["rows"]) == (2, 6)
    # No positives and a single point leave nothing to say.
    assert placement(first[:0], second[:0], first[:1]) == {
        "alignment": None, "positives": 0, "uniformity": None, "rows": 1
    }  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 7, 2048, 2049, 100_000])
def test_rows_that_are_shown_are_all_or_evenly_spaced_from_first_to_last(count):
    rows = spaced(count)
    assert len(rows) == min(count, 2048) == len(rows.unique())
    if count:
        assert (int(rows[0]), int(rows[-1])) == (0, count - 1)
    if count > 1:
        assert rows.diff().max() - rows.diff().min() <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_no_numbers_are_named(bad):
    good, rows = drawn(6, 4), drawn(6, 4, seed=1)
    rows[4, 0] = bad
    with pytest.raises(DataError, match="first side of the positives, row 4: the vector holds NaN"):
        alignment(rows, good)
    with pytest.raises(DataError, match="second side of the positives, row 4"):
        alignment(good, rows)
    with pytest.raises(DataError, match="embedding, row 4"):
        uniformity(rows)
    with pytest.raises(DataError, match="embedding, row 4"):
        placement(good[:0], good[:0], rows)

"""Whitening against scikit-learn, and what it does to skewed and to even spaces."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from workbench.errors import DataError
from workbench.geometry.whitening import mean_cosine, moments_of, whitening

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=30, deadline=None, database=None)


def skewed(count: int = 400, width: int = 6, seed: int = 0) -> torch.Tensor:
    """Rows far from the origin, most of their variance in one direction."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.tensor([20.0, *[1.0] * (width - 1)])
    mixed = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
    return torch.randn(count, width, generator=draw) * spread @ mixed + 5


def test_whitening_by_hand():
    # Two directions that are already apart: means 1 and 4, variances 1 and 16, the larger one first.
    rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 8.0], [2.0, 8.0]])
    found = whitening(moments_of(rows))
    # (0, 0) lies 4 / sqrt(16) below the mean of the second, 1 / sqrt(1) below that of the first.
    torch.testing.assert_close(found(rows[:1]).abs(), torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(found.weight.abs(), torch.tensor([[0.0, 1.0], [0.25, 0.0]]))


@quick
@given(st.integers(2, 8), st.integers(0, 10_000))
def test_whitened_rows_have_mean_zero_and_the_identity_as_covariance(width, seed):
    rows = skewed(60, width, seed)
    found = moments_of(whitening(moments_of(rows))(rows))
    torch.testing.assert_close(found.mean, torch.zeros(width).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.covariance, torch.eye(width).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_the_first_directions_are_scikit_learns_up_to_their_sign(kept):
    rows = skewed().double() * torch.arange(1, 7)  # no two variances alike, so directions are settled
    reference = PCA(kept, whiten=True).fit_transform(rows.numpy())
    # Its variances are divided by N - 1.
    found = whitening(moments_of(rows), kept)(rows.float()) * np.sqrt(1 - 1 / len(rows))
    np.testing.assert_allclose(found.abs(), np.abs(reference), atol=1e-4)


def test_what_all_rows_share_is_gone_after_whitening():
    rows = skewed()
    assert mean_cosine(rows) > 0.1
    assert abs(mean_cosine(whitening(moments_of(rows))(rows))) < 0.01


def test_the_mean_cosine_by_hand():
    # Pairs of (1, 0), (0, 2), (-3, 0): cosines 0, -1, 0; their mean is -1/3.
    assert mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])) == pytest.approx(-1 / 3)
    assert mean_cosine(torch.ones(4, 3)) == pytest.approx(1)


def test_whitening_brings_back_distances_that_one_direction_hid():
    # Rows near one another in all but the loud direction: whitening makes them each other's nearest.
    draw = torch.Generator().manual_seed(1)
    quiet, loud = torch.randn(200, 5, generator=draw), 50 * torch.randn(200, 1, generator=draw)
    rows = torch.cat([quiet, loud], 1)
    moved = torch.cat([quiet + 0.05, 50 * torch.randn(200, 1, generator=draw)], 1)

    def found(one: torch.Tensor, other: torch.Tensor) -> float:
        nearest = torch.cdist(one, other).argmin(1)
        return float((nearest == torch.arange(len(one))).double().mean())

    both = whitening(moments_of(torch.cat([rows, moved])))
    assert found(rows, moved) < 0.2
    assert found(both(rows), both(moved)) > found(rows, moved) + 0.2


@pytest.mark.parametrize(("rows", "kept"), [(4, None), (400, 7), (400, 0)])
def test_more_directions_than_the_rows_span_are_refused(rows, kept):
    with pytest.raises(DataError, match="span"):
        whitening(moments_of(skewed(rows)), kept)


def test_equal_rows_span_nothing():
    with pytest.raises(DataError, match="span 0"):
        whitening(moments_of(torch.zeros(5, 3)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("measure", [moments_of, mean_cosine])
def test_rows_that_are_no_numbers_are_named(measure, bad):
    rows = skewed(20)
    rows[7, 2] = bad
    with pytest.raises(DataError, match="embedding, row 7: the vector holds NaN or infinity"):
        measure(rows)
    rows[7] = 0
    measure(rows)


def test_a_covariance_that_is_no_number_is_refused():
    found = moments_of(skewed())
    found.covariance[3] = float("nan")
    with pytest.raises(DataError, match="covariance, row 3"):
        whitening(found)

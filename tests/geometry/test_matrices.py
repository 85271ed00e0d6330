import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.linalg import subspace_angles
from scipy.spatial.distance import squareform
from scipy.stats import f_oneway

from workbench.geometry.matrices import (
    between_share,
    block_means,
    kept_directions,
    leading,
    singular_values,
    subspace_overlap,
    tree_of,
)

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=40, deadline=None, database=None)
seeds = st.integers(0, 2**16)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_singular_values_of_a_diagonal_are_its_sizes_from_the_largest():
    assert singular_values(torch.diag(torch.tensor([1.0, -3.0, 2.0]))) == pytest.approx([3, 2, 1])


def test_blocks_are_means_and_a_part_block_is_the_mean_of_its_own_cells():
    matrix = torch.arange(15.0).reshape(3, 5)
    means, tall, wide = block_means(matrix, 2)
    assert (tall, wide) == (2, 3)
    # Rows 0 and 1, columns 0 to 2: (0+1+2+5+6+7)/6 = 3.5; columns 3 and 4: (3+4+8+9)/4 = 6.
    assert means.tolist() == [[3.5, 6.0], [11.0, 13.5]]
    same, tall, wide = block_means(matrix, 5)
    assert (tall, wide) == (1, 1)
    assert (same == matrix.numpy()).all()


def test_what_a_projection_keeps_by_hand():
    # Four rows with variance 4 along the first axis and 1 along the second; the second is mapped to zero.
    rows = torch.tensor([[2.0, 1], [2, -1], [-2, 1], [-2, -1]])
    found = kept_directions(rows, torch.tensor([[3.0, 0], [0, 0]]))
    assert found.to_dicts() == [
        {"direction": 1, "singular_value": pytest.approx(3), "before": pytest.approx(0.8), "after": 1.0}
    ]
    # Singular values 1 and 4: after 4 * 1 against 1 * 16, so the small direction has 16 / 20.
    found = kept_directions(rows, torch.diag(torch.tensor([1.0, 4.0])))
    assert found["before"].to_list() == pytest.approx([0.2, 0.8])
    assert found["after"].to_list() == pytest.approx([0.8, 0.2])
    assert kept_directions(rows, torch.zeros(2, 2)).is_empty()


@quick
@given(seeds, st.integers(1, 5))
def test_what_arrives_is_what_the_mapped_rows_vary_by(seed, rank):
    rows, matrix = drawn(seed, 30, 6), drawn(seed + 1, 6, rank) @ drawn(seed + 2, rank, 4)
    found = kept_directions(rows, matrix)
    assert found["after"].sum() == pytest.approx(1)
    assert found["before"].sum() <= 1 + 1e-9
    mapped = (rows @ matrix).numpy()
    right = np.linalg.svd(matrix.numpy())[2][: found.height]
    along = np.var(mapped @ right.T, axis=0)
    np.testing.assert_allclose(found["after"], along / np.var(mapped, axis=0).sum(), rtol=1e-8, atol=1e-12)


def test_the_share_between_groups_by_hand():
    rows = torch.tensor([[0.0], [2], [4], [6]])
    # Mean 3; groups have means 1 and 5: between 2 * 4 + 2 * 4 = 16, total 9 + 1 + 1 + 9 = 20.
    assert between_share(rows, ["a", "a", "b", "b"]) == pytest.approx(0.8)
    assert np.isnan(between_share(torch.ones(4, 1), ["a", "a", "b", "b"]))


@quick
@given(seeds)
def test_the_share_between_groups_is_that_of_an_analysis_of_variance(seed):
    rows, groups = drawn(seed, 24, 1), ["a", "b", "c"] * 8
    parts = [rows[place::3, 0].numpy() for place in range(3)]
    statistic = f_oneway(*parts).statistic
    # eta^2 = F (K - 1) / (F (K - 1) + N - K)
    assert between_share(rows, groups) == pytest.approx(statistic * 2 / (statistic * 2 + 21), rel=1e-9)


def test_groups_dealt_at_random_have_the_floor_on_average():
    rows = drawn(0, 40, 8)
    order = np.random.default_rng(0)
    found = [between_share(rows, list(order.permutation(["a", "b", "c", "d"] * 10))) for _ in range(300)]
    assert np.mean(found) == pytest.approx(3 / 39, rel=0.03)  # 300 draws: their mean has 1 % of error


@quick
@given(seeds, st.integers(1, 3))
def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles(seed, kept):
    one, other = drawn(seed, 7, 3), drawn(seed + 1, 7, 5)
    angles = subspace_angles(leading(one, kept).numpy(), leading(other, kept).numpy())
    assert subspace_overlap(one, other, kept) == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-9)
    assert subspace_overlap(one, one * -3, kept) == pytest.approx(1)


def test_overlap_of_axes_by_hand():
    eye = torch.eye(4)
    # Main directions e1, e2 and e2, e3 share one of two.
    one, other = eye[:, :2] * torch.tensor([2.0, 1]), eye[:, 1:3] * torch.tensor([2.0, 1])
    assert subspace_overlap(one, other, 2) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"1\.\.2"):
        subspace_overlap(one, other, 3)


def test_a_tree_joins_what_lies_nearest_at_the_mean_distance():
    distances = np.array([[0.0, 4, 1], [4, 0, 6], [1, 6, 0]])
    tree = tree_of(distances)
    # 0 and 2 join at 1; both join 1 at (4 + 6) / 2 = 5.
    assert sorted(row.max() for row in tree.heights) == [1, 5]
    places = [tree.order.index(0), tree.order.index(2)]
    assert abs(places[0] - places[1]) == 1
    first = min(range(2), key=lambda row: tree.heights[row].max())
    assert sorted({*tree.across[first]}) == sorted(places)


@quick
@given(seeds)
def test_every_thing_is_one_leaf_and_heights_are_those_of_scipy(seed):
    points = drawn(seed, 6, 3)
    distances = torch.cdist(points, points).fill_diagonal_(0).numpy()
    tree = tree_of(distances)
    assert sorted(tree.order) == list(range(6))
    joined = np.unique(cophenet(linkage(squareform(distances, checks=False), "average")))
    np.testing.assert_allclose(np.sort(tree.heights.max(1)), joined, rtol=1e-9)

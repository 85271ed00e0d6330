"""Distances between generated weights: each measure on weights that can be worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.spatial.distance import cdist

from workbench.geometry.matrices import leading, leading_of_product, subspace_distances, subspace_overlap
from workbench.hypernetworks import GeneratedWeights, ParamSpec, Slot
from workbench.weight_distances import MEASURES, distances_of, measures_of, scale_of_angles

MATRIX = ParamSpec((Slot("w", (2, 2), "full"),))


def full(*matrices):
    return GeneratedWeights(MATRIX, {"w": torch.tensor(matrices, dtype=torch.float)})


def low_rank(count=4, width=6, rank=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(count, width, rank, generator=draw)
    up = torch.randn(count, rank, width, generator=draw)
    spec = ParamSpec((Slot("w", (width, width), "lowrank", rank, identity=True),))
    return GeneratedWeights(spec, {"w.down": down, "w.up": up})


def test_the_three_measures_answer_three_questions():
    # One weight, three times it, and one that reads the other direction; norms 1, 3 and 1.
    weights = full([[1, 0], [0, 0]], [[3, 0], [0, 0]], [[0, 0], [1, 0]])
    frobenius, cosine = (distances_of(weights, ["w"], name)[0] for name in ("frobenius", "cosine"))
    # |3 - 1| = 2; orthogonal ones: sqrt(1 + 1) and sqrt(9 + 1).
    torch.testing.assert_close(frobenius[0], torch.tensor([0, 2, 2**0.5], dtype=torch.double))
    assert frobenius[1, 2].item() == pytest.approx(10**0.5)
    torch.testing.assert_close(cosine[0], torch.tensor([0.0, 0.0, 1.0], dtype=torch.double))


def test_angles_see_what_is_read_and_not_what_it_becomes():
    # Rank 1: both read the first direction; one writes it to the first place, the other to the second.
    down, up = (
        torch.tensor([[[1.0], [0]]] * 2 + [[[0.6], [0.8]]]),
        torch.tensor([[[1.0, 0]], [[0, 5.0]], [[1, 0]]]),
    )
    spec = ParamSpec((Slot("w", (2, 2), "lowrank", 1),))
    found, told = distances_of(GeneratedWeights(spec, {"w.down": down, "w.up": up}), ["w"], "angles")
    assert found[0, 1].item() == pytest.approx(0, abs=1e-7)
    assert found[0, 2].item() == pytest.approx(0.8, abs=1e-6)  # the sine of the angle whose cosine is 0.6
    assert "sine of 1 principal" in told
    assert f"{math.sqrt(1 - 1 / 2):.2f}" in told  # one direction of two


def test_angles_are_those_of_scipy_on_the_product_that_is_never_formed():
    weights = low_rank()
    found, _ = distances_of(weights, ["w"], "angles")
    products = (weights.tensors["w.down"] @ weights.tensors["w.up"]).double()
    for one in range(4):
        for other in range(4):
            bases = [np.linalg.svd(products[place].numpy())[0][:, :2] for place in (one, other)]
            sines = np.sin(subspace_angles(*bases))
            assert found[one, other].item() == pytest.approx(np.sqrt((sines**2).mean()), abs=1e-6)


def test_leading_directions_of_factors_are_those_of_their_product():
    weights = low_rank()
    down, up = weights.tensors["w.down"][0], weights.tensors["w.up"][0]
    of_factors, of_product = leading_of_product(down, up, 2), leading(down @ up, 2)
    torch.testing.assert_close(
        (of_factors.T @ of_product).abs(), torch.eye(2, dtype=torch.double), atol=1e-5, rtol=0
    )
    assert subspace_overlap(down @ up, down @ up, 2) == pytest.approx(1)


@given(st.integers(0, 1000))
def test_cosines_are_those_of_scipy_and_ignore_the_size(seed):
    weights = low_rank(seed=seed)
    found, _ = distances_of(weights, ["w"], "cosine")
    flat = (weights.tensors["w.down"] @ weights.tensors["w.up"]).flatten(1).double().numpy()
    np.testing.assert_allclose(found, cdist(flat, flat, "cosine"), atol=1e-5)  # single precision products
    larger = GeneratedWeights(weights.spec, {**weights.tensors, "w.up": 7 * weights.tensors["w.up"]})
    torch.testing.assert_close(distances_of(larger, ["w"], "cosine")[0], found, atol=1e-6, rtol=0)


def test_a_weight_of_zeros_has_no_direction_and_lies_at_one():
    found, _ = distances_of(full([[0, 0], [0, 0]], [[1, 0], [0, 0]]), ["w"], "cosine")
    assert found.tolist() == [[0, 1], [1, 0]]


def test_angles_are_offered_for_a_single_matrix_alone():
    assert measures_of(low_rank(), ["w"]) == list(MEASURES)
    spec = ParamSpec((Slot("a", (2,), "vector"), Slot("b", (2, 2), "full")))
    weights = GeneratedWeights(spec, {"a": torch.eye(2), "b": torch.eye(2).expand(2, 2, 2)})
    assert "angles" not in measures_of(weights, ["a"])
    assert "angles" not in measures_of(weights, ["a", "b"])
    # Vectors (1, 0) and (0, 1), matrices alike: the squares of both slots add up.
    assert distances_of(weights, ["a", "b"], "frobenius")[0][0, 1].item() == pytest.approx(2**0.5)
    # Products 0 of the vectors, 2 of the matrices, over norms sqrt(1 + 2) each: 1 - 2 / 3.
    assert distances_of(weights, ["a", "b"], "cosine")[0][0, 1].item() == pytest.approx(1 / 3)


def test_directions_drawn_at_random_lie_about_where_the_scale_says():
    draw = torch.Generator().manual_seed(0)
    bases = torch.linalg.qr(torch.randn(8, 100, 10, generator=draw, dtype=torch.double))[0]
    apart = subspace_distances(bases)
    assert apart[~torch.eye(8, dtype=torch.bool)].mean().item() == pytest.approx(
        (1 - 10 / 100) ** 0.5, abs=0.01
    )
    assert "chance 0.95" in scale_of_angles(100, 10)

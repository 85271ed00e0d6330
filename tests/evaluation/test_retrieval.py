"""Retrieval ranks against hand counts and full sorts; agreement of rankings against scipy and enumeration."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.evaluation import retrieval
from workbench.evaluation.retrieval import (
    expected_best,
    gain_of_order,
    rank_agreement,
    recall_values,
    retrieval_ranks,
)

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=100, deadline=None, database=None)


def at(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


# --- ranks --------------------------------------------------------------------------------------------------


def test_ranks_of_a_hand_case():
    images = at(0, 40, 100)
    texts = at(10, 30, 45, 60, 95, 5).view(3, 2, 2)
    # Nearest images of each caption. Image 0: 10 -> 0 at 10 degrees: 1; 30 -> 40 at 10, then 0 at 30: 2.
    # Image 1: 45 -> 40: 1; 60 -> 40 at 20: 1. Image 2: 95 -> 100: 1; 5 -> 0 at 5, 40 at 35, 100 at 95: 3.
    to_image, to_text = retrieval_ranks(texts, images)
    assert to_image.tolist() == [[1, 2], [1, 1], [1, 3]]
    # Nearest captions of each image. Image 0 has its best at 10 degrees, image 2's at 5 comes first: 2.
    # Image 1 has its best at 5 degrees, the nearest other one is at 10: 1. Image 2 likewise at 5: 1.
    assert to_text.tolist() == [2, 1, 1]


def test_ties_count_against_the_model():
    images = at(0, 0, 90)
    texts = at(0, 0, 0).view(3, 1, 2)
    # Captions 0 and 1 score images 0 and 1 alike: rank 2. Caption 2 scores its image 0, two others 1: rank 3.
    # Images 0 and 1: all three captions alike: rank 3. Image 2: all three score 0: rank 3.
    to_image, to_text = retrieval_ranks(texts, images)
    assert to_image.tolist() == [[2], [2], [3]]
    assert to_text.tolist() == [3, 3, 3]


def test_a_caption_an_image_shares_with_another_is_a_tie_and_its_own_repeated_caption_is_none():
    images = at(0, 50)
    texts = torch.stack([at(0, 0), at(50, 0)])
    # Image 0 has one caption twice: no tie with itself, but image 1's second caption is the same: rank 2.
    # Image 1: its first caption is best. That second caption's own image is at 50 degrees, the other at 0.
    to_image, to_text = retrieval_ranks(texts, images)
    assert to_image.tolist() == [[1, 1], [1, 2]]
    assert to_text.tolist() == [2, 1]


@quick
@given(
    count=st.integers(1, 9),
    most=st.integers(1, 4),
    width=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    block=st.sampled_from([1, 30, 100, 2**22]),
)
def test_ranks_are_those_of_full_sorts_in_blocks_of_any_size(count, most, width, seed, block):
    rng = np.random.default_rng(seed)
    # Small whole numbers: products are exact, and there are many ties.
    texts, images = rng.integers(-1, 2, (count, most, width)), rng.integers(-1, 2, (count, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK", block)
        to_image, to_text = retrieval_ranks(torch.tensor(texts).float(), torch.tensor(images).float())
    for image in range(count):
        scores = [(images[image] @ texts[one, k], one == image) for one in range(count) for k in range(most)]
        # From best to worst, the image's own caption last among equals; all but the first own are left out.
        order = sorted(scores, key=lambda pair: (-pair[0], pair[1]))
        assert to_text[image] == [own for _, own in order].index(True) + 1
        for k in range(most):
            scores = [(texts[image, k] @ images[one], one == image) for one in range(count)]
            order = sorted(scores, key=lambda pair: (-pair[0], pair[1]))
            assert to_image[image, k] == [own for _, own in order].index(True) + 1


class Sizes(TorchDispatchMode):
    """Notes the number of entries of every product of matrices."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.mm:
            self.found.append(made.numel())
        return made


@pytest.mark.parametrize(
    ("block", "sizes"), [(30, [24, 24, 24]), (24, [24, 24, 24]), (23, [12] * 6), (1, [12] * 6)]
)
def test_no_more_scores_than_a_block_live_at_once_unless_one_image_has_more(monkeypatch, block, sizes):
    # 6 images, 2 captions each: 12 scores for an image's captions.
    monkeypatch.setattr(retrieval, "BLOCK", block)
    with Sizes() as made:
        retrieval_ranks(at(*range(12)).view(6, 2, 2), at(*range(0, 12, 2)))
    assert made.found == sizes


def test_scores_that_differ_by_rounding_only_are_ties():
    images = normalize(torch.tensor([[1.0, 0.0], [1.0, 3e-4], [1.0, 1e-2]]), dim=1)
    texts = at(0, 0, 90).view(3, 1, 2)
    # Cosines with the first caption: 1, 1 - 4.5e-8 and 1 - 5e-5: only the second is a tie.
    assert retrieval_ranks(texts, images)[0][0].tolist() == [2]


@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("kind", ["constant", "zero", "nan"])
def test_a_constant_score_never_looks_right(count, kind):
    images = at(*[20.0] * count)
    texts = at(*[75.0] * 3 * count).view(count, 3, 2) * {"constant": 1, "zero": 0, "nan": float("nan")}[kind]
    to_image, to_text = retrieval_ranks(texts, images)
    assert (to_image == count).all()
    # All captions of the other images, then its own.
    assert (to_text == 3 * count - 2).all()


def test_own_captions_at_their_images_are_first_whatever_the_width():
    draw = torch.Generator().manual_seed(0)
    for width in (16, 384, 4096):
        images = normalize(torch.randn(200, width, generator=draw), dim=1)
        to_image, to_text = retrieval_ranks(images[:, None].repeat(1, 2, 1), images)
        # The own score, summed in another order, must not lose to itself.
        assert (to_image == 1).all()
        assert (to_text == 1).all()


def test_the_order_of_images_moves_the_ranks_with_it():
    draw = torch.Generator().manual_seed(1)
    images = normalize(torch.randn(40, 6, generator=draw), dim=1)
    texts = normalize(torch.randn(40, 3, 6, generator=draw), dim=2)
    to_image, to_text = retrieval_ranks(texts, images)
    order = torch.randperm(40, generator=draw)
    moved = retrieval_ranks(texts[order], images[order])
    assert torch.equal(moved[0], to_image[order])
    assert torch.equal(moved[1], to_text[order])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=draw))[0]
    turned = retrieval_ranks(texts @ turn, images @ turn)
    assert torch.equal(turned[0], to_image)
    assert torch.equal(turned[1], to_text)


# --- recalls ------------------------------------------------------------------------------------------------


def test_recalls_by_hand():
    found = recall_values(np.array([[1, 2], [6, 11]]), np.array([5, 1]))
    # Image 0: captions at 1 and 2, itself found at 5. Image 1: captions at 6 and 11, itself at 1.
    assert {name: values.tolist() for name, values in found.items()} == {
        "t2i_recall_at_1": [0.5, 0.0],
        "i2t_recall_at_1": [0.0, 1.0],
        "recall_at_1": [0.25, 0.5],
        "t2i_recall_at_5": [1.0, 0.0],
        "i2t_recall_at_5": [1.0, 1.0],
        "recall_at_5": [1.0, 0.5],
        "t2i_recall_at_10": [1.0, 0.5],
        "i2t_recall_at_10": [1.0, 1.0],
        "recall_at_10": [1.0, 0.75],
    }


@quick
@given(count=st.integers(1, 12), most=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_recalls_lie_between_0_and_1_grow_with_k_and_never_fall_with_better_ranks(count, most, seed):
    rng = np.random.default_rng(seed)
    to_image, to_text = rng.integers(1, 15, (count, most)), rng.integers(1, 15, count)
    found = recall_values(to_image, to_text)
    better = recall_values(np.maximum(to_image - 1, 1), np.maximum(to_text - 1, 1))
    for kind in ("t2i_", "i2t_", ""):
        one, five, ten = (found[f"{kind}recall_at_{k}"] for k in (1, 5, 10))
        assert one.shape == (count,)
        assert (one >= 0).all()
        assert (one <= five).all()
        assert (five <= ten).all()
        assert (ten <= 1).all()
        assert all(
            (better[f"{kind}recall_at_{k}"] >= found[f"{kind}recall_at_{k}"]).all() for k in (1, 5, 10)
        )


def test_chance_finds_k_of_n():
    # A random order puts the one right image of 50 among the first k with probability k / 50.
    draw = torch.Generator().manual_seed(0)
    texts, images = torch.randn(50, 40, 64, generator=draw), torch.randn(50, 64, generator=draw)
    to_image, to_text = retrieval_ranks(normalize(texts, dim=2), normalize(images, dim=1))
    found = recall_values(to_image.numpy(), to_text.numpy())
    for k in (1, 5, 10):
        # 2,000 captions: three standard deviations of a share of 0.2 are 0.027.
        assert found[f"t2i_recall_at_{k}"].mean() == pytest.approx(k / 50, abs=0.03)


# --- rankings of encoders -----------------------------------------------------------------------------------


def test_agreement_by_hand():
    # Ranks 1, 2, 3, 4 and 2, 1, 3, 4: 1 - 6 * (1 + 1) / (4 * 15) = 0.8.
    assert float(rank_agreement(np.array([1.0, 2, 3, 4]), np.array([0.2, 0.1, 7.0, 9]))) == pytest.approx(0.8)


@quick
@given(pairs=st.integers(2, 12), resamples=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_agreement_is_scipys_by_column_with_ties(pairs, resamples, seed):
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 5, (2, pairs, resamples)).astype(float)
    found = rank_agreement(scores, truth)
    assert found.shape == (resamples,)
    for column in range(resamples):
        one, two = scores[:, column], truth[:, column]
        if np.ptp(one) == 0 or np.ptp(two) == 0:
            assert np.isnan(found[column])
        else:
            assert found[column] == pytest.approx(spearmanr(one, two).statistic, abs=1e-12)
            assert -1 - 1e-12 <= found[column] <= 1 + 1e-12
            assert float(rank_agreement(np.exp(one), two)) == pytest.approx(found[column])
            assert float(rank_agreement(one, -two)) == pytest.approx(-found[column])
            assert float(rank_agreement(two, one)) == pytest.approx(found[column])


def test_a_scoring_that_says_nothing_agrees_with_nothing():
    assert np.isnan(rank_agreement(np.ones(4), np.arange(4.0)))
    assert np.isnan(rank_agreement(np.arange(4.0), np.ones(4)))


def test_gain_by_hand():
    truth, scores = np.array([0.5, 0.2, 0.3]), np.array([1.0, 3.0, 2.0])
    # Order by scores: 0.2, 0.3, 0.5; best: 0.5, 0.3, 0.2. Discounts 1, 1 / log2(3), 1 / 2.
    discounts = np.array([1, 1 / np.log2(3), 0.5])
    expected = (discounts * [0.2, 0.3, 0.5]).sum() / (discounts * [0.5, 0.3, 0.2]).sum()
    assert gain_of_order(scores, truth, 3) == pytest.approx(expected)
    # The first alone: 0.2 of 0.5.
    assert gain_of_order(scores, truth, 1) == pytest.approx(0.4)


@quick
@given(pairs=st.integers(2, 10), k=st.integers(1, 10), seed=st.integers(0, 10**6))
def test_gain_is_that_of_its_definition_between_0_and_1_and_1_for_the_true_order(pairs, k, seed):
    rng = np.random.default_rng(seed)
    truth, scores = rng.random(pairs), rng.permutation(pairs).astype(float)
    found = gain_of_order(scores, truth, k)
    discounts = 1 / np.log2(np.arange(2, pairs + 2)) * (np.arange(pairs) < k)
    gained = (truth[np.argsort(-scores)] * discounts).sum() / (np.sort(truth)[::-1] * discounts).sum()
    assert found == pytest.approx(gained)
    assert 0 <= found <= 1 + 1e-12
    assert gain_of_order(3 * truth + 1, truth, k) == pytest.approx(1)
    # An order that says nothing gains what the mean of all orders does.
    constant = truth.mean() * discounts.sum() / (np.sort(truth)[::-1] * discounts).sum()
    assert gain_of_order(np.ones(pairs), truth, k) == pytest.approx(constant)


def test_the_expected_best_by_hand():
    scores, truth = np.array([0.9, 0.5, 0.1, 0.7]), np.array([10.0, 40.0, 30.0, 20.0])
    # By score: 10, 20, 40, 30. Of the 6 pairs, 3 hold the first, 2 more the second, 1 more the third.
    assert expected_best(scores, truth, 2) == pytest.approx((3 * 10 + 2 * 20 + 1 * 40) / 6)
    assert expected_best(scores, truth, 1) == pytest.approx(25)
    assert expected_best(scores, truth, 4) == pytest.approx(10)


@quick
@given(pairs=st.integers(1, 8), size=st.integers(1, 8), seed=st.integers(0, 10**6), levels=st.integers(1, 8))
def test_the_expected_best_is_the_mean_over_all_subsets_and_ties_are_drawn(pairs, size, seed, levels):
    size = min(size, pairs)
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, levels, pairs).astype(float), rng.random(pairs)
    chosen = []
    for subset in combinations(range(pairs), size):
        most = max(scores[place] for place in subset)
        chosen.append(np.mean([truth[place] for place in subset if scores[place] == most]))
    found = expected_best(scores, truth, size)
    assert found == pytest.approx(np.mean(chosen))
    assert truth.min() - 1e-12 <= found <= truth.max() + 1e-12
    order = rng.permutation(pairs)
    assert expected_best(scores[order], truth[order], size) == pytest.approx(found)


def test_scores_that_differ_by_rounding_only_are_drawn_from():
    # 0.1 + 0.2 is 0.30000000000000004: as good as 0.3, so the mean of 1 and 3.
    assert expected_best(np.array([0.3, 0.1 + 0.2, 0.0]), np.array([1.0, 3.0, 7.0]), 3) == pytest.approx(2)


def test_one_pair_is_in_the_best_order():
    assert gain_of_order(np.array([0.3]), np.array([0.2]), 5) == 1.0


def test_a_scoring_that_says_nothing_expects_the_mean_and_the_truth_expects_more_with_every_pair():
    truth = np.array([0.1, 0.9, 0.4, 0.4, 0.7])
    for size in range(1, 6):
        assert expected_best(np.zeros(5), truth, size) == pytest.approx(0.5)
    found = [expected_best(truth, truth, size) for size in range(1, 6)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(0.9)


def test_many_pairs_overflow_nothing():
    scores = np.arange(1000.0)
    # The best of a random half: the i-th best with probability about 2^-i, so 1 place below the top.
    assert expected_best(scores, scores, 500) == pytest.approx(998, abs=0.01)

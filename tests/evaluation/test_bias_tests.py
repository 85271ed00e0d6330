"""Association tests against arithmetic, plain loops and planted truths; preferences against scipy."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, kstest

from workbench.errors import DataError
from workbench.evaluation.bias_tests import (
    association_test,
    associations,
    context_differences,
    context_preference,
    effect_size,
    share_resamples,
    word_vectors,
)

quick = settings(max_examples=30, deadline=None, database=None)
seeds = st.integers(0, 2**32 - 1)


def sets(rng: np.random.Generator, sizes: tuple[int, ...], width: int = 12) -> list[np.ndarray]:
    found = [rng.normal(size=(size, width)) for size in sizes]
    return [one / np.linalg.norm(one, axis=1, keepdims=True) for one in found]


def measured(*four: np.ndarray):
    return association_test(*four, resamples=2)


# --- WEAT and SEAT ------------------------------------------------------------------------------------------

A, B = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])


def test_associations_of_a_hand_case():
    # cos to (1, 0) minus cos to (0, 1): 1 - 0, 0.6 - 0.8, 0 - 1.
    words = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    assert associations(words, A, B) == pytest.approx([1.0, -0.2, -1.0])


def test_effect_size_of_a_hand_case():
    # Means 0.5 and -0.5; squares about their mean 0: 4 * 0.25 = 1, over n - 1 = 3: std = 0.57735.
    first, second = np.array([0.5, 0.5]), np.array([-0.5, -0.5])
    assert effect_size(first, second) == pytest.approx(1 / np.sqrt(1 / 3))
    # Means 2 and 0; all of 3, 1, 1, -1 about 1: 4 + 0 + 0 + 4 = 8, over 3.
    assert effect_size(np.array([3.0, 1.0]), np.array([1.0, -1.0])) == pytest.approx(2 / np.sqrt(8 / 3))
    assert np.isnan(effect_size(np.ones(2), np.ones(2)))


def test_p_counts_the_splits_that_are_at_least_as_uneven():
    # Associations 1 and 0.28 (0.96 - 0.28 = 0.68 below) against -0.28 and -1: of the 6 splits of four words
    # into two pairs, only the observed one puts the two largest together, so p = 1 / 6.
    first = np.array([[1.0, 0.0], [0.8, 0.6]])
    found = measured(first, first[:, ::-1], A, B)
    assert (found.p, found.exact, found.words) == (pytest.approx(1 / 6), True, (2, 2, 2, 2))
    assert measured(first[:, ::-1], first, A, B).p == pytest.approx(1.0)


def by_loops(first, second, one, other):
    """WEAT as its paper writes it, with cosines and splits one by one."""

    def cosine(a, b):
        return sum(a * b) / (sum(a * a) ** 0.5 * sum(b * b) ** 0.5)

    def s(word):
        return np.mean([cosine(word, a) for a in one]) - np.mean([cosine(word, b) for b in other])

    scores = [s(word) for word in (*first, *second)]
    size = len(first)
    observed = sum(scores[:size]) - sum(scores[size:])
    hits = [
        2 * sum(scores[place] for place in chosen) - sum(scores) >= observed - 1e-12
        for chosen in combinations(range(2 * size), size)
    ]
    spread = np.std(scores, ddof=1)
    return (np.mean(scores[:size]) - np.mean(scores[size:])) / spread, np.mean(hits)


@pytest.mark.parametrize("seed", range(4))
def test_effect_and_p_are_those_of_plain_loops(seed):
    four = sets(np.random.default_rng(seed), (4, 4, 3, 5))
    found, (effect, p) = measured(*four), by_loops(*four)
    assert found.effect == pytest.approx(effect)
    assert found.p == pytest.approx(p)


@quick
@given(seeds)
def test_effect_lies_in_its_range_and_turns_its_sign_with_either_couple(seed):
    first, second, one, other = sets(np.random.default_rng(seed), (5, 5, 4, 3))
    found = measured(first, second, one, other)
    assert -2 <= found.effect <= 2
    assert 0 < found.p <= 1
    assert measured(second, first, one, other).effect == pytest.approx(-found.effect)
    assert measured(first, second, other, one).effect == pytest.approx(-found.effect)
    order = np.random.default_rng(seed).permutation(5)
    assert measured(first[order], second, one, other).effect == pytest.approx(found.effect)


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_bias_is_found(seed):
    """The bar: d above 1.5 and p below 0.01."""
    rng = np.random.default_rng(seed)
    direction, noise = np.eye(40)[0], [rng.normal(size=(8, 40)) / np.sqrt(40) for _ in range(4)]
    four = [part + sign * direction for part, sign in zip(noise, (1, -1, 1, -1), strict=True)]
    found = measured(*(one / np.linalg.norm(one, axis=1, keepdims=True) for one in four))
    assert found.effect > 1.5
    assert found.p < 0.01


def test_random_sets_have_uniform_p():
    """The bar, with five words a set: 252 splits, so the steps of p are too small to matter."""
    rng = np.random.default_rng(0)
    p = [measured(*sets(rng, (5, 5, 5, 5))).p for _ in range(300)]
    assert kstest(p, "uniform").pvalue > 0.05
    assert np.mean(np.array(p) < 0.05) < 0.09  # 0.05 plus three standard errors of 300 draws


def test_words_that_move_with_their_sentences_keep_p_uniform_where_sentences_alone_do_not():
    """Five near copies of each word: counted as words of their own they make p far too small."""
    rng, by_word, by_sentence = np.random.default_rng(1), [], []
    for _ in range(150):
        words = sets(rng, (4, 4, 4, 4))
        said = [np.repeat(one, 5, 0) + 0.02 * rng.normal(size=(20, 12)) for one in words]
        names = [str(row // 5) for row in range(20)]
        by_word.append(measured(*(word_vectors(one, names) for one in said)).p)
        by_sentence.append(np.abs(effect_size(*(associations(one, *said[2:]) for one in said[:2]))))
    assert kstest(by_word, "uniform").pvalue > 0.05
    # |d| of 20 independent sentences against 20 would exceed 0.62 once in twenty (1.96 * sqrt(2 / 20)).
    assert np.mean(np.array(by_sentence) > 0.62) > 0.2


def test_many_words_have_their_splits_drawn_and_not_counted():
    assert not measured(*sets(np.random.default_rng(0), (10, 10, 3, 3))).exact


def test_the_same_seed_draws_the_same_words_for_two_encoders():
    four = sets(np.random.default_rng(0), (5, 5, 4, 4))
    turned = [one @ np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0] for one in four]
    # A rotation changes no cosine, so every resample agrees if its words do.
    found, again = (association_test(*one, resamples=50) for one in (four, turned))
    np.testing.assert_allclose(found.resampled, again.resampled, atol=1e-9)
    assert np.nanmin(found.resampled) < found.effect < np.nanmax(found.resampled)


def test_a_word_is_the_mean_of_its_unit_sentences():
    found = word_vectors(np.array([[3.0, 0.0], [0.0, 5.0], [0.0, 2.0]]), ["b", "a", "b"])
    assert found.tolist() == [[0.5, 0.5], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [((3, 4, 2, 2), "equal numbers"), ((1, 1, 2, 2), "at least two"), ((3, 3, 2, 1), "at least two")],
)
def test_sets_that_cannot_be_tested_are_refused(sizes, complaint):
    with pytest.raises(DataError, match=complaint):
        measured(*sets(np.random.default_rng(0), sizes))


def test_an_undefined_effect_and_a_zero_vector_are_refused():
    same = np.ones((3, 2)) / np.sqrt(2)
    with pytest.raises(DataError, match="nothing to test"):
        measured(same, same, A, B)
    with pytest.raises(DataError, match="no cosine"):
        word_vectors(np.zeros((1, 3)), ["a"])


# --- pairs and their contexts -------------------------------------------------------------------------------


def test_differences_of_a_hand_case():
    # Cosines 1 and 0.6, then 0 and 1; lengths do not matter.
    context = np.array([[2.0, 0.0], [0.0, 1.0]])
    first, second = np.array([[5.0, 0.0], [1.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 9.0]])
    assert context_differences(context, first, second) == pytest.approx([0.4, -1.0])


def test_the_share_leaves_ties_out_and_p_is_the_sign_tests():
    found = context_preference(np.array([0.1, 0.2, 0.3, -0.1, 0.0]))
    assert (found.share, found.pairs, found.ties) == (0.75, 4, 1)
    # Two-sided: P(3 or 4 of 4) twice = 2 * (4 + 1) / 16.
    assert found.p == pytest.approx(10 / 16)
    assert found.low < 0.75 < found.high
    with pytest.raises(DataError, match="no pair"):
        context_preference(np.zeros(3))


@quick
@given(st.lists(st.floats(-1, 1).filter(lambda one: abs(one) > 1e-9), min_size=1, max_size=40))
def test_turning_every_pair_round_mirrors_the_share(values):
    differences = np.array(values)
    found, turned = context_preference(differences), context_preference(-differences)
    assert found.share + turned.share == pytest.approx(1)
    assert found.p == pytest.approx(binomtest(sum(differences > 0), len(differences)).pvalue)
    assert 0 <= found.low <= found.share <= found.high <= 1


def test_a_balanced_list_does_not_see_that_one_groups_word_is_nearer():
    """She is always nearer by the same amount: half the pairs count it for the stereotype, half against."""
    nearer = np.array([0.1] * 8 + [-0.1] * 8)
    assert context_preference(nearer).share == 0.5


def test_resampled_shares_average_to_the_share():
    drawn = share_resamples(np.array([1.0] * 30 + [-1.0] * 10), 2000)
    assert drawn.mean() == pytest.approx(0.75, abs=0.01)
    assert drawn.std() == pytest.approx(np.sqrt(0.75 * 0.25 / 40), rel=0.1)

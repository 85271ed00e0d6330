"""Metrics against hand counts and against scipy and scikit-learn."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from workbench.evaluation.similarity import (
    METRICS,
    Measured,
    auc,
    measure,
    pair_order,
    pearson,
    spearman,
    within_pairs,
)

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=100, deadline=None, database=None)
# Quarters tie often and have exact means.
few_values = st.integers(-4, 8).map(lambda number: number / 4)


@st.composite
def graded(draw, labels=few_values):
    count = draw(st.integers(2, 30))
    rows = st.lists(st.tuples(few_values, labels, st.integers(1, 3)), min_size=count, max_size=count)
    score, label, weight = (np.array(column, dtype=float) for column in zip(*draw(rows), strict=True))
    assume(len(set(score)) > 1)
    assume(len(set(label)) > 1)
    return score, label, weight


@quick
@given(graded())
def test_correlations_are_those_of_scipy_with_ties(rows):
    score, label, _ = rows
    once = np.ones((1, len(score)))
    # Rounding in double precision.
    assert spearman(score, label, once)[0] == pytest.approx(
        scipy.stats.spearmanr(score, label).statistic, abs=1e-9
    )
    assert pearson(score, label, once)[0] == pytest.approx(
        scipy.stats.pearsonr(score, label).statistic, abs=1e-9
    )


@quick
@given(graded(labels=st.sampled_from([0.0, 1.0])))
def test_auc_is_that_of_scikit_learn_with_ties_and_weights(rows):
    score, label, weight = rows
    weights = np.stack([np.ones(len(score)), weight])
    expected = [roc_auc_score(label, score), roc_auc_score(label, score, sample_weight=weight)]
    # Rounding in double precision.
    assert auc(score, label, weights) == pytest.approx(expected, abs=1e-9)


@quick
@given(graded(), st.lists(st.integers(0, 3), min_size=30, max_size=30))
def test_integer_weights_equal_repeating_the_rows(rows, draws):
    score, label, _ = rows
    label = (label > 0).astype(float)
    draws = np.array(draws[: len(score)])
    pair = np.arange(len(score)) // 2
    again = np.repeat(np.arange(len(score)), draws)
    assume(len(set(score[again])) > 1)
    assume(len(set(label[again])) > 1)
    weights, once = draws[None].astype(float), np.ones((1, len(again)))
    for metric in (spearman, pearson, auc):
        # Rounding in double precision.
        assert metric(score, label, weights)[0] == pytest.approx(
            metric(score[again], label[again], once)[0], abs=1e-9
        )
    # Whole pairs are drawn: both rows of a pair occur equally often.
    paired = draws[: int(pair.max()) + 1][pair]
    copies = [(row, copy) for row, times in enumerate(paired) for copy in range(times)]
    assume(copies)
    again = np.array([row for row, _ in copies])
    copy_pair = np.array([pair[row] * 100 + copy for row, copy in copies])
    left = pair_order(score, label, paired[None].astype(float), within_pairs(label, pair))
    right = pair_order(
        score[again], label[again], np.ones((1, len(again))), within_pairs(label[again], copy_pair)
    )
    assert left[0] == pytest.approx(right[0], abs=1e-12, nan_ok=True)


@quick
@given(graded(labels=st.sampled_from([0.0, 1.0])), st.integers(0, 99))
def test_every_metric_and_resample_stays_in_its_range(rows, seed):
    score, label, _ = rows
    measured = measure(score[None], label, np.arange(len(score)) // 2, resamples=20, seed=seed)
    assert set(measured) == set(METRICS)
    for name, lowest in zip(METRICS, (-1, -1, 0, 0), strict=True):
        values = np.r_[measured[name].value, measured[name].resampled[0]]
        known = values[np.isfinite(values)]
        # A correlation of exactly 1 rounds up.
        assert ((known >= lowest - 1e-12) & (known <= 1 + 1e-12)).all()


@quick
@given(graded())
def test_rank_metrics_do_not_change_under_a_rising_map(rows):
    score, label, _ = rows
    label, once = (label > 0).astype(float), np.ones((1, len(score)))
    pairs = within_pairs(label, np.arange(len(score)) // 2)
    risen = np.exp(score)
    np.testing.assert_array_equal(spearman(score, label, once), spearman(risen, label, once))
    np.testing.assert_array_equal(auc(score, label, once), auc(risen, label, once))
    np.testing.assert_array_equal(
        pair_order(score, label, once, pairs), pair_order(risen, label, once, pairs)
    )


def test_spearman_of_a_hand_case():
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15) = 0.6
    value = spearman(np.array([1.0, 2, 3, 4]), np.array([0.2, 0.1, 0.9, 0.5]), np.ones((1, 4)))
    assert value[0] == pytest.approx(0.6)


def test_auc_of_a_hand_case():
    # Positives 0.9 and 0.5, negatives 0.5 and 0.1: of 4 comparisons 3 are right and one ties, 3.5 / 4.
    value = auc(np.array([0.9, 0.5, 0.5, 0.1]), np.array([1.0, 1, 0, 0]), np.ones((1, 4)))
    assert value[0] == 0.875


@pytest.mark.parametrize("label", [[0.0, 0.5, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
def test_auc_is_undefined_for_graded_labels_and_for_one_class(label):
    assert np.isnan(auc(np.array([0.1, 0.2, 0.3]), np.array(label), np.ones((2, 3)))).all()


@pytest.mark.parametrize("constant", [0.1, 0.7, 1.0, 1e-3])
@pytest.mark.parametrize("metric", [spearman, pearson])
def test_the_correlation_with_a_constant_is_undefined(metric, constant):
    same, other = np.full(7, constant), np.array([0.3, 0.1, 0.7, 0.2, 0.9, 0.4, 0.11])
    weights = np.array([[1.0] * 7, [3.0, 0, 1, 2, 0, 0, 1]])
    assert np.isnan(metric(same, other, weights)).all()
    assert np.isnan(metric(other, same, weights)).all()


def test_scores_that_differ_little_still_correlate():
    score = 0.7 + 1e-7 * np.array([1.0, 3, 2, 5])
    label = np.array([0.1, 0.2, 0.4, 0.9])
    expected = scipy.stats.pearsonr((score - 0.7) * 1e7, label).statistic
    # Of 16 digits, 7 are used up by the offset.
    assert pearson(score, label, np.ones((1, 4)))[0] == pytest.approx(expected, abs=1e-6)


def test_comparisons_within_pairs_point_from_high_to_low_and_leave_ties_out():
    label = np.array([0.0, 1.0, 0.5, 0.5, 0.3, 0.2, 0.1, 1.0])
    pair = np.array([8, 8, 2, 2, 5, 5, 5, 1])
    assert sorted(map(tuple, within_pairs(label, pair))) == [(1, 0), (4, 5), (4, 6), (5, 6)]


def test_rows_of_a_pair_need_not_stand_together():
    found = within_pairs(np.array([0.0, 0.2, 1.0, 0.9]), np.array([1, 0, 1, 0]))
    assert sorted(map(tuple, found)) == [(2, 0), (3, 1)]


def test_pair_order_of_a_hand_case():
    label = np.array([1.0, 0, 1, 0, 0, 1, 0.5, 0.5])
    score = np.array([0.9, 0.1, 0.2, 0.8, 0.4, 0.4, 0.9, 0.1])
    pairs = within_pairs(label, np.array([0, 0, 1, 1, 2, 2, 3, 3]))
    # Right, wrong, tied (half); the last pair has equal labels: 1.5 / 3. Weighted 2, 1, 1: 2.5 / 4.
    weights = np.array([[1.0] * 8, [2.0, 2, 1, 1, 1, 1, 5, 5]])
    assert pair_order(score, label, weights, pairs).tolist() == [0.5, 0.625]


def test_pair_order_without_comparisons_is_undefined():
    label, score = np.array([0.5, 0.5]), np.array([0.1, 0.9])
    weights = np.ones((3, 2))
    assert np.isnan(pair_order(score, label, weights, within_pairs(label, np.array([0, 0])))).all()
    assert np.isnan(pair_order(score, label, weights * 0, np.array([[0, 1]]))).all()


@quick
@given(st.lists(few_values, min_size=1, max_size=20), st.integers(0, 10**6))
def test_a_score_that_ignores_the_condition_gets_exactly_half(per_pair, seed):
    score = np.repeat(np.array(per_pair) / 3, 2)
    label = np.random.default_rng(seed).permuted(np.tile([0.0, 1.0], (len(per_pair), 1)), axis=1).ravel()
    pair = np.repeat(np.arange(len(per_pair)), 2)
    measured = measure(score[None], label, pair, resamples=10)["pair_order"]
    assert measured.value[0] == 0.5
    assert (measured.resampled == 0.5).all()


def noisy(seed: int, pairs: int = 150) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs ranked right with probability 0.7, by construction."""
    rng = np.random.default_rng(seed)
    label = np.tile([0.0, 1.0], pairs)
    right = rng.random(pairs) < 0.7
    score = np.stack([np.where(right, 0.2, 0.8), np.where(right, 0.8, 0.2)], axis=1).ravel()
    return score, label, np.repeat(np.arange(pairs), 2)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(60):
        score, label, pair = noisy(seed)
        low, high = Measured.interval(
            measure(score[None], label, pair, resamples=200)["pair_order"].resampled[0]
        )
        covered += low <= 0.7 <= high
    # 95 % of 60 is 57; fewer than 51 or all of a much too wide interval would be six deviations away.
    assert covered >= 51


def test_an_interval_is_as_wide_as_the_binomial_says():
    score, label, pair = noisy(3)
    measured = measure(score[None], label, pair, resamples=2000)["pair_order"]
    low, high = measured.interval(measured.resampled[0])
    share = measured.value[0]
    # 150 pairs drawn as wholes; 10 %: the quantiles of 2000 resamples.
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 150), rel=0.1)


def test_resampling_follows_from_the_seed_and_is_shared_by_all_scores():
    score, label, pair = noisy(0)
    once = measure(np.stack([score, score]), label, pair, resamples=130, seed=4)
    again = measure(score[None], label, pair, resamples=130, seed=4)
    other = measure(score[None], label, pair, resamples=130, seed=5)
    for name in METRICS:
        assert once[name].resampled.shape == (2, 130)
        np.testing.assert_array_equal(once[name].resampled[0], once[name].resampled[1])
        np.testing.assert_array_equal(once[name].resampled[0], again[name].resampled[0])
        assert not np.array_equal(again[name].resampled, other[name].resampled)


def test_values_are_those_of_the_rows_as_they_are():
    score, label, pair = noisy(1)
    measured = measure(np.stack([score, 1 - score]), label, pair, resamples=1)
    right = np.mean(score[1::2] > score[::2])
    assert measured["pair_order"].value.tolist() == pytest.approx([right, 1 - right])
    assert measured["auc"].value[0] == pytest.approx(roc_auc_score(label, score))
    assert measured["spearman"].value[0] == pytest.approx(scipy.stats.spearmanr(score, label).statistic)
    assert measured["pearson"].value[0] == pytest.approx(scipy.stats.pearsonr(score, label).statistic)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_undefined_score_is_refused_by_row(bad):
    scores = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, bad]])
    with pytest.raises(ValueError, match="score of row 2 is undefined"):
        measure(scores, np.array([0.0, 1.0, 1.0]), np.array([0, 0, 1]))


def test_an_interval_leaves_out_undefined_resamples():
    values = np.r_[np.arange(101.0), np.nan]
    # 2.5 % and 97.5 % of 0..100.
    assert Measured.interval(values) == pytest.approx((2.5, 97.5))
    assert Measured.interval(values, level=0.5) == pytest.approx((25, 75))
    assert np.isnan(Measured.interval(np.array([np.nan, np.nan]))).all()

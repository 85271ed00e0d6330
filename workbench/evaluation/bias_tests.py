"""Bias tests of sentence encoders: WEAT and SEAT, and which of two sentences a neutral context prefers.

Each answers one question about one list of words. Finding nothing does not show that there is nothing: the
authors of SEAT say so of their own test.

Shape letters: N sentences, D width, W words, X and Y words of two target sets, A and B words of two attribute
sets, P pairs, R resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest, permutation_test

from workbench.errors import DataError

PARTITIONS = 20_000  # all are counted up to here (8 words against 8 have 12,870), else as many are drawn


def word_vectors(embedded: Float[np.ndarray, "N D"], words: Sequence[str]) -> Float[np.ndarray, "W D"]:
    """Average the unit vectors of each word's sentences, words in the order of their first sentence.

    Not of norm 1 themselves: the product of two of them is the mean cosine between their sentences.

    Args:
        embedded: one row per sentence, none of them zero.
        words: which word each sentence is about.

    Raises:
        DataError: a vector is zero or not finite, so that it has no cosine.
    """
    norms = np.linalg.norm(embedded, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise DataError("a sentence has a zero or non-finite vector, which has no cosine; leave it out")
    unit, order = embedded / norms, {word: place for place, word in enumerate(dict.fromkeys(words))}
    which = np.array([order[word] for word in words])
    return np.stack([unit[which == place].mean(0) for place in range(len(order))])


def associations(
    words: Float[np.ndarray, "W D"], first: Float[np.ndarray, "A D"], second: Float[np.ndarray, "B D"]
) -> Float[np.ndarray, " W"]:
    """How much nearer each word lies to the first attribute than to the second, -2 to 2.

    s(w, A, B) = mean_a cos(w, a) - mean_b cos(w, b).

    Args:
        words: as :func:`word_vectors` gives them.
        first: words of attribute A, in the same way.
        second: of attribute B.

    Source: Caliskan et al. 2017, WEAT; May et al. 2019 (arXiv 1903.10561) for sentences.
    """
    return words @ (first.mean(0) - second.mean(0))


def effect_size(
    first: Float[np.ndarray, "*R X"], second: Float[np.ndarray, "*R Y"]
) -> Float[np.ndarray, "*R"]:
    """Difference of two target sets' mean associations over the standard deviation of all of them.

    d = (mean_x s - mean_y s) / std(s over X and Y), with n - 1 in the deviation as in SEAT's code; -2 to 2
    for sets of equal size, 0 without an association. Positive: the first targets go with the first attribute.

    Args:
        first: associations of the first targets; NaN where all associations are equal.
        second: of the second targets, as many.

    Source: Caliskan et al. 2017, WEAT effect size; May et al. 2019, section 2.
    """
    spread = np.concatenate([first, second], axis=-1).std(-1, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, (first.mean(-1) - second.mean(-1)) / spread, np.nan)


@dataclass(frozen=True)
class Association:
    """What a WEAT or SEAT test found.

    Attributes:
        effect: d, -2 to 2, 0 without an association.
        resampled: d of resampled words, for intervals and paired differences.
        p: share of the equal splits of all targets whose difference is at least the observed one, 0 to 1;
            one-sided, so near 1 for an association the other way round.
        exact: whether all splits were counted.
        words: words in X, Y, A and B.
    """

    effect: float
    resampled: Float[np.ndarray, " R"]
    p: float
    exact: bool
    words: tuple[int, int, int, int]


def _difference(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray | np.floating:
    return first.mean(axis=axis) - second.mean(axis=axis)


def association_test(
    first: Float[np.ndarray, "X D"],
    second: Float[np.ndarray, "Y D"],
    one: Float[np.ndarray, "A D"],
    other: Float[np.ndarray, "B D"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Association:
    """Test whether two sets of target words differ in their association with two attributes.

    Deviation: SEAT permutes sentences. Sentences of one word are alike, so that would count one word several
    times and give p too small; here a word moves with all of its sentences. One sentence per word is SEAT's.

    Args:
        first: word vectors of the first targets, as :func:`word_vectors` gives them.
        second: of the second targets, as many.
        one: of the first attribute.
        other: of the second attribute.
        resamples: R, of the bootstrap over the words of all four sets.
        seed: of the bootstrap, and of the splits where not all are counted; the same seed and numbers of
            words draw alike, so that two encoders are compared on the same resamples.

    Raises:
        DataError: fewer than two words in a set, unequal target sets, or no word differs from another.

    Source: May et al. 2019 (arXiv 1903.10561), section 2; p by scipy's permutation test.
    """
    sizes = len(first), len(second), len(one), len(other)
    if min(sizes) < 2:
        raise DataError(f"each set needs at least two words, got {sizes}; add words")
    if sizes[0] != sizes[1]:
        raise DataError(
            f"target sets of {sizes[0]} and {sizes[1]} words; the test is defined for equal numbers"
        )
    left, right = associations(first, one, other), associations(second, one, other)
    effect = float(effect_size(left, right))
    if not np.isfinite(effect):
        raise DataError("all target words have the same association; there is nothing to test")
    found = permutation_test(
        (left, right), _difference, vectorized=True, n_resamples=PARTITIONS, alternative="greater",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    targets, attributes = np.concatenate([first, second]), np.concatenate([one, other])
    drawn = _resampled_effects(targets, attributes, sizes, resamples, seed)
    exact = math.comb(2 * sizes[0], sizes[0]) <= PARTITIONS
    return Association(effect, drawn, float(found.pvalue), exact, sizes)


def _resampled_effects(
    targets: Float[np.ndarray, "W D"],
    attributes: Float[np.ndarray, "_ D"],
    sizes: tuple[int, int, int, int],
    resamples: int,
    seed: int,
) -> Float[np.ndarray, " R"]:
    """Draw words of each set with replacement and return the effect size of every draw."""
    rng = np.random.default_rng(seed)
    x, y, a, b = (rng.integers(0, size, (resamples, size)) for size in sizes)
    rows, weights = np.arange(resamples)[:, None], np.zeros((resamples, len(attributes)))
    np.add.at(weights, (rows, a), 1 / sizes[2])
    np.add.at(weights, (rows, b + sizes[2]), -1 / sizes[3])
    drawn = weights @ (attributes @ targets.T)  # associations of all targets with the drawn attributes
    return effect_size(drawn[rows, x], drawn[rows, y + sizes[0]])


def context_differences(
    context: Float[np.ndarray, "P D"], first: Float[np.ndarray, "P D"], second: Float[np.ndarray, "P D"]
) -> Float[np.ndarray, " P"]:
    """How much nearer each pair's first sentence lies to its context than the second, as cosines, -2 to 2."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (context, first, second)]
    return (unit[0] * (unit[1] - unit[2])).sum(1)


@dataclass(frozen=True)
class Preference:
    """Which sentences of pairs lie nearer to their contexts.

    Attributes:
        share: of the pairs whose first sentence is nearer; 0 to 1, 0.5 without a preference.
        low: lower end of Wilson's 95 % interval.
        high: its upper end.
        p: of the exact two-sided sign test against 0.5.
        pairs: that were counted.
        ties: pairs left out because both sentences are equally near.
    """

    share: float
    low: float
    high: float
    p: float
    pairs: int
    ties: int


def context_preference(differences: Float[np.ndarray, " P"]) -> Preference:
    """Count how often the stereotypical sentence of a pair is the one nearer to a neutral context.

    Deviation: CrowS-Pairs compares pseudo-log-likelihoods of a masked language model. A sentence encoder has
    no probability of a word, so that score is not defined for it, and this is not that score: it asks which
    of two sentences is closer in meaning to one that names nobody. A list in which each group stands as often
    on the stereotypical side keeps the plain nearness of one group's word out of the share.

    Args:
        differences: as :func:`context_differences` gives them, stereotypical sentences first.

    Raises:
        DataError: no pair differs.

    Source: after Nangia et al. 2020 (arXiv 2010.00133), section 3; interval and p by scipy.
    """
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    counted = wins + losses
    if not counted:
        raise DataError("no pair has a sentence nearer to its context than the other; give other pairs")
    found = binomtest(wins, counted)
    interval = found.proportion_ci(method="wilson")
    return Preference(
        wins / counted, float(interval.low), float(interval.high), float(found.pvalue), counted,
        len(differences) - counted,
    )  # fmt: skip


def share_resamples(
    differences: Float[np.ndarray, " P"], resamples: int = 1000, seed: int = 0
) -> Float[np.ndarray, " R"]:
    """Bootstrap the share of pairs with a positive difference; the same seed draws the same pairs."""
    rng = np.random.default_rng(seed)
    drawn = differences[rng.integers(0, len(differences), (resamples, len(differences)))]
    counted = (drawn != 0).sum(1)
    return np.where(counted > 0, (drawn > 0).sum(1) / np.maximum(counted, 1), np.nan)

"""Scores of sentence pairs against labels: Spearman, Pearson, AUC and pair order, with bootstrap intervals.

Resampling draws whole pairs, since the rows of a pair share their sentences. A resample is a vector of row
weights, so that sorting is done once per score and not once per resample, and all models and seeds are
measured on the same resamples, which makes their differences paired.

Shape letters: S scores (a model under a seed), N rows, R resamples, G pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

METRICS = ("spearman", "pearson", "auc", "pair_order")


@dataclass(frozen=True)
class _Ties:
    """Values sorted once: the order, and where each run of equal values starts."""

    order: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, values: Float[np.ndarray, " N"]) -> "_Ties":
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        return cls(order, starts)

    def ranks(self, weights: Float[np.ndarray, "R N"]) -> Float[np.ndarray, "R N"]:
        """Average ranks of the values when row n occurs ``weights[:, n]`` times."""
        total = np.add.reduceat(weights[:, self.order], self.starts, axis=1)
        middle = np.cumsum(total, axis=1) - (total - 1) / 2
        lengths = np.diff(np.r_[self.starts, len(self.order)])
        ranks = np.empty_like(weights)
        ranks[:, self.order] = np.repeat(middle, lengths, axis=1)
        return ranks


def _centred(values: Float[np.ndarray, "R N"], weights: Float[np.ndarray, "R N"]) -> Float[np.ndarray, "R N"]:
    """Subtract each resample's mean; what rounding leaves of a constant becomes zero, not a variance."""
    mean = (weights * values).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
    return np.where(np.abs(values - mean) > 1e-12 * np.abs(mean), values - mean, 0)


def _correlation(
    one: Float[np.ndarray, "R N"], other: Float[np.ndarray, "R N"], weights: Float[np.ndarray, "R N"]
) -> Float[np.ndarray, " R"]:
    """Weighted Pearson correlation of each resample; NaN where one side is constant."""
    one, other = _centred(one, weights), _centred(other, weights)
    scale = np.sqrt((weights * one * one).sum(1) * (weights * other * other).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (weights * one * other).sum(1) / scale, np.nan)


def spearman(
    score: Float[np.ndarray, " N"], label: Float[np.ndarray, " N"], weights: Float[np.ndarray, "R N"]
) -> Float[np.ndarray, " R"]:
    """Rank correlation over all rows at once, average ranks on ties; -1 to 1, ideal 1, chance 0.

    Source: C-STS section 4 (over the whole split, not per condition).
    """
    return _correlation(_Ties.of(score).ranks(weights), _Ties.of(label).ranks(weights), weights)


def pearson(
    score: Float[np.ndarray, " N"], label: Float[np.ndarray, " N"], weights: Float[np.ndarray, "R N"]
) -> Float[np.ndarray, " R"]:
    """Linear correlation over all rows at once; -1 to 1, ideal 1, chance 0."""
    shape = weights.shape
    return _correlation(np.broadcast_to(score, shape), np.broadcast_to(label, shape), weights)


def auc(
    score: Float[np.ndarray, " N"], label: Float[np.ndarray, " N"], weights: Float[np.ndarray, "R N"]
) -> Float[np.ndarray, " R"]:
    """Area under the ROC curve of labels 0 and 1, ties counted half; 0 to 1, ideal 1, chance 0.5.

    NaN where labels are not all 0 or 1, or one class is missing.
    """
    if not np.isin(label, (0.0, 1.0)).all():
        return np.full(len(weights), np.nan)
    positive = weights * label
    many, few = positive.sum(1), (weights * (1 - label)).sum(1)
    ranks = _Ties.of(score).ranks(weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(
            (many > 0) & (few > 0), ((positive * ranks).sum(1) - many * (many + 1) / 2) / (many * few), np.nan
        )


def within_pairs(label: Float[np.ndarray, " N"], pair: Int[np.ndarray, " N"]) -> Int[np.ndarray, "G 2"]:
    """List the row pairs (higher label, lower label) that share their sentences; ties are left out."""
    order = np.argsort(pair, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(pair[order])) + 1)
    found = [(i, j) for rows in groups if len(rows) > 1 for i in rows for j in rows if label[i] > label[j]]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def pair_order(
    score: Float[np.ndarray, " N"],
    label: Float[np.ndarray, " N"],
    weights: Float[np.ndarray, "R N"],
    pairs: Int[np.ndarray, "G 2"],
) -> Float[np.ndarray, " R"]:
    """Share of a pair's two conditions ranked the right way, ties counted half; 0 to 1, ideal 1, chance 0.5.

    A score that ignores the condition gets exactly 0.5; without comparisons the share is NaN.
    """
    right = (np.sign(score[pairs[:, 0]] - score[pairs[:, 1]]) + 1) / 2
    share = weights[:, pairs[:, 0]]
    total = share.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, share @ right / total, np.nan)


@dataclass(frozen=True)
class Measured:
    """One metric of S scores, on the rows as they are and on R resamples of them."""

    value: Float[np.ndarray, " S"]
    resampled: Float[np.ndarray, "S R"]

    @staticmethod
    def interval(resampled: Float[np.ndarray, " R"], level: float = 0.95) -> tuple[float, float]:
        """Percentile interval of resampled values; (NaN, NaN) if the metric is undefined."""
        known = resampled[np.isfinite(resampled)]
        if len(known) == 0:
            return float("nan"), float("nan")
        low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def measure(
    scores: Float[np.ndarray, "S N"],
    label: Float[np.ndarray, " N"],
    pair: Int[np.ndarray, " N"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Measured]:
    """Measure scores by every metric, with a bootstrap over pairs.

    Args:
        scores: one row per model and seed; higher means more alike. NaN is refused.
        label: 0 to 1.
        pair: which rows share their sentences.
        resamples: R.
        seed: of the resampling; the same rows and seed give the same resamples for all models.

    Raises:
        ValueError: a score is NaN (the cosine of a zero vector is undefined).
    """
    if not np.isfinite(scores).all():
        row = int(np.argwhere(~np.isfinite(scores))[0, 1])
        raise ValueError(f"the score of row {row} is undefined (a zero or non-finite vector has no cosine)")
    pairs = within_pairs(label, pair)
    metrics: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "spearman": lambda score, weights: spearman(score, label, weights),
        "pearson": lambda score, weights: pearson(score, label, weights),
        "auc": lambda score, weights: auc(score, label, weights),
        "pair_order": lambda score, weights: pair_order(score, label, weights, pairs),
    }
    once = np.ones((1, len(label)))
    members = np.unique(pair, return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in scores] for name in metrics}
    done = 0
    while done < resamples:
        chunk = min(100, resamples - done)  # bounds memory: 100 x N numbers at a time
        groups = int(members.max()) + 1
        weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=chunk)[:, members].astype(float)
        for name, metric in metrics.items():
            for one, score in enumerate(scores):
                drawn[name][one].append(metric(score, weights))
        done += chunk
    return {
        name: Measured(
            np.array([metric(score, once)[0] for score in scores]),
            np.array([np.concatenate(parts) if parts else np.empty(0) for parts in drawn[name]]),
        )
        for name, metric in metrics.items()
    }

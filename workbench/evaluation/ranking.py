"""Ranks of true answers among all candidates: filtered, counted and never sorted.

A rank is one more than the number of candidates that score higher, so a block of scores is read once per
count and no order is ever made. Blocks of queries bound the memory: a million candidates need 64 MiB.

Shape letters: Q queries, E candidates, D width, T pairs of the filter, S scores (a model under a seed).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK_BYTES = 64 * 2**20  # of scores held at once
METRICS = ("mrr", "hits_at_1", "hits_at_3", "hits_at_10", "mr")


@dataclass(frozen=True)
class Ranks:
    """Ranks of the true candidate of each query; 1 is best.

    Attributes:
        optimistic: ties broken in favour of the true candidate.
        pessimistic: ties broken against it.
    """

    optimistic: Int[Tensor, " Q"]
    pessimistic: Int[Tensor, " Q"]

    @property
    def realistic(self) -> Float[Tensor, " Q"]:
        """Mean of both: the expected rank if ties are broken at random."""
        return (self.optimistic + self.pessimistic).double() / 2


def count_ranks(
    scores: Callable[[slice], Float[Tensor, "B E"]],
    gold: Int[Tensor, " Q"],
    candidates: int,
    known: Callable[[slice], tuple[Int[Tensor, " T"], Int[Tensor, " T"]]] | None = None,
) -> Ranks:
    """Rank each query's true candidate among all candidates, other true answers left out ("filtered").

    Args:
        scores: gives the scores of a slice of the queries, higher is better; its tensor may be written to.
        gold: the true candidate of each query.
        candidates: their number E.
        known: gives the true answers of a slice of the queries as pairs (row within the slice, candidate);
            the gold one may be among them. None: unfiltered.

    Raises:
        ValueError: the score of a true candidate is NaN.
    """
    size = max(1, BLOCK_BYTES // (4 * candidates))
    higher, equal = torch.empty_like(gold), torch.empty_like(gold)
    for start in range(0, len(gold), size):
        rows = slice(start, min(start + size, len(gold)))
        block = scores(rows)
        own = gold[rows, None]
        reached = block.gather(1, own)
        if known is not None:
            block.index_put_(known(rows), block.new_tensor(float("-inf")))
            block.scatter_(1, own, reached)
        if reached.isnan().any():
            raise ValueError(f"the score of the true candidate of a query in {rows} is NaN")
        above = _count(block > reached)
        higher[rows] = above
        equal[rows] = _count(block >= reached) - above
    return Ranks(1 + higher, higher + equal)


def _count(mask: Bool[Tensor, "B E"]) -> Int[Tensor, " B"]:
    """Count the true entries of each row."""
    if mask.device.type != "cpu":
        return mask.sum(1)
    # NumPy counts bytes at the speed of memory; a sum in torch widens each to eight bytes first.
    return torch.tensor([np.count_nonzero(row) for row in mask.numpy()])


def dot_scores(
    queries: Float[Tensor, "Q D"], candidates: Float[Tensor, "E D"]
) -> Callable[[slice], Float[Tensor, "B E"]]:
    """Return the scores of queries as inner products with all candidates, computed block by block."""
    turned = candidates.T
    return lambda rows: queries[rows] @ turned


def metric_values(ranks: Float[np.ndarray, "*S Q"]) -> dict[str, Float[np.ndarray, "*S Q"]]:
    """Return what each rank adds to each metric; a metric is the mean over queries.

    mrr, the mean reciprocal rank, and hits_at_k, the share of ranks of at most k: 0 to 1, higher is better.
    mr, the mean rank: 1 or more, lower is better.

    Source: Bordes et al. (2013), TransE, section 4.1 (filtered); Berrendorf et al. (2020), arXiv 2002.06914
    (optimistic, pessimistic and realistic ranks).
    """
    found = {"mrr": 1 / ranks, "mr": ranks}
    return found | {f"hits_at_{k}": (ranks <= k).astype(float) for k in (1, 3, 10)}


def resample(
    values: Float[np.ndarray, "S Q"], group: Int[np.ndarray, " Q"], resamples: int, seed: int = 0
) -> Float[np.ndarray, "S N"]:
    """Bootstrap means: whole groups are drawn (both questions of a triple together), alike for all scores.

    Args:
        values: one row per model and seed.
        group: which group each query belongs to.
        resamples: N.
        seed: of the drawing.
    """
    members = np.unique(group, return_inverse=True)[1]
    groups = int(members.max()) + 1
    counts = np.bincount(members, minlength=groups)
    sums = np.stack([np.bincount(members, weights=row, minlength=groups) for row in values])
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, 100):
        drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=min(100, resamples - start)).T
        parts.append((sums @ drawn) / (counts @ drawn))
    return np.concatenate(parts, axis=1)

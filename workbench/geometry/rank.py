"""How many directions a set of vectors uses: effective and stable rank, and the alarm for a collapsed space.

The vectors may be embeddings, or the generated weights of several conditions: a generator that gives every
condition the same weights has rank 0, one that moves them along a line has rank 1.

Shape letters: N rows, D width, K singular values.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import entr
from torch import Tensor

_STILL = 1e-6  # deviation, as a share of the largest row's norm, below which rows do not differ


@dataclass(frozen=True)
class Ranks:
    """Ranks of N rows about their mean.

    Attributes:
        effective: exp of the entropy of the singular values' shares; 1 to ``possible``, 0 if rows are equal.
        stable: sum of squared singular values over the largest; 1 to ``effective``'s bound, 0 if rows are
            equal. Small directions hardly count in it.
        possible: the most that N rows of width D can reach, min(N - 1, D).
    """

    effective: float
    stable: float
    possible: int

    @property
    def verdict(self) -> str:
        """One line: "sound", or how far the rows have collapsed (bar: effective rank 3)."""
        if self.effective == 0:
            return "collapsed: all rows are equal"
        if self.effective < min(3, 0.9 * self.possible):
            return f"nearly collapsed: {self.effective:.1f} of {self.possible} directions"
        return "sound"

    def to_dict(self) -> dict[str, float | int | str]:
        """Return the numbers and the verdict as JSON types."""
        return {**asdict(self), "verdict": self.verdict}


def spectrum_rank(values: Float[np.ndarray, " K"]) -> float:
    """Effective rank of one matrix: exp of the entropy of its singular values' shares.

    1 (one direction) to the number of singular values (all alike); 0 for a matrix of zeros. Nothing is
    centred here: :func:`ranks` measures a set of rows about their mean.

    Source: Roy and Vetterli (2007), The effective rank.
    """
    total = values.sum()
    return float(np.exp(entr(values / total).sum())) if total > 0 else 0.0


def ranks(rows: Float[Tensor, "N D"]) -> Ranks:
    """Measure the ranks of rows about their mean.

    Source: Roy and Vetterli (2007), The effective rank; Rudelson and Vershynin (2007), Sampling from large
    matrices (stable rank); Jung et al. (2024), arXiv 2405.11297 (over the training of sentence encoders).
    """
    exact = rows.double()
    values = torch.linalg.svdvals(exact - exact.mean(0))
    return _of_spectrum(values, exact.norm(dim=1).max(), min(len(rows) - 1, rows.shape[1]))


def ranks_of_products(inner: Float[Tensor, "N N"]) -> Ranks:
    """Measure the ranks of rows of which only the inner products are known, such as generated weights.

    Args:
        inner: <x_i, x_j>, in double precision.
    """
    centred = inner - inner.mean(0) - inner.mean(1, keepdim=True) + inner.mean()
    values = torch.linalg.eigvalsh(centred).clamp_min(0).sqrt()
    return _of_spectrum(values, inner.diagonal().max().clamp_min(0).sqrt(), len(inner) - 1)


def _of_spectrum(values: Float[Tensor, " K"], longest: Float[Tensor, ""], possible: int) -> Ranks:
    """Compute both ranks from singular values."""
    if values.max() <= _STILL * longest.clamp_min(1e-30):
        return Ranks(0.0, 0.0, possible)
    stable = values.square().sum() / values.max().square()
    return Ranks(spectrum_rank(values.cpu().numpy()), float(stable), possible)

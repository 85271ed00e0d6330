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

from workbench.encoders import check_finite

STILL = 1e-3  # relative spread below which rows count as the same, here and in a generator's health
_ROUNDING = 1e-6  # relative spread below which their spectrum is that of rounding errors


@dataclass(frozen=True)
class Ranks:
    """Ranks of N rows about their mean.

    Attributes:
        effective: exp of the entropy of the singular values' shares; 1 to ``possible``, 0 if rows are equal.
        stable: sum of squared singular values over the largest; 1 to ``effective``'s bound, 0 if rows are
            equal. Small directions hardly count in it.
        possible: the most that N rows of width D can reach, min(N - 1, D).
        relative_spread: standard deviation of the rows over their root mean square,
            sqrt(sum_i |x_i - mean|^2 / sum_i |x_i|^2); 0 (all rows are equal) to 1. Ranks see the directions
            of what differs and not how little it is.
    """

    effective: float
    stable: float
    possible: int
    relative_spread: float

    @property
    def verdict(self) -> str:
        """One line: "sound", or how far the rows have collapsed (bars: spread 0.001, effective rank 3)."""
        if self.effective == 0:
            return "collapsed: all rows are equal"
        if self.relative_spread < STILL:
            return f"collapsed: rows differ by {self.relative_spread:.1g} of their size"
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

    Raises:
        DataError: a row holds NaN or infinity.

    Source: Roy and Vetterli (2007), The effective rank; Rudelson and Vershynin (2007), Sampling from large
    matrices (stable rank); Jung et al. (2024), arXiv 2405.11297 (over the training of sentence encoders).
    """
    check_finite(rows, "ranks", zeros=True)
    exact = rows.double()
    values = torch.linalg.svdvals(exact - exact.mean(0))
    return _of_spectrum(values, exact.square().sum(), min(len(rows) - 1, rows.shape[1]))


def ranks_of_products(inner: Float[Tensor, "N N"]) -> Ranks:
    """Measure the ranks of rows of which only the inner products are known, such as generated weights.

    Args:
        inner: <x_i, x_j>, in double precision.

    Returns:
        What :func:`ranks` gives of the rows themselves; ideal as many directions as what they stand for has.

    Raises:
        DataError: a product is NaN or infinity.

    Source: as for :func:`ranks`; the eigenvalues of the centred products are the squares of the centred
    rows' singular values (Torgerson, 1952, classical scaling).
    """
    check_finite(inner, "inner products", zeros=True)
    inner = inner.double()
    centred = inner - inner.mean(0) - inner.mean(1, keepdim=True) + inner.mean()
    values = torch.linalg.eigvalsh(centred).clamp_min(0).sqrt()
    return _of_spectrum(values, inner.diagonal().sum(), len(inner) - 1)


def _of_spectrum(values: Float[Tensor, " K"], total: Float[Tensor, ""], possible: int) -> Ranks:
    """Compute ranks from the singular values of what differs and the squares' sum of all."""
    squares = values.square().sum()
    spread = float((squares / total.clamp_min(1e-60)).sqrt())
    if spread <= _ROUNDING:
        return Ranks(0.0, 0.0, possible, spread)
    stable = squares / values.max().square()
    return Ranks(spectrum_rank(values.cpu().numpy()), float(stable), possible, spread)

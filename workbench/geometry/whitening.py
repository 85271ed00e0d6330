"""Whitening: the linear map after which every direction has mean 0 and variance 1.

It repairs spaces in which a few directions hold most of the variance, as those of encoders trained on masked
words only, and harms spaces that a contrastive loss has already spread out.

Shape letters: N rows, D embedding width, K kept directions.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from workbench.encoders import check_finite
from workbench.errors import DataError
from workbench.features import Moments
from workbench.geometry.closed_form import LinearMap

_FLAT = 1e-10  # share of the largest variance below which a direction is rounding


def moments_of(rows: Float[Tensor, "N D"]) -> Moments:
    """Mean and covariance (divided by N) of rows as they are, in double precision.

    Raises:
        DataError: a row holds NaN or infinity.
    """
    check_finite(rows, "embedding", zeros=True)
    exact = rows.double()
    mean = exact.mean(0)
    centred = exact - mean
    return Moments(mean, centred.T @ centred / len(rows), len(rows))


def whitening(moments: Moments, kept: int | None = None) -> LinearMap:
    """Return x -> (x - m) U S^(-1/2), C = U S U^T; the covariance of what it gives is the identity.

    Args:
        moments: of the rows to fit on, see :func:`moments_of`.
        kept: K, from the direction of largest variance on; None for all.

    Raises:
        DataError: more directions are asked for than the rows span, or the covariance holds NaN or infinity.

    Source: Huang et al. (2021), WhiteningBERT, arXiv 2104.01767; Su et al. (2021), arXiv 2103.15316
    (the first K directions).
    """
    check_finite(moments.covariance, "covariance", zeros=True)
    variances, directions = torch.linalg.eigh(moments.covariance.double())
    variances, directions = variances.flip(0), directions.flip(1)
    spanned = int((variances > _FLAT * variances[0].clamp_min(1e-30)).sum())
    kept = len(variances) if kept is None else kept
    if not 0 < kept <= spanned:
        raise DataError(
            f"whitening keeps {kept} directions, but {moments.count} rows of width {len(variances)} span "
            f"{spanned}; give more rows or keep 1 to {spanned}"
        )
    weight = directions[:, :kept] / variances[:kept].sqrt()
    return LinearMap(weight.float(), -(moments.mean.double() @ weight).float())


def mean_cosine(rows: Float[Tensor, "N D"]) -> float:
    """Mean cosine of different rows, -1/(N-1) to 1, ideal about 0: how much all rows share one direction.

    Raises:
        DataError: fewer than two rows, or one that holds NaN or infinity.

    Source: Ethayarajh (2019), arXiv 1909.00512 (anisotropy).
    """
    count = len(rows)
    if count < 2:
        raise DataError(f"the mean cosine compares pairs of rows, got {count}; give at least 2")
    check_finite(rows, "embedding", zeros=True)
    unit = functional.normalize(rows.double(), dim=-1)
    # The sum over all pairs is |sum of rows|^2; each row's product with itself is taken out.
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1)))

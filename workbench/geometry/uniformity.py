"""How near positives lie and how evenly embeddings fill the sphere.

Contrastive losses pull on both: a space that collapses has perfect alignment and uniformity 0.

Shape letters: N rows, D embedding width.
"""

import math

import torch
from jaxtyping import Float, Int
from scipy.special import hyp0f1
from torch import Tensor
from torch.nn import functional

from workbench.encoders import check_finite
from workbench.errors import DataError

_AT_ONCE = 1024  # rows whose products with all others are held
_SHOWN = 2048  # rows that say how embeddings lie


def alignment(
    first: Float[Tensor, "N D"], second: Float[Tensor, "N D"], power: float = 2.0
) -> Float[Tensor, ""]:
    """Mean distance of positives: E |x - y|^a; with a = 2 from 0 to 4, lower is better, ideal 0.

    Args:
        first: x, brought to norm 1 here.
        second: y, the positive of each row.
        power: a, above 0.

    Raises:
        DataError: no rows, or one that holds NaN or infinity.

    Source: Wang and Isola (2020), arXiv 2005.10242.
    """
    if len(first) == 0:
        raise DataError("alignment needs at least one positive pair, got none")
    for side, what in ((first, "first side of the positives"), (second, "second side of the positives")):
        check_finite(side, what, zeros=True)
    apart = functional.normalize(first, dim=-1) - functional.normalize(second, dim=-1)
    # From the squares: a root has no gradient where both are equal.
    return apart.square().sum(-1).pow(power / 2).mean()


def uniformity(points: Float[Tensor, "N D"], sharpness: float = 2.0) -> Float[Tensor, ""]:
    """Log of the mean Gaussian potential of all pairs: log E exp(-t |x - y|^2); -4 t to 0, lower is better.

    0 means that all points are one point. The ideal is that of :func:`uniform_sphere`, which nears -2 t with
    the width: about -4 at t = 2.

    Args:
        points: x, at least two, brought to norm 1 here; every unordered pair counts once.
        sharpness: t, above 0.

    Raises:
        DataError: fewer than two rows, or one that holds NaN or infinity.

    Source: Wang and Isola (2020), arXiv 2005.10242, t = 2.
    """
    count = len(points)
    if count < 2:
        raise DataError(f"uniformity compares pairs of rows, got {count}; give at least 2")
    check_finite(points, "embedding", zeros=True)
    unit = functional.normalize(points, dim=-1)
    sums = []
    for start in range(0, count, _AT_ONCE):
        cosine = (unit[start : start + _AT_ONCE] @ unit[start:].T).clamp(max=1)
        # Column c of this block is row start + c: what lies above the diagonal is every pair once.
        later = torch.ones_like(cosine, dtype=torch.bool).triu(diagonal=1)
        sums.append(torch.logsumexp((2 * sharpness * (cosine - 1)).masked_fill(~later, -torch.inf), (0, 1)))
    return torch.stack(sums).logsumexp(0) - math.log(count * (count - 1) / 2)


def spaced(count: int) -> Int[Tensor, " N"]:
    """Return which of so many rows :func:`placement` is asked about: all, or 2,048 evenly spaced ones."""
    return torch.linspace(0, count - 1, min(count, _SHOWN), dtype=torch.double).long()


def placement(
    first: Float[Tensor, "N D"], second: Float[Tensor, "N D"], points: Float[Tensor, "M D"]
) -> dict[str, float | int | None]:
    """Say how a model's embeddings lie, for its card.

    Args:
        first: one side of the positives; may be empty.
        second: the other side.
        points: what should fill the sphere.

    Returns:
        alignment (0 to 4, ideal 0; None without positives), positives (N), uniformity (-8 to 0, lower is more
        even; None for fewer than two points) and rows (M).
    """
    return {
        "alignment": float(alignment(first, second)) if len(first) else None,
        "positives": len(first),
        "uniformity": float(uniformity(points)) if len(points) > 1 else None,
        "rows": len(points),
    }


def uniform_sphere(width: int, sharpness: float = 2.0) -> float:
    """Uniformity of the uniform distribution on the sphere, its lowest value for that width.

    log( e^(-2t) 0F1(D/2; t^2) ), since a cosine c of random directions has E e^(2tc) = 0F1(D/2; t^2).

    Args:
        width: D, from 2 up.
        sharpness: t, above 0.

    Source: Wang and Isola (2020), arXiv 2005.10242 (the minimiser); Mardia and Jupp (2000), Directional
    statistics (the normalising constant of the von Mises-Fisher distribution).
    """
    return -2 * sharpness + math.log(hyp0f1(width / 2, sharpness**2))

"""What a matrix does to the directions of a space: its spectrum, what it keeps, what two of them share.

A matrix W of shape (A, B) acts on rows, x -> x W, as everywhere in the workbench. Its singular value
decomposition is W = U S V^T: the direction u_i of the space it reads becomes s_i times the direction v_i.

Shape letters: N rows, A width in, B width out, R directions, K of them that
are compared, G things compared.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

_ZERO = 1e-6  # singular values below this share of the largest map to nothing


def singular_values(matrix: Float[Tensor, "A B"]) -> Float[np.ndarray, " R"]:
    """Return the singular values, largest first; 0 or more."""
    return torch.linalg.svdvals(matrix.double()).numpy()


def block_means(matrix: Float[Tensor, "A B"], most: int = 96) -> tuple[Float[np.ndarray, "_ _"], int, int]:
    """Shrink a matrix to at most so many rows and columns by the mean of blocks; a part block counts as one.

    Returns:
        The means, and how many rows and columns a block has; 1 and 1 if nothing was shrunk.
    """
    values = matrix.double().numpy()
    tall, wide = (-(-size // most) for size in values.shape)
    starts = np.arange(0, values.shape[0], tall), np.arange(0, values.shape[1], wide)
    sums = np.add.reduceat(np.add.reduceat(values, starts[0], axis=0), starts[1], axis=1)
    counts = [np.diff([*one, size]) for one, size in zip(starts, values.shape, strict=True)]
    return sums / np.outer(*counts), tall, wide


def kept_directions(rows: Float[Tensor, "N A"], matrix: Float[Tensor, "A B"]) -> pl.DataFrame:
    """Say which directions of a set of rows a matrix keeps: their share of the variance before and after.

    Along u_i the rows vary by var(x u_i). The matrix turns that into s_i^2 var(x u_i) along v_i, and nothing
    else arrives along v_i. Shares: before_i = var(x u_i) / sum_j var(x e_j), after_i = s_i^2 var(x u_i) /
    sum_k s_k^2 var(x u_k).

    Args:
        rows: two or more.
        matrix: as it acts.

    Returns:
        One row per direction that is not mapped to zero, largest singular value first: direction (from 1),
        singular_value, before (0 to 1, their sum is what is kept at all, 1 minus it is removed) and after
        (0 to 1, sums to 1). A ratio after / before above 1 means that the direction gains weight. Empty for
        a matrix of zeros.
    """
    exact = rows.double() - rows.double().mean(0)
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    some = values > _ZERO * values.max() if values.max() > 0 else values > 0
    left, values = left[:, some], values[some]
    variance = (exact @ left).square().mean(0)
    total, arrived = exact.square().mean(0).sum(), (values.square() * variance).sum()
    return pl.DataFrame(
        {
            "direction": range(1, len(values) + 1),
            "singular_value": values.tolist(),
            "before": (variance / total.clamp_min(1e-300)).tolist(),
            "after": (values.square() * variance / arrived.clamp_min(1e-300)).tolist(),
        },
        schema_overrides={"direction": pl.Int64},
    )


def between_share(rows: Float[Tensor, "N A"], groups: list[str]) -> float:
    """Share of the rows' variance that lies between groups (eta squared over all directions); 0 to 1.

    sum_g n_g |mean_g - mean|^2 / sum_n |x_n - mean|^2: 0 if all groups have one mean, 1 if a group's rows are
    all equal. Groups dealt at random have (K - 1) / (N - 1) on average. NaN if the rows do not vary.

    Source: Pearson (1911), On a correction to be made to the correlation ratio; over several directions as in
    Anderson (2001), A new method for non-parametric multivariate analysis of variance.
    """
    exact = rows.double() - rows.double().mean(0)
    number = torch.from_numpy(np.unique(groups, return_inverse=True)[1])
    counts = torch.bincount(number).double()
    sums = torch.zeros(len(counts), exact.shape[1], dtype=torch.double).index_add_(0, number, exact)
    between, total = (sums.square().sum(1) / counts).sum(), exact.square().sum()
    return float(between / total) if total > 0 else float("nan")


def subspace_overlap(one: Float[Tensor, "A B"], other: Float[Tensor, "A C"], kept: int) -> float:
    """Share of the main directions that two matrices read in common: |U_1^T U_2|^2 / k; 0 to 1.

    U_1 and U_2 are the k leading left singular vectors; the value is the mean squared cosine of the principal
    angles between them: 1 for the same subspace, k / A on average for two drawn at random.

    Args:
        one: a matrix that reads width A.
        other: another that reads the same width.
        kept: k, at most the smaller of all widths.

    Source: Bjorck and Golub (1973), Numerical methods for computing angles between linear subspaces.
    """
    return float((leading(one, kept).T @ leading(other, kept)).square().sum() / kept)


def leading(matrix: Float[Tensor, "A B"], kept: int) -> Float[Tensor, "A _"]:
    """Return the leading left singular vectors, one per column.

    Raises:
        ValueError: more than the matrix has.
    """
    if not 1 <= kept <= min(matrix.shape):
        raise ValueError(f"kept must lie in 1..{min(matrix.shape)}, got {kept}")
    return torch.linalg.svd(matrix.double(), full_matrices=False)[0][:, :kept]


def leading_of_product(
    down: Float[Tensor, "A R"], up: Float[Tensor, "R B"], kept: int
) -> Float[Tensor, "A K"]:
    """Return the leading left singular vectors of ``down @ up``, which is never formed.

    With down = Q S and up^T = P T (QR) the product is Q (S T^T) P^T, so they are Q times those of S T^T.

    Raises:
        ValueError: more than the factors have.
    """
    (left, one), (_, other) = torch.linalg.qr(down.double()), torch.linalg.qr(up.double().T)
    return left @ leading(one @ other.T, kept)


def subspace_distances(bases: Float[Tensor, "G A K"]) -> Float[Tensor, "G G"]:
    """Return how far apart the directions are that matrices read: sqrt(1 - overlap); 0 to 1.

    The overlap is that of :func:`subspace_overlap`, so this is the root mean square of the sines of the
    principal angles: 0 for the same directions, 1 for none in common, sqrt(1 - K / A) or so at random.

    Args:
        bases: orthonormal columns, as :func:`leading` gives them.
    """
    overlaps = torch.einsum("gak,hal->ghkl", bases, bases).square().sum((2, 3)) / bases.shape[2]
    return (1 - overlaps).clamp_min(0).sqrt().fill_diagonal_(0)


def cosine_distances(inner: Float[Tensor, "G G"]) -> Float[Tensor, "G G"]:
    """Return 1 minus the cosine of things whose inner products are given; 0 to 2, 1 with a zero.

    Args:
        inner: of each two; squared norms on the diagonal.
    """
    norms = inner.diagonal().clamp_min(0).sqrt()
    cosines = inner / (norms[:, None] * norms).clamp_min(1e-300)
    return (1 - cosines).clamp(0, 2).fill_diagonal_(0)


@dataclass(frozen=True)
class Tree:
    """A dendrogram as lines.

    Attributes:
        order: places of the things, as leaves from left to right.
        across: of each join, four places along the leaves; leaf number p stands at p.
        heights: of each join, four heights: left foot, two at its height, right foot.
    """

    order: list[int]
    across: Float[np.ndarray, "_ 4"]
    heights: Float[np.ndarray, "_ 4"]


def tree_of(distances: Float[np.ndarray, "G G"]) -> Tree:
    """Join what lies nearest, step by step; the height of a join is the mean distance of its two sides.

    Args:
        distances: of two or more things, symmetric, 0 on the diagonal.

    Source: Sokal and Michener (1958), average linkage (UPGMA); leaves ordered as Bar-Joseph et al. (2001).
    """
    joins = hierarchy.linkage(squareform(distances, checks=False), "average", optimal_ordering=True)
    drawn = hierarchy.dendrogram(joins, no_plot=True)
    # scipy puts leaf p at 10 p + 5.
    return Tree(drawn["leaves"], (np.array(drawn["icoord"]) - 5) / 10, np.array(drawn["dcoord"]))

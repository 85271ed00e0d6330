"""Linear maps between two embedding spaces in closed form, from means and covariances alone.

One pass over the pairs gives the moments of each space and their cross-covariance; every map below follows
from these, so a further pair of encoders costs one matrix product over the data and a small decomposition.

Shape letters: X text width, Z image width, R kept directions, N rows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.features import Moments


@dataclass(frozen=True)
class LinearMap:
    """x -> x @ weight + bias; outputs are compared by cosine.

    Attributes:
        weight: of shape (width in, width out).
        bias: of the width out.
    """

    weight: Float[Tensor, "X Z"]
    bias: Float[Tensor, " Z"]

    def __call__(self, rows: Float[Tensor, "N X"]) -> Float[Tensor, "N Z"]:
        """Map rows; not normalised."""
        return rows @ self.weight + self.bias


def _about_the_mean(weight: Tensor, texts: Moments, images: Moments) -> LinearMap:
    """Map what differs from the mean text, leaving out the direction of the mean image.

    What a mapped text has along the mean image it has for all images that are equally near their mean: a
    ranking of images hardly sees it, but a ranking of texts for one image would be decided by it.
    """
    shared = torch.nn.functional.normalize(images.mean, dim=0)
    weight = weight - torch.outer(weight @ shared, shared)
    return LinearMap(weight.float(), -(texts.mean @ weight).float())


def _loaded(covariance: Tensor, strength: float) -> Tensor:
    """Add ``strength`` times the mean variance to every direction."""
    load = strength * covariance.diagonal().mean()
    return covariance + load * torch.eye(len(covariance), dtype=covariance.dtype)


def factor(moments: Moments, strength: float) -> Float[Tensor, "X X"]:
    """Return the lower Cholesky factor L of C + s I; s is ``strength`` times the mean variance.

    One factor per encoder serves every pair it is in.
    """
    return torch.linalg.cholesky(_loaded(moments.covariance, strength))


def ridge(texts: Moments, images: Moments, cross: Float[Tensor, "X Z"], strength: float = 0.1) -> LinearMap:
    """Least squares from texts to images: W = (C_xx + s I)^-1 C_xz.

    Args:
        texts: of unit text embeddings.
        images: of unit image features.
        cross: their cross-covariance.
        strength: s in units of the mean variance, 0 or more.

    Source: Hoerl and Kennard (1970).
    """
    return _about_the_mean(torch.linalg.solve(_loaded(texts.covariance, strength), cross), texts, images)


def procrustes(texts: Moments, images: Moments, cross: Float[Tensor, "X Z"]) -> LinearMap:
    """The rotation that brings texts closest to images: W = U V^T with C_xz = U S V^T.

    With unequal widths the smaller space is turned into the larger, or the larger projected.

    Source: Schoenemann (1966).
    """
    left, _, right = torch.linalg.svd(cross, full_matrices=False)
    return _about_the_mean(left @ right, texts, images)


@dataclass(frozen=True)
class Canonical:
    """Canonical correlation analysis of two spaces.

    Attributes:
        of_text: from texts to the shared space.
        of_image: from images to the shared space; directions weighted by their correlation on the text side.
        correlations: from largest to smallest, 0 to 1.
    """

    of_text: LinearMap
    of_image: LinearMap
    correlations: Float[Tensor, " R"]


def canonical(
    texts: Moments,
    images: Moments,
    cross: Float[Tensor, "X Z"],
    factors: tuple[Float[Tensor, "X X"], Float[Tensor, "Z Z"]],
    kept: int = 128,
) -> Canonical:
    """Regularised CCA: U S V^T = L_x^-1 C_xz L_z^-T, texts mapped by L_x^-T U S, images by L_z^-T V.

    Args:
        texts: of unit text embeddings.
        images: of unit image features.
        cross: their cross-covariance.
        factors: of the texts' and the images' covariance, see :func:`factor`; any square root gives the same
            scores, and Cholesky's costs a fraction of an eigendecomposition.
        kept: directions R; fewer if a space is narrower.

    Source: Hotelling (1936); the weighting by correlation as in Li et al. (2025), CSA, arXiv 2410.07610.
    """
    of_x, of_z = factors
    solve = torch.linalg.solve_triangular
    whitened = solve(of_z, solve(of_x, cross, upper=False).T, upper=False).T
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    kept = min(kept, len(values))
    of_text = solve(of_x.T, left[:, :kept] * values[:kept], upper=True)
    of_image = solve(of_z.T, right[:kept].T, upper=True)
    return Canonical(
        LinearMap(of_text.float(), -(texts.mean @ of_text).float()),
        LinearMap(of_image.float(), -(images.mean @ of_image).float()),
        values[:kept].float(),
    )


def bilinear(
    texts: Moments,
    images: Moments,
    cross: Float[Tensor, "X Z"],
    factors: tuple[Float[Tensor, "X X"], Float[Tensor, "Z Z"]],
) -> LinearMap:
    """The score of :func:`canonical` with all directions kept, as a map of texts: W = C_xx^-1 C_xz C_zz^-1.

    x^T L_x^-T U S V^T L_z^-1 z is x^T W z, so images can be used as they are and nothing is decomposed. It
    ranks images as the two-sided score does, but for the norms that cosines divide by.

    Args:
        texts: of unit text embeddings.
        images: of unit image features.
        cross: their cross-covariance.
        factors: of the texts' and the images' covariance, see :func:`factor`.
    """
    of_x, of_z = factors
    weight = torch.cholesky_solve(torch.cholesky_solve(cross, of_x).T, of_z).T
    return _about_the_mean(weight, texts, images)


def linear_alignment(texts: Moments, images: Moments, cross: Float[Tensor, "X Z"]) -> float:
    """Linear centred kernel alignment of paired spaces: |C_xz|^2 / (|C_xx| |C_zz|); 0 to 1.

    It needs no map and no validation data, which makes it a screen; wide spaces score higher by their width
    alone.

    Source: Kornblith et al. (2019), arXiv 1905.00414.
    """
    norms = torch.linalg.matrix_norm(texts.covariance) * torch.linalg.matrix_norm(images.covariance)
    return float(torch.linalg.matrix_norm(cross) ** 2 / norms)

"""What a score is made of: integrated gradients of one input, and of two inputs that are compared.

A network's output is followed along the straight line from a reference input to the input itself. What each
part of the input adds on the way sums to the difference between the outputs at both ends (completeness).

Shape letters: S steps, L parts of an input such as tokens, D width of a part, K width of an output.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import DataError

STEPS = 128
_AT_ONCE = 256  # inputs sent through the network together, forwards alone
_AT_ONCE_BACK = 32  # and where derivatives are taken back through it

# From inputs, one per row, to one score, or one vector, each.
Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attribution:
    """What each part of an input adds to a score.

    Attributes:
        values: of the parts; in units of the score, positive ones raise it.
        score: at the input.
        reference: the score at the reference input.
    """

    values: Float[Tensor, " L"]
    score: float
    reference: float

    @property
    def incompleteness(self) -> float:
        """|sum of values - (score - reference)| over |score - reference|; 0 or more, ideal 0."""
        difference = self.score - self.reference
        return abs(float(self.values.sum()) - difference) / max(abs(difference), 1e-12)


def integrated_gradients(
    score: Score,
    parts: Float[Tensor, "L D"],
    reference: Float[Tensor, "L D"],
    steps: int = STEPS,
    told: Callable[[int], None] = lambda _: None,
) -> Attribution:
    """Attribute a score: a_l = sum_d (x - r)_ld  integral_0^1 dF/dx_ld (r + t (x - r)) dt.

    Two networks that give the same scores get the same attributions, however they compute them.

    Args:
        score: from inputs ``[S, L, D]`` to a score each, ``[S]``; differentiable.
        parts: x, the input.
        reference: r, an input that says nothing.
        steps: S of the integral (Gauss-Legendre), at least 1; more make it complete.
        told: called with the number of steps done, now and then; what it raises ends the work.

    Returns:
        Values of any sign in units of the score that sum to F(x) - F(r), up to the ``incompleteness``
        (ideal 0).

    Raises:
        DataError: fewer than one step, or a score that is not finite on the way.

    Source: Sundararajan, Taly and Yan (2017), arXiv 1703.01365.
    """
    places, shares = _quadrature(steps, parts)
    change, total = parts - reference, torch.zeros_like(parts)
    with torch.enable_grad():
        for number, (place, share) in enumerate(
            zip(places.split(_AT_ONCE_BACK), shares.split(_AT_ONCE_BACK), strict=True)
        ):
            told(number * _AT_ONCE_BACK)
            at = (reference + place[:, None, None] * change).requires_grad_()
            # A score may not depend on this input at all: a head that ignores its condition.
            value = _checked(score(at)).sum() + 0 * at.sum()
            found = torch.autograd.grad(value, at)[0]
            total += (share[:, None, None] * found).sum(0)
    with torch.no_grad():
        ends = _checked(score(torch.stack([parts, reference])))
    return Attribution((total * change).sum(1), float(ends[0]), float(ends[1]))


@torch.no_grad()  # no backward pass follows; forward mode goes on
def integrated_jacobian(
    vector: Score, parts: Float[Tensor, "L D"], reference: Float[Tensor, "L D"], steps: int = STEPS
) -> Float[Tensor, "L K"]:
    """Attribute a vector: a_lk = sum_d (x - r)_ld  integral_0^1 df_k/dx_ld (r + t (x - r)) dt.

    Each part's share is one derivative along that part's change, in forward mode: L of them a step, where the
    whole Jacobian takes K backward passes.

    Args:
        vector: from inputs ``[S, L, D]`` to vectors ``[S, K]``; takes forward-mode derivatives.
        parts: x, the input.
        reference: r.
        steps: as for :func:`integrated_gradients`.

    Returns:
        Row l is what part l adds to each entry of f, of any sign and in its units; ideally the rows sum to
        f(x) - f(r), and more steps bring them there.

    Raises:
        DataError: fewer than one step, or a vector that is not finite on the way.

    Source: Moeller, Nikolaev and Pado (2023), An Attribution Method for Siamese Encoders, arXiv 2310.05703:
    their integrated Jacobian, contracted with x - r.
    """
    places, shares = _quadrature(steps, parts)
    change = parts - reference
    # Direction l: only part l moves.
    alone = torch.eye(len(parts), dtype=change.dtype, device=change.device)[..., None] * change
    total, group = change.new_zeros(()), max(1, _AT_ONCE // len(parts))
    for place, share in zip(places.split(group), shares.split(group), strict=True):
        at = reference + place[:, None, None] * change

        def along(direction: Tensor, at: Tensor = at) -> Tensor:
            return torch.func.jvp(vector, (at,), (direction.expand_as(at),))[1]

        # The network itself runs once for all directions, only its derivative runs for each.
        with warnings.catch_warnings():
            # Torch's own forward-mode rules are compiled at their first use, by what torch deprecates.
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            moved = _checked(torch.func.vmap(along)(alone))
        total = total + torch.einsum("s,lsk->lk", share, moved)
    return total


@dataclass(frozen=True)
class PairAttribution:
    """What each pair of parts, one of either input, adds to the product of two vectors.

    Attributes:
        values: in units of the score.
        score: f(a) . f(b).
        reference: what no pair stands for: f(a) . f(r_b) + f(r_a) . f(b) - f(r_a) . f(r_b).
    """

    values: Float[Tensor, "L_one L_other"]
    score: float
    reference: float

    @property
    def incompleteness(self) -> float:
        """|sum of values - (score - reference)|, in units of the score; 0 or more, ideal 0."""
        return abs(float(self.values.sum()) - (self.score - self.reference))


def siamese_attribution(
    vector: Score,
    first: tuple[Float[Tensor, "L_one D"], Float[Tensor, "L_one D"]],
    second: tuple[Float[Tensor, "L_other D"], Float[Tensor, "L_other D"]],
    steps: int = 50,
) -> PairAttribution:
    """Attribute f(a) . f(b) to pairs of parts: A = J_a J_b^T, J as :func:`integrated_jacobian` gives it.

    Args:
        vector: f; of unit norm if the score is to be a cosine.
        first: a and its reference r_a.
        second: b and its reference r_b.
        steps: of both integrals.

    Source: Moeller, Nikolaev and Pado (2023), arXiv 2310.05703. Deviation: they move embeddings so that
    f(r) = 0; here the terms with a reference are kept and returned.
    """
    one, other = (integrated_jacobian(vector, *side, steps) for side in (first, second))
    with torch.no_grad():
        (a, r_a), (b, r_b) = (vector(torch.stack(side)) for side in (first, second))
    return PairAttribution(one @ other.T, float(a @ b), float(a @ r_b + r_a @ b - r_a @ r_b))


def _quadrature(steps: int, like: Tensor) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """Return places between 0 and 1 and their shares: Gauss-Legendre, exact up to degree 2 S - 1."""
    if steps < 1:
        raise DataError(f"the integral needs at least 1 step, got {steps}; 128 are usual")
    places, shares = np.polynomial.legendre.leggauss(steps)
    return torch.from_numpy((places + 1) / 2).to(like), torch.from_numpy(shares / 2).to(like)


def _checked(found: Tensor) -> Tensor:
    if not torch.isfinite(found).all():
        raise DataError(
            "the score is not finite on the way from the reference to the input; choose another reference"
        )
    return found

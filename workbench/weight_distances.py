"""How far apart generated weights lie: three measures, since each answers another question.

Shape letters: U conditions or class sets, A width in, K main directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.geometry.matrices import cosine_distances, leading, leading_of_product, subspace_distances
from workbench.hypernetworks import GeneratedWeights

MAIN_DIRECTIONS = 16  # of a matrix, when the directions it reads are compared


@dataclass(frozen=True)
class Measure:
    """A measure of distance.

    Attributes:
        label: to choose it by.
        scale: what a value is, with its range; for axes and titles.
        answers: which question it answers.
    """

    label: str
    scale: str
    answers: str


MEASURES = {
    "frobenius": Measure(
        "size and direction (Frobenius)",
        "Frobenius distance of generated weights (0 or more)",
        "Frobenius distance: how far one weight has to be changed to become the other. Large weights lie far "
        "from all others, so it follows the norms where nothing scales them.",
    ),
    "cosine": Measure(
        "direction alone (cosine)",
        "1 - cosine of generated weights (0 to 2; 1: unrelated)",
        "1 minus the cosine: whether two weights do the same, however strongly. 0: the same up to size, 1: "
        "nothing in common, 2: opposite.",
    ),
    "angles": Measure(
        "what is read (principal angles)",
        "sine of {kept} principal angles (0 to 1; chance {chance:.2f})",
        "Principal angles: whether two weights read the same directions of their input, whatever they make "
        "of them. Root mean square of the sines; 0: the same directions, 1: none in common.",
    ),
}


def measures_of(weights: GeneratedWeights, slots: Sequence[str]) -> list[str]:
    """Name the measures that some slots allow: only a single matrix reads directions."""
    matrix = len(slots) == 1 and weights.slot(slots[0]).mode in ("full", "lowrank")
    return [name for name in MEASURES if matrix or name != "angles"]


def distances_of(
    weights: GeneratedWeights, slots: Sequence[str], measure: str
) -> tuple[Float[Tensor, "U U"], str]:
    """Compare generated weights with each other; an identity that is added to all of them is left out.

    Args:
        weights: of two or more conditions.
        slots: which of the generated tensors; several are taken together.
        measure: one of :func:`measures_of`.

    Returns:
        Distances, 0 on the diagonal, and what they are with their range.
    """
    if measure == "angles":
        bases = torch.stack([_read(weights, slots[0], place) for place in range(len(weights))])
        return subspace_distances(bases), scale_of_angles(*bases.shape[1:])
    scale = MEASURES[measure].scale
    if measure == "cosine":
        return cosine_distances(sum(weights.inner_products(slot) for slot in slots)), scale
    return sum(weights.distances(slot) ** 2 for slot in slots).sqrt(), scale


def scale_of_angles(width: int, kept: int) -> str:
    """Say what angles between main directions are, and what directions drawn at random would have.

    Args:
        width: A, of what is read.
        kept: K, how many directions are compared.
    """
    return MEASURES["angles"].scale.format(kept=kept, chance=(1 - kept / width) ** 0.5)


def _read(weights: GeneratedWeights, slot: str, place: int) -> Float[Tensor, "A K"]:
    """Return the main directions that one generated matrix reads."""
    about = weights.slot(slot)
    kept = min(MAIN_DIRECTIONS, about.rank or min(about.shape))
    if about.mode == "lowrank":
        factors = (weights.tensors[f"{slot}.{name}"][place] for name in ("down", "up"))
        return leading_of_product(*factors, kept)
    return leading(weights.tensors[slot][place], kept)

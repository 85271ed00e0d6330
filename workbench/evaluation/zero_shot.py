"""Zero-shot classification: where the true class stands among all classes of a set.

Shape letters: N images, C classes, D width, S models and seeds.
"""

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

TIE = 1e-6  # products of unit vectors that are closer than this differ by single precision's rounding only


def class_ranks(
    images: Float[Tensor, "N D"], weights: Float[Tensor, "C D"], label: Int[Tensor, " N"]
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Rank each image's true class; 1 is best.

    Args:
        images: unit embeddings.
        weights: one unit direction per class.
        label: true classes.

    Returns:
        The rank, a tie counted against the model, so that a constant score never looks right; and the
        predicted class.
    """
    scores = images @ weights.T
    own = scores.gather(1, label[:, None])
    # NaN compares as false and would look like the best rank. Equal directions may score differently by a
    # rounding, since a matrix product sums some columns in another order.
    return (~(scores < own - TIE)).sum(1), scores.argmax(1)


def accuracy_values(
    rank: Int[np.ndarray, "*S N"], classes: Int[np.ndarray, " N"]
) -> dict[str, Float[np.ndarray, "*S N"]]:
    """Return what each image adds to top-1 and top-5 accuracy; 0 to 1, higher is better, ideal 1.

    Args:
        rank: of the true class; 0 stands for a guess, which is right with probability k / classes.
        classes: number of classes each image is asked among.
    """
    found = {}
    for k in (1, 5):
        guess = np.broadcast_to(np.minimum(1, k / classes), rank.shape)
        found[f"top{k}"] = np.where(rank == 0, guess, rank <= k)
    return found


def per_class_weights(label: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Return image weights of mean 1 under which a mean over images is the mean over classes of their recall.

    Source: CLIP_benchmark's mean_per_class_recall; classes without images do not count.
    """
    counts = np.bincount(label)
    return len(label) / (np.count_nonzero(counts) * counts[label])

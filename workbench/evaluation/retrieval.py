"""Retrieval in both directions, and how well one ranking of encoders agrees with another.

Shape letters: N images, K captions of an image, D width, P pairs of encoders, R resamples.
"""

from math import comb

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from sklearn.metrics import ndcg_score
from torch import Tensor

RECALLS = (1, 5, 10)
BLOCK = 2**22  # scores at a time: 840 images at once of a thousand with five captions each
TIE = 1e-6  # products of unit vectors that are closer than this differ by rounding only


def retrieval_ranks(
    texts: Float[Tensor, "N K D"], images: Float[Tensor, "N D"]
) -> tuple[Int[Tensor, "N K"], Int[Tensor, " N"]]:
    """Rank each caption's image among all images, and each image's best caption among all captions.

    A tie counts against the model, so that a constant score never looks right; but captions that an image
    shares with another stay ties.

    Args:
        texts: unit embeddings of the captions of each image.
        images: unit embeddings.

    Returns:
        Ranks from text to image and from image to text; 1 is best.
    """
    count, most, _ = texts.shape
    to_image = torch.empty(count, most, dtype=torch.long)
    beaten = torch.zeros(count, dtype=torch.long)
    own = torch.einsum("nkd,nd->nk", texts, images)
    best = own.amax(1)
    block = max(1, BLOCK // (count * most))  # bounds the memory
    for start in range(0, count, block):
        part = slice(start, min(start + block, count))
        scores = texts[part].flatten(0, 1) @ images.T
        mine = own[part].flatten()[:, None]
        to_image[part] = (~(scores < mine - TIE)).sum(1).view(-1, most).clamp_min(1)
        beats = ~(scores < best - TIE)
        rows = torch.arange(part.start, part.stop)
        beats.view(-1, most, count)[torch.arange(len(rows)), :, rows] = False  # an image's own captions
        beaten += beats.sum(0)
    return to_image, beaten + 1


def recall_values(
    to_image: Int[np.ndarray, "N K"], to_text: Int[np.ndarray, " N"]
) -> dict[str, Float[np.ndarray, " N"]]:
    """Return what each image adds to every recall; a recall is the mean over images.

    t2i_recall_at_k, the share of captions whose image is among the first k; i2t_recall_at_k, the share of
    images with one of their captions among the first k; recall_at_k, the mean of both. 0 to 1, higher is
    better.

    Source: Hodosh, Young and Hockenmaier (2013), section 4.
    """
    found = {}
    for k in RECALLS:
        found[f"t2i_recall_at_{k}"] = (to_image <= k).mean(1)
        found[f"i2t_recall_at_{k}"] = (to_text <= k).astype(float)
        found[f"recall_at_{k}"] = (found[f"t2i_recall_at_{k}"] + found[f"i2t_recall_at_{k}"]) / 2
    return found


def rank_agreement(
    scores: Float[np.ndarray, "P ..."], truth: Float[np.ndarray, "P ..."]
) -> Float[np.ndarray, "..."]:
    """Spearman correlation of two scorings of the same pairs; -1 to 1, higher is better, ideal 1.

    NaN where one of them scores all pairs alike.
    """
    one, two = (rankdata(part, axis=0) for part in (scores, truth))
    one, two = one - one.mean(0), two - two.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((one * two).sum(0) / np.sqrt((one**2).sum(0) * (two**2).sum(0)))


def gain_of_order(scores: Float[np.ndarray, " P"], truth: Float[np.ndarray, " P"], k: int) -> float:
    """NDCG@k of the order that scores give, gains being the true scores; 0 to 1, higher is better.

    Pairs that score alike are taken in all orders; one pair alone has one order, the best.

    Source: Jaervelin and Kekaelaeinen (2002); scikit-learn's ndcg_score.
    """
    if len(truth) == 1:
        return 1.0  # scikit-learn refuses it
    return float(ndcg_score(truth[None], scores[None], k=k))


def expected_best(scores: Float[np.ndarray, " P"], truth: Float[np.ndarray, " P"], size: int) -> float:
    """Return the true score of the pair chosen by ``scores``, on average over all subsets of a size.

    The i-th best of P is the best of a random subset of n with probability C(P - i, n - 1) / C(P, n). Pairs
    that score alike count with the mean of their true scores, as if the choice among them were drawn.
    """
    count = len(scores)
    _, group = np.unique(np.round(scores, 9), return_inverse=True)  # equal means may differ by rounding
    truth = (np.bincount(group, truth) / np.bincount(group))[group]
    order = np.argsort(-scores, kind="stable")
    left = np.array([comb(count - place, size - 1) for place in range(1, count + 1)], dtype=float)
    return float((left / left.sum() * truth[order]).sum())

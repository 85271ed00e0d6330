"""Training objectives, one function each, with formula and source.

Shape letters: N rows, P pairs, B images, T texts, D width.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


def similarity_mse(similarity: Float[Tensor, " N"], label: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """Mean squared difference between cosine and label; 0 or more, ideal 0.

    L_MSE = mean (cos - y)^2 with labels y scaled to 0..1.

    Source: Hyper-CL section 3.1; Deshpande et al. (2023), C-STS, section 4.
    """
    return functional.mse_loss(similarity, label)


def pair_contrastive(
    high: Float[Tensor, " P"], low: Float[Tensor, " P"], temperature: float
) -> Float[Tensor, ""]:
    """Two-way InfoNCE between a pair's two conditions; 0 or more, log 2 when they score alike.

    L_CL = -log( e^(high/t) / (e^(high/t) + e^(low/t)) ) = softplus(-(high - low) / t), mean over pairs.

    Args:
        high: cosine of a pair's sentences under the condition with the higher label.
        low: the same under the condition with the lower label.
        temperature: t, above 0.

    Source: Hyper-CL section 3.1 (the pair's own low condition is the only negative).
    """
    if len(high) == 0:
        return high.sum()  # a batch without such pairs adds nothing, and keeps its gradient path
    return functional.softplus((low - high) / temperature).mean()


def same_condition_contrastive(
    first: Float[Tensor, "N D"],
    second: Float[Tensor, "N D"],
    condition: Int[Tensor, " N"],
    label: Float[Tensor, " N"],
    temperature: float,
) -> Float[Tensor, ""]:
    """InfoNCE against the other sentences of the batch that carry the same condition; 0 or more.

    For each row with a label above 0.5, its second sentence is the positive and the second sentences of the
    other rows under the same condition are the negatives. Not in the paper: it compares all conditions of one
    pair only.

    Args:
        first: conditioned embeddings of the first sentences.
        second: conditioned embeddings of the second sentences.
        condition: which condition each row has.
        label: 0 to 1.
        temperature: above 0.

    Source: van den Oord et al. (2018), InfoNCE, with the negatives restricted to one condition.
    """
    logits = functional.normalize(first, dim=-1) @ functional.normalize(second, dim=-1).T / temperature
    logits = logits.masked_fill(condition[:, None] != condition[None], float("-inf"))
    anchors = (label > 0.5).nonzero()[:, 0]
    if len(anchors) == 0:
        return first.sum() * 0
    return functional.cross_entropy(logits[anchors], anchors)


def sigmoid_contrastive(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "T D"],
    match: Bool[Tensor, "B T"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Sum over texts, mean over images, of the binary cross-entropy "is this text true of this image".

    L = -(1/B) sum_ij log sigmoid( z_ij (t <x_i, y_j> + b) ), z_ij = 1 where text j is true of image i, else
    -1.
    0 or more, ideal 0. With one text per image and a diagonal match it is SigLIP's loss.

    Args:
        images: x, unit norm.
        texts: y, unit norm, each text once.
        match: which texts are true of which images.
        scale: t, above 0.
        bias: b; the right start is the log odds of a match, -log(T - 1) with one match per image.

    Source: Zhai et al. (2023), SigLIP, algorithm 1. Deviation: equal texts of a batch are one column, so that
    a text that is true of several images is no negative of them.
    """
    logits = scale * images @ texts.T + bias
    signs = match.to(logits.dtype) * 2 - 1
    return -functional.logsigmoid(signs * logits).sum() / len(images)

"""Training objectives, one function each, with formula and source.

Shape letters: N rows, P pairs, B images, T texts, D width.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

TILE_BYTES = 64 * 2**20  # of logits held at once by paired_contrastive


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


def in_batch_contrastive(
    anchor: Float[Tensor, "B D"], positive: Float[Tensor, "B D"], temperature: float
) -> Float[Tensor, ""]:
    """InfoNCE of each anchor against all positives of the batch; 0 or more, log B where all are alike.

    L = -mean_i log( e^(cos(a_i, p_i) / t) / sum_j e^(cos(a_i, p_j) / t) ). One way: the other sides' anchors
    are no negatives of a positive.

    Args:
        anchor: a, of any norm.
        positive: p, of any norm.
        temperature: t, above 0.

    Source: Gao, Yao and Chen (2021), SimCSE, arXiv 2104.08821, equation 1.
    """
    cosines = functional.normalize(anchor, dim=-1) @ functional.normalize(positive, dim=-1).T
    return functional.cross_entropy(cosines / temperature, torch.arange(len(anchor), device=anchor.device))


def triplet_margin(
    anchor: Float[Tensor, "N D"],
    positive: Float[Tensor, "N D"],
    negative: Float[Tensor, "N D"],
    margin: float = 0.5,
) -> Float[Tensor, ""]:
    """Hinge on how much nearer the positive is; 0 or more, ideal 0, the margin where both are as near.

    L = mean max(0, |a - p|^2 - |a - n|^2 + m). For unit vectors that is 2 (cos(a, n) - cos(a, p)) + m, and
    unlike plain distances the squares have a gradient everywhere.

    Args:
        anchor: a, unit norm.
        positive: p, unit norm.
        negative: n, unit norm.
        margin: m, 0 to 4.

    Source: Schroff, Kalenichenko and Philbin (2015), FaceNet, arXiv 1503.03832, equation 3.
    """
    near, far = ((anchor - other).square().sum(-1) for other in (positive, negative))
    return functional.relu(near - far + margin).mean()


def triplet_ratio(
    anchor: Float[Tensor, "N D"], positive: Float[Tensor, "N D"], negative: Float[Tensor, "N D"]
) -> Float[Tensor, ""]:
    """Square of the positive's share in a softmax of distances; 0 to 1, ideal 0, 1/4 where both are as near.

    L = mean ( e^|a - p| / (e^|a - p| + e^|a - n|) )^2. It has no margin to choose and never quite reaches 0.

    Args:
        anchor: a, of any norm.
        positive: p.
        negative: n.

    Source: Hoffer and Ailon (2015), Deep metric learning using Triplet network, arXiv 1412.6622, section 2.1.
    """
    # Its distance adds 1e-6 to every difference, so equal rows have a gradient.
    near, far = (functional.pairwise_distance(anchor, other) for other in (positive, negative))
    return torch.sigmoid(near - far).square().mean()


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


def paired_contrastive(
    mapped: Float[Tensor, "B D"],
    images: Float[Tensor, "B D"],
    scale: float = 100.0,
    tile_bytes: int = TILE_BYTES,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE between rows that belong together, all others of the batch as negatives.

    L = -(1/2B) sum_i [ log softmax_j(t <y_i, z_j>)_i + log softmax_j(t <y_j, z_i>)_i ]; 0 or more, ideal 0,
    log B when all score alike.

    Value and gradient are computed together, tile by tile, so that memory grows with the batch and not with
    its square. Logits that fit into one tile are computed once, others once more for the gradient.

    Args:
        mapped: y, unit norm.
        images: z, unit norm.
        scale: t, the inverse temperature, above 0.
        tile_bytes: of logits held at once.

    Raises:
        ValueError: unequal numbers of rows.

    Source: Radford et al. (2021), CLIP, figure 3; Hyper-Align and APE with t = 100, not learned. Exact
    tiling as in Cheng et al. (2024), Inf-CL, arXiv 2410.17243.
    """
    if mapped.shape != images.shape:
        raise ValueError(f"{tuple(mapped.shape)} mapped texts for {tuple(images.shape)} images; pair them up")
    return _PairedContrastive.apply(mapped, images, scale, tile_bytes)


def _normalisers_and_share(
    logits: Float[Tensor, "B B"],
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, "B B"]]:
    """Return the log of the sums over rows and columns, and P_rows + P_columns; overwrites the logits.

    Each exponential is taken once, for the sums and for the shares.
    """
    top = logits.amax(1)
    rows = (logits - top[:, None]).exp_()
    row_sums = rows.sum(1)
    high = logits.amax(0)
    columns = logits.sub_(high).exp_()
    column_sums = columns.sum(0)
    share = rows.div_(row_sums[:, None]).add_(columns.div_(column_sums))
    return top + row_sums.log(), high + column_sums.log(), share


class _PairedContrastive(torch.autograd.Function):
    """dL/dS = (P_rows + P_columns - 2 I) / 2B, S = t y z^T, P the softmax over rows or columns of S."""

    @staticmethod
    def forward(
        context: Any, mapped: Tensor, images: Tensor, scale: float, tile_bytes: int
    ) -> Float[Tensor, ""]:
        count = len(mapped)
        tile = max(1, min(count, tile_bytes // (mapped.element_size() * count)))
        starts = range(0, count, tile)
        own = (mapped * images).sum(1) * scale
        need_mapped, need_images = context.needs_input_grad[:2]
        needed = need_mapped or need_images
        if len(starts) == 1 and needed:
            rows, columns, share = _normalisers_and_share((mapped @ images.T).mul_(scale))
        else:
            rows = torch.empty_like(own)
            columns = torch.full_like(own, float("-inf"))
            for start in starts:
                logits = (mapped[start : start + tile] @ images.T).mul_(scale)
                rows[start : start + tile] = logits.logsumexp(1)
                columns = torch.logaddexp(columns, logits.logsumexp(0))
        to_mapped = torch.empty_like(mapped) if need_mapped else None
        to_images = torch.zeros_like(images) if need_images else None
        for start in starts if needed else ():
            part = slice(start, start + tile)
            if len(starts) > 1:
                logits = (mapped[part] @ images.T).mul_(scale)
                share = (logits - rows[part, None]).exp_()
                share += logits.sub_(columns).exp_()
            share.mul_(scale / (2 * count))
            if need_mapped:
                to_mapped[part] = share @ images
            if need_images:
                to_images.addmm_(share.T, mapped[part])
        for found, other in ((to_mapped, images), (to_images, mapped)):
            if found is not None:
                found.sub_(other, alpha=scale / count)
        context.save_for_backward(to_mapped, to_images)
        return ((rows + columns) / 2 - own).mean()

    @staticmethod
    @once_differentiable
    def backward(context: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        to_mapped, to_images = context.saved_tensors
        return (
            None if to_mapped is None else to_mapped * upstream,
            None if to_images is None else to_images * upstream,
            None,
            None,
        )

"""Slices of an encoder: its embeddings cut to their first entries and read off at lower layers.

An encoder, or a conditioned head over it, nests well if a slice scores nearly what the whole does.

Shape letters: N rows, D embedding width, K depths.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from workbench.encoders import TextEncoder
from workbench.errors import DataError
from workbench.evaluation.similarity import spearman

Sides = tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]


def depth_of(encoder: TextEncoder) -> int:
    """Return the number of layers of an encoder.

    Raises:
        DataError: it is no transformer.
    """
    if not hasattr(encoder.model[0], "auto_model"):
        raise DataError(f"encoder {encoder.name} is no transformer, so it has no layers to read")
    return encoder.model[0].auto_model.config.num_hidden_layers


def widths_of(width: int) -> tuple[int, ...]:
    """Return the slices that are trained and asked: an eighth, a quarter, half and all of the entries."""
    return width // 8, width // 4, width // 2, width


@torch.no_grad()
def depth_embeddings(
    encoder: TextEncoder, texts: list[str], depths: Sequence[int], batch_size: int = 64
) -> Float[Tensor, "K N D"]:
    """Read sentence vectors off several layers, by the encoder's own pooling, norm 1; one pass for all.

    Args:
        encoder: any.
        texts: at least one.
        depths: layers after which to read; 0 is the input.
        batch_size: texts read together.

    Raises:
        DataError: a depth the encoder does not have.
    """
    layers = depth_of(encoder)
    transformer, after = encoder.model[0].auto_model, list(encoder.model.children())[1:]
    if not depths or not all(0 <= depth <= layers for depth in depths):
        raise DataError(f"depths must lie in 0..{layers} for {encoder.name}, got {list(depths)}")
    found = []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        read = encoder.model.tokenizer(
            part, padding=True, truncation=True, max_length=encoder.window, return_tensors="pt"
        ).to(encoder.model.device)
        states = transformer(**read, output_hidden_states=True).hidden_states
        rows = []
        for depth in depths:
            features = {"token_embeddings": states[depth], "attention_mask": read["attention_mask"]}
            for module in after:
                features = module(features)
            rows.append(functional.normalize(features["sentence_embedding"].float().cpu(), dim=-1))
        found.append(torch.stack(rows))
    return torch.cat(found, 1)


def shallow(encoder: TextEncoder, depth: int) -> TextEncoder:
    """Return a copy of an encoder that ends after a layer, so that whatever reads encoders can read it.

    A norm that the architecture has after its last layer stays.

    Args:
        encoder: any; stays as it is.
        depth: layers kept, from the first; 0 keeps the input alone.

    Raises:
        DataError: a depth the encoder does not have, or layers that are no list in the transformer.

    Source: Li et al. (2024), 2D Matryoshka sentence embeddings, arXiv 2402.14776, section 3.
    """
    layers = depth_of(encoder)
    if not 0 <= depth <= layers:
        raise DataError(f"depth must lie in 0..{layers} for {encoder.name}, got {depth}")
    other = copy.copy(encoder)
    other.__dict__.pop("fingerprint", None)  # kept once asked for, and of all layers
    other.model = copy.deepcopy(encoder.model)
    transformer = other.model[0].auto_model
    for parent in list(transformer.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == layers:
                setattr(parent, name, child[:depth])
                transformer.config.num_hidden_layers = depth
                return other
    raise DataError(f"encoder {encoder.name} keeps its {layers} layers in no list, so it cannot be cut")


def slice_scores(
    sides: Mapping[int, Sides], label: Float[np.ndarray, " N"], widths: Sequence[int]
) -> pl.DataFrame:
    """Score pairs by the cosine of their slices, for each depth and width.

    Args:
        sides: by depth, the embeddings of the pairs' first and second items; conditioned ones are cut after
            the projection.
        label: of the pairs.
        widths: entries kept, from the first on.

    Returns:
        One row per depth and width: depth, width, spearman (-1 to 1, ideal 1) and share (of the score of the
        deepest layer at full width; ideal 1).

    Raises:
        DataError: a width beyond the embeddings' own.

    Source: Kusupati et al. (2022), Matryoshka representation learning, arXiv 2205.13147; Li et al. (2024),
    2D Matryoshka sentence embeddings, arXiv 2402.14776.
    """
    once, found = np.ones((1, len(label))), []

    def score(first: Tensor, second: Tensor) -> float:
        cosine = functional.cosine_similarity(first.double(), second.double(), dim=-1).numpy()
        return float(spearman(cosine, label, once)[0])

    whole = score(*sides[max(sides)])
    for depth, (first, second) in sides.items():
        for width in widths:
            if not 0 < width <= first.shape[1]:
                raise DataError(f"width {width} is no slice of embeddings of width {first.shape[1]}")
            value = score(first[:, :width], second[:, :width])
            found.append({"depth": depth, "width": width, "spearman": value, "share": value / whole})
    return pl.DataFrame(found)


def nested(
    loss: Callable[[Tensor, Tensor], Float[Tensor, ""]],
    first: Float[Tensor, "K N D"],
    second: Float[Tensor, "K N D"],
    widths: Sequence[int],
) -> Float[Tensor, ""]:
    """Mean of a loss over slices: sum_k sum_w L(x_k[:w] / |.|, y_k[:w] / |.|) / (K W), so that slices nest.

    Args:
        loss: of two sides of unit rows, for example :func:`workbench.objectives.paired_contrastive`.
        first: x of each depth that takes part; usually the last and one drawn at random.
        second: y of the same depths.
        widths: entries kept, the full width among them.

    Returns:
        A mean, in the range of the loss and with its ideal value: 0 for a contrastive one, lower is better.

    Source: Li et al. (2024), arXiv 2402.14776. Deviation: without their term that aligns a lower layer's
    similarities with the last layer's.
    """
    values = [
        loss(functional.normalize(one[:, :width], dim=-1), functional.normalize(other[:, :width], dim=-1))
        for one, other in zip(first, second, strict=True)
        for width in widths
    ]
    return torch.stack(values).mean()

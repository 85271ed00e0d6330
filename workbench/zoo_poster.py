"""The poster's count of operations done again, at its sizes, on our own modules: where its saving comes from.

Tensors are on torch's device "meta": they have shapes and no numbers, so a step of 30 encoders with a batch
of 16,384 is counted in a moment and needs no memory.

Shape letters: b rows of a batch, X text width, Z image width.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from workbench.flops import count_flops
from workbench.hypernetworks.connectors import ConnectorBank, ConnectorGenerator
from workbench.objectives import paired_contrastive

ROWS, TEXT = 558_128, 768  # pairs of an epoch, text width
WIDTHS = (384,) * 10 + (768,) * 10 + (1024,) * 10  # of the image encoders
APE_BATCH, BATCH = 16_384, 512
TURNS = [range(start, start + 10) for start in (0, 10, 20)]  # encoders of a step, by width
ONE_TILE = 2**62  # bytes: logits are counted once, as where they fit into memory
Loss = Callable[[Tensor, Tensor], Tensor]


def _loss_once(mapped: Float[Tensor, "b Z"], images: Float[Tensor, "b Z"]) -> Float[Tensor, ""]:
    return paired_contrastive(mapped, images, tile_bytes=ONE_TILE)


def _loss_twice(mapped: Float[Tensor, "b Z"], images: Float[Tensor, "b Z"]) -> Float[Tensor, ""]:
    """Compute the logits of both directions apart, as the authors' research code does."""
    right = torch.arange(len(mapped), device=mapped.device)
    sides = (mapped @ images.T, images @ mapped.T)
    return sum(functional.cross_entropy(100 * logits, right) for logits in sides) / 2


def _count_bank(widths: Sequence[int], batch: int) -> int:
    """Count one step, forward and backward, of a bank of connectors; nothing is computed."""
    with torch.device("meta"):
        bank = ConnectorBank(TEXT, widths)
        texts, images = torch.empty(batch, TEXT), [torch.empty(batch, width) for width in widths]

    def step() -> None:
        torch.stack([_loss_once(*pair) for pair in zip(bank(texts), images, strict=True)]).mean().backward()

    return count_flops(step)[1]


def _count_generator(places: range, batch: int, loss: Loss) -> int:
    """Count one step of the published hypernetwork on some of the encoders; nothing is computed."""
    with torch.device("meta"):
        generator = ConnectorGenerator(TEXT, WIDTHS)
        texts = torch.empty(batch, TEXT)
        images = [torch.empty(batch, WIDTHS[place]) for place in places]

    def step() -> None:
        weights = generator(generator.code(places, [one.mean(0) for one in images]), places)
        mapped = [functional.normalize(texts @ weight + bias, dim=1) for weight, bias in weights]
        torch.stack([loss(*pair) for pair in zip(mapped, images, strict=True)]).mean().backward()

    return count_flops(step)[1]


def _count_closed() -> int:
    """Count one pass: the cross-covariance of every pair and one Gram matrix of the texts."""
    with torch.device("meta"):
        texts = torch.empty(ROWS, TEXT)
        images = {width: torch.empty(ROWS, width) for width in set(WIDTHS)}

    def step() -> None:
        for other in (texts, *(images[width] for width in WIDTHS)):
            _ = texts.T @ other

    return count_flops(step)[1]


def poster_flops() -> pl.DataFrame:
    """Count, for the poster's 30 encoders and 558,128 pairs, what an epoch of each way costs.

    Products of one step are multiplied by the full batches of an epoch; the rest is dropped, as the authors'
    counter does. ``formula`` is the same by hand: a connector takes 4 X Z a row and encoder, its logits 4 b Z
    (8 b Z where both directions are computed), the hypernetwork 6 a weight and encoder (4 in its first layer,
    before which nothing is trained).

    Returns:
        One row per way: way, batch, covered (encoders that see a full epoch), counted and formula (TFLOP an
        epoch), noted (TFLOP by the authors' counter or derived earlier), per_encoder (counted, per encoder
        that sees an epoch), saving (APE's per_encoder by this).
    """
    mean = sum(WIDTHS) / len(WIDTHS)
    layers = (1024, 32, 128, 512, 1024 * TEXT + 1024)
    weights = [one * two for one, two in pairwise(layers)]
    hyper = 10 * (4 * weights[0] + 6 * sum(weights[1:]))

    def by_hand(batch: int, encoders: int, logits: int = 4) -> float:
        return batch * encoders * (4 * TEXT + logits * batch) * mean

    def in_turn(count: Callable[[range], int]) -> float:
        return sum(map(count, TURNS)) / len(TURNS)

    def alone(batch: int) -> int:
        return sum(WIDTHS.count(width) * _count_bank((width,), batch) for width in set(WIDTHS))

    def generated(loss: Loss) -> float:
        return in_turn(lambda turn: _count_generator(turn, BATCH, loss))

    direct = in_turn(lambda turn: _count_bank([WIDTHS[place] for place in turn], BATCH))
    few = "Hyper-Align, 10 of 30 a step, logits"
    ways = [
        ("APE, each pair alone", APE_BATCH, 30, alone(APE_BATCH), by_hand(APE_BATCH, 30), 831.6),
        ("APE, at Hyper-Align's batch", BATCH, 30, alone(BATCH), by_hand(BATCH, 30), None),
        (f"{few} twice", BATCH, 10, generated(_loss_twice), hyper + by_hand(BATCH, 10, 8), 55.4),
        (f"{few} once", BATCH, 10, generated(_loss_once), hyper + by_hand(BATCH, 10), None),
        ("direct, 10 of 30 a step", BATCH, 10, direct, by_hand(BATCH, 10), 20.7),
        ("direct, all 30 a step", BATCH, 30, _count_bank(WIDTHS, BATCH), by_hand(BATCH, 30), 62.2),
    ]
    rows = []
    for way, batch, covered, *steps, noted in ways:
        counted, formula = (ROWS // batch * step / 1e12 for step in steps)
        found = {"way": way, "batch": batch, "covered": covered, "counted": counted, "formula": formula}
        rows.append({**found, "noted": noted})
    passed = 2 * ROWS * TEXT * (TEXT + len(WIDTHS) * mean) / 1e12
    closed = {"way": "closed form, one pass", "batch": None, "covered": 30, "counted": _count_closed() / 1e12}
    rows.append({**closed, "formula": passed, "noted": 19.3})
    frame = pl.DataFrame(rows).with_columns(per_encoder=pl.col("counted") / pl.col("covered"))
    return frame.with_columns(saving=pl.col("per_encoder").first() / pl.col("per_encoder"))

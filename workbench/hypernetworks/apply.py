"""Applying generated weights without ever building what is not needed.

Rows point at the thing they use (a condition, a sentence) by an id. :class:`Rows` groups them once, so that a
condition's weights are generated once however many rows use it, never copied per row, and rows of different
conditions still go through a handful of batched products.

Shape letters: N rows, U unique ids, M rows of one id in a block (padded), D and E widths, K rank, L tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from workbench.hypernetworks.spec import GeneratedWeights

_CACHED = 32  # sentences whose tokens a core's cache holds


@dataclass(frozen=True)
class Block:
    """Ids ``start`` to ``stop`` of the unique ones, their rows padded to one number."""

    start: int
    stop: int
    rows: Int[Tensor, "U M"]
    real: Bool[Tensor, "U M"]


@dataclass(frozen=True)
class Rows:
    """Rows grouped by the id they point at.

    Ids are ordered by how often they occur, and ids whose counts share a power of two make one block: at most
    log2(N) + 1 blocks, and padding never more than doubles the rows.

    Attributes:
        unique: the U ids in block order; weights are generated in this order.
        index: which of the unique ids each row points at.
        blocks: the groups.
        position: where each row's result stands when the blocks' real rows are laid end to end.
    """

    unique: Int[Tensor, " U"]
    index: Int[Tensor, " N"]
    blocks: tuple[Block, ...]
    position: Int[Tensor, " N"]

    @classmethod
    def of(cls, ids: Int[Tensor, " N"]) -> "Rows":
        """Group rows by id; N must be at least 1."""
        unique, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
        order = torch.argsort(counts, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=ids.device)
        index = rank[inverse]
        by_id = torch.argsort(index, stable=True)  # rows, sorted by their id's place
        counts = counts[order]
        ends = counts.cumsum(0)
        sizes = torch.ceil(torch.log2(counts.double())).long()
        blocks = []
        for size in sizes.unique().tolist():
            members = (sizes == size).nonzero()[:, 0]
            start, stop = int(members[0]), int(members[-1]) + 1
            columns = torch.arange(int(counts[stop - 1]), device=ids.device)
            real = columns < counts[start:stop, None]
            place = (ends - counts)[start:stop, None] + columns
            blocks.append(Block(start, stop, by_id[torch.where(real, place, 0)], real))
        position = torch.empty_like(by_id)
        position[by_id] = torch.arange(len(by_id), device=ids.device)
        return cls(unique[order], index, tuple(blocks), position)

    def __len__(self) -> int:
        """Number of rows N."""
        return len(self.position)

    def spread(self, features: Float[Tensor, "U D"]) -> Float[Tensor, "N D"]:
        """Give each row the vector of its id; a matrix per row is what :meth:`apply` avoids."""
        return features.index_select(0, self.index)

    def apply(
        self, inputs: Shaped[Tensor, " N *D"], function: Callable[[slice, Tensor], Tensor]
    ) -> Float[Tensor, " N *E"]:
        """Send each row through the function of its id.

        Args:
            inputs: one vector, image or the like per row.
            function: gets a slice of the unique ids and their rows ``[U, M, ...]``, returns ``[U, M, ...]``.
        """
        return self.apply_all([inputs], lambda span, parts: [function(span, parts[0])])[0]

    def apply_all(
        self, inputs: list[Tensor], function: Callable[[slice, list[Tensor]], list[Tensor]]
    ) -> list[Tensor]:
        """Send several tensors of N rows together through the function of the rows' ids; it may give several.

        See :meth:`apply`.
        """
        found = []
        for block in self.blocks:
            # index_select, not indexing: its backward adds in a fixed order, so training repeats exactly.
            parts = [
                one.index_select(0, block.rows.flatten()).unflatten(0, block.rows.shape) for one in inputs
            ]
            found.append([one[block.real] for one in function(slice(block.start, block.stop), parts)])
        return [torch.cat(parts).index_select(0, self.position) for parts in zip(*found, strict=True)]


def project(
    inputs: Float[Tensor, "N D"], weights: GeneratedWeights, rows: Rows, name: str = "projection"
) -> Float[Tensor, "N E"]:
    """Map each row by the matrix generated for its condition.

    With low rank, computes (x A) B and never A B: 2 D K instead of D^2 K + D^2 multiplications a condition
    and row.

    Args:
        inputs: one vector per row.
        weights: of the conditions ``rows.unique``, in that order.
        rows: which condition each row uses.
        name: the slot to apply.

    Returns:
        Mapped vectors, not normalised.

    Raises:
        ValueError: weights of another number of conditions, or for inputs of another width.

    Source: Hyper-CL section 3.2, h_sc = W_c h_s with W_c = A_c B_c in the low-rank case.
    """
    slot = weights.slot(name)
    if len(weights) != len(rows.unique):
        raise ValueError(f"weights of {len(weights)} conditions for rows of {len(rows.unique)} conditions")
    if inputs.shape[-1] != slot.shape[0]:
        raise ValueError(f"slot {name} maps width {slot.shape[0]}, the inputs have width {inputs.shape[-1]}")
    factors = [f"{name}.down", f"{name}.up"] if slot.mode == "lowrank" else [name]

    def block(span: slice, part: Tensor) -> Tensor:
        for factor in factors:
            part = torch.bmm(part, weights.tensors[factor][span])
        return part

    mapped = rows.apply(inputs, block)
    return inputs + mapped if slot.identity else mapped


def pool_tokens(
    queries: Float[Tensor, "N D"],
    tokens: Float[Tensor, "U L D"],
    mask: Bool[Tensor, "U L"],
    by_sentence: Rows,
    heads: int = 1,
) -> Float[Tensor, "N D"]:
    """Pool each row's sentence with its query: sum_l softmax_l(t_l . q / sqrt(D)) t_l over its tokens t_l.

    Each sentence's tokens are gathered once, however many conditions look at it.

    Args:
        queries: one query per row, for example generated from the row's condition.
        tokens: token states of the sentences ``by_sentence.unique``, in that order.
        mask: true on real tokens; every sentence has at least one.
        by_sentence: which sentence each row uses.
        heads: slices of the width with a softmax of their own, as in multi-head attention; a divisor of D.

    Returns:
        One pooled vector per row, not normalised; each slice lies in the convex hull of its
        sentence's tokens.

    Source: equations (6) and (8) of :mod:`workbench.papers.hyper_cl`; pooling the tokens that a proposition
    asks for is the sub-sentence encoder of Chen et al. (2023), arXiv 2311.04335. Deviation: there the tokens
    are marked and weigh alike.
    """
    width = tokens.shape[-1]
    if width % heads:
        raise ValueError(f"{heads} pooling heads do not divide the width {width}")
    scale = math.sqrt(heads / width)

    def pool(part: Tensor, some: Tensor, real: Tensor) -> Tensor:
        parts = []
        for own, states in zip(part.chunk(heads, -1), some.chunk(heads, -1), strict=True):
            scores = torch.bmm(own, states.mT) * scale
            scores = scores.masked_fill(~real[:, None], float("-inf"))
            parts.append(torch.bmm(scores.softmax(-1), states))
        return torch.cat(parts, -1) if heads > 1 else parts[0]

    # Tokens are read twice; a few sentences' stay in a core's cache in between. Training keeps whole blocks:
    # a graph of many parts would cost it more.
    few = _CACHED if tokens.device.type == "cpu" and not torch.is_grad_enabled() else len(tokens)

    def block(span: slice, part: Tensor) -> Tensor:
        pieces = zip(part.split(few), tokens[span].split(few), mask[span].split(few), strict=True)
        return torch.cat([pool(*piece) for piece in pieces])

    return by_sentence.apply(queries, block)

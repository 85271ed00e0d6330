"""Is the generator alive: does it train, do conditions move the weights, how many directions do they use.

Two silent failures of published code are what this guards against: a generator that never trains, and one
whose correction stays zero for a whole training run.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Health:
    """What was measured, one number each.

    Attributes:
        moved: norm of the head's change since the start over its norm at the start (over its norm now if it
            started at zero); 0 means it never trained.
        relative_spread: standard deviation of weights over conditions over their root mean square; near 0
            means that every condition gets the same weights.
        effective_rank: over conditions, of the slot with the most numbers (see ``GeneratedWeights``).
        near_copies: share of condition pairs whose weights have cosine above 0.999; 0 to 1, lower is better.
        conditions: how many conditions were looked at.
        output_spread: standard deviation over conditions of the target's outputs for the same inputs over
            their root mean square; None if there were no inputs.
    """

    moved: float
    relative_spread: float
    effective_rank: float
    near_copies: float
    conditions: int
    output_spread: float | None = None

    @property
    def verdict(self) -> str:
        """One line: "sound", or what is wrong."""
        wrong = []
        if self.moved < 1e-4:
            wrong.append("the generator did not train")
        if self.conditions > 1 and self.relative_spread < 1e-3:
            wrong.append("conditions do not move the weights")
        if self.conditions > 2 and self.near_copies > 0.5:
            wrong.append("most conditions share their weights")
        if self.output_spread is not None and self.conditions > 1 and self.output_spread < 1e-4:
            wrong.append("generated weights do not move the output")
        return "; ".join(wrong) or "sound"

    def to_dict(self) -> dict[str, float | int | str]:
        """Return the numbers that were measured and the verdict as JSON types."""
        measured = {name: value for name, value in asdict(self).items() if value is not None}
        return {**measured, "verdict": self.verdict}


@torch.no_grad()
def health_of(
    generator: nn.Module, conditions: Tensor, start: Tensor, outputs: Tensor | None = None
) -> Health:
    """Measure a generator.

    Args:
        generator: in evaluation mode, with a ``spec`` and a ``head``.
        conditions: embeddings of distinct conditions, ``[U, C]``, or sets of them, ``[U, T, C]``.
        start: a copy of the head's weight before training.
        outputs: what the target makes of the same inputs under each condition, ``[U, ...]``.
    """
    weights = generator(conditions)
    largest = max(
        weights.spec.slots, key=lambda slot: sum(torch.Size(s).numel() for s, _ in slot.parts.values())
    ).name
    inner = weights.inner_products(largest)
    square = inner.diagonal().clamp_min(1e-30)
    cosine = inner / (square[:, None] * square[None]).sqrt()
    count = len(conditions)
    pairs = cosine[torch.triu(torch.ones_like(cosine), diagonal=1).bool()]
    change, size = (torch.linalg.vector_norm(one) for one in (generator.head.weight - start, start))
    return Health(
        moved=float(change / (size or change.clamp_min(1e-30))),
        relative_spread=float(((square.mean() - inner.mean()).clamp_min(0) / square.mean()).sqrt()),
        effective_rank=weights.effective_rank(largest),
        near_copies=float((pairs > 0.999).float().mean()) if count > 1 else 0.0,
        conditions=count,
        output_spread=None if outputs is None else _spread(outputs),
    )


def _spread(outputs: Tensor) -> float:
    """Return the standard deviation over the first axis over the root mean square of all."""
    outputs = outputs.double()
    deviation = (outputs - outputs.mean(0)).square().mean().sqrt()
    return float(deviation / outputs.square().mean().sqrt().clamp_min(1e-30))

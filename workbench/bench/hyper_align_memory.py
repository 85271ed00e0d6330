"""Thirty linear connectors of 1024 x 768 at batch 16,384: what one training step holds at most.

The reference trains the same connectors one after another with the whole table of logits. They do not share
anything, so that a few are trained and their time stands for all.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from workbench.bench.hyper_align import plain_loss
from workbench.bench.timing import laid_out, once
from workbench.hypernetworks.connectors import ConnectorBank, sum_by_parts
from workbench.objectives import paired_contrastive

X, Z, CONNECTORS, BATCH = 768, 1024, 30, 16_384
TIMED = 3  # of the reference's connectors


def rows(device: str = "cpu") -> list[dict[str, Any]]:
    """Measure one step; see :func:`workbench.bench.run_bench` for the columns."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    texts = torch.randn(BATCH, X, generator=rng)
    kept = torch.randn(BATCH, Z, generator=rng).half()  # every encoder's features, as the store keeps them

    def image() -> torch.Tensor:
        return functional.normalize(kept.to(device).float(), dim=1)

    def together() -> None:
        bank = ConnectorBank(X, [Z] * CONNECTORS).to(device)
        optimiser = torch.optim.AdamW(bank.parameters(), lr=1e-3, fused=True)
        unit = functional.normalize(texts.to(device), dim=1)
        parts = [
            lambda place=place: paired_contrastive(bank(unit, range(place, place + 1))[0], image())
            for place in range(CONNECTORS)
        ]
        sum_by_parts(parts, bank).backward()
        optimiser.step()

    def one_by_one() -> None:
        unit = functional.normalize(texts.to(device), dim=1)
        layers = nn.ModuleList([nn.Linear(X, Z) for _ in range(CONNECTORS)]).to(device)
        for layer in layers[:TIMED]:
            optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=True)
            plain_loss(functional.normalize(layer(unit), dim=1), image()).backward()
            optimiser.step()

    name = f"step of {CONNECTORS} connectors {Z} x {X}, batch {BATCH}; reference: {TIMED} one by one"
    (ours_s, ours_mib), (reference_s, reference_mib) = (once(way, device) for way in (together, one_by_one))
    return [laid_out(name, ours_s, reference_s * CONNECTORS / TIMED, ours_mib, reference_mib)]

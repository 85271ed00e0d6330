"""Applying generated weights: factors, grouped conditions and batches, beside the plain way of doing each.

Both ways of every row get the same generated weights and are asserted to give the same. hyperlight, where it
is installed, holds one condition's weights at a time, so it goes through the conditions one by one.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from workbench.bench.timing import row
from workbench.hypernetworks import (
    Conditioned,
    GeneratedWeights,
    MLPGenerator,
    ParamSpec,
    Rows,
    Slot,
    project,
)

ROWS, WIDTH, RANK, CODE, UNIQUE = 64, 384, 16, 64, 8
REPEATS = 20  # milliseconds each, so a median of three would be noise


def rows(device: str = "cpu") -> list[dict[str, Any]]:
    """Measure all cases; see :func:`workbench.bench.run_bench` for the columns."""
    torch.manual_seed(0)
    cases = [_factors(device), _grouped(device), _batch(device)]
    return [*cases, _hyperlight(device)] if find_spec("hyperlight") else cases


@torch.no_grad()
def _same(ours: Callable[[], Tensor], reference: Callable[[], Tensor]) -> None:
    torch.testing.assert_close(ours(), reference(), rtol=1e-3, atol=1e-4)


def _measured(
    name: str, ours: Callable[[], Tensor], reference: Callable[[], Tensor], device: str
) -> dict[str, Any]:
    _same(ours, reference)
    with torch.inference_mode():
        return row(name, ours, reference, device, REPEATS)


def _factors(device: str) -> dict[str, Any]:
    """One condition per row: (x A) B beside x (A B)."""
    spec = ParamSpec((Slot("projection", (WIDTH, WIDTH), "lowrank", RANK),))
    weights = spec.compose(torch.randn(ROWS, spec.numel, device=device))
    inputs, each = torch.randn(ROWS, WIDTH, device=device), Rows.of(torch.arange(ROWS, device=device))
    ordered = GeneratedWeights(spec, {name: one[each.unique] for name, one in weights.tensors.items()})
    down, up = weights.tensors["projection.down"], weights.tensors["projection.up"]

    def formed() -> Tensor:
        return torch.bmm(inputs[:, None], down @ up)[:, 0]

    name = f"{ROWS} rows, one condition each, {WIDTH} x {WIDTH}, rank {RANK}; reference: form A B"
    return _measured(name, lambda: project(inputs, ordered, each), formed, device)


def _projection(device: str) -> tuple[Conditioned, Tensor, Tensor, Tensor]:
    """A generated projection, its conditions, and rows that share them."""
    target = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).to(device)
    spec = ParamSpec.of(target, joins="replace", gain=1.0)
    model = Conditioned(target, MLPGenerator(CODE, spec, (CODE,), unit=True).to(device)).eval()
    codes, inputs = torch.randn(UNIQUE, CODE, device=device), torch.randn(ROWS, WIDTH, device=device)
    return model, codes, inputs, torch.arange(ROWS, device=device) % UNIQUE


def _grouped(device: str) -> dict[str, Any]:
    """Weights generated once per condition beside once per row."""
    model, codes, inputs, which = _projection(device)

    def grouped() -> Tensor:
        return model(inputs, model.weights(codes), which)

    def per_row() -> Tensor:
        return model(inputs[:, None], model.weights(codes[which]))[:, 0]

    name = f"generate and apply, {ROWS} rows of {UNIQUE} conditions, {WIDTH} x {WIDTH}; reference: per row"
    return _measured(name, grouped, per_row, device)


def _network(device: str) -> nn.Sequential:
    """A small convolutional classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1),
        nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    ).to(device)  # fmt: skip


def _batch(device: str) -> dict[str, Any]:
    """One condition for a batch: the application alone, beside the plain module with the weights baked in."""
    target = _network(device)
    generator = MLPGenerator(CODE, ParamSpec.of(target), (CODE,), unit=True).to(device)
    model, code = Conditioned(target, generator).eval(), torch.randn(1, CODE, device=device)
    weights, plain = model.weights(code), model.freeze(code[0])
    images = torch.randn(ROWS, 3, 32, 32, device=device)
    name = f"one condition for {ROWS} images of 32 pixels, applied; reference: the plain module"
    return _measured(name, lambda: model(images, weights), lambda: plain(images), device)


def _hyperlight(device: str) -> dict[str, Any]:
    """Rows of several conditions in one call, beside hyperlight's one condition at a time."""
    import hyperlight

    target = _network(device)
    codes = torch.randn(UNIQUE, CODE, device=device)
    images = torch.randn(UNIQUE, ROWS // UNIQUE, 3, 32, 32, device=device)
    # Norms keep their own values: hyperlight cannot generate them.
    plain = _network(device)
    layers = [part for part in plain.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    theirs = hyperlight.hypernetize(plain, modules=layers)
    norms = {name: one for name, one in target.named_parameters() if name not in theirs.external_shapes()}
    theirs.load_state_dict(norms, strict=False)
    spec = ParamSpec.of(target, list(theirs.external_shapes()), joins="replace")
    model = Conditioned(target, MLPGenerator(CODE, spec, (CODE,), unit=True).to(device)).eval()

    def together() -> Tensor:
        return model(images, model.weights(codes))

    def one_by_one() -> Tensor:
        found = []
        for place in range(UNIQUE):
            made = model.parameters_of(model.weights(codes[place : place + 1]))
            with theirs.using_externals({name: one[0] for name, one in made.items()}):
                found.append(theirs(images[place]))
        return torch.stack(found)

    name = f"{UNIQUE} conditions, {ROWS // UNIQUE} images each, generate and apply; reference: hyperlight"
    return _measured(name, together, one_by_one, device)

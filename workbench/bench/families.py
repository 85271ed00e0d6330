"""Applying generated weights: factors, grouped conditions and batches, beside the plain way of doing each.

Every way of a job gets the same generated weights and is asserted to give the same. Bars are set for the
plain ways: the ratio is how many times longer the reference takes. Peer libraries that are installed do the
same jobs with the same weights, see :mod:`workbench.bench.peers`; a generator is then the library's own, with
the values of ours. hypnettorch, whose networks are its own classes, does those on linear maps only.

These are jobs of milliseconds, so they are timed on one thread, a repeat of each way in turn: what else runs
on the machine then meets both sides, and no side waits for a core.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.bench.peers import NEEDS, Applied, missing, peers
from workbench.bench.timing import row, threads
from workbench.hypernetworks import (
    Conditioned,
    GeneratedWeights,
    MLPGenerator,
    ParamSpec,
    Rows,
    Slot,
    project,
)

ROWS, WIDTH, RANK, CODE, UNIQUE, PIXELS = 64, 384, 16, 64, 8, 32
REPEATS = 20  # milliseconds each, so a median of three would be noise
THREADS = 1
# Of the ratio: the plain way takes this many times as long; for a batch, ours at most 1.2 times the module's.
BARS = {"factors": (20, ">= 20"), "grouped": (4, ">= 4"), "batch": (1 / 1.2, ">= 1/1.2")}
Way = Callable[[], Tensor]


def rows(device: str = "cpu") -> list[dict[str, Any]]:
    """Measure all cases; see :func:`workbench.bench.run_bench` for the columns.

    Returns:
        One row per job and reference, with bar ("" where none is set, as beside other libraries), verdict
        ("met", "missed" or "") and threads as well.
    """
    torch.manual_seed(0)
    with threads(THREADS), torch.inference_mode():
        return [row for job in (_factors, _grouped, _batch, _conditions) for row in job(device)]


def notes() -> list[str]:
    """Say what the table does not: how it was timed, and why a library has no row."""
    found = [
        f"On {THREADS} thread, a repeat of each way in turn, medians of {REPEATS}. A bar is of the ratio; "
        "none is set beside other libraries.",
        "hypnettorch applies weights to networks of its own classes only, so it has no row for the images.",
    ]
    for name in NEEDS:
        if needed := missing(name):
            found.append(f"{name} is not timed: pip install {' '.join(needed)}")
    return found


def _same(ours: Way, reference: Way) -> None:
    torch.testing.assert_close(ours(), reference(), rtol=1e-3, atol=1e-4)


def _measured(
    name: str, ours: Way, references: dict[str, Way], device: str, bar: str | None = None
) -> list[dict[str, Any]]:
    """Time one way beside each reference; the bar is the first one's."""
    found = []
    for place, (other, reference) in enumerate(references.items()):
        _same(ours, reference)
        timed = row(f"{name}; reference: {other}", ours, reference, device, REPEATS)
        limit, text = BARS[bar] if bar and not place else (None, "")
        verdict = "" if limit is None else "met" if timed["ratio"] >= limit else "missed"
        found.append({**timed, "bar": text, "verdict": verdict, "threads": THREADS})
    return found


def _one_by_one(applied: Applied, weights: Sequence[Sequence[Tensor]], parts: Sequence[Tensor]) -> Tensor:
    """Send each condition's rows through a library that holds one condition's weights at a time."""
    return torch.cat([applied(own, part) for own, part in zip(weights, parts, strict=True)])


def _factors(device: str) -> list[dict[str, Any]]:
    """One condition per row: (x A) B beside x (A B)."""
    spec = ParamSpec((Slot("projection", (WIDTH, WIDTH), "lowrank", RANK),))
    weights = spec.compose(torch.randn(ROWS, spec.numel, device=device))
    inputs, each = torch.randn(ROWS, WIDTH, device=device), Rows.of(torch.arange(ROWS, device=device))
    ordered = GeneratedWeights(spec, {name: one[each.unique] for name, one in weights.tensors.items()})
    down, up = weights.tensors["projection.down"], weights.tensors["projection.up"]
    references: dict[str, Way] = {"form A B": lambda: torch.bmm(inputs[:, None], down @ up)[:, 0]}
    for peer in peers():
        layers, pairs = peer.layers((WIDTH, RANK, WIDTH)), list(zip(down.mT, up.mT, strict=True))
        references[peer.name] = lambda layers=layers, pairs=pairs: _one_by_one(layers, pairs, inputs.split(1))
    name = f"{ROWS} rows, one condition each, {WIDTH} x {WIDTH}, rank {RANK}"
    return _measured(name, lambda: project(inputs, ordered, each), references, device, "factors")


def _grouped(device: str) -> list[dict[str, Any]]:
    """A whole matrix generated once per condition beside once per row."""
    target = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).to(device)
    # Without the spec's scale, which no other library has.
    spec = ParamSpec(ParamSpec.of(target, joins="replace", gain=1.0).slots, scaled=False)
    generator = MLPGenerator(CODE, spec, (CODE,), unit=False).to(device)  # the peers have no norm
    model = Conditioned(target, generator).eval()
    codes, inputs = torch.randn(UNIQUE, CODE, device=device), torch.randn(ROWS, WIDTH, device=device)
    which = torch.arange(ROWS, device=device) % UNIQUE
    order = which.argsort(stable=True)
    back, sizes = order.argsort(), which.bincount().tolist()

    def grouped() -> Tensor:
        return model(inputs, model.weights(codes), which)

    def per_row() -> Tensor:
        return model(inputs[:, None], model.weights(codes[which]))[:, 0]

    references: dict[str, Way] = {"per row": per_row}
    for peer in peers():
        made, layer = peer.generator(generator), peer.layers((WIDTH, WIDTH))
        references[peer.name] = lambda made=made, layer=layer: _one_by_one(
            layer, made(codes), inputs[order].split(sizes)
        )[back]
    name = f"generate and apply, {ROWS} rows of {UNIQUE} conditions, {WIDTH} x {WIDTH}"
    return _measured(name, grouped, references, device, "grouped")


def _network(device: str) -> tuple[nn.Sequential, Conditioned]:
    """A small convolutional classifier, and one with all its weights generated."""
    target = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1),
        nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    ).to(device)  # fmt: skip
    generator = MLPGenerator(CODE, ParamSpec.of(target), (CODE,), unit=True).to(device)
    return target, Conditioned(target, generator).eval()


def _images(model: Conditioned, weights: GeneratedWeights, parts: Sequence[Tensor]) -> dict[str, Way]:
    """Return the ways of libraries that take weights for any module, which is hyperlight alone."""
    made, device = model.parameters_of(weights), parts[0].device
    own = list(zip(*made.values(), strict=True))
    ways: dict[str, Way] = {}
    for peer in peers():
        if hasattr(peer, "module"):
            applied = peer.module(_network(str(device))[0], list(made))
            ways[peer.name] = lambda applied=applied: _one_by_one(applied, own, parts)
    return ways


def _batch(device: str) -> list[dict[str, Any]]:
    """One condition for a batch: the application alone, beside the plain module with the weights baked in."""
    _, model = _network(device)
    code = torch.randn(1, CODE, device=device)
    weights, plain = model.weights(code), model.freeze(code[0])
    images = torch.randn(ROWS, 3, PIXELS, PIXELS, device=device)
    references = {"the plain module": lambda: plain(images), **_images(model, weights, [images])}
    name = f"one condition for {ROWS} images of {PIXELS} pixels, applied"
    return _measured(name, lambda: model(images, weights), references, device, "batch")


def _conditions(device: str) -> list[dict[str, Any]]:
    """Several conditions for a batch in one call, beside one condition after the other."""
    _, model = _network(device)
    codes = torch.randn(UNIQUE, CODE, device=device)
    images = torch.randn(UNIQUE, ROWS // UNIQUE, 3, PIXELS, PIXELS, device=device)
    weights, plain = model.weights(codes), [model.freeze(code) for code in codes]

    def in_turn() -> Tensor:
        return torch.cat([one(part) for one, part in zip(plain, images, strict=True)])

    references = {"plain modules in turn": in_turn, **_images(model, weights, list(images))}
    found = []
    for one_by_one, how in ((False, "together"), (True, "one by one")):
        ours = Conditioned(model.target, model.generator, one_by_one=one_by_one).eval()
        name = f"{UNIQUE} conditions, {ROWS // UNIQUE} images of {PIXELS} pixels each, applied {how}"
        found += _measured(name, lambda ours=ours: ours(images, weights).flatten(0, 1), references, device)
    return found

"""Ways to connect a zoo beside each other: a hypernetwork's step, a loop over pairs, the full grid.

The steps have the poster's sizes and random features; search and grid run on the features of a recipe, whole.
Batched and separate connectors are asserted to give the same before they are timed; the hypernetwork is
another model, and search gives other connectors, so there the name says what each found.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from workbench.bench.timing import laid_out, row
from workbench.hypernetworks.connectors import ConnectorBank, ConnectorGenerator
from workbench.manifests import locate
from workbench.objectives import paired_contrastive
from workbench.papers import load_recipe, paper_of
from workbench.papers.hyper_align import Task
from workbench.papers.hyper_align_search import selection_score
from workbench.training import seed_everything

X, WIDTHS, BATCH = 768, (384, 768, 1024), 512  # the poster's zoo: ten image encoders of each width
EACH, HIDDEN = 10, (128, 512)
GRIDS = ("ape", "ape_large")  # at a small batch, and at a large one as published
LOSS_BATCH, LOSS_WIDTH = 4096, 1024
RECIPES = ("hyper_align_flickr8k", "hyper_align_scenes")  # the second where the first one's data are missing


def rows(device: str = "cpu") -> list[dict[str, Any]]:
    """Measure all cases; see :func:`workbench.bench.run_bench` for the columns."""
    return [_loop(device), _generator(device), _tiles(device), *_search(device)]


def _unit(rows: int, width: int, device: str) -> Tensor:
    return functional.normalize(torch.randn(rows, width, device=device), dim=1)


def _step(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a training step, optimiser included."""
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        optimiser.step()

    return step


def plain_loss(mapped: Tensor, images: Tensor) -> Tensor:
    """Symmetric InfoNCE as published: the whole table of logits, twice the cross-entropy."""
    logits = 100.0 * mapped @ images.T
    target = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def _loop(device: str) -> dict[str, Any]:
    """All connectors of the poster in one product, beside a loop of linear layers."""
    torch.manual_seed(0)
    outputs = [width for width in WIDTHS for _ in range(EACH)]
    texts, images = _unit(BATCH, X, device), [_unit(BATCH, width, device) for width in outputs]
    bank = ConnectorBank(X, outputs).to(device)
    layers = nn.ModuleList([nn.Linear(X, width) for width in outputs]).to(device)
    for place, layer in enumerate(layers):
        weight, bias = bank.linear(place)
        layer.load_state_dict({"weight": weight.T, "bias": bias})

    def together() -> Tensor:
        found = [paired_contrastive(one, z) for one, z in zip(bank(texts), images, strict=True)]
        return torch.stack(found).mean()

    optimisers = [torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=True) for layer in layers]

    def one_by_one() -> list[float]:
        found = []
        for layer, optimiser, image in zip(layers, optimisers, images, strict=True):
            optimiser.zero_grad(set_to_none=True)
            loss = plain_loss(functional.normalize(layer(texts), dim=1), image)
            loss.backward()
            optimiser.step()
            found.append(float(loss.detach()))
        return found

    expected = float(together().detach())
    assert abs(np.mean(one_by_one()) - expected) < 1e-3, "both ways start at the same loss"
    name = f"step of all {len(outputs)} connectors, batch {BATCH}; reference: a loop of linear layers"
    return row(name, _step(bank, together), one_by_one, device)


def _generator(device: str) -> dict[str, Any]:
    """The connectors of one width, beside the hypernetwork that generates them, at the published size."""
    torch.manual_seed(0)
    width = WIDTHS[-1]
    texts, images = _unit(BATCH, X, device), [_unit(BATCH, width, device) for _ in range(EACH)]
    bank = ConnectorBank(X, [width] * EACH).to(device)
    generator = ConnectorGenerator(X, [width] * EACH, hidden=HIDDEN).to(device)

    def direct() -> Tensor:
        found = [paired_contrastive(one, z) for one, z in zip(bank(texts), images, strict=True)]
        return torch.stack(found).mean()

    def generated() -> Tensor:
        weights = generator(generator.code(range(EACH), [one.mean(0) for one in images]), range(EACH))
        mapped = [functional.normalize(texts @ weight + bias, dim=1) for weight, bias in weights]
        return torch.stack([plain_loss(one, z) for one, z in zip(mapped, images, strict=True)]).mean()

    millions = sum(one.numel() for one in generator.parameters()) / 1e6
    name = f"step of {EACH} connectors, batch {BATCH}; reference: hypernetwork of {millions:.0f} M parameters"
    return row(name, _step(bank, direct), _step(generator, generated), device, repeats=2)


def _tiles(device: str) -> dict[str, Any]:
    """The loss in tiles, forward and backward, beside the whole table of logits."""
    torch.manual_seed(0)
    texts, images = _unit(LOSS_BATCH, LOSS_WIDTH, device), _unit(LOSS_BATCH, LOSS_WIDTH, device)
    mapped = texts.requires_grad_()

    def ours() -> Tensor:
        return torch.autograd.grad(paired_contrastive(mapped, images, tile_bytes=2**24), mapped)[0]

    def reference() -> Tensor:
        return torch.autograd.grad(plain_loss(mapped, images), mapped)[0]

    torch.testing.assert_close(ours(), reference(), rtol=1e-3, atol=1e-6)
    name = f"loss in tiles of 16 MiB, batch {LOSS_BATCH}, width {LOSS_WIDTH}; reference: whole logits"
    return row(name, ours, reference, device)


def _search(device: str) -> list[dict[str, Any]]:
    """Search over a recipe's zoo, beside the full grids of separately trained pairs."""
    recipe = load_recipe(RECIPES[0] if locate("flickr8k-128") else RECIPES[1])
    paper = paper_of(recipe.paper)
    zoo = paper.open_content(recipe, paper.load_data(recipe).content, device)
    # Without a folder no moments are kept from earlier runs: search computes its own.
    zoo = replace(zoo, **{side: {name: replace(one, folder=None) for name, one in getattr(zoo, side).items()}
                          for side in ("texts", "images")})  # fmt: skip
    settings = {model.name: model for model in recipe.models}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("search", *GRIDS):
            seed_everything(0)
            model = settings[name]
            task = Task(zoo, model, model.training or recipe.training, 0, Path(folder) / name, device)
            began = time.perf_counter()
            outcome = paper.connect(task)
            pairs = [pair for pair in zoo.pairs() if pair in outcome.pairs]
            scores = {pair: selection_score(task, pair, outcome.pairs[pair]) for pair in pairs}
            found[name] = (time.perf_counter() - began, outcome, scores)
    ours_s, ours, all_pairs = found["search"]
    chosen = tuple(ours.about["chosen"])
    rows = []
    for name in GRIDS:
        grid_s, grid, scores = found[name]
        regret = f"{max(scores.values()) - scores[chosen]:.3f}" if chosen in scores else "not in it"
        title = (
            f"search, {len(all_pairs)} pairs, {ours.flops / 1e12:.2f} Tflop; {name}, {len(scores)} "
            f"pairs, {grid.flops / 1e12:.2f} Tflop; regret {regret}"
        )
        rows.append(laid_out(title, ours_s, grid_s, _resident(ours), _resident(grid)))
    return rows


def _resident(outcome: Any) -> float:
    """Weights, gradients and both moments of what is trained, in MiB; activations not counted."""
    return 16 * outcome.parameters / 2**20

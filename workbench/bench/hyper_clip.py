"""HyperCLIP beside what it competes with: the plain encoder, the swap of parameters, tasks one after another.

Every row asserts that both ways give the same before it is timed, but for training, where the two are
different models: there the reference is SigLIP's step on the same tower and batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.bench.timing import laid_out, median_seconds, peak_mib, row
from workbench.hypernetworks import GeneratedWeights
from workbench.objectives import sigmoid_contrastive
from workbench.papers.hyper_clip import HyperCLIP, build_clip
from workbench.papers.hyper_clip_settings import ClipModelSettings, ImageTower, TextTower

TOWERS = (("test_efficientnet", 48, 64), ("mobilenetv3_small_050", 96, 64), ("efficientnet_b0", 96, 32))
TASKS, IMAGES = 64, 256  # of the batch of many tasks
WIDTH, TEXTS, D = 384, 64, 64
ROUNDS = 5


def rows(device: str = "cpu") -> list[dict[str, Any]]:
    """Measure all cases; see :func:`workbench.bench.run_bench` for the columns."""
    found = []
    for tower, size, batch in TOWERS:
        found.append(_training(tower, size, batch, device))
        found.append(_swap(tower, size, batch, device))
    tower, size, _ = TOWERS[1]
    return [*found, *_tasks(tower, size, device)]


def _model(kind: str, tower: str, size: int, device: str) -> HyperCLIP:
    """Build a model whose generated weights differ between text sets."""
    torch.manual_seed(0)
    clip = build_clip(ImageTower(timm_model_name=tower, image_size=size), TextTower(), D, -4.0, WIDTH)
    mode = "residual" if kind == "hyper" else "replace"
    model = HyperCLIP(ClipModelSettings(name=kind, kind=kind, mode=mode), clip, D)
    if model.generator is not None:
        torch.nn.init.normal_(model.generator.head.weight, std=0.02)
    return model.to(device)


def _pixels(count: int, size: int, device: str) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)


def _alternating(
    first: Callable[[], object], second: Callable[[], object], device: str
) -> tuple[float, float]:
    """Time two actions in turns, so that a change of the machine's pace meets both; the fastest of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for action, found in zip((first, second), times, strict=True):
            found.append(median_seconds(action, device, repeats=3))
    return min(times[0]), min(times[1])


def _training(tower: str, size: int, batch: int, device: str) -> dict[str, Any]:
    """One step forward and backward of HyperCLIP beside SigLIP's."""
    models = {kind: _model(kind, tower, size, device).train() for kind in ("hyper", "siglip")}
    pixels, texts = _pixels(batch, size, device), torch.randn(TEXTS, WIDTH, device=device) / WIDTH**0.5
    match = torch.rand(batch, TEXTS, device=device) < 1 / TEXTS

    def step(model: HyperCLIP) -> None:
        model.zero_grad(set_to_none=True)
        embedded = model.embed_texts(texts)
        model.use(model.generate(embedded))
        loss = sigmoid_contrastive(model.embed_images(pixels), embedded, match, *model.scale_and_bias())
        loss.backward()

    actions = [lambda model=model: step(model) for model in models.values()]
    seconds = _alternating(*actions, device)
    name = f"training step, {tower} {size} px, {batch} images, {TEXTS} texts; reference: SigLIP"
    return laid_out(name, *seconds, *(peak_mib(action, device) for action in actions))


def _swap(tower: str, size: int, batch: int, device: str) -> dict[str, Any]:
    """Embed under generated norms held in the layers, beside swapping parameters for each call."""
    model = _model("hyper", tower, size, device).eval()
    pixels = _pixels(batch, size, device)
    with torch.no_grad():
        weights = model.generate(functional.normalize(torch.randn(TEXTS, D, device=device), dim=-1))
    plain = build_clip(ImageTower(timm_model_name=tower, image_size=size), TextTower(), D, -4.0, WIDTH).visual
    plain = plain.to(device).eval()
    norms = model.target.norms
    plain.load_state_dict(_unwrapped(model.clip.visual.state_dict(), list(norms)))
    images = pixels.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
    plain.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def ours() -> Tensor:
        model.use(weights)
        return model.embed_images(pixels)

    @torch.no_grad()
    def reference() -> Tensor:
        swapped = {}
        for name, norm in norms.items():
            swapped[f"{name}.weight"] = norm.scale + weights.tensors[f"{name}.scale"][0]
            swapped[f"{name}.bias"] = norm.shift + weights.tensors[f"{name}.shift"][0]
        return functional.normalize(torch.func.functional_call(plain, swapped, (images,)), dim=-1)

    torch.testing.assert_close(ours(), reference(), rtol=1e-4, atol=1e-4)
    name = f"embedding under generated norms, {tower} {size} px, {batch} images; reference: functional_call"
    return row(name, ours, reference, device, repeats=7)


def _unwrapped(state: dict[str, Tensor], norms: list[str]) -> dict[str, Tensor]:
    """Give a wrapped tower's state the names of a plain one."""
    found = {}
    for name, tensor in state.items():
        owner = next((norm for norm in norms if name.startswith(f"{norm}.")), None)
        if owner is not None:
            last = name.removeprefix(f"{owner}.").removeprefix("norm.")
            name = f"{owner}.{ {'scale': 'weight', 'shift': 'bias'}.get(last, last) }".replace(" ", "")
        found[name] = tensor
    return found


def _tasks(tower: str, size: int, device: str) -> list[dict[str, Any]]:
    """Images of many tasks in one batch, beside one task for all and beside one task after another."""
    model = _model("hyper", tower, size, device).eval()
    pixels = _pixels(IMAGES, size, device)
    with torch.no_grad():
        sets = functional.normalize(torch.randn(TASKS, TEXTS, D, device=device), dim=-1)
        weights = model.generate(sets)
    which = torch.arange(IMAGES, device=device) % TASKS

    def task(place: int) -> GeneratedWeights:
        return GeneratedWeights(
            weights.spec, {name: part[place : place + 1] for name, part in weights.tensors.items()}
        )

    @torch.no_grad()
    def together() -> Tensor:
        model.use(weights, which)
        return model.embed_images(pixels)

    @torch.no_grad()
    def one() -> Tensor:
        model.use(task(0))
        return model.embed_images(pixels)

    @torch.no_grad()
    def in_turn() -> Tensor:
        found = torch.empty(IMAGES, D, device=device)
        for place in range(TASKS):
            model.use(task(place))
            found[which == place] = model.embed_images(pixels[which == place])
        return found

    torch.testing.assert_close(together(), in_turn(), rtol=1e-4, atol=1e-4)
    own = f"{IMAGES} images of {TASKS} tasks in one batch, {tower} {size} px"
    seconds, alone = _alternating(together, one, device)
    return [
        laid_out(
            f"{own}; reference: one task", seconds, alone, peak_mib(together, device), peak_mib(one, device)
        ),
        row(f"{own}; reference: task by task", together, in_turn, device),
    ]

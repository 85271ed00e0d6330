"""Exports of a classifier: one static ONNX file, or one graph for all tasks with a small vector per task.

Static: generated scales and shifts are folded into the convolutions before them (BatchNorm) or the linear
layers after them (LayerNorm), so that the file is a plain small network. Pack: the graph takes the generated
numbers and the class directions as inputs, so a new task needs no new graph.

Shape letters: N images, S side in pixels, C classes, D joint width, P generated numbers.
"""

import copy
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from workbench.classifier import Classifier, HyperCLIPModel
from workbench.errors import RunError
from workbench.files import write_atomic
from workbench.hypernetworks import Affines, ChannelAffine, ConditionedNorm, GeneratedWeights
from workbench.hypernetworks.overrides import ConditionedWeight
from workbench.papers.hyper_clip import HyperCLIP

PARITY = 1e-4  # largest difference of a unit embedding's entries between PyTorch and ONNX
OPSET = 20


class _Tracer(fx.Tracer):
    """Sees layers as they are; norms of ours stay whole."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        kinds = (ConditionedNorm, ConditionedWeight, nn.Conv2d, nn.Linear)
        return isinstance(module, kinds) or super().is_leaf_module(module, name)


def _put(tower: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(tower.get_submodule(parent), last, module)


@torch.no_grad()
def fold_norms(tower: nn.Module) -> tuple[list[str], list[str]]:
    """Fold every norm that can be folded into its neighbours, in place; the tower must be baked and frozen.

    Matched by the flow of data, not by names: a BatchNorm whose input is the output of one convolution and of
    nothing else; a LayerNorm whose output only linear layers and convolutions of size 1 read.

    Returns:
        Names of the norms folded away, and of those that stay, with their generated values in them.
    """
    within = {}  # a convolution that carries its affine inside itself
    for path, module in tower.named_modules():
        if isinstance(module, nn.Conv2d) and isinstance(getattr(module, "affine", None), ConditionedNorm):
            within[f"{path}.affine"] = module
    for path, convolution in within.items():
        _into(convolution, *_factors(tower.get_submodule(path)))
        convolution.affine = nn.Identity()
    modules, folded, kept = dict(tower.named_modules()), list(within), []
    try:
        nodes = list(_Tracer().trace(tower).nodes)
    except TraceError:  # code that asks for shapes: the norms stay, with the generated values in them
        return folded, [path for path, module in modules.items() if isinstance(module, ConditionedNorm)]
    for node in nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(norm, ConditionedNorm):
            (folded if _fold(tower, node, norm, modules) else kept).append(node.target)
    return folded, kept


def _fold(tower: nn.Module, node: fx.Node, norm: ConditionedNorm, modules: dict[str, nn.Module]) -> bool:
    """Fold one norm into what comes before or after it in the flow of data; False if it cannot be."""
    before = node.args[0]
    source = modules.get(before.target) if before.op == "call_module" else None
    if isinstance(norm.norm, _BatchNorm | ChannelAffine):
        if not isinstance(source, nn.Conv2d | nn.Linear) or len(before.users) > 1:
            return False
        _into(source, *_factors(norm))
        _put(tower, node.target, norm.after)
        return True
    readers = [modules.get(user.target) if user.op == "call_module" else None for user in node.users]
    if (
        not isinstance(norm.norm, nn.LayerNorm)
        or len(norm.after)
        or not readers
        or not all(map(_reads, readers))
    ):
        return False
    for layer in readers:
        _behind(layer, norm.scale, norm.shift)
    norm.scale.fill_(1)
    norm.shift.zero_()
    return True


def _factors(norm: ConditionedNorm) -> tuple[Tensor, Tensor]:
    """Return a norm in evaluation mode as a scale and a shift per channel."""
    inner = norm.norm
    if isinstance(inner, ChannelAffine):
        return norm.scale, norm.shift
    scale = norm.scale / (inner.running_var + inner.eps).sqrt()
    return scale, norm.shift - inner.running_mean * scale


def _into(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Scale and shift a layer's output channels by changing its weights."""
    layer.weight.copy_(layer.weight * scale.view(-1, *(1,) * (layer.weight.dim() - 1)))
    bias = shift if layer.bias is None else layer.bias * scale + shift
    layer.bias = nn.Parameter(bias.clone())


def _reads(layer: nn.Module | None) -> bool:
    """Tell whether a layer can take up a scale and shift of its input."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding in (0, (0, 0))
    return isinstance(layer, nn.Linear)


def _behind(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Take up a scale and shift of a layer's input channels."""
    weight = layer.weight
    added = (weight * shift.view(1, -1, *(1,) * (weight.dim() - 2))).flatten(1).sum(1)
    layer.bias = nn.Parameter(added if layer.bias is None else layer.bias + added)
    weight.copy_(weight * scale.view(1, -1, *(1,) * (weight.dim() - 2)))


class _Static(nn.Module):
    """Images to logits, class directions baked in."""

    def __init__(self, model: HyperCLIP, directions: Float[Tensor, "C D"]) -> None:
        super().__init__()
        scale, bias = model.scale_and_bias()
        self.tower, self.adapter = model.clip.visual, model.adapter
        self.register_buffer("head", (scale * directions).detach().T.contiguous())
        self.register_buffer("bias", bias.detach())

    def forward(self, images: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N C"]:
        found = self.tower(images / 127.5 - 1)
        if self.adapter is not None:
            found = found + self.adapter(found)
        return functional.normalize(found, dim=-1) @ self.head + self.bias


class _Pack(nn.Module):
    """Images, generated numbers and class directions to logits: one graph for every task."""

    def __init__(self, model: HyperCLIP) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", model.scale_and_bias()[0].detach())
        self.register_buffer("bias", model.scale_and_bias()[1].detach())

    def forward(
        self, images: Float[Tensor, "N 3 S S"], task: Float[Tensor, " P"], directions: Float[Tensor, "C D"]
    ) -> Float[Tensor, "N C"]:
        self.model.use(self.model.generator.spec.compose(task[None]))
        found = functional.normalize(self.model.clip.encode_image(images / 127.5 - 1), dim=-1)
        self.clear()
        return self.scale * found @ directions.T + self.bias

    def clear(self) -> None:
        """Leave no tensor of a task in the norms: torch warns of what a graph leaves behind in attributes."""
        for norm in self.model.target.norms.values():
            norm.use(None, None)


@dataclass(frozen=True)
class Export:
    """Where an export lies and what it measured."""

    folder: Path
    card: dict[str, Any]


def _copy_of(model: HyperCLIP) -> HyperCLIP:
    """Copy a model, in its neutral state, for taking apart."""
    model.use(None)
    return copy.deepcopy(model).cpu().eval()


def export(classifier: Classifier, folder: Path) -> Export:
    """Write a classifier as ONNX, both ways, and check that it computes what PyTorch does.

    Files: ``static.onnx`` (images float32 0 to 255 ``[N, 3, S, S]`` -> logits), and for models that generate
    norms ``pack.onnx`` (images, task vector, class directions -> logits) with ``task.safetensors``;
    ``classes.json``; ``card.json`` with sizes, parity and latency beside the unadapted encoder.

    Raises:
        RunError: the exported graph differs from PyTorch by more than 1e-4, or the tower cannot be exported;
            then nothing is written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as private:
        card = _write_all(classifier, Path(private))
        folder.mkdir(exist_ok=True)
        for file in Path(private).iterdir():
            file.replace(folder / file.name)
    return Export(folder, card)


def _write_all(classifier: Classifier, folder: Path) -> dict[str, Any]:
    """Write all files of an export, and return its card."""
    import onnxruntime

    source, size = classifier.source, classifier.source.size
    images = torch.randint(0, 256, (5, 3, size, size), generator=torch.Generator().manual_seed(0))
    directions = classifier.directions.cpu().clone()  # no longer of inference mode, which forbids gradients
    with source.lock:
        adapted, plain = _copy_of(source.model), _copy_of(source.model)
    weights = classifier.weights and classifier.weights.to("cpu")
    # By the copy: another device rounds otherwise, and by more than the parity that is asked for.
    here = Classifier(HyperCLIPModel(plain, size, None), classifier.classes, directions, weights)
    expected = here.scores(images[2:].byte()).clone()
    images = images.float()  # two to trace with, three to check with
    card: dict[str, Any] = {
        "model": source.model.settings.name,
        "classes": len(classifier.classes),
        "size": size,
    }
    if weights is not None:
        weights = GeneratedWeights(
            weights.spec, {name: part.clone() for name, part in weights.tensors.items()}
        )
        adapted.use(weights)
        if isinstance(adapted.target, Affines):
            card |= _write_pack(folder, adapted, classifier, images, expected)
            adapted.use(weights)
        adapted.target.bake()
    with torch.no_grad():
        neutral = _Static(plain, directions)(images[2:])
    for name, model, wanted in (("static", adapted, expected), ("unadapted", plain, neutral)):
        folded, kept = _prepare(model)
        graph = _Static(model, directions)
        written = _write_graph(graph, (images,), folder / f"{name}.onnx", ["images"], wanted)
        card[name] = {**written, "folded": len(folded), "norms_left": kept}
    write_atomic(folder / "classes.json", json.dumps(classifier.classes, ensure_ascii=False))
    sessions = {
        name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        for name in ("static", "unadapted")
    }
    card["latency"] = _latency(sessions, images[:1].numpy())
    (folder / "unadapted.onnx").unlink()
    write_atomic(folder / "card.json", json.dumps(card, indent=1))
    return card


def _prepare(model: HyperCLIP) -> tuple[list[str], list[str]]:
    """Bring a baked model into its smallest form."""
    for path, module in list(model.clip.visual.named_modules()):
        if isinstance(module, ConditionedWeight):
            module.layer._parameters["weight"] = nn.Parameter(module.own.detach().clone())
            module.layer.__dict__.pop("weight", None)
            _put(model.clip.visual, path, module.layer)
    if not isinstance(model.target, Affines):
        Affines.wrap(model.clip.visual).reset()
        model.eval()
    return fold_norms(model.clip.visual)


def _write_graph(
    graph: nn.Module, inputs: tuple[Tensor, ...], path: Path, names: list[str], expected: Tensor
) -> dict[str, Any]:
    """Export one graph and hold it against PyTorch, on other images than it was traced with.

    Args:
        graph: to export.
        inputs: five images, and what else the graph takes; two images are traced, three are checked.
        path: of the file.
        names: of the inputs.
        expected: the logits of the three images, by the model before it was baked and folded.
    """
    import onnxruntime

    graph.eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes: list[Any] = [{0: batch}, *({} for _ in inputs[1:])]
    if len(inputs) == 3:
        shapes[2] = {0: torch.export.Dim("classes", min=1, max=5000)}
    images, rest = inputs[0], inputs[1:]
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                graph, (images[:2], *rest), dynamo=True, input_names=names, output_names=["logits"],
                opset_version=OPSET, dynamic_shapes=tuple(shapes), verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as problem:
        raise RunError(
            f"{path.name}: this tower cannot be exported to ONNX ({type(problem.__cause__).__name__}: "
            f"{str(problem.__cause__)[:200]}); choose another"
        ) from problem
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {"images": images[2:].numpy()}
    feed |= {name: value.numpy() for name, value in zip(names[1:], rest, strict=True)}
    worst = float(np.abs(session.run(None, feed)[0] - expected.numpy()).max())
    # Logits are t times a product of unit vectors: the bound is on the product.
    scale = float(graph.head.norm(dim=0).max()) if isinstance(graph, _Static) else float(graph.scale)
    if not worst / scale <= PARITY:
        raise RunError(
            f"{path.name} differs from PyTorch by {worst / scale:.1e}, allowed {PARITY:g}; not written"
        )
    return {"bytes": path.stat().st_size, "largest_difference": worst / scale}


def _write_pack(
    folder: Path, model: HyperCLIP, classifier: Classifier, images: Tensor, expected: Tensor
) -> dict[str, Any]:
    """Write the graph that takes a task as an input, and this task's vector."""
    vector, directions = classifier.vector().clone(), classifier.directions.cpu().clone()
    inputs = (images, vector, directions)
    graph = _Pack(model)
    graph.clear()
    names = ["images", "task", "directions"]
    found = _write_graph(graph, inputs, folder / "pack.onnx", names, expected)
    raw = save({"task": vector.contiguous(), "directions": directions.contiguous()})
    write_atomic(folder / "task.safetensors", raw)
    return {"pack": {**found, "task_bytes": len(raw), "generated_numbers": len(vector)}}


def _latency(sessions: dict[str, Any], image: np.ndarray, rounds: int = 200) -> dict[str, float]:
    """Time both graphs in turns on one image; medians in seconds, and their ratio."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, {"images": image})
            times[name].append(time.perf_counter() - began)
    medians = {name: float(np.median(values[rounds // 5 :])) for name, values in times.items()}
    return {**medians, "ratio": medians["static"] / medians["unadapted"]}

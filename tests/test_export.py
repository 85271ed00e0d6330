"""Exports compute what the classifier computes, as plain small graphs, and are whole or absent."""

import json
import shutil
from functools import cache, partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from workbench import export as export_module
from workbench.errors import RunError
from workbench.export import export, fold_norms
from workbench.hypernetworks import Affines, ChannelAffine

NAMES = ["a red fox", "a grey wolf", "a green frog"]
OTHERS = ["tram", "ferry", "bicycle", "rocket", "猫"]
# Tower -> how many of its norms fold away, and how many stay.
TOWERS = {"test_efficientnet": (13, 0), "test_convnext": (12, 2), "mobilenetv3_small_050": (34, 0)}
BATCH_NORM = ("test_efficientnet", "mobilenetv3_small_050")


def pixels_of(count: int = 4, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def asked(path, **inputs) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def operators(path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.fixture(scope="module")
def brief():
    """A few rounds of timing instead of 200."""
    with pytest.MonkeyPatch.context() as patch:
        whole = export_module._latency
        patch.setattr(export_module, "_latency", lambda sessions, image: whole(sessions, image, 5))
        yield


@pytest.fixture(scope="module")
def quick(brief):
    """And no graph of the unadapted encoder, which is made only to be timed: the static one stands for it."""
    whole = export_module._write_graph

    def write(graph, inputs, path, names, expected):
        if path.stem == "unadapted":
            shutil.copy(path.with_name("static.onnx"), path)
            return {}
        return whole(graph, inputs, path, names, expected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "_write_graph", write)
        yield


@pytest.fixture(scope="module")
def exporting(image_text_model, tmp_path_factory, quick):
    """Export a tower's classifier once: its norms and statistics are far from a fresh one's."""

    @cache
    def once(tower: str, pack: bool):
        source = image_text_model("hyper", tower)
        source.model.calibration = pixels_of(8, seed=9)
        classifier = source.adapt(NAMES)
        with pytest.MonkeyPatch.context() as patch:
            if not pack:
                patch.setattr(export_module, "_write_pack", lambda *_: {})
            found = export(classifier, tmp_path_factory.mktemp("export") / "new" / tower)
        return classifier, found

    return once


@pytest.fixture(params=TOWERS)
def exported(request, exporting):
    """A tower's name, a classifier, and its export; without the pack where that takes long."""
    return request.param, *exporting(request.param, request.param != "mobilenetv3_small_050")


@pytest.fixture(
    params=[
        "test_efficientnet",
        "test_convnext",
        pytest.param("mobilenetv3_small_050", marks=pytest.mark.slow),
    ]
)
def packed(request, exporting):
    """A classifier and its export, pack included."""
    return exporting(request.param, True)


# --- what the graphs compute --------------------------------------------------------------------------------


def test_the_static_graph_scores_as_the_classifier(exported):
    _, classifier, found = exported
    pixels = pixels_of()
    scores = asked(found.folder / "static.onnx", images=pixels.float().numpy())
    expected = classifier.scores(pixels).numpy()
    # Logits are ten times a product of unit vectors: 1e-4 of the product.
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-3)
    assert np.ptp(expected) > 0.1
    one = asked(found.folder / "static.onnx", images=pixels[:1].float().numpy())
    np.testing.assert_allclose(one, expected[:1], rtol=0, atol=1e-3)


def test_the_pack_scores_any_task_by_its_vector_and_directions(packed):
    classifier, found = packed
    pixels, own = pixels_of(), load_file(found.folder / "task.safetensors")
    other = classifier.source.adapt(OTHERS)
    tasks = {
        "own": (classifier, own["task"], own["directions"]),
        "other": (other, other.vector().numpy(), other.directions.numpy()),
    }
    scores = {}
    for name, (task, vector, directions) in tasks.items():
        scores[name] = asked(
            found.folder / "pack.onnx", images=pixels.float().numpy(), task=vector, directions=directions
        )
        np.testing.assert_allclose(scores[name], task.scores(pixels).numpy(), rtol=0, atol=1e-3)
    mixed = asked(
        found.folder / "pack.onnx",
        images=pixels.float().numpy(),
        task=tasks["other"][1],
        directions=tasks["own"][2],
    )
    assert np.abs(mixed - scores["own"]).max() > 0.01  # the vector matters, not the directions alone


def test_norms_are_folded_away(exported):
    tower, _, found = exported
    folded, kept = TOWERS[tower]
    assert found.card["static"]["folded"] == folded
    assert len(found.card["static"]["norms_left"]) == kept
    if tower in BATCH_NORM:
        assert "BatchNormalization" not in operators(found.folder / "static.onnx")
        assert "Conv" in operators(found.folder / "static.onnx")


def test_the_static_graph_takes_images_alone_and_the_pack_a_task_too(packed):
    classifier, found = packed
    shapes = {}
    for name in ("static", "pack"):
        inputs = onnx.load(found.folder / f"{name}.onnx").graph.input
        shapes[name] = {
            one.name: [part.dim_value for part in one.type.tensor_type.shape.dim] for one in inputs
        }
    # 0 stands for a size of any length.
    assert shapes["static"] == {"images": [0, 3, 32, 32]}
    assert shapes["pack"] == {
        "images": [0, 3, 32, 32],
        "task": [classifier.weights.spec.numel],
        "directions": [0, 16],
    }


# --- what is written ----------------------------------------------------------------------------------------


def test_files_say_what_was_exported(packed):
    classifier, found = packed
    assert {path.name for path in found.folder.iterdir()} == {
        "static.onnx", "pack.onnx", "task.safetensors", "classes.json", "card.json"
    }  # fmt: skip
    assert not [path for path in found.folder.parent.iterdir() if path != found.folder]
    assert json.loads((found.folder / "classes.json").read_text("utf-8")) == NAMES
    card = json.loads((found.folder / "card.json").read_text("utf-8"))
    assert card == found.card
    assert (card["model"], card["classes"], card["size"]) == ("hyper", 3, 32)
    for name in ("static", "pack"):
        assert card[name]["bytes"] == (found.folder / f"{name}.onnx").stat().st_size
        assert 0 <= card[name]["largest_difference"] <= 1e-4
    assert card["pack"]["generated_numbers"] == classifier.weights.spec.numel
    assert card["pack"]["task_bytes"] == (found.folder / "task.safetensors").stat().st_size
    latency = card["latency"]
    assert latency["ratio"] == pytest.approx(latency["static"] / latency["unadapted"])
    own = load_file(found.folder / "task.safetensors")
    assert (own["task"] == classifier.vector().numpy()).all()
    assert (own["directions"] == classifier.directions.numpy()).all()


def test_exporting_leaves_the_model_as_it_was(packed):
    classifier, _ = packed
    model = classifier.source.model
    assert not model.adapted
    norms = model.target.norms
    assert all(norm.norm.__dict__["weight"] is norm.scale for norm in norms.values())
    assert classifier.scores(pixels_of()).isfinite().all()


@pytest.mark.usefixtures("brief")
def test_a_model_that_generates_nothing_has_a_static_graph_alone(image_text_model, tmp_path):
    classifier = image_text_model("adapter").adapt(OTHERS)
    found = export(classifier, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"static.onnx", "classes.json", "card.json"}
    assert json.loads((tmp_path / "classes.json").read_text("utf-8")) == OTHERS
    scores = asked(tmp_path / "static.onnx", images=pixels_of().float().numpy())
    np.testing.assert_allclose(scores, classifier.scores(pixels_of()).numpy(), rtol=0, atol=1e-3)
    assert "pack" not in found.card
    assert found.card["unadapted"]["folded"] == found.card["static"]["folded"] == 13
    assert "BatchNormalization" not in operators(tmp_path / "static.onnx")


@pytest.mark.usefixtures("quick")
def test_generated_convolutions_are_baked_into_a_static_graph(image_text_model, tmp_path):
    classifier = image_text_model("hyper", generates="convolutions", mode="residual").adapt(NAMES)
    neutral = classifier.source.embed(pixels_of(), None)
    assert not torch.allclose(neutral, classifier.source.embed(pixels_of(), classifier.weights), atol=1e-3)
    export(classifier, tmp_path)
    scores = asked(tmp_path / "static.onnx", images=pixels_of().float().numpy())
    np.testing.assert_allclose(scores, classifier.scores(pixels_of()).numpy(), rtol=0, atol=1e-3)
    assert not (tmp_path / "pack.onnx").exists()


def written_beside(monkeypatch, image_text_model, folder, wrong: str):
    """Export with graphs that are stubs; the named one is off."""

    def graph(graph, inputs, path, names, expected):
        path.write_bytes(b"a graph")
        if path.stem == wrong:
            raise RunError(f"{path.name} differs from PyTorch by 2.0e-02, allowed 0.0001; not written")
        return {}

    monkeypatch.setattr(export_module, "_write_graph", graph)
    return export(image_text_model("hyper").adapt(NAMES), folder)


@pytest.mark.parametrize("wrong", ["pack", "static", "unadapted"])
def test_a_graph_that_differs_leaves_nothing_behind(wrong, image_text_model, tmp_path, monkeypatch):
    with pytest.raises(RunError, match=f"{wrong}.onnx differs"):
        written_beside(monkeypatch, image_text_model, tmp_path / "new" / "one", wrong)
    assert not list((tmp_path / "new").iterdir())


def test_an_export_that_fails_leaves_an_older_one_whole(image_text_model, tmp_path, monkeypatch):
    (tmp_path / "static.onnx").write_bytes(b"from before")
    with pytest.raises(RunError, match="static.onnx differs"):
        written_beside(monkeypatch, image_text_model, tmp_path, "static")
    assert [path.name for path in tmp_path.iterdir()] == ["static.onnx"]
    assert (tmp_path / "static.onnx").read_bytes() == b"from before"


class Made:
    """What torch's exporter returns, holding a graph that was made before."""

    def __init__(self, path):
        self.save = partial(shutil.copy, path)


def test_a_graph_of_another_model_or_above_the_bound_is_an_error(
    exporting, image_text_model, tmp_path, monkeypatch
):
    classifier, found = exporting("test_efficientnet", True)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Made(found.folder / "pack.onnx"))
    with pytest.raises(RunError, match=r"pack.onnx differs from PyTorch by .*, allowed 0.0001; not written"):
        export(image_text_model("token_control").adapt(NAMES), tmp_path / "new")
    monkeypatch.setattr(export_module, "PARITY", -1.0)  # even an exact graph is above it
    with pytest.raises(RunError, match=r"pack.onnx differs from PyTorch by .*e-0., allowed -1; not written"):
        export(classifier, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_fold_that_is_wrong_is_found_out(image_text_model, tmp_path, monkeypatch):
    """What is checked is the classifier before it was folded, not the folded copy against itself."""
    whole = export_module._into
    monkeypatch.setattr(export_module, "_into", lambda layer, scale, shift: whole(layer, scale * 1.01, shift))
    with pytest.raises(RunError, match="static.onnx differs from PyTorch"):
        export(image_text_model("siglip").adapt(NAMES), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- folding by hand ----------------------------------------------------------------------------------------


def wrapped(*layers: nn.Module) -> nn.Sequential:
    tower = nn.Sequential(*layers)
    Affines.wrap(tower)
    return tower.eval()


def test_a_batchnorm_folds_into_the_convolution_before_it():
    convolution, norm = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.0)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([3.0, -2.0]).view(2, 1, 1, 1))
        norm.weight.copy_(torch.tensor([2.0, 6.0]))
        norm.bias.copy_(torch.tensor([1.0, -1.0]))
        norm.running_mean.copy_(torch.tensor([5.0, 0.5]))
        norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    tower = wrapped(convolution, norm)
    assert fold_norms(tower) == (["1"], [])
    # g / sqrt(v) = 2 / 2 = 1 and 6 / 3 = 2: weights 3 * 1 and -2 * 2, biases 1 - 5 * 1 and -1 - 0.5 * 2.
    assert tower[0].weight.flatten().tolist() == [3.0, -4.0]
    assert tower[0].bias.tolist() == [-4.0, -2.0]
    assert tower(torch.full((1, 1, 1, 1), 10.0)).flatten().tolist() == [26.0, -42.0]


def test_a_layernorm_folds_into_the_linear_layer_after_it():
    norm, linear = nn.LayerNorm(2, eps=0.0), nn.Linear(2, 1)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
        norm.bias.copy_(torch.tensor([1.0, -1.0]))
        linear.weight.copy_(torch.tensor([[4.0, 5.0]]))
        linear.bias.fill_(7.0)
    tower = wrapped(norm, linear)
    assert fold_norms(tower) == (["0"], [])
    # weights 4 * 2 and 5 * 3; bias 7 + 4 * 1 + 5 * (-1) = 6
    assert tower[1].weight.tolist() == [[8.0, 15.0]]
    assert tower[1].bias.tolist() == [6.0]
    # (1, 3) has mean 2 and deviation 1: -1 and 1; 6 - 8 + 15 = 13
    assert tower(torch.tensor([[1.0, 3.0]])).item() == pytest.approx(13.0)


def test_a_channel_affine_folds_into_its_layer():
    linear, affine = nn.Linear(1, 2), ChannelAffine(2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0], [2.0]]))
        linear.bias.copy_(torch.tensor([3.0, 4.0]))
        affine.weight.copy_(torch.tensor([5.0, 6.0]))
        affine.bias.copy_(torch.tensor([7.0, 8.0]))
    tower = wrapped(linear, affine)
    assert fold_norms(tower) == (["1"], [])
    # 1 * 5 and 2 * 6; 3 * 5 + 7 and 4 * 6 + 8
    assert tower[0].weight.tolist() == [[5.0], [12.0]]
    assert tower[0].bias.tolist() == [22.0, 32.0]


class Branching(nn.Module):
    """A convolution whose output is also read past its norm, and a LayerNorm that is read past its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.last, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.convolution(images)
        features = self.last((self.norm(maps) + maps).mean((2, 3)))
        return self.linear(features) + features


def test_a_batchnorm_with_nothing_before_it_stays():
    tower = wrapped(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))
    assert fold_norms(tower) == ([], ["0"])


@pytest.mark.parametrize(
    ("reader", "folds"),
    [
        ({"kernel_size": 2, "stride": 2}, True),
        (
            {"kernel_size": 3, "padding": 1},
            False,
        ),  # a shift would have to reach the zeros around the map, too
        ({"kernel_size": 1, "groups": 3}, False),
    ],
)
def test_a_layernorm_of_maps_folds_into_convolutions_that_mix_channels_and_pad_nothing(reader, folds):
    torch.manual_seed(0)
    norm, convolution = LayerNorm2d(3), nn.Conv2d(3, 6, **reader)
    for part in norm.parameters():
        nn.init.normal_(part)
    tower = wrapped(norm, convolution)
    images = torch.randn(2, 3, 8, 8)
    before = tower(images)
    assert fold_norms(tower) == ((["0"], []) if folds else ([], ["0"]))
    torch.testing.assert_close(tower(images), before, rtol=0, atol=1e-5)
    assert bool((tower[0].scale == 1).all()) == folds


def test_norms_with_other_readers_stay_with_their_values():
    torch.manual_seed(0)
    tower = Branching()
    for part in tower.parameters():
        nn.init.normal_(part)
    Affines.wrap(tower)
    tower.eval()
    images = torch.randn(2, 3, 8, 8)
    before = tower(images)
    assert fold_norms(tower) == ([], ["norm", "last"])
    assert torch.equal(tower(images), before)


def test_code_that_cannot_be_traced_keeps_its_norms():
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, images: Tensor) -> Tensor:
            count = len(list(images))  # no number while tracing
            return self.norm(self.convolution(images)) / count

    tower = Asking()
    Affines.wrap(tower)
    images = torch.randn(2, 3, 8, 8)
    before = tower.eval()(images)
    assert fold_norms(tower) == ([], ["norm"])
    assert torch.equal(tower(images), before)

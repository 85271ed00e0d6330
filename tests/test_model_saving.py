"""A model saved as a SentenceTransformer: what comes back is the same, and bad folders are refused."""

import json
import math
import os
import pickle
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from sentence_transformers import SentenceTransformer

from workbench.encoders import TextEncoder
from workbench.errors import DataError, RunError
from workbench.model import HyperCL
from workbench.papers.hyper_cl import ConditionedHead
from workbench.papers.hyper_cl_settings import ModelSettings
from workbench.training import seed_everything

TEXTS = ["A grey seal rests on a rock while the tide comes in around it.", "Soup.", "Two herons stand."]
TEXTS += ["The tram is full this morning.", "Soup."]
COLOUR, SIZE = "The colour.", "The size."
# Which rows share a batched product moves the last bits; pooled token states are kept in half precision.
CLOSE = dict.fromkeys(["sentence", "gate", "not_unit"], {"rtol": 0, "atol": 2e-6})
CLOSE["condition"] = {"rtol": 0, "atol": 2e-4}
HEADS = {
    "sentence": {"kind": "hyper", "rank": 4, "start": "paper"},
    "condition": {"kind": "hyper", "rank": 4, "identity": True, "pooling": "condition", "pooling_heads": 2},
    "gate": {"kind": "hadamard"},
    "not_unit": {"kind": "hyper", "rank": 4},
}
HEAD, MODULE = "3_ConditionedModule", "workbench.sentence_module.ConditionedModule"


@pytest.fixture(scope="module")
def models(encoder, tmp_path_factory):
    """Untrained heads on the real encoder; random weights tell conditions apart well enough."""
    cache, found = tmp_path_factory.mktemp("cache"), {}
    for name, settings in HEADS.items():
        seed_everything(3)
        head = ConditionedHead(ModelSettings(name=name, **settings), 384, 384)
        unit = name != "not_unit"
        found[name] = HyperCL(head, encoder if unit else TextEncoder(unit=False), cache, unit)
    return found


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """Every model's folder."""
    return {name: model.save_pretrained(tmp_path_factory.mktemp(name)) for name, model in models.items()}


# --- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_a_model_opened_again_gives_equal_embeddings(name, models, saved):
    opened = HyperCL.from_pretrained(saved[name])
    assert opened.head.settings == models[name].head.settings
    assert opened.unit == (name != "not_unit")
    assert opened.encoder.fingerprint == models[name].encoder.fingerprint
    for condition in (COLOUR, {COLOUR: 0.3, SIZE: 0.7}):
        found, expected = (one.encode(TEXTS, condition) for one in (opened, models[name]))
        torch.testing.assert_close(found, expected, **CLOSE[name])  # half-precision tokens


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_sentence_transformers_gives_the_same_with_its_own_encode(name, opened, models, saved):
    model = models[name].sentence_transformer()
    if opened:
        model = SentenceTransformer(str(saved[name]), trust_remote_code=True, device="cpu")
    for condition in (COLOUR, f"  {SIZE}\n"):
        expected = models[name].encode(TEXTS, condition)
        ways = (
            model.encode(TEXTS, condition=condition, convert_to_tensor=True),
            model.encode(TEXTS, condition=condition, convert_to_tensor=True, batch_size=2),
            model.encode_query(TEXTS, condition=condition, convert_to_tensor=True),
            torch.from_numpy(model.encode(TEXTS[0], condition=condition))[None].expand(5, -1),
        )
        for found, rows in zip(ways, (5, 5, 5, 1), strict=True):
            torch.testing.assert_close(found[:rows], expected[:rows], **CLOSE[name])
        expected = models[name].similarity(TEXTS, TEXTS, condition)
        torch.testing.assert_close(model.similarity(ways[0], ways[0]), expected, rtol=0, atol=4e-4)


def test_another_condition_gives_other_embeddings_and_none_the_plain_encoder(encoder, models):
    model = models["sentence"].sentence_transformer()
    plain, one, other = (
        model.encode(TEXTS, condition=condition, convert_to_tensor=True) for condition in (None, COLOUR, SIZE)
    )
    torch.testing.assert_close(plain, encoder.encode(TEXTS), **CLOSE["sentence"])
    assert torch.equal(plain, model.encode(TEXTS, convert_to_tensor=True))
    assert (torch.stack([one * other, one * plain]).sum(-1) < 0.99).all()  # cosines


def test_a_misspelt_keyword_and_a_condition_that_is_not_one_text_are_refused(models):
    model = models["sentence"].sentence_transformer()
    with pytest.raises(ValueError, match="conditon"):
        model.encode(TEXTS, conditon=COLOUR)
    with pytest.raises(DataError, match=r"HyperCL\.encode_conditioned"):
        model.encode(TEXTS, condition=[COLOUR] * 5)
    with pytest.raises(DataError, match="the condition is empty"):
        model.encode(TEXTS, condition=" ")


def test_a_saved_folder_holds_safetensors_and_no_pickle(saved):
    files = [path for path in saved["condition"].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    weights = {path.parent.name for path in files if path.name == "model.safetensors"}
    assert weights == {saved["condition"].name, HEAD}


def test_a_folder_that_cannot_be_written_is_named(models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write .*file"):
        models["sentence"].save_pretrained(tmp_path / "file")


# --- mixed and weighted conditions --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sentence", "condition"])
def test_mixed_conditions_equal_one_by_one_and_each_is_generated_once(name, models):
    model, rows = models[name], []
    asked = [COLOUR, SIZE, {COLOUR: 0.5, SIZE: 0.5}, COLOUR, {SIZE: 0.5, COLOUR: 0.5}]
    both = zip(TEXTS, asked, strict=True)
    expected = torch.cat([model.encode([text], condition, 0.8) for text, condition in both])
    hook = model.head.generator.register_forward_hook(lambda module, inputs, _: rows.append(len(inputs[0])))
    found = model.encode_conditioned(TEXTS, asked, strength=0.8)
    hook.remove()
    torch.testing.assert_close(found, expected, **CLOSE[name])  # half-precision tokens
    assert rows == [3]
    with pytest.raises(DataError, match="5 texts need as many conditions, got 2"):
        model.encode_conditioned(TEXTS, [COLOUR, SIZE])


@pytest.mark.parametrize("name", ["sentence", "condition"])
def test_weights_of_conditions_interpolate_the_generated_coefficients(name, models):
    model = models[name]
    one, other, alone, half, beyond = (
        model.weights([condition]).tensors
        for condition in (COLOUR, SIZE, {COLOUR: 1.0}, {COLOUR: 0.5, SIZE: 0.5}, {COLOUR: 2.0, SIZE: -1.0})
    )
    for slot in one:
        assert not torch.allclose(one[slot], other[slot], atol=1e-3)
        torch.testing.assert_close(alone[slot], one[slot])
        # Sums of 384 products in single precision.
        torch.testing.assert_close(half[slot], (one[slot] + other[slot]) / 2, rtol=0, atol=1e-4)
        torch.testing.assert_close(beyond[slot], 2 * one[slot] - other[slot], rtol=0, atol=1e-4)
    found, expected = (model.encode(TEXTS, condition) for condition in ({COLOUR: 1.0}, COLOUR))
    torch.testing.assert_close(found, expected, **CLOSE[name])  # half-precision tokens


@pytest.mark.parametrize("weights", [{}, {COLOUR: math.nan}, {COLOUR: math.inf, SIZE: 1.0}])
def test_weights_that_are_not_finite_and_no_weights_are_refused(weights, models):
    with pytest.raises(DataError, match="a weighted condition needs texts with finite weights, got"):
        models["sentence"].encode(TEXTS, weights)
    with pytest.raises(DataError, match="the condition is empty"):
        models["sentence"].encode(TEXTS, {COLOUR: 0.5, " ": 0.5})


# --- bad folders --------------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when its pickle is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a saved model that may be damaged; its files are links, so replace them and never write."""
    return Path(shutil.copytree(saved["sentence"], tmp_path / "model", copy_function=os.link))


def replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def rewrite(folder: Path, place: int, **changes: object) -> None:
    listed = json.loads((folder / "modules.json").read_text())
    listed[place] |= changes
    replace(folder / "modules.json", json.dumps(listed).encode())


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"[1]", b'[{"type": "x"}]', b"\xff"])
def test_a_folder_that_is_not_a_saved_model_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "modules.json").write_bytes(content)
    with pytest.raises(RunError, match="is not a saved model .*; give a folder written by save_pretrained"):
        HyperCL.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_foreign_class_is_named_and_never_imported(place, folder, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    (tmp_path / "stranger.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewrite(folder, place, type="stranger.Module")
    with pytest.raises(RunError, match=r"modules\.json names stranger\.Module.*it is not imported"):
        HyperCL.from_pretrained(folder)
    assert "stranger" not in sys.modules
    assert not marker.exists()
    import_module("stranger")
    assert marker.exists()  # it could have been imported
    del sys.modules["stranger"]


OTHER = "sentence_transformers.base.modules.dense.Dense"


@pytest.mark.parametrize(("kind", "place"), [(OTHER, 1), (OTHER, 3), (["x"], 1), (MODULE, 0)])
def test_a_class_in_the_wrong_place_is_refused(kind, place, folder):
    rewrite(folder, place, type=kind)
    with pytest.raises(RunError, match=r"which is no class of a Hyper-CL model"):
        HyperCL.from_pretrained(folder)


def test_modules_in_another_order_are_refused(folder):
    listed = json.loads((folder / "modules.json").read_text())
    replace(folder / "modules.json", json.dumps([listed[1], listed[0], *listed[2:]]).encode())
    with pytest.raises(RunError, match="holds no usable encoder: its first module is not a Transformer"):
        HyperCL.from_pretrained(folder)


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_module_path_that_leaves_the_folder_is_refused(absolute, place, folder):
    part = json.loads((folder / "modules.json").read_text())[place]["path"]
    outside = Path(shutil.copytree(folder / part, folder.parent / "outside"))  # a whole one
    rewrite(folder, place, path=str(outside) if absolute else "../outside")
    with pytest.raises(RunError, match="points outside its folder|expected a relative path"):
        HyperCL.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [("model.safetensors", "holds no usable encoder"), (f"{HEAD}/model.safetensors", "holds no usable head")],
)
def test_a_pickle_in_place_of_weights_is_refused_and_not_read(file, message, folder, tmp_path):
    marker, raw = tmp_path / "marker", pickle.dumps(Bomb(tmp_path / "marker"))
    pickle.loads(raw)
    marker.unlink()  # such a pickle works
    replace(folder / file, raw)
    with pytest.raises(RunError, match=f"{message}: .*Save the model again"):
        HyperCL.from_pretrained(folder)
    (folder / file).unlink()
    (folder / file).with_name("pytorch_model.bin").write_bytes(raw)
    with pytest.raises(RunError, match=f"{message}: .*Save the model again"):
        HyperCL.from_pretrained(folder)
    if HEAD in file:
        with pytest.raises(DataError, match=r"no model\.safetensors; pickles are not read"):
            SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("file", "key", "message"),
    [
        ("model.safetensors", "encoder.layer.3.output.dense.weight", "holds no usable encoder"),
        (f"{HEAD}/model.safetensors", "head.generator.head.weight", "holds no usable head"),
    ],
)
def test_weights_that_are_cut_or_not_finite_are_refused(file, key, message, folder):
    whole = (folder / file).read_bytes()
    for length in (0, 7, 500, len(whole) - 1000):
        replace(folder / file, whole[:length])
        with pytest.raises(RunError, match=f"{message}: "):
            HyperCL.from_pretrained(folder)
    for value in (math.nan, math.inf):
        tensors = load(whole)
        tensors[key][1, 5] = value
        replace(folder / file, save(tensors))
        with pytest.raises(RunError, match=f"{message}: the weights hold NaN or infinity"):
            HyperCL.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("width", 64), ("width", "384"), ("condition_width", 64), ("unit", "no"), ("unit", None)]
    + [("settings", {"name": "x", "kind": kind}) for kind in ("hadamard", "magic")],
)
def test_a_head_card_that_does_not_fit_the_weights_is_refused(key, value, folder):
    card = folder / HEAD / "head.json"
    replace(card, json.dumps({**json.loads(card.read_text()), key: value}).encode())
    with pytest.raises(RunError, match=f"{HEAD} holds no usable head: .*Save the model again"):
        HyperCL.from_pretrained(folder)

"""Pretrained image encoders: pictures are prepared as their own library does; what fails says what to do."""

import io
import json
import os

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf

from workbench import zoo_encoders
from workbench.datasets.images import images_in
from workbench.errors import DataError, ManifestError, RunError
from workbench.image_encoders import open_image_encoder
from workbench.zoo_encoders import open_pretrained

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
}
PREPARED = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic"}


@pytest.fixture(autouse=True)
def _opened_anew():
    """One encoder is kept open; a test starts without."""
    open_pretrained.cache_clear()


def noisy(width, height, seed=0) -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    raw = io.BytesIO()
    Image.fromarray(levels).save(raw, "png")
    return raw.getvalue()


# Wide, tall and square; odd differences, of which the centre is a matter of rounding.
SHAPES = ((333, 251), (200, 401), (260, 260), (401, 235), (235, 400), (64, 50))
PICTURES = [noisy(*shape) for shape in SHAPES]


def prepared_by(encoder) -> torch.Tensor:
    """What an encoder's network is given."""
    return encoder.prepare(images_in(PICTURES, encoder.side, [""] * len(PICTURES), encoder.fitting))


@pytest.fixture
def of_timm(tmp_path):
    """Save a small model of timm, its weights random, as timm does; returns it and its name in a recipe."""

    def save(architecture="test_vit", **config):
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=7, pretrained_cfg_overlay=config).eval()
        save_for_hf(model, str(tmp_path / "timm"), safe_serialization=True)
        return model, f"timm:local-dir:{tmp_path / 'timm'}"

    return save


@pytest.fixture
def of_open_clip(tmp_path):
    """The same for open_clip."""

    def save(**config):
        torch.manual_seed(0)
        model = open_clip.CLIP(**CLIP).eval()
        folder = tmp_path / "clip"
        folder.mkdir(exist_ok=True)
        save_file({key: one.contiguous() for key, one in model.state_dict().items()},
                  folder / "open_clip_model.safetensors")  # fmt: skip
        about = {"model_cfg": CLIP, "preprocess_cfg": {**PREPARED, "resize_mode": "shortest", **config}}
        (folder / "open_clip_config.json").write_text(json.dumps(about))
        return model, f"open_clip:local-dir:{folder}"

    return save


# --- timm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("test_vit", {}),  # 0.95 of 168.4 pixels
        ("test_vit", {"crop_pct": 0.9}),  # 177.8 pixels: cut to 177, not rounded to 178
        ("test_resnet", {"crop_pct": 0.95, "input_size": (3, 224, 224)}),  # 11 more than 224: an odd number
        ("test_resnet", {"interpolation": "bilinear", "mean": (0.1, 0.2, 0.3)}),
        ("test_vit", {"crop_pct": 1.0, "crop_mode": "squash"}),  # as EVA-02 L and CLIP's L of 336 pixels
        ("test_vit", {"crop_mode": "squash"}),
    ],
)
def test_pictures_are_prepared_as_timm_prepares_them(of_timm, architecture, config):
    model, name = of_timm(architecture, **config)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    expected = torch.stack([transform(Image.open(io.BytesIO(raw))) for raw in PICTURES])
    # The same pixels; only (x / 255 - mean) / deviation may round otherwise.
    torch.testing.assert_close(prepared_by(open_pretrained(name)), expected, rtol=0, atol=1e-6)


def test_features_of_a_timm_model_are_those_before_its_classifier(of_timm):
    model, name = of_timm()
    encoder = open_pretrained(name)
    pixels = images_in(PICTURES, encoder.side, [""] * len(PICTURES), encoder.fitting)
    features = encoder.on("cpu")(pixels)
    with torch.no_grad():
        given = (pixels.float() / 255 - 0.5) / 0.5
        expected = model.forward_head(model.forward_features(given), pre_logits=True)
    torch.testing.assert_close(features, expected)
    assert features.shape == (len(PICTURES), 64)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    head = sum(one.numel() for one in model.head.parameters())
    assert encoder.parameters == sum(one.numel() for one in model.parameters()) - head
    assert not encoder.module.training
    assert not any(one.requires_grad for one in encoder.module.parameters())


def test_features_do_not_depend_on_how_many_are_computed_together(of_timm, monkeypatch):
    encoder = open_pretrained(of_timm()[1])
    pixels = images_in(PICTURES, encoder.side, [""] * len(PICTURES), encoder.fitting)
    whole = encoder.on("cpu")(pixels)
    monkeypatch.setattr(zoo_encoders, "AT_ONCE", 2)
    # Products of other shapes are summed in another order.
    torch.testing.assert_close(encoder.on("cpu")(pixels), whole, rtol=0, atol=1e-5)


def test_the_fingerprint_follows_weights_and_preprocessing(of_timm, tmp_path):
    found = []
    model, name = of_timm()
    for spoil in (
        lambda config: None,
        lambda config: config["pretrained_cfg"].update(crop_pct=0.9),
        lambda config: config["pretrained_cfg"].update(mean=[0.1, 0.5, 0.5]),
        lambda config: config["pretrained_cfg"].update(crop_mode="squash"),
    ):
        save_for_hf(model, str(tmp_path / "timm"), safe_serialization=True)
        config = json.loads((tmp_path / "timm/config.json").read_text())
        spoil(config)
        (tmp_path / "timm/config.json").write_text(json.dumps(config))
        open_pretrained.cache_clear()
        found.append(open_pretrained(name).fingerprint)
    with torch.no_grad():
        model.patch_embed.proj.bias[0] += 1
    save_for_hf(model, str(tmp_path / "timm"), safe_serialization=True)
    open_pretrained.cache_clear()
    found.append(open_pretrained(name).fingerprint)
    assert len(set(found)) == 5
    _, name = of_timm()
    open_pretrained.cache_clear()
    assert open_pretrained(name).fingerprint == found[0]


# --- open_clip ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{}, {"resize_mode": "squash"}, {"interpolation": "bilinear"}, {"size": 24}, {"size": [32, 32]}]
)
def test_pictures_are_prepared_as_open_clip_prepares_them(of_open_clip, config):
    _, name = of_open_clip(**config)
    _, transform = open_clip.create_model_from_pretrained(name.partition(":")[2], device="cpu")
    expected = torch.stack([transform(Image.open(io.BytesIO(raw))) for raw in PICTURES])
    # The same pixels; only (x / 255 - mean) / deviation may round otherwise.
    torch.testing.assert_close(prepared_by(open_pretrained(name)), expected, rtol=0, atol=1e-6)


def test_features_of_an_open_clip_model_are_its_image_embeddings(of_open_clip):
    model, name = of_open_clip()
    encoder = open_pretrained(name)
    pixels = images_in(PICTURES, encoder.side, [""] * len(PICTURES), encoder.fitting)
    with torch.no_grad():
        expected = model.encode_image(encoder.prepare(pixels))
    torch.testing.assert_close(encoder.on("cpu")(pixels), expected)
    assert encoder.side == 32
    assert encoder.parameters == sum(one.numel() for one in model.visual.parameters())
    assert len(encoder.fingerprint) == 64


# --- prepared -----------------------------------------------------------------------------------------------


def test_a_prepared_encoder_takes_pixels_as_they_are(prepared):
    prepared("encoders-cifar-resnet")
    encoder = open_pretrained("cifar_resnet20")
    plain = open_image_encoder("cifar_resnet20")
    pixels = images_in(PICTURES, 32, [""] * len(PICTURES))
    with torch.no_grad():
        torch.testing.assert_close(encoder.on("cpu")(pixels), plain(pixels))
    assert encoder.side == 32
    head = sum(one.numel() for one in plain.head.parameters())
    assert encoder.parameters == sum(one.numel() for one in plain.parameters()) - head
    assert open_pretrained("cifar_resnet20") is encoder  # kept open
    assert open_pretrained("cifar_resnet32").fingerprint != encoder.fingerprint


def test_a_missing_or_changed_file_of_a_prepared_encoder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    with pytest.raises(ManifestError, match="encoders-cifar-resnet is not on this machine"):
        open_pretrained("cifar_resnet20")
    (tmp_path / "encoders-cifar-resnet").mkdir()
    with pytest.raises(ManifestError, match="encoders-cifar-resnet"):
        open_pretrained("cifar_resnet20")


# --- what cannot be opened ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet50", "", "vit:x", "TIMM:test_vit", "../timm:x", "a" * 300])
def test_an_unknown_encoder_lists_those_there_are(name):
    with pytest.raises(
        DataError, match="no image encoder .*there are: mobilenet_v1_025, .*hog, .*timm:NAME"
    ) as caught:
        open_pretrained(name)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "name",
    [
        "timm:test_vit.r160_in1k",  # known to timm, and not in its cache
        "timm:no_such_model",
        "timm:",
        "timm",
        "timm:local-dir:/absent/folder",
        "open_clip:ViT-B-32/openai",
        "open_clip:no_such_model/openai",
        "open_clip:local-dir:/absent/folder",
    ],
)
def test_weights_that_are_not_here_say_how_to_get_them(name, caplog):
    with pytest.raises(ManifestError) as caught:
        open_pretrained(name)
    said = str(caught.value)
    assert said.startswith(f"cannot open the image encoder {name!r}: ")
    assert said.endswith("Download it once while online, or give local-dir:FOLDER after timm: or open_clip:")
    assert "\n" not in said
    assert ".. " not in said
    assert len(said) < 600


@pytest.mark.parametrize("name", ["open_clip:ViT-B-32", "open_clip:", "open_clip"])
def test_an_open_clip_model_is_named_with_its_weights(name):
    with pytest.raises(DataError, match=r"name the weights too, as in open_clip:ViT-B-32/openai"):
        open_pretrained(name)


class Payload:
    """What a poisoned file would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("library", ["timm", "open_clip"])
@pytest.mark.parametrize("damage", ["poisoned", "cut", "other", "no config"])
def test_a_folder_with_damaged_or_poisoned_weights_is_refused(
    library, damage, of_timm, of_open_clip, tmp_path
):
    _, name = of_timm() if library == "timm" else of_open_clip()
    folder = tmp_path / {"timm": "timm", "open_clip": "clip"}[library]
    (weights,) = folder.glob("*.safetensors")
    if damage == "poisoned":
        weights.unlink()
        other = {"timm": "pytorch_model.bin", "open_clip": "open_clip_pytorch_model.bin"}[library]
        torch.save({"x": Payload(tmp_path / "ran")}, folder / other)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "other":
        save_file({"x": torch.zeros(1)}, weights)
    else:
        next(folder.glob("*.json")).unlink()
    with pytest.raises(ManifestError, match="cannot open the image encoder .*local-dir") as caught:
        open_pretrained(name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("library", "config", "message"),
    [
        ("timm", {"crop_mode": "border"}, "prepares pictures with 'border' and 'bilinear'; supported"),
        ("timm", {"interpolation": "random"}, "prepares pictures with 'center' and 'random'"),
        ("timm", {"input_size": (3, 160, 128)}, r"takes pictures of \(160, 128\) pixels; only squares"),
        ("open_clip", {"resize_mode": "longest"}, "prepares pictures with 'longest' and 'bicubic'"),
    ],
)
def test_preprocessing_that_is_not_supported_is_refused_rather_than_replaced(
    library, config, message, of_timm, of_open_clip
):
    _, name = of_timm("test_resnet", **config) if library == "timm" else of_open_clip(**config)
    with pytest.raises(DataError, match=message):
        open_pretrained(name)


def test_weights_of_another_encoder_are_refused(prepared, monkeypatch):
    prepared("encoders-cifar-resnet")
    monkeypatch.setattr(
        "workbench.image_encoders.read_tensors", lambda path: {"conv1.weight": torch.zeros(1)}
    )
    with pytest.raises(RunError, match="tensor .*expected shape"):
        open_pretrained("cifar_resnet20")

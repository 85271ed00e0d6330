"""The image encoders are the published ones: weights, pixels, padding, and a place to act."""

import io
import os
import re
import zipfile
from functools import cache

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from torch import nn

from workbench import image_encoders
from workbench.encoder_checks import check_of, measure_accuracy
from workbench.errors import DataError, ManifestError, RunError
from workbench.image_encoders import (
    Convolution,
    ImageEncoder,
    dequantise,
    fill,
    image_encoder_names,
    open_image_encoder,
    read_tensors,
    same_padding,
)
from workbench.manifests import locate, read_manifest

opened = cache(open_image_encoder)  # for tests that only look
ONE_OF_EACH = ["mobilenet_v1_025", "mobilenet_v2_100", "squeezenet_10", "squeezenet_11", "cifar_resnet20"]


def source(name):
    """Family, file, trunk builder and sizes of an encoder."""
    return image_encoders._ENCODERS[name]


def unfilled(name, seed=0):
    """An encoder with random weights: needs no files."""
    torch.manual_seed(seed)
    family, _, build, *sizes = source(name)
    encoder = ImageEncoder(family, build(), *sizes).eval().requires_grad_(False)
    for module in encoder.trunk.modules():
        if isinstance(module, nn.Conv2d):  # torch's own start values die out in deep networks
            nn.init.kaiming_normal_(module.weight)
    return encoder


def noise(images, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator)


def pictures(rows, side=None):
    """The encoded images of a table as one batch of RGB bytes."""
    images = [Image.open(io.BytesIO(raw)).convert("RGB") for raw in rows["image"]]
    images = [image.resize((side, side), Image.Resampling.BICUBIC) if side else image for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


@torch.inference_mode()
def in_blocks(compute, pixels):
    return torch.cat([compute(block) for block in pixels.split(50)])


class Affine(nn.Module):
    """A scale and shift for all channels alike."""

    def __init__(self, scale, shift):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(shift))

    def forward(self, maps):
        return maps * self.scale + self.shift


# Padding


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "zeros"),
    [
        # ceil(side / stride) windows span (windows - 1) * stride + kernel positions; zeros fill the rest.
        (4, 3, 2, (0, 1)),  # 2 windows span 5: 1 missing, at the end
        (5, 3, 2, (1, 1)),  # 3 windows span 7: 2 missing
        (224, 3, 2, (0, 1)),  # 112 windows span 225
        (7, 3, 1, (1, 1)),  # 7 windows span 9
        (1, 3, 2, (1, 1)),  # 1 window spans 3
        (6, 7, 2, (2, 3)),  # 3 windows span 11: 5 missing
        (6, 1, 2, (0, 0)),  # 3 windows span 5: one position is never read
    ],
)
def test_same_padding_is_tensorflows(side, kernel, stride, zeros):
    assert same_padding(side, kernel, stride) == zeros


def test_a_strided_convolution_starts_at_the_first_pixel():
    layer = Convolution(1, 1, 3, 2, nn.Identity())
    layer.weight.data.fill_(1)
    layer.bias.data.fill_(0.5)
    # 0..15 in rows of four; windows at rows and columns 0-2 and 2-4, where 4 is padding:
    # 0+1+2+4+5+6+8+9+10 = 45, 2+3+6+7+10+11 = 39, 8+9+10+12+13+14 = 66, 10+11+14+15 = 50; plus the bias.
    out = layer(torch.arange(16.0).view(1, 1, 4, 4))
    assert out.flatten().tolist() == [45.5, 39.5, 66.5, 50.5]


# Weights from files


def test_eight_bit_weights_are_dequantised():
    stored = np.array([[0, 3], [7, 255]], dtype=np.uint8)
    one = dequantise(stored, np.array([0.5], np.float32), np.array([3], np.int32))
    assert one.tolist() == [[-1.5, 0.0], [2.0, 126.0]]  # (0-3)/2: below the zero point nothing wraps around
    rows = dequantise(stored, np.array([0.5, 2.0], np.float32), np.array([1, 5], np.int32))
    assert rows.tolist() == [[-0.5, 1.0], [4.0, 500.0]]  # (0-1)/2, (3-1)/2; (7-5)*2, (255-5)*2
    kernel = dequantise(
        np.ones((2, 1, 3, 3), np.int8), np.array([1.0, 2.0], np.float32), np.zeros(2, np.int32)
    )
    assert kernel[:, 0, 2, 1].tolist() == [1.0, 2.0]  # one scale per output channel


def test_tensors_are_read_under_their_names(tmp_path):
    parts = {
        "q": np.array([[[[9]]]], np.uint8),
        "scale": np.array([0.25], np.float32),
        "zp": np.array([1], np.int32),
    }
    arrays = {f"stem.weight.{part}": array for part, array in parts.items()}
    np.savez(tmp_path / "a.npz", **arrays, **{"stem.bias": np.array([2], np.float16)})
    tensors = read_tensors(tmp_path / "a.npz")
    assert {key: tensor.item() for key, tensor in tensors.items()} == {"stem.weight": 2.0, "stem.bias": 2.0}
    torch.save({"state_dict": {"module.conv1.weight": torch.ones(2)}, "best_prec1": 1.0}, tmp_path / "b.th")
    assert read_tensors(tmp_path / "b.th").keys() == {"conv1.weight"}


class _Trap:
    """Unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _damaged(kind, path):
    if kind == "a trap in npz":
        np.savez(path, weight=np.array([_Trap(path.with_name("sprung"))], dtype=object))
    elif kind == "a trap in th":
        torch.save({"state_dict": {"weight": _Trap(path.with_name("sprung"))}}, path)
    elif kind == "no state_dict":
        torch.save([1, 2], path)
    elif kind == "no scale":
        np.savez(path, **{"stem.weight.q": np.zeros((1, 3, 3, 3), np.uint8)})
    elif kind == "scales that do not fit":
        scale, zero = np.ones(3, np.float32), np.zeros(3, np.int32)
        np.savez(path, **{"a.q": np.zeros((2, 1), np.uint8), "a.scale": scale, "a.zp": zero})
    elif kind == "not a zip":
        path.write_bytes(b"\x93NUMPY\x01\x00 this is no array")
    elif kind == "changed inside":
        np.savez_compressed(path, weight=np.arange(1000.0))
        start = zipfile.ZipFile(path).infolist()[0].header_offset + 60
        raw = bytearray(path.read_bytes())
        raw[start : start + 200] = bytes(200)
        path.write_bytes(raw)
    elif kind == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("a trap in npz", "npz"),
        ("a trap in th", "th"),
        ("no state_dict", "th"),
        ("no scale", "npz"),
        ("scales that do not fit", "npz"),
        ("not a zip", "npz"),
        ("changed inside", "npz"),
        ("empty", "npz"),
        ("empty", "th"),
        ("missing", "npz"),
    ],
)
def test_a_file_that_holds_no_weights_is_one_clear_error(tmp_path, kind, suffix):
    path = tmp_path / f"weights.{suffix}"
    _damaged(kind, path)
    with pytest.raises(RunError, match=re.escape(str(path))):
        read_tensors(path)
    assert not (tmp_path / "sprung").exists()


def tensors_of(encoder, classifier):
    """What a file of this encoder would hold."""
    state = {key: tensor.clone() for key, tensor in encoder.state_dict().items() if "num_batches" not in key}
    return {re.sub("^head", classifier, key).removeprefix("trunk."): tensor for key, tensor in state.items()}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_tensor_of_a_file_finds_its_place(name, tmp_path):
    family, first, second = source(name)[0], unfilled(name, 1), unfilled(name, 2)
    pixels = noise(2, 32)
    assert not torch.equal(first(pixels), second(pixels))
    fill(second, tensors_of(first, family.classifier), family.classifier, tmp_path)
    assert torch.equal(first(pixels), second(pixels))
    assert torch.equal(first.classify(pixels), second.classify(pixels))


def test_tensors_that_do_not_fit_are_named_with_file_and_shape(tmp_path):
    encoder, path = unfilled("mobilenet_v1_025"), tmp_path / "weights.npz"
    right = tensors_of(encoder, "head")

    def complaint(**changed):
        tensors = {key: tensor for key, tensor in (right | changed).items() if tensor is not None}
        with pytest.raises(RunError) as caught:
            fill(encoder, tensors, "head", path)
        return str(caught.value)

    assert complaint(**{"blocks.3.dw.bias": torch.zeros(5)}) == (
        f"{path}: tensor blocks.3.dw.bias has shape (5,); expected shape (32,)"
    )
    assert complaint(**{"head.weight": None}) == (
        f"{path}: tensor head.weight is missing; expected shape (1001, 256)"
    )
    assert "blocks.13.dw.bias belongs to no layer" in complaint(**{"blocks.13.dw.bias": torch.zeros(5)})
    assert "stem.bias of shape (8,) holds NaN" in complaint(**{"stem.bias": torch.full((8,), torch.nan)})


def test_opening_checks_file_and_tensors(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(image_encoders, "verified_folder", lambda name: asked.append(name) or tmp_path)
    with pytest.raises(RunError, match="squeezenet1_1_fp16.npz"):
        open_image_encoder("squeezenet_11")
    arrays = {
        key: tensor.numpy() for key, tensor in tensors_of(unfilled("squeezenet_10"), "classifier.1").items()
    }
    np.savez(tmp_path / "squeezenet1_1_fp16.npz", **arrays)
    with pytest.raises(RunError, match=r"npz: tensor features.0.weight has shape \(96, 3, 7, 7\); expected"):
        open_image_encoder("squeezenet_11")
    assert asked == ["encoders-squeezenet"] * 2


# Names and data sets


def test_there_are_fourteen_and_their_manifests_describe_their_files():
    assert len({source(name)[1] for name in image_encoder_names()}) == 14
    for name in image_encoder_names():
        family, file, *_ = source(name)
        assert file in read_manifest(family.data_set).files


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(DataError, match="'resnet50'; there are: mobilenet_v1_025, .*cifar_resnet56"):
        open_image_encoder("resnet50")


def test_a_missing_data_set_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    with pytest.raises(ManifestError, match=f"encoders-squeezenet is not on this machine.*{tmp_path}"):
        open_image_encoder("squeezenet_11")


def test_a_changed_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    (tmp_path / "encoders-squeezenet").mkdir()
    for file in read_manifest("encoders-squeezenet").files:
        (tmp_path / "encoders-squeezenet" / file).write_bytes(b"something else")
    with pytest.raises(ManifestError, match="does not match its manifest"):
        open_image_encoder("squeezenet_11")


# Pixels


def test_each_family_gets_the_pixels_it_was_trained_on():
    pixels = torch.tensor([255, 128, 0], dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 32, 32)
    expected = {
        "mobilenet_v1_025": [127 / 128, 0.0, -1.0],
        "squeezenet_11": [0 - 104.0, 128 - 117.0, 255 - 123.0],  # blue first
        # ImageNet's: (1 - 0.485) / 0.229, (128/255 - 0.456) / 0.224, (0 - 0.406) / 0.225
        "cifar_resnet20": [2.248908, 0.205182, -1.804444],
    }
    for name, values in expected.items():
        encoder = unfilled(name)
        encoder.trunk = nn.Identity()
        for given in (pixels, pixels.float(), pixels.double()):
            assert encoder(given)[0].tolist() == pytest.approx(values, abs=2e-6)  # single precision


@pytest.mark.parametrize(
    ("pixels", "complaint"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "int64; give uint8 or floating point"),
        (torch.zeros(2, 32, 32, 3), r"\(2, 32, 32, 3\); give \(images, 3, side, side\)"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 48), r"\(2, 3, 32, 48\)"),
        (torch.zeros(2, 3, 31, 31), "side at least 32"),
        (torch.tensor(1.0), r"\(\)"),
    ],
)
def test_pixels_that_are_no_images_are_refused(pixels, complaint):
    with pytest.raises(DataError, match=complaint):
        unfilled("mobilenet_v1_025").maps(pixels)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_any_side_from_32_gives_features_of_one_width(name):
    encoder = unfilled(name)
    for side in (32, 33, 47, 96):
        features = encoder(noise(2, side))
        assert features.shape == (2, encoder.width)
        assert torch.equal(features, encoder(noise(2, side).float()))
    assert encoder.classify(noise(2, 32)).shape == (2, encoder.classes)


@pytest.mark.parametrize(
    ("name", "sides"),
    # Halved five times, upwards: 47, 24, 12, 6, 3, 2. SqueezeNet: floor((47-3)/2)+1 = 23, then three times
    # ceil((x-3)/2)+1: 11, 5, 2; with the 7x7 layer floor((47-7)/2)+1 = 21, 10, 5, 2. CIFAR: 47, 24, 12.
    [
        ("mobilenet_v1_025", 2),
        ("mobilenet_v2_100", 2),
        ("squeezenet_11", 2),
        ("squeezenet_10", 2),
        ("cifar_resnet20", 12),
    ],
)
def test_maps_have_the_sides_of_the_published_strides(name, sides):
    encoder = unfilled(name)
    maps = encoder.maps(noise(1, 47))
    assert maps.shape == (1, encoder.width, sides, sides)
    assert torch.equal(maps.mean((2, 3)), encoder(noise(1, 47)))


def test_an_encoder_without_classifier_says_so():
    encoder = unfilled("mobilenet_v1_100")
    assert encoder.classes == 0
    with pytest.raises(DataError, match="without a classifier"):
        encoder.classify(noise(1, 32))


def test_shortcuts_have_no_parameters():
    block = image_encoders._Residual(16, 32).eval()
    nn.init.zeros_(block.bn2.weight)
    maps = torch.rand(1, 16, 4, 4)
    out = block(maps)  # what remains is the shortcut: every second position, 8 zero channels on both sides
    assert torch.equal(out[:, 8:24], maps[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


# The place of a generated scale and shift


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_places_are_the_outputs_of_all_convolutions_of_the_trunk(name):
    encoder, seen = unfilled(name), {}
    for path in encoder.affine_places():
        encoder.get_submodule(path).register_forward_hook(
            lambda module, given, out, path=path: seen.update({path: out.shape[1]})
        )
    encoder(noise(1, 32))
    assert seen == encoder.affine_places()
    assert len(seen) == sum(isinstance(module, nn.Conv2d) for module in encoder.trunk.modules())


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if "cifar" not in name])
def test_scale_one_and_shift_zero_change_nothing_and_others_do(name):
    encoder, pixels = unfilled(name), noise(2, 48)
    before = encoder(pixels)

    def place(scale, shift, paths):
        for path in paths:
            encoder.set_submodule(path, Affine(scale, shift))
        return encoder(pixels)

    paths = list(encoder.affine_places())
    assert torch.equal(place(1.0, 0.0, paths), before)
    for path in (paths[0], paths[len(paths) // 2], paths[-1]):
        assert not torch.allclose(place(2.0, 0.0, [path]), before)
        assert torch.equal(place(1.0, 0.0, [path]), before)


def test_the_place_lies_between_bias_and_activation():
    layer = Convolution(1, 1, 1, 1, nn.functional.relu6)
    layer.weight.data.fill_(1)
    layer.bias.data.fill_(2)
    layer.affine = Affine(3.0, -5.0)
    # (x + 2) * 3 - 5, then cut to 0..6: -2 -> 0, 4 -> 4, 10 -> 6
    assert layer(torch.tensor([-1.0, 1.0, 3.0]).view(1, 1, 1, 3)).flatten().tolist() == [0.0, 4.0, 6.0]


def test_a_gradient_reaches_the_place_in_a_frozen_encoder():
    encoder = unfilled("mobilenet_v1_025")
    encoder.set_submodule("trunk.blocks.4.pw.affine", Affine(1.0, 0.0))
    encoder(noise(1, 32)).sum().backward()
    assert {path for path, weight in encoder.named_parameters() if weight.grad is not None} == {
        "trunk.blocks.4.pw.affine.scale",
        "trunk.blocks.4.pw.affine.shift",
    }


# The real files


@pytest.mark.parametrize("name", image_encoder_names())
def test_an_opened_encoder_is_frozen_and_computes_row_by_row(name, prepared):
    prepared(source(name)[0].data_set)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    encoder = open_image_encoder(name)
    assert torch.equal(torch.get_rng_state(), state)  # opening draws no random numbers
    assert not any(module.training for module in encoder.modules())
    assert not any(weight.requires_grad for weight in encoder.parameters())
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    pixels = noise(2, 32)
    with torch.inference_mode():
        both, logits = encoder(pixels), encoder.classify(pixels) if encoder.classes else None
        # Blocks of another length are summed in another order: single precision.
        torch.testing.assert_close(
            torch.cat([encoder(pixels[:1]), encoder(pixels[1:])]), both, rtol=1e-4, atol=1e-4
        )
        assert torch.isfinite(encoder(noise(1, 256))).all()
    assert both.shape == (2, encoder.width)
    assert logits is None or logits.shape == (2, encoder.classes)
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())


def checked(classes):
    """The encoders whose manifest holds an accuracy over these classes."""
    found = {name: check_of(name) for name in image_encoder_names()}
    return [name for name, check in found.items() if check and check.classes == classes]


@pytest.mark.parametrize("name", checked("cifar10"))
def test_cifar_encoders_classify_photographs(name, prepared):
    """Fifty of each class, 0.69 to 0.71 with blue first; all 10,000 give 0.810, 0.826, 0.827, 0.832."""
    for data_set in ("cifar10-jpeg", "encoders-cifar-resnet"):
        prepared(data_set)
    check = check_of(name)
    top1, _ = measure_accuracy(check, opened(name).classify)
    assert top1 == pytest.approx(check.value, abs=0.0041)  # two pictures at the border


@pytest.mark.parametrize("name", checked("imagenet"))
def test_imagenet_encoders_classify_photographs(name, prepared):
    """Top 5 of 200 classes, chance 0.025; with blue first 0.35 to 0.58, with pixels of 0 to 1 at chance."""
    for data_set in ("tiny-imagenet", "encoders-mobilenet-int8", source(name)[0].data_set):
        prepared(data_set)
    check, classify = check_of(name), opened(name).classify
    right, _ = measure_accuracy(check, classify)
    swapped, _ = measure_accuracy(check, lambda pixels: classify(pixels.flip(1)))
    assert right == pytest.approx(check.value, abs=0.031)  # three pictures at the border
    assert swapped < check.value - 0.1


@pytest.mark.parametrize(
    ("name", "labels", "words", "pattern", "share"),
    [
        ("mobilenet_v2_insects", "inat_insect_labels.txt", "monarch, ", "(Monarch)", 0.58),
        ("mobilenet_v2_birds", "inat_bird_labels.txt", "goose", "Goose", 0.52),
    ],
)
def test_species_encoders_find_the_species(name, labels, words, pattern, share, prepared):
    """Fifty monarchs, and geese as one of eleven species; chance 0.00 and 0.01, blue first 0.20 and 0.08."""
    for data_set in ("tiny-imagenet", "encoders-mobilenet-int8"):
        prepared(data_set)
    rows = pl.read_parquet(locate("tiny-imagenet") / "val.parquet")
    pixels = pictures(rows.filter(pl.col("synset_words").str.starts_with(words)), 128)
    text = (locate("encoders-mobilenet-int8") / labels).read_text().splitlines()
    wanted = torch.tensor([pattern in line for line in text])
    found = wanted[in_blocks(opened(name).classify, pixels).argmax(1)].double().mean().item()
    assert found == pytest.approx(share, abs=0.041)


def test_the_encoder_without_classifier_sees_what_another_sees(prepared):
    """Linear centred kernel alignment with width 0.75: 0.882; blue first 0.852, padding by torch 0.809."""
    for data_set in ("tiny-imagenet", "encoders-mobilenet-int8"):
        prepared(data_set)
    pixels = pictures(pl.read_parquet(locate("tiny-imagenet") / "val.parquet")[::100], 128)
    first, second = (in_blocks(opened(f"mobilenet_v1_{width}"), pixels) for width in ("100", "075"))
    first, second = first - first.mean(0), second - second.mean(0)
    alignment = (first.T @ second).norm() ** 2 / ((first.T @ first).norm() * (second.T @ second).norm())
    assert alignment.item() == pytest.approx(0.882, abs=0.01)

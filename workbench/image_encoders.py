"""Fourteen small real image encoders, read from weight files that others published.

MobileNet V1 and V2 (8-bit files, BatchNorm folded into the convolutions), SqueezeNet (16-bit files, made
without BatchNorm) and the CIFAR ResNets (float files, with BatchNorm). After each of their convolutions there
is a place where a channel scale and shift can act, see :meth:`ImageEncoder.affine_places`.

Shape letters: N images, S side in pixels, D feature width, C channels, H and W sides of a map, K classes.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor, nn
from torch.nn import functional

from workbench.errors import DataError, RunError
from workbench.manifests import verified_folder

# MobileNet V1 at width 1: channels after each block, and which blocks halve the side.
_V1_CHANNELS, _V1_HALVING = (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024), (1, 3, 5, 11)
# MobileNet V2: channels, number of blocks, stride of the first of them.
_V2_BLOCKS = [(16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)]

_Map = Callable[[Tensor], Tensor]
Pixels = Float[Tensor, "N 3 S S"] | UInt8[Tensor, "N 3 S S"]


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return how many zeros TensorFlow's SAME padding puts before and after a side of a map.

    The result has ceil(side / stride) positions. If the zeros are odd in number, the surplus one comes last:
    at stride 2, kernel 3 and an even side that is (0, 1), where torch's ``padding=1`` would be (1, 1).
    """
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


class Convolution(nn.Conv2d):
    """A convolution with a bias, the place ``affine``, and an activation.

    ``affine`` is the identity. Whatever changes channels (scale and shift, generated or learned) is set there
    or hooked to its output; it acts after the bias and before the activation, as an unfolded BatchNorm would.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, act: _Map, **more: int) -> None:
        """Set up the layer; TensorFlow's SAME padding unless ``padding`` gives the zeros on each side."""
        super().__init__(inputs, outputs, kernel, stride, **more)
        self.same = kernel > 1 and "padding" not in more
        self.affine = nn.Identity()
        self.act = act

    def forward(self, maps: Float[Tensor, "N C_in H_in W_in"]) -> Float[Tensor, "N C_out H_out W_out"]:
        """Convolve, pass the place, activate."""
        if self.same:
            high, wide = (same_padding(side, self.kernel_size[0], self.stride[0]) for side in maps.shape[-2:])
            maps = functional.pad(maps, (*wide, *high))
        return self.act(self.affine(super().forward(maps)))


def _depthwise(channels: int, stride: int) -> Convolution:
    """Convolve each channel by itself."""
    return Convolution(channels, channels, 3, stride, functional.relu6, groups=channels)


def _pointwise(inputs: int, outputs: int, act: _Map = functional.relu6) -> Convolution:
    """Mix the channels of each position."""
    return Convolution(inputs, outputs, 1, 1, act)


def _named(**layers: nn.Module) -> nn.Sequential:
    """Chain layers under the names that their file gives them."""
    return nn.Sequential(OrderedDict(layers))


def _mobilenet_v1(multiplier: float) -> nn.Sequential:
    """Build MobileNet V1, its channels multiplied (Howard et al. 2017, arXiv:1704.04861, Table 1)."""
    blocks, inputs = [], int(32 * multiplier)
    stem = Convolution(3, inputs, 3, 2, functional.relu6)
    for number, channels in enumerate(_V1_CHANNELS):
        outputs, stride = int(channels * multiplier), 2 if number in _V1_HALVING else 1
        blocks.append(_named(dw=_depthwise(inputs, stride), pw=_pointwise(inputs, outputs)))
        inputs = outputs
    return _named(stem=stem, blocks=nn.Sequential(*blocks))


class _Inverted(nn.Sequential):
    """MobileNet V2's block: expand, depthwise, project without activation; added to its input if it fits."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        inner = inputs * expansion
        layers = {"expand": _pointwise(inputs, inner)} if expansion > 1 else {}
        layers |= {"dw": _depthwise(inner, stride), "project": _pointwise(inner, outputs, nn.Identity())}
        super().__init__(OrderedDict(layers))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, maps: Tensor) -> Tensor:
        out = super().forward(maps)
        return maps + out if self.adds else out


def _mobilenet_v2() -> nn.Sequential:
    """Build MobileNet V2 (Sandler et al. 2018, arXiv:1801.04381, Table 2)."""
    blocks, inputs = [], 32
    for outputs, repeats, first in _V2_BLOCKS:
        for stride in (first, *[1] * (repeats - 1)):
            blocks.append(_Inverted(inputs, outputs, 6 if blocks else 1, stride))
            inputs = outputs
    stem = Convolution(3, 32, 3, 2, functional.relu6)
    return _named(stem=stem, blocks=nn.Sequential(*blocks), last=_pointwise(inputs, 1280))


class _Fire(nn.Module):
    """SqueezeNet's block: squeeze the channels, then expand them by 1x1 and by 3x3 convolutions."""

    def __init__(self, inputs: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = _pointwise(inputs, squeezed, functional.relu)
        self.expand1x1 = _pointwise(squeezed, 4 * squeezed, functional.relu)
        self.expand3x3 = Convolution(squeezed, 4 * squeezed, 3, 1, functional.relu)

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.squeeze(maps)
        return torch.cat([self.expand1x1(maps), self.expand3x3(maps)], 1)


def _squeezenet(inputs: int, kernel: int, fires: tuple[int, ...]) -> nn.Sequential:
    """Build SqueezeNet, numbered as torchvision does (Iandola et al. 2016, arXiv:1602.07360, Table 1)."""
    layers = [Convolution(3, inputs, kernel, 2, nn.Identity(), padding=0), nn.ReLU()]
    for squeezed in (0, *fires):
        layers.append(_Fire(inputs, squeezed) if squeezed else nn.MaxPool2d(3, 2, ceil_mode=True))
        inputs = 8 * squeezed or inputs
    return _named(features=nn.Sequential(*layers))


class _Residual(nn.Module):
    """The CIFAR ResNets' block; its shortcut has no parameters (option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.surplus = outputs // inputs, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(maps)))))
        # Every second position is kept; new channels are zeros, half of them before the old ones.
        kept = maps[:, :, :: self.stride, :: self.stride]
        return functional.relu(out + functional.pad(kept, (0, 0, 0, 0, self.surplus, self.surplus)))


def _cifar_resnet(blocks: int) -> nn.Sequential:
    """Build a ResNet of 6 ``blocks`` + 2 layers (He et al. 2016, arXiv:1512.03385, section 4.2)."""
    layers = {"conv1": nn.Conv2d(3, 16, 3, 1, 1, bias=False), "bn1": nn.BatchNorm2d(16), "relu": nn.ReLU()}
    for number, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
        stage = (_Residual(outputs if block else inputs, outputs) for block in range(blocks))
        layers[f"layer{number}"] = nn.Sequential(*stage)
    return _named(**layers)


@dataclass(frozen=True)
class _Family:
    """What encoders of one data set share; pixels become (pixel - centre) / spread, in the order read."""

    data_set: str
    classifier: str  # its name in the files
    head: Callable[[int, int], nn.Module]
    centre: tuple[float, ...]
    spread: tuple[float, ...]
    blue_first: bool = False


_MOBILENET = _Family("encoders-mobilenet-int8", "head", nn.Linear, (128.0,), (128.0,))
_POSITIONS, _BGR = partial(nn.Conv2d, kernel_size=1), (104.0, 117.0, 123.0)
_SQUEEZENET = _Family("encoders-squeezenet", "classifier.1", _POSITIONS, _BGR, (1.0,), blue_first=True)
_RGB = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's mean and deviation, times 255
_CIFAR = _Family("encoders-cifar-resnet", "linear", nn.Linear, *_RGB)


class ImageEncoder(nn.Module):
    """A convolutional network: images in, one feature vector each out, its own preprocessing inside.

    Attributes:
        width: feature width D.
        size: the side in pixels it was trained at; others from 32 up can be used (tested to 256).
        classes: number K of its classifier's classes, 0 if it has none. Of 1001, the first is background, the
            others are ImageNet's 1000 in their usual order (sorted by WordNet id).
    """

    def __init__(self, family: _Family, trunk: nn.Module, width: int, size: int, classes: int) -> None:
        """Put trunk and classifier together; :func:`open_image_encoder` does this and fills them."""
        super().__init__()
        self.width, self.size, self.classes, self.blue_first = width, size, classes, family.blue_first
        self.trunk = trunk
        self.head = family.head(width, classes) if classes else None
        self.register_buffer("centre", torch.tensor(family.centre).view(-1, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(family.spread).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Pixels) -> Float[Tensor, "N D"]:
        """Turn RGB images, 0 to 255, into features: the mean of the last maps, not unit norm."""
        return self.maps(pixels).mean((2, 3))

    def classify(self, pixels: Pixels) -> Float[Tensor, "N K"]:
        """Turn images into the logits of the published classifier.

        Raises:
            DataError: this encoder was published without one.
        """
        if self.head is None:
            raise DataError("this encoder was published without a classifier; use its features or another")
        maps = self.maps(pixels)
        if isinstance(self.head, nn.Linear):
            return self.head(maps.mean((2, 3)))
        # SqueezeNet classifies each position before it averages; its dropout, for training, is left out.
        return functional.relu(self.head(maps)).mean((2, 3))

    def maps(self, pixels: Tensor) -> Float[Tensor, "N D H W"]:
        """Return the last maps before pooling.

        Raises:
            DataError: pixels are neither bytes nor floats, or not of shape (N, 3, S, S) with S from 32 up.
        """
        if pixels.dtype != torch.uint8 and not pixels.dtype.is_floating_point:
            raise DataError(f"pixels are {pixels.dtype}; give uint8 or floating point, both from 0 to 255")
        shape = tuple(pixels.shape)
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or shape[2] < 32:
            raise DataError(f"pixels have shape {shape}; give (images, 3, side, side), side at least 32, RGB")
        ordered = pixels.flip(1) if self.blue_first else pixels
        return self.trunk((ordered.to(self.centre.dtype) - self.centre) / self.spread)

    def affine_places(self) -> dict[str, int]:
        """Return where a channel scale and shift can act: submodule path -> number of channels.

        These are the ``affine`` of every :class:`Convolution`, and the BatchNorms of the CIFAR ResNets; it is
        the output of these submodules that is to be changed. The classifier has none.
        """
        named = list(self.named_modules())
        places = {f"{path}.affine": part.out_channels for path, part in named if type(part) is Convolution}
        return places | {path: part.num_features for path, part in named if type(part) is nn.BatchNorm2d}


_V1_FEATURES = "mobilenet_v1_1.0_224_quant_embedding_extractor.npz"
_V2_INAT = "mobilenet_v2_1.0_224_inat_{}_quant.npz"
_V1 = {number: partial(_mobilenet_v1, number) for number in (0.25, 0.5, 0.75, 1.0)}
_FIRE_10 = partial(_squeezenet, 96, 7, (16, 16, 32, 0, 32, 48, 48, 64, 0, 64))  # 0: a max pool
_FIRE_11 = partial(_squeezenet, 64, 3, (16, 16, 0, 32, 32, 0, 48, 48, 64, 64))
# Name -> family, file, what builds the trunk, feature width, side in pixels, classes.
_ENCODERS = {
    "mobilenet_v1_025": (_MOBILENET, "mobilenet_v1_0.25_128_quant.npz", _V1[0.25], 256, 128, 1001),
    "mobilenet_v1_050": (_MOBILENET, "mobilenet_v1_0.5_160_quant.npz", _V1[0.5], 512, 160, 1001),
    "mobilenet_v1_075": (_MOBILENET, "mobilenet_v1_0.75_192_quant.npz", _V1[0.75], 768, 192, 1001),
    "mobilenet_v1_100": (_MOBILENET, _V1_FEATURES, _V1[1.0], 1024, 224, 0),
    "mobilenet_v2_100": (_MOBILENET, "mobilenet_v2_1.0_224_quant.npz", _mobilenet_v2, 1280, 224, 1001),
    "mobilenet_v2_100_ptq": (_MOBILENET, "tf2_mobilenet_v2_1.0_224_ptq.npz", _mobilenet_v2, 1280, 224, 1001),
    "mobilenet_v2_birds": (_MOBILENET, _V2_INAT.format("bird"), _mobilenet_v2, 1280, 224, 965),
    "mobilenet_v2_insects": (_MOBILENET, _V2_INAT.format("insect"), _mobilenet_v2, 1280, 224, 1022),
    "squeezenet_10": (_SQUEEZENET, "squeezenet1_0_deepcompressed.npz", _FIRE_10, 512, 224, 1000),
    "squeezenet_11": (_SQUEEZENET, "squeezenet1_1_fp16.npz", _FIRE_11, 512, 224, 1000),
    "cifar_resnet20": (_CIFAR, "resnet20-12fca82f.th", partial(_cifar_resnet, 3), 64, 32, 10),
    "cifar_resnet32": (_CIFAR, "resnet32-d509ac18.th", partial(_cifar_resnet, 5), 64, 32, 10),
    "cifar_resnet44": (_CIFAR, "resnet44-014dd654.th", partial(_cifar_resnet, 7), 64, 32, 10),
    "cifar_resnet56": (_CIFAR, "resnet56-4bfd9763.th", partial(_cifar_resnet, 9), 64, 32, 10),
}


def image_encoder_names() -> list[str]:
    """Return the names of all image encoders, whether or not their files are on this machine."""
    return list(_ENCODERS)


def open_image_encoder(name: str) -> ImageEncoder:
    """Open an encoder, frozen and in evaluation mode, on the CPU; its file is verified by its manifest first.

    Raises:
        DataError: no such encoder.
        ManifestError: its data set is not on this machine, or differs from the manifest.
        RunError: its file does not hold the weights of this network.
    """
    if name not in _ENCODERS:
        raise DataError(f"no image encoder named {name[:80]!r}; there are: {', '.join(_ENCODERS)}")
    family, file, build, *sizes = _ENCODERS[name]
    path = verified_folder(family.data_set) / file
    with torch.random.fork_rng(devices=[]):  # layers draw starting values; the caller's numbers stay the same
        encoder = ImageEncoder(family, build(), *sizes)
    fill(encoder, read_tensors(path), family.classifier, path)
    # Channels last: about twice as fast on a CPU.
    return encoder.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def dequantise(
    stored: Num[np.ndarray, "C ..."], scale: Float[np.ndarray, " A"], zero: Num[np.ndarray, " A"]
) -> Float[np.ndarray, "C ..."]:
    """Return (stored - zero) * scale; scale and zero have one entry, or one per output channel."""
    column = (-1, *[1] * (stored.ndim - 1))
    return (stored.astype(np.float32) - zero.reshape(column)) * scale.reshape(column)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a weight file without running anything in it: ``.th``, or ``.npz`` with or without 8-bit.

    Raises:
        RunError: the file is damaged, or holds something else.
    """
    try:
        if path.suffix == ".th":
            saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            return {key.removeprefix("module."): tensor for key, tensor in saved.items()}
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        for key in [key.removesuffix(".q") for key in arrays if key.endswith(".q")]:
            parts = (arrays.pop(f"{key}.{part}") for part in ("q", "scale", "zp"))
            arrays[key] = dequantise(*parts)
        return {key: torch.from_numpy(array) for key, array in arrays.items()}
    except Exception as problem:  # zip, zlib, pickle and numpy each have their own for a damaged file
        reason = " ".join(str(problem).split())[:300]
        raise RunError(f"{path} holds no readable weights ({reason}); prepare its data again") from problem


def fill(encoder: ImageEncoder, tensors: dict[str, Tensor], classifier: str, path: Path) -> None:
    """Put the tensors of a file into an encoder, all of them and each in its place.

    Raises:
        RunError: a tensor is missing, has another shape, holds NaN or infinity, or belongs nowhere.
    """
    rest = dict(tensors)
    for place, own in encoder.state_dict().items():
        part, key = place.split(".", 1)
        if key.endswith("num_batches_tracked"):  # a counter that the files do not have
            continue
        key = f"{classifier}.{key}" if part == "head" else key
        wanted, given = tuple(own.shape), rest.pop(key, None)
        if given is None or tuple(given.shape) != wanted:
            found = "is missing" if given is None else f"has shape {tuple(given.shape)}"
            raise RunError(f"{path}: tensor {key} {found}; expected shape {wanted}")
        if not torch.isfinite(given).all():
            raise RunError(f"{path}: tensor {key} of shape {wanted} holds NaN or infinity")
        own.copy_(given)
    if rest:
        raise RunError(f"{path}: tensor {min(rest)} belongs to no layer of this encoder")

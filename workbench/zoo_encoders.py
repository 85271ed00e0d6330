"""Pretrained image encoders behind one shape: pixels in, features out, with their own preprocessing.

"mobilenet_v1_050" and its like come from prepared weight files and pass an accuracy check first; "timm:NAME"
and "open_clip:NAME/PRETRAINED" come from those libraries' own caches, "timm:local-dir:FOLDER" and
"open_clip:local-dir:FOLDER" from a folder that they saved.

Shape letters: B images, D feature width, S side in pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pickle import UnpicklingError

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from workbench.classical_encoders import IMAGE_NAMES
from workbench.datasets.images import Fitting
from workbench.errors import DataError, ManifestError
from workbench.files import digest
from workbench.image_encoders import image_encoder_names, open_image_encoder

AT_ONCE = 128  # images computed together
Compute = Callable[[UInt8[Tensor, "B 3 S S"]], Float[Tensor, "B D"]]
# What opening a model of somebody else's can raise.
_UNUSABLE = (
    OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError, AssertionError,
    EOFError, UnpicklingError, SafetensorError,
)  # fmt: skip


@dataclass(frozen=True)
class Pretrained:
    """A pretrained image encoder with its own preprocessing.

    Attributes:
        fingerprint: of weights and preprocessing.
        side: of the pictures it takes.
        parameters: their number, without a classifier.
        module: the network.
        prepare: from pixels, 0 to 255, to what the network takes.
        features: runs the network.
        fitting: how a picture becomes a square of that side.
    """

    fingerprint: str
    side: int
    parameters: int
    module: nn.Module
    prepare: Callable[[Tensor], Tensor]
    features: Callable[[nn.Module, Tensor], Tensor]
    fitting: Fitting = Fitting()

    def on(self, device: str) -> Compute:
        """Return the function from pixels to features on a device."""
        module = self.module.to(device).eval()

        @torch.inference_mode()
        def compute(pixels: Tensor) -> Tensor:
            parts = [self.features(module, self.prepare(part.to(device))) for part in pixels.split(AT_ONCE)]
            return torch.cat(parts).float().cpu()

        return compute


@lru_cache(maxsize=1)
def open_pretrained(name: str) -> Pretrained:
    """Open a pretrained image encoder by its name in a recipe.

    Raises:
        DataError: no such encoder, or one whose preprocessing is not supported.
        ManifestError: its weights are not on this machine, or they fail their check.
    """
    kind, _, rest = name.partition(":")
    if name in image_encoder_names():
        return _prepared_encoder(name)
    try:
        if kind == "timm":
            return _timm_encoder(rest)
        if kind == "open_clip":
            return _open_clip_encoder(rest)
    except DataError:
        raise
    except _UNUSABLE as problem:
        reason = " ".join(str(problem).split())[:300].rstrip(". ")
        raise ManifestError(
            f"cannot open the image encoder {name!r}: {reason}. Download it once "
            "while online, or give local-dir:FOLDER after timm: or open_clip:"
        ) from problem
    known = ", ".join([*image_encoder_names(), *IMAGE_NAMES])
    raise DataError(
        f"no image encoder {name[:80]!r}; there are: {known}, timm:NAME, open_clip:NAME/PRETRAINED "
        "(or local-dir:FOLDER after the colon)"
    )


def _prepared_encoder(name: str) -> Pretrained:
    encoder = open_image_encoder(name)
    parameters = sum(
        tensor.numel() for part, tensor in encoder.named_parameters() if not part.startswith("head")
    )
    # Its constants are no part of its state: features of wrongly prepared pictures must not be found again.
    constants = (encoder.blue_first, *encoder.centre.flatten().tolist(), *encoder.spread.flatten().tolist())
    return Pretrained(
        _fingerprint(encoder, f"prepared {constants}"), encoder.size, parameters, encoder,
        lambda pixels: pixels, lambda module, pixels: module(pixels),
    )  # fmt: skip


def _timm_encoder(name: str) -> Pretrained:
    """Open a timm model without its classifier, weights from its hub cache or a local folder."""
    import timm

    module = timm.create_model(name, pretrained=True).requires_grad_(False)
    module.reset_classifier(0)  # only now: asked for no classes, timm lets weights of another network pass
    config = timm.data.resolve_model_data_config(module)
    side = _side(config["input_size"][-2:], name)
    fitting = _fitting(
        name, math.floor(side / config["crop_pct"]), config["crop_mode"], config["interpolation"]
    )
    prepare = partial(_standardised, mean=config["mean"], spread=config["std"])
    parameters = sum(tensor.numel() for tensor in module.parameters())
    return Pretrained(
        _fingerprint(module, str(sorted(config.items()))), side, parameters, module, prepare,
        lambda module, pixels: module(pixels), fitting,
    )  # fmt: skip


def _open_clip_encoder(name: str) -> Pretrained:
    """Open the image side of an open_clip model: "ViT-B-32/openai" or "local-dir:FOLDER"."""
    import open_clip

    local = name.startswith(("local-dir:", "hf-hub:"))
    architecture, _, pretrained = (name, "", None) if local else name.partition("/")
    if pretrained == "":
        raise DataError(f"open_clip:{name}: name the weights too, as in open_clip:ViT-B-32/openai")
    module = open_clip.create_model(architecture, pretrained, require_pretrained=True)
    module.requires_grad_(False)
    config = open_clip.get_model_preprocess_cfg(module)
    side = _side(config["size"], name)
    fitting = _fitting(name, side, config["resize_mode"], config["interpolation"])
    prepare = partial(_standardised, mean=config["mean"], spread=config["std"])
    parameters = sum(tensor.numel() for tensor in module.visual.parameters())
    return Pretrained(
        _fingerprint(module.visual, str(sorted(config.items(), key=str))), side, parameters, module, prepare,
        lambda module, pixels: module.encode_image(pixels), fitting,
    )  # fmt: skip


def _side(size: int | Sequence[int], name: str) -> int:
    """Return the side of the squares an encoder takes.

    Raises:
        DataError: they are no squares.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise DataError(f"{name} takes pictures of {tuple(size)} pixels; only squares are supported")
    return sides.pop()


def _fitting(name: str, shorter: int, mode: str, resampling: str) -> Fitting:
    """Return how an encoder's pictures become squares, in its library's words.

    Raises:
        DataError: in a way that is not supported here.
    """
    if mode not in ("center", "shortest", "squash") or resampling.upper() not in Image.Resampling.__members__:
        raise DataError(
            f"{name} prepares pictures with {mode!r} and {resampling!r}; supported are center, shortest and "
            "squash with Pillow's ways of resampling"
        )
    return Fitting(shorter, mode == "squash", resampling)


def _standardised(pixels: Tensor, mean: Sequence[float], spread: Sequence[float]) -> Tensor:
    """Bring pixels to a pretrained model's range."""
    centre, width = (torch.tensor(part, device=pixels.device).view(-1, 1, 1) for part in (mean, spread))
    return (pixels.float() / 255 - centre) / width


def _fingerprint(module: nn.Module, preparation: str) -> str:
    parts = [preparation]
    for key, tensor in sorted(module.state_dict().items()):
        parts.append(
            digest(f"{key} {tensor.dtype} {tuple(tensor.shape)}", tensor.contiguous().numpy().tobytes())
        )
    return digest(*parts)

"""A zoo of frozen encoders: every image and text encoder's features of one set of captioned images.

Members are named in a recipe. Images: an encoder of :mod:`workbench.image_encoders`, a classical one,
"timm:NAME" or "open_clip:NAME/PRETRAINED" (or local-dir:FOLDER after the colon). Texts: a classical one, or
any name or folder of sentence-transformers. Arrays that were computed elsewhere join as members too.

Shape letters: N images, T captions, B rows of a batch, D feature width, S side in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

import workbench
from workbench.classical_encoders import IMAGE_NAMES, TEXT_NAMES, fit_image_encoder, fit_text_encoder
from workbench.config import Settings
from workbench.datasets.caption_pairs import CaptionPairs, Pictures
from workbench.datasets.images import Fitting
from workbench.encoder_checks import check_encoder
from workbench.encoders import PACKAGED, TextEncoder
from workbench.errors import DataError
from workbench.features import Features, FeatureStore, check_features, check_same_rows
from workbench.files import digest
from workbench.image_encoders import image_encoder_names
from workbench.manifests import cache_folder
from workbench.store import EmbeddingStore
from workbench.zoo_encoders import Compute, open_pretrained

CLASSICAL_SIDE = 48  # pixels that classical encoders look at
LARGEST = 512  # pixels, the side above which no prepared encoder is given pictures


class Control(Settings):
    """An image encoder that is none: what a ranking of encoders must get right.

    ``duplicate`` repeats an encoder (a tie); ``random`` says nothing (the floor); ``leaked`` has read the
    captions (the ceiling); ``noise`` adds so much noise to an encoder (a known order); ``centred`` takes an
    encoder's mean away (the same content, but no batch mean to tell it by).
    """

    kind: Literal["duplicate", "random", "leaked", "noise", "centred"]
    of: str | None = Field(default=None, description="the encoder it is made from, for leaked a text encoder")
    noise: float = Field(default=1.0, gt=0, description="norm of the noise, features having norm 1")

    @property
    def name(self) -> str:
        """Its name in tables."""
        return {"random": "random", "noise": f"{self.of} + noise {self.noise:g}"}.get(
            self.kind, f"{self.of}, {self.kind}"
        )

    def check(self, images: tuple[str, ...], texts: tuple[str, ...]) -> None:
        """Refuse a control of an encoder that is not there.

        Raises:
            DataError: no such encoder; lists those it can be made from.
        """
        known = texts if self.kind == "leaked" else images
        if self.kind != "random" and self.of not in known:
            raise DataError(f"control {self.name!r}: no encoder {self.of!r}; there are: {', '.join(known)}")


class ZooSettings(Settings):
    """Which encoders are connected."""

    images: tuple[str, ...] = Field(default=(), description="names, in the order of scale plots")
    texts: tuple[str, ...] = Field(default=(PACKAGED,), min_length=1)
    controls: tuple[Control, ...] = ()

    @model_validator(mode="after")
    def _encoders_are_named_once(self) -> "ZooSettings":
        for names in ((*self.images, *(control.name for control in self.controls)), self.texts):
            if len(set(names)) < len(names):
                raise ValueError(f"every encoder and control once, got {', '.join(names)}")
        return self


@dataclass(frozen=True)
class Asked:
    """A class set over pictures outside the pairs, by every encoder.

    Attributes:
        name: of the class set.
        images: features by image encoder; a control has none.
        prompts: features by text encoder, all prompts of class 0 first.
        label: the true class of each picture.
        classes: their number.
    """

    name: str
    images: dict[str, Features]
    prompts: dict[str, Features]
    label: Int[Tensor, " N"]
    classes: int


@dataclass(frozen=True)
class Zoo:
    """All features, in one row order.

    Attributes:
        images: by encoder, one row per image.
        texts: by encoder, one row per caption.
        choices: the captions of each image.
        splits: image rows of each split.
        asked: class sets.
        controls: image encoders that are none; connected like all, and left out of means and choices.
    """

    images: dict[str, Features]
    texts: dict[str, Features]
    choices: Int[Tensor, "N K"]
    splits: dict[str, Int[Tensor, " M"]]
    asked: tuple[Asked, ...] = ()
    controls: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Refuse a zoo in which there is nothing to choose."""
        if len(self.texts) * (len(self.images) - len(self.controls)) < 2:
            raise DataError(
                f"one pair only ({', '.join(self.texts)} with {', '.join(self.images)}); a zoo needs two or "
                "more image or text encoders to choose from"
            )

    def pairs(self, controls: bool = False) -> list[tuple[str, str]]:
        """Return (text encoder, image encoder) of every pair, those with controls only if asked for."""
        names = [name for name in self.images if controls or name not in self.controls]
        return [(text, image) for text in self.texts for image in names]


def open_zoo(
    settings: ZooSettings,
    pairs: CaptionPairs,
    store: EmbeddingStore | None = None,
    device: str = "cpu",
    largest: int = LARGEST,
) -> Zoo:
    """Extract, or find again, the features of every encoder.

    Args:
        settings: which encoders.
        pairs: captioned images.
        store: keeps the sentence vectors of the encoder it was opened for.
        device: where pretrained encoders compute.
        largest: side in pixels above which the prepared encoders are not given pictures.

    Raises:
        DataError: an unknown encoder, or features that cannot be used.
        ManifestError: weights that are not on this machine, or an encoder that fails its accuracy check.
    """
    for control in settings.controls:
        control.check(settings.images, settings.texts)
    kept = FeatureStore(cache_folder())
    learned = _learned(pairs)
    texts = {name: _text_reader(name, learned, store, device) for name in settings.texts}
    captions = {name: _read_texts(kept, name, texts[name], pairs.texts) for name in settings.texts}
    images, asked_images = {}, [{} for _ in pairs.asked]
    for name in settings.images:
        reader = _image_reader(name, pairs, device, largest)
        images[name] = _read_images(kept, name, reader, pairs.pictures)
        for place, asked in enumerate(pairs.asked):
            asked_images[place][name] = _read_images(kept, name, reader, asked.pictures)
        open_pretrained.cache_clear()  # one encoder in memory at a time
    for control in settings.controls:
        images[control.name] = _control(control, images, captions, pairs)
    asked = tuple(
        Asked(
            one.classes.name,
            found,
            {name: _read_texts(kept, name, texts[name], one.classes.prompts()) for name in settings.texts},
            one.classes.label,
            len(one.classes.classes),
        )
        for one, found in zip(pairs.asked, asked_images, strict=True)
    )
    check_same_rows(list(images.values()))
    controls = frozenset(control.name for control in settings.controls)
    return Zoo(images, captions, pairs.choices, pairs.splits, asked, controls)


def read_pair(
    pairs: CaptionPairs, text: str, image: str, device: str = "cpu", largest: int = LARGEST
) -> tuple[Features, Features]:
    """Extract, or find again, the features of one text encoder and one image encoder.

    Args:
        pairs: captioned images.
        text: name of the text encoder; it reads every caption.
        image: name of the image encoder.
        device: where pretrained encoders compute.
        largest: side in pixels above which a prepared encoder is not given pictures.

    Raises:
        DataError: an unknown encoder, or features that cannot be used.
        ManifestError: weights that are not on this machine, or an encoder that fails its accuracy check.
    """
    kept = FeatureStore(cache_folder())
    words = _read_texts(kept, text, _text_reader(text, _learned(pairs), None, device), pairs.texts)
    return words, _read_images(kept, image, _image_reader(image, pairs, device, largest), pairs.pictures)


def _learned(pairs: CaptionPairs) -> list[str]:
    """Return the captions that classical text encoders are fitted on: those of training images, each once."""
    return sorted({pairs.texts[row] for row in pairs.choices[pairs.splits["train"]].flatten().tolist()})


@dataclass(frozen=True)
class _Reader:
    """How an encoder is run: what its features depend on, and the function, made once and when first needed.

    Attributes:
        fingerprint: of weights, preprocessing and size.
        side: of the pictures it is given; 0 for text encoders.
        start: makes the function from pixels or texts to features.
        parameters: of the encoder, 0 for classical ones.
        fitting: how its pictures become squares.
    """

    fingerprint: str
    side: int
    start: Callable[[], Callable]
    parameters: int = 0
    fitting: Fitting = Fitting()

    @cached_property
    def run(self) -> Callable:
        """From pixels or texts to features."""
        return self.start()


def _read_images(kept: FeatureStore, name: str, reader: _Reader, pictures: Pictures) -> Features:
    order = digest(pictures.order, str(reader.side))
    found = kept.get(
        name, reader.fingerprint, order, len(pictures),
        lambda rows: reader.run(pictures.pixels(rows, reader.side, reader.fitting)), reader.parameters,
    )  # fmt: skip
    return Features(name, found.array, pictures.order, found.folder, reader.parameters)


def _read_texts(kept: FeatureStore, name: str, reader: _Reader, texts: list[str]) -> Features:
    return kept.get(
        name, reader.fingerprint, digest(*texts), len(texts), lambda rows: reader.run(texts[rows]),
        reader.parameters,
    )  # fmt: skip


def _text_reader(name: str, learned: list[str], store: EmbeddingStore | None, device: str) -> _Reader:
    if name in TEXT_NAMES:
        key = digest(name, workbench.__version__, *learned)
        return _Reader(key, 0, partial(fit_text_encoder, name, learned))
    if store is None or store.encoder.name != name:
        store = EmbeddingStore(TextEncoder(name, device), cache_folder())
    parameters = sum(tensor.numel() for tensor in store.encoder.model.parameters())
    return _Reader(store.encoder.fingerprint, 0, lambda: store.embed, parameters)


def _image_reader(name: str, pairs: CaptionPairs, device: str, largest: int) -> _Reader:
    """Say how an image encoder is run; a classical one is fitted on the training images."""
    if name in IMAGE_NAMES:
        rows = pairs.splits["train"]

        def fit() -> Compute:
            whole = pairs.pictures.pixels(slice(None), CLASSICAL_SIDE)
            return fit_image_encoder(name, whole[rows])

        key = digest(name, workbench.__version__, pairs.pictures.order, rows.numpy().tobytes())
        return _Reader(key, CLASSICAL_SIDE, fit)
    encoder = open_pretrained(name)
    # The prepared ones, all convolutional, take any side; others are given what they were made for.
    prepared = name in image_encoder_names()
    side = min(encoder.side, largest) if prepared else encoder.side

    def start() -> Compute:
        if prepared:  # only now: features that are kept were computed by an encoder that passed
            check_encoder(name)
        return encoder.on(device)

    return _Reader(encoder.fingerprint, side, start, encoder.parameters, encoder.fitting)


def _control(
    control: Control, images: dict[str, Features], captions: dict[str, Features], pairs: CaptionPairs
) -> Features:
    """Make a control from the features that are there."""
    rows, rng = pairs.choices.shape[0], torch.Generator().manual_seed(0)
    everything = torch.arange(rows)
    order = next(iter(images.values())).order
    if control.kind == "duplicate":
        return Features(control.name, images[control.of].array, order, None, 0)
    if control.kind == "random":
        made = torch.randn(rows, 128, generator=rng)
    elif control.kind == "leaked":
        read = captions[control.of]
        means = torch.stack([read.unit(column) for column in pairs.choices.T]).mean(0)
        made = means @ torch.linalg.qr(torch.randn(read.width, read.width, generator=rng))[0]
    else:
        made = images[control.of].unit(everything)
        if control.kind == "noise":
            made += control.noise * torch.randn(made.shape, generator=rng) / made.shape[1] ** 0.5
        else:  # centred
            made -= made[pairs.splits["train"]].mean(0)
    array = made.numpy().astype(np.float16)
    check_features(array, control.name)
    return Features(control.name, array, order, None, 0)

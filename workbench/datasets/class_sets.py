"""What image-text models learn from and are asked: captioned images, and class sets over images.

Shape letters: N images, S side in pixels, T texts, K captions of an image.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from workbench.conditions import normalise_text
from workbench.errors import DataError

MOST_CLASSES = 5000
# Words around a class name, averaged into one direction per class ("prompt ensemble").
PLAIN_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")


class RowReader(ABC):
    """Images that are too many to hold and are read when their rows are asked for."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images N."""

    @abstractmethod
    def __getitem__(self, rows: Int[Tensor, " B"] | slice) -> UInt8[Tensor, "B 3 S S"]:
        """Read some rows."""

    @abstractmethod
    def to(self, device: str) -> "RowReader":
        """Give images to a device from now on."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of what the images are, without reading them all."""


@dataclass(frozen=True)
class Captioned:
    """Images with captions, to train on.

    Attributes:
        pixels: RGB, 0 to 255; held, or read row by row.
        texts: the captions, each once.
        choices: the captions of each image as rows of ``texts``; column k is of kind ``kinds[k]``.
        kinds: what a column's captions speak of. A batch asks for one kind, so that its captions are one
            class set; a single kind if captions are free text.
        meaning: captions of one meaning are true of the same images, so they are no negatives of each other.
    """

    pixels: UInt8[Tensor, "N 3 S S"] | RowReader
    texts: Sequence[str]
    choices: Int[Tensor, "N K"]
    kinds: Int[Tensor, " K"]
    meaning: Int[Tensor, " T"]

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.pixels)

    def fingerprint(self) -> list[str | bytes]:
        """What the images and captions are, to be hashed."""
        if isinstance(self.pixels, RowReader):
            return [self.pixels.fingerprint()]  # captions lie beside the images
        return [self.pixels.numpy().tobytes(), *self.texts]

    def to(self, device: str) -> "Captioned":
        """Move everything to a device."""
        tensors = (self.pixels, self.choices, self.kinds, self.meaning)
        pixels, choices, kinds, meaning = (tensor.to(device) for tensor in tensors)
        return Captioned(pixels, self.texts, choices, kinds, meaning)


@dataclass(frozen=True)
class ClassSet:
    """A question: which of these classes is in the image.

    Attributes:
        name: for tables.
        classes: class names, or full prompts if ``templates`` is ("{}",).
        templates: words around a class name.
        rows: which images are asked, as rows of the split's pixels.
        label: the true class of each asked image.
        family: for tables, for example "held out".
        distractors: texts that a conditioned model is told of too, though none is an answer.
        side: a side report, left out of the means over class sets.
    """

    name: str
    classes: list[str]
    templates: tuple[str, ...]
    rows: Int[Tensor, " N"]
    label: Int[Tensor, " N"]
    family: str = ""
    distractors: tuple[str, ...] = ()
    side: bool = False

    def prompts(self) -> list[str]:
        """Return all templates of class 0, then of class 1, and so on."""
        return [template.format(name) for name in self.classes for template in self.templates]


@dataclass(frozen=True)
class Questions:
    """A split's images and the class sets they are asked about.

    Attributes:
        pixels: RGB, 0 to 255.
        about: one row per image: groups and the like.
        sets: the class sets.
        fair: columns of ``about`` by which accuracy is broken down.
    """

    pixels: UInt8[Tensor, "N 3 S S"]
    about: pl.DataFrame
    sets: tuple[ClassSet, ...]
    fair: tuple[str, ...] = field(default=())

    def named(self, name: str) -> ClassSet:
        """Return the class set of that name.

        Raises:
            KeyError: no such set; the message lists those there are.
        """
        found = next((one for one in self.sets if one.name == name), None)
        if found is None:
            raise KeyError(f"no class set {name!r}; there are: {', '.join(one.name for one in self.sets)}")
        return found


def check_classes(names: list[str]) -> list[str]:
    """Return clean class names.

    Raises:
        DataError: fewer than two classes, more than 5,000, an empty name, or one name twice; or one text.
    """
    if isinstance(names, str):  # its letters would be the classes
        raise DataError(f"class names must be a list, got the text {names[:80]!r}; split it into names")
    clean = [normalise_text(name, f"class {place}") for place, name in enumerate(names)]
    if len(clean) < 2:
        raise DataError(
            f"a classifier needs at least two classes, got {clean}; add a class, or 'something else'"
        )
    if len(clean) > MOST_CLASSES:
        raise DataError(
            f"{len(clean):,} classes; at most {MOST_CLASSES:,} can be told apart at once: split the set"
        )
    twice = sorted({name for name in clean if clean.count(name) > 1}) if len(set(clean)) < len(clean) else []
    if twice:
        raise DataError(f"class named twice: {', '.join(twice[:5])}; give every class once")
    return clean


def meanings(keys: list[str]) -> Int[Tensor, " T"]:
    """Number equal keys alike, in the order of first appearance."""
    place = {key: row for row, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([place[key] for key in keys], dtype=torch.long)

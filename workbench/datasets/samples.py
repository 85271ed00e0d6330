"""Pictures to try a classifier on: scenes drawn for the typed classes, prepared photo sets, one's own files.

Scenes know everything about themselves, so for class names that speak of their attributes the truth is known.
Uploaded pictures are decoded in memory and never written.

Shape letters: N pictures, S side in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from workbench.datasets.images import ImageData, decode, read_images
from workbench.datasets.scenes import ATTRIBUTES, BACKGROUNDS, SYNONYMS, Scene, draw_scene, phrase
from workbench.errors import DataError
from workbench.manifests import locate

SCENES, OWN = "scenes drawn by rule", "your own pictures"
PREPARED = {
    "pacs-96": "PACS: photos, paintings, cartoons, sketches",
    "cifar10-jpeg": "CIFAR-10, a lossy copy",
}
COUNT = 240  # pictures of a sample
MOST_FILES, MOST_BYTES = 24, 5_000_000  # of an upload; bytes of all files together
_FILLERS = {"a", "an", "the", "of", "in", "with", "thing", "things", "shape", "shapes", "picture", "and"}
_WORDS = {
    word: (attribute, value)
    for attribute, values in ATTRIBUTES.items()
    for value in values
    for word in (value, SYNONYMS[value])
}


@dataclass(frozen=True)
class Sample:
    """Pictures, and what they show as far as that is known.

    Attributes:
        pixels: RGB, 0 to 255.
        truth: the true class of each picture as its place among the names, or None: unknown, or none of them.
        about: what each picture is, in words.
        own: whether the pictures are ours or the user's, so that a saved page may hold them.
        left_out: pictures that show none of the classes and were left out.
    """

    pixels: UInt8[Tensor, "N 3 S S"]
    truth: list[int | None]
    about: list[str]
    own: bool
    left_out: int = 0

    @property
    def labelled(self) -> bool:
        """Whether the truth is known."""
        return bool(self.truth) and all(one is not None for one in self.truth)


def sources() -> dict[str, str]:
    """Return the samples there are on this machine, name by label."""
    return {SCENES: SCENES, **{label: name for name, label in PREPARED.items() if locate(name)}, OWN: OWN}


def attribute_values(name: str) -> dict[str, str] | None:
    """Read a class name as values of scene attributes: "two red stars" is a count, a colour and a shape.

    Returns:
        Value by attribute; None if a word of the name speaks of anything else, or of one attribute twice.
    """
    words, found, place = name.casefold().split(), {}, 0
    while place < len(words):
        for length in (3, 2, 1):
            text = " ".join(words[place : place + length])
            known = next((_WORDS[one] for one in _singular(text) if one in _WORDS), None)
            if known and len(words[place : place + length]) == length:
                break
        else:
            if words[place] not in _FILLERS:
                return None
            place += 1
            continue
        if found.setdefault(known[0], known[1]) != known[1]:
            return None
        place += length
    return found or None


def _singular(text: str) -> tuple[str, ...]:
    return text, text.removesuffix("s"), text.removesuffix("es")


def values_of(names: Sequence[str]) -> list[dict[str, str]] | None:
    """Read all class names as values of the same attributes, no two alike; None if they are not."""
    found = [attribute_values(name) for name in names]
    if None in found or len({frozenset(one) for one in found}) != 1:
        return None
    return found if len({tuple(sorted(one.items())) for one in found}) == len(found) else None


def scene_sample(names: Sequence[str], size: int, count: int = COUNT, seed: int = 0) -> Sample:
    """Draw scenes for class names: each class equally often if the names speak of attributes, else any.

    Everything that the names do not speak of is drawn at random; no scene is rendered in the shifted way.

    Args:
        names: of the classes.
        size: side S in pixels.
        count: N.
        seed: of the drawing; the same names, size and seed give the same pictures.
    """
    rng, wanted = np.random.default_rng(seed), values_of(names)
    pixels, truth, about = [], [], []
    for row in range(count):
        place = int(rng.integers(len(names))) if row >= len(names) else row
        values = {key: str(rng.choice(words)) for key, words in ATTRIBUTES.items()}
        values |= wanted[place] if wanted else {}
        background = str(rng.choice(list(BACKGROUNDS), p=list(BACKGROUNDS.values())))
        pixels.append(draw_scene(Scene(values, background, False), size, rng))
        truth.append(place if wanted else None)
        about.append(phrase(values))
    return Sample(torch.from_numpy(np.stack(pixels)), truth, about, own=True)


def prepared_sample(name: str, names: Sequence[str], size: int, count: int = COUNT) -> Sample:
    """Take pictures of a prepared set; of the typed classes only, if they are among its labels.

    Args:
        name: of the set.
        names: of the classes.
        size: side S in pixels.
        count: N at most.

    Raises:
        ManifestError: the set is not on this machine, or damaged.
    """
    table = read_images(ImageData(source="manifest", name=name, size=size, limit=4 * count))
    labels = [_plain(one) for one in table.about["label"]]
    places = {_plain(one): place for place, one in enumerate(names)}
    known = [row for row, label in enumerate(labels) if label in places]
    order = np.random.default_rng(0).permutation(known or len(labels))[:count]
    truth = [places.get(labels[row]) for row in order]
    left_out = len(labels) - len(known) if known else 0
    return Sample(
        table.pixels[order.tolist()], truth, [labels[row] for row in order], own=False, left_out=left_out
    )


def _plain(text: str) -> str:
    words = text.casefold().replace("_", " ").split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def uploaded_sample(files: Mapping[str, bytes], size: int) -> Sample:
    """Decode pictures that a person uploads, in memory.

    Args:
        files: contents by name.
        size: side S in pixels.

    Raises:
        DataError: none, too many or too large, or a file that cannot be read; it is named.
    """
    if not files:
        raise DataError(
            f"no picture yet; choose up to {MOST_FILES} PNG or JPEG files, {MOST_BYTES / 1e6:.0f} MB together"
        )
    if len(files) > MOST_FILES:
        raise DataError(f"{len(files)} files; at most {MOST_FILES} are read at once, choose fewer")
    total = sum(map(len, files.values()))
    if total > MOST_BYTES:
        raise DataError(
            f"{total / 1e6:.1f} MB; at most {MOST_BYTES / 1e6:.0f} MB are read at once, choose fewer"
        )
    names = [" ".join(name.split())[:60] or "a file" for name in files]
    for name, raw in zip(names, files.values(), strict=True):
        if not raw.startswith((b"\x89PNG", b"\xff\xd8")):
            raise DataError(f"{name}: not a PNG or JPEG picture; save it as one of them")
    pixels = np.stack([decode(raw, size, name) for name, raw in zip(names, files.values(), strict=True)])
    return Sample(torch.from_numpy(pixels), [None] * len(names), names, own=True)

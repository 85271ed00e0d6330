"""Real pictures with captions, and class sets of five kinds of pictures that were not trained on.

Trained on: Tiny-ImageNet pictures of three quarters of its classes, captioned by their class names, and
Flickr8k pictures with what people wrote about them. Asked: the classes held out, a lossy copy of CIFAR-10's
test set, PACS in its four domains, and emoji in two drawing styles. Settings are chosen on the split "valid",
new pictures of the trained classes.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import polars as pl
import torch
from pydantic import Field, model_validator

from workbench.config import Settings
from workbench.datasets.class_sets import PLAIN_TEMPLATES, Captioned, ClassSet, Questions, meanings
from workbench.datasets.images import ImageData, ImageTable, encoded_images, group_column, read_images

CAPTIONS = (
    "a photo of a {}.",
    "a close-up photo of a {}.",
    "a small photo of the {}.",
    "a picture of one {}.",
    "there is a {}.",
)
MOST_GROUPS = 20  # values of a column of own pictures that is broken down by
HELD_OUT = 50  # of Tiny-ImageNet's 200 classes
DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
EMOJI_TEMPLATES = ("an emoji of {}.", "a drawing of {}.", "an icon showing {}.")
# Pictures, fair column -> column, sets on their rows.
Part = tuple[ImageTable, dict[str, str], list[ClassSet]]
_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


class PhotoData(Settings):
    """How many pictures, and of what size."""

    source: Literal["photos", "files"]
    name: str = "photos"
    path: str | None = Field(
        default=None, exclude=True, description="files: own pictures to ask, with groups"
    )
    size: int = Field(default=64, ge=32, le=256, description="side in pixels")
    tiny: int | None = Field(default=None, ge=100, description="rows of Tiny-ImageNet; null for all")
    flickr: int | None = Field(default=None, ge=0, description="rows of Flickr8k; 0 for none, null for all")
    asked: int = Field(default=2000, ge=200, description="largest number of pictures of a class set")
    seed: int = Field(default=0, ge=0, description="of the choice of held-out classes")

    @model_validator(mode="after")
    def _files_have_a_path(self) -> "PhotoData":
        if (self.source == "files") != (self.path is not None):
            raise ValueError("path goes with source: files, and with no other")
        return self


def load_photos(data: PhotoData) -> tuple[Captioned, dict[str, Questions]]:
    """Read the pictures of a recipe.

    Returns:
        Captioned pictures to train on, and the questions of "valid" and "test".

    Raises:
        ManifestError: a prepared set is missing or damaged.
    """
    table = partial(_table, data.size)
    tiny = table("tiny-imagenet", "train", data.tiny)
    names, held_out, trained = _classes(tiny, data.seed)
    flickr = table("flickr8k-128", "train", data.flickr) if data.flickr != 0 else None
    train = _captioned(tiny.take(_rows(tiny, trained)), flickr)
    fresh = table("tiny-imagenet", "valid", None)
    if data.path is not None:
        own = read_images(
            ImageData(source="files", name=data.name, path=data.path, size=data.size, limit=data.asked)
        )
        trained_classes = _of_tiny(fresh, trained, "tiny-imagenet, trained classes", data.asked)
        return train, {"valid": _questions([trained_classes]), "test": _questions([_of_own(own, data.name)])}
    return train, {
        "valid": _questions([_of_tiny(fresh, trained, "tiny-imagenet, trained classes", data.asked)]),
        "test": _questions(
            [
                _of_tiny(fresh, held_out, "tiny-imagenet, held-out classes", data.asked),
                *_with_distractors(fresh, held_out, names),
                _of_labels(table("cifar10-jpeg", "test", data.asked), "cifar10", {}),
                *_with_groups(table, data.asked),
            ]
        ),
    }


def load_grouped(data: PhotoData) -> Questions:
    """Read those pictures of the test split that have groups, in a small part of the time that all take.

    Raises:
        ManifestError: a prepared set is missing or damaged.
    """
    return _questions(_with_groups(partial(_table, data.size), data.asked))


def asked_classes(data: PhotoData) -> dict[str, tuple[list[str], tuple[str, ...]]]:
    """Return the class names and templates of the test split's class sets, by name; no picture is decoded.

    Class sets that only differ in what a model is told of besides are left out, and pictures of one's own.

    Raises:
        ManifestError: a prepared set is missing or damaged.
    """

    def table(name: str, split: str | None, limit: int | None) -> ImageTable:
        told = encoded_images(ImageData(source="manifest", name=name, limit=limit), split).drop("image")
        return ImageTable(torch.empty(told.height, 3, 0, 0, dtype=torch.uint8), told)

    held_out = _classes(table("tiny-imagenet", "train", data.tiny), data.seed)[1]
    fresh = table("tiny-imagenet", "valid", None)
    parts = [
        _of_tiny(fresh, held_out, "tiny-imagenet, held-out classes", data.asked),
        _of_labels(table("cifar10-jpeg", "test", data.asked), "cifar10", {}),
        *_with_groups(table, data.asked),
    ]
    return {one.name: (one.classes, one.templates) for _, _, sets in parts for one in sets}


def _table(size: int, name: str, split: str | None, limit: int | None) -> ImageTable:
    return read_images(ImageData(source="manifest", name=name, size=size, limit=limit), split)


def _classes(tiny: ImageTable, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Return all classes of Tiny-ImageNet, those held out, and those trained on."""
    names = sorted(set(tiny.about["label"]))
    drawn = np.random.default_rng(seed).permutation(len(names))
    held_out = sorted(names[place] for place in drawn[: max(len(names) * HELD_OUT // 200, 2)])
    return names, held_out, [name for name in names if name not in held_out]


def _with_groups(table: Callable[[str, str | None, int | None], ImageTable], asked: int) -> list[Part]:
    """Ask the pictures that have groups: PACS by domain, emoji by style, skin tone and gender."""
    pacs = _of_labels(table("pacs-96", None, asked), "pacs", {"domain": "domain"})
    return [pacs, *_of_emoji(table("emoji-cldr-96", None, None))]


def _rows(table: ImageTable, labels: list[str]) -> torch.Tensor:
    return torch.from_numpy(table.about["label"].is_in(labels).to_numpy().copy())


def _captioned(tiny: ImageTable, flickr: ImageTable | None) -> Captioned:
    """Caption pictures by their class name in five wordings, or by the five captions people wrote."""
    written, keys = [], []
    for label in tiny.about["label"]:
        written.append([caption.format(label) for caption in CAPTIONS])
        keys.append([f"class {label}"] * len(CAPTIONS))
    pixels = [tiny.pixels]
    if flickr is not None:
        pixels.append(flickr.pixels)
        for row, captions in enumerate(flickr.about["captions"].to_list()):
            written.append((captions * len(CAPTIONS))[: len(CAPTIONS)])
            keys.append([f"picture {row}"] * len(CAPTIONS))
    texts: dict[str, int] = {}
    meaning = []
    rows = []
    for captions, own in zip(written, keys, strict=True):
        for caption, key in zip(captions, own, strict=True):
            if caption not in texts:
                texts[caption] = len(texts)
                meaning.append(key)
        rows.append([texts[caption] for caption in captions])
    kinds = torch.zeros(len(CAPTIONS), dtype=torch.long)
    # Files are sorted by class, and models are centred and calibrated on the first pictures.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    choices = torch.tensor(rows)[order]
    return Captioned(torch.cat(pixels)[order], list(texts), choices, kinds, meanings(meaning))


def _class_set(table: ImageTable, name: str, column: str = "label", **more: object) -> ClassSet:
    """Ask all pictures of a table for the classes of a column."""
    classes = sorted(set(table.about[column]))
    place = {one: row for row, one in enumerate(classes)}
    label = torch.tensor([place[one] for one in table.about[column]])
    spelled = [one.replace("_", " ") for one in classes]
    return ClassSet(name, spelled, PLAIN_TEMPLATES, torch.arange(len(table)), label, **more)


def _of_tiny(fresh: ImageTable, labels: list[str], name: str, most: int) -> Part:
    """Ask new Tiny-ImageNet pictures for some of its classes."""
    part = fresh.take(_rows(fresh, labels))
    part = part.take(torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:most])
    return part, {}, [_class_set(part, name)]


def _with_distractors(fresh: ImageTable, held_out: list[str], names: list[str]) -> list[Part]:
    """Ask for ten held-out classes, and again when the model was told of all 200 classes."""
    few = held_out[:10]
    part = fresh.take(_rows(fresh, few))
    others = tuple(PLAIN_TEMPLATES[0].format(name) for name in names if name not in few)
    sets = [
        _class_set(part, "ten classes", family="distractors", side=True),
        _class_set(part, "ten classes, told of all", family="distractors", side=True, distractors=others),
    ]
    return [(part, {}, sets)]


def _of_labels(table: ImageTable, name: str, fair: dict[str, str]) -> Part:
    """Ask pictures for their label."""
    return table, fair, [_class_set(table, name)]


def _of_own(table: ImageTable, name: str) -> Part:
    """Ask the user's pictures for their label; every other column of up to twenty values is a group."""
    columns = [one for one in table.about.columns if one not in ("label", "file", "split")]
    groups = {one: group_column(table.about, one) for one in columns}
    fair = [one for one, values in groups.items() if 1 < values.drop_nulls().n_unique() <= MOST_GROUPS]
    about = table.about.with_columns(groups[one].alias(one) for one in fair)
    return ImageTable(table.pixels, about), {one: one for one in fair}, [_class_set(table, name)]


def _of_emoji(table: ImageTable) -> list[Part]:
    """Ask emoji for what they show: things in both styles, and people in every skin tone.

    One class set of all people would ask for the skin tone too; here a class is the emoji without it.
    """
    about = table.about
    styles = about.filter(skin_tone="none", gender="none").group_by("emoji").agg(pl.col("vendor").n_unique())
    both = set(styles.filter(pl.col("vendor") > 1)["emoji"])
    things = sorted(both)[:: max(len(both) // 100, 1)][:100]
    found = []
    part = table.take(torch.tensor([one in things for one in about["emoji"]]))
    found.append((part, {"style": "vendor"}, [_emoji_set(part, "emoji of things", "emoji")]))
    toned = about["skin_tone"].is_in(_TONES) & (about["vendor"] == "noto") & (about["base"] != "")
    people = table.take(torch.from_numpy(toned.to_numpy().copy()))
    bases = sorted(set(people.about["base"]))[:60]
    people = people.take(torch.tensor([one in bases for one in people.about["base"]]))
    people_set = _emoji_set(people, "emoji of people", "base")
    found.append((people, {"skin_tone": "skin_tone", "gender": "gender"}, [people_set]))
    return found


def _emoji_set(part: ImageTable, name: str, column: str) -> ClassSet:
    """Name each emoji by its shortest name without the skin tone, which is written after a colon."""
    classes = sorted(set(part.about[column]))
    place = {one: row for row, one in enumerate(classes)}
    label = torch.tensor([place[one] for one in part.about[column]])
    names = []
    for one in classes:
        own = part.about.filter(pl.col(column) == one)["name"]
        names.append(min(map(_without_tone, own), key=len))
    twice = {text for text in names if names.count(text) > 1}
    names = [f"{text} {one}" if text in twice else text for text, one in zip(names, classes, strict=True)]
    return ClassSet(name, names, EMOJI_TEMPLATES, torch.arange(len(part)), label)


def _without_tone(name: str) -> str:
    """Leave out the skin tone: "man: dark skin tone, bald" is "man: bald"; "flag: Mali" stays."""
    before, _, after = name.partition(": ")
    rest = ", ".join(part for part in after.split(", ") if "skin tone" not in part)
    return f"{before}: {rest}" if rest else before


def _questions(parts: list[Part]) -> Questions:
    """Lay the pictures of all parts end to end, each with its class sets and its own fair columns."""
    pixels, about, sets, start = [], [], [], 0
    fair = list(dict.fromkeys(column for _, columns, _ in parts for column in columns))
    for table, columns, asked in parts:
        pixels.append(table.pixels)
        own = {new: table.about[old] for new, old in columns.items()}
        blank = pl.Series([None] * len(table), dtype=pl.String)
        missing = {column: blank for column in fair if column not in own}
        about.append(pl.DataFrame({"picture": pl.Series([asked[0].name] * len(table)), **own, **missing}))
        for one in asked:
            moved = {**vars(one), "rows": one.rows + start}
            sets.append(ClassSet(**moved))
        start += len(table)
    frame = pl.concat([part.select("picture", *fair) for part in about])
    return Questions(torch.cat(pixels), frame, tuple(sets), tuple(fair))

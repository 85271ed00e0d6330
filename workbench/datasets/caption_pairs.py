"""Images with captions for whole zoos of encoders: read once, in one row order, with splits and class sets.

Pictures stay encoded until an encoder asks for them at its own size. Rows are images; captions are numbered
once each, and every image points at its captions.

Shape letters: N images, T captions (each once), K captions of an image, S side in pixels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Int, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from workbench.config import Settings
from workbench.datasets.class_sets import PLAIN_TEMPLATES, ClassSet
from workbench.datasets.images import Fitting, ImageData, checked_rows, encoded_images, images_in, inside
from workbench.datasets.scenes import ATTRIBUTES, Scene, class_set, draw_distinct, draw_scene, phrase
from workbench.errors import DataError
from workbench.files import digest, sha256_of

SPLITS = ("train", "valid", "test")
EMOJI_CLASSES = 100
_ASKED_SPLIT = {"tiny-imagenet": "valid", "cifar10-jpeg": "test"}  # the CIFAR encoders saw its training half
_TEMPLATES = ("{}", "a picture of {}", "here we see {}")


class PairData(Settings):
    """Which captioned images a recipe uses.

    ``source``: "scenes" are drawn by rule; "manifest" is a prepared set, "flickr8k-128" or "emoji-cldr-96";
    "table" is a CSV, JSON or Parquet file of one's own with the columns image (a path below its folder) and
    caption or captions, rows of one image being its captions, and perhaps split; "features" is a folder of
    arrays that were computed elsewhere.
    """

    source: Literal["scenes", "manifest", "table", "features"]
    name: str
    path: str | None = Field(default=None, exclude=True, description="not part of a run: its content is")
    size: int = Field(default=128, ge=32, le=512, description="largest side an encoder is given, in pixels")
    train: int = Field(default=3000, ge=100, le=6000, description="scenes to train on; there are 8640")
    test: int = Field(default=500, ge=50, le=6000, description="scenes of the test split, as of the valid")
    limit: int | None = Field(default=None, ge=100, description="rows of a table, drawn with a fixed seed")
    classify: tuple[str, ...] = Field(default=(), description="prepared sets that are asked for their labels")
    asked: int = Field(default=1000, ge=100, description="largest number of pictures of a class set")
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _own_data_have_a_path(self) -> "PairData":
        if (self.source in ("table", "features")) != (self.path is not None):
            raise ValueError(
                "path goes with source: table or features, and with no other (give it as --data)"
            )
        return self


@dataclass(frozen=True)
class Pictures:
    """Images in one row order, decoded when asked for.

    Attributes:
        contents: encoded bytes or files; or squares that are decoded already.
        names: what each is called in messages.
        order: hash of the content in this order.
    """

    contents: Sequence[bytes | Path] | UInt8[Tensor, "N 3 S S"]
    names: Sequence[str]
    order: str

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.contents)

    def pixels(
        self, rows: slice, size: int, fitting: Fitting | None = None
    ) -> UInt8[Tensor, "B 3 size size"]:
        """Return some images as RGB squares of a side, 0 to 255."""
        part = self.contents[rows]
        if not isinstance(part, Tensor):
            return images_in(part, size, self.names[rows], fitting)
        whole = (fitting and fitting.shorter) or size
        if part.shape[-1] != whole:
            part = torch.nn.functional.interpolate(
                part.float(), (whole, whole), mode="bicubic", antialias=True, align_corners=False
            )
            part = part.round().clamp(0, 255).to(torch.uint8)
        start = round((whole - size) / 2)
        return part[..., start : start + size, start : start + size]


@dataclass(frozen=True)
class Asked:
    """Pictures outside the pairs that are asked for one of several classes."""

    pictures: Pictures
    classes: ClassSet


@dataclass(frozen=True)
class CaptionPairs:
    """Captioned images.

    Attributes:
        pictures: all images; None if only features are known.
        texts: the captions, each once.
        choices: the captions of each image as rows of ``texts``.
        splits: rows of each split.
        asked: class sets.
    """

    pictures: Pictures | None
    texts: list[str]
    choices: Int[Tensor, "N K"]
    splits: dict[str, Int[Tensor, " M"]]
    asked: tuple[Asked, ...] = field(default=())

    @property
    def order(self) -> str:
        """Hash of captions and which image has which."""
        return digest(*self.texts, self.choices.numpy().tobytes())


def load_pairs(data: PairData) -> CaptionPairs:
    """Draw or read the captioned images of a recipe.

    Raises:
        DataError: an image has no caption, or a split is empty.
        ManifestError: a prepared set is missing or damaged.
    """
    if data.source == "scenes":
        return _scenes(data)
    if data.source == "manifest":
        table = encoded_images(ImageData(source="manifest", name=data.name, size=data.size))
        asked = tuple(_asked(name, data) for name in data.classify)
        if data.name.startswith("emoji"):
            return CaptionPairs(*_emoji(table), asked=(*_emoji_asked(table), *asked))
        return CaptionPairs(*_captioned(table, data), asked=asked)
    return CaptionPairs(*_captioned(_own_table(Path(data.path)), data))


def _pictures(contents: Sequence[bytes | Path], names: Sequence[str]) -> Pictures:
    hashed = hashlib.sha256()
    for one in contents:
        own = hashlib.sha256(one).hexdigest() if isinstance(one, bytes) else sha256_of(one)
        hashed.update(own.encode())
    return Pictures(contents, names, hashed.hexdigest())


def _numbered(captions: list[list[str]], names: Sequence[str]) -> tuple[list[str], Tensor]:
    """Number captions once each; images with fewer captions than others repeat theirs.

    Raises:
        DataError: an image has no caption.
    """
    clean = [[text.strip() for text in own or () if text and text.strip()] for own in captions]
    empty = [place for place, own in enumerate(clean) if not own]
    if empty:
        raise DataError(
            f"{names[empty[0]]}: no caption; {len(empty)} images have none. Write one or remove the rows"
        )
    most = max(map(len, clean))
    place: dict[str, int] = {}
    rows = [[place.setdefault(text, len(place)) for text in (own * most)[:most]] for own in clean]
    return list(place), torch.tensor(rows)


def _split_rows(split: list[str], name: str) -> dict[str, Tensor]:
    """Return the rows of each split.

    Raises:
        DataError: one of train, valid and test has fewer than ten rows, or there is another split.
    """
    column = np.array(split)
    other = sorted(set(split) - set(SPLITS))
    if other:
        raise DataError(f"{name}: column split holds {other[0]!r}; allowed are {', '.join(SPLITS)}")
    found = {one: torch.from_numpy(np.flatnonzero(column == one)) for one in SPLITS}
    few = {one: len(rows) for one, rows in found.items() if len(rows) < 10}
    if few:
        raise DataError(f"{name}: too few rows in {few}; every split of train, valid, test needs ten or more")
    return found


def _by_hash(keys: Sequence[str]) -> list[str]:
    """Split 80 : 10 : 10 by a hash of each key, so that equal keys stay together."""
    places = [int(digest(key)[:8], 16) % 10 for key in keys]
    return ["test" if place == 0 else "valid" if place == 1 else "train" for place in places]


def _captioned(table: pl.DataFrame, data: PairData) -> tuple[Pictures, list[str], Tensor, dict[str, Tensor]]:
    """Take a table with captions and, if it has them, splits.

    Raises:
        DataError: no captions, an image without one, or too few rows of a split.
    """
    if "captions" not in table.columns:
        raise DataError(f"{data.name}: no column captions; give a captioned set. There are: {table.columns}")
    if "row" not in table.columns:
        table = table.with_row_index("row")
    if data.limit is not None and data.limit < table.height:
        table = table[np.sort(np.random.default_rng(data.seed).permutation(table.height)[: data.limit])]
    names = [f"{data.name}, row {row}" for row in table["row"]]
    texts, choices = _numbered(table["captions"].to_list(), names)
    split = table["split"].to_list() if "split" in table.columns else _by_hash(names)
    return _pictures(table["image"].to_list(), names), texts, choices, _split_rows(split, data.name)


def _own_table(path: Path) -> pl.DataFrame:
    """Read a table of one's own; JSON as LLaVA's lists has image and conversations.

    Raises:
        DataError: no such file, no image or caption column, a picture that is not there or not below the
            table's folder, or an image that is in two splits.
    """
    table = _told(checked_rows(_read(path), str(path), ("image",)), path).with_row_index("row")
    if "split" in table.columns:
        apart = table.filter(pl.col("split").n_unique().over("image") > 1)
        if apart.height:
            raise DataError(f"{path}, row {apart['row'][0]}: this image is in two splits; it belongs to one")
    # A picture that is told in several rows is one image: its captions are no negatives of each other.
    first = [pl.col(name).first() for name in ("row", "split") if name in table.columns]
    table = table.group_by("image", maintain_order=True).agg(*first, pl.col("captions").explode())
    if table.schema["image"] == pl.Binary:
        return table
    folder, files = path.parent.resolve(), []
    for row, name in table.select("row", "image").iter_rows():
        files.append(inside(folder, name, f"{path}, row {row} ({name[:100]!r})"))
        if not files[-1].is_file():
            raise DataError(f"{path}, row {row}: {name} is not there; paths start at the folder of the table")
    return table.with_columns(image=pl.Series(files, dtype=pl.Object))


def _read(path: Path) -> pl.DataFrame:
    """Read a file's rows; in a CSV file all is text, 007 too."""
    readers = {
        ".csv": partial(pl.read_csv, infer_schema=False),
        ".parquet": pl.read_parquet,
        ".json": partial(pl.read_json, infer_schema_length=None),
    }
    if path.suffix.lower() not in readers or not path.is_file():
        raise DataError(f"{path}: give a CSV, JSON or Parquet file with the columns image and captions")
    try:
        return readers[path.suffix.lower()](path)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise DataError(f"{path} cannot be read; is it cut short? ({reason})") from None


def _told(table: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Bring what a table says of its images into one column of lists, captions."""
    column = next((name for name in ("captions", "caption", "conversations") if name in table.columns), None)
    if column is None:
        raise DataError(f"{path}: missing column captions; there are: {table.columns}")
    told = table[column]
    if column == "conversations":
        try:
            told = pl.Series([_answers(turns) for turns in told.to_list()], dtype=pl.List(pl.String))
        except (KeyError, TypeError):
            raise DataError(f"{path}: conversations need turns with the keys from and value") from None
    if told.dtype == pl.String:
        told = table.select(pl.concat_list(column)).to_series()
    if told.dtype != pl.List(pl.String):
        raise DataError(f"{path}: column {column} holds {told.dtype}; give text, or lists of texts")
    return table.select("image", told.alias("captions"), *({"split"} & set(table.columns)))


def _answers(turns: list[dict[str, str]] | None) -> list[str]:
    """Return what the assistant says in a conversation about an image: its captions."""
    return [turn["value"] for turn in turns or () if turn["from"] == "gpt"]


def _scenes(data: PairData) -> CaptionPairs:
    """Draw scenes, no two of a split alike, each told whole in three wordings."""
    rng = np.random.default_rng(data.seed)
    counts = {"train": data.train, "valid": data.test, "test": data.test}
    drawn = {split: draw_distinct(count, rng) for split, count in counts.items()}
    scenes = [scene for part in drawn.values() for scene in part]
    pixels = torch.from_numpy(np.stack([draw_scene(scene, data.size, rng) for scene in scenes]))
    told = [f"{phrase(scene.values)}, on a {scene.background} background" for scene in scenes]
    names = [f"scene {row}" for row in range(len(scenes))]
    texts, choices = _numbered([[one.format(text) for one in _TEMPLATES] for text in told], names)
    pictures = Pictures(pixels, names, digest(pixels.numpy().tobytes()))
    splits = _split_rows([split for split, part in drawn.items() for _ in part], "scenes")
    return CaptionPairs(
        pictures, texts, choices, splits, _scenes_asked(drawn["test"], pixels, splits["test"])
    )


def _scenes_asked(scenes: list[Scene], pixels: Tensor, rows: Tensor) -> tuple[Asked, ...]:
    """Ask the test scenes for each of their attributes."""
    own = pixels[rows]
    pictures = Pictures(own, [f"test scene {row}" for row in range(len(own))], digest(own.numpy().tobytes()))
    return tuple(Asked(pictures, class_set((attribute,), scenes)) for attribute in ATTRIBUTES)


def _emoji(table: pl.DataFrame) -> tuple[Pictures, list[str], Tensor, dict[str, Tensor]]:
    """Take emoji, held out by emoji; the second drawing style is only trained on.

    Its held-out pictures would be second right answers to the same captions.
    """
    split = pl.Series(_by_hash(table["emoji"].to_list()))
    kept = (pl.Series(split) == "train") | (table["vendor"] == "noto")
    table, split = table.filter(kept), split.filter(kept)
    keywords = [f"{name}: {', '.join(words)}" if words else name for name, words in
                zip(table["name"], table["keywords"].to_list(), strict=True)]  # fmt: skip
    names = [f"emoji {file}" for file in table["file"]]
    captions = [list(pair) for pair in zip(table["name"].to_list(), keywords, strict=True)]
    texts, choices = _numbered(captions, names)
    return _pictures(table["image"].to_list(), names), texts, choices, _split_rows(split.to_list(), "emoji")


def _emoji_asked(table: pl.DataFrame) -> tuple[Asked, ...]:
    """Ask held-out emoji in the second drawing style for their name among a hundred."""
    split = pl.Series(_by_hash(table["emoji"].to_list()))
    part = table.filter((split == "test") & (table["vendor"] != "noto")).unique("name", maintain_order=True)
    part = part.head(EMOJI_CLASSES)
    names = [f"emoji {file}" for file in part["file"]]
    count = torch.arange(part.height)
    classes = ClassSet("emoji, other style", part["name"].to_list(), ("{}",), count, count)
    return (Asked(_pictures(part["image"].to_list(), names), classes),)


def _asked(name: str, data: PairData) -> Asked:
    """Ask pictures of a prepared set for their label."""
    held = ImageData(source="manifest", name=name, size=data.size, limit=data.asked)
    table = encoded_images(held, _ASKED_SPLIT.get(name))
    if "label" not in table.columns:
        raise DataError(f"{name}: no column label, so it cannot be asked for classes: {table.columns}")
    labels = sorted(set(table["label"]))
    place = {label: row for row, label in enumerate(labels)}
    label = torch.tensor([place[one] for one in table["label"]])
    spelled = [one.replace("_", " ") for one in labels]
    names = [f"{name}, row {row}" for row in range(table.height)]
    classes = ClassSet(name, spelled, PLAIN_TEMPLATES, torch.arange(table.height), label)
    return Asked(_pictures(table["image"].to_list(), names), classes)

"""Image sets: pictures read from a table, checked, and brought to squares of one size.

A table has one row per picture. Its column image holds encoded bytes or, in a table of the user's own, paths
relative to the table's folder; all other columns (label, captions, domain, country, ...) travel along. Splits
are separate files of a prepared set or a column split; val, validation and dev are called valid.

Shape letters: N images, S side in pixels.
"""

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError
from pydantic import Field, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from workbench.config import Settings
from workbench.datasets.pairs import read_table
from workbench.errors import DataError
from workbench.manifests import read_manifest, verified_folder

MOST_PIXELS = 64_000_000
# Formats that Pillow reads by itself; others, such as EPS, would start another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_SPLITS = {"train": "train", "test": "test", **dict.fromkeys(("valid", "val", "validation", "dev"), "valid")}
_filters = threading.Lock()
_UPRIGHT = dict(enumerate(  # EXIF orientation -> what undoes it
    (Image.Transpose[name] for name in ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE",
                                        "ROTATE_270", "TRANSVERSE", "ROTATE_90")), start=2))  # fmt: skip


class ImageData(Settings):
    """Which images a recipe uses, and at which size.

    ``source`` is "manifest" (a prepared set, by ``name``) or "files" (the user's own table, ``path``: CSV or
    Parquet with the columns image and label, all others being groups).
    """

    source: Literal["manifest", "files"]
    name: str
    path: str | None = Field(default=None, exclude=True, description="not part of a run: its content is")
    size: int = Field(default=64, ge=8, le=512, description="side of the square, in pixels")
    limit: int | None = Field(default=None, gt=0, description="rows of each split, drawn with a fixed seed")

    @model_validator(mode="after")
    def _files_have_a_path(self) -> "ImageData":
        if (self.source == "files") != (self.path is not None):
            raise ValueError("path goes with source: files, and with no other")
        return self


@dataclass(frozen=True)
class ImageTable:
    """Images (RGB, 0 to 255) and, one row per image in the same order, the other columns of their table."""

    pixels: UInt8[Tensor, "N 3 S S"]
    about: pl.DataFrame

    def __len__(self) -> int:
        """Count the images."""
        return len(self.pixels)

    def take(self, rows: Tensor | Sequence[int]) -> "ImageTable":
        """Return some of the images, by row numbers in any order or by a mask of truth values."""
        rows = torch.as_tensor(rows)
        rows = torch.arange(len(self))[rows if rows.dtype == torch.bool else rows.long()]
        return ImageTable(self.pixels[rows], self.about[rows.tolist()])


@dataclass(frozen=True)
class Fitting:
    """How a picture becomes a square; CLIP's way unless said otherwise.

    Attributes:
        shorter: what the shorter side is brought to before the centre is cut out; None for the square's own.
        squash: bring both sides to ``shorter``, so that a picture that is no square changes its shape.
        resampling: name of Pillow's method.
    """

    shorter: int | None = None
    squash: bool = False
    resampling: str = "bicubic"


def read_images(data: ImageData, split: str | None = None) -> ImageTable:
    """Read the images of a set, or of one split of it.

    They keep their order. ``about`` has a column split if the set has splits, and file if it gives paths.

    Raises:
        DataError: table, picture or split cannot be used; names the row (0 is the first below the header).
        ManifestError: a prepared set is missing or damaged.
    """
    tables = _prepared_tables(data.name) if data.path is None else {data.path: _own_table(Path(data.path))}
    names = [f"{source}, row {row}" for source, table in tables.items() for row in range(table.height)]
    table = pl.concat(tables.values(), how="diagonal")
    rows = _chosen(table, split, data)
    table, names = table[rows], [names[row] for row in rows]
    contents = table["image"].to_list()
    if table["image"].dtype == pl.String:
        folder = Path(data.path).parent.resolve()
        names = [f"{name} ({path[:100]!r})" for name, path in zip(names, contents, strict=True)]
        contents = [inside(folder, path, name) for path, name in zip(contents, names, strict=True)]
        table = table if "file" in table.columns else table.with_columns(file="image")
    return ImageTable(images_in(contents, data.size, names), table.drop("image"))


def encoded_images(data: ImageData, split: str | None = None) -> pl.DataFrame:
    """Read the rows of a prepared set, or of one split of it, pictures left as encoded bytes.

    Raises:
        DataError: no such split.
        ManifestError: the set is missing or damaged.
    """
    table = pl.concat(_prepared_tables(data.name).values(), how="diagonal")
    return table[_chosen(table, split, data)]


def images_in(
    contents: Sequence[bytes | Path], size: int, names: Sequence[str], fitting: Fitting | None = None
) -> UInt8[Tensor, "N 3 S S"]:
    """Decode images, encoded or in files, as :func:`decode` does and raises, several at a time."""
    pixels = torch.empty(len(contents), 3, size, size, dtype=torch.uint8)
    filled, short = pixels.numpy(), len(contents) <= 2000

    def fill(row: int) -> None:
        filled[row] = _decoded(_bytes_of(contents[row], names[row]), size, names[row], fitting or Fitting())

    with (
        _warnings_dropped(),
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(pixels), desc="reading images", unit="image", leave=False, disable=short) as bar,
    ):
        for _ in pool.map(fill, range(len(pixels))):
            bar.update()
    return pixels


def decode(raw: bytes, size: int, name: str) -> UInt8[np.ndarray, "3 S S"]:
    """Decode one image, called ``name`` in messages, to an RGB square as CLIP's preprocessing does.

    The picture (of an animation the first) is turned upright as its EXIF data say, laid on white if it has
    alpha, its shorter side resized to ``size`` pixels (bicubic, antialiased), and its centre cut out.

    Raises:
        DataError: empty, not an image, cut short, damaged, or of more than 64 million pixels.
    """
    with _warnings_dropped():
        return _decoded(raw, size, name, Fitting())


def group_column(about: pl.DataFrame, name: str) -> pl.Series:
    """Return a column as groups: one text per image, None where the table is blank.

    Raises:
        DataError: no such column, not one value per image, or nothing in it; lists the columns there are.
    """
    there = f"there are: {', '.join(about.columns)}"
    if name not in about.columns:
        raise DataError(f"no group column {name!r}; {there}")
    column, empty = about[name], _blank(about[name])
    if empty.all():
        raise DataError(f"column {name!r} is empty in all {len(column)} rows; choose another, {there}")
    if column.dtype.is_nested() or column.dtype == pl.Binary:
        raise DataError(f"column {name!r} holds {column.dtype}, not one value per image; {there}")
    return column.cast(pl.String).set(empty, None)


def _prepared_tables(name: str) -> dict[str, pl.DataFrame]:
    """Read the tables of a prepared set, each with the split that its file name begins with, if any."""
    folder, tables = verified_folder(name), {}
    for file in sorted(file for file in read_manifest(name).files if file.endswith(".parquet")):
        table, split = pl.read_parquet(folder / file), _SPLITS.get(Path(file).stem.split("_")[0])
        if split and "split" not in table.columns:
            table = table.with_columns(split=pl.lit(split))
        tables[f"{name}, {file}"] = checked_rows(table, f"{name}, {file}", ("image",))
    if not tables:
        raise DataError(f"{name} holds no images; workbench data show {name} lists what it holds")
    return tables


def _own_table(path: Path) -> pl.DataFrame:
    """Read the user's own table; paths and labels of a CSV file stay text as written, 007 too."""
    table = read_table(path)
    if path.suffix.lower() == ".csv":
        exact = [name for name in ("image", "label", "split") if name in table.columns]
        table = table.with_columns(pl.read_csv(path, columns=exact, infer_schema=False).get_columns())
    table = checked_rows(table, str(path), ("image", "label"))
    return table.with_columns(group_column(table, "label"))


def checked_rows(table: pl.DataFrame, source: str, needed: tuple[str, ...]) -> pl.DataFrame:
    """Check that the needed columns are there and filled, and give splits their one name."""
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise DataError(f"{source}: missing column {', '.join(missing)}; rename one of {table.columns}")
    if table.height == 0:
        raise DataError(f"{source}: no rows; add at least one image")
    for name in [name for name in (*needed, "split") if name in table.columns]:
        empty = _blank(table[name])
        if empty.any():
            where = "all rows" if empty.all() else f"{empty.sum()} rows, first in row {empty.arg_true()[0]}"
            raise DataError(f"{source}: column {name} is empty in {where}; fill or remove them")
    held = table.schema["image"]
    if held not in (pl.Binary, pl.String):
        raise DataError(f"{source}: column image holds {held}; give encoded images as bytes, or paths")
    one_name = pl.col("split").cast(pl.String).replace(_SPLITS)
    return table.with_columns(split=one_name) if "split" in table.columns else table


def _blank(column: pl.Series) -> pl.Series:
    """Tell which values of a column are missing: none, not a number, or text of spaces."""
    if column.dtype == pl.String:
        return column.is_null() | (column.str.strip_chars() == "")
    return column.is_null() | (column.is_nan() if column.dtype.is_float() else False)


def _chosen(table: pl.DataFrame, split: str | None, data: ImageData) -> list[int]:
    """List the rows of a split, or of all; a limit draws the same rows of a split whatever is asked for."""
    splits = table["split"].to_numpy() if "split" in table.columns else np.full(table.height, "")
    there = sorted(set(splits))
    asked = there if split is None else [_SPLITS.get(split, split)]
    if asked[0] not in there:
        known = f"there are: {', '.join(there)}" if any(there) else "it has none; read it whole"
        raise DataError(f"{data.name}: no split {split!r}; {known}")
    rows = []
    for one in asked:
        found = torch.from_numpy(np.flatnonzero(splits == one))
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
        rows += found[order[: data.limit]].tolist()
    return sorted(rows)


def inside(folder: Path, path: str, name: str) -> Path:
    """Find a file below a folder, and refuse one that lies elsewhere."""
    with suppress(ValueError, RuntimeError):  # a null character, a link to itself
        found = (folder / path).resolve()
        if found.is_relative_to(folder):
            return found
    raise DataError(f"{name}: not a path below the folder of the table; put the picture there")


def _bytes_of(content: bytes | Path, name: str) -> bytes:
    """Return an encoded image, read from its file if it is in one."""
    try:
        return content if isinstance(content, bytes) else content.read_bytes()
    except OSError as problem:
        raise DataError(f"{name}: {problem.strerror}; paths start at the folder of the table") from None


@contextmanager
def _warnings_dropped() -> Iterator[None]:
    """Drop Pillow's warnings. Filters are those of the whole process: one caller at a time changes them."""
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decoded(raw: bytes, size: int, name: str, fitting: Fitting) -> UInt8[np.ndarray, "3 S S"]:
    """Decode as :func:`decode` does; warnings are the caller's matter, as filters belong to no thread."""
    if not raw:
        raise DataError(f"{name}: empty, 0 bytes; copy the image again or remove the row")
    large = f"more than {MOST_PIXELS // 10**6} million pixels; reduce the image or remove the row"
    try:
        image = Image.open(BytesIO(raw), formats=_FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise DataError(f"{name}: {image.width} x {image.height}, {large}")
        return _square(_upright(_rgb(image, name), image), size, fitting)
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{name}: {large}") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image, or damaged; readable are {', '.join(_FORMATS)}") from None
    except Exception as problem:  # a damaged image raises whatever its parser stumbles over
        reason = " ".join(str(problem).split())[:120] or type(problem).__name__
        raise DataError(f"{name}: cut short or damaged ({reason}); copy the image again") from None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Bring any mode to RGB, alpha laid over white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        levels = (np.asarray(image).astype(np.uint32) + 128) // 257  # 65535 = 255 * 257
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"{name}: 32-bit pixels, whose range is not known; save the image with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _upright(image: Image.Image, original: Image.Image) -> Image.Image:
    """Undo the EXIF orientation; damaged EXIF data say nothing, and the picture stays as it lies."""
    turn = None
    with suppress(Exception):  # as varied as the damage
        turn = _UPRIGHT.get(original.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _square(image: Image.Image, size: int, fitting: Fitting) -> UInt8[np.ndarray, "3 S S"]:
    """Resize the shorter side and cut out the centre, rounded as torchvision rounds."""
    shorter, wanted = min(image.size), fitting.shorter or size
    sides = (wanted, wanted)
    if not fitting.squash:
        if max(image.size) > 64 * shorter:  # one by a million pixels would become 64 by 64 million: cut it
            image = _centre(image, *(min(side, 64 * shorter) for side in image.size))
        sides = tuple(wanted * side // shorter for side in image.size)
    image = image.resize(sides, Image.Resampling[fitting.resampling.upper()])
    return np.asarray(_centre(image, size, size)).transpose(2, 0, 1)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """Cut out the centre."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))

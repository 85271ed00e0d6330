"""A zoo of feature arrays that were computed elsewhere, checked before anything is trained on them."""

from pathlib import Path
from tokenize import TokenError

import numpy as np
import polars as pl
import torch
from torch import Tensor

from workbench.datasets.pairs import read_table
from workbench.errors import DataError
from workbench.features import Features, check_features, check_same_rows
from workbench.files import digest
from workbench.zoo import Zoo

SPLITS = ("train", "valid", "test")


def features_from(folder: Path) -> Zoo:
    """Open a zoo of arrays that were computed elsewhere.

    The folder holds ``pairs.csv`` or ``pairs.parquet`` with one row per caption (columns image, the row of
    its image, and split: train, valid or test), and the folders ``texts`` and ``images`` with one
    ``NAME.npy`` each per encoder: ``(captions, dim)`` and ``(images, dim)``. A ``NAME.parquet`` with the
    columns id and feature is refused unless its ids are those of the first such table of its folder, in
    their order; an array without ids is taken to be in that order too.

    Raises:
        DataError: a file is missing or damaged, rows are unequal in number, in another order, zero or NaN, or
            the table of pairs names an unknown image or split, or an image in two splits.
    """
    table = _pair_table(folder)
    texts, images = (_arrays(folder / kind) for kind in ("texts", "images"))
    for name, found in texts.items():
        if len(found) != table.height:
            raise DataError(
                f"texts/{name} has {len(found)} rows, the table of pairs has {table.height}; give one row "
                "per caption, in the table's order"
            )
    check_same_rows(list(texts.values()))
    check_same_rows(list(images.values()))
    captions = _captions(table["image"].to_list(), len(next(iter(images.values()))))
    most = max(map(len, captions))
    choices = torch.tensor([(own * most)[:most] for own in captions])
    return Zoo(images, texts, choices, _split_rows(table["split"].to_list(), captions))


def _pair_table(folder: Path) -> pl.DataFrame:
    path = next((folder / name for name in ("pairs.parquet", "pairs.csv") if (folder / name).is_file()), None)
    if path is None:
        raise DataError(
            f"{folder} has no pairs.csv or pairs.parquet; it says which caption is of which image"
        )
    table = read_table(path)
    missing = {"image", "split"} - set(table.columns)
    if missing or table.is_empty() or not table["image"].dtype.is_integer():
        raise DataError(
            f"{path.name}: give the columns image (row numbers) and split, and a row per caption; got "
            f"{table.height} rows of {dict(table.schema)}"
        )
    unknown = table.select(~pl.col("split").cast(pl.String).is_in(SPLITS).fill_null(False)).to_series()
    for column, bad in (("image", table["image"].is_null()), ("split", unknown)):
        if bad.any():
            row = bad.arg_max()
            raise DataError(
                f"{path.name}, row {row}: {column} is {table[column][row]!r}; give the row of an image, "
                f"counted from 0, and one of {', '.join(SPLITS)}"
            )
    return table


def _captions(image: list[int], count: int) -> list[list[int]]:
    """Return the captions of each image as rows of the table of pairs."""
    found: list[list[int]] = [[] for _ in range(count)]
    for row, one in enumerate(image):
        if not 0 <= one < count:
            raise DataError(
                f"the table of pairs, row {row}: there is no image {one}; the {count} images are "
                "numbered from 0"
            )
        found[one].append(row)
    without = next((row for row, own in enumerate(found) if not own), None)
    if without is not None:
        raise DataError(f"image {without}: no caption in the table of pairs; add one or remove the image")
    return found


def _split_rows(split: list[str], captions: list[list[int]]) -> dict[str, Tensor]:
    """Return the images of each split."""
    found: dict[str, list[int]] = {one: [] for one in SPLITS}
    for image, own in enumerate(captions):
        names = sorted({split[row] for row in own})
        if len(names) > 1:
            raise DataError(
                f"image {image}: its captions are in {' and '.join(names)} (rows {own} of the table of "
                "pairs); an image belongs to one split"
            )
        found[names[0]].append(image)
    few = [one for one, rows in found.items() if len(rows) < 10]
    if few:
        raise DataError(
            f"fewer than ten images in {', '.join(few)}; fill the column split of the table of pairs"
        )
    return {one: torch.tensor(rows) for one, rows in found.items()}


def _arrays(folder: Path) -> dict[str, Features]:
    """Read every array of a folder."""
    found: dict[str, tuple[np.ndarray, str | None]] = {}
    for path in sorted([*folder.glob("*.npy"), *folder.glob("*.parquet")]):
        name = f"{folder.name}/{path.name}"
        if path.stem in found:
            raise DataError(f"{name}: there are two files of that name; remove the .npy or the .parquet file")
        found[path.stem] = (_array(path, name), None) if path.suffix == ".npy" else _feature_table(path, name)
        check_features(found[path.stem][0], name)
    if not found:
        raise DataError(f"{folder} holds no .npy or .parquet file; give one array per encoder")
    first = next((order for _, order in found.values() if order is not None), "as given")
    return {name: Features(name, array, order or first) for name, (array, order) in found.items()}


def _array(path: Path, name: str) -> np.ndarray:
    """Map an array into memory; unlike ``np.load`` this never takes a pickle or an archive for one."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, OverflowError, SyntaxError, TokenError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise DataError(
            f"{name} holds no readable array of numbers ({reason}); save it with np.save"
        ) from None


def _feature_table(path: Path, name: str) -> tuple[np.ndarray, str]:
    """Read features and the order of their ids."""
    table = read_table(path)
    if {"id", "feature"} - set(table.columns):
        raise DataError(f"{name}: give the columns id and feature, got {table.columns}")
    bad = table["id"].is_null() | ~table["id"].is_first_distinct()
    if bad.any():
        row = bad.arg_max()
        raise DataError(
            f"{name}, row {row}: id {table['id'][row]!r} is missing or there twice; name each row once"
        )
    rows = table["feature"].to_list()
    width = len(rows[0]) if rows and isinstance(rows[0], list) else 0
    odd = next((row for row, one in enumerate(rows) if not isinstance(one, list) or len(one) != width), None)
    if odd is not None or not width:
        raise DataError(f"{name}, row {odd or 0}: the feature is no list of numbers as long as row 0's")
    return np.array(rows), digest(*map(str, table["id"]))

"""Sentence pairs under conditions: read, checked, grouped into pairs, their order destroyed.

A table has the columns sentence1, sentence2, condition and label (those of C-STS), and any others. Rows that
share both sentences are one pair; its rows differ in the condition. In the published C-STS files the first
row of a pair always has the higher label, so the order of rows is destroyed on reading: nothing downstream
can use it.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import Field, FiniteFloat, model_validator

from workbench.conditions import normalise_text
from workbench.config import Settings
from workbench.datasets import bundled
from workbench.errors import DataError
from workbench.files import digest
from workbench.manifests import verified_folder

COLUMNS = ("sentence1", "sentence2", "condition", "label")
_STEMS = {"train": ("train",), "valid": ("valid", "validation", "dev", "val"), "test": ("test",)}
_ENDINGS = (".parquet", ".csv")
_log = logging.getLogger(__name__)


class PairData(Settings):
    """Which pairs a recipe uses.

    ``source`` is "bundled", "manifest" (a prepared public set, by ``name``) or "files" (the user's own, by
    ``path``: one CSV or Parquet file, or a folder with one for each of train, validation and test).
    """

    source: Literal["bundled", "manifest", "files"]
    name: str
    path: str | None = Field(default=None, exclude=True, description="not part of a run: its content is")
    label_range: tuple[FiniteFloat, FiniteFloat] = (0.0, 1.0)
    limit: int | None = Field(default=None, gt=3, description="use only so many pairs of each split")

    @model_validator(mode="after")
    def _range_is_ordered(self) -> "PairData":
        if not self.label_range[0] < self.label_range[1]:
            raise ValueError(f"label_range must be [lowest, highest], got {list(self.label_range)}")
        return self


def load_pairs(data: PairData) -> dict[str, pl.DataFrame]:
    """Read and check the splits that a recipe asks for.

    Returns:
        For train, valid and, if it has labels, test: a table in an order that says nothing about labels, with
        sentence1, sentence2, condition (normalised), label (brought to 0..1), pair (an integer shared by the
        rows of one pair), condition_kind ("seen", "unseen", or as the set says) and the set's other columns;
        relabel, if the folder holds second labels of the validation rows.

    Raises:
        DataError: the user's files cannot be used; the message names file, column and row.
        ManifestError: a prepared set is missing or damaged.
    """
    if data.source == "bundled":
        raw = bundled.pairs()
    elif data.source == "manifest":
        folder = verified_folder(data.name)
        raw = {split: pl.read_parquet(folder / f"{split}.parquet") for split in _STEMS}
    elif data.path is None:
        raise DataError(
            f"{data.name} is not shipped with the workbench; give your own copy with --data PATH "
            "(a CSV or Parquet file, or a folder with one for train, validation and test)"
        )
    else:
        raw = _read_files(Path(data.path), data.label_range)
    splits = {
        split: _prepared(table, f"{data.name}, {split}", data.label_range) for split, table in raw.items()
    }
    if data.limit:
        splits = {split: table.filter(pl.col("pair") < data.limit) for split, table in splits.items()}
    return _with_condition_kind(splits)


def read_table(path: Path) -> pl.DataFrame:
    """Read one CSV or Parquet file.

    Raises:
        DataError: missing, of another type, empty, or damaged.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise DataError(f"{path}: expected a file ending in .csv or .parquet")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        if path.suffix.lower() == ".parquet":
            return pl.read_parquet(path)
        # Text such as "007" or "true" stays text; only the label becomes a number.
        return pl.read_csv(
            path, schema_overrides=dict.fromkeys(COLUMNS[:3], pl.String), infer_schema_length=None
        )
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise DataError(f"{path} cannot be read; is it cut short? ({reason})") from None


def _read_files(path: Path, label_range: tuple[float, float]) -> dict[str, pl.DataFrame]:
    """Read the user's own splits, or divide one file by pairs 70 : 10 : 20."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        files = split_files(path)
        tables = {split: read_table(file) for split, file in files.items()}
        tables["valid"] = _relabelled(tables["valid"], path)
        if "test" in tables and _labels_hidden(tables["test"], label_range):
            _log.warning("%s: its labels are withheld (all -1), nothing is measured on it", files["test"])
            del tables["test"]
        return tables
    # Checked before it is divided, so that a message names the row of the file.
    table = _checked(read_table(path), str(path), label_range)
    key = pl.struct("sentence1", "sentence2").map_elements(
        lambda pair: digest(*sorted(pair.values())), return_dtype=pl.String
    )
    table = table.with_columns(_key=key)
    pairs = table["_key"].n_unique()
    if pairs < 20:
        raise DataError(
            f"{path} has {table.height} rows of {pairs} sentence pairs; at least 20 pairs are needed to "
            "train, validate and test. Add rows, or give a folder with splits"
        )
    tenth = (pl.col("_key").rank("dense") - 1) * 10 // pairs
    parts = {"train": tenth < 7, "valid": tenth == 7, "test": tenth > 7}
    return {split: table.filter(chosen).drop("_key") for split, chosen in parts.items()}


def _relabelled(valid: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """Add second labels of the validation rows, if the folder holds some: a file named *reannotated*.tsv.

    The form is that of L-CSTS (Tu et al., ACL 2024): the columns uid, counted from 0 in row order, and
    reannotated-label, -1 where a row was found invalid.

    Raises:
        DataError: other columns, or not one label per row.
    """
    found = sorted(folder.glob("*reannotated*.tsv"))
    if not found:
        return valid
    table = pl.read_csv(found[0], separator="\t", eol_char="\n")
    columns = [name.strip() for name in table.columns]
    if columns != ["uid", "reannotated-label"] or table.height != valid.height:
        raise DataError(
            f"{found[0]}: expected the columns uid and reannotated-label and {valid.height} rows, one per "
            f"validation row; found {columns} and {table.height} rows"
        )
    label = table.to_series(1).cast(pl.String).str.strip_chars().cast(pl.Float64)
    return valid.with_columns(relabel=label.replace(-1, None))


def split_files(folder: Path) -> dict[str, Path]:
    """Find the files of a folder's splits: train and valid, and test if there is one.

    Raises:
        DataError: no such folder, a split is missing, or two files claim one.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one with --data")
    found = {split: _split_file(folder, stems) for split, stems in _STEMS.items()}
    missing = [split for split in ("train", "valid") if found[split] is None]
    if missing:
        names = sorted(file.name for file in folder.iterdir())[:10]
        raise DataError(
            f"{folder} needs a .csv or .parquet file for train and one for validation (names "
            f"ending in train, valid, validation, dev or test); missing: "
            f"{', '.join(missing)}; it holds: {names}"
        )
    return {split: file for split, file in found.items() if file}


def _split_file(folder: Path, stems: tuple[str, ...]) -> Path | None:
    """Find the file of one split, such as csts_validation.csv."""
    found = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in _ENDINGS and file.stem.lower().replace("-", "_").split("_")[-1] in stems
    ]
    if len(found) > 1:
        raise DataError(
            f"{folder} holds more than one file for {stems[0]}: {', '.join(f.name for f in found)}"
        )
    return found[0] if found else None


def _labels_hidden(table: pl.DataFrame, label_range: tuple[float, float]) -> bool:
    """Tell a split whose labels are withheld (C-STS test: all -1), which nothing can be measured on."""
    if "label" not in table.columns or table.height == 0 or label_range[0] <= -1:
        return False
    return (table["label"].cast(pl.Float64, strict=False) == -1).fill_null(False).all()


def check_columns(table: pl.DataFrame, source: str) -> pl.DataFrame:
    """Check that the four columns are there, filled, and labels are numbers.

    Raises:
        DataError: names the source, the column and the first bad row (0 is the first below the header).
    """
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise DataError(
            f"{source}: missing column {', '.join(missing)}; needed are {', '.join(COLUMNS)}, "
            f"found {table.columns}"
        )
    for name in COLUMNS:
        empty = table[name].is_null()
        if empty.any():
            raise DataError(
                f"{source}: column {name} is empty in {empty.sum()} rows, first in row "
                f"{empty.arg_true()[0]}; fill or remove them"
            )
    labels = table["label"].cast(pl.Float64, strict=False)
    bad = labels.is_null() | labels.is_nan() | labels.is_infinite()
    if bad.any():
        row = bad.arg_true()[0]
        raise DataError(f"{source}: label in row {row} is {table['label'][row]!r}, not a number")
    return table.with_columns(label=labels)


def _checked(table: pl.DataFrame, source: str, label_range: tuple[float, float]) -> pl.DataFrame:
    """Check columns and labels and normalise the texts."""
    table = check_columns(table, source)
    low, high = label_range
    outside = (table["label"] < low) | (table["label"] > high)
    if outside.any():
        row = outside.arg_true()[0]
        raise DataError(
            f"{source}: label {table['label'][row]} in row {row} is outside {low:g}..{high:g}; give the "
            "range of your labels with --label-range LOW HIGH"
        )
    return table.with_columns(_normalised(table[name], source) for name in COLUMNS[:3])


def _prepared(table: pl.DataFrame, source: str, label_range: tuple[float, float]) -> pl.DataFrame:
    """Check one split, scale its labels, number its pairs and drop its order."""
    table = _checked(table, source, label_range)
    low, high = label_range
    if table.height < 2 or table["label"].n_unique() < 2:
        raise DataError(
            f"{source}: {table.height} rows with {table['label'].n_unique()} distinct labels; at least two "
            "rows with different labels are needed in every split. Add rows"
        )
    scaled = [name for name in ("label", "relabel") if name in table.columns]
    table = table.with_columns((pl.col(name) - low) / (high - low) for name in scaled)
    key = pl.struct("sentence1", "sentence2").map_elements(
        lambda pair: digest(*pair.values()), return_dtype=pl.String
    )
    row_key = pl.struct(COLUMNS[:3]).map_elements(lambda row: digest(*row.values()), return_dtype=pl.String)
    # Sorted by hash: an order that no label, file or neighbour had a part in.
    table = table.with_columns(_pair=key, _row=row_key).sort("_pair", "_row", "label")
    return table.with_columns(pair=pl.col("_pair").rle_id().cast(pl.Int64)).drop("_pair", "_row")


def _normalised(column: pl.Series, source: str) -> pl.Series:
    """Normalise a text column, naming the row of a text that cannot be used."""
    return pl.Series(
        column.name,
        [normalise_text(text, f"{source}: {column.name} in row {row}") for row, text in enumerate(column)],
        dtype=pl.String,
    )


def _with_condition_kind(splits: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """Mark whether a row's condition occurs in train, unless the set itself says how new it is."""
    trained = splits["train"]["condition"].unique().implode()
    kind = pl.when(pl.col("condition").is_in(trained)).then(pl.lit("seen")).otherwise(pl.lit("unseen"))
    return {
        split: table if "condition_kind" in table.columns else table.with_columns(condition_kind=kind)
        for split, table in splits.items()
    }


def unique_texts(tables: Iterable[pl.DataFrame], *columns: str) -> list[str]:
    """Return the distinct texts of some columns over some tables, sorted."""
    return sorted({text for table in tables for name in columns for text in table[name].unique()})

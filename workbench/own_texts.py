"""Texts that a person brings: pasted lines, a CSV or a Parquet file, checked before anything is computed.

A file has a column ``text``; columns of few values are attributes to colour by, all others are left out, and
so are those that a table of the workbench has beside its texts.
Vectors that were computed before stand in number columns v0, v1, ... beside the texts; models of sentence
vectors read them, a model that pools tokens needs the words.
"""

import io
import re

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.conditions import normalise_text
from workbench.errors import DataError

MOST_BYTES = 5 * 2**20
MOST_ROWS = 20_000
MOST_VALUES = 20  # of an attribute; with more, colours tell nothing apart
MOST_COLUMNS = 2000
_VECTOR = re.compile(r"v\d+")
_WRITTEN = ("row", "sentence", "moved", "x0", "y0", "x1", "y1")  # by the workbench beside the texts


def pasted_texts(pasted: str) -> pl.DataFrame:
    """Return one text per line; empty lines are left out.

    Raises:
        DataError: no line, too many, or one that cannot be read.
    """
    lines = [line for line in pasted.splitlines() if line.strip()]
    if len(pasted.encode("utf-8", "replace")) > MOST_BYTES:
        raise DataError(f"the pasted text is larger than {MOST_BYTES // 2**20} MiB; paste fewer lines")
    return checked_texts(pl.DataFrame({"text": lines}, schema={"text": pl.String}))


def read_texts(name: str, raw: bytes) -> pl.DataFrame:
    """Read an uploaded file.

    Args:
        name: of the file; its ending says what it is.
        raw: its content.

    Returns:
        The columns text, the attributes as text, and v0, v1, ... if it brings vectors.

    Raises:
        DataError: too large, another type, not readable, no column text, or an unusable text or vector.
    """
    short, kind = name[-60:], name.lower().rpartition(".")[2]
    if len(raw) > MOST_BYTES:
        raise DataError(f"{short} has {len(raw) / 2**20:.1f} MiB, at most {MOST_BYTES // 2**20} MiB are read")
    if kind == "npy":
        raise DataError(
            f"{short} holds vectors without texts; write a Parquet file with the columns text, v0, v1, ..."
        )
    if kind not in ("csv", "parquet"):
        raise DataError(f"{short} is neither .csv nor .parquet; save the table as one of these")
    try:
        if kind == "csv":
            frame = pl.read_csv(io.BytesIO(raw), n_rows=MOST_ROWS + 1, infer_schema=False)
        else:
            if len(pl.read_parquet_schema(io.BytesIO(raw))) > MOST_COLUMNS:
                raise DataError(f"{short} has more than {MOST_COLUMNS:,} columns")
            frame = pl.read_parquet(io.BytesIO(raw), n_rows=MOST_ROWS + 1)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as problem:
        reason = (str(problem).splitlines() or ["it is damaged"])[0][:160]
        raise DataError(f"{short} cannot be read as {kind.upper()}: {reason}") from None
    return checked_texts(frame, short)


def checked_texts(frame: pl.DataFrame, name: str = "the pasted text") -> pl.DataFrame:
    """Return the columns that are used, texts in their one form.

    Raises:
        DataError: as :func:`read_texts`.
    """
    if "text" not in frame.columns:
        known = ", ".join(frame.columns)[:160]
        raise DataError(f"{name} has no column named text; its columns are: {known}")
    if not 3 <= frame.height <= MOST_ROWS:
        count = f"more than {MOST_ROWS:,}" if frame.height > MOST_ROWS else frame.height
        raise DataError(f"{name} has {count} rows, 3 to {MOST_ROWS:,} are read")
    texts = [
        normalise_text(text, f"text in row {row} of {name}") for row, text in enumerate(frame["text"], 1)
    ]
    used = [pl.Series("text", texts)]
    for column in frame.columns:
        if column in ("text", *_WRITTEN) or _VECTOR.fullmatch(column) or frame[column].dtype.is_nested():
            continue
        values = frame[column].cast(pl.String, strict=False)
        values = values.set(values == "", None)
        if 1 < values.drop_nulls().n_unique() <= MOST_VALUES:
            used.append(values.alias(column[:60]))
    vectors = [column for column in frame.columns if _VECTOR.fullmatch(column)]
    kept = pl.DataFrame(used)
    return kept.hstack(_checked_vectors(frame.select(vectors), name)) if vectors else kept


def _checked_vectors(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    """Return vector columns in their order as single precision.

    Raises:
        DataError: columns are missing or not numbers, or a value is not finite or all are zero in a row.
    """
    ordered = [f"v{number}" for number in range(frame.width)]
    if set(ordered) != set(frame.columns):
        raise DataError(f"{name} has {frame.width} vector columns, which are not v0 to v{frame.width - 1}")
    try:
        numbers = frame.select(pl.col(ordered).cast(pl.Float32))
    except pl.exceptions.PolarsError:
        raise DataError(f"a vector column of {name} holds something else than numbers") from None
    norms = numbers.to_torch().norm(dim=1)
    if sum(numbers.null_count().row(0)) or not norms.isfinite().all() or not norms.min() > 0:
        raise DataError(f"a vector of {name} has a missing or infinite value, or is zero throughout")
    return numbers


def without_vectors(frame: pl.DataFrame) -> pl.DataFrame:
    """Return texts and attributes alone."""
    return frame.select([name for name in frame.columns if not _VECTOR.fullmatch(name)])


def vectors_of(frame: pl.DataFrame) -> Float[Tensor, "N D"] | None:
    """Return the vectors that came with texts, brought to norm 1; None if none came."""
    columns = [name for name in frame.columns if _VECTOR.fullmatch(name)]
    return torch.nn.functional.normalize(frame.select(columns).to_torch(), dim=1) if columns else None

"""The feature store: what a frozen encoder makes of images or texts, computed once and kept in one row order.

A table of features is a file of 16-bit numbers, written block by block and read as a memory map. A killed
extraction goes on after its last whole block; a finished table carries the hash of its file and is never read
unless it matches.

Shape letters: R rows, D feature width, B rows of a batch.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float, Int
from safetensors.torch import load, save
from torch import Tensor
from tqdm.auto import tqdm

from workbench.errors import DataError
from workbench.files import clear_disk_errors, digest, sha256_of, write_atomic

HELD_BYTES = 64 * 2**20  # of one encoder's features that are held in single precision
BLOCK = 512  # rows computed, hashed and noted as done together
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moments:
    """Sums over rows of unit features, enough for every closed-form map.

    Attributes:
        mean: of the rows.
        covariance: about the mean, divided by the number of rows.
        count: rows.
    """

    mean: Float[Tensor, " D"]
    covariance: Float[Tensor, "D D"]
    count: int


@dataclass(frozen=True)
class Features:
    """One encoder's features of all rows of a data set.

    Attributes:
        name: of the encoder.
        array: the features as the encoder gave them, 16-bit; a memory map if they come from the store.
        order: hash that names the rows and their order.
        folder: where moments are kept, if anywhere.
        parameters: of the encoder, if known.
    """

    name: str
    array: Float[np.ndarray, "R D"]
    order: str
    folder: Path | None = None
    parameters: int | None = None

    def __len__(self) -> int:
        """Number of rows R."""
        return len(self.array)

    @property
    def width(self) -> int:
        """Feature width D."""
        return self.array.shape[1]

    def unit(self, rows: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Return some rows in single precision, each brought to norm 1."""
        held = self._units
        return held[rows] if held is not None else self._read(rows.numpy())

    @cached_property
    def _units(self) -> Float[Tensor, "R D"] | None:
        """All rows at norm 1, read once, if they are few enough to hold."""
        small = 4 * self.array.size <= HELD_BYTES
        return self._read(slice(None)) if small else None

    def _read(self, rows: Int[np.ndarray, " B"] | slice) -> Float[Tensor, "B D"]:
        taken = torch.from_numpy(self.array[rows].astype(np.float32))
        return torch.nn.functional.normalize(taken, dim=1)

    def moments(self, rows: Int[Tensor, " B"]) -> Moments:
        """Return mean and covariance of some rows, each at norm 1; computed once per set of rows.

        Products are summed in double precision over blocks, so that many rows lose nothing.
        """
        key = _rows_key(rows)
        if key not in self._moments:
            self._moments[key] = self._summed(rows, key)
        return self._moments[key]

    @cached_property
    def _moments(self) -> dict[str, Moments]:
        return {}

    def _summed(self, rows: Int[Tensor, " B"], key: str) -> Moments:
        """Read the moments of rows from their file, or compute and keep them."""
        path = None if self.folder is None else self.folder / f"moments-{key}.safetensors"
        kept = None if path is None else _kept(path)
        if kept is not None:
            return Moments(kept["mean"], kept["covariance"], len(rows))
        total = torch.zeros(self.width, dtype=torch.double)
        square = torch.zeros(self.width, self.width, dtype=torch.double)
        for part in rows.split(4096):
            unit = self.unit(part)
            total += unit.double().sum(0)
            square += (unit.T @ unit).double()
        mean = total / len(rows)
        covariance = square / len(rows) - torch.outer(mean, mean)
        if path is not None:
            raw = save({"mean": mean, "covariance": covariance})
            write_atomic(path, hashlib.sha256(raw).hexdigest().encode() + b"\n" + raw)
        return Moments(mean, covariance, len(rows))


def _rows_key(rows: Tensor) -> str:
    return digest(rows.long().numpy().tobytes())[:16]


def _kept(path: Path) -> dict[str, Tensor] | None:
    """Read tensors that stand behind the hash of their bytes; None if there are none, or damaged ones."""
    if not path.is_file():
        return None
    expected, _, raw = path.read_bytes().partition(b"\n")
    if hashlib.sha256(raw).hexdigest().encode() != expected:
        _log.warning("%s is damaged; it is computed again", path.name)
        return None
    return load(raw)


def check_features(array: np.ndarray, name: str, first: int = 0) -> None:
    """Refuse features that no cosine is defined for.

    Raises:
        DataError: not a table of numbers, or a row is zero, NaN or beyond 16-bit range; the row is named.
    """
    if array.ndim != 2 or array.dtype.kind != "f":
        raise DataError(
            f"{name}: features are {array.dtype} of shape {array.shape}; give floating point (rows, dim)"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        size = np.abs(array).max(1, initial=0).astype(np.float16)
        bad = ~np.isfinite(size) | (size == 0)
    if bad.any():
        row = int(bad.argmax())
        kind = (
            "all zeros in 16 bits"
            if size[row] == 0
            else "NaN, infinite, or above 65,504, which 16 bits cannot hold"
        )
        raise DataError(
            f"{name}, row {first + row}: the features are {kind}, so its cosine is undefined; "
            f"{int(bad.sum())} such rows in this block. Remove the row or scale the features"
        )


def check_same_rows(features: list[Features]) -> None:
    """Refuse encoders that do not speak of the same rows in the same order.

    Raises:
        DataError: unequal numbers of rows, or another order; both encoders are named.
    """
    for other in features[1:]:
        first = features[0]
        if len(other) != len(first):
            raise DataError(
                f"{first.name} has {len(first)} rows and {other.name} has {len(other)}; every encoder of a "
                "zoo needs one row for the same item: extract both from one table"
            )
        if other.order != first.order:
            raise DataError(
                f"the rows of {first.name} and {other.name} are in different order; sort both by one id"
            )


class FeatureStore:
    """Finished and unfinished tables of features in one folder."""

    def __init__(self, folder: Path) -> None:
        """Open a store.

        Args:
            folder: the cache; the store makes its own folder in it.
        """
        self.folder = folder / "features"

    def get(
        self,
        name: str,
        fingerprint: str,
        order: str,
        rows: int,
        compute: Callable[[slice], Float[Tensor, "B D"]],
        parameters: int | None = None,
    ) -> Features:
        """Return an encoder's features, computing what is not there yet.

        Args:
            name: of the encoder, for messages and the progress bar.
            fingerprint: of everything a feature depends on but the row: weights, preprocessing, size.
            order: of the rows and their content.
            rows: their number R.
            compute: gives the features of a slice of the rows.
            parameters: of the encoder, for scale plots.

        Raises:
            DataError: there are no rows, a row is zero, NaN or out of range, or ``compute`` gives another
                shape than asked for.
            RunError: the disk is full; finished blocks are kept.
        """
        if rows < 1:
            raise DataError(f"{name}: there are no rows to compute features of")
        folder = self.folder / digest(fingerprint, order)[:32]
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not _is_finished(folder, name):
                _extract(folder, name, rows, compute)
        array = np.load(folder / "features.npy", mmap_mode="r")
        return Features(name, array, order, folder, parameters)


def _is_finished(folder: Path, name: str) -> bool:
    """Say whether a table is all there and as its hash says; a damaged one is removed."""
    about = folder / "about.json"
    if not about.is_file():
        return False
    try:
        if json.loads(about.read_bytes())["sha256"] == sha256_of(folder / "features.npy"):
            return True
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        pass  # half of it is gone, or the notes are no longer JSON: as damaged as a wrong hash
    _log.warning("features of %s are damaged; they are computed again", name)
    for left in folder.glob("*"):
        if left.name != "lock":
            left.unlink()
    return False


def _extract(folder: Path, name: str, rows: int, compute: Callable[[slice], Tensor]) -> None:
    """Fill a table block by block, going on after the last block whose hash is as noted."""
    table, notes = folder / "features.partial.npy", folder / "blocks.json"
    if (folder / "features.npy").is_file():  # killed between the last two steps below
        os.replace(folder / "features.npy", table)
    width, noted = _resumed(table, notes, rows)
    short = rows <= 2 * BLOCK
    done = len(noted) * BLOCK
    with tqdm(total=rows, initial=done, desc=name, unit="row", leave=False, disable=short) as bar:
        for start in range(done, rows, BLOCK):
            part = slice(start, min(start + BLOCK, rows))
            with np.errstate(over="ignore"):  # what does not fit into 16 bits is refused by name below
                found = compute(part).float().cpu().numpy().astype(np.float16)
            check_features(found, name, start)
            width = width or found.shape[1]
            if found.shape != (part.stop - start, width):
                raise DataError(
                    f"{name}: features of shape {found.shape} for rows {start} to {part.stop - 1}; expected "
                    f"one row each and the width {width} of the first block"
                )
            _write_block(table, found, start, rows)
            noted.append(hashlib.sha256(found.tobytes()).hexdigest())
            write_atomic(notes, json.dumps({"width": width, "blocks": noted}))
            bar.update(len(found))
    os.replace(table, folder / "features.npy")
    about = {"name": name, "rows": rows, "width": width, "sha256": sha256_of(folder / "features.npy")}
    write_atomic(folder / "about.json", json.dumps(about, indent=1))  # last: its presence means all is there
    notes.unlink(missing_ok=True)


def _head(rows: int, width: int) -> bytes:
    """Return what a table's file begins with."""
    file = BytesIO()
    about = {"descr": "<f2", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


def _write_block(table: Path, found: np.ndarray, start: int, rows: int) -> None:
    """Write rows to their place.

    Not through a memory map: there a full disk is no error but a signal that ends the process.
    """
    head = _head(rows, found.shape[1])
    with clear_disk_errors(table), open(table, "r+b" if start else "wb") as file:
        if not start:
            file.write(head)
        file.seek(len(head) + start * found.shape[1] * found.itemsize)
        file.write(found.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _resumed(table: Path, notes: Path, rows: int) -> tuple[int | None, list[str]]:
    """Return the width and the hashes of the blocks, from the first on, that are there as noted.

    The head is compared and not read: numpy's reader of a damaged one raises whatever its parser does.
    """
    try:
        noted = json.loads(notes.read_bytes())
        width, head = noted["width"], _head(rows, noted["width"])
        with open(table, "rb") as file:
            if file.read(len(head)) != head:
                return None, []
            done = []
            for place, expected in enumerate(noted["blocks"]):
                size = (min((place + 1) * BLOCK, rows) - place * BLOCK) * width * 2
                raw = file.read(size)
                if len(raw) != size or hashlib.sha256(raw).hexdigest() != expected:
                    break
                done.append(expected)
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return None, []
    return (width, done) if done else (None, [])

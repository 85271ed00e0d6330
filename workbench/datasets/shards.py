"""Captioned pictures in WebDataset shards: tar files of NAME.jpg beside NAME.txt, as img2dataset writes them.

Shards are indexed once, by reading the headers of their members; then any picture is one read away. So shards
are like any other data to the training loop: batches are row numbers, epochs are shuffled whole and a killed
training goes on exactly. Readers that stream shards in order (webdataset, as open_clip uses it) offer
neither, and those that index them (wids) decode pickles by a file's ending. Nothing is ever extracted.

Shape letters: N pictures, S side in pixels, B rows of a batch, L tokens.
"""

import logging
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor
from tqdm.auto import tqdm

from workbench.config import Settings
from workbench.datasets.class_sets import Captioned, Questions, RowReader
from workbench.datasets.images import decode
from workbench.datasets.photos import PhotoData, load_photos
from workbench.errors import DataError
from workbench.files import digest, write_atomic
from workbench.manifests import cache_folder

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
LONGEST = 2000  # bytes of a caption that are read; any tower's window is shorter
MOST_DAMAGED = 0.01  # share of the pictures that were asked for
JUDGED_FROM = 2000  # pictures; of fewer, half may be damaged
_log = logging.getLogger(__name__)


class ShardData(Settings):
    """Which shards, and how large their pictures become."""

    source: Literal["shards"]
    name: str = "shards"
    path: str = Field(default="shards", exclude=True, description="folder that holds the .tar files")
    size: int = Field(default=224, ge=32, le=512, description="side in pixels")
    limit: int | None = Field(default=None, ge=100, description="pictures, from the first shard on")
    asked: int = Field(default=2000, ge=200, description="largest number of pictures of a class set")


@dataclass(frozen=True)
class Shards:
    """Where every picture and caption of a folder of shards lies.

    Attributes:
        files: the shards, in the order of their names.
        table: one row per pair: shard, start and size of the picture, start and size of the caption.
        order: hash of the files' names and sizes and of the table.
    """

    files: tuple[Path, ...]
    table: Int[np.ndarray, "N 5"]
    order: str

    def read(self, row: int, start: int) -> bytes:
        """Read a member of a row: column 1 starts the picture, column 3 the caption."""
        shard, offset, size = (int(self.table[row, column]) for column in (0, start, start + 1))
        with self.files[shard].open("rb") as file:
            file.seek(offset)
            return file.read(size)


def open_shards(folder: Path) -> Shards:
    """Index the shards of a folder, or find their index again.

    Raises:
        DataError: no folder, no shard in it, a damaged shard, or none that pairs a picture with a caption.
    """
    files = tuple(sorted(folder.glob("*.tar"))) if folder.is_dir() else ()
    if not files:
        raise DataError(f"no .tar files in {folder}; give a folder of WebDataset shards with --data FOLDER")
    told = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    path = cache_folder() / "shards" / f"{digest(*told)[:32]}.safetensors"
    try:
        table = load(path.read_bytes())["table"]
    except (OSError, SafetensorError, KeyError):  # not there, or damaged: it is made again
        bar = tqdm(files, desc="indexing shards", unit="shard", leave=False)
        parts = [_indexed(file, number) for number, file in enumerate(bar)]
        table = np.concatenate(parts)
        if not len(table):
            raise DataError(
                f"{len(files)} shards in {folder}, and no picture ({', '.join(PICTURES)}) beside a .txt of "
                "its name"
            ) from None
        write_atomic(path, save({"table": table}))
    sizes = [f"{file.name} {file.stat().st_size}" for file in files]
    return Shards(files, table, digest(*sizes, table.tobytes()))


def _indexed(file: Path, number: int) -> Int[np.ndarray, "N 5"]:
    """List a shard's pairs; members of one name without its ending belong together."""
    pictures: dict[str, tuple[int, int]] = {}
    captions: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(file, "r:") as members:
            for member in members:
                name, ending = os.path.splitext(member.name)
                if member.isreg() and ending.lower() in (*PICTURES, ".txt"):
                    found = captions if ending.lower() == ".txt" else pictures
                    found[name] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as problem:
        raise DataError(f"shard {file.name} is damaged ({problem}); fetch it again or remove it") from problem
    rows = [(number, *pictures[name], *captions[name]) for name in pictures if name in captions]
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


class ShardPixels(RowReader):
    """Pictures of shards, decoded when their rows are asked for.

    One in a hundred may be damaged, as pictures of the web are: it becomes mid-grey, and the log says so.
    """

    def __init__(self, shards: Shards, count: int, size: int, device: str = "cpu") -> None:
        """Hold the first ``count`` pictures at a side in pixels."""
        self.shards, self.count, self.size, self.device = shards, count, size, device
        self.read = self.damaged = 0

    def __len__(self) -> int:
        """Number of pictures N."""
        return self.count

    def __getitem__(self, rows: Int[Tensor, " B"] | slice) -> UInt8[Tensor, "B 3 S S"]:
        """Decode some rows, several at a time.

        Raises:
            DataError: more than one in a hundred of the pictures so far could not be read.
        """
        places = range(self.count)[rows] if isinstance(rows, slice) else rows.tolist()
        pixels = np.empty((len(places), 3, self.size, self.size), np.uint8)

        def fill(place: int, row: int) -> str | None:
            try:
                pixels[place] = decode(self.shards.read(row, 1), self.size, f"picture {row}")
            except (DataError, OSError) as problem:
                pixels[place] = 128
                return str(problem)
            return None

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            problems = [one for one in pool.map(fill, range(len(places)), places) if one]
        self.read, self.damaged = self.read + len(places), self.damaged + len(problems)
        if problems:
            _log.warning("%d of %d pictures could not be read: %s", self.damaged, self.read, problems[0])
        share = MOST_DAMAGED if self.read >= JUDGED_FROM else 0.5  # three of the first ten may be chance
        if self.damaged > max(1, share * self.read):
            raise DataError(
                f"{self.damaged} of {self.read} pictures of the shards could not be read, the last: "
                f"{problems[-1]}"
            )
        return torch.from_numpy(pixels).to(self.device)

    def to(self, device: str) -> "ShardPixels":
        """Give the pictures to a device from now on."""
        return ShardPixels(self.shards, self.count, self.size, device)

    def fingerprint(self) -> str:
        """Hash of the index, the number and the size of the pictures."""
        return digest(self.shards.order, str(self.count), str(self.size))


class ShardTexts(Sequence[str]):
    """Captions of shards, read when asked for; what is no UTF-8 is replaced character by character."""

    def __init__(self, shards: Shards, count: int) -> None:
        """Hold the captions of the first ``count`` pictures."""
        self.shards, self.count = shards, count

    def __len__(self) -> int:
        """Number of captions."""
        return self.count

    def __getitem__(self, row: int) -> str:
        """Read one caption."""
        if not 0 <= row < self.count:
            raise IndexError(row)
        return self.shards.read(row, 3)[:LONGEST].decode("utf-8", "replace").strip()


@dataclass(frozen=True)
class Tokens:
    """Tokens of captions that are too many to hold: made for the rows that are asked for.

    Attributes:
        texts: the captions.
        tokenise: from texts to ``[B, L]``.
        device: where tokens go.
    """

    texts: Sequence[str]
    tokenise: Callable[[list[str]], Tensor]
    device: str = "cpu"

    def __len__(self) -> int:
        """Number of captions."""
        return len(self.texts)

    def __getitem__(self, rows: Int[Tensor, " B"]) -> Int[Tensor, "B L"]:
        """Tokenise some rows."""
        return self.tokenise([self.texts[row] for row in rows.tolist()]).to(self.device)

    def to(self, device: str) -> "Tokens":
        """Give the tokens to a device from now on."""
        return replace(self, device=device)


def asked_of(data: Mapping[str, Any]) -> PhotoData:
    """Return what a recipe over photos or shards asks, from its settings of data: photos in either case."""
    if data["source"] == "shards":
        return PhotoData(source="photos", size=data["size"], flickr=0, asked=data["asked"])
    return PhotoData(**{name: value for name, value in data.items() if value is not None})


def load_shards(data: ShardData) -> tuple[Captioned, dict[str, Questions]]:
    """Open the shards of a recipe to train on; the questions are those of photos.

    Every caption is its own meaning: two pictures with the same words count as different.

    Raises:
        DataError: no shards, or damaged ones.
        ManifestError: a prepared set that is asked about is missing or damaged.
    """
    shards = open_shards(Path(data.path))
    count = min(len(shards.table), data.limit or len(shards.table))
    own = torch.arange(count)
    captioned = Captioned(
        ShardPixels(shards, count, data.size), ShardTexts(shards, count), own[:, None],
        torch.zeros(1, dtype=torch.long), own,
    )  # fmt: skip
    return captioned, load_photos(asked_of(data.model_dump()))[1]

"""Data manifests: where a data set comes from, what may be done with it, and what its files must be.

A manifest names files with their sha256 and, for tables, rows and columns. A data set is looked for in the
folders of ``WORKBENCH_DATA`` (separated as in PATH) and then in the user's cache; it is used only if every
file matches.
"""

import os
import shutil
from pathlib import Path
from typing import Literal

import platformdirs
import polars as pl
from pydantic import Field, model_validator

from workbench.config import Settings, read_yaml, validated
from workbench.errors import ManifestError
from workbench.files import clear_disk_errors, sha256_of


class Upstream(Settings):
    """One file of the original publication, or a folder of many, which the commit alone identifies."""

    repository: str
    commit: str
    path: str
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$", description="None for a folder")


class DataFile(Settings):
    """One prepared file and, if it is a Parquet table, what it must hold."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(gt=0, description="bytes")
    rows: int | None = Field(default=None, ge=0)
    columns: tuple[str, ...] | None = None


class EncoderCheck(Settings):
    """What an encoder must score on a few labelled pictures; wrongly prepared input scores less."""

    data: str = Field(description="name of the data set that holds the pictures")
    file: str = Field(description="its table")
    classes: Literal["cifar10", "imagenet"] = Field(description="what the classifier's rows stand for")
    every: int = Field(ge=1, description="each n-th row of the table is classified, from the first on")
    size: int = Field(ge=32, description="side of the square, in pixels")
    metric: Literal["top1", "top5"] = Field(description="share of pictures whose class is among the first")
    value: float = Field(ge=0, le=1, description="as measured when the encoder was prepared")
    tolerance: float = Field(gt=0, lt=1, description="largest absolute difference that passes")


class Manifest(Settings):
    """One data set."""

    name: str = Field(pattern="^[a-z0-9][a-z0-9-]*$")
    title: str
    description: str
    licence: str
    redistribute: bool
    citation: str
    intended_use: str
    prepared_by: str
    upstream: tuple[Upstream, ...] = ()
    files: dict[str, DataFile] = Field(min_length=1)
    checks: dict[str, EncoderCheck] = Field(default={}, description="encoder name -> its accuracy")

    @model_validator(mode="after")
    def _tables_say_what_they_hold(self) -> "Manifest":
        for name, file in self.files.items():
            given = [value is not None for value in (file.rows, file.columns)]
            if given != [_is_table(name)] * 2:
                raise ValueError(f"{name}: rows and columns go with a .parquet file, and with no other")
        return self


def _is_table(name: str) -> bool:
    """Tell a table, whose rows and columns are checked, from weights or a list of labels."""
    return name.endswith(".parquet")


def manifest_folder() -> Path:
    """Return the folder of the manifests: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parent
    beside = package.parent / "data_manifests"
    return beside if beside.is_dir() else package / "_shipped" / "data_manifests"


def manifest_names() -> list[str]:
    """Return the names of all manifests, sorted."""
    return sorted(path.stem for path in manifest_folder().glob("*.yaml"))


def read_manifest(name: str, folder: Path | None = None) -> Manifest:
    """Read one manifest.

    Raises:
        ManifestError: no such manifest, or a key or value it must not have.
    """
    folder = folder or manifest_folder()
    if name not in [path.stem for path in folder.glob("*.yaml")]:
        raise ManifestError(f"no manifest named {name[:80]!r}; there are: {', '.join(manifest_names())}")
    path = folder / f"{name}.yaml"
    return validated(Manifest, read_yaml(path, ManifestError), f"manifest {path.name}", ManifestError)


def cache_folder() -> Path:
    """Return the user's cache folder, ``WORKBENCH_CACHE`` if that is set."""
    return Path(os.environ.get("WORKBENCH_CACHE") or platformdirs.user_cache_dir("workbench"))


def search_folders() -> list[Path]:
    """Return the folders in which prepared data sets are looked for, first match wins."""
    listed = os.environ.get("WORKBENCH_DATA", "").split(os.pathsep)
    return [*(Path(folder) for folder in listed if folder), cache_folder() / "data"]


def problems(manifest: Manifest, folder: Path) -> list[str]:
    """List everything in which a folder differs from its manifest; an empty list means it matches.

    The hash is checked before a file is opened as a table, so that a damaged file is never parsed.
    """
    found = []
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing")
            continue
        size, actual = path.stat().st_size, sha256_of(path)
        if actual != expected.sha256:
            hint = "cut short or changed" if size != expected.size else "changed"
            found.append(
                f"{path}: {hint}; expected {expected.size} bytes, sha256 {expected.sha256}, "
                f"got {size} bytes, sha256 {actual}"
            )
            continue
        if not _is_table(name):
            continue
        table = pl.scan_parquet(path)
        columns, rows = tuple(table.collect_schema().names()), table.select(pl.len()).collect().item()
        if columns != expected.columns:
            found.append(f"{path}: columns {columns}, the manifest says {expected.columns}")
        if rows != expected.rows:
            found.append(f"{path}: {rows} rows, the manifest says {expected.rows}")
    return found


def locate(name: str) -> Path | None:
    """Return the first search folder that holds a data set of this name, without checking it."""
    return next((folder / name for folder in search_folders() if (folder / name).is_dir()), None)


def verified_folder(name: str) -> Path:
    """Return the folder of a data set whose every file matches its manifest.

    Raises:
        ManifestError: not found (with the places searched), or files that differ.
    """
    manifest = read_manifest(name)
    folder = locate(name)
    if folder is None:
        places = ", ".join(str(place) for place in search_folders())
        raise ManifestError(
            f"data set {name} is not on this machine (searched: {places}). Set WORKBENCH_DATA to the "
            f"folder that holds {name}/, or run: workbench data prepare {name} --source FOLDER"
        )
    found = problems(manifest, folder)
    if found:
        raise ManifestError(f"data set {name} does not match its manifest: " + "; ".join(found))
    return folder


def install(name: str, source: Path) -> Path:
    """Copy the prepared files of a data set into the user's cache, verified before and published by rename.

    Raises:
        ManifestError: the files in ``source`` are not the ones the manifest describes.
    """
    manifest = read_manifest(name)
    found = problems(manifest, source)
    if found:
        raise ManifestError(
            f"{source} does not hold {name} as its manifest describes it: " + "; ".join(found)
        )
    final = cache_folder() / "data" / name
    private = final.with_name(f".{name}.{os.getpid()}")
    try:
        with clear_disk_errors(final):
            shutil.rmtree(private, ignore_errors=True)
            private.mkdir(parents=True)
            for file in manifest.files:
                shutil.copyfile(source / file, private / file)
            shutil.rmtree(final, ignore_errors=True)
            private.rename(final)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return final

"""Knowledge graphs with text: entities, relations and triples, read, checked and filtered.

A graph is a folder with the tables entities (id, name and, if there are any, description), relations (id,
name) and train, valid and test (head, relation, tail: ids of the first two or, if those hold no such ids, row
numbers). A triple asks two questions, (head, relation, ?) and (tail, inverse relation, ?), so the relations
of a model are the graph's and, after them, their inverses.

Shape letters: N triples, Q queries, E entities, R relations.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import polars.selectors as cs
import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from workbench.conditions import normalise_text
from workbench.config import Settings
from workbench.datasets.pairs import read_table
from workbench.errors import DataError
from workbench.manifests import verified_folder

SPLITS = ("train", "valid", "test")
TRIPLE = ("head", "relation", "tail")
TEXTS = ("name", "description")
_log = logging.getLogger(__name__)


class GraphData(Settings):
    """Which graph a recipe uses, and how an entity is written.

    ``source`` is "manifest" (a prepared set, by ``name``) or "files" (the user's own folder, ``path``).
    """

    source: Literal["manifest", "files"]
    name: str
    path: str | None = Field(default=None, exclude=True, description="not part of a run: its content is")
    description_words: int = Field(
        default=40, ge=0, description="of an entity's description; 0 for names only"
    )
    neighbours: int = Field(
        default=0, ge=0, description="names of train neighbours added where a description has under 20 words"
    )
    limit: int | None = Field(default=None, gt=0, description="use only so many triples of each split")

    @model_validator(mode="after")
    def _files_have_a_path(self) -> "GraphData":
        if (self.source == "files") != (self.path is not None):
            raise ValueError("path goes with source: files, and with no other")
        return self


@dataclass(frozen=True)
class Graph:
    """A graph as texts and indices.

    Attributes:
        entities: one text per entity.
        relations: one text per relation, the inverses after the relations themselves.
        triples: per split, head, relation and tail as row numbers.
    """

    entities: list[str]
    relations: list[str]
    triples: dict[str, Int[Tensor, "N 3"]]

    def queries(self, split: str) -> Int[Tensor, "Q 3"]:
        """Return both questions of every triple: first all (head, relation, tail), then all inverses."""
        found = self.triples[split]
        inverse = torch.stack([found[:, 2], found[:, 1] + len(self.relations) // 2, found[:, 0]], 1)
        return torch.cat([found, inverse])

    def known(self, splits: Iterable[str] = SPLITS) -> "KnownTails":
        """Return the true tails of every question, of the given splits."""
        queries = torch.cat([self.queries(split) for split in splits if split in self.triples])
        return KnownTails.of(queries, len(self.relations))


@dataclass(frozen=True)
class KnownTails:
    """The true tails of every (head, relation), as one sorted list of numbers and where each question starts.

    Memory grows with the triples and not with entities times relations.
    """

    keys: Int[Tensor, " K"]
    offsets: Int[Tensor, " K_plus_1"]
    tails: Int[Tensor, " T"]
    relations: int

    @classmethod
    def of(cls, queries: Int[Tensor, "Q 3"], relations: int) -> "KnownTails":
        """Group the tails of questions by head and relation; a triple given twice counts once."""
        keys = queries[:, 0] * relations + queries[:, 1]
        rows = torch.stack([keys, queries[:, 2]], 1).unique(dim=0)
        keys, counts = rows[:, 0].unique_consecutive(return_counts=True)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(keys, offsets, rows[:, 1].contiguous(), relations)

    def to(self, device: torch.device | str) -> "KnownTails":
        """Move to a device."""
        return KnownTails(
            self.keys.to(device), self.offsets.to(device), self.tails.to(device), self.relations
        )

    def of_queries(
        self, head: Int[Tensor, " Q"], relation: Int[Tensor, " Q"]
    ) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"]]:
        """List the true tails of questions as pairs (number of the question, tail)."""
        key = (head * self.relations + relation).contiguous()
        place = torch.searchsorted(self.keys, key).clamp_max(len(self.keys) - 1)
        found = self.keys[place] == key
        counts = torch.where(found, self.offsets[place + 1] - self.offsets[place], 0)
        rows = torch.repeat_interleave(torch.arange(len(head), device=head.device), counts)
        within = torch.arange(len(rows), device=head.device) - (counts.cumsum(0) - counts)[rows]
        return rows, self.tails[self.offsets[place][rows] + within]


def load_graph(data: GraphData) -> Graph:
    """Read and check a graph.

    Raises:
        DataError: a table is missing or cannot be used; the message names the table, the row and the fix.
        ManifestError: a prepared graph is missing or damaged.
    """
    if data.source == "manifest":
        folder = verified_folder(data.name)
        tables = {
            name: pl.read_parquet(folder / f"{name}.parquet") for name in ("entities", "relations", *SPLITS)
        }
    else:
        tables = _read_folder(Path(data.path))
    entities, relations = tables["entities"], tables["relations"]
    _check_ids(entities, f"{data.name}, entities")
    _check_ids(relations, f"{data.name}, relations")
    triples = {}
    for split in SPLITS:
        triples[split] = _triples(tables[split], entities, relations, f"{data.name}, {split}")
        if data.limit:
            triples[split] = triples[split][: data.limit]
    _check_splits(triples, tables, data.name)
    names = [normalise_text(name, f"{data.name}, relations: name in row {row}")
             for row, name in enumerate(relations["name"])]  # fmt: skip
    texts = _entity_texts(entities, triples["train"], data)
    both = [*names, *(f"inverse {name}" for name in names)]
    return Graph(texts, both, triples)


def _read_folder(folder: Path) -> dict[str, pl.DataFrame]:
    """Read the user's own tables, each a CSV or Parquet file."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one with entities, relations, train, valid and test")
    tables = {}
    for name in ("entities", "relations", *SPLITS):
        found = [folder / f"{name}{ending}" for ending in (".parquet", ".csv")]
        path = next((path for path in found if path.is_file()), None)
        if path is None:
            raise DataError(f"{folder} has no {name}.csv or {name}.parquet")
        # A column of names such as 1984 reads as numbers.
        tables[name] = read_table(path).with_columns(cs.by_name(*TEXTS, require_all=False).cast(pl.String))
    return tables


def _check_ids(table: pl.DataFrame, source: str) -> None:
    """Check that ids and names are there and no id stands twice."""
    missing = [column for column in ("id", "name") if column not in table.columns]
    if missing or table.height == 0:
        raise DataError(
            f"{source}: needs the columns id and name and at least one row; found {table.columns}"
        )
    twice = table.filter(pl.col("id").is_duplicated())["id"]
    if len(twice):
        raise DataError(f"{source}: the id {twice[0]!r} stands in more than one row; remove the others")


def _triples(
    table: pl.DataFrame, entities: pl.DataFrame, relations: pl.DataFrame, source: str
) -> Int[Tensor, "N 3"]:
    """Turn ids into row numbers and refuse what is not in the tables."""
    missing = [column for column in TRIPLE if column not in table.columns]
    if missing or table.height == 0:
        raise DataError(f"{source}: needs the columns head, relation, tail and a row; found {table.columns}")
    columns = []
    for name, known in zip(TRIPLE, (entities, relations, entities), strict=True):
        column, what = table[name], "relation" if name == "relation" else "entity"
        place = {key: row for row, key in enumerate(known["id"].cast(pl.String))}
        if column.dtype.is_integer() and not any(str(key) in place for key in column):
            bad = (column < 0) | (column >= known.height)
        else:
            column = pl.Series(name, [place.get(str(key)) for key in table[name]], dtype=pl.Int64)
            bad = column.is_null()
        bad = bad.fill_null(True)
        if bad.any():
            row = bad.arg_true()[0]
            raise DataError(
                f"{source}: row {row} has the {name} {table[name][row]!r}: no such {what} in the table of "
                f"{'relations' if what == 'relation' else 'entities'} ({known.height} rows); add it there "
                "or remove the triple"
            )
        columns.append(torch.from_numpy(column.to_numpy().astype(np.int64)))
    found = torch.stack(columns, 1)
    distinct = len(found.unique(dim=0))
    if distinct < len(found):
        seen: set[tuple[int, ...]] = set()
        row = next(row for row, one in enumerate(map(tuple, found.tolist())) if one in seen or seen.add(one))
        raise DataError(
            f"{source}: {len(found) - distinct} triples stand twice, the first in row {row}; remove them, or "
            "they count twice"
        )
    return found


def _check_splits(triples: dict[str, Tensor], tables: dict[str, pl.DataFrame], source: str) -> None:
    """Refuse a triple that two splits claim; say how many test triples name an entity train never shows."""
    owner: dict[tuple[int, ...], str] = {}
    for split, found in triples.items():
        for row, one in enumerate(map(tuple, found.tolist())):
            if one in owner:
                raise DataError(
                    f"{source}: the triple in row {row} of {split} also stands in {owner[one]}: a question "
                    "whose answer was trained on says nothing; remove it from one of them"
                )
            owner[one] = split
    trained = triples["train"][:, [0, 2]].unique()
    new = ~torch.isin(triples["test"][:, [0, 2]], trained).all(1)
    if new.any():
        _log.warning(
            "%s: %d of %d test triples name an entity that train never shows; they are ranked by text alone "
            "and reported apart as entity=unseen", source, int(new.sum()), len(new),
        )  # fmt: skip


def _entity_texts(entities: pl.DataFrame, train: Tensor, data: GraphData) -> list[str]:
    """Write each entity as "name: description", with neighbours where that is short."""
    about = entities["description"] if "description" in entities.columns else [""] * entities.height
    names = [(name or "").strip() for name in entities["name"]]
    texts = []
    near = _neighbours(train, entities.height) if data.neighbours else None
    for row, (name, long) in enumerate(zip(names, about, strict=True)):
        words = (long or "").split()
        if near is not None and len(words) < 20:
            words += [names[other] for other in near[row][: data.neighbours] if names[other]]
        text = ": ".join(part for part in (name, " ".join(words[: data.description_words])) if part)
        if not text:
            raise DataError(
                f"{data.name}, entities: row {row} ({entities['id'][row]!r}) has neither a name nor a "
                "description; a text encoder has nothing to read. Add one, or remove the entity"
            )
        texts.append(normalise_text(text, f"{data.name}, entities: row {row}"))
    return texts


def _neighbours(train: Tensor, entities: int) -> list[list[int]]:
    """List each entity's neighbours in the train graph, by their row."""
    found: list[set[int]] = [set() for _ in range(entities)]
    for head, _, tail in train.tolist():
        found[head].add(tail)
        found[tail].add(head)
    return [sorted(one) for one in found]

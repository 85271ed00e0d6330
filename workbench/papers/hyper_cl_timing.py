"""Hyper-CL's Tables 3 and 4: inference time, hit rate and cache size, at batch 1 and at a fair batch.

A row asks for texts; a text seen before is a hit and comes from the cache, another is encoded and kept. A
bi-encoder asks for every sentence together with its condition (WN18RR: head together with relation, and the
tail); a tri-encoder for each text alone, and keeps a condition's generated matrix instead of its vector.

Hits and bytes follow from counting. Seconds are measured on a sample (texts encoded one at a time or in a
batch, matrices generated, rows compared) and added up over all misses and rows:

    seconds = misses * s_encode + conditions * s_generate + rows * s_compare

Source: Yoo et al. (2024), tables 3 and 4 (all splits, cache empty at first, float32; a kept tensor takes 48
bytes beside its numbers, and the low-rank cache holds both factors).
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch
from pydantic import Field
from torch.nn import functional

from workbench.config import Settings
from workbench.datasets.graphs import GraphData, load_graph
from workbench.datasets.pairs import COLUMNS, check_columns, read_table, split_files
from workbench.errors import DataError
from workbench.files import digest
from workbench.hypernetworks import Rows
from workbench.hypernetworks.generators import standardise
from workbench.papers.comparison import METRIC_COLUMNS, Comparison, ComparisonRecipe, Loaded
from workbench.papers.hyper_cl import Batch, ConditionedHead
from workbench.papers.hyper_cl_settings import ModelSettings
from workbench.store import EmbeddingStore

OVERHEAD = 48  # bytes of a kept tensor beside its numbers
WIDTHS = (768, 1024)  # of the paper's encoders, whose cache sizes are counted too


class TimingModel(Settings):
    """One row of the table."""

    name: str = Field(pattern="^[a-z][a-z0-9_]*$")
    kind: Literal["bi_encoder", "hadamard", "concat", "hyper"]
    low_rank: bool = Field(default=False, description="two factors of rank width / 12, as published")
    against: str | None = None

    def rank_at(self, width: int) -> int | None:
        """Rank of the generated factors at a width; None for the full matrix."""
        return width // 12 if self.low_rank else None


class TimingData(Settings):
    """Which rows: pairs under conditions, or a graph's triples."""

    source: Literal["manifest", "files"]
    name: str
    path: str | None = Field(default=None, exclude=True)
    label_range: tuple[float, float] = (0.0, 1.0)


class TimingRecipe(ComparisonRecipe):
    """Settings of one table."""

    paper: Literal["hyper_cl_timing"]
    task: Literal["pairs", "triples"]
    data: TimingData
    models: tuple[TimingModel, ...] = Field(min_length=1)
    reference: str = "bi_encoder"
    batch: int = Field(default=128, gt=1, description="the fair batch")
    sample: int = Field(default=256, ge=8, description="texts that are timed")


RECIPE = TimingRecipe


def needs_tokens(recipe: TimingRecipe) -> bool:
    """Pooled vectors only."""
    return False


def load_data(recipe: TimingRecipe) -> Loaded:
    """Read all splits as rows of three texts: sentence, sentence, condition, or head, tail, relation."""
    if recipe.data.path is None and (recipe.data.source == "files" or recipe.task == "pairs"):
        raise DataError(f"{recipe.data.name} is not shipped with the workbench; give it with --data PATH")
    if recipe.task == "triples":
        settings = recipe.data.model_dump(mode="json", exclude={"label_range"})
        graph = load_graph(GraphData(**settings, path=recipe.data.path))
        rows = [
            (graph.entities[head], graph.entities[tail], graph.relations[relation])
            for found in graph.triples.values()
            for head, relation, tail in found.tolist()
        ]
    else:
        # Labels play no part, so splits whose labels are withheld count too.
        tables = {
            path: read_table(path).with_columns(label=pl.lit(0))
            for path in split_files(Path(recipe.data.path)).values()
        }
        checked = [check_columns(table, str(path)) for path, table in tables.items()]
        rows = [row for table in checked for row in table.select(COLUMNS[:3]).iter_rows()]
        if not rows:
            raise DataError(f"{recipe.data.path}: no rows in any of its files; give at least one pair")
    counts = {"all": {"rows": len(rows), "conditions": len({row[2] for row in rows})}}
    return Loaded(rows, digest(*(text for row in rows for text in row)), counts)


def cache_of(
    model: TimingModel, task: str, rows: list[tuple[str, str, str]], width: int
) -> tuple[int, int, int]:
    """Count lookups, misses and bytes of the cache once all rows were asked.

    Returns:
        lookups, misses (texts encoded), and bytes.
    """
    conditions = {row[2] for row in rows}
    if model.kind == "bi_encoder":
        if task == "pairs":
            kept = {(side, row[2]) for row in rows for side in row[:2]}
        else:
            kept = {(row[0], row[2]) for row in rows} | {(row[1],) for row in rows}
        return 2 * len(rows), len(kept), len(kept) * (4 * width + OVERHEAD)
    texts = {side for row in rows for side in row[:2]}
    misses = len(texts) + len(conditions)
    kept_bytes = len(texts) * (4 * width + OVERHEAD)
    if model.kind != "hyper":
        each = 4 * width + OVERHEAD
    elif model.low_rank:
        each = 2 * (4 * width * model.rank_at(width) + OVERHEAD)
    else:
        each = 4 * width * width + OVERHEAD
    return 3 * len(rows), misses, kept_bytes + len(conditions) * each


def compare(
    recipe: TimingRecipe,
    rows: list[tuple[str, str, str]],
    store: EmbeddingStore,
    workspace: Path,
    device: str,
) -> Comparison:
    """Count and time; see the module's description."""
    values: list[dict[str, Any]] = []
    encoder = store.encoder
    for model in recipe.models:
        lookups, misses, kept = cache_of(model, recipe.task, rows, encoder.width)
        found = {"hit_rate": 1 - misses / lookups, "cache_mib": kept / 2**20}
        for width in WIDTHS:
            found[f"cache_mib_{width}"] = cache_of(model, recipe.task, rows, width)[2] / 2**20
        for batch in (1, recipe.batch):
            found[f"seconds_batch_{batch}"] = _seconds(recipe, model, rows, encoder, batch, misses)
        values += [
            {"model": model.name, "metric": name, "value": value, "low": value, "high": value}
            for name, value in found.items()
        ]
    same = {"paper": recipe.paper, "recipe": recipe.name, "dataset": recipe.data.name, "split": "all"}
    same |= {"group": "all", "count": len(rows), "seed": None}
    frame = pl.DataFrame([{**same, **value} for value in values], schema=METRIC_COLUMNS)
    return Comparison(frame, pl.DataFrame({"model": [model.name for model in recipe.models]}), [])


@torch.inference_mode()
def _seconds(
    recipe: TimingRecipe, model: TimingModel, rows: list[Any], encoder: Any, batch: int, misses: int
) -> float:
    """Add up what all misses and rows cost, from a timed sample."""
    device, width = encoder.model.device, encoder.width
    step = max(1, len(rows) // recipe.sample)
    some = rows[::step][: recipe.sample]
    if model.kind == "bi_encoder":
        texts = [f"{row[2]} {row[0]}" for row in some]
    else:
        # A cache miss is a sentence or a condition in these proportions.
        conditions = len({row[2] for row in rows})
        share = round(len(some) * conditions / misses)
        texts = [row[0] for row in some[share:]] + [row[2] for row in some[:share]]
    parts = [texts[start : start + batch] for start in range(0, len(texts), batch)]
    total = misses * _timed(lambda: [encoder.encode(part, batch) for part in parts]) / len(texts)
    if model.kind == "bi_encoder":
        vectors = torch.randn(2, batch, width, device=device)
        return total + len(rows) * _timed(lambda: functional.cosine_similarity(*vectors)) / batch
    settings = ModelSettings(name=model.name, kind=model.kind, rank=model.rank_at(width))
    head = ConditionedHead(settings, width, width).to(device).eval()
    asked = standardise(functional.normalize(torch.randn(batch, width, device=device), dim=1))
    sides, places = torch.randn(2 * batch, width, device=device), torch.arange(batch, device=device)
    if head.generator is not None:
        total += len({row[2] for row in rows}) * _timed(lambda: head.generator(asked)) / batch
    both = Rows.of(torch.arange(2 * batch, device=device))
    block = Batch(sides, None, None, both, asked, Rows.of(places.repeat(2)))
    weights = head.generator(asked) if head.generator is not None else None
    compared = _timed(lambda: functional.cosine_similarity(*head(block, weights).chunk(2)))
    return total + len(rows) * compared / batch


def _timed(action: Callable[[], object], repeats: int = 3) -> float:
    """Return the shortest of a few durations, in seconds; the first call warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])

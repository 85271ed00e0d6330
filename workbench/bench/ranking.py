"""Filtered ranking at the size of WN18RR: counted ranks beside a full sort, and beside pykeen's evaluator.

Random unit vectors stand for entities and queries: the time does not depend on their values. The number of
questions, entities and known answers is WN18RR's. The bare matrix product of queries and entities, in the
same blocks, is the floor.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.bench.timing import laid_out, median_seconds, peak_mib
from workbench.datasets.graphs import KnownTails
from workbench.evaluation import ranking
from workbench.evaluation.ranking import count_ranks, dot_scores

QUERIES, ENTITIES, RELATIONS, KNOWN, WIDTH = 6_268, 40_943, 22, 186_006, 384
SORTED_QUERIES = 256  # the sort is timed on so many and scaled
PYKEEN_BATCH = 256


def _sorted_ranks(queries: Tensor, entities: Tensor, asked: Tensor, known: KnownTails) -> Tensor:
    """Rank by a full sort of each query's scores, known answers set to minus one, a row at a time."""
    scores = queries @ entities.T
    found = []
    for row in range(len(asked)):
        own = scores[row, asked[row, 2]].clone()
        scores[row].index_fill_(0, known.of_queries(asked[row : row + 1, 0], asked[row : row + 1, 1])[1], -1)
        scores[row, asked[row, 2]] = own
        order = torch.sort(scores[row], descending=True).indices
        found.append(int((order == asked[row, 2]).nonzero()[0, 0]) + 1)
    return torch.tensor(found)


def _pykeen_ranks(queries: Tensor, entities: Tensor, asked: Tensor, positives: Tensor, batch: int) -> Tensor:
    """Rank with pykeen's evaluator, its filter and all, in batches of like size."""
    from pykeen.evaluation import RankBasedEvaluator
    from pykeen.evaluation.evaluator import create_sparse_positive_filter_, filter_scores_

    evaluator = RankBasedEvaluator()
    for part, hrt in zip(queries.split(batch), asked.split(batch), strict=True):
        scores = part @ entities.T
        own = scores.gather(1, hrt[:, 2:])
        filtered, _ = create_sparse_positive_filter_(hrt, positives, filter_col=2)
        scores = filter_scores_(scores, filtered)
        scores.scatter_(1, hrt[:, 2:], own)
        evaluator.process_scores_(hrt, "tail", scores, own)
    return torch.cat([torch.as_tensor(part) for part in evaluator.ranks["tail", "realistic"]])


def rows(device: str = "cpu") -> list[dict[str, Any]]:
    """Measure; see :func:`workbench.bench.run_bench` for the columns."""
    generator = torch.Generator().manual_seed(0)

    def drawn(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    queries, entities = (
        functional.normalize(torch.randn(count, WIDTH, generator=generator), dim=1).to(device)
        for count in (QUERIES, ENTITIES)
    )
    positives = torch.stack([drawn(ENTITIES, KNOWN), drawn(RELATIONS, KNOWN), drawn(ENTITIES, KNOWN)], 1)
    asked, positives = positives[:QUERIES].to(device), positives.to(device)
    known = KnownTails.of(positives, RELATIONS)

    def ours() -> Tensor:
        def true(rows: slice) -> tuple[Tensor, Tensor]:
            return known.of_queries(asked[rows, 0], asked[rows, 1])

        return count_ranks(dot_scores(queries, entities), asked[:, 2], ENTITIES, true).realistic

    def bare() -> None:
        size = max(1, ranking.BLOCK_BYTES // (4 * ENTITIES))
        score = dot_scores(queries, entities)
        for start in range(0, QUERIES, size):
            score(slice(start, start + size))

    first = slice(0, min(SORTED_QUERIES, QUERIES))
    torch.testing.assert_close(
        ours()[first], _sorted_ranks(queries[first], entities, asked[first], known).double().to(device)
    )
    seconds, memory = median_seconds(ours, device), peak_mib(ours, device)
    size = f"ranking, {QUERIES:,} questions x {ENTITIES:,} entities"
    found = [laid_out(f"{size}, beside the bare matrix product", seconds, median_seconds(bare, device),
                      memory, peak_mib(bare, device))]  # fmt: skip

    def by_sort() -> Tensor:
        return _sorted_ranks(queries[first], entities, asked[first], known)

    scaled = median_seconds(by_sort, device, repeats=1) * QUERIES / len(asked[first])
    found.append(
        laid_out(f"{size}, full sort (scaled from {len(asked[first])})", seconds, scaled, memory,
                 peak_mib(by_sort, device))
    )  # fmt: skip
    if importlib.util.find_spec("pykeen"):

        def theirs() -> Tensor:
            return _pykeen_ranks(queries, entities, asked, positives, PYKEEN_BATCH)

        torch.testing.assert_close(ours(), theirs().double())
        slow = median_seconds(theirs, device, repeats=1, warm=0)
        found.append(laid_out(f"{size}, pykeen's evaluator", seconds, slow, memory, peak_mib(theirs, device)))
    return found

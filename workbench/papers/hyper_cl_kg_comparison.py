"""Trains and ranks every model of a knowledge-graph recipe; a killed run loses one model at most."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from workbench.datasets.graphs import Graph, KnownTails, load_graph
from workbench.encoders import TextEncoder
from workbench.evaluation.ranking import Ranks, count_ranks, metric_values, resample
from workbench.evaluation.similarity import Measured
from workbench.files import digest
from workbench.geometry.uniformity import placement, spaced
from workbench.hypernetworks import health_of
from workbench.hypernetworks.generators import standardise
from workbench.papers.comparison import (
    METRIC_COLUMNS,
    Clock,
    Comparison,
    Found,
    Loaded,
    card_of,
    finished_or,
    keep_head,
    metric_rows,
    run_models,
    training_folder,
)
from workbench.papers.hyper_cl_kg import (
    FrozenTexts,
    GraphHead,
    GraphLoss,
    GraphReader,
    Neighbourhood,
    Ranker,
)
from workbench.papers.hyper_cl_kg_settings import UNTRAINED, GraphModelSettings, HyperCLGraphRecipe
from workbench.store import EmbeddingStore
from workbench.training import fit, seed_everything

RECIPE = HyperCLGraphRecipe
SPLITS = ("valid", "test")


def needs_tokens(recipe: HyperCLGraphRecipe) -> bool:
    """Graph models read pooled vectors only."""
    return False


def load_data(recipe: HyperCLGraphRecipe) -> Loaded:
    """Read the recipe's graph; see :func:`workbench.datasets.graphs.load_graph`."""
    graph = load_graph(recipe.data)
    counts = {split: {"triples": len(found)} for split, found in graph.triples.items()}
    counts["graph"] = {"entities": len(graph.entities), "relations": len(graph.relations) // 2}
    raw = [found.numpy().tobytes() for _, found in sorted(graph.triples.items())]
    return Loaded(graph, digest(*graph.entities, *graph.relations, *raw), counts)


def compare(
    recipe: HyperCLGraphRecipe, graph: Graph, store: EmbeddingStore, workspace: Path, device: str
) -> Comparison:
    """Run a recipe.

    Args:
        recipe: settings.
        graph: texts and triples.
        store: embeds texts.
        workspace: private folder; finished models in its folder training are reused, kept heads go to its
            folder models.
        device: as torch names devices.

    Raises:
        RunError: a training diverged, or the disk is full; finished models stay in the workspace.
    """
    store.prepare([*graph.entities, *graph.relations])
    texts = FrozenTexts(store.embed(graph.entities), standardise(store.embed(graph.relations))).to(device)
    known = graph.known()
    near = Neighbourhood(graph, recipe.rerank.hops, recipe.rerank.weight) if recipe.rerank else None

    def train(model: GraphModelSettings, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        job = _Job(recipe, model, seed, graph, texts, known, near, store.encoder, workspace)
        return finished_or(training_folder(workspace, model.name, seed), job.train)

    found = run_models(recipe, UNTRAINED, lambda kind: _baseline_ranks(kind, graph, texts, known), train)
    return Comparison(
        _metrics(recipe, graph, found), _rank_table(graph, found), [item.card for item in found]
    )


@dataclass(frozen=True)
class _Job:
    """One model under one seed."""

    recipe: HyperCLGraphRecipe
    model: GraphModelSettings
    seed: int
    graph: Graph
    texts: FrozenTexts
    known: KnownTails
    near: Neighbourhood | None
    encoder: TextEncoder
    workspace: Path

    def train(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Train and rank; results are optimistic and pessimistic ranks by split."""
        recipe, model, graph = self.recipe, self.model, self.graph
        device = self.texts.relations.device
        seed_everything(self.seed)
        clock = Clock(device)
        texts, rates = self.texts, {}
        if recipe.finetuning:
            texts = GraphReader(self.encoder, recipe.finetuning, graph).to(device)
            rates = {"texts.reader.": recipe.finetuning.learning_rate}
        relations, width = len(graph.relations), self.texts.entities.shape[1]
        one_hot = None
        if model.condition == "one_hot":
            one_hot = standardise(torch.eye(relations, device=device))
        head = GraphHead(model, width, width if one_hot is None else relations).to(device)
        start = head.generator.head.weight.detach().clone() if head.generator is not None else None
        training = recipe.training.at_rate(model.learning_rate)
        loss = GraphLoss(head, texts, graph, one_hot, training.batch_size).to(device)
        history = fit(loss, loss, loss.count, training, folder, seed=self.seed, rates=rates)
        cost = clock.stop()
        ranker = Ranker.of(loss, relations)
        results = {}
        for split, rerank, ranks in self._all_ranks(ranker):
            results |= {f"{split}{rerank}.optimistic": ranks.optimistic.cpu()}
            results |= {f"{split}{rerank}.pessimistic": ranks.pessimistic.cpu()}
        card = card_of(model, self.seed, loss, cost, history)
        card["geometry"] = {"split": "test", **_placement(ranker, graph)}
        card["temperature"] = float(torch.exp(-head.log_scale.detach()))
        if start is not None and model.kind == "hyper":  # one generated number has no directions
            card["health"] = health_of(head.generator, ranker.relations, start).to_dict()
            card["cost"] = head.generator.cost()
        if model.keep_weights and self.seed == recipe.seeds[0] and recipe.finetuning is None:
            self._keep(head, width)
        return results, card

    def _all_ranks(self, ranker: Ranker) -> Iterator[tuple[str, str, Ranks]]:
        """Rank valid and test, plainly and, if the recipe asks for it, re-ranked."""
        known = self.known.to(ranker.entities.device)
        for split in SPLITS:
            asked = self.graph.queries(split).to(ranker.entities.device)
            yield split, "", ranker.ranks(asked, known)
            if self.near is not None:
                yield split, ".rerank", ranker.ranks(asked, known, self.near)

    def _keep(self, head: GraphHead, width: int) -> None:
        """Keep a trained head with the run."""
        about = {"settings": self.model.model_dump(mode="json"), "width": width}
        about |= {"encoder": self.recipe.encoder, "relations": self.graph.relations}
        keep_head(self.workspace / "models" / self.model.name, head, about)


@torch.inference_mode()
def _placement(ranker: Ranker, graph: Graph) -> dict[str, float | int | None]:
    """Say how near queries and their true tails lie, and how evenly entities do, on some of many."""
    asked = graph.queries("test").to(ranker.entities.device)
    heads, relations, tails = asked[spaced(len(asked))].unbind(1)
    queries = ranker.queries(heads, relations)[0]
    return placement(queries, ranker.entities[tails], ranker.entities[spaced(len(ranker.entities))])


@torch.inference_mode()
def _baseline_ranks(kind: str, graph: Graph, texts: FrozenTexts, known: KnownTails) -> dict[str, Tensor]:
    """Rank without training.

    Args:
        kind: "frequency" (how often train shows a tail under the relation: the floor, which never sees the
            head) or "cosine" (of the plain embeddings, which never sees the relation).
        graph: the questions.
        texts: the embeddings.
        known: the true tails of all splits.
    """
    train = graph.queries("train")
    entities, relations = len(graph.entities), len(graph.relations)
    counts = torch.zeros(relations, entities)
    counts.index_put_((train[:, 1], train[:, 2]), torch.ones(len(train)), accumulate=True)
    embedded, results = texts.entities.cpu(), {}
    for split in SPLITS:
        heads, asked, tails = graph.queries(split).unbind(1)

        def scores(rows: slice, heads: Tensor = heads, asked: Tensor = asked) -> Tensor:
            return counts[asked[rows]] if kind == "frequency" else embedded[heads[rows]] @ embedded.T

        def true(rows: slice, heads: Tensor = heads, asked: Tensor = asked) -> tuple[Tensor, Tensor]:
            return known.of_queries(heads[rows], asked[rows])

        ranks = count_ranks(scores, tails, entities, true)
        results |= {f"{split}.optimistic": ranks.optimistic, f"{split}.pessimistic": ranks.pessimistic}
    return results


def _ranks_of(item: Found, split: str, rerank: str = "") -> Ranks:
    return Ranks(item.results[f"{split}{rerank}.optimistic"], item.results[f"{split}{rerank}.pessimistic"])


def _metrics(recipe: HyperCLGraphRecipe, graph: Graph, found: list[Found]) -> pl.DataFrame:
    """Measure all models on all splits and groups."""
    against = {model.name: model.against for model in recipe.models}
    rows = []
    for split in SPLITS:
        kinds = {
            "": found,
            ".rerank": [item for item in found if f"{split}.rerank.optimistic" in item.results],
        }
        for rerank, items in kinds.items():
            if not items:
                continue
            ranks = [_ranks_of(item, split, rerank) for item in items]
            groups = _groups(graph, split, recipe) if not rerank else [("", slice(None))]
            for name, chosen in groups:
                group = f"rerank={recipe.rerank.hops} hops" if rerank else name
                place = {"split": split, "group": group}
                rows += [
                    {**place, **row}
                    for row in _group_rows(ranks, items, chosen, against, recipe, ties=name == "all")
                ]
    same = {"paper": recipe.paper, "recipe": recipe.name, "dataset": recipe.data.name}
    return pl.DataFrame([{**same, **row} for row in rows], schema=METRIC_COLUMNS)


def _group_rows(
    ranks: list[Ranks],
    items: list[Found],
    chosen: np.ndarray | slice,
    against: dict[str, str | None],
    recipe: HyperCLGraphRecipe,
    ties: bool,
) -> list[dict[str, Any]]:
    """Measure one group: realistic ranks by every metric, and MRR by the other two ways to break ties."""
    realistic = np.stack([one.realistic.numpy()[chosen] for one in ranks])
    values = metric_values(realistic)
    if ties:
        for way in ("optimistic", "pessimistic"):
            values[f"mrr_{way}"] = np.stack([1 / getattr(one, way).double().numpy()[chosen] for one in ranks])
    triple = np.tile(np.arange(len(ranks[0].optimistic) // 2), 2)[chosen]
    rows = []
    for metric, value in values.items():
        measured = Measured(value.mean(1), resample(value, triple, recipe.resamples))
        rows += [
            {**row, "count": value.shape[1]}
            for row in metric_rows(metric, measured, items, against, recipe.reference)
        ]
    return rows


def _groups(graph: Graph, split: str, recipe: HyperCLGraphRecipe) -> list[tuple[str, np.ndarray]]:
    """List the groups of a split's questions as name and mask."""
    asked = graph.queries(split).numpy()
    half, relations = len(asked) // 2, len(graph.relations) // 2
    groups = [("all", np.ones(len(asked), dtype=bool))]
    if "direction" in recipe.group_by:
        forward = np.arange(len(asked)) < half
        groups += [("direction=tail", forward), ("direction=head", ~forward)]
    if "entity" in recipe.group_by:
        trained = graph.triples["train"][:, [0, 2]].unique().numpy()
        seen = np.isin(asked[:, [0, 2]], trained).all(1)
        if not seen.all():
            groups += [("entity=seen", seen), ("entity=unseen", ~seen)]
    if "relation" in recipe.group_by:
        both = asked[:, 1] % relations
        groups += [
            (f"relation={graph.relations[relation]}", both == relation) for relation in np.unique(both)
        ]
    return [(name, chosen) for name, chosen in groups if chosen.any()]


def _rank_table(graph: Graph, found: list[Found]) -> pl.DataFrame:
    """Lay all ranks out as one table, questions by their row numbers; no text."""
    parts = []
    for item in found:
        for split in SPLITS:
            ranks = _ranks_of(item, split)
            asked = graph.queries(split).numpy()
            parts.append(
                pl.DataFrame(
                    {
                        "split": split,
                        "model": item.model,
                        "seed": pl.Series([item.seed] * len(asked), dtype=pl.Int64),
                        **dict(zip(("head", "relation", "tail"), asked.T, strict=True)),
                        "optimistic": ranks.optimistic.numpy(),
                        "pessimistic": ranks.pessimistic.numpy(),
                    }
                )
            )
    return pl.concat(parts)

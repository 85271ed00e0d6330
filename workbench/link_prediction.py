"""A trained graph model to ask: head and relation in, best tails out, for typed texts too."""

import json
from pathlib import Path

import polars as pl
import torch
from safetensors import SafetensorError
from torch.nn import functional

from workbench.conditions import normalise_text
from workbench.datasets.graphs import Graph
from workbench.encoders import TextEncoder
from workbench.errors import DataError, RunError
from workbench.hypernetworks import GeneratedWeights, Rows
from workbench.hypernetworks.generators import standardise
from workbench.manifests import cache_folder
from workbench.papers.comparison import fill_in
from workbench.papers.hyper_cl_kg import GraphHead
from workbench.papers.hyper_cl_kg_settings import GraphModelSettings
from workbench.store import EmbeddingStore


class LinkPredictor:
    """Ranks a graph's entities for (head, relation, ?); the relation's text generates the weights."""

    def __init__(
        self, head: GraphHead, graph: Graph, encoder: TextEncoder, cache: Path | None = None
    ) -> None:
        """Embed and adapt every entity once.

        Args:
            head: trained.
            graph: whose entities are ranked.
            encoder: the one the head was trained on.
            cache: folder of the embedding store; the user's cache if not given.
        """
        self.head, self.graph = head.eval(), graph
        self.store = EmbeddingStore(encoder, cache or cache_folder())
        with torch.inference_mode():
            self.entities = head.adapt_all(self.store.embed(graph.entities))
        self.known = graph.known()

    def to(self, device: torch.device | str) -> "LinkPredictor":
        """Compute on a device from now on; tables and weights come back on the CPU.

        Args:
            device: as torch names devices.
        """
        self.head.to(device)
        self.store.to(device)
        self.entities = self.entities.to(device)
        return self

    @classmethod
    def load(cls, folder: Path, graph: Graph, encoder: TextEncoder | None = None) -> "LinkPredictor":
        """Load a head that a run kept.

        Raises:
            RunError: a file is missing or damaged, or the head was trained on other relations.
        """
        try:
            about = json.loads((folder / "head.json").read_text("utf-8"))
            settings = GraphModelSettings(**about["settings"])
            relations = len(about["relations"])
            width = relations if settings.condition == "one_hot" else about["width"]
            head = GraphHead(settings, about["width"], width)
            fill_in(head, folder / "head.safetensors")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as problem:
            reason = " ".join(str(problem).split())[:300]
            raise RunError(f"{folder} holds no usable graph head: {reason}. Train it again") from problem
        if about["relations"] != graph.relations:
            raise RunError(f"{folder} was trained on other relations than this graph has")
        return cls(head, graph, encoder or TextEncoder(about["encoder"]))

    def _features(self, relations: list[str]) -> torch.Tensor:
        """Return what the generator reads of relations; a text the graph does not know is embedded too."""
        clean = [normalise_text(text, "the relation") for text in relations]
        if self.head.settings.condition == "text":
            return standardise(self.store.embed(clean).to(self.entities.device))
        unknown = [text for text in clean if text not in self.graph.relations]
        if unknown:
            raise DataError(
                f"unknown relation {unknown[0]!r}: this head knows relations by number; there are: "
                f"{', '.join(self.graph.relations[:20])}"
            )
        places = torch.tensor([self.graph.relations.index(text) for text in clean])
        known = functional.one_hot(places, len(self.graph.relations)).float()
        return standardise(known.to(self.entities.device))

    @torch.inference_mode()
    def weights(self, relations: list[str]) -> GeneratedWeights:
        """Generate the weights of relations, each once, in their order.

        Raises:
            DataError: an empty relation, or a head that generates none.
        """
        if self.head.generator is None:
            raise DataError(f"model {self.head.settings.name} generates no weights")
        return self.head.generator(self._features(relations)).to("cpu")

    @torch.inference_mode()
    def predict(self, head: str, relation: str, k: int = 10) -> pl.DataFrame:
        """Rank the tails of (head, relation, ?).

        Args:
            head: an entity's text or its beginning up to the colon, or any text of your own.
            relation: a relation's text ("inverse ..." for the other direction), or one of your own.
            k: how many tails.

        Returns:
            rank, tail, score, and known (whether the graph holds this triple).

        Raises:
            DataError: an empty text, or k out of range.
        """
        if not 1 <= k <= len(self.graph.entities):
            raise DataError(f"k must lie in 1..{len(self.graph.entities)}, the number of entities, got {k}")
        text, relation = normalise_text(head, "the head"), normalise_text(relation, "the relation")
        every = self.graph.entities
        named = (row for row, one in enumerate(every) if one.split(": ")[0] == text)
        place = every.index(text) if text in every else next(named, None)  # a full text before a name
        there = {"device": self.entities.device}
        own_words = self.store.embed([text]).to(**there) if place is None else None
        embedded = self.entities[place, None] if own_words is None else self.head.adapt(own_words)
        one = Rows.of(torch.zeros(1, dtype=torch.long, **there))
        queries, own = self.head(embedded, self._features([relation]), one)
        scores = (queries @ self.entities.T)[0]
        true: list[int] = []
        if place is not None:
            scores[place] -= own[0]
            if relation in self.graph.relations:
                asked = torch.tensor([self.graph.relations.index(relation)])
                true = self.known.of_queries(torch.tensor([place]), asked)[1].tolist()
        best = scores.topk(k)
        return pl.DataFrame(
            {
                "rank": range(1, k + 1),
                "tail": [self.graph.entities[row] for row in best.indices.tolist()],
                "score": best.values.tolist(),
                "known": [row in true for row in best.indices.tolist()],
            }
        )

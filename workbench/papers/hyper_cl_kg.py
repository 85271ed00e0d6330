"""Hyper-CL on knowledge graphs: the tail of (head, relation, ?) (Yoo et al., ACL 2024, section 3.3).

The relation is the condition: its text generates the matrix that carries a head's embedding towards its
tails. Entities and relations are embedded apart, so a graph is ranked with E + R readings of text where a
bi-encoder that reads head and relation together needs one per question.

==============  =============================  =====================================================
here            in the paper                   meaning
==============  =============================  =====================================================
head, tail      h_head, h_t in R^D             entity embeddings, unit norm
relation        h_c                            embedding of the relation's text; inverses have their own
projection      W_r = H(h_c)                   generated matrix, full or low rank
query           h_hr = h_head W_r              what tails are compared with
temperature     tau                            learned divisor of the scores
==============  =============================  =====================================================

    (1)  score = phi(h_head W_r, h_t)                                                    section 3.2
    (2)  L = -log softmax over the tail and its negatives of score / tau, gamma off the tail's
    (3)  e <- normalise(e + MLP(e))                      one adapter for all entities    ours
    (4)  score -= max(0, b_r) if the candidate is the head itself,  b_r = H_b(h_c)       ours

Negatives: the other tails of the batch, random entities, tails of past batches (pre-batch) and the head
itself (self); candidates known to be true in train are left out. (4) because a head is its own nearest
neighbour, and hardly any relation holds between an entity and itself: without it a linear map has to push
the head away and loses the neighbourhood that answers the question.

Shape letters: B batch, E entities, R relations with inverses, U unique relations, M candidates, D width.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from workbench.datasets.graphs import Graph, KnownTails
from workbench.encoders import TextEncoder
from workbench.evaluation.ranking import Ranks, count_ranks, dot_scores
from workbench.finetuning import Finetuning, Reader, TokenIds
from workbench.hypernetworks import LinearGenerator, ParamSpec, Rows, Slot, project
from workbench.hypernetworks.generators import standardise
from workbench.papers.hyper_cl_kg_settings import GraphModelSettings

# --- embeddings: every entity once --------------------------------------------------------------------------


class FrozenTexts(nn.Module):
    """Embeddings of all entities and relations, computed before training."""

    def __init__(self, entities: Float[Tensor, "E D"], relations: Float[Tensor, "R D"]) -> None:
        """Keep unit-norm entities and relations of unit variance; they are no part of a checkpoint."""
        super().__init__()
        self.register_buffer("entities", entities, persistent=False)
        self.register_buffer("relations", relations, persistent=False)

    def embed_entities(self, wanted: Int[Tensor, " M"]) -> Float[Tensor, "M D"]:
        """Return the unit-norm embeddings of entities."""
        return self.entities[wanted]

    def every_entity(self) -> Float[Tensor, "E D"]:
        """Return the unit-norm embeddings of all entities."""
        return self.entities

    def embed_relations(self, wanted: Int[Tensor, " U"]) -> Float[Tensor, "U D"]:
        """Return the embeddings of relations, entries of unit variance."""
        return self.relations[wanted]


class GraphReader(nn.Module):
    """Entities and relations of a graph, read by one encoder in training; each once per batch."""

    def __init__(self, encoder: TextEncoder, settings: Finetuning, graph: Graph) -> None:
        """Tokenise every entity and relation once."""
        super().__init__()
        self.reader, device = Reader(encoder, settings), encoder.model.device
        self.entities, self.relations = (
            TokenIds.of(encoder, texts, device) for texts in (graph.entities, graph.relations)
        )

    def embed_entities(self, wanted: Int[Tensor, " M"]) -> Float[Tensor, "M D"]:
        """Return the unit-norm embeddings of entities."""
        return functional.normalize(self.reader(self.entities, wanted)[0], dim=-1)

    def every_entity(self) -> Float[Tensor, "E D"]:
        """Read all entities once, sorted by length."""
        return functional.normalize(self.reader.read_all(self.entities, tokens=False)[0], dim=-1)

    def embed_relations(self, wanted: Int[Tensor, " U"]) -> Float[Tensor, "U D"]:
        """Return the embeddings of relations, entries of unit variance if the settings say so."""
        return self.reader(self.relations, wanted)[0]


class GraphHead(nn.Module):
    """Entity and relation embeddings in, queries out: equations (1), (3) and (4)."""

    def __init__(self, settings: GraphModelSettings, width: int, condition_width: int) -> None:
        """Build one model.

        Args:
            settings: the row of the table.
            width: D.
            condition_width: D for relation texts, R for one-hot relations.
        """
        super().__init__()
        self.settings = settings
        slots = [Slot("self_weight", (1,), "vector", gain=0.1)] if settings.self_weight else []
        if settings.kind == "hyper":
            mode = "lowrank" if settings.rank else "full"
            slots.append(Slot("projection", (width, width), mode, settings.rank, settings.identity))
        spec = ParamSpec(tuple(slots), scaled=settings.start != "paper") if slots else None
        self.generator = (
            LinearGenerator(
                condition_width,
                spec,
                bottleneck=settings.bottleneck,
                transform=settings.start == "paper",
                dropout=settings.dropout,
            )
            if spec
            else None
        )
        self.shared = nn.Linear(width, width) if settings.kind == "hadamard" else None
        self.gate = nn.Linear(condition_width, width) if settings.kind == "hadamard" else None
        self.joint = nn.Linear(width + condition_width, width) if settings.kind == "concat" else None
        self.dropout = nn.Dropout(settings.dropout)
        self.adapter = None
        if settings.adapter:
            self.adapter = nn.Sequential(
                nn.Linear(width, settings.adapter), nn.GELU(), nn.Dropout(settings.dropout),
                nn.Linear(settings.adapter, width),
            )  # fmt: skip
            nn.init.zeros_(self.adapter[-1].weight)  # starts at the encoder's own embeddings
            nn.init.zeros_(self.adapter[-1].bias)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(settings.temperature)))

    def adapt(self, entities: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        """Return the unit-norm embeddings that are compared, equation (3)."""
        if self.adapter is None:
            return entities
        return functional.normalize(entities + self.adapter(standardise(entities)), dim=-1)

    def adapt_all(self, entities: Float[Tensor, "E D"]) -> Float[Tensor, "E D"]:
        """Adapt a whole table in blocks, so that the hidden layer never holds all of it."""
        return torch.cat([self.adapt(part) for part in entities.split(4096)])

    def forward(
        self, heads: Float[Tensor, "B D"], relations: Float[Tensor, "U C"], by_relation: Rows
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Return a query per row, and what is taken off the score of its own head."""
        weights = self.generator(relations) if self.generator is not None else None
        if self.settings.kind == "hyper":
            queries = project(heads, weights, by_relation)
        elif self.shared is not None:
            queries = self.shared(standardise(heads)) * by_relation.spread(self.gate(self.dropout(relations)))
        else:
            asked = by_relation.spread(self.dropout(relations))
            queries = self.joint(torch.cat([standardise(heads), asked], dim=-1))
        if self.settings.unit_query:
            queries = functional.normalize(queries, dim=-1)
        if not self.settings.self_weight:
            return queries, queries.new_zeros(len(queries))
        return queries, functional.relu(by_relation.spread(weights.tensors["self_weight"])[:, 0])


# --- the objective: equation (2) ----------------------------------------------------------------------------


class GraphLoss(nn.Module):
    """Loss of a batch of questions, each one (head, relation, ?) with its tail."""

    def __init__(
        self, head: GraphHead, texts: nn.Module, graph: Graph, one_hot: Tensor | None, batch: int
    ) -> None:
        """Keep the questions of train and what is true in train.

        Args:
            head: trained.
            texts: embeds entities and relations; frozen, or trained with the head.
            graph: whose train split is asked.
            one_hot: features of the relations instead of their texts, or None.
            batch: questions in a batch, the size of a pre-batch.
        """
        super().__init__()
        self.head, self.texts, self.one_hot = head, texts, one_hot
        device = next(head.parameters()).device
        self.queries, self.entities = graph.queries("train").to(device), len(graph.entities)
        self.known = graph.known(("train",)).to(device)
        # Buffers, so that a resumed training finds them again.
        past = head.settings.pre_batch * batch
        self.register_buffer("past", torch.full((past,), -1, device=device))

    @property
    def count(self) -> int:
        """Number of questions, two per triple."""
        return len(self.queries)

    def relation_features(self, wanted: Int[Tensor, " U"]) -> Float[Tensor, "U C"]:
        """Return what the model knows of relations: their texts, or only which they are."""
        return self.texts.embed_relations(wanted) if self.one_hot is None else self.one_hot[wanted]

    def forward(self, items: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """Return the mean loss of questions, given by their numbers."""
        settings = self.head.settings
        heads, relations, tails = self.queries[items.to(self.queries.device)].unbind(1)
        extra = [torch.randint(self.entities, (settings.random_negatives,), device=heads.device)]
        extra.append(self.past[self.past >= 0])
        candidates = torch.cat([tails, *extra]).unique()
        every, place = torch.cat([candidates, heads]).unique(return_inverse=True)
        embedded = self.head.adapt(self.texts.embed_entities(every))  # each entity once
        candidate, head = embedded[place[: len(candidates)]], embedded[place[len(candidates) :]]
        by_relation = Rows.of(relations)
        queries, own = self.head(head, self.relation_features(by_relation.unique), by_relation)
        gold = torch.searchsorted(candidates, tails.contiguous())
        scores = queries @ candidate.T - settings.margin * functional.one_hot(gold, len(candidates))
        scores = scores - own[:, None] * (candidates == heads[:, None])
        known = self.known.of_queries(heads, relations)
        mask = self._others_known(known, candidates, gold)
        if settings.self_negatives:
            self_score = (queries * head).sum(-1) - own
            here = (candidates == heads[:, None]).any(1)  # counted once, and not at all if it is an answer
            here[known[0][known[1] == heads[known[0]]]] = True
            scores = torch.cat([scores, self_score[:, None]], 1)
            mask = torch.cat([mask, here[:, None]], 1)
        else:
            mask = mask | ((candidates == heads[:, None]) & (candidates != tails[:, None]))
        logits = (scores * self.head.log_scale.exp()).masked_fill(mask, float("-inf"))
        loss = functional.cross_entropy(logits, gold)
        if settings.both_ways:
            # A tail that answers two questions of the batch is told from neither.
            same = (gold[:, None] == gold).fill_diagonal_(False)
            turned = logits[:, gold].T.masked_fill(mask[:, gold].T | same, float("-inf"))
            loss = (loss + functional.cross_entropy(turned, torch.arange(len(gold), device=gold.device))) / 2
        if len(self.past) and self.training:
            self.past = torch.cat([tails, self.past])[: len(self.past)]
        return loss

    @staticmethod
    def _others_known(known: tuple[Tensor, Tensor], candidates: Tensor, gold: Tensor) -> Tensor:
        """Mark candidates that are true answers too; the gold one stays."""
        rows, tails = known
        place = torch.searchsorted(candidates, tails).clamp_max(len(candidates) - 1)
        there = candidates[place] == tails
        mask = torch.zeros(len(gold), len(candidates), dtype=torch.bool, device=gold.device)
        mask[rows[there], place[there]] = True
        return mask.scatter(1, gold[:, None], False)


# --- ranks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranker:
    """All entities and relations as a trained model sees them, ready to be asked."""

    entities: Float[Tensor, "E D"]
    relations: Float[Tensor, "R C"]
    head: GraphHead

    @classmethod
    @torch.inference_mode()
    def of(cls, loss: GraphLoss, relations: int) -> "Ranker":
        """Embed every entity and every relation once."""
        asked = torch.arange(relations, device=loss.queries.device)
        return cls(loss.head.adapt_all(loss.texts.every_entity()), loss.relation_features(asked), loss.head)

    @torch.inference_mode()
    def queries(
        self, heads: Int[Tensor, " Q"], relations: Int[Tensor, " Q"]
    ) -> tuple[Float[Tensor, "Q D"], Float[Tensor, " Q"]]:
        """Return the query of each question and what is taken off its own head; one matrix per relation."""
        by_relation = Rows.of(relations)
        return self.head(self.entities[heads], self.relations[by_relation.unique], by_relation)

    @torch.inference_mode()
    def ranks(
        self, asked: Int[Tensor, "Q 3"], known: KnownTails | None, bonus: "Neighbourhood | None" = None
    ) -> Ranks:
        """Rank the tail of every question among all entities, filtered by what is known."""
        heads, relations, tails = asked.unbind(1)
        queries, own = self.queries(heads, relations)
        plain = dot_scores(queries, self.entities)

        def scores(rows: slice) -> Tensor:
            block = plain(rows)
            if self.head.settings.self_weight:
                block.scatter_add_(1, heads[rows, None], -own[rows, None])
            return block if bonus is None else bonus.add_to(block, heads[rows])

        def true(rows: slice) -> tuple[Tensor, Tensor]:
            return known.of_queries(heads[rows], relations[rows])

        return count_ranks(scores, tails, len(self.entities), true if known is not None else None)


class Neighbourhood:
    """Re-ranking by the train graph: entities within some steps of the head get a bonus.

    Source: Wang et al. (2022), SimKGC, section 3.4; Hyper-CL uses it for its WN18RR and FB15k-237 numbers.
    """

    def __init__(self, graph: Graph, hops: int, weight: float) -> None:
        """Build the train graph's adjacency, without direction, each entity its own neighbour."""
        from scipy.sparse import coo_array, eye_array

        train, size = graph.triples["train"].numpy(), len(graph.entities)
        ends = (train[:, 0], train[:, 2])
        links = coo_array(([True] * len(train), ends), shape=(size, size)).tocsr()
        self.links, self.hops, self.weight = (
            (links + links.T + eye_array(size, dtype=bool)).tocsr(),
            hops,
            weight,
        )

    def add_to(self, block: Float[Tensor, "B E"], heads: Int[Tensor, " B"]) -> Float[Tensor, "B E"]:
        """Add the weight to the scores of entities within reach of each row's head."""
        unique, back = torch.unique(heads.cpu(), return_inverse=True)
        reached = self.links[unique.numpy()]
        for _ in range(self.hops - 1):
            reached = reached @ self.links
        reached = reached[back.numpy()].tocoo()
        row, column = (torch.from_numpy(part.astype("int64")).to(block.device) for part in reached.coords)
        return block.index_put_((row, column), block.new_tensor(self.weight), accumulate=True)

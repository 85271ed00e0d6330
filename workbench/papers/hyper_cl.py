"""Hyper-CL: conditioning sentence representations with hypernetworks (Yoo, Cha, Kim and Kim, ACL 2024).

An encoder f, frozen or trained with the head, embeds sentences and conditions apart; what a condition
generates decides how two sentences are compared. Everything the paper compares, and the baselines it leaves
out, is one head with different settings.

==============  =============================  =====================================================
here            in the paper                   meaning
==============  =============================  =====================================================
sentence        h_s in R^D                     embedding of a sentence
condition       h_c in R^D                     embedding of a condition
projection      W_c, or W_c1 W_c2^T            generated D x D matrix, or its two D x K factors
query           (not in the paper)             generated vector that pools a sentence's tokens
similarity      phi                            cosine of two conditioned sentences
temperature     tau                            divisor of similarities in the contrastive term
==============  =============================  =====================================================

    (1)  h_sc = h_s W_c,  W_c = H(h_c)                            Hyper-CL, full               section 3.2
    (2)  h_sc = (h_s A_c) B_c,  A_c: D x K,  B_c: K x D           Hyper-CL, low rank           section 3.2
    (3)  h_sc = G h_c * F h_s                   Hadamard gate          baseline, section 2
    (4)  h_sc = V [h_s ; h_c]                   concatenation          baseline, section 2
    (5)  L = mean (phi - y)^2 + softplus(-(phi_high - phi_low) / tau)                          section 3.1
    (6)  h_s <- sum_l softmax_l(t_l . q_c / sqrt(D)) t_l,  q_c = H_q(h_c)                      ours
    (7)  h_sc = h_s (I + W_c)                                                                  ours
    (8)  h_s <- sum_l softmax_l(b t_l . h_c / sqrt(D)) t_l,  b > 0 learned                     sub-sentence

Deviations from the paper, all of them settings: the encoder is frozen unless a recipe trains it; vectors are
brought to unit variance and coefficients to the scale their slot needs (``start: paper`` undoes the latter);
both sentences of a row see the same dropout of the condition; the gate and the shared map are trained layers,
since a frozen encoder cannot adapt to the parameter-free product the paper uses.

(8) is the rival that generates nothing: tokens that are like the condition count, and one number is learned.
It stands for the sub-sentence encoder, which pools the tokens of a proposition (Chen et al. 2023, arXiv
2311.04335); there the tokens are marked, here they are found by their cosine with the condition.

Shape letters: N rows, S unique sentences, U unique conditions, D width, K rank, L tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from workbench.datasets.pairs import unique_texts
from workbench.encoders import TokenStates
from workbench.hypernetworks import (
    GeneratedWeights,
    LinearGenerator,
    ParamSpec,
    Rows,
    Slot,
    pool_tokens,
    project,
)
from workbench.hypernetworks.generators import standardise, token_scale
from workbench.objectives import pair_contrastive, same_condition_contrastive, similarity_mse
from workbench.papers.hyper_cl_settings import JOINT, ModelSettings
from workbench.store import EmbeddingStore

CITATION = "Yoo, Cha, Kim and Kim (2024), Hyper-CL, ACL 2024, arXiv 2403.09490"

# --- the head: equations (1) to (4), (6) and (7) ------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """N rows, each one sentence under one condition; every sentence and condition is held once."""

    sentences: Float[Tensor, "S D"]
    tokens: Float[Tensor, "S L D"] | None
    mask: Bool[Tensor, "S L"] | None
    by_sentence: Rows
    conditions: Float[Tensor, "U C"]
    by_condition: Rows


class ConditionedHead(nn.Module):
    """Frozen embeddings in, conditioned embeddings out."""

    def __init__(self, settings: ModelSettings, width: int, condition_width: int) -> None:
        """Build the head of one trained model.

        Args:
            settings: the row of the table.
            width: D, of the sentence embeddings.
            condition_width: C; D for texts, the number of trained conditions for one-hot ones.
        """
        super().__init__()
        self.settings, self.width, self.condition_width = settings, width, condition_width
        slots = []
        if settings.pooling == "condition":
            # A small start: softmax is nearly flat, so the pool starts near the mean of the tokens.
            slots.append(Slot("query", (width,), "vector", gain=0.3))
        if settings.kind == "hyper":
            mode = "lowrank" if settings.rank else "full"
            slots.append(Slot("projection", (width, width), mode, settings.rank, settings.identity))
        self.generator = None
        if slots:
            paper = settings.start == "paper"
            self.generator = LinearGenerator(
                condition_width,
                ParamSpec(tuple(slots), scaled=not paper),
                bottleneck=settings.bottleneck,
                transform=paper,
                dropout=settings.dropout,
            )
        self.query = nn.Parameter(torch.zeros(width)) if settings.pooling == "learned" else None
        # log b: one number, from 1 on.
        self.sharpness = nn.Parameter(torch.zeros(())) if settings.pooling == "similarity" else None
        self.shared = nn.Linear(width, width) if settings.kind in ("hadamard", "shared") else None  # F
        self.gate = nn.Linear(condition_width, width) if settings.kind == "hadamard" else None  # G
        self.joint = nn.Linear(width + condition_width, width) if settings.kind == "concat" else None  # V
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, batch: Batch, weights: GeneratedWeights | None = None) -> Float[Tensor, "N D"]:
        """Return one conditioned embedding per row, not normalised.

        Args:
            batch: the rows.
            weights: of the batch's conditions, if they were generated before.
        """
        if weights is None and self.generator is not None:
            weights = self.generator(batch.conditions)
        sentences = self._pooled(batch, weights)
        if self.settings.kind in JOINT:
            return sentences  # the encoder has read the condition already
        if self.settings.kind == "hyper":
            return project(sentences, weights, batch.by_condition)  # (1), (2), (7)
        if self.shared is not None:
            mapped = self.shared(sentences)
            if self.gate is None:
                return mapped
            gate = self.gate(self.dropout(batch.conditions))
            return mapped * batch.by_condition.spread(gate)  # (3)
        conditions = batch.by_condition.spread(self.dropout(batch.conditions))
        return self.joint(torch.cat([sentences, conditions], dim=-1))  # (4)

    def _pooled(self, batch: Batch, weights: GeneratedWeights | None) -> Float[Tensor, "N D"]:
        """Return each row's sentence: its embedding as it is, or its tokens pooled anew, (6) or (8)."""
        if self.settings.pooling == "sentence":
            return batch.by_sentence.spread(batch.sentences)
        if self.query is not None:
            queries = self.query.expand(len(batch.by_sentence), -1)
        elif self.sharpness is not None:
            queries = batch.by_condition.spread(batch.conditions) * self.sharpness.exp()
        else:
            queries = batch.by_condition.spread(weights.tensors["query"])
        heads = self.settings.pooling_heads
        return pool_tokens(queries, batch.tokens, batch.mask, batch.by_sentence, heads)

    def operations(self, tokens: float) -> dict[str, float]:
        """Count floating-point operations from embedded texts to a score, two for a multiplication.

        Products are counted, elementwise work is not; nor is the encoder, which reads a text once for all
        heads, except for those that read sentence and condition together.

        Args:
            tokens: of a sentence, on average; only pooling asks for them.

        Returns:
            per_pair (both sentences, under a condition whose weights are there) and per_condition (its
            weights or gate, once for all pairs).
        """
        width, kind = self.width, self.settings.kind
        each = 0.0
        if self.settings.pooling != "sentence":
            each += 4 * tokens * width  # the scores, and the weighted sum: (6), (8)
        if kind == "hyper":
            each += 4 * width * self.settings.rank if self.settings.rank else 2 * width**2  # (2), (1)
        for layer in (self.shared, self.joint):
            each += 2 * layer.weight.numel() if layer is not None else 0  # (3), (4)
        once = [] if self.generator is None else [one for one in self.generator.parameters() if one.ndim > 1]
        once += [] if self.gate is None else [self.gate.weight]
        return {"per_pair": 2 * each, "per_condition": 2.0 * sum(one.numel() for one in once)}


# --- data as indices: every text is encoded once ------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """One split's rows as indices into the tables of unique sentences and conditions."""

    first: Int[Tensor, " N"]
    second: Int[Tensor, " N"]
    condition: Int[Tensor, " N"]
    label: Float[Tensor, " N"]
    pair: Int[Tensor, " N"]


Compared = tuple[Float[Tensor, " N"], Float[Tensor, "N D"], Float[Tensor, "N D"]]


@runtime_checkable
class Source(Protocol):
    """Where a head's inputs come from: tables of a frozen encoder, or an encoder in training."""

    splits: dict[str, Split]

    def compare(self, head: ConditionedHead, split: Split, rows: Int[Tensor, " N"]) -> Compared:
        """Return each row's score and its two conditioned embeddings."""
        ...


def compare_sides(
    head: ConditionedHead,
    embed: Callable[[ModelSettings, Tensor, Tensor], Batch],
    conditions: int,
    split: Split,
    rows: Int[Tensor, " N"],
) -> Compared:
    """Return each row's cosine and its two conditioned embeddings.

    Args:
        head: joins sentences and conditions.
        embed: from the ids of sentences and conditions to a batch, each unique text embedded once.
        conditions: how many there are; an id is taken modulo this number.
        split: whose rows.
        rows: which.
    """
    condition = split.condition[rows]
    # An id of its own for the second side: the condition's dropout is then drawn anew, as published.
    apart = head.training and head.settings.dropout_sides == "apart"
    asked = torch.cat([condition, condition + apart * conditions])
    sides = torch.cat([split.first[rows], split.second[rows]])
    first, second = head(embed(head.settings, sides, asked)).chunk(2)
    return functional.cosine_similarity(first, second), first, second


@dataclass(frozen=True)
class Encoded:
    """All splits of a data set, its unique texts embedded once."""

    sentences: Float[Tensor, "S D"]
    tokens: TokenStates | None
    conditions: Float[Tensor, "U D"]
    one_hot: Float[Tensor, "U C"]
    splits: dict[str, Split]
    texts: tuple[list[str], list[str]]  # sentences, conditions

    def condition_features(self, settings: ModelSettings) -> Float[Tensor, "U C"]:
        """Return what a model knows of a condition: its text's embedding, or only which one it is."""
        return self.one_hot if settings.condition == "one_hot" else self.conditions

    def batch(
        self, settings: ModelSettings, sentence: Int[Tensor, " N"], condition: Int[Tensor, " N"]
    ) -> Batch:
        """Gather rows; tokens only if the model pools them."""
        by_sentence, by_condition = Rows.of(sentence), Rows.of(condition)
        tokens = mask = None
        if settings.pooling != "sentence":
            tokens, mask = self.tokens.padded(by_sentence.unique)
            tokens = token_scale(tokens)
        features = self.condition_features(settings)[by_condition.unique % len(self.conditions)]
        return Batch(self.sentences[by_sentence.unique], tokens, mask, by_sentence, features, by_condition)

    def compare(self, head: ConditionedHead, split: Split, rows: Int[Tensor, " N"]) -> Compared:
        """Score rows of a split by the cosine of their sides under their condition."""
        return compare_sides(head, self.batch, len(self.conditions), split, rows)


def encode_splits(tables: dict[str, pl.DataFrame], store: EmbeddingStore, device: str) -> Encoded:
    """Encode every unique sentence and condition once and turn the tables into indices.

    Conditions that train does not contain get an all-zero one-hot row: a table of learned rows knows nothing
    of them.
    """
    texts = unique_texts(tables.values(), "sentence1", "sentence2")
    conditions = unique_texts(tables.values(), "condition")
    trained = {text: column for column, text in enumerate(unique_texts([tables["train"]], "condition"))}
    one_hot = torch.zeros(len(conditions), len(trained))
    for row, text in enumerate(conditions):
        if text in trained:
            one_hot[row, trained[text]] = 1
    store.prepare([*texts, *conditions])
    place, asked = ({text: row for row, text in enumerate(known)} for known in (texts, conditions))

    def indices(table: pl.DataFrame, column: str, where: dict[str, int]) -> Tensor:
        return torch.tensor([where[text] for text in table[column]], device=device)

    splits = {
        name: Split(
            indices(table, "sentence1", place),
            indices(table, "sentence2", place),
            indices(table, "condition", asked),
            torch.tensor(table["label"].to_list(), dtype=torch.float32, device=device),
            torch.tensor(table["pair"].to_list(), device=device),
        )
        for name, table in tables.items()
    }
    tokens = store.token_states(texts) if store.tokens else None
    if tokens is not None:
        tokens = TokenStates(tokens.states.to(device), tokens.offsets.to(device))
    sentences = standardise(store.embed(texts)).to(device)
    embedded = standardise(store.embed(conditions)).to(device)
    return Encoded(sentences, tokens, embedded, standardise(one_hot).to(device), splits, (texts, conditions))


# --- the objective: equation (5) ----------------------------------------------------------------------------


class PairLoss:
    """Loss of a batch of pairs; a pair brings all its rows, that is, all its conditions."""

    def __init__(
        self,
        head: ConditionedHead,
        source: Source,
        split: str = "train",
        teacher: Float[Tensor, " N"] | None = None,
    ) -> None:
        """Find where each pair's rows start; ``teacher`` has a target per row of the split."""
        self.head, self.source, self.split = head, source, source.splits[split]
        settings = head.settings
        self.target = 0.5 + (1 - settings.smoothing) * (self.split.label - 0.5)
        if teacher is not None:
            share = settings.teacher_share
            self.target = (1 - share) * self.target + share * teacher.to(self.target.device)
        counts = torch.bincount(self.split.pair)
        self.starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        if not torch.equal(self.split.pair, self.split.pair.sort().values):
            raise ValueError("rows must stand pair by pair")

    @property
    def count(self) -> int:
        """Number of pairs."""
        return len(self.starts) - 1

    def _rows_of(self, pairs: Int[Tensor, " P"]) -> Int[Tensor, " N"]:
        counts = self.starts[pairs + 1] - self.starts[pairs]
        first = self.starts[pairs] - (counts.cumsum(0) - counts)  # of each pair, less the rows before it
        return first.repeat_interleave(counts) + torch.arange(int(counts.sum()), device=pairs.device)

    def __call__(self, pairs: Int[Tensor, " P"]) -> Float[Tensor, ""]:
        """Return the loss of a batch of pairs, given by their numbers."""
        settings, split = self.head.settings, self.split
        rows = self._rows_of(pairs.to(split.label.device))
        condition, label = split.condition[rows], split.label[rows]
        similarity, first, second = self.source.compare(self.head, split, rows)
        loss = similarity_mse(similarity, self.target[rows])
        if settings.contrastive:
            high, low = self._comparisons(split.pair[rows], label, settings.ties)
            loss = loss + settings.contrastive * pair_contrastive(
                similarity[high], similarity[low], settings.temperature
            )
        if settings.same_condition:
            extra = same_condition_contrastive(first, second, condition, label, 0.1)
            loss = loss + settings.same_condition * extra
        return loss

    @staticmethod
    def _comparisons(
        pair: Int[Tensor, " N"], label: Float[Tensor, " N"], ties: str
    ) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
        """List the rows (high, low) that share a pair; ties, if kept, are pushed apart at random.

        Which one is settled by the order of rows, which was hashed on reading and so says nothing.
        """
        together = pair[:, None] == pair[None]
        above = label[:, None] > label[None]
        if ties == "keep":
            above |= (label[:, None] == label[None]).triu(diagonal=1)
        high, low = (together & above).nonzero(as_tuple=True)
        return high, low


# --- scores -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def head_scores(
    head: ConditionedHead, source: Source, split: Split, chunk: int = 1024
) -> Float[Tensor, " N"]:
    """Score every row of a split by cosine, each condition's weights generated once per chunk of sorted rows.

    No row sees another: neither the order of rows nor a pair's other row can change a score.
    """
    order = torch.argsort(split.condition, stable=True)
    scores = torch.empty(len(order))
    for rows in order.split(chunk):
        scores[rows.cpu()] = source.compare(head, split, rows)[0].float().cpu()
    return scores

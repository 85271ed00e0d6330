"""Training a sentence encoder without labels: SimCSE and DiffCSE, on one core.

A sentence x is read twice by an encoder f with dropout; h and h+ are the two embeddings of a sentence, and
the other sentences of the batch are the negatives (SimCSE):

    L = -log( e^(cos(h_i, h_i+) / t) / sum_j e^(cos(h_i, h_j+) / t) )                                   (1)

Such embeddings need not know what the sentence says word by word. DiffCSE replaces some words of x and lets a
detector D, which sees the edited sentence x' and h, say which ones; the gradient goes on into f through h:

    L + w mean over tokens of CE( D(x', h), x' = x )                                                    (2)

The encoder is a small transformer, new but for its word table: principal components of the packaged
encoder's. So the start stands where a pretrained BERT stands in the papers: it knows words and no sentences.
A row with a random table shows what that is worth, ``whitened`` what a closed form makes of the same start.
``packaged`` is the whole packaged encoder, trained on a billion pairs, ``packaged_whitened`` what the closed
form makes of that, and ``word_table`` the mean of token vectors that are distilled from it on the same
sentences, where no network runs (:class:`workbench.static_encoder.StaticEncoder`).

Measured on pairs that people scored: Spearman correlation of cosine and score; alignment, the mean squared
distance of pairs scored above 4; uniformity, the log of the mean Gaussian potential of all sentences (both
lower is better); and how well replaced words are found in sentences that were not trained on, by AUC and by
the mean accuracy on replaced and kept words (chance 0.5 for both).

Reduced: two layers of width 64, a few thousand sentences, where the papers have BERT and a million. Other
deviations: f pools the mean, not [CLS] under a further layer; words are replaced by draws from what follows
the word before them in the training sentences, in place of a masked language model; D meets h in a bilinear
map of its states, not in their first position, which it does not learn to use in a few dozen steps; dropout
is 0.02, which did best beside 0.05, 0.1 and 0.2 on the validation split; the published 0.1 has a row.

Shape letters: B sentences, L tokens, D width, V words of the table, N pairs.

Source: Gao, Yao and Chen (2021), SimCSE, arXiv 2104.08821, equation 4 and section 5; Chuang et al. (2022),
DiffCSE, arXiv 2204.10298, section 3.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from workbench.encoders import TextEncoder
from workbench.evaluation.similarity import auc, spearman
from workbench.families.comparison import FamilyModel, Outcome, SplitRecipe, comparison_of, needs_tokens
from workbench.files import digest
from workbench.finetuning import READ_AT_ONCE, TokenIds
from workbench.geometry.uniformity import alignment, uniformity
from workbench.geometry.whitening import moments_of, whitening
from workbench.manifests import cache_folder, verified_folder
from workbench.objectives import in_batch_contrastive
from workbench.papers.comparison import Loaded
from workbench.static_encoder import StaticEncoder
from workbench.store import EmbeddingStore
from workbench.training import Training, fit

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

WIDTH, LAYERS, HEADS = 64, 2, 4
STD = 0.125  # of the word table's start
LONGEST = 64  # tokens of a sentence; later ones are not read
KEPT = 256  # directions of the packaged encoder, as Su et al. (2021, arXiv 2103.15316) keep of BERT's
ALIKE = 4.0  # pairs scored above are the positives of the alignment
TRAINED = ("simcse", "diffcse")


class SentenceModel(FamilyModel):
    """One way to train."""

    kind: Literal["untrained", "whitened", "packaged", "packaged_whitened", "word_table", "simcse", "diffcse"]
    dropout: float = Field(default=0.02, ge=0, lt=1, description="0: both readings of a sentence are equal")
    blind: bool = Field(default=False, description="simcse: train a detector that does not see h beside f")
    words: Literal["pretrained", "random"] = Field(default="pretrained", description="start of the table")

    @model_validator(mode="after")
    def _only_simcse_is_blind(self) -> "SentenceModel":
        if self.blind and self.kind != "simcse":
            raise ValueError(f"model {self.name}: blind belongs to kind simcse, not {self.kind}")
        return self


class SentenceRecipe(SplitRecipe):
    """Settings of the comparison."""

    paper: Literal["sentences"]
    models: tuple[SentenceModel, ...] = Field(min_length=1)
    training: Training
    sentences: int = Field(gt=1, description="drawn by the seed from the training split; scores are not read")
    temperature: float = Field(gt=0, description="t of equation (1)")
    replaced: float = Field(default=0.3, gt=0, lt=1, description="share of words that are drawn anew")
    detection: float = Field(gt=0, description="w of equation (2)")
    detector_rate: float = Field(gt=0, description="learning rate of the detector")


RECIPE = SentenceRecipe


@dataclass(frozen=True)
class Sentences:
    """Tokenised texts; ids are rows of the word table, which has the words of all splits and 0 for none."""

    train: TokenIds
    first: TokenIds
    second: TokenIds
    score: Float[Tensor, " N"]
    words: Float[Tensor, "V D"]
    special: Int[Tensor, " S"]
    texts: list[str]  # of train
    sides: tuple[list[str], list[str]]
    encoder: TextEncoder


def load_data(recipe: SentenceRecipe) -> Loaded:
    """Read the pairs of the manifest that the recipe names."""
    folder = verified_folder(recipe.data.name)
    tables = [pl.read_parquet(folder / f"{split}.parquet") for split in ("train", recipe.split)]
    content = tokenised(TextEncoder(recipe.encoder), *tables)
    counts = {"train": {"sentences": len(content.train)}, recipe.split: {"pairs": len(content.score)}}
    return Loaded(content, digest(*(table.write_json() for table in tables)), counts)


def tokenised(encoder: TextEncoder, train: pl.DataFrame, test: pl.DataFrame) -> Sentences:
    """Tokenise as the encoder does, and cut its word table down to what occurs."""
    texts = pl.concat([train["sentence1"], train["sentence2"]]).unique().sort().to_list()
    sides = test["sentence1"].to_list(), test["sentence2"].to_list()
    tables = [TokenIds.of(encoder, some, "cpu") for some in (texts, *sides)]
    known = torch.cat([table.ids for table in tables]).unique()
    tables = [
        TokenIds(torch.searchsorted(known, table.ids) + 1, table.types, table.offsets) for table in tables
    ]
    own = encoder.model[0].auto_model.get_input_embeddings().weight.detach()[known]
    directions = torch.linalg.eigh(moments_of(own).covariance).eigenvectors.float().flip(1)
    words = functional.pad((own - own.mean(0)) @ directions[:, :WIDTH], (0, 0, 1, 0))
    marks = [encoder.model.tokenizer.cls_token_id, encoder.model.tokenizer.sep_token_id]
    special = torch.searchsorted(known, torch.tensor(marks)) + 1
    return Sentences(*tables, torch.tensor(test["score"].to_list()), words, special, texts, sides, encoder)


def transformer(content: Sentences, model: SentenceModel, layers: int) -> BertModel:
    """Return a new transformer on the word table."""
    config = BertConfig(
        vocab_size=len(content.words), hidden_size=WIDTH, num_hidden_layers=layers,
        num_attention_heads=HEADS, intermediate_size=2 * WIDTH, max_position_embeddings=LONGEST,
        hidden_dropout_prob=model.dropout, attention_probs_dropout_prob=model.dropout,
        attn_implementation="eager",
    )  # fmt: skip
    made = BertModel(config, add_pooling_layer=False)
    if model.words == "pretrained":
        # As large as the layer's own start, so that only the directions differ from the random table.
        scale = STD / content.words[1:].std()
        made.embeddings.word_embeddings.weight.data.copy_(content.words * scale)
    return made


def cut(texts: TokenIds, rows: Int[Tensor, " B"]) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Gather sentences into one block, cut to the window: ids and a mask of real tokens."""
    ids, _, mask = texts.padded(rows)
    return ids[:, :LONGEST], mask[:, :LONGEST]


class Replacer:
    """Draws another word in place of some: one that follows the word before it in the training sentences."""

    def __init__(self, content: Sentences) -> None:
        before, after = content.train.ids[:-1], content.train.ids[1:]
        words = ~torch.isin(after, content.special)
        before, order = before[words].sort()
        self.after, self.special = after[words][order], content.special
        self.starts = torch.searchsorted(before, torch.arange(len(content.words) + 1))

    def __call__(
        self, ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"], share: float, draw: torch.Generator
    ) -> Int[Tensor, "B L"]:
        """Replace that share of the words; a draw may hit the word itself, which then counts as kept."""
        before = functional.pad(ids[:, :-1], (1, 0))
        count = self.starts[before + 1] - self.starts[before]
        asked = (torch.rand(ids.shape, generator=draw) < share) & mask & (count > 0)
        asked &= ~torch.isin(ids, self.special)
        chosen = self.starts[before] + (torch.rand(ids.shape, generator=draw) * count).long()
        return torch.where(asked, self.after[chosen.clamp(max=len(self.after) - 1)], ids)


class Encoder(nn.Module):
    """f and the detector D of equation (2)."""

    def __init__(self, content: Sentences, model: SentenceModel) -> None:
        super().__init__()
        self.body, informed = transformer(content, model, LAYERS), model.kind == "diffcse"
        self.detector = transformer(content, model, 1) if informed or model.blind else None
        self.verdict = nn.Linear(WIDTH, 1)
        self.match = nn.Linear(WIDTH, WIDTH, bias=False) if informed else None

    def forward(self, ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Embed sentences: the mean of their token states."""
        states = self.body(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def detect(
        self, edited: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"], sentences: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B L"]:
        """Return the log odds that a word was replaced, from its state s: v . s, and s . M h if D sees h."""
        states = self.detector(input_ids=edited, attention_mask=mask.long()).last_hidden_state
        odds = self.verdict(states)[..., 0]
        if self.match is not None:
            odds = odds + (states * self.match(functional.normalize(sentences, dim=-1))[:, None]).sum(-1)
        return odds


@torch.no_grad()
def embed(net: Encoder, texts: TokenIds, rows: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
    """Embed sentences of a table without dropout."""
    return torch.cat([net(*cut(texts, part)) for part in rows.split(READ_AT_ONCE)])


def drawn(recipe: SentenceRecipe, content: Sentences, seed: int) -> Int[Tensor, " N"]:
    """Draw the sentences that are trained on, and that whitening is fitted to."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randperm(len(content.train), generator=draw)[: recipe.sentences]


def found_words(net: Encoder, content: Sentences, share: float, seed: int) -> dict[str, float]:
    """Return how well replaced words of test sentences are told from kept ones; 0 to 1, chance 0.5."""
    replace, draw, odds, truth = Replacer(content), torch.Generator().manual_seed(seed), [], []
    for rows in torch.arange(len(content.first)).split(READ_AT_ONCE):
        ids, mask = cut(content.first, rows)
        edited = replace(ids, mask, share, draw)
        with torch.no_grad():
            odds.append(net.detect(edited, mask, net(ids, mask))[mask])
        truth.append((edited != ids)[mask])
    odds, truth = torch.cat(odds), torch.cat(truth)
    [area] = auc(odds.double().numpy(), truth.double().numpy(), np.ones((1, len(odds))))
    right = (odds > 0) == truth
    each = [float(right[side].double().mean()) for side in (truth, ~truth)]
    return {"detection_auc": float(area), "detection_accuracy": sum(each) / 2}


def scores(first: Float[Tensor, "N D"], second: Float[Tensor, "N D"], gold: Tensor) -> dict[str, float]:
    """Return rank correlation with people's scores (ideal 1), alignment and uniformity of embeddings."""
    cosines = functional.cosine_similarity(first, second).double().numpy()
    [rho] = spearman(cosines, gold.double().numpy(), np.ones((1, len(gold))))
    alike = gold > ALIKE
    return {
        "spearman": float(rho),
        "alignment": float(alignment(first[alike], second[alike])),
        "uniformity": float(uniformity(torch.cat([first, second]))),
    }


def train(
    net: Encoder, recipe: SentenceRecipe, content: Sentences, model: SentenceModel, seed: int, folder: Path
) -> list[dict[str, int | float]]:
    """Minimise equations (1) and (2); returns the history."""
    chosen, replace, lengths = drawn(recipe, content, seed), Replacer(content), content.train.offsets.diff()

    def loss(items: Tensor) -> Tensor:
        # An item is a sentence, and the first one's number seeds what is replaced.
        draw = torch.Generator().manual_seed(int(items[0]) * 1009 + seed)
        rows, one, two, wrong = chosen[items], [], [], []
        for part in rows[lengths[rows].argsort(stable=True)].tensor_split(3):  # of like length: less padding
            ids, mask = cut(content.train, part)
            again, other = net(ids.repeat(2, 1), mask.repeat(2, 1)).chunk(2)
            one, two = [*one, again], [*two, other]
            if net.detector is None:
                continue
            edited = replace(ids, mask, recipe.replaced, draw)
            odds, truth = net.detect(edited, mask, again)[mask], (edited != ids)[mask].float()
            # Both answers weigh the same, so that the threshold is at even odds.
            weight = (1 - truth.mean()) / truth.mean().clamp_min(1e-3)
            wrong.append(functional.binary_cross_entropy_with_logits(odds, truth, pos_weight=weight))
        contrastive = in_batch_contrastive(torch.cat(one), torch.cat(two), recipe.temperature)
        return contrastive + (recipe.detection * torch.stack(wrong).mean() if wrong else 0)

    rates = dict.fromkeys(("detector.", "verdict.", "match."), recipe.detector_rate)
    return fit(net, loss, len(chosen), recipe.training, folder, seed=seed, rates=rates)


def measure(
    recipe: SentenceRecipe, content: Sentences, model: SentenceModel, seed: int, folder: Path
) -> Outcome:
    """Train one row and compare its cosines with people's scores."""
    count = len(content.score)
    if model.kind.startswith("packaged") or model.kind == "word_table":
        store = EmbeddingStore(content.encoder, cache_folder())
        chosen = [content.texts[row] for row in drawn(recipe, content, seed).tolist()]
        read = store.embed
        if model.kind == "word_table":
            read = StaticEncoder.distil(content.encoder, chosen, kept=min(len(chosen) - 2, KEPT)).encode
        first, second = (read(side) for side in content.sides)
        if model.kind == "packaged_whitened":
            known = store.embed(chosen)
            white = whitening(moments_of(known), min(len(known) - 1, known.shape[1], KEPT))
            first, second = white(first), white(second)
        return Outcome(scores(first, second, content.score), count, {"parameters": 0})
    net, about, values = Encoder(content, model).eval(), {}, {}
    if model.kind in TRAINED:
        about["history"] = train(net, recipe, content, model, seed, folder)
    if net.detector is not None:
        values = found_words(net, content, recipe.replaced, 10_000_019 + seed)
    first, second = (embed(net, side, torch.arange(count)) for side in (content.first, content.second))
    if model.kind == "whitened":
        # An untrained LayerNorm ends f: entries sum to zero, so one direction has no variance.
        known = embed(net, content.train, drawn(recipe, content, seed))
        white = whitening(moments_of(known), WIDTH - 1)
        first, second = white(first), white(second)
    about["parameters"] = sum(one.numel() for one in net.body.parameters()) if "history" in about else 0
    return Outcome({**scores(first, second, content.score), **values}, count, about)


compare = comparison_of(measure)

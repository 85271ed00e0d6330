"""2-D Matryoshka: one encoder whose embeddings may be cut to fewer entries and read off at fewer layers.

An encoder f of L layers is trained on pairs of sentences with people's scores y, so that the cosine after l
layers, of the first w entries alone, is right for many l and w at once:

    L(l, w) = mean (cos(f_l(x)[:w], f_l(x')[:w]) - y)^2, y scaled to 0..1                                (1)
    whole         L(L, D)                                                                                (2)
    widths        mean over w of L(L, w)                                                                 (3)
    both          mean over w and over l in {L, one drawn from 1..L-1 in every step} of L(l, w)          (4)

Controls: the encoder as it comes; the same training for the whole vector alone, with the same pairs and
steps; and two closed forms on the same sentences. ``turned``: after every layer the first entries are the
principal directions of the training sentences, about zero; a turn changes no cosine of whole vectors.
``mapped``: a least-squares map from each layer's vectors to the last one's, then the last one's turn.

``spearman`` is the rank correlation of cosine and score, at the full width after all layers; ``half_share``
what the first half of the entries keeps of it, ``quarter_share`` and ``eighth_share`` likewise;
``half_share_lowest`` is the smallest share that half the entries keep of the full width after the same
layers, over all depths read. ``spearman_middle_depth`` is the score at the full width after the middle one
of these depths. Training pairs that share a sentence with the pairs asked about are left out.

Deviations: the mean squared error of the cosine (SBERT's on such pairs) in place of AnglE's loss; without the
term that aligns a lower layer's similarities with the last one's; lower layers weigh as much as the last.

Shape letters: K depths, N pairs or texts, D width.

Source: Li et al. (2024), 2D Matryoshka sentence embeddings, arXiv 2402.14776, section 3; Kusupati et al.
(2022), Matryoshka representation learning, arXiv 2205.13147; Reimers and Gurevych (2019), arXiv 1908.10084,
section 3 (the loss).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
import torch
from jaxtyping import Float, Int
from pydantic import Field
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional

from workbench.encoders import TextEncoder
from workbench.errors import DataError
from workbench.families.comparison import FamilyModel, Outcome, SplitRecipe, comparison_of, needs_tokens
from workbench.files import digest
from workbench.finetuning import READ_AT_ONCE, Finetuning, Reader, TokenIds
from workbench.geometry.slices import Sides, depth_of, nested, slice_scores, widths_of
from workbench.geometry.uniformity import placement
from workbench.manifests import verified_folder
from workbench.objectives import similarity_mse
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

HIGHEST, ALIKE = 5.0, 4.0  # of people's scores: the range's end, and above what a pair says the same
BLOCKS = 4  # of like length, in which a batch is read
STRENGTH = 0.01  # of the ridge of maps between layers, in units of the mean variance


class MatryoshkaModel(FamilyModel):
    """What is trained to nest."""

    kind: Literal["packaged", "turned", "mapped", "whole", "widths", "both"]


class MatryoshkaRecipe(SplitRecipe):
    """Settings of the comparison."""

    paper: Literal["matryoshka"]
    models: tuple[MatryoshkaModel, ...] = Field(min_length=1)
    training: Training
    depths: tuple[int, ...] = Field(
        min_length=1, description="layers after which the encoder is asked, all of them among these"
    )
    pairs: int | None = Field(
        default=None, gt=0, description="drawn by the seed to train on and to fit closed forms to; null: all"
    )


RECIPE = MatryoshkaRecipe


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of one split; scores from 0 to 1."""

    first: TokenIds
    second: TokenIds
    score: Float[Tensor, " N"]

    @classmethod
    def of(cls, encoder: TextEncoder, table: pl.DataFrame) -> "ScoredPairs":
        """Tokenise the columns sentence1 and sentence2 beside score, which goes from 0 to 5."""
        sides = (TokenIds.of(encoder, table[name].to_list(), "cpu") for name in ("sentence1", "sentence2"))
        return cls(*sides, torch.tensor(table["score"].to_list()) / HIGHEST)


@dataclass(frozen=True)
class Content:
    """What is trained on and asked, and the encoder as it comes."""

    train: ScoredPairs
    asked: ScoredPairs
    encoder: TextEncoder


def load_data(recipe: MatryoshkaRecipe) -> Loaded:
    """Read the pairs of the manifest that the recipe names.

    Raises:
        DataError: depths that the encoder does not have, or without its last layer.
    """
    folder, encoder = verified_folder(recipe.data.name), TextEncoder(recipe.encoder)
    last = depth_of(encoder)
    if not all(0 <= depth <= last for depth in recipe.depths) or last not in recipe.depths:
        raise DataError(
            f"depths must lie in 0..{last}, {last} among them, for {encoder.name}; got {[*recipe.depths]}"
        )
    train, asked = (pl.read_parquet(folder / f"{split}.parquet") for split in ("train", recipe.split))
    known = pl.concat([asked["sentence1"], asked["sentence2"]]).implode()
    train = train.filter(~pl.col("sentence1").is_in(known) & ~pl.col("sentence2").is_in(known))
    content = Content(*(ScoredPairs.of(encoder, table) for table in (train, asked)), encoder)
    counts = {"train": {"pairs": train.height}, recipe.split: {"pairs": asked.height}}
    return Loaded(content, digest(train.write_json(), asked.write_json()), counts)


class Layers(Reader):
    """A copy of an encoder that can be read after any of its layers, by the encoder's own pooling."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__(encoder, Finetuning(learning_rate=1.0, normalise=False))
        self.last, self.width = depth_of(encoder), self.transformer.config.hidden_size

    def forward(
        self, texts: TokenIds, rows: Int[Tensor, " N"], depths: Sequence[int]
    ) -> Float[Tensor, "K N D"]:
        """Embed texts, each on its own unit vector, after each of some layers; 0 is the input."""
        order, found = texts.offsets.diff()[rows].argsort(stable=True), []
        for part in order.tensor_split(min(BLOCKS, len(order))):
            ids, types, mask = texts.padded(rows[part])
            extra = {"token_type_ids": types} if self.typed else {}
            states = self.transformer(
                input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, **extra
            ).hidden_states
            pooled = [self._pool(states[depth] * mask[..., None], mask) for depth in depths]
            found.append(functional.normalize(torch.stack(pooled), dim=-1))
        return torch.cat(found, 1)[:, order.argsort()]

    @torch.no_grad()
    def embed(
        self, texts: TokenIds, depths: Sequence[int], rows: Int[Tensor, " N"] | None = None
    ) -> Float[Tensor, "K N D"]:
        """Embed some texts of a table, or all."""
        rows = torch.arange(len(texts)) if rows is None else rows
        order = texts.offsets.diff()[rows].argsort(stable=True)
        parts = [self(texts, rows[part], depths) for part in order.split(READ_AT_ONCE)]
        return torch.cat(parts, 1)[:, order.argsort()]


def drawn(recipe: MatryoshkaRecipe, content: Content, seed: int) -> Int[Tensor, " N"]:
    """Draw the pairs that are trained on, and that closed forms are fitted to."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randperm(len(content.train.score), generator=draw)[: recipe.pairs]


def train(
    net: Layers, recipe: MatryoshkaRecipe, content: Content, model: MatryoshkaModel, seed: int, folder: Path
) -> list[dict[str, int | float]]:
    """Minimise equation (2), (3) or (4); returns the history."""
    pairs, chosen = content.train, drawn(recipe, content, seed)
    widths = (net.width,) if model.kind == "whole" else widths_of(net.width)

    def loss(items: Tensor) -> Tensor:
        # The first pair's number seeds which other layer takes part, also after a resume.
        own, depths = torch.Generator().manual_seed(int(items[0]) * 1009 + seed), [net.last]
        if model.kind == "both":
            depths.append(int(torch.randint(1, net.last, (), generator=own)))
        rows = chosen[items]
        first, second = (net(side, rows, depths) for side in (pairs.first, pairs.second))

        def error(one: Tensor, other: Tensor) -> Tensor:
            return similarity_mse((one * other).sum(-1), pairs.score[rows])

        return nested(error, first, second, widths)

    return fit(net, loss, len(chosen), recipe.training, folder, seed=seed)


def closed_form(
    net: Layers, recipe: MatryoshkaRecipe, content: Content, kind: str, seed: int
) -> Callable[[Float[Tensor, "K N D"]], Float[Tensor, "K N D"]]:
    """Return the turn of each depth, or its map to the last one and that one's turn."""
    rows, last = drawn(recipe, content, seed), recipe.depths.index(net.last)
    sides = (content.train.first, content.train.second)
    known = torch.cat([net.embed(side, recipe.depths, rows) for side in sides], 1).double()
    directions = torch.linalg.eigh(known.mT @ known).eigenvectors.flip(-1)
    if kind == "turned":
        return lambda vectors: (vectors.double() @ directions).float()
    loads = [STRENGTH * float(one.var(0, correction=0).mean()) * len(one) for one in known]
    maps = [Ridge(load).fit(one.numpy(), known[last].numpy()) for load, one in zip(loads, known, strict=True)]

    def mapped(vectors: Float[Tensor, "K N D"]) -> Float[Tensor, "K N D"]:
        found = vectors.double()  # the last one's are themselves
        for place, one in enumerate(maps):
            if place != last:
                found[place] = torch.from_numpy(one.predict(found[place].numpy()))
        return (found @ directions[last]).float()

    return mapped


def measure(
    recipe: MatryoshkaRecipe, content: Content, model: MatryoshkaModel, seed: int, folder: Path
) -> Outcome:
    """Train one row and score the slices."""
    net, about = Layers(content.encoder).eval(), {}
    if model.kind in ("whole", "widths", "both"):
        about["history"] = train(net, recipe, content, model, seed, folder)
    sides = [net.embed(side, recipe.depths) for side in (content.asked.first, content.asked.second)]
    if model.kind in ("turned", "mapped"):
        change = closed_form(net, recipe, content, model.kind, seed)
        sides = [change(side) for side in sides]
    by_depth: dict[int, Sides] = dict(zip(recipe.depths, zip(*sides, strict=True), strict=True))
    width = net.width
    table = slice_scores(by_depth, content.asked.score.double().numpy(), widths_of(width))
    score = {(row["depth"], row["width"]): row["spearman"] for row in table.to_dicts()}
    last, half = net.last, width // 2
    values = {
        "spearman": score[last, width],
        "half_share": score[last, half] / score[last, width],
        "quarter_share": score[last, width // 4] / score[last, width],
        "eighth_share": score[last, width // 8] / score[last, width],
        "half_share_lowest": min(score[depth, half] / score[depth, width] for depth in recipe.depths),
        "spearman_middle_depth": score[sorted(recipe.depths)[len(recipe.depths) // 2], width],
    }
    curves = {
        f"after {depth} layers": ([float(one) for one in widths_of(width)],
                                  [score[depth, one] for one in widths_of(width)])
        for depth in recipe.depths
    }  # fmt: skip
    alike, ends = content.asked.score > ALIKE / HIGHEST, by_depth[last]
    about["geometry"] = placement(*(side[alike] for side in ends), torch.cat(ends))
    trained = "history" in about
    about["parameters"] = sum(one.numel() for one in net.transformer.parameters()) if trained else 0
    return Outcome(values, len(content.asked.score), about, curves)


compare = comparison_of(measure)

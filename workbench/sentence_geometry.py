"""What the neighbouring literature measures, on a trained sentence model: plain, and under each condition.

Everything is measured on the bundled sentences, whatever a model was trained on, since their attributes are
known; unless it says otherwise, on those of entities that no model was trained on.

Shape letters: N sentences, D width.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from statistics import fmean, median

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from workbench.datasets.bundled import DOMAINS, attributes, label, pairs, sentences
from workbench.encoders import TextEncoder
from workbench.errors import DataError
from workbench.evaluation.similarity import Measured, spearman
from workbench.geometry.relative import Space
from workbench.geometry.slices import depth_embeddings, depth_of, shallow, slice_scores, widths_of
from workbench.geometry.text_attribution import WordAttribution
from workbench.geometry.uniformity import alignment, uniformity
from workbench.geometry.whitening import mean_cosine, moments_of, whitening
from workbench.model import HyperCL
from workbench.static_encoder import StaticEncoder

ANCHORS = 128  # training sentences that all spaces know
KEPT = 64  # components of few sentences, where a method asks how many


def held_out() -> pl.DataFrame:
    """Return the sentences about entities that are in no training split."""
    return sentences().filter(pl.col("split") != "train")


def shared_attributes() -> list[str]:
    """Return the attributes that every sentence has, whatever it is about."""
    frame = sentences()
    return [name for name in attributes() if frame[name].null_count() == 0]


def condition_of(attribute: str) -> str:
    """Return the first phrasing of the condition that asks for an attribute."""
    return attributes()[attribute]["phrasings"][0]


@dataclass(frozen=True)
class Views:
    """The same sentences plain and under each condition.

    Attributes:
        frame: the sentences with their attributes.
        plain: unit embeddings by the encoder alone.
        conditioned: unit embeddings under the condition that asks for an attribute, by attribute.
    """

    frame: pl.DataFrame
    plain: Float[Tensor, "N D"]
    conditioned: dict[str, Float[Tensor, "N D"]]

    @classmethod
    def of(cls, model: HyperCL, frame: pl.DataFrame, names: Sequence[str]) -> "Views":
        """Embed sentences by a model, once plain and once for each attribute."""
        prepared = model.prepare(frame["sentence"].to_list())
        under = {name: model.encode(prepared, condition_of(name)) for name in names}
        return cls(frame, functional.normalize(prepared.plain.cpu(), dim=-1), under)


# --- pairs of sentences -------------------------------------------------------------------------------------


def alignment_table(views: Views) -> pl.DataFrame:
    """Measure alignment and uniformity of each attribute, plain and under its condition.

    Returns:
        One row per attribute and side ("plain" or "under its condition"): attribute, side, alignment (mean
        squared distance of sentences that agree in the attribute, 0 to 4), apart (the same of those that
        differ: a space that only shrinks lowers both), uniformity (lower is more even) and pairs.
    """
    found = []
    first, second = torch.triu_indices(views.frame.height, views.frame.height, offset=1)
    for name, conditioned in views.conditioned.items():
        value = torch.from_numpy(np.unique(views.frame[name].to_numpy().astype(str), return_inverse=True)[1])
        agree = value[first] == value[second]
        for side, rows in (("plain", views.plain), ("under its condition", conditioned)):
            near, far = (alignment(rows[first[some]], rows[second[some]]) for some in (agree, ~agree))
            found.append({
                "attribute": name, "side": side, "alignment": float(near), "apart": float(far),
                "uniformity": float(uniformity(rows)), "pairs": int(agree.sum()),
            })  # fmt: skip
    return pl.DataFrame(found)


Pairs = tuple[Int[Tensor, " P"], Int[Tensor, " P"], Float[np.ndarray, " P"]]


@lru_cache(maxsize=1)
def overall() -> Pairs:
    """Return all pairs of held-out sentences of one domain, and their mean agreement over attributes, 0 to 1.

    What a similarity without a condition can be held against: human labels for these sentences there are
    none.
    """
    rows, found = held_out().to_dicts(), []
    for domain in DOMAINS:
        members = [place for place, row in enumerate(rows) if row["domain"] == domain]
        asked = [name for name in attributes() if rows[members[0]][name] is not None]
        found += [
            (one, other, fmean(label(name, rows[one][name], rows[other][name]) for name in asked))
            for one, other in combinations(members, 2)
        ]
    first, second, agreement = zip(*found, strict=True)
    return torch.tensor(first), torch.tensor(second), np.array(agreement)


def agreement_measured(rows: Float[Tensor, "N D"], resamples: int = 500) -> dict[str, float]:
    """Measure Spearman of cosines with the agreement over attributes, see :func:`overall`; -1 to 1, ideal 1.

    Args:
        rows: embeddings of :func:`held_out`, in its order.
        resamples: of the bootstrap over sentences; pairs of one that is drawn twice with itself are left out.

    Returns:
        spearman, low, high (95 %) and sentences.
    """
    first, second, agreement = overall()
    cosine = functional.cosine_similarity(rows[first].double(), rows[second].double()).numpy()
    drawn = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), resamples)
    weights = drawn[:, first.numpy()] * drawn[:, second.numpy()]
    whole, *some = spearman(cosine, agreement, np.vstack([np.ones(len(agreement)), weights]))
    low, high = Measured.interval(np.array(some))
    return {"spearman": float(whole), "low": low, "high": high, "sentences": len(rows)}


# --- one part of the literature each ------------------------------------------------------------------------


def whitening_table(encoder: TextEncoder, kept: int = KEPT) -> pl.DataFrame:
    """Whiten a raw layer and the encoder's own vectors, fitted on training sentences, tried on held-out ones.

    Args:
        encoder: any; its first layer stands for a network that no contrastive loss has spread out.
        kept: components.

    Returns:
        One row per layer ("first layer", "last layer", and "both, averaged", which is WhiteningBERT's pooling
        but for the norms, one here) and treatment ("as it is", "centred", "whitened"): mean_cosine (of
        different sentences, ideal about 0), spearman, low, high and sentences (:func:`agreement_measured`)
        and off_identity (largest difference of the covariance of the rows it was fitted on from the identity;
        null unless whitened).
    """
    fitted = sentences().filter(split="train")["sentence"].to_list()
    texts = held_out()["sentence"].to_list()
    first, last = depth_embeddings(encoder, [*fitted, *texts], (1, depth_of(encoder)))
    layers, found = {"first layer": first, "last layer": last, "both, averaged": (first + last) / 2}, []
    for layer, rows in layers.items():
        train, test = rows.split([len(fitted), len(texts)])
        white = whitening(moments_of(train), kept)
        covariance = moments_of(white(train)).covariance
        error = float((covariance - torch.eye(kept)).abs().max())
        ways = {"as it is": test, "centred": test - train.mean(0), "whitened": white(test)}
        found += [
            {"layer": layer, "treatment": way, "mean_cosine": mean_cosine(given),
             **agreement_measured(given), "off_identity": error if way == "whitened" else None}
            for way, given in ways.items()
        ]  # fmt: skip
    return pl.DataFrame(found, schema_overrides={"off_identity": pl.Float64})


def rank_table(model: HyperCL) -> pl.DataFrame:
    """Measure the ranks of generated weights over all phrasings of conditions, and those of a dead generator.

    Returns:
        One row per generator ("trained", or "its head set to zero") and slot: generator, slot, conditions,
        effective, stable, possible, relative_spread and verdict.

    Raises:
        DataError: this head generates no weights.
    """
    asked = [phrasing for name in attributes() for phrasing in attributes()[name]["phrasings"]]
    trained, dead = model.weights(asked), copy.deepcopy(model.head.generator)
    with torch.inference_mode():
        dead.head.weight.zero_()
        still = dead(model.condition_features(asked).to(model.device)).to("cpu")
    return pl.DataFrame(
        [
            {"generator": name, "slot": slot.name, "conditions": len(asked),
             **weights.ranks(slot.name).to_dict()}
            for name, weights in (("trained", trained), ("its head set to zero", still))
            for slot in weights.spec.slots
        ]
    )  # fmt: skip


def slice_table(model: HyperCL) -> pl.DataFrame:
    """Score the first entries of embeddings, plain and conditioned, after half the layers and after all.

    Plain slices are held against the agreement over attributes, conditioned ones against the labels of the
    bundled test pairs whose conditions were trained on, in these words or others. After half the layers the
    head reads an encoder that ends there; it was trained on the whole one. The conditions are read by the
    whole one throughout.

    Args:
        model: a trained one.

    Returns:
        As :func:`workbench.geometry.slices.slice_scores`, with embeddings ("plain" or "conditioned").
    """
    encoder, width = model.encoder, model.head.width
    layers = depth_of(encoder)
    depths, (first, second, agreement) = (layers // 2, layers), overall()
    states = depth_embeddings(encoder, held_out()["sentence"].to_list(), depths)
    plain = {depth: (rows[first], rows[second]) for depth, rows in zip(depths, states, strict=True)}
    asked = pairs()["test"].filter(pl.col("condition_kind") != "unseen")
    texts, conditions = [*asked["sentence1"], *asked["sentence2"]], asked["condition"].to_list()
    sides = {}
    for depth in depths:
        reader = model if depth == layers else model.reading(shallow(encoder, depth))
        # Both sides in one call, so that a condition's weights are generated once for each depth.
        sides[depth] = model.encode_conditioned(reader.prepare(texts), conditions * 2).chunk(2)
    widths = widths_of(width)
    tables = {
        "plain": slice_scores(plain, agreement, widths),
        "conditioned": slice_scores(sides, asked["label"].to_numpy().astype(float), widths),
    }
    return pl.concat(
        table.select(pl.lit(name).alias("embeddings"), pl.all()) for name, table in tables.items()
    )


def deletion_table(model: HyperCL, count: int = 24, resamples: int = 1000) -> pl.DataFrame:
    """Cut the words of the five strongest pairs out of sentences that agree, or words drawn at random.

    The sentences are of bundled test pairs whose conditions were trained on, in these words or others: where
    a model does not know what is asked, no word can be what its score comes from.

    Args:
        model: a trained one that reads texts as conditions.
        count: pairs, drawn once and for all.
        resamples: of the bootstrap over pairs.

    Returns:
        One row per way to cut: words (which are cut out), cosine (mean over pairs), fall (from the whole
        sentences), low and high (95 %), pairs; the last row is the first fall less the second.

    Raises:
        DataError: an encoder that is no transformer.
    """
    alike = pairs()["test"].filter((pl.col("condition_kind") != "unseen") & (pl.col("label") == 1))
    attribution = WordAttribution(model)
    found = np.array([
        attribution.deletion(row["sentence1"], row["sentence2"], row["condition"])
        for row in alike.sample(min(count, alike.height), seed=0).to_dicts()
    ])  # fmt: skip
    falls = {"of the five strongest pairs": found[:, 0] - found[:, 1], "drawn": found[:, 0] - found[:, 2]}
    falls["difference"] = found[:, 2] - found[:, 1]
    drawn = np.random.default_rng(0).integers(len(found), size=(resamples, len(found)))
    cosines = [*found[:, 1:].mean(0).tolist(), None]
    rows = []
    for (name, fall), cosine in zip(falls.items(), cosines, strict=True):
        low, high = Measured.interval(fall[drawn].mean(1))
        row = {"words": name, "cosine": cosine, "fall": float(fall.mean()), "low": low, "high": high}
        rows.append(row | {"pairs": len(found)})
    return pl.DataFrame([{"words": "none", "cosine": float(found[:, 0].mean()), "pairs": len(found)}, *rows],
                        schema={"words": pl.String, "cosine": pl.Float64, "fall": pl.Float64,
                                "low": pl.Float64, "high": pl.Float64, "pairs": pl.Int64})  # fmt: skip


def spaces_of(
    models: Mapping[str, HyperCL], attribute: str
) -> tuple[dict[str, Space], tuple[Int[np.ndarray, " N"], Int[np.ndarray, " M"]]]:
    """Embed training and held-out sentences by several models under one condition, for stitching.

    Args:
        models: by name.
        attribute: what is asked, and what heads are to read.

    Returns:
        The space of each model and, as "plain encoder", that of the first one's encoder; the attribute of the
        training and of the held-out sentences, as numbers.
    """
    train, test = sentences().filter(split="train"), held_out()
    values = attributes()[attribute]["values"]
    labels = tuple(np.array([values.index(one) for one in part[attribute]]) for part in (train, test))
    spaces: dict[str, Space] = {}
    for name, model in models.items():
        sides = [Views.of(model, part, [attribute]) for part in (train, test)]
        spaces.setdefault("plain encoder", Space(*(side.plain for side in sides)))
        spaces[name] = Space(*(side.conditioned[attribute] for side in sides))
    return spaces, labels


def static_table(encoder: TextEncoder, kept: int = KEPT, rounds: int = 3) -> pl.DataFrame:
    """Distil a word table from an encoder on the training sentences and hold it against its teacher.

    Args:
        encoder: that pools token states by their mean.
        kept: components of the table.
        rounds: in which each of them encodes the same texts in turn; the median counts.

    Returns:
        One row for each, and one for the teacher's input vectors averaged as they are, the control: encoder,
        spearman, low, high and sentences (:func:`agreement_measured`), share (of the teacher's),
        texts_per_second and speed (times the teacher's), on one thread of this machine.

    Raises:
        DataError: the encoder does not pool by the mean.
    """
    if encoder.pooling != "mean":
        raise DataError(f"{encoder.name} pools by {encoder.pooling}; a word table is the mean of its words")
    texts = held_out()["sentence"].to_list()
    table = StaticEncoder.distil(encoder, sentences().filter(split="train")["sentence"].to_list(), kept=kept)
    inputs = encoder.model[0].auto_model.get_input_embeddings().weight.detach().float().cpu()
    ways = {"teacher": encoder, "word table": table}
    ways["input vectors as they are"] = StaticEncoder(encoder.model.tokenizer.backend_tokenizer, inputs)
    rows = {name: way.encode(texts) for name, way in ways.items()}  # warms up, too
    times: dict[str, list[float]] = {name: [] for name in ways}
    # One thread: on a busy machine a table's short work waits for the second one most of the time.
    with threadpool_limits(1):
        for _ in range(rounds):
            for name, way in ways.items():
                repeats = 1 if way is encoder else 20  # a few milliseconds alone say little
                began = time.perf_counter()
                for _ in range(repeats):
                    way.encode(texts)
                times[name].append((time.perf_counter() - began) / repeats)
    pace = {name: len(texts) / median(found) for name, found in times.items()}
    found = pl.DataFrame(
        [{"encoder": name, **agreement_measured(rows[name]), "texts_per_second": pace[name]} for name in ways]
    )
    return found.with_columns(
        share=pl.col("spearman") / found["spearman"][0], speed=pl.col("texts_per_second") / pace["teacher"]
    )

"""Hyper-CL: what every trained model has to keep, on real sentences and the real encoder."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import RidgeCV
from sklearn.metrics.pairwise import paired_cosine_distances
from torch.nn import functional

from workbench.config import recipe_names
from workbench.datasets.pairs import PairData, load_pairs
from workbench.errors import DataError, RecipeError, RunError
from workbench.evaluation.similarity import measure
from workbench.flops import count_flops
from workbench.hypernetworks import Rows
from workbench.hypernetworks.generators import standardise, token_scale
from workbench.model import HyperCL
from workbench.notebooks import notebook_names
from workbench.papers import FAMILIES, load_recipe
from workbench.papers.hyper_cl import (
    CITATION,
    Batch,
    ConditionedHead,
    PairLoss,
    Split,
    encode_splits,
    head_scores,
)
from workbench.papers.hyper_cl_comparison import baseline_scores, compare, head_geometry
from workbench.papers.hyper_cl_settings import HyperCLRecipe, ModelSettings
from workbench.store import EmbeddingStore
from workbench.tables import score_table
from workbench.training import Training, fit, seed_everything

# Which rows share a batched product moves the last bits of single precision.
BATCHING = {"rtol": 0, "atol": 1e-6}

KINDS = {
    "concat": {"kind": "concat"},
    "concat_pooled": {"kind": "concat", "pooling": "condition"},
    "hadamard": {"kind": "hadamard"},
    "hadamard_learned": {"kind": "hadamard", "pooling": "learned"},
    "shared_pooled": {"kind": "shared", "pooling": "condition"},
    "shared_similar": {"kind": "shared", "pooling": "similarity"},
    "full": {"kind": "hyper", "start": "paper", "bottleneck": 4},
    "low_rank": {"kind": "hyper", "rank": 6, "start": "paper"},
    "low_rank_scaled": {"kind": "hyper", "rank": 8, "identity": True},
    "low_rank_one_hot": {"kind": "hyper", "rank": 4, "condition": "one_hot"},
    "low_rank_negatives": {"kind": "hyper", "rank": 4, "identity": True, "same_condition": 1.0},
    "low_rank_pooled": {"kind": "hyper", "rank": 4, "identity": True, "pooling": "condition"},
}
GENERATED = [name for name, kind in KINDS.items() if kind["kind"] == "hyper" or "pooled" in name]


def model_of(name: str) -> ModelSettings:
    return ModelSettings(name=name, **KINDS[name])


@pytest.fixture(scope="module")
def tables():
    return load_pairs(PairData(source="bundled", name="bundled", limit=30))


@pytest.fixture(scope="module")
def store(encoder, tmp_path_factory):
    return EmbeddingStore(encoder, tmp_path_factory.mktemp("store"), tokens=True)


@pytest.fixture(scope="module")
def encoded(tables, store):
    return encode_splits(tables, store, "cpu")


def head_of(settings: ModelSettings, encoded, seed: int = 0) -> ConditionedHead:
    seed_everything(seed)
    width = encoded.condition_features(settings).shape[1]
    return ConditionedHead(settings, encoded.sentences.shape[1], width).eval()


def trained(
    settings: ModelSettings, encoded, folder: Path, *, seed: int = 0, steps: int = 20
) -> ConditionedHead:
    head = head_of(settings, encoded, seed)
    loss = PairLoss(head, encoded)
    training = Training(epochs=steps, batch_size=loss.count, learning_rate=1e-3)
    fit(head, loss, loss.count, training, folder, seed=seed)
    return head


# --- the contract of every trained kind ---------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_falls_in_20_steps_and_the_encoder_stays_as_it_was(name, encoded, tmp_path):
    before = encoded.sentences.clone(), encoded.conditions.clone(), encoded.tokens.states.clone()
    settings = model_of(name)
    start = head_of(settings, encoded)
    everything = torch.arange(30)
    head = trained(settings, encoded, tmp_path)
    with torch.inference_mode():
        first, last = (PairLoss(one, encoded)(everything).item() for one in (start, head))
    assert math.isfinite(last)
    assert last < 0.97 * first
    after = encoded.sentences, encoded.conditions, encoded.tokens.states
    assert all(torch.equal(*both) for both in zip(before, after, strict=True))


def test_training_a_head_does_not_change_the_encoder(encoder, encoded, tmp_path):
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    trained(model_of("low_rank_pooled"), encoded, tmp_path, steps=2)
    after = encoder.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


@pytest.mark.parametrize("name", ["hadamard", "low_rank_pooled"])
def test_the_same_seed_gives_the_same_numbers(name, encoded, tmp_path):
    settings = model_of(name)
    first, again, other = (
        head_scores(
            trained(settings, encoded, tmp_path / f"{n}", seed=seed, steps=3), encoded, encoded.splits["test"]
        )
        for n, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_reaches_every_parameter(name, encoded):
    head = head_of(model_of(name), encoded).train()
    PairLoss(head, encoded)(torch.arange(30)).backward()
    for parameter, tensor in head.named_parameters():
        assert tensor.grad is not None, parameter
        assert torch.isfinite(tensor.grad).all(), parameter
        assert tensor.grad.abs().max() > 0, parameter


@pytest.mark.parametrize("name", GENERATED)
def test_another_condition_gives_other_weights(name, encoded):
    settings = model_of(name)
    generator = head_of(settings, encoded).generator
    weights = generator(
        encoded.condition_features(settings)[torch.unique(encoded.splits["train"].condition)[:4]]
    )
    for slot in weights.spec.slots:
        distances = weights.distances(slot.name)
        assert (distances + torch.eye(4) > 1e-3 * weights.norms(slot.name).mean()).all()


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"low_rank_one_hot"}))
def test_another_condition_gives_another_embedding(name, encoded):
    settings = model_of(name)
    head = head_of(settings, encoded)
    if head.query is not None:
        torch.nn.init.normal_(head.query)
    with torch.inference_mode():
        one, other = (head(encoded.batch(settings, torch.tensor([0]), torch.tensor([c]))) for c in (0, 5))
    assert functional.cosine_similarity(one, other).item() < 0.9999


@pytest.mark.parametrize("name", GENERATED)
def test_a_batch_generates_each_conditions_weights_once(name, encoded):
    settings = model_of(name)
    head, rows = head_of(settings, encoded), []
    head.generator.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    PairLoss(head, encoded)(torch.arange(30))
    assert rows == [len(torch.unique(encoded.splits["train"].condition))]


# --- the equations ------------------------------------------------------------------------------------------


def by_hand(head: ConditionedHead, encoded, sentence: int, condition: int) -> torch.Tensor:
    """One row through the head, equation by equation, with matrices formed."""
    settings = head.settings
    asked = encoded.condition_features(settings)[condition]
    weights = head.generator(asked[None]) if head.generator is not None else None
    text = encoded.sentences[sentence]
    if settings.pooling != "sentence":
        start, stop = encoded.tokens.offsets[sentence : sentence + 2]
        tokens = token_scale(encoded.tokens.states[start:stop].float())
        if settings.pooling == "similarity":
            query = math.exp(head.sharpness.item()) * asked
        else:
            query = head.query if settings.pooling == "learned" else weights.tensors["query"][0]
        text = (tokens @ query / math.sqrt(384)).softmax(0) @ tokens  # (6), (8)
    if settings.kind == "hyper":
        return text @ weights.matrix("projection", 0)  # (1), (2), (7)
    if settings.kind == "concat":
        return head.joint.weight @ torch.cat([text, asked]) + head.joint.bias  # (4)
    mapped = head.shared.weight @ text + head.shared.bias
    if settings.kind == "shared":
        return mapped
    return mapped * (head.gate.weight @ asked + head.gate.bias)  # (3)


@pytest.mark.parametrize("name", KINDS)
def test_every_row_follows_the_equations(name, encoded):
    settings = model_of(name)
    head = head_of(settings, encoded)
    if head.query is not None:
        torch.nn.init.normal_(head.query)
    if head.sharpness is not None:
        torch.nn.init.constant_(head.sharpness, -0.5)
    sentences, conditions = torch.tensor([4, 9, 4, 2, 9]), torch.tensor([3, 3, 7, 3, 0])
    with torch.inference_mode():
        found = head(encoded.batch(settings, sentences, conditions))
        for row, (sentence, condition) in enumerate(zip(sentences, conditions, strict=True)):
            expected = by_hand(head, encoded, int(sentence), int(condition))
            # Another order of summation over 384 entries.
            torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-4)


def test_the_loss_is_that_of_equation_5(encoded):
    settings = ModelSettings(
        name="gate", kind="hadamard", contrastive=0.5, temperature=0.7, same_condition=0.0
    )
    head, pairs = head_of(settings, encoded), torch.tensor([3, 8])
    split = encoded.splits["train"]
    with torch.inference_mode():
        found = PairLoss(head, encoded)(pairs).item()
    squares, terms = [], []
    for pair in pairs:
        rows = (split.pair == pair).nonzero()[:, 0].tolist()
        cosine = {}
        for row in rows:
            sides = [
                by_hand(head, encoded, int(side[row]), int(split.condition[row]))
                for side in (split.first, split.second)
            ]
            cosine[row] = functional.cosine_similarity(*sides, dim=0).item()
            squares.append((cosine[row] - split.label[row].item()) ** 2)
        high, low = sorted(rows, key=lambda row: -split.label[row].item())
        terms.append(math.log(1 + math.exp(-(cosine[high] - cosine[low]) / 0.7)))
    # Single precision.
    assert found == pytest.approx(np.mean(squares) + 0.5 * np.mean(terms), rel=1e-4)


@pytest.mark.parametrize("setting", [{"contrastive": 0.0}, {"temperature": 0.1}, {"same_condition": 1.0}])
def test_each_setting_of_the_loss_changes_it(encoded, setting):
    plain, changed = (ModelSettings(name="gate", kind="hadamard", **extra) for extra in ({}, setting))
    with torch.inference_mode():
        one, other = (
            PairLoss(head_of(model, encoded), encoded)(torch.arange(30)) for model in (plain, changed)
        )
    assert abs(one.item() - other.item()) > 1e-3


def test_comparisons_stay_within_pairs_and_ties_are_dropped_or_kept():
    pair, label = torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor([0.2, 0.9, 0.5, 0.5, 1.0, 0.0, 0.0])
    dropped = PairLoss._comparisons(pair, label, "drop")
    assert set(zip(*map(torch.Tensor.tolist, dropped), strict=True)) == {(1, 0), (4, 5), (4, 6)}
    kept = PairLoss._comparisons(pair, label, "keep")
    assert set(zip(*map(torch.Tensor.tolist, kept), strict=True)) == {(1, 0), (2, 3), (4, 5), (4, 6), (5, 6)}


def test_a_batch_of_pairs_brings_all_their_rows(encoded):
    loss = PairLoss(head_of(model_of("hadamard"), encoded), encoded)
    rows = loss._rows_of(torch.tensor([7, 2]))
    pair = encoded.splits["train"].pair
    assert rows.tolist() == [*(pair == 7).nonzero()[:, 0].tolist(), *(pair == 2).nonzero()[:, 0].tolist()]


def test_pairs_whose_rows_are_scattered_are_refused(encoded):
    split = encoded.splits["train"]
    scattered = replace(encoded, splits={"train": replace(split, pair=split.pair.flip(0))})
    with pytest.raises(ValueError, match="pair by pair"):
        PairLoss(head_of(model_of("hadamard"), encoded), scattered)


def test_conditions_that_are_not_trained_have_no_one_hot_row(tables, encoded):
    trained_on = set(tables["train"]["condition"])
    texts = sorted(set().union(*(table["condition"] for table in tables.values())))
    assert len(trained_on) < len(texts)
    for text, row in zip(texts, encoded.one_hot, strict=True):
        entries = row[row != 0].tolist()
        # One entry that gives the row unit mean square.
        expected = [pytest.approx(math.sqrt(len(trained_on)))] if text in trained_on else []
        assert entries == expected


# --- the row order cannot leak ------------------------------------------------------------------------------


def moved(split, order: torch.Tensor):
    return replace(
        split,
        **{
            field: getattr(split, field)[order] for field in ("first", "second", "condition", "label", "pair")
        },
    )


def swap_within_pairs(pair: torch.Tensor) -> torch.Tensor:
    """Put every pair's rows in the opposite order."""
    return torch.cat([(pair == number).nonzero()[:, 0].flip(0) for number in torch.unique(pair)])


@pytest.mark.parametrize("name", KINDS)
def test_predictions_do_not_depend_on_the_order_of_rows(name, encoded):
    settings = model_of(name)
    head, split = head_of(settings, encoded), encoded.splits["test"]
    scores = head_scores(head, encoded, split)
    shuffled = torch.randperm(len(split.pair), generator=torch.Generator().manual_seed(1))
    orders = {"swapped": swap_within_pairs(split.pair), "shuffled": shuffled}
    for how, order in orders.items():
        found = torch.empty_like(scores)
        found[order] = head_scores(head, encoded, moved(split, order))
        torch.testing.assert_close(found, scores, **BATCHING, msg=how)
    label, pair = split.label.double().numpy(), split.pair.numpy()
    alone = torch.cat([head_scores(head, encoded, moved(split, torch.tensor([row]))) for row in range(5)])
    torch.testing.assert_close(alone, scores[:5], **BATCHING)
    same = measure(np.stack([scores.double(), scores.double()]), label, pair, resamples=1)
    assert all(np.array_equal(*metric.value, equal_nan=True) for metric in same.values())


def test_metrics_are_the_same_for_rows_in_any_order(encoded):
    split = encoded.splits["test"]
    scores = head_scores(head_of(model_of("low_rank"), encoded), encoded, split).double().numpy()
    label, pair = split.label.double().numpy(), split.pair.numpy()
    plain = measure(scores[None], label, pair, resamples=20)
    for order in (swap_within_pairs(split.pair).numpy(), np.random.default_rng(0).permutation(len(pair))):
        other = measure(scores[None, order], label[order], pair[order], resamples=20)
        for metric in plain:
            # Another order of summation in double precision.
            np.testing.assert_allclose(other[metric].value, plain[metric].value, rtol=0, atol=1e-12)
            np.testing.assert_allclose(other[metric].resampled, plain[metric].resampled, rtol=0, atol=1e-12)


def test_swapping_the_rows_of_a_file_changes_neither_training_nor_scores(tables, store, tmp_path):
    scores = []
    for how in ("published", "swapped"):
        folder = tmp_path / how
        folder.mkdir()
        for split, table in tables.items():
            # As published: the row with the higher label first.
            table = table.sort("pair", "label", descending=[False, how == "published"])
            table.select("sentence1", "sentence2", "condition", "label").write_csv(folder / f"{split}.csv")
        encoded = encode_splits(
            load_pairs(PairData(source="files", name="own", path=str(folder))), store, "cpu"
        )
        head = trained(model_of("low_rank_scaled"), encoded, folder, steps=2)
        scores.append(head_scores(head, encoded, encoded.splits["test"]))
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", ["hadamard", "low_rank_pooled"])
@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_scores_do_not_depend_on_how_many_rows_are_scored_at_once(name, chunk, encoded):
    head, split = head_of(model_of(name), encoded), encoded.splits["valid"]
    torch.testing.assert_close(
        head_scores(head, encoded, split, chunk), head_scores(head, encoded, split), **BATCHING
    )


def test_the_two_sentences_of_a_row_may_change_places(encoded):
    head, split = head_of(model_of("low_rank_pooled"), encoded), encoded.splits["test"]
    turned = replace(split, first=split.second, second=split.first)
    torch.testing.assert_close(
        head_scores(head, encoded, turned), head_scores(head, encoded, split), **BATCHING
    )


# --- what needs no training ---------------------------------------------------------------------------------


def test_the_condition_only_floor_never_reads_the_sentences(tables, store, encoded):
    other = {
        split: table.with_columns(sentence1=pl.lit("Nothing at all."), sentence2=pl.lit("Nothing else."))
        for split, table in tables.items()
    }
    blind = encode_splits(other, store, "cpu")
    found = baseline_scores("condition_only", encoded, tables, store, "test")
    assert torch.equal(baseline_scores("condition_only", blind, other, store, "test"), found)
    assert found.std() > 0


def test_the_condition_only_floor_is_a_ridge_regression(tables, encoder, store, encoded):
    texts = sorted({text for table in tables.values() for text in table["condition"]})
    vectors = dict(zip(texts, math.sqrt(384) * encoder.encode(texts).numpy(), strict=True))
    train, test = (
        np.stack([vectors[text] for text in tables[split]["condition"]]) for split in ("train", "test")
    )
    ridge = RidgeCV(alphas=np.logspace(-1, 4, 6)).fit(train, tables["train"]["label"].to_numpy())
    found = baseline_scores("condition_only", encoded, tables, store, "test").numpy()
    # Single precision, and embeddings of other batches.
    np.testing.assert_allclose(found, ridge.predict(test), rtol=0, atol=1e-3)


class Flat:
    """A source whose sentences are points of a plane, the same under every condition."""

    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])

    def __init__(self, split: Split) -> None:
        self.splits = {"test": split}

    def compare(self, head, split, rows):
        first, second = self.points[split.first[rows]], self.points[split.second[rows]]
        return functional.cosine_similarity(first, second), first, second


def flat(first, second, condition, label) -> Flat:
    rows = [torch.tensor(row) for row in (first, second, condition)]
    return Flat(Split(*rows, torch.tensor(label), torch.arange(len(label))))


def test_the_geometry_of_a_head_by_hand():
    # Rows with label 1: the points 0 and 2, which are one direction, and 0 and 1: squares 0 and 2, mean 1.
    # First sentences, each once per condition: 0 under a, 0 under b, 1 under a. Squares 0, 2 and 2.
    head = ConditionedHead(model_of("hadamard"), 2, 2)
    source = flat([0, 0, 0, 1], [2, 1, 1, 0], [0, 0, 1, 0], [1.0, 1.0, 0.0, 0.5])
    found = head_geometry(head, source, source.splits["test"])
    expected = math.log((1 + 2 * math.exp(-2 * 2)) / 3)
    assert found == {
        "alignment": pytest.approx(1.0),
        "positives": 2,
        "uniformity": pytest.approx(expected, rel=1e-6),
        "rows": 3,
    }
    lone = flat([0], [1], [0], [0.5])
    found = head_geometry(head, lone, lone.splits["test"])
    assert found == {"alignment": None, "positives": 0, "uniformity": None, "rows": 1}


def test_every_card_of_a_head_says_how_its_embeddings_lie(tiny_run):
    trained = [card for card in tiny_run.cards if card["seed"] is not None]
    assert trained
    for card in trained:
        assert card["geometry"]["split"] == "test"
        assert 0 < card["geometry"]["alignment"] < 4
        assert -8 < card["geometry"]["uniformity"] < 0


@pytest.mark.parametrize("name", KINDS)
def test_operations_of_a_pair_and_of_a_condition_are_those_that_torch_counts(name, encoded):
    settings = model_of(name)
    head = head_of(settings, encoded).eval()
    features = encoded.condition_features(settings)[:1]
    tokens, real = torch.randn(2, 9, head.width), torch.ones(2, 9, dtype=torch.bool)
    sides, under = Rows.of(torch.arange(2)), Rows.of(torch.zeros(2, dtype=torch.long))
    pair = Batch(tokens.mean(1), tokens, real, sides, features, under)
    with torch.no_grad():
        weights = head.generator(features) if head.generator is not None else None
        _, whole = count_flops(lambda: head(pair))
        _, told = count_flops(lambda: head(pair, weights))
    said = head.operations(9.0)
    assert said["per_pair"] + said["per_condition"] == whole
    if head.gate is None:  # which is computed with the pair
        assert said["per_pair"] == told


def test_pooling_by_likeness_costs_a_pair_more_than_a_projection_and_a_condition_nothing(encoded):
    # Width 384, 20 tokens: pooling 2 sentences x 2 products x 2 x 20 x 384, the shared map 2 x 2 x 384^2.
    pooled = head_of(model_of("shared_similar"), encoded).operations(20.0)
    assert pooled == {"per_pair": 8 * 20 * 384 + 4 * 384**2, "per_condition": 0}
    # Rank 8: two thin products for each sentence; 2 x 384 x 8 numbers from 384.
    projected = head_of(model_of("low_rank_scaled"), encoded).operations(20.0)
    assert projected == {"per_pair": 2 * 2 * 2 * 384 * 8, "per_condition": 2 * 384 * 2 * 384 * 8}


def test_operations_stand_beside_the_scores_of_every_head(tiny_run):
    table = score_table(tiny_run)
    place = table.columns.index("kFLOP per pair")
    by_model = {row[0]: row[place : place + 2] for row in table.rows}
    cards = {card["model"]: card for card in tiny_run.cards}
    for name, cells in by_model.items():
        own = cards[name].get("operations") if name in cards else None
        assert cells == (
            ["-", "-"]
            if own is None
            else [f"{own[f'per_{one}'] / 1e3:,.1f}" for one in ("pair", "condition")]
        )
    assert any(cells != ["-", "-"] for cells in by_model.values())


@pytest.fixture
def few(tables, encoded):
    """The first ten rows of the test split, as a table and as indices."""
    split = moved(encoded.splits["test"], torch.arange(10))
    return {"test": tables["test"].head(10)}, replace(encoded, splits={"test": split})


def test_the_cosine_baseline_compares_the_plain_sentences(few, encoder, store):
    table, encoded = few
    sides = [encoder.encode(table["test"][side].to_list()).numpy() for side in ("sentence1", "sentence2")]
    found = baseline_scores("cosine", encoded, table, store, "test").numpy()
    np.testing.assert_allclose(found, 1 - paired_cosine_distances(*sides), rtol=0, atol=1e-5)  # other batches


def test_the_prompt_baseline_puts_the_condition_before_each_sentence(few, encoder, store):
    table, encoded = few
    texts = [
        [f"{row['condition'].removesuffix('.')}: {row[side]}" for row in table["test"].to_dicts()]
        for side in ("sentence1", "sentence2")
    ]
    sides = [encoder.encode(side).numpy() for side in texts]
    found = baseline_scores("prompt", encoded, table, store, "test").numpy()
    np.testing.assert_allclose(found, 1 - paired_cosine_distances(*sides), rtol=0, atol=1e-5)  # other batches


# --- recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_has_its_notebooks_and_something_to_be_held_against(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert set(recipe.notebooks) <= set(notebook_names())
    if not name.endswith("_tiny"):
        assert recipe.notebooks or not recipe.sets or recipe.paper in ("hyper_cl_timing", *FAMILIES)
        assert recipe.bars or recipe.published
    names = {model.name for model in recipe.models}
    assert {held.model for held in (*recipe.bars, *recipe.published)} <= names
    assert recipe.title


def test_every_paper_and_kind_of_data_has_a_tiny_recipe_and_the_paper_is_cited():
    recipes = [load_recipe(name) for name in recipe_names()]
    # Nothing is trained for one, two read pictures that nobody here has; families take seconds.
    apart, foreign = ("hyper_cl_timing", *FAMILIES), ("hyper_align_poster", "hyper_clip_datacomp")
    recipes = [one for one in recipes if one.name not in foreign and one.paper not in apart]
    kinds = {(recipe.paper, recipe.data.source) for recipe in recipes}
    assert {(one.paper, one.data.source) for one in recipes if one.name.endswith("_tiny")} == kinds
    assert "2403.09490" in CITATION
    cited = (Path(__file__).parents[2] / "CITATION.cff").read_text("utf-8")
    assert all(paper in cited for paper in ("2403.09490", "2412.16777", "2507.10015"))


def settings_of(**changes) -> dict:
    content = {
        "name": "own",
        "paper": "hyper_cl",
        "title": "own",
        "seeds": (0,),
        "data": {"source": "bundled", "name": "bundled"},
        "training": {"epochs": 1, "batch_size": 4, "learning_rate": 0.001},
        "models": ({"name": "hadamard", "kind": "hadamard"},),
    }
    return {**content, **changes}


def test_a_recipe_of_a_few_keys_is_enough():
    assert HyperCLRecipe(**settings_of()).reference == "hadamard"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "hadamard", "rank": 4}, "rank and identity go with kind: hyper, not hadamard"),
        ({"kind": "shared", "identity": True}, "rank and identity go with kind: hyper, not shared"),
        ({"kind": "hyper", "rank": 0}, "rank"),
        ({"kind": "hyper", "rank": -3}, "rank"),
        ({"kind": "hyper", "bottleneck": 0}, "bottleneck"),
        ({"kind": "cosine", "pooling": "condition"}, "kind cosine has no pooling to learn"),
        ({"kind": "condition_only", "pooling": "learned"}, "kind condition_only has no pooling"),
        ({"kind": "shared", "pooling": "similarity", "condition": "one_hot"}, "no token is like a one_hot"),
        ({"kind": "hadamard", "dropout": 1.0}, "dropout"),
        ({"kind": "hadamard", "temperature": 0.0}, "temperature"),
        ({"kind": "hadamard", "contrastive": -1.0}, "contrastive"),
        ({"kind": "hypernet"}, "kind"),
        ({"kind": "hyper", "ranks": 4}, "ranks"),
        ({"kind": "hyper", "rank": 4.0}, "rank"),
        ({"kind": "hyper", "name": "Hyper K"}, "name"),
    ],
)
def test_model_settings_that_make_no_sense_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        ModelSettings(**{"name": "own", **model})


def test_pooling_by_similarity_generates_nothing_and_learns_one_number():
    pooled, plain = (
        ConditionedHead(ModelSettings(name="own", kind="shared", pooling=pooling), 16, 16)
        for pooling in ("similarity", "sentence")
    )
    assert pooled.generator is None
    counts = [sum(one.numel() for one in head.parameters()) for head in (pooled, plain)]
    assert counts[0] == counts[1] + 1


def test_a_rank_above_the_width_is_refused_when_the_head_is_built():
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.16.*got 17"):
        ConditionedHead(ModelSettings(name="own", kind="hyper", rank=17), 16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "cosine"}, "'cosine' is not one of the models"),
        ({"models": ({"name": "a", "kind": "hadamard"},) * 2, "reference": "a"}, "every name once"),
        ({"models": ()}, "models"),
        ({"seeds": ()}, "seeds"),
        ({"encoder": ""}, "encoder"),
        ({"resamples": 5}, "resamples"),
        ({"epochs": 3}, "epochs"),
    ],
)
def test_recipe_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HyperCLRecipe(**settings_of(**changes))


def test_a_wrong_change_of_a_recipe_names_the_recipe_and_the_key():
    with pytest.raises(RecipeError, match="hyper_cl_bundled.*resamples"):
        load_recipe("hyper_cl_bundled", {"resamples": 1})


# --- a finished run and its model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_run, encoder):
    return HyperCL.load(tiny_run.folder / "models" / "hyper_k16", encoder)


@pytest.fixture(scope="module")
def pooling_model(tiny_run, encoder):
    return HyperCL.load(tiny_run.folder / "models" / "hyper_query_k16", encoder)


SENTENCES = ["A grey seal rests on a rock.", "Two herons stand in the reeds.", "The tram is full.", "Soup."]


def test_a_run_hands_out_its_models_by_name(tiny_run, model):
    opened = tiny_run.model("hyper_k16")
    torch.testing.assert_close(
        opened.encode(SENTENCES, "The colour."), model.encode(SENTENCES, "The colour."), **BATCHING
    )
    with pytest.raises(RunError, match="kept no model 'hyper_full'; it has: .*hyper_k16"):
        tiny_run.model("hyper_full")


@pytest.mark.parametrize("name", ["model", "pooling_model"])
def test_strength_0_is_the_plain_encoder_and_1_the_head(name, encoder, request):
    opened = request.getfixturevalue(name)
    plain = opened.encode(SENTENCES, "The colour.", strength=0.0)
    torch.testing.assert_close(plain, encoder.encode(SENTENCES), **BATCHING)
    asked = standardise(encoder.encode(["The colour."]))
    weights = opened.head.generator(asked)
    full = opened.encode(SENTENCES, "The colour.", strength=1.0)
    for row, text in enumerate(SENTENCES):
        vector, states = encoder.encode_with_tokens([text])
        source = standardise(vector)[0]
        if name == "pooling_model":
            tokens = token_scale(states[0].float())
            source = (tokens @ weights.tensors["query"][0] / math.sqrt(384)).softmax(0) @ tokens
        expected = functional.normalize(source @ weights.matrix("projection", 0), dim=0)
        # Token states in half precision enter the pooled one.
        torch.testing.assert_close(full[row], expected.detach(), rtol=0, atol=1e-4)
    halfway = opened.encode(SENTENCES, "The colour.", strength=0.5)
    torch.testing.assert_close(halfway, functional.normalize(plain + full, dim=1), **BATCHING)


def test_strength_0_does_not_depend_on_the_condition_and_1_does(model):
    conditions = ("The colour.", "How many of them there are.")
    plain = [model.encode(SENTENCES, condition, strength=0.0) for condition in conditions]
    full = [model.encode(SENTENCES, condition) for condition in conditions]
    assert torch.equal(*plain)
    assert (functional.cosine_similarity(*full) < 0.999).all()


def test_embeddings_have_norm_one_and_do_not_depend_on_the_other_texts(model, pooling_model):
    for opened in (model, pooling_model):
        together = opened.encode([*SENTENCES, SENTENCES[0]], "The size.", strength=1.3)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(5), **BATCHING)
        torch.testing.assert_close(together[4], together[0], **BATCHING)
        alone = opened.encode([SENTENCES[2]], "The size.", strength=1.3)
        torch.testing.assert_close(alone[0], together[2], **BATCHING)


def test_similarity_is_the_cosine_of_every_first_with_every_second_text(model):
    found = model.similarity(SENTENCES[:3], SENTENCES[2:], "The setting.", strength=0.7)
    sides = [model.encode(texts, "The setting.", 0.7) for texts in (SENTENCES[:3], SENTENCES[2:])]
    expected = functional.cosine_similarity(sides[0][:, None], sides[1][None], dim=-1)
    torch.testing.assert_close(found, expected, **BATCHING)
    assert found[2, 0] == pytest.approx(1, abs=1e-5)  # the same text on both sides


def test_weights_come_one_per_condition_in_order_and_in_one_form(model):
    weights = model.weights(["The colour.", "The size.", "  The colour. "])
    assert len(weights) == 3
    distances = weights.distances("projection")
    # The same text, so the same numbers up to the order of summation.
    assert distances[0, 2] < 1e-3 * weights.norms("projection")[0]
    assert distances[0, 1] > 1e-2 * weights.norms("projection")[0]


def test_scores_in_the_run_are_those_of_the_loaded_model(tiny_run, model, tables):
    test = tables["test"]  # the run has more pairs, these are its first
    scores = tiny_run.scores.filter(model="hyper_k16", split="test").sort("row")
    assert scores["label"].to_list()[: test.height] == test["label"].to_list()
    for row in (0, 11, 40):
        one, other, condition = test.row(row)[:3]
        again = model.similarity([one], [other], condition).item()
        # Embeddings of other batches, through 384 x 384 products.
        assert scores["score"][row] == pytest.approx(again, abs=1e-5)


def test_a_finished_run_measures_every_model_on_every_split(tiny_run):
    recipe = load_recipe("hyper_cl_bundled_tiny")
    metrics = tiny_run.metrics
    assert set(metrics["model"]) == {model.name for model in recipe.models}
    assert set(metrics["split"]) == {"valid", "test"}
    counts = tiny_run.scores.filter(model="cosine").group_by("split").len()
    for split, count in counts.iter_rows():
        assert set(metrics.filter(split=split, group="all")["count"]) == {count}
    plain = metrics.filter(model="cosine", metric="pair_order", group="all")
    assert plain["value"].to_list() == [0.5] * plain.height
    assert (metrics["low"] <= metrics["high"]).all()


def test_differences_are_taken_to_the_reference_row_by_row(tiny_run):
    means = tiny_run.metrics.filter(split="test", group="all").filter(pl.col("seed").is_null())
    value = {(row["model"], row["metric"]): row["value"] for row in means.to_dicts()}
    for model in ("concat", "hyper_k16"):
        expected = value[model, "spearman"] - value["hadamard", "spearman"]
        assert value[model, "spearman_minus_hadamard"] == pytest.approx(expected, abs=1e-12)


def test_a_comparison_goes_on_from_finished_models(tables, store, tmp_path):
    models = (
        {"name": "cosine", "kind": "cosine"},
        {"name": "hadamard", "kind": "hadamard"},
        {"name": "hyper", "kind": "hyper", "rank": 2, "identity": True},
    )
    training = {"epochs": 1, "batch_size": 15, "learning_rate": 0.001}
    recipe = HyperCLRecipe(**settings_of(models=models, resamples=100, seeds=(0, 1), training=training))
    first = compare(recipe, tables, store, tmp_path, "cpu")
    (tmp_path / "training" / "hyper-seed1" / "card.json").unlink()  # killed before this one was finished
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("card.json")}
    again = compare(recipe, tables, store, tmp_path, "cpu")
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert again.scores.equals(first.scores)
    order = ["split", "group", "model", "metric", "seed"]
    assert again.metrics.sort(order).equals(first.metrics.sort(order))
    assert [card["model"] for card in again.cards] == ["cosine", *["hadamard"] * 2, *["hyper"] * 2]
    heads = sorted(path.parent.name for path in tmp_path.rglob("head.safetensors"))
    assert heads == ["hadamard", "hyper"]  # of the first seed only
    assert not list(tmp_path.rglob("checkpoint*"))


@pytest.mark.parametrize("strength", [-0.1, 2.1, float("nan")])
def test_a_strength_outside_0_to_2_is_refused(model, strength):
    with pytest.raises(DataError, match=r"strength must lie in 0\.\.2"):
        model.encode(SENTENCES, "The colour.", strength)


@pytest.mark.parametrize("condition", ["", "  \n", "\u200b"])
def test_an_empty_condition_is_refused_and_points_to_strength_0(model, condition):
    with pytest.raises(DataError, match="condition is empty.*strength=0"):
        model.encode(SENTENCES, condition)
    with pytest.raises(DataError, match="condition is empty"):
        model.weights([condition])


def test_no_texts_or_an_empty_text_is_refused(model):
    with pytest.raises(DataError, match="no texts to encode"):
        model.encode([], "The colour.")
    with pytest.raises(DataError, match="text 1 is empty"):
        model.encode(["Soup.", " "], "The colour.")


def test_a_head_without_generated_weights_says_so(tiny_run, encoder):
    gate = HyperCL.load(tiny_run.folder / "models" / "hadamard", encoder)
    assert gate.encode(SENTENCES, "The colour.").shape == (4, 384)
    with pytest.raises(DataError, match="model hadamard generates no weights; it is a hadamard head"):
        gate.weights(["The colour."])


@pytest.fixture
def head_folder(tiny_run, tmp_path):
    """A copy of a kept head that may be damaged."""
    return Path(shutil.copytree(tiny_run.folder / "models" / "hyper_k16", tmp_path / "head"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("head.safetensors", None),
        ("head.safetensors", b""),
        ("head.safetensors", b"\x80\x04\x95 not safetensors"),
        ("head.json", None),
        ("head.json", b"{"),
        ("head.json", b"[]"),
        ("head.json", b"{}"),
        ("head.json", b'{"settings": null, "width": 384, "condition_width": 384}'),
        ("head.json", b'{"settings": {"name": "x", "kind": "magic"}, "width": 384, "condition_width": 384}'),
        ("head.json", b'{"settings": {"name": "x", "kind": "concat"}, "width": 384, "condition_width": 384}'),
    ],
)
def test_a_missing_or_damaged_head_is_refused(head_folder, encoder, file, content):
    (head_folder / file).unlink()
    if content is not None:
        (head_folder / file).write_bytes(content)
    with pytest.raises(RunError, match="holds no usable head: .*Train it again"):
        HyperCL.load(head_folder, encoder)


def test_a_truncated_head_is_refused(head_folder, encoder):
    file = head_folder / "head.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RunError, match="holds no usable head"):
        HyperCL.load(head_folder, encoder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_with_weights_that_are_not_finite_is_refused(head_folder, encoder, value):
    file = head_folder / "head.safetensors"
    tensors = load_file(file)
    tensors["generator.head.weight"][3, 5] = value
    file.unlink()
    save_file(tensors, file)
    with pytest.raises(RunError, match="the weights hold NaN or infinity"):
        HyperCL.load(head_folder, encoder)


def test_a_head_of_another_shape_than_it_says_is_refused(head_folder, encoder):
    about = json.loads((head_folder / "head.json").read_text())
    (head_folder / "head.json").write_text(json.dumps({**about, "width": 64}))
    with pytest.raises(RunError, match="holds no usable head"):
        HyperCL.load(head_folder, encoder)


def test_a_head_that_knows_conditions_by_number_is_refused(encoded, encoder, tmp_path):
    settings = model_of("low_rank_one_hot")
    head = head_of(settings, encoded)
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    about = {
        "settings": settings.model_dump(mode="json"),
        "width": 384,
        "condition_width": encoded.one_hot.shape[1],
        "encoder": "all-MiniLM-L6-v2",
    }
    (tmp_path / "head.json").write_text(json.dumps(about))
    with pytest.raises(RunError, match="knows conditions by number, not by text"):
        HyperCL.load(tmp_path, encoder)

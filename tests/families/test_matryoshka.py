"""2-D Matryoshka: what is read after which layer, what is trained, what a turn may change, and the scores."""

import re

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats
from sklearn.decomposition import TruncatedSVD

from tests.families.histories import outcome_of_each
from workbench.errors import DataError, RecipeError
from workbench.families.matryoshka import (
    STRENGTH,
    Content,
    Layers,
    MatryoshkaModel,
    ScoredPairs,
    closed_form,
    load_data,
    measure,
    widths_of,
)
from workbench.geometry.slices import depth_embeddings
from workbench.manifests import locate
from workbench.papers import load_recipe
from workbench.training import seed_everything

CHANGES = {
    "training": {"epochs": 1, "batch_size": 6, "learning_rate": 2e-4},
    "depths": [1, 3, 6],
    "pairs": 24,
}
WHO = ["a man", "a woman", "the old dog", "my small cat", "some children", "the tired teacher"]
WHAT = ["plays a flute", "reads a long book in the park", "runs along the beach", "eats an apple"]
TEXTS = [f"{who} {what}." for who in WHO for what in WHAT]


def table_of(shift: int) -> pl.DataFrame:
    """Pairs that share the person, the deed or nothing."""
    other = [*TEXTS[shift:], *TEXTS[:shift]]
    score = [2.5 * sum(a in two for a in (one[:6], one[-8:])) for one, two in zip(TEXTS, other, strict=True)]
    return pl.DataFrame({"sentence1": TEXTS, "sentence2": other, "score": score})


@pytest.fixture(scope="module")
def content(encoder):
    train, asked = (
        ScoredPairs.of(encoder, pl.concat([table_of(a), table_of(b)])) for a, b in ((1, 4), (2, 8))
    )
    return Content(train, asked, encoder)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_matryoshka", CHANGES)


@pytest.fixture(scope="module")
def outcomes(recipe, content, tmp_path_factory):
    return outcome_of_each(measure, recipe, content, tmp_path_factory.mktemp)


def test_an_encoder_is_read_after_each_layer_as_the_library_reads_it(content, encoder):
    net, depths = Layers(encoder).eval(), [0, 2, 6]
    found = net.embed(content.train.first, depths)
    expected = depth_embeddings(encoder, TEXTS, depths)
    torch.testing.assert_close(found[:, : len(TEXTS)], expected, atol=1e-5, rtol=1e-4)


def vectors_of(net: Layers, content: Content, depths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of all training sentences and of the first sentences asked about."""
    sides = (content.train.first, content.train.second)
    return torch.cat([net.embed(side, depths) for side in sides], 1), net.embed(content.asked.first, depths)


def test_a_turn_to_principal_directions_changes_no_cosine_and_orders_the_entries(content, encoder):
    net, recipe = Layers(encoder).eval(), load_recipe("family_matryoshka", CHANGES | {"pairs": None})
    known, before = vectors_of(net, content, recipe.depths)
    after = closed_form(net, recipe, content, "turned", 0)(before)
    # Single precision on both sides, here and below.
    torch.testing.assert_close(after @ after.mT, before @ before.mT, atol=1e-5, rtol=1e-4)
    svd = TruncatedSVD(5, algorithm="arpack").fit(known[1].double().numpy())
    expected = np.abs(svd.transform(before[1].double().numpy()))
    np.testing.assert_allclose(np.abs(after[1][:, :5].double().numpy()), expected, atol=1e-4)


def test_a_map_to_the_last_layer_is_ridge_regression_and_leaves_that_layer_alone(content, encoder):
    net, recipe = Layers(encoder).eval(), load_recipe("family_matryoshka", CHANGES | {"pairs": None})
    known, before = vectors_of(net, content, recipe.depths)
    turned, mapped = (closed_form(net, recipe, content, kind, 0)(before) for kind in ("turned", "mapped"))
    torch.testing.assert_close(mapped[-1], turned[-1])
    inputs, targets = (known[place].double().numpy() for place in (1, 2))
    means = inputs.mean(0), targets.mean(0)
    inputs, targets = inputs - means[0], targets - means[1]
    load = STRENGTH * inputs.var(0).mean() * np.eye(384)
    weight = np.linalg.solve(inputs.T @ inputs / len(inputs) + load, inputs.T @ targets / len(inputs))
    fitted = (before[1].double().numpy() - means[0]) @ weight + means[1]
    # A turn keeps products, so both may be compared without it.
    np.testing.assert_allclose((mapped[1] @ mapped[1].T).numpy(), fitted @ fitted.T, atol=1e-4)


def test_slices_are_scored_as_an_independent_implementation_does(outcomes, content, encoder):
    sides = [
        depth_embeddings(encoder, texts, [1, 3, 6])
        for texts in (TEXTS + TEXTS, table_of(2)["sentence2"].to_list() + table_of(8)["sentence2"].to_list())
    ]
    gold = content.asked.score.numpy()

    def score(depth: int, width: int) -> float:
        one, two = (side[[1, 3, 6].index(depth), :, :width] for side in sides)
        return stats.spearmanr(torch.cosine_similarity(one, two).numpy(), gold).statistic

    values, full = outcomes["packaged"].values, widths_of(384)[-1]
    assert values["spearman"] == pytest.approx(score(6, full), abs=2e-3)
    assert values["spearman_middle_depth"] == pytest.approx(score(3, full), abs=2e-3)
    for name, width in (("half", 192), ("quarter", 96), ("eighth", 48)):
        assert values[f"{name}_share"] == pytest.approx(score(6, width) / score(6, full), abs=5e-3)
    lowest = min(score(depth, 192) / score(depth, full) for depth in (1, 3, 6))
    assert values["half_share_lowest"] == pytest.approx(lowest, abs=5e-3)
    assert outcomes["packaged"].curves["after 6 layers"][0] == [48, 96, 192, 384]


def test_cards_say_how_sentences_lie_after_the_last_layer(outcomes, content):
    for found in outcomes.values():
        lie = found.about["geometry"]
        assert lie["positives"] == int((content.asked.score > 0.8).sum())
        assert lie["rows"] == 2 * len(content.asked.score)
    # A turn changes no distance.
    assert outcomes["turned"].about["geometry"] == pytest.approx(
        outcomes["packaged"].about["geometry"], abs=1e-4
    )


def test_closed_forms_cost_nothing_at_full_size_and_change_slices_and_depths(outcomes):
    packaged, turned, mapped = (outcomes[name].values for name in ("packaged", "turned", "mapped"))
    for one in (turned, mapped):
        assert one["spearman"] == pytest.approx(packaged["spearman"], abs=1e-3)  # rounding orders ties
        assert one["eighth_share"] != pytest.approx(packaged["eighth_share"], abs=1e-3)
    middle = [one["spearman_middle_depth"] for one in (packaged, turned, mapped)]
    assert middle[1] == pytest.approx(middle[0], abs=1e-3)
    assert middle[2] != pytest.approx(middle[0], abs=1e-3)
    assert "history" not in outcomes["turned"].about


@pytest.mark.parametrize("kind", ["whole", "widths", "both"])
def test_the_loss_of_the_first_step_by_hand(kind, content, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda states, *_, **__: states)
    count = len(content.train.score)
    training = {"epochs": 1, "batch_size": count, "learning_rate": 1e-9}
    recipe = load_recipe("family_matryoshka", CHANGES | {"training": training, "pairs": None})
    seed_everything(0)
    history = measure(recipe, content, MatryoshkaModel(name="own", kind=kind), 0, tmp_path).about["history"]
    texts = [[*TEXTS, *TEXTS], [text for shift in (1, 4) for text in table_of(shift)["sentence2"]]]
    one, two = (depth_embeddings(encoder, side, range(7)) for side in texts)
    gold = torch.tensor([score / 5 for shift in (1, 4) for score in table_of(shift)["score"]])

    def error(depth: int, width: int) -> float:
        cosine = torch.cosine_similarity(one[depth, :, :width], two[depth, :, :width])
        return float((cosine - gold).square().mean())

    widths = (384,) if kind == "whole" else (48, 96, 192, 384)
    last = np.mean([error(6, width) for width in widths])
    if kind != "both":
        assert history[0]["loss"] == pytest.approx(last, abs=2e-4)
        return
    # The other layer is drawn: the mean with one of the five.
    options = [(last + np.mean([error(depth, width) for width in widths])) / 2 for depth in range(1, 6)]
    assert min(abs(option - history[0]["loss"]) for option in options) < 2e-4
    assert max(options) - min(options) > 2e-3


def test_training_lowers_the_loss_and_leaves_the_packaged_encoder_alone(content, encoder, tmp_path):
    before = encoder.encode(TEXTS[:2])
    longer = load_recipe("family_matryoshka", CHANGES | {"training": {**CHANGES["training"], "epochs": 6}})
    seed_everything(0)
    history = measure(longer, content, MatryoshkaModel(name="own", kind="both"), 0, tmp_path).about["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert torch.equal(encoder.encode(TEXTS[:2]), before)


def test_the_same_seed_gives_the_same_numbers(recipe, content, outcomes, tmp_path):
    seed_everything(0)
    model = next(model for model in recipe.models if model.name == "both")
    assert measure(recipe, content, model, 0, tmp_path).values == outcomes["both"].values


@pytest.mark.parametrize(
    ("change", "said"),
    [({"split": "train"}, "split"), ({"depths": []}, "depths"), ({"pairs": 0}, "pairs")],
)
def test_settings_that_make_no_sense_are_refused(change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("family_matryoshka", CHANGES | change)


def test_the_prepared_set_is_read_without_pairs_that_share_a_sentence_with_those_asked(prepared):
    prepared("stsb-en")
    folder = locate("stsb-en")
    for split, count in (("test", 1379), ("valid", 1500)):
        counts = load_data(load_recipe("family_matryoshka", {"split": split})).counts
        train, own = (
            pl.read_parquet(folder / f"{name}.parquet").select("sentence1", "sentence2").rows()
            for name in ("train", split)
        )
        known = {sentence for pair in own for sentence in pair}
        kept = sum(not known & {*pair} for pair in train)
        assert counts == {"train": {"pairs": kept}, split: {"pairs": count}}
        assert 5000 < kept < len(train) == 5749


@pytest.mark.parametrize("depths", [[2, 7], [-1, 6], [2, 4]])
def test_depths_that_the_encoder_does_not_have_are_refused(prepared, depths):
    prepared("stsb-en")
    said = f"depths must lie in 0..6, 6 among them, for all-MiniLM-L6-v2; got {depths}"
    with pytest.raises(DataError, match=re.escape(said)):
        load_data(load_recipe("family_matryoshka", {"depths": depths}))

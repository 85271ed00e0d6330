"""Live experiments on a zoo, and the poster's count of operations done again."""

import numpy as np
import polars as pl
import pytest
import torch

from workbench.features import Features
from workbench.geometry.closed_form import LinearMap
from workbench.papers import load_recipe
from workbench.papers.hyper_align import Connected
from workbench.papers.hyper_align_settings import AlignModelSettings
from workbench.training import Training
from workbench.zoo import Zoo
from workbench.zoo_analysis import onboarding, pair_recall, quality_by_budget, zoo_of
from workbench.zoo_poster import poster_flops
from workbench.zoo_scores import pair_means

TRAINING = Training(epochs=1, batch_size=32, learning_rate=1e-2)
GENERATED = AlignModelSettings(name="made", kind="hyper_align", hidden=(8,), encoders_per_step=2)


@pytest.fixture(scope="module")
def zoo():
    """Three image encoders that see the same 12 hidden numbers as the captions do, 128 images."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(128, 12))

    def seen(name, width, rows=hidden):
        array = rows @ rng.normal(size=(12, width)) + 0.1 * rng.normal(size=(len(rows), width))
        return Features(name, array.astype(np.float16), "order")

    texts = seen("words", 16, np.repeat(hidden, 2, axis=0))
    images = {name: seen(name, width) for name, width in (("a", 8), ("b", 12), ("c", 20))}
    choices = torch.arange(256).view(128, 2)
    rows = torch.arange(128).split([64, 32, 32])
    splits = dict(zip(("train", "valid", "test"), rows, strict=True))
    return Zoo(images, {"words": texts}, choices, splits)


# --- the poster ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted():
    return poster_flops()


def test_the_count_gives_what_the_authors_counter_gave_to_one_percent(counted):
    noted = dict(counted.drop_nulls("noted").select("way", "noted").iter_rows())
    assert noted == {
        "APE, each pair alone": 831.6,
        "Hyper-Align, 10 of 30 a step, logits twice": 55.4,
        "direct, 10 of 30 a step": 20.7,
        "direct, all 30 a step": 62.2,
        "closed form, one pass": 19.3,
    }
    for row in counted.drop_nulls("noted").to_dicts():
        assert row["counted"] == pytest.approx(row["noted"], rel=0.01), row["way"]


def test_the_formulas_give_what_is_counted(counted):
    assert counted["formula"].to_list() == pytest.approx(counted["counted"].to_list(), rel=1e-9)


def test_one_row_of_the_count_by_hand(counted):
    # 558,128 // 512 = 1,090 steps of 512 rows; 30 encoders of mean width 2,176 / 3;
    # a row takes 4 * 768 * Z for the connector and 4 * 512 * Z for the logits
    by_hand = 1090 * 512 * 30 * (2176 / 3) * (4 * 768 + 4 * 512) / 1e12
    assert counted.filter(way="direct, all 30 a step")["counted"].item() == pytest.approx(by_hand)


def test_the_saving_is_that_of_an_encoder_and_epoch(counted):
    saving = dict(counted.select("way", "saving").iter_rows())
    assert saving["APE, each pair alone"] == 1
    # (4 * 768 + 4 * 16,384) / (4 * 768 + 4 * 512), and 34 full batches of 16,384 against 1,090 of 512
    smaller = (768 + 16384) / (768 + 512) * (34 * 16384) / (1090 * 512)
    assert saving["APE, at Hyper-Align's batch"] == pytest.approx(smaller)
    assert saving["Hyper-Align, 10 of 30 a step, logits twice"] == pytest.approx(5.0, abs=0.01)


# --- quality ------------------------------------------------------------------------------------------------


def test_a_map_that_is_right_for_every_image_finds_all_and_one_that_says_nothing_none(zoo):
    same = Zoo({"a": zoo.texts["words"], "b": zoo.images["b"]}, zoo.texts, torch.arange(256)[:, None],
               {"test": torch.arange(32)})  # fmt: skip
    right = LinearMap(torch.eye(16), torch.zeros(16))
    nothing = LinearMap(torch.zeros(16, 16), torch.ones(16))
    assert pair_recall(same, "words", "a", Connected(right)) == 1.0
    # Every caption is mapped alike: of each image all captions tie, and ties count against the map.
    assert pair_recall(same, "words", "a", Connected(nothing)) <= 10 / 32
    both = Connected(right, lambda features: -features)
    assert pair_recall(same, "words", "a", both) < 0.2


def test_more_epochs_cost_in_proportion_and_a_closed_form_costs_once(zoo):
    models = [AlignModelSettings(name="direct", kind="direct"), AlignModelSettings(name="cca", kind="cca")]
    found = quality_by_budget(zoo, models, TRAINING, "words", (1, 3))
    assert found.select("model", "epochs").rows() == [("direct", 1), ("direct", 3), ("cca", 0)]
    one, three = found.filter(model="direct")["flops"]
    assert three == 3 * one
    assert found["value"].is_between(0, 1).all()
    cca, most = found.filter(model="cca")["value"].item(), found["value"].max()
    assert cca == most > 0.6  # 12 shared numbers and little noise: covariances of 64 images are enough


def test_budgets_are_the_same_whenever_they_are_measured(zoo):
    first, again = (quality_by_budget(zoo, [GENERATED], TRAINING, "words", (1,)) for _ in range(2))
    assert first.equals(again)


# --- a newcomer ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def later(zoo):
    return onboarding(zoo, GENERATED, TRAINING, "words", "b", epochs=(1, 30))


def test_a_newcomer_is_connected_in_every_way(later):
    assert later.select("way", "epochs").rows() == [
        ("hypernetwork, never told of it", 0),
        ("hypernetwork, code learned, 1 epoch", 1),
        ("hypernetwork, code learned, 30 epochs", 30),
        ("connector of its own, 1 epoch", 1),
        ("connector of its own, 30 epochs", 30),
        ("closed form", 0),
        ("closed form of both sides", 0),
    ]
    assert set(later["newcomer"]) == {"b"}
    assert later["value"].is_between(0, 1).all()


def test_what_is_spent_is_spent_on_the_newcomer(later):
    flops = dict(later.select("way", "flops").iter_rows())
    assert flops["hypernetwork, never told of it"] == 0
    # 2 steps of 32 rows: 4 X Z a row for the connector, 4 b Z for its logits; X 16, Z 12
    assert flops["connector of its own, 1 epoch"] == 2 * 32 * (4 * 16 * 12 + 4 * 32 * 12)
    assert flops["connector of its own, 30 epochs"] == 30 * flops["connector of its own, 1 epoch"]
    # at least its covariance and the cross-covariance, 64 rows; far from those of all three encoders
    least = 2 * 64 * 12 * 12 + 2 * 64 * 16 * 12
    assert least < flops["closed form"] < 10 * least


def test_a_connector_of_its_own_learns_what_the_hypernetwork_was_never_told(later):
    value = dict(later.select("way", "value").iter_rows())
    assert value["connector of its own, 30 epochs"] > value["hypernetwork, never told of it"] + 0.1
    assert value["closed form"] > value["hypernetwork, never told of it"] + 0.1


def test_the_hypernetwork_is_told_nothing_of_the_newcomer_but_its_mean(zoo):
    array = zoo.images["b"].array.copy()
    array[:64] = array[:64][torch.randperm(64, generator=torch.Generator().manual_seed(0)).numpy()]
    mixed = {**zoo.images, "b": Features("b", array, "order")}  # its training rows belong to other captions
    mixed = Zoo(mixed, zoo.texts, zoo.choices, zoo.splits)
    found = [
        dict(onboarding(one, GENERATED, TRAINING, "words", "b", epochs=()).select("way", "value").iter_rows())
        for one in (zoo, mixed)
    ]
    assert found[0]["hypernetwork, never told of it"] == found[1]["hypernetwork, never told of it"]
    assert found[1]["closed form"] < found[0]["closed form"] - 0.2  # which does learn from the pairs


# --- a recipe's zoo -----------------------------------------------------------------------------------------


def test_a_recipes_zoo_is_opened_without_controls_and_as_small_as_asked_for(tiny_zoo_run):
    recipe = load_recipe(tiny_zoo_run.recipe["name"])
    zoo = zoo_of(recipe, 2)
    assert list(zoo.images) == ["pixels_pca", "colour_histogram"]
    assert zoo.controls == frozenset()
    ridge = [model for model in recipe.models if model.name == "ridge"]
    found = quality_by_budget(zoo, ridge, recipe.training, "lsa_words", (1,))["value"].item()
    run = pair_means(tiny_zoo_run.scores).filter(model="ridge", text="lsa_words")
    assert found == pytest.approx(
        run.filter(pl.col("image").is_in(list(zoo.images)))["value"].mean(), abs=1e-6
    )

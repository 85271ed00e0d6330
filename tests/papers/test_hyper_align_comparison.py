"""Hyper-Align comparisons: metrics against the answers they come from, choices by hand, what is kept."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score
from torch.nn.functional import normalize

from workbench.connector_zoo import ConnectorZoo
from workbench.datasets.caption_pairs import PairData, Pictures, load_pairs
from workbench.errors import DataError
from workbench.evaluation.retrieval import retrieval_ranks
from workbench.features import Features
from workbench.geometry.closed_form import LinearMap
from workbench.papers import hyper_align_comparison, load_recipe
from workbench.papers.comparison import METRIC_COLUMNS, Found, run_models
from workbench.papers.hyper_align import Connected, Task
from workbench.papers.hyper_align_comparison import VALUES, _choices, _Metrics, _Table, compare, load_data
from workbench.papers.hyper_align_settings import AlignModelSettings, HyperAlignRecipe
from workbench.runs import Run
from workbench.zoo import Asked, Zoo, ZooSettings

SMALL = {"hidden": (16, 16), "code_width": 8}
IMAGES = {"sharp": (12, 0.2), "fair": (10, 0.8), "poor": (12, 2.0), "leaked": (12, 0.0)}  # width, noise
TEXTS = {"clear": (10, 0.2), "vague": (8, 0.6)}
REAL = ("sharp", "fair", "poor")
PAIRS = [(text, image) for text in TEXTS for image in REAL]
MODELS = [
    {"name": "chance", "kind": "chance"},
    {"name": "ape", "kind": "ape", "keep_weights": True},
    {"name": "few", "kind": "ape", "texts": ["vague"]},
    {"name": "direct", "kind": "direct", "against": "ridge"},
    {"name": "centred", "kind": "direct", "centre": True},
    {"name": "hyper", "kind": "hyper_align", "code": "learned", "encoders_per_step": 2, **SMALL},
    {"name": "ridge", "kind": "ridge"},
    {"name": "cca", "kind": "cca"},
    {"name": "search", "kind": "search", "keep_share": 0.3, "rounds": [1, 1], "keep_weights": True},
    {"name": "hub", "kind": "hub", "hub_width": 8},
]
TRAINED = ("ape", "few", "direct", "centred", "hyper", "search", "hub")
FULL = ("ape", "direct", "centred", "hyper", "ridge", "cca", "search", "hub")  # every pair
CHANGES = {
    "seeds": [0, 1],
    "data": {"source": "features", "name": "made", "path": "made"},
    "training": {"epochs": 1, "batch_size": 48, "learning_rate": 1e-2},
    "models": MODELS,
    "resamples": 200,
}


def recipe_of(**changes) -> HyperAlignRecipe:
    return load_recipe("hyper_align_scenes_tiny", {**CHANGES, **changes})


def made(name: str, rows: int, width: int, seed: int) -> Features:
    draw = torch.Generator().manual_seed(seed)
    return Features(name, torch.randn(rows, width, generator=draw).numpy().astype("float16"), name)


@pytest.fixture(scope="module")
def zoo(make_zoo) -> Zoo:
    """Three real encoders and one that is none, two class sets of twelve and of four classes."""
    plain = make_zoo(IMAGES, TEXTS, controls=frozenset({"leaked"}))
    sets = []
    for seed, (name, count, classes) in enumerate((("dozen", 36, 12), ("four", 24, 4))):
        images = {image: made(name, count, plain.images[image].width, seed) for image in REAL}
        prompts = {text: made(name, 2 * classes, plain.texts[text].width, 9 + seed) for text in TEXTS}
        sets.append(Asked(name, images, prompts, torch.arange(count) % classes, classes))
    return replace(plain, asked=tuple(sets))


@pytest.fixture(scope="module")
def finished(zoo, tmp_path_factory, word_store):
    """One comparison on it, with its folder laid out as a run's."""
    folder, recipe = tmp_path_factory.mktemp("run"), recipe_of()
    found = compare(recipe, zoo, word_store, folder, "cpu")
    (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    return found, folder


@pytest.fixture(scope="module")
def value(finished):
    """One row of the metrics; seed None is the mean over seeds."""
    rows = {
        (row["split"], row["model"], row["group"], row["metric"], row["seed"]): row
        for row in finished[0].metrics.to_dicts()
    }
    assert len(rows) == finished[0].metrics.height  # no row twice

    def ask(model, group="all", metric="recall_at_10", seed=0, split="test"):
        return rows[split, model, group, metric, seed]

    return ask


@pytest.fixture(scope="module")
def kept(finished):
    """What each image added, as the finished ways left it: by way, seed and key."""
    return {
        folder.parent.name: load_file(folder)
        for folder in (finished[1] / "training").glob("*/results.safetensors")
    }


def recall_at_10(results: dict, split: str, pairs: list) -> float:
    """Mean over pairs, directions and images."""
    where = [VALUES.index("t2i_recall_at_10"), VALUES.index("i2t_recall_at_10")]
    return float(np.mean([results["|".join((split, *pair))][where].mean() for pair in pairs]))


# --- what is measured ---------------------------------------------------------------------------------------


def test_answers_are_those_of_the_plain_way(zoo, tmp_path):
    """A known connector: ranks from the table of all cosines, with what it does to images."""
    draw = torch.Generator().manual_seed(4)
    weight, bias, shift = torch.randn(10, 12, generator=draw), torch.randn(12, generator=draw), 0.1
    connected = Connected(LinearMap(weight, bias), lambda images: images - shift)
    recipe = recipe_of()
    task = Task(zoo, recipe.models[1], recipe.training, 0, tmp_path)
    found = hyper_align_comparison._asked_pairs(task, ("clear", "sharp"), connected, "valid").numpy()
    rows = zoo.splits["valid"]
    texts = normalize(zoo.texts["clear"].unit(zoo.choices[rows].flatten()) @ weight + bias, dim=1)
    images = normalize(zoo.images["sharp"].unit(rows) - shift, dim=1)
    scores = (texts @ images.T).numpy()  # two captions of image 0, two of image 1, ...
    assert found.shape == (6, 40)
    for image in range(40):
        own = scores[2 * image : 2 * image + 2]
        forward = [(line >= line[image]).sum() for line in own]
        others = np.delete(scores[:, image], [2 * image, 2 * image + 1])
        backward = 1 + (others >= own[:, image].max()).sum()
        expected = [np.mean([rank <= k for rank in forward]) for k in (1, 5, 10)]
        expected += [float(backward <= k) for k in (1, 5, 10)]
        assert found[:, image].tolist() == pytest.approx(expected), image


def test_classes_are_the_mean_of_their_mapped_prompts(zoo):
    draw = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(10, 12, generator=draw), torch.randn(12, generator=draw)
    asked = zoo.asked[0]
    connected = Connected(LinearMap(weight, bias))
    found = hyper_align_comparison._asked_classes(asked, ("clear", "sharp"), connected)
    mapped = normalize(asked.prompts["clear"].unit(torch.arange(24)) @ weight + bias, dim=1)
    classes = normalize(torch.stack([mapped[2 * one : 2 * one + 2].mean(0) for one in range(12)]), dim=1)
    scores = asked.images["sharp"].unit(torch.arange(36)) @ classes.T
    rank = (scores >= scores[torch.arange(36), asked.label][:, None]).sum(1)
    assert found.tolist() == [(rank <= 1).float().tolist(), (rank <= 5).float().tolist()]


def test_a_guess_is_what_random_features_reach_on_average(zoo, value):
    chance = hyper_align_comparison._chance(zoo)
    draw = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(150):
        texts = normalize(torch.randn(40, 2, 8, generator=draw), dim=-1)
        images = normalize(torch.randn(40, 8, generator=draw), dim=-1)
        forward, backward = retrieval_ranks(texts, images)
        drawn.append([*((forward <= k).double().mean() for k in (1, 5, 10)),
                      *((backward <= k).double().mean() for k in (1, 5, 10))])  # fmt: skip
    expected = chance["test|clear|sharp"]
    assert expected.shape == (6, 40)
    # 12,000 and 6,000 answers: a deviation of at most 0.007.
    np.testing.assert_allclose(np.mean(drawn, 0), expected.mean(1), atol=0.02)
    # By hand: k of 40; and that neither of two captions is among k of 80: 1 - C(78, k) / C(80, k).
    assert expected[:3, 0].tolist() == pytest.approx([1 / 40, 5 / 40, 10 / 40])
    assert expected[3, 0].item() == pytest.approx(2 / 80)
    assert expected[4, 0].item() == pytest.approx(1 - (75 * 74) / (80 * 79))
    assert value("chance", seed=None)["value"] == pytest.approx(
        (10 / 40 + 1 - (70 * 69) / (80 * 79)) / 2, abs=1e-6
    )
    assert value("chance", "set=dozen", "top1", None)["value"] == pytest.approx(1 / 12)
    assert value("chance", "set=dozen", "top5", None)["value"] == pytest.approx(5 / 12)
    assert value("chance", "set=four", "top1", None)["value"] == pytest.approx(1 / 4)
    assert value("chance", "image=leaked", seed=None)["value"] == value("chance", seed=None)["value"]


# --- metrics ------------------------------------------------------------------------------------------------


def test_metrics_are_in_long_form_with_a_row_for_every_group(finished):
    metrics = finished[0].metrics
    assert dict(metrics.schema) == METRIC_COLUMNS
    groups = {"all", "cost", "set=dozen", "set=four"}
    groups |= {f"text={text}" for text in TEXTS} | {f"image={image}" for image in IMAGES}
    groups |= {f"pair={text} -> {image}" for text in TEXTS for image in IMAGES}
    assert set(metrics.filter(split="test")["group"]) == groups
    assert set(metrics.filter(split="valid")["group"]) == {"all", "text=clear", "text=vague"}
    assert metrics["value"].is_not_nan().all()
    assert (metrics["paper"].unique().to_list(), metrics["dataset"].unique().to_list()) == (
        ["hyper_align"],
        ["made"],
    )
    recalls = {f"{way}recall_at_{k}" for way in ("", "t2i_", "i2t_") for k in (1, 5, 10)}
    found = set(metrics.filter(pl.col("group") == "all", split="valid", model="ape")["metric"])
    assert found == recalls
    more = {"rank_agreement", "ndcg_at_5", "regret", "chosen_recall_at_10"}
    assert set(metrics.filter(group="all", split="test", model="ape")["metric"]) == recalls | more


def test_only_means_and_guesses_have_no_seed(finished):
    metrics = finished[0].metrics
    seeds = {model: set(rows["seed"]) for (model,), rows in metrics.group_by("model")}
    assert seeds.pop("chance") == {None}
    for model in ("ridge", "cca"):  # nothing is random in them
        assert seeds.pop(model) == {None, 0}
    assert seeds == dict.fromkeys(TRAINED, {None, 0, 1})
    differences = metrics.filter(pl.col("metric").str.contains("_minus_"))
    assert differences["seed"].is_null().all()


@pytest.mark.parametrize("model", FULL)
def test_recalls_are_means_over_the_pairs_of_their_group_without_controls(model, kept, value):
    seed = 0 if model in ("ridge", "cca") else 1
    results = kept[f"{model}-seed{seed}"]
    for split in ("valid", "test"):
        found = value(model, seed=seed, split=split)
        assert found["value"] == pytest.approx(recall_at_10(results, split, PAIRS))
        assert found["count"] == 40
        for text in TEXTS:
            own = [pair for pair in PAIRS if pair[0] == text]
            found = value(model, f"text={text}", seed=seed, split=split)["value"]
            assert found == pytest.approx(recall_at_10(results, split, own))
    for image in IMAGES:  # the control has rows of its own
        own = [(text, image) for text in TEXTS]
        assert value(model, f"image={image}", seed=seed)["value"] == pytest.approx(
            recall_at_10(results, "test", own)
        )
        for pair in own:
            found = value(model, f"pair={pair[0]} -> {image}", seed=seed)["value"]
            assert found == pytest.approx(recall_at_10(results, "test", [pair]))
    place = VALUES.index("i2t_recall_at_5")
    expected = np.mean([results["|".join(("test", *pair))][place].mean() for pair in PAIRS])
    assert value(model, metric="i2t_recall_at_5", seed=seed)["value"] == pytest.approx(expected)
    one, two = (value(model, metric=f"{way}_recall_at_5", seed=seed)["value"] for way in ("t2i", "i2t"))
    assert value(model, metric="recall_at_5", seed=seed)["value"] == pytest.approx((one + two) / 2)


def test_a_way_with_some_texts_is_in_their_groups_only(finished, value, kept):
    metrics = finished[0].metrics.filter(model="few")
    assert set(metrics["group"]) == {"text=vague", "cost"} | {f"pair=vague -> {image}" for image in IMAGES}
    own = [pair for pair in PAIRS if pair[0] == "vague"]
    found = value("few", "text=vague", seed=1)["value"]
    assert found == pytest.approx(recall_at_10(kept["few-seed1"], "test", own))
    # Pairs are chosen where the grid can be asked, too: among those of its text.
    assert "regret" in set(metrics.filter(group="text=vague")["metric"])


@pytest.mark.parametrize("model", ["ape", "hyper", "cca", "hub"])
def test_zero_shot_accuracy_is_the_mean_over_pairs_and_pictures(model, kept, value):
    results = kept[f"{model}-seed0"]
    for name, count in (("dozen", 36), ("four", 24)):
        expected = np.mean([results[f"set={name}|{text}|{image}"][0].mean() for text, image in PAIRS])
        found = value(model, f"set={name}", "top1")
        assert found["value"] == pytest.approx(expected)
        assert found["count"] == count
        assert f"set={name}|clear|leaked" not in results
    expected = np.mean([results[f"set=dozen|{text}|{image}"][1].mean() for text, image in PAIRS])
    assert value(model, "set=dozen", "top5")["value"] == pytest.approx(expected)
    with pytest.raises(KeyError):
        value(model, "set=four", "top5")  # five of four classes say nothing


def test_means_and_differences_are_over_seeds_with_intervals_that_hold_them(finished, value, kept):
    for model in ("ape", "direct", "search"):
        one, two = (value(model, seed=seed)["value"] for seed in (0, 1))
        mean = value(model, seed=None)
        assert mean["value"] == pytest.approx((one + two) / 2)
    for model, other in (("direct", "ridge"), ("direct", "ape"), ("hyper", "ape")):
        found = value(model, metric=f"recall_at_10_minus_{other}", seed=None)
        assert found["value"] == pytest.approx(
            value(model, seed=None)["value"] - value(other, seed=None)["value"]
        )
        assert found["low"] <= found["value"] <= found["high"]
    rows = finished[0].metrics.filter(pl.col("metric").str.contains("recall_at|top"))
    rows = rows.filter(~pl.col("metric").str.starts_with("chosen"))
    # An interval of 95 % of a mean of 40 answers; few with next to no right ones are skewed.
    outside = rows.filter(
        (pl.col("low") > pl.col("value") + 1e-9) | (pl.col("value") > pl.col("high") + 1e-9)
    )
    assert outside.height < 0.02 * rows.height
    wide = rows.filter(pl.col("model") == "ape", group="all", metric="recall_at_10", split="test")
    assert (wide["high"] - wide["low"]).min() > 0.01
    names = set(finished[0].metrics.filter(model="hyper", group="all")["metric"])
    assert {"recall_at_10_minus_ape", "top1"} & names == {"recall_at_10_minus_ape"}
    assert not [name for name in names if name.startswith(("regret_minus", "rank_agreement_minus"))]
    assert (
        not finished[0]
        .metrics.filter(pl.col("group").str.starts_with("pair"), pl.col("metric").str.contains("minus"))
        .height
    )


def test_an_interval_is_that_of_images_drawn_anew(finished, value, kept):
    rng = np.random.default_rng(0)
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=200) / 40
    where = [VALUES.index("t2i_recall_at_10"), VALUES.index("i2t_recall_at_10")]
    each = np.mean([kept["ape-seed0"]["|".join(("test", *pair))][where].mean(0) for pair in PAIRS], 0)
    low, high = np.quantile(weights @ each, (0.025, 0.975))
    found = value("ape")
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-6)


def test_costs_are_of_the_whole_and_of_each_pair(finished, value):
    cards = {(card["model"], card["seed"]): card for card in finished[0].cards}
    # Every way connects the control, too: eight pairs, those of "few" four.
    for model, pairs in (("ape", 8), ("few", 4), ("ridge", 8), ("search", 8)):
        card = cards[model, 0]
        assert card["pairs"] == pairs
        for metric in ("flops", "seconds", "parameters"):
            assert value(model, "cost", metric)["value"] == card[metric]
            assert value(model, "cost", f"{metric}_per_pair")["value"] == pytest.approx(card[metric] / pairs)
    models = ("ape", "few", "search", "ridge")  # one way is against ridge, whose share is shown as well
    each = {model: value(model, "cost", "flops_per_pair")["value"] for model in models}
    for model, operations in each.items():
        for other in ("ape", "ridge"):
            share = value(model, "cost", f"flops_of_{other}")["value"]
            assert share == pytest.approx(operations / each[other])
    cost = finished[0].metrics.filter(group="cost")
    assert "chance" not in set(cost["model"])
    assert not cost.filter(pl.col("metric").str.contains("_minus_")).height
    assert value("few", "cost", "parameters")["value"] == 9 * (12 + 10 + 12 + 12)  # (8 + 1) Z
    assert value("search", "cost", "flops")["low"] == value("search", "cost", "flops")["high"]


# --- how ways rank and choose -------------------------------------------------------------------------------


def found_of(model: str, seed: int | None) -> Found:
    return Found(model, seed, {}, {})


def tables_of(test: list, valid: list | None = None, images: int = 4) -> dict[str, _Table]:
    """Tables of ways whose images all agree; resamples then give the same."""
    made = {}
    for split, scores in (("test", test), ("valid", valid or test)):
        values = np.repeat(np.array(scores, dtype=float)[..., None], images, -1)
        made[split] = _Table({"recall_at_10": values}, {"recall_at_10": values[..., :3]})
    return made


def test_the_truth_for_a_seed_is_the_grid_under_the_other_seeds():
    items = [found_of("grid", seed) for seed in (0, 1, 2)] + [found_of("way", 0), found_of("way", 1)]
    test = [[0.9, 0.5, 0.1], [0.8, 0.6, 0.1], [0.3, 0.6, 0.2], [0.7, 0.9, 0.0], [0.7, 0.8, 0.1]]
    found = _choices(tables_of(test), items, "grid")
    # Seed 0: the truth is the mean of the grid's rows 1 and 2, (.55, .6, .15): its best is pair 1.
    # The grid's row 0 chooses pair 0 and loses .05; the way chooses pair 1 and loses nothing.
    # Seed 1: rows 0 and 2, (.6, .55, .15): pair 0. Row 1 chooses it; the way's second row loses .05.
    # Seed 2: rows 0 and 1, (.85, .55, .1); row 2 chooses pair 1 and loses .3.
    assert found["regret"].value.tolist() == pytest.approx([0.05, 0.0, 0.3, 0.0, 0.05])
    assert found["chosen_recall_at_10"].value.tolist() == pytest.approx([0.9, 0.8, 0.6, 0.9, 0.8])
    truth = np.array(
        [[0.55, 0.6, 0.15], [0.6, 0.55, 0.15], [0.85, 0.55, 0.1], [0.55, 0.6, 0.15], [0.6, 0.55, 0.15]]
    )
    for row, one in enumerate(truth):
        agreed = spearmanr(test[row], one).statistic
        assert found["rank_agreement"].value[row] == pytest.approx(agreed)
        gain = ndcg_score(one[None], np.array(test[row])[None], k=5)
        assert found["ndcg_at_5"].value[row] == pytest.approx(gain)
    for measured in found.values():
        assert np.allclose(measured.resampled, measured.value[:, None])


def test_the_grid_itself_is_a_ceiling_that_one_seed_cannot_see():
    items = [found_of("grid", 0), found_of("way", 0), found_of("closed", 0)]
    test = [[0.9, 0.5, 0.1], [0.5, 0.9, 0.1], [0.1, 0.5, 0.9]]
    found = _choices(tables_of(test), items, "grid")
    # One seed only: the grid is held against itself.
    assert found["regret"].value.tolist() == pytest.approx([0, 0.4, 0.8])
    assert found["rank_agreement"].value.tolist() == pytest.approx([1, 0.5, -1])
    assert found["ndcg_at_5"].value[0] == pytest.approx(1)


def test_pairs_are_chosen_on_valid_and_judged_on_test():
    items = [found_of("grid", 0), found_of("way", 0)]
    found = _choices(tables_of([[0.9, 0.5], [0.2, 0.8]], [[0.9, 0.5], [0.7, 0.6]]), items, "grid")
    assert found["regret"].value.tolist() == pytest.approx([0, 0])
    assert found["chosen_recall_at_10"].value.tolist() == pytest.approx([0.9, 0.2])


def test_a_guess_chooses_as_if_drawn_and_has_no_rank_agreement():
    items = [found_of("grid", 0), found_of("grid", 1), found_of("chance", None), found_of("tied", 0)]
    test = [[0.9, 0.5, 0.1], [0.7, 0.5, 0.3], [0.25, 0.25, 0.25], [0.6, 0.6, 0.1]]
    found = _choices(tables_of(test), items, "grid")
    # The truth is the mean of both grids, (.8, .5, .2): a third of the pairs loses 0, .3 and .6.
    assert found["regret"].value[2] == pytest.approx(0.3)
    assert np.isnan(found["rank_agreement"].value[2])
    # Seed 0 against the other grid, (.7, .5, .3): the first two are as good as each other on valid.
    assert found["regret"].value[3] == pytest.approx(0.1)
    assert found["chosen_recall_at_10"].value[3] == pytest.approx(0.6)


def test_choices_of_a_run_are_those_of_its_answers(finished, value, kept):
    truth = [recall_at_10(kept["ape-seed1"], "test", [pair]) for pair in PAIRS]
    for model in FULL:
        results = kept[f"{model}-seed0"]
        chosen = [recall_at_10(results, "valid", [pair]) for pair in PAIRS]
        best = np.isclose(chosen, max(chosen))
        found = value(model, metric="regret")
        assert found["value"] == pytest.approx(max(truth) - np.array(truth)[best].mean(), abs=1e-6)
        assert found["count"] == 6  # pairs
        own = [recall_at_10(results, "test", [pair]) for pair in PAIRS]
        found = value(model, metric="chosen_recall_at_10")["value"]
        assert found == pytest.approx(np.array(own)[best].mean(), abs=1e-6)
        assert value(model, metric="rank_agreement")["value"] == pytest.approx(
            spearmanr(own, truth).statistic, abs=1e-6
        )
    chance = value("chance", metric="regret", seed=None)["value"]
    both = np.mean([truth, [recall_at_10(kept["ape-seed0"], "test", [pair]) for pair in PAIRS]], 0)
    assert chance == pytest.approx(both.max() - both.mean(), abs=1e-6)
    assert "rank_agreement" not in set(finished[0].metrics.filter(model="chance")["metric"])


def test_two_pairs_or_no_grid_give_nothing_to_choose(finished, zoo):
    # A text encoder with two image encoders: a rank correlation of two numbers says nothing.
    fewer = replace(zoo, images={name: zoo.images[name] for name in ("sharp", "fair")}, controls=frozenset(),
                    asked=())  # fmt: skip
    results = {f"{split}|{text}|{image}": torch.rand(6, 40)
               for split in ("valid", "test") for text in TEXTS for image in fewer.images}  # fmt: skip
    card = {"flops": 1, "seconds": 1.0, "parameters": 1, "pairs": 4}
    recipe = recipe_of(models=[MODELS[1], MODELS[3] | {"against": None}])
    frame = _Metrics(recipe, fewer, [Found("ape", 0, results, card)]).frame()
    assert set(frame.filter(metric="regret")["group"]) == {"all"}
    frame = _Metrics(recipe, fewer, [Found("direct", 0, results, card)]).frame()  # no grid
    assert frame.filter(metric="regret").height == 0
    assert frame.filter(metric="recall_at_10", group="all").height > 0


def test_class_sets_without_a_way_that_answers_them_are_left_out(zoo):
    results = {f"{split}|vague|{image}": torch.rand(6, 40) for split in ("valid", "test") for image in IMAGES}
    card = {"flops": 1, "seconds": 1.0, "parameters": 1, "pairs": 4}
    frame = _Metrics(recipe_of(), zoo, [Found("few", 0, results, card)]).frame()
    assert {group.partition("=")[0] for group in frame["group"]} == {"text", "pair", "cost"}


# --- the table of scores, cards -----------------------------------------------------------------------------


def test_scores_are_one_row_per_way_seed_split_and_pair(finished, kept, zoo):
    scores = finished[0].scores
    assert scores.columns == [
        "model", "seed", "split", "text", "image", "text_width", "image_width", "image_parameters", "control",
        *VALUES, "top1 dozen", "top1 four",
    ]  # fmt: skip
    keys = scores.select("model", "seed", "split", "text", "image")
    assert not keys.is_duplicated().any()
    # Eight pairs in two splits: a guess; six ways under two seeds; "few" with half the pairs; two ways once.
    assert scores.height == 16 + 6 * 32 + 16 + 2 * 16
    for row in scores.filter(model="direct", seed=1).to_dicts():
        results = kept["direct-seed1"]
        values = results["|".join((row["split"], row["text"], row["image"]))].mean(1)
        assert [row[name] for name in VALUES] == pytest.approx(values.tolist())
        assert row["text_width"] == zoo.texts[row["text"]].width
        assert row["image_width"] == zoo.images[row["image"]].width
        assert row["image_parameters"] == 1000 * row["image_width"]
        assert row["control"] == (row["image"] == "leaked")
        expected = None
        if row["split"] == "test" and not row["control"]:
            expected = pytest.approx(results[f"set=dozen|{row['text']}|{row['image']}"][0].mean())
        assert row["top1 dozen"] == expected
    assert scores.filter(model="chance")["seed"].is_null().all()


def test_cards_say_what_was_trained_and_what_it_took(finished):
    cards = {(card["model"], card["seed"]): card for card in finished[0].cards}
    assert set(cards) == {("chance", None), ("ridge", 0), ("cca", 0)} | {
        (model, seed) for model in TRAINED for seed in (0, 1)
    }
    for (model, seed), card in cards.items():
        if seed is None:
            continue
        assert card["settings"]["name"] == model
        assert card["flops"] > 0
        assert card["parameters"] > 0
        assert card["seconds"] >= 0
        assert json.loads(json.dumps(card)) == card
        assert bool(card["history"]) == (model not in ("ridge", "cca"))
        assert 0 < card["geometry"]["alignment"] < 4
        assert card["geometry"]["rows"] == card["geometry"]["positives"] == 40  # images of test
        assert -8 < card["geometry"]["uniformity"] < 0
    assert cards["search", 0]["chosen"][1] != "leaked"
    assert [entry["epochs"] for entry in cards["search", 0]["rounds"]] == [0, 1, 1]
    assert (
        cards["hyper", 0]["cost"]["generated_parameters"] == 12 * 8 + 12
    )  # of the text encoder last trained


def test_ways_without_chance_run_under_the_first_seed_only():
    seen = []
    recipe = recipe_of(seeds=[3, 1])

    def train(model, seed):
        seen.append((model.kind, seed))
        return {}, {}

    found = run_models(
        recipe, ("chance",), lambda kind: seen.append((kind, None)) or {}, train, once=("ridge", "cca")
    )
    assert seen == [
        (model["kind"], seed)
        for model in MODELS
        for seed in {"chance": [None], "ridge": [3], "cca": [3]}.get(model["kind"], [3, 1])
    ]
    assert [(one.model, one.seed) for one in found] == [
        (model["name"], seed)
        for model in MODELS
        for seed in {"chance": [None], "ridge": [3], "cca": [3]}.get(model["kind"], [3, 1])
    ]
    seen.clear()
    run_models(recipe, ("chance",), lambda kind: {}, train)
    assert seen.count(("ridge", 1)) == 1  # unless told so, all run under every seed


# --- killed, kept -------------------------------------------------------------------------------------------


def test_finished_ways_are_not_trained_again(finished, zoo, word_store):
    first, folder = finished
    cards = sorted((folder / "training").glob("*/card.json"))
    assert len(cards) == 2 * len(TRAINED) + 2
    gone = folder / "training" / "direct-seed1" / "card.json"
    gone.unlink()  # killed before this one was finished
    times = {card: card.stat().st_mtime_ns for card in cards if card != gone}
    again = compare(recipe_of(), zoo, word_store, folder, "cpu")
    assert {card: card.stat().st_mtime_ns for card in times} == times
    assert gone.is_file()
    assert again.scores.equals(first.scores)
    apart = pl.col("metric").str.starts_with("seconds")  # all but the clock
    assert again.metrics.filter(~apart).equals(first.metrics.filter(~apart))


def test_a_way_killed_while_it_trains_leaves_the_others_finished(zoo, tmp_path, monkeypatch, word_store):
    real, calls = hyper_align_comparison.connect, []

    def until_killed(task):
        calls.append(task.model.name)
        if calls.count("direct") == 1 and task.model.name == "direct":
            raise KeyboardInterrupt
        return real(task)

    monkeypatch.setattr(hyper_align_comparison, "connect", until_killed)
    recipe = recipe_of(
        models=[MODELS[0], MODELS[6], {**MODELS[3], "against": None}], reference="ridge", seeds=[0]
    )
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, zoo, word_store, tmp_path, "cpu")
    found = compare(recipe, zoo, word_store, tmp_path, "cpu")
    assert calls == ["ridge", "direct", "direct"]
    assert [card["model"] for card in found.cards] == ["chance", "ridge", "direct"]
    assert not list(tmp_path.rglob("checkpoint*"))


def test_connectors_are_kept_of_the_first_seed_and_only_where_asked(finished, zoo, kept):
    run = Run(finished[1])
    assert run.models() == ["ape", "search"]
    opened = run.model("ape")
    assert isinstance(opened, ConnectorZoo)
    assert opened.model == "ape"
    assert set(opened.pairs()) == set(zoo.pairs(controls=True))
    assert set(run.model("search").pairs()) == set(zoo.pairs(controls=True))
    about = json.loads((finished[1] / "models" / "ape" / "head.json").read_text())
    assert (about["seed"], about["settings"]["kind"]) == (0, "ape")


@pytest.mark.parametrize("name", ["ape", "search"])
def test_kept_connectors_answer_as_the_runs_scores_say(name, finished, zoo, kept):
    opened, rows = Run(finished[1]).model(name), zoo.splits["test"]
    for text, image in opened.pairs():
        captions = zoo.texts[text].unit(zoo.choices[rows].flatten())
        scores = opened.similarity(captions, zoo.images[image].unit(rows), text, image).view(40, 2, 40)
        own = scores[torch.arange(40), :, torch.arange(40)]
        forward = (scores >= own[..., None] - 1e-6).sum(2)
        expected = kept[f"{name}-seed0"][f"test|{text}|{image}"][VALUES.index("t2i_recall_at_10")]
        assert (forward <= 10).float().mean(1).tolist() == expected.tolist()


# --- identity and shape of the data -------------------------------------------------------------------------


def test_the_identity_of_features_follows_arrays_names_pairs_and_splits(zoo, monkeypatch):
    plain = replace(zoo, asked=(), controls=frozenset())
    array = plain.images["fair"].array.copy()
    array[3, 2] += 1
    moved = {
        **plain.splits,
        "train": plain.splits["train"][:-1],
        "valid": torch.cat([plain.splits["train"][-1:], plain.splits["valid"]]),
    }
    others = [
        plain,
        replace(plain, images={**plain.images, "fair": replace(plain.images["fair"], array=array)}),
        replace(plain, images={name.replace("fair", "new"): one for name, one in plain.images.items()}),
        replace(plain, texts=dict(reversed(plain.texts.items()))),
        replace(plain, choices=plain.choices.flip(1)),
        replace(plain, splits=moved),
        # An image encoder by a text encoder's name, arrays in the same order.
        Zoo({name: one for name, one in (plain.texts | plain.images).items() if name != "clear"},
            {"clear": plain.texts["clear"]}, plain.choices, plain.splits),
    ]  # fmt: skip
    waiting = iter(others)
    monkeypatch.setattr(hyper_align_comparison, "features_from", lambda _: next(waiting))
    found = [load_data(recipe_of()) for _ in others]
    assert len({loaded.sha256 for loaded in found}) == len(others)
    assert found[0].content is plain
    assert found[0].counts == {"train": {"images": 96}, "valid": {"images": 40}, "test": {"images": 40}}
    monkeypatch.setattr(hyper_align_comparison, "features_from", lambda _: plain)
    assert load_data(recipe_of()).sha256 == found[0].sha256


def test_the_identity_of_pairs_follows_pictures_captions_splits_and_questions(monkeypatch):
    pairs = load_pairs(PairData(source="scenes", name="scenes", size=32, train=1500, test=60))
    first = pairs.asked[0]
    rows = pairs.splits["train"].clone()
    rows[700] = rows[701]  # in the middle, which a printed tensor leaves out
    asked = [
        replace(first, classes=replace(first.classes, label=first.classes.label.flip(0))),
        replace(first, classes=replace(first.classes, classes=first.classes.classes[::-1])),
        replace(first, pictures=Pictures(first.pictures.contents, first.pictures.names, "other")),
    ]
    others = [
        pairs,
        replace(pairs, pictures=Pictures(pairs.pictures.contents, pairs.pictures.names, "other")),
        replace(pairs, texts=[*pairs.texts[:-1], "something else"]),
        replace(pairs, choices=pairs.choices.flip(0)),
        replace(pairs, splits={**pairs.splits, "train": rows}),
        replace(pairs, asked=pairs.asked[1:]),
        *(replace(pairs, asked=(one, *pairs.asked[1:])) for one in asked),
    ]
    recipe = load_recipe("hyper_align_scenes_tiny")
    waiting = iter(others)
    monkeypatch.setattr(hyper_align_comparison, "load_pairs", lambda _: next(waiting))
    found = [load_data(recipe) for _ in others]
    assert len({loaded.sha256 for loaded in found}) == len(others)
    assert found[0].counts == {
        "train": {"images": 1500}, "valid": {"images": 60}, "test": {"images": 60},
        **{name: {"images": 60} for name in ("colour", "shape", "texture", "count", "place")},
    }  # fmt: skip


def test_texts_that_arrays_of_ones_own_do_not_have_are_refused_before_training(zoo, tmp_path, word_store):
    with pytest.raises(
        DataError, match=r"model few: texts absent are not in the zoo, which has clear, vague; name"
    ):
        compare(
            recipe_of(models=[MODELS[1], {**MODELS[2], "texts": ["absent"]}]),
            zoo,
            word_store,
            tmp_path,
            "cpu",
        )
    assert not list(tmp_path.iterdir())


def test_pairs_are_turned_into_features_and_features_are_taken_as_they_are(zoo, word_store, monkeypatch):
    assert hyper_align_comparison.open_content(recipe_of(), zoo, "cpu") is zoo
    pairs = load_pairs(PairData(source="scenes", name="scenes", size=32, train=100, test=50))
    recipe, seen = load_recipe("hyper_align_scenes_tiny"), []
    monkeypatch.setattr(hyper_align_comparison, "open_zoo", lambda *asked: (seen.append(asked), zoo)[1])
    assert hyper_align_comparison.open_content(recipe, pairs, "cpu", word_store) is zoo
    assert seen == [(recipe.zoo, pairs, word_store, "cpu", recipe.data.size)]


def test_no_recipe_asks_for_tokens():
    assert not hyper_align_comparison.needs_tokens(recipe_of())


def test_settings_of_a_zoo_are_read_from_a_recipe():
    assert isinstance(load_recipe("hyper_align_flickr8k").zoo, ZooSettings)
    assert all(isinstance(model, AlignModelSettings) for model in recipe_of().models)
    assert Path(recipe_of().data.path).name == "made"

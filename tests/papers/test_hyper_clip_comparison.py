"""HyperCLIP comparisons: metrics against the scores they come from, side reports, kept models, identity."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import recall_score

from workbench.datasets import scenes as scenes_module
from workbench.datasets.class_sets import Captioned, ClassSet, Questions
from workbench.evaluation.ranking import resample
from workbench.papers import hyper_clip_comparison, load_recipe
from workbench.papers.comparison import METRIC_COLUMNS, Found
from workbench.papers.hyper_clip_comparison import compare, load_data
from workbench.papers.hyper_clip_settings import HyperCLIPRecipe
from workbench.runs import Run

SMALL = {"width": 16, "bottleneck": 4}
CHANGES = {
    "seeds": [0, 1],
    "data": {"source": "scenes", "name": "scenes", "train": 100, "test": 100, "size": 32},
    "image": {"timm_model_name": "test_efficientnet", "image_size": 32},
    "text": {"hidden": 24},
    "embed_dim": 16,
    "training": {"epochs": 1, "batch_size": 50, "learning_rate": 3e-3},
    "models": [
        {"name": "chance", "kind": "chance"},
        {"name": "siglip", "kind": "siglip"},
        {"name": "replace", "kind": "hyper", "calibration": 16, **SMALL},
        {"name": "residual", "kind": "hyper", "mode": "residual", "calibration": 0, "against": "replace",
         **SMALL},
    ],
    "smallest_group": 8,
}  # fmt: skip
SIDES = {
    "replace": {"weights of another set", "running statistics"},
    "residual": {"weights of another set", "neutral"},  # without calibration there is nothing beside it
}


def recipe_of(**changes) -> HyperCLIPRecipe:
    return load_recipe("hyper_clip_scenes_tiny", CHANGES | changes)


@pytest.fixture(scope="module")
def content():
    return load_data(recipe_of()).content


@pytest.fixture(scope="module")
def finished(content, word_store, tmp_path_factory):
    """A whole comparison: three trained models under two seeds, 20 class sets in two splits."""
    folder = tmp_path_factory.mktemp("workspace")
    recipe = recipe_of()
    found = compare(recipe, content, word_store, folder, "cpu")
    (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    return found, folder


@pytest.fixture(scope="module")
def value(finished):
    """One metric's value; seed None is the mean over seeds."""
    rows = {
        (row["split"], row["model"], row["group"], row["metric"], row["seed"]): row
        for row in finished[0].metrics.to_dicts()
    }
    assert len(rows) == finished[0].metrics.height  # no row twice

    def ask(model, group="all", metric="top1", seed=0, split="test"):
        return rows[split, model, group, metric, seed]

    return ask


def correct(scores: pl.DataFrame) -> np.ndarray:
    return (scores["rank"].to_numpy() == 1).astype(float)


# --- metrics ------------------------------------------------------------------------------------------------


def test_metrics_are_in_long_form_with_a_row_for_every_group(finished, content):
    metrics = finished[0].metrics
    assert dict(metrics.schema) == METRIC_COLUMNS
    sets = [one.name for one in content[1]["test"].sets]
    plain = {"all", *(f"set={name}" for name in sets), "by=background", "by=rendering"}
    plain |= {f"family={name}" for name in ("one attribute", "pair trained on", "held out", "synonyms")}
    plain |= {f"rendering={name}" for name in ("shifted", "as trained")}
    for split in ("valid", "test"):
        groups = set(metrics.filter(split=split)["group"])
        backgrounds = set(content[1][split].about["background"])
        expected = plain | {f"background={name}" for name in backgrounds}
        assert {name for name in groups if not name.startswith("side=")} == expected
    assert metrics["value"].is_not_nan().all()
    rows = metrics.filter(~pl.col("metric").str.contains("_minus_"))
    assert rows.filter((pl.col("low") > pl.col("value")) | (pl.col("value") > pl.col("high"))).height < (
        0.1 * rows.height  # an interval of 95 % may miss the value of a skewed few
    )
    assert set(metrics.filter(model="chance")["seed"]) == {None}
    assert set(metrics.filter(model="siglip")["seed"]) == {None, 0, 1}


def test_chance_is_the_mean_of_one_over_classes(value, content):
    asked = [one for one in content[1]["test"].sets if not one.side]
    # Every set asks all scenes, so that sets count alike.
    expected = np.mean([1 / len(one.classes) for one in asked])
    assert value("chance", seed=None)["value"] == pytest.approx(expected)
    assert value("chance", "set=count", seed=None)["value"] == pytest.approx(1 / 3)
    assert value("chance", "set=colour and shape", "top5", None)["value"] == pytest.approx(5 / 48)
    assert value("chance", "by=background", "gap_top1", None)["value"] == pytest.approx(0)


@pytest.mark.parametrize("model", ["siglip", "replace", "residual"])
def test_metrics_are_those_of_the_table_of_scores(model, finished, value, content):
    scores = finished[0].scores.filter(split="test", model=model, seed=1)
    sets = {one.name: one for one in content[1]["test"].sets}
    for name, one in sets.items():
        rows = scores.filter(set=name)
        assert rows["label"].to_list() == one.label.tolist()
        assert rows["image"].to_list() == one.rows.tolist()
        assert value(model, f"set={name}", seed=1)["value"] == pytest.approx(correct(rows).mean())
        present = sorted(set(one.label.tolist()))
        recall = recall_score(
            rows["label"], rows["predicted"], labels=present, average="macro", zero_division=0
        )
        found = value(model, f"set={name}", "mean_per_class", 1)["value"]
        # The rank counts ties against the model, the predicted class does not.
        assert found == pytest.approx(recall, abs=0.02)
        assert (
            rows.filter(pl.col("rank") == 1)["predicted"] == rows.filter(pl.col("rank") == 1)["label"]
        ).all()
    families = {one.family for one in sets.values()}
    for group in ("all", *(f"family={name}" for name in families)):
        inside = [
            name
            for name, one in sets.items()
            if (group == "all" and not one.side) or group == f"family={one.family}"
        ]
        rows = scores.filter(pl.col("set").is_in(inside))
        assert value(model, group, seed=1)["value"] == pytest.approx(correct(rows).mean())
    large = scores.filter(set="colour and shape")
    assert value(model, "set=colour and shape", "top5", 1)["value"] == pytest.approx(
        (large["rank"] <= 5).mean()
    )


def test_top_5_is_left_out_where_a_set_has_fewer_than_10_classes(finished):
    groups = set(finished[0].metrics.filter(metric="top5")["group"])
    assert {"set=colour and shape", "set=count and place"} <= groups  # 48 and 15 classes
    assert not {"all", "set=count", "set=colour", "set=texture and count"} & groups  # 3, 8 and 9


@pytest.mark.parametrize("column", ["background", "rendering"])
@pytest.mark.parametrize("model", ["siglip", "replace"])
def test_groups_the_worst_and_the_gap_are_those_of_the_scores(model, column, finished, value, content):
    main = [one.name for one in content[1]["test"].sets if not one.side]
    scores = finished[0].scores.filter(pl.col("set").is_in(main), split="test", model=model, seed=0)
    judged = {}
    for (name,), rows in scores.group_by(column):
        row = value(model, f"{column}={name}")
        assert row["value"] == pytest.approx(correct(rows).mean())
        assert row["count"] == rows["image"].n_unique()
        if rows["image"].n_unique() >= 8:
            judged[name] = correct(rows).mean(), rows["image"].n_unique()
    assert len(judged) >= 2
    accuracy = [one for one, _ in judged.values()]
    worst, gap = (value(model, f"by={column}", metric) for metric in ("worst_group_top1", "gap_top1"))
    assert worst["value"] == pytest.approx(min(accuracy))
    assert gap["value"] == pytest.approx(max(accuracy) - min(accuracy))
    assert worst["count"] == gap["count"] == min(count for _, count in judged.values())


def test_counts_are_images(finished, value):
    assert value("siglip")["count"] == 100
    assert value("siglip", "family=held out")["count"] == 100
    assert value("siglip", "set=colour")["count"] == 100
    assert value("replace", "side=running statistics")["count"] == 100
    assert finished[0].scores.filter(split="test", model="siglip", seed=0).height == 20 * 100


def test_means_and_paired_differences_are_taken_over_seeds(finished, value, content):
    main = [one.name for one in content[1]["test"].sets if not one.side]
    scores = finished[0].scores.filter(pl.col("set").is_in(main), split="test")

    def answers(model: str, seed: int) -> np.ndarray:
        return correct(scores.filter(model=model, seed=seed))

    image = scores.filter(model="siglip", seed=0)["image"].to_numpy().astype(int)
    for model, other in (("residual", "replace"), ("residual", "siglip"), ("replace", "siglip")):
        one, two = (np.stack([answers(name, seed) for seed in (0, 1)]) for name in (model, other))
        row = value(model, metric=f"top1_minus_{other}", seed=None)
        assert row["value"] == pytest.approx(one.mean() - two.mean())
        # Both are measured on the same drawn images: the interval is that of the difference.
        drawn = resample((one - two).mean(0, keepdims=True), image, 100)[0]
        low, high = np.quantile(drawn, (0.025, 0.975))
        assert row["low"] == pytest.approx(low)
        assert row["high"] == pytest.approx(high)
    assert "top1_minus_replace" not in set(finished[0].metrics.filter(model="siglip")["metric"])


# --- side reports -------------------------------------------------------------------------------------------


def test_side_reports_are_of_generators_on_the_test_split_alone(finished):
    sides = finished[0].metrics.filter(pl.col("group").str.starts_with("side="))
    assert set(sides["split"]) == {"test"}
    assert set(sides["metric"].str.split("_minus_").list.first()) == {"top1"}
    found = {
        model: {name.removeprefix("side=").split(",")[0] for name in rows["group"]}
        for (model,), rows in sides.group_by("model")
    }
    assert found == SIDES
    families = {name for name in sides["group"] if name.startswith("side=neutral")}
    assert families == {"side=neutral"} | {
        f"side=neutral, {name}" for name in ("one attribute", "pair trained on", "held out")
    }


def test_side_reports_ask_the_same_questions_with_other_weights(finished, value, content):
    main = [one.name for one in content[1]["test"].sets if not one.side]
    for model, sides in SIDES.items():
        kept = load_file(finished[1] / "training" / f"{model}-seed0" / "results.safetensors")
        for side in sides:
            ranks = np.concatenate([kept[f"test|{name}|{side}"][0] for name in main])
            assert value(model, f"side={side}")["value"] == pytest.approx((ranks == 1).mean())
            plain = np.concatenate([kept[f"test|{name}"][0] for name in main])
            assert (ranks != plain).any()


# --- running again, keeping, loading ------------------------------------------------------------------------


def test_finished_models_are_not_trained_again(finished, content, word_store):
    first, folder = finished
    cards = sorted(folder.rglob("card.json"))
    assert len(cards) == 6  # three models under two seeds
    siglip = folder / "training" / "siglip-seed1" / "card.json"
    siglip.unlink()  # killed before this one was finished
    times = {card: card.stat().st_mtime_ns for card in cards if card != siglip}
    again = compare(recipe_of(), content, word_store, folder, "cpu")
    assert {card: card.stat().st_mtime_ns for card in times} == times
    assert siglip.is_file()
    assert again.scores.equals(first.scores)
    assert again.metrics.equals(first.metrics)
    assert not list(folder.rglob("checkpoint*"))


def test_models_are_kept_once_and_only_where_asked(finished, tmp_path, content, word_store):
    assert Run(finished[1]).models() == ["replace", "residual", "siglip"]
    few = {
        split: replace(asked, sets=(content[1][split].named("colour"),))
        for split, asked in content[1].items()
    }
    models = [{"name": "siglip", "kind": "siglip", "keep_weights": False}]
    compare(recipe_of(models=models, seeds=[0]), (content[0], few), word_store, tmp_path, "cpu")
    assert Run(tmp_path).models() == []


@pytest.mark.parametrize("name", ["siglip", "replace", "residual"])
def test_a_kept_model_classifies_as_the_runs_scores_say(name, finished, content, word_store, monkeypatch):
    monkeypatch.setattr("workbench.classifier.TextEncoder", lambda *_: None)
    monkeypatch.setattr("workbench.classifier.EmbeddingStore", lambda *_: word_store)
    model = Run(finished[1]).model(name)
    assert model.size == 32
    questions = content[1]["test"]
    for asked in ("texture", "shape and count", "colour, by synonyms"):
        one = questions.named(asked)
        found = model.adapt(one.classes, one.templates).classify(questions.pixels[one.rows])
        scores = finished[0].scores.filter(split="test", model=name, seed=0, set=asked)
        assert found["class"].to_list() == [one.classes[place] for place in scores["predicted"]]


def test_cards_say_what_was_trained_and_whether_it_is_alive(finished):
    cards = {(card["model"], card["seed"]): card for card in finished[0].cards}
    assert set(cards) == {("chance", None)} | {
        (model, seed) for model in ("siglip", "replace", "residual") for seed in (0, 1)
    }
    plain, hyper = cards["siglip", 0], cards["replace", 0]
    assert hyper["parameters"] - plain["parameters"] == hyper["cost"]["generator_parameters"]
    assert hyper["cost"]["generated_parameters"] == 2528  # norms of test_efficientnet, scales and shifts
    assert (
        hyper["health"]["conditions"] == 16
    )  # of 20 class sets, texture and count have three classes, by synonyms too
    assert hyper["health"]["moved"] > 0
    assert "health" not in plain
    for card in (plain, hyper):
        assert 0 < card["geometry"]["alignment"] < 4
        assert -8 < card["geometry"]["uniformity"] < 0
        assert card["geometry"]["positives"] == card["geometry"]["rows"] > 30
    assert hyper["history"][-1]["epoch"] == 1


def test_health_is_measured_on_what_the_model_feeds_its_generator(content, word_store, tmp_path, monkeypatch):
    seen = []
    whole = hyper_clip_comparison.health_of
    monkeypatch.setattr(
        hyper_clip_comparison, "health_of", lambda *asked: (seen.append(asked[1]), whole(*asked))[1]
    )
    models = [CHANGES["models"][0], {**CHANGES["models"][2], "keep_weights": False}]
    recipe = recipe_of(models=models, reference="chance", seeds=[0], resamples=100)
    few = {
        split: replace(asked, sets=tuple(one for one in asked.sets if one.name in ("colour", "shape")))
        for split, asked in content[1].items()
    }
    compare(recipe, (content[0], few), word_store, tmp_path, "cpu")
    # Entries of unit variance: rows of norm sqrt(16).
    torch.testing.assert_close(seen[0].norm(dim=-1), torch.full((2, 6), 4.0))


def test_a_model_may_mix_other_kinds_of_caption_than_the_recipe(content, word_store, tmp_path, monkeypatch):
    seen = {}
    whole = hyper_clip_comparison.ClipLoss

    def loss(model, data, texts, kinds, half, captions, classes):
        seen[model.settings.name] = (kinds, half, captions, classes)
        return whole(model, data, texts, kinds, half, captions, classes)

    monkeypatch.setattr(hyper_clip_comparison, "ClipLoss", loss)
    plain = {"kind": "siglip", "keep_weights": False}
    models = [
        {**plain, "name": "siglip"},
        {**plain, "name": "mixed", "kinds_at_once": 7, "classes_at_once": 0},
        {**plain, "name": "narrow", "classes_at_once": 4},
    ]
    more = {"kinds_at_once": 2, "captions_at_once": 3, "classes_at_once": 15, "reference": "siglip"}
    few = {split: replace(asked, sets=asked.sets[:1]) for split, asked in content[1].items()}
    recipe = recipe_of(models=models, seeds=[0], resamples=100, **more)
    compare(recipe, (content[0], few), word_store, tmp_path, "cpu")
    assert seen == {"siglip": (2, False, 3, 15), "mixed": (7, False, 3, 0), "narrow": (2, False, 3, 4)}


def test_a_model_that_is_told_nothing_embeds_every_image_once_whatever_is_asked(
    content, word_store, tmp_path, monkeypatch
):
    plain = {"kind": "token_control", "calibration": 16, "keep_weights": False, **SMALL}
    recipe = recipe_of(models=[{**plain, "name": "tokens"}], reference="tokens", seeds=[0], resamples=100)
    few = {
        split: replace(
            asked, sets=tuple(one for one in asked.sets if one.name in ("colour", "shape", "count"))
        )
        for split, asked in content[1].items()
    }
    counts, whole = [], hyper_clip_comparison.embed
    monkeypatch.setattr(
        hyper_clip_comparison,
        "embed",
        lambda model, pixels: (counts.append(len(pixels)), whole(model, pixels))[1],
    )
    found = compare(recipe, (content[0], few), word_store, tmp_path, "cpu")
    # Valid once; test as it is, with another set's weights and with running statistics; and for the card.
    assert counts == [100] * 5
    metrics = found.metrics.filter(metric="top1", split="test", seed=0)
    asked = {row["group"]: row["value"] for row in metrics.to_dicts()}
    assert asked["side=weights of another set"] == asked["all"]


# --- identity and shape of the data -------------------------------------------------------------------------


def test_the_identity_of_the_data_follows_pixels_texts_and_labels(content, monkeypatch):
    train, questions = content
    test = questions["test"]
    pixels = train.pixels.clone()
    pixels[0, 0, 0, 0] += 1
    first = test.sets[0]
    others = [
        (train, questions),
        (replace(train, pixels=pixels), questions),
        (replace(train, texts=[*train.texts[:-1], "something else"]), questions),
        (train, {**questions, "test": replace(test, pixels=test.pixels.flip(0))}),
        (train, {**questions, "test": asking(test, replace(first, label=first.label.flip(0)))}),
        (train, {**questions, "test": asking(test, replace(first, classes=first.classes[::-1]))}),
    ]
    waiting = iter(others)
    monkeypatch.setattr(hyper_clip_comparison, "load_scenes", lambda _: next(waiting))
    found = [load_data(recipe_of()) for _ in others]
    assert len({loaded.sha256 for loaded in found}) == len(others)
    assert found[0].counts == {
        "train": {"images": 100, "captions": len(train.texts)},
        "valid": {"images": 100, "class_sets": 20},
        "test": {"images": 100, "class_sets": 20},
    }


def asking(questions: Questions, first: ClassSet) -> Questions:
    return replace(questions, sets=(first, *questions.sets[1:]))


def test_the_identity_is_the_same_each_time_and_another_for_another_seed(content, monkeypatch):
    once = load_data(recipe_of()).sha256
    assert load_data(recipe_of()).sha256 == once
    monkeypatch.setattr(scenes_module, "SHIFTED", 0.5)
    assert load_data(recipe_of()).sha256 != once
    monkeypatch.undo()
    other = {**CHANGES["data"], "seed": 1}
    assert load_data(recipe_of(data=other)).sha256 != once


def test_splits_may_be_broken_down_by_groups_of_their_own(word_store, tmp_path):
    """As on photos: no group on valid, one on test that half of the images lack, and a told set aside."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8, generator=draw)
    names = ["a red fox", "a blue bird", "a green frog", "a grey wolf"]
    label = torch.arange(60) % 4
    train = Captioned(pixels, names, label[:, None], torch.zeros(1, dtype=torch.long), torch.arange(4))
    plain = ClassSet("animals", names, ("{}",), torch.arange(60), label)
    later = ClassSet("others", names, ("one {}",), torch.arange(10, 50), label[10:50])
    told = replace(plain, name="animals, told of more", distractors=("a horse", "a fish"), side=True)
    style = ["drawn"] * 20 + ["painted"] * 10 + [None] * 30
    questions = {
        "valid": Questions(pixels, pl.DataFrame({"picture": ["p"] * 60}), (plain,)),
        "test": Questions(pixels, pl.DataFrame({"style": style}), (plain, later, told), ("style",)),
    }
    models = [CHANGES["models"][0], CHANGES["models"][1], CHANGES["models"][3] | {"against": None}]
    recipe = recipe_of(models=models, seeds=[0])
    found = compare(recipe, (train, questions), word_store, tmp_path, "cpu")
    assert found.scores.filter(split="valid")["style"].is_null().all()
    assert Counter(found.scores.filter(split="test", model="siglip", set="animals")["style"]) == Counter(
        style
    )
    counts = found.metrics.filter(model="siglip", split="test", metric="top1", seed=0)
    counts = dict(counts.select("group", "count").iter_rows())
    assert (counts["style=drawn"], counts["style=painted"]) == (20, 10)
    assert counts["all"] == 60  # images, though two sets ask them
    assert counts["set=others"] == 40
    assert not found.metrics.filter(pl.col("group").str.starts_with("by="), split="valid").height
    # Not told of more, siglip scores the set as before; the generator is adapted to six texts.
    rank = {
        (model, name): found.scores.filter(split="test", model=model, set=name)["rank"].to_list()
        for model in ("siglip", "residual")
        for name in ("animals", "animals, told of more")
    }
    assert rank["siglip", "animals"] == rank["siglip", "animals, told of more"]


def test_a_guess_has_rank_zero_and_no_row_of_scores(finished):
    assert "chance" not in set(finished[0].scores["model"])
    assert finished[0].scores["rank"].min() == 1


def test_results_of_a_model_are_its_ranks_and_predictions(finished, content):
    one = Found("x", 0, {"test|colour": torch.tensor([[1, 3], [2, 0]])}, {})
    few = replace(content[1]["test"], sets=(replace(content[1]["test"].sets[0], rows=torch.tensor([4, 7]),
                                                    label=torch.tensor([2, 5])),))  # fmt: skip
    found = hyper_clip_comparison._scores({"test": few}, [one])
    assert found.select("image", "label", "predicted", "rank").rows() == [(4, 2, 2, 1), (7, 5, 0, 3)]
    about = content[1]["test"].about
    assert found["background"].to_list() == [about["background"][4], about["background"][7]]

"""What families share: means over seeds with Student's interval, differences seed by seed, resumed runs."""

import math
import re

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from workbench.errors import RecipeError
from workbench.families.comparison import CURVES, Outcome, comparison_of, interval_over_seeds
from workbench.family_tables import claim_of, family_runs, family_table
from workbench.papers import FAMILIES, load_recipe, paper_of
from workbench.runs import Run
from workbench.tables import bar_table, main_metric, model_table, score_table

VALUES = {"shift": (0.4, 0.5, 0.6), "none": (0.1, 0.3, 0.2)}


@pytest.fixture
def recipe():
    models = [{"name": name, "kind": name} for name in VALUES]
    return load_recipe("family_aspect", {"models": models, "bars": []})


def measured(recipe, store, tmp_path, calls):
    def measure(recipe, content, model, seed, folder):
        calls.append((model.name, seed))
        line = [1.0, 2.0], [float(seed), 3.0]
        return Outcome({"accuracy": VALUES[model.name][seed]}, 50, curves={"line": line})

    return comparison_of(measure)(recipe, None, store, tmp_path, "cpu")


def test_a_mean_has_students_interval_over_seeds():
    """0.4, 0.5, 0.6: mean 0.5, deviation 0.1, half = t 0.1 / sqrt(3) = 4.3027 x 0.057735 = 0.2484."""
    low, high = interval_over_seeds(np.array([0.4, 0.5, 0.6]))
    assert (low, high) == pytest.approx((0.5 - 0.2484, 0.5 + 0.2484), abs=1e-4)
    ours = stats.ttest_1samp([0.4, 0.5, 0.6], 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((ours.low, ours.high))


def test_one_seed_has_no_interval():
    assert all(math.isnan(side) for side in interval_over_seeds(np.array([0.4])))


def test_differences_are_taken_seed_by_seed(recipe, word_store, tmp_path):
    metrics = measured(recipe, word_store, tmp_path, []).metrics
    [row] = metrics.filter(model="shift", metric="accuracy_minus_none").to_dicts()
    # 0.3, 0.2, 0.4: mean 0.3, and not the interval of two independent means.
    assert row["value"] == pytest.approx(0.3)
    assert row["high"] - row["value"] == pytest.approx(0.2484, abs=1e-4)
    assert row["count"] == 50
    seeds = metrics.filter(pl.col("seed").is_not_null(), model="shift")["value"].to_list()
    assert seeds == pytest.approx([0.4, 0.5, 0.6])


def test_shares_of_the_reference_are_taken_seed_by_seed(recipe, word_store, tmp_path):
    def measure(recipe, content, model, seed, folder):
        return Outcome({"accuracy": VALUES[model.name][seed], "other": 1.0}, 50)

    compare = comparison_of(measure, shares=("accuracy",))
    metrics = compare(recipe, None, word_store, tmp_path, "cpu").metrics
    # 0.4 / 0.1, 0.5 / 0.3, 0.6 / 0.2: the mean of 4, 5/3 and 3.
    [row] = metrics.filter(metric="accuracy_of_none").to_dicts()
    assert (row["model"], row["value"]) == ("shift", pytest.approx((4 + 5 / 3 + 3) / 3))
    assert not metrics["metric"].str.contains("other_of").any()
    assert not measured(recipe, word_store, tmp_path / "b", []).metrics["metric"].str.contains("_of_").any()


def test_curves_are_kept_by_model_and_seed(recipe, word_store, tmp_path):
    scores = measured(recipe, word_store, tmp_path, []).scores
    assert scores.schema == pl.Schema(CURVES)
    assert scores.filter(model="none", seed=2)["y"].to_list() == [2.0, 3.0]
    assert scores.height == 2 * 3 * 2


def test_finished_models_are_not_computed_again(recipe, word_store, tmp_path):
    first, again = [], []
    before = measured(recipe, word_store, tmp_path, first)
    after = measured(recipe, word_store, tmp_path, again)
    assert (len(first), again) == (6, [])
    assert before.metrics.equals(after.metrics)
    assert before.scores.equals(after.scores)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_recipe_with_seeds_bars_and_a_control(name):
    recipe = load_recipe(f"family_{name}")
    roles = [model.role for model in recipe.models]
    assert len(recipe.seeds) >= 3
    assert "control" in roles
    assert recipe.bars
    assert recipe.sets in (("families",), ("neighbours",))
    known = {model.name for model in recipe.models}
    assert {bar.model for bar in recipe.bars} <= known
    assert recipe.reading
    assert re.search(
        r"\(.*(arXiv \d{4}\.\d{4,5}|ours).*\)$", recipe.claim
    )  # its source, or that there is none
    assert len(recipe.claim) < 200
    for part in ("RECIPE", "load_data", "needs_tokens", "compare"):
        assert hasattr(paper_of(name), part)


def test_a_setting_that_a_family_does_not_have_is_refused():
    with pytest.raises(RecipeError, match="unknown key 'width'"):
        load_recipe("family_aspect", {"width": 3})


def test_a_run_is_listed_ranked_and_held_against_its_bars(tiny_family_run):
    run = tiny_family_run
    assert main_metric(run) == "accuracy"
    names = [row[0] for row in score_table(run).rows]
    assert sorted(names) == sorted(model["name"] for model in run.recipe["models"])
    assert bar_table(run).rows == []
    assert list(family_runs(run.folder.parent.parent)) == ["family_aspect_tiny"]
    table = family_table([run])
    row = dict(zip(table.columns, *table.rows, strict=True))
    roles = {model["name"]: model["role"] for model in run.recipe["models"]}
    ranked = model_table(run).sort("accuracy", descending=True).to_dicts()
    for column, role in (("ours", "generated weights"), ("control", "control")):
        best = next(one for one in ranked if roles[one["model"]] == role)
        assert row[column].startswith(f"{best['model']} {best['accuracy']:.3f} (")
    assert (row["control without training"], row["bar"]) == ("-", "-")
    assert row["claim"] == load_recipe("family_aspect").claim  # of the recipe that this one extends
    assert row["seconds"] == f"{sum(card['seconds'] for card in run.cards):.0f}"


def test_every_bar_of_a_family_stands_in_its_row_with_what_was_measured(tiny_family_run):
    run = Run(tiny_family_run.folder)
    value = model_table(run).filter(model="none")["accuracy"].item()
    limits = [{"at_most": 1.0}, {"at_least": 1.5}]
    about = {"model": "none", "metric": "accuracy", "split": "test"}
    missing = {**about, "metric": "speed", "at_least": 2.0}
    run.__dict__["recipe"] = run.recipe | {"bars": [*({**about, **one} for one in limits), missing]}
    [row] = family_table([run]).rows
    assert row[2] == (
        f"none accuracy <= 1 → {value:.3f}, met; none accuracy >= 1.5 → {value:.3f}, missed; "
        "none speed >= 2 → -, not measured"
    )


def test_what_is_claimed_does_not_change_what_a_run_is(tiny_family_run):
    name = tiny_family_run.recipe["name"]
    recipe = load_recipe(name)
    assert recipe.claim
    assert load_recipe(name, {"claim": "something else"}).hash == recipe.hash
    assert load_recipe(name, {"steps": recipe.steps + 1}).hash != recipe.hash


def test_the_claim_of_an_older_run_is_that_of_the_recipe_now(tiny_family_run):
    older, own = Run(tiny_family_run.folder), Run(tiny_family_run.folder)
    older.__dict__["recipe"] = {key: value for key, value in older.recipe.items() if key != "claim"}
    assert claim_of(older) == load_recipe("family_aspect").claim
    own.__dict__["recipe"] = own.recipe | {"name": "of_mine", "claim": "mine"}
    assert claim_of(own) == "mine"


def test_lower_is_better_turns_the_order(tiny_family_run):
    turned = Run(tiny_family_run.folder)
    turned.__dict__["recipe"] = tiny_family_run.recipe | {"lower_is_better": True}
    rows, other = score_table(tiny_family_run).rows, score_table(turned).rows
    assert [row[0] for row in rows] == [row[0] for row in other][::-1]


@pytest.mark.parametrize("name", ["aspect", "low_rank", "personal"])
def test_a_runs_identity_does_not_hang_on_the_last_digits_of_a_factorisation(name, monkeypatch):
    """They change with the number of threads: a notebook trained again what had been trained before it."""
    recipe, plain = load_recipe(f"family_{name}"), torch.linalg.qr
    before = paper_of(name).load_data(recipe).sha256

    def rounded_otherwise(matrix):
        found = plain(matrix)
        return type(found)((found.Q * (1 + 1e-7), found.R))

    monkeypatch.setattr(torch.linalg, "qr", rounded_otherwise)
    assert paper_of(name).load_data(recipe).sha256 == before


@pytest.mark.parametrize("name", ["sentences", "domains", "matryoshka", "objectives"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_run_says_which_split_was_asked(name, split, word_store, tmp_path):
    recipe = load_recipe(f"family_{name}", {"split": split, "seeds": [0]})
    compare = comparison_of(lambda *_: Outcome({recipe.metric: 0.5}, 3))
    assert set(compare(recipe, None, word_store, tmp_path, "cpu").metrics["split"]) == {split}

"""Continual learning: what keeps earlier tasks, what does not, and what it costs."""

import math

import pytest
import torch

from workbench.datasets.digits import permuted
from workbench.errors import RecipeError
from workbench.families.continual import classifier, curves_of, load_data, measure, network
from workbench.families.tasks import learn
from workbench.papers import load_recipe
from workbench.training import Training, seed_everything

MODELS = [
    {"name": "fine_tune", "kind": "fine_tune"},
    {"name": "separate", "kind": "separate", "learning_rate": 0.1},
    {"name": "free", "kind": "hyper", "beta": 0, "hidden": [8]},
    {"name": "held", "kind": "hyper", "beta": 1, "hidden": [8], "against": "free"},
    {"name": "chunked", "kind": "chunked", "beta": 1, "hidden": [8], "chunk": 300},
]
CHANGES = {
    "seeds": [0], "tasks": 3, "models": MODELS, "reference": "fine_tune", "bars": [], "published": [],
    "training": {"epochs": 2, "batch_size": 64, "learning_rate": 1e-2},
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_continual", CHANGES)


@pytest.fixture(scope="module")
def digits(recipe):
    return load_data(recipe).content


@pytest.fixture(scope="module")
def outcomes(recipe, digits, tmp_path_factory):
    found = {}
    for model in recipe.models:
        seed_everything(0)
        found[model.name] = measure(recipe, digits, model, 0, tmp_path_factory.mktemp(model.name))
    return found


def test_only_what_is_held_in_place_keeps_the_first_tasks(outcomes):
    forgotten = {name: outcome.values["forgetting"] for name, outcome in outcomes.items()}
    assert forgotten["separate"] == 0
    assert forgotten["fine_tune"] > forgotten["held"] + 0.1
    assert forgotten["free"] > forgotten["held"]
    assert outcomes["held"].values["accuracy"] > outcomes["fine_tune"].values["accuracy"]


def test_values_follow_from_the_curves(outcomes):
    outcome = outcomes["fine_tune"]
    own = [outcome.curves[f"task {task}"] for task in (1, 2, 3)]
    assert [one[0] for one in own] == [[1.0, 2.0, 3.0], [2.0, 3.0], [3.0]]
    last, first = [one[1][-1] for one in own], [one[1][0] for one in own]
    assert outcome.values["accuracy"] == pytest.approx(sum(last) / 3)
    assert outcome.values["when_learned"] == pytest.approx(sum(first) / 3)
    # The last task had no time to be forgotten: the mean is over the two before it.
    assert outcome.values["forgetting"] == pytest.approx((first[0] - last[0] + first[1] - last[1]) / 2)


def test_curves_of_a_table_worked_out_by_hand():
    table = torch.tensor([[0.8, math.nan], [0.5, 0.9]], dtype=torch.double)
    curves = curves_of(table)
    assert curves["task 1"] == ([1.0, 2.0], [0.8, 0.5])
    assert curves["task 2"] == ([2.0], [0.9])
    # After one task 0.8; after two (0.5 + 0.9) / 2 = 0.7.
    assert curves["mean of tasks met"][1] == pytest.approx([0.8, 0.7])


def test_the_card_has_the_break_even_count_and_the_size(outcomes):
    # One network: 64 * 48 + 48 + 48 * 10 + 10 = 3,610; three of them are the size 1.
    assert outcomes["separate"].values["size_to_separate"] == 1
    assert outcomes["fine_tune"].values["size_to_separate"] == pytest.approx(1 / 3)
    # (8 + 1) * 8 + (8 + 1) * 3,610 = 32,562 for 3,610: 9.02, so ten conditions; 24 numbers are codes.
    assert outcomes["held"].about["cost"]["break_even_conditions"] == 10
    assert outcomes["held"].about["parameters"] == 32_562 + 24
    # 13 chunks of 300 with 16 numbers each, (24 + 1) * 8 hidden, (8 + 1) * 300: 3,108, less than one network.
    assert outcomes["chunked"].about["parameters"] == 13 * 16 + 25 * 8 + 9 * 300 + 24
    assert outcomes["chunked"].about["cost"]["break_even_conditions"] == 1
    for name in ("free", "held", "chunked"):
        assert outcomes[name].about["health"]["verdict"] == "sound"


def test_the_same_seed_gives_the_same_numbers_and_another_other_tasks(recipe, digits, outcomes, tmp_path):
    model = recipe.models[3]
    seed_everything(0)
    assert measure(recipe, digits, model, 0, tmp_path / "a").values == outcomes["held"].values
    seed_everything(1)
    assert measure(recipe, digits, model, 1, tmp_path / "b").values != outcomes["held"].values


@pytest.mark.parametrize("index", [2, 4])
def test_loss_falls_the_gradient_reaches_the_generator_and_the_fixed_start_stays(
    recipe, digits, index, tmp_path
):
    seed_everything(0)
    net = network(recipe.models[index], 3)
    before = {name: one.detach().clone() for name, one in net.named_parameters()}
    tasks = permuted(digits, 3, 0)
    history = learn(
        net, tasks, slice(0, 1), Training(epochs=3, batch_size=128, learning_rate=1e-2), tmp_path, seed=0
    )
    assert history[-1]["loss"] < history[0]["loss"]
    moved = {name for name, one in net.named_parameters() if not torch.equal(one, before[name])}
    assert {name for name in before if name.startswith("net.generator")} <= moved
    assert not {name for name in moved if name.startswith("net.target")}
    first, second = net.weights(slice(0, 2)).tensors["0.weight"]
    assert not torch.allclose(first, second)


def test_separate_networks_share_nothing(recipe, digits, tmp_path):
    seed_everything(0)
    net = network(recipe.models[1], 3)
    before = net.net.generator.head.weight.detach().clone()
    learn(net, permuted(digits, 3, 0), slice(1, 2), recipe.training, tmp_path, seed=0)
    changed = (net.net.generator.head.weight != before).any(1)
    assert changed.tolist() == [False, True, False]
    assert net.net.spec.numel == sum(one.numel() for one in classifier().parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "fine_tune", "beta": 1}, "beta goes with generated weights"),
        ({"kind": "hyper"}, "beta goes with generated weights"),
        ({"kind": "hyper", "beta": -1}, "models.0.beta"),
        ({"kind": "chunked", "beta": 1, "chunk": 0}, "models.0.chunk"),
        ({"kind": "hyper", "beta": 1, "hidden": []}, "models.0.hidden"),
        ({"kind": "other"}, "models.0.kind"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, said):
    model = {"name": "wrong", **change}
    with pytest.raises(RecipeError, match=said):
        load_recipe("family_continual", {**CHANGES, "models": [model], "reference": "wrong"})

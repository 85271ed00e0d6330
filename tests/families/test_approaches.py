"""The table of approaches: what each row is told, trains and keeps, and that a new task leaves the base."""

import math

import pytest
import torch
from torch.nn.functional import mse_loss

from workbench.errors import RecipeError
from workbench.families.approaches import SEEN, UNSEEN, Approach, load_data, measure
from workbench.families.waves import answers, descriptors, points
from workbench.papers import load_recipe
from workbench.training import fit, seed_everything

MODELS = [
    {"name": "standard", "kind": "standard"},
    {"name": "concat", "kind": "concat"},
    {"name": "hyper", "kind": "hyper"},
    {"name": "lora", "kind": "rows", "rank": 2},
    {"name": "own_weights", "kind": "rows"},
    {"name": "maml", "kind": "maml"},
]
CHANGES = {
    "seeds": [0], "models": MODELS, "reference": "concat", "bars": [], "steps": 20,
    "new": {"epochs": 5, "batch_size": 1, "learning_rate": 0.1},
}  # fmt: skip
# 1-40-40-1: 40 + 40 + 1600 + 40 + 40 + 1.
NETWORK = 1761


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_approaches", CHANGES)


def built(recipe, name):
    seed_everything(0)
    return Approach(next(model for model in recipe.models if model.name == name))


def tasks(count):
    return descriptors(count, torch.Generator().manual_seed(0))


def test_a_task_by_hand():
    x = torch.tensor([[[0.5]]])
    # Height 1.5 + 1, frequency 1 - 1/2, phase pi/2 * 0.2, offset -1.
    expected = 2.5 * math.sin(0.5 * 0.5 + math.pi / 2 * 0.2) - 1
    found = answers(torch.tensor([[1.0, -1.0, 0.2, -1.0]]), x)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_rows_count_what_they_train_and_what_a_task_keeps(outcomes):
    values = {name: found.values for name, found in outcomes.items()}
    # Factors of the 40 x 40 layer, 2 * 2 * 40, and biases, 40 + 40 + 1: 241.
    # The descriptor adds 4 x 40 weights: 1,921.
    assert {name: (own["parameters"], own["kept"]) for name, own in values.items() if name != "hyper"} == {
        "standard": (NETWORK, 0),
        "concat": (1921, 4),
        "lora": (NETWORK + SEEN * 241, 241),
        "own_weights": (NETWORK + SEEN * NETWORK, NETWORK),
        "maml": (NETWORK, NETWORK),
    }
    about = outcomes["hyper"].about
    assert values["hyper"]["parameters"] == NETWORK + about["cost"]["generator_parameters"]
    assert {name: (own["examples"], own["new_steps"]) for name, own in values.items()} == {
        "standard": (0, 0), "concat": (0, 0), "hyper": (0, 0), "lora": (10, 5), "own_weights": (10, 5),
        "maml": (10, 10),
    }  # fmt: skip


def test_the_wide_control_has_about_as_many_parameters_as_the_hypernetwork():
    full = load_recipe("family_approaches")
    sizes = {}
    for model in full.models:
        net = Approach(model)
        sizes[model.name] = sum(one.numel() for one in net.parameters() if one.requires_grad)
    assert sizes["concat_wide"] == pytest.approx(sizes["hyper"], rel=0.05)


def test_only_rows_that_are_told_the_task_answer_differently(recipe):
    x, _ = points(tasks(1).expand(2, -1), 6, torch.Generator().manual_seed(0))
    x = x[:1].expand(2, -1, -1)
    for model in recipe.models:
        with torch.no_grad():
            one, two = built(recipe, model.name)(tasks(SEEN)[:2], x)
        assert torch.equal(one, two) == (model.kind in ("standard", "maml"))


def test_a_new_row_learns_without_touching_the_base_or_the_old_rows(recipe, tmp_path):
    net = built(recipe, "lora")
    before = {name: one.clone() for name, one in net.state_dict().items()}
    new = net.joined(UNSEEN)
    x, y = points(tasks(UNSEEN), 10, torch.Generator().manual_seed(0))
    start = mse_loss(new(tasks(UNSEEN), x), y)
    fit(new, lambda _: mse_loss(new(tasks(UNSEEN), x), y), 1, recipe.new, tmp_path, seed=0)
    assert mse_loss(new(tasks(UNSEEN), x), y) < start
    assert all(torch.equal(one, net.state_dict()[name]) for name, one in before.items())
    base = {name: one for name, one in new.state_dict().items() if "generator" not in name}
    assert all(torch.equal(one, before[name]) for name, one in base.items())


def test_new_rows_learn_as_if_each_were_alone(recipe, tmp_path):
    net = built(recipe, "lora")
    x, y = points(tasks(3), 10, torch.Generator().manual_seed(0))
    both = net.joined(3)
    alone = net.joined(1)
    alone.net.generator.head.weight.data = both.net.generator.head.weight.data[1:2].clone()

    def train(one, of, folder):
        def loss(_):
            return len(x[of]) * mse_loss(one(tasks(3)[of], x[of]), y[of])

        fit(one, loss, 1, recipe.new, folder, seed=0)

    train(both, slice(None), tmp_path / "both")
    train(alone, slice(1, 2), tmp_path / "alone")
    torch.testing.assert_close(
        both.net.generator.head.weight[1], alone.net.generator.head.weight[0], atol=1e-3, rtol=1e-3
    )


def test_gradient_steps_on_examples_lower_their_error(recipe):
    net = built(recipe, "maml")
    shown = points(tasks(5), 10, torch.Generator().manual_seed(0))
    with torch.no_grad():
        errors = [
            float(mse_loss(net.adapted(shown, shown[0], steps, 0.01), shown[1])) for steps in (0, 1, 10)
        ]
    assert errors[0] > errors[1] > errors[2]


def test_the_gradient_reaches_generator_and_base(recipe):
    net = built(recipe, "hyper")
    x, y = points(tasks(3), 10, torch.Generator().manual_seed(0))
    mse_loss(net(tasks(3), x), y).backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in net.parameters())


@pytest.fixture(scope="module")
def outcomes(recipe, tmp_path_factory):
    found = {}
    for model in recipe.models:
        seed_everything(0)
        found[model.name] = measure(recipe, None, model, 0, tmp_path_factory.mktemp(model.name))
    return found


@pytest.mark.parametrize("name", ["concat", "hyper", "lora", "maml"])
def test_twenty_steps_lower_the_error_on_seen_tasks(recipe, outcomes, name, tmp_path):
    once = load_recipe("family_approaches", {**CHANGES, "steps": 1})
    model = next(one for one in recipe.models if one.name == name)
    seed_everything(0)
    start = measure(once, None, model, 0, tmp_path).values["mse_seen"]
    assert outcomes[name].values["mse_seen"] < start


def test_the_same_seed_gives_the_same_numbers_and_curves_to_look_at(recipe, outcomes, tmp_path):
    seed_everything(0)
    found = measure(recipe, None, recipe.models[2], 0, tmp_path)
    assert found.values == outcomes["hyper"].values
    assert found.about["health"]["verdict"] == "sound"
    x, _ = found.curves["answer"]
    assert x == sorted(x) == found.curves["truth"][0]


def test_the_data_is_described(recipe):
    assert load_data(recipe).counts == {"train": {"tasks": 40}, "test": {"tasks": 20}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "hyper", "rank": 2}, "rank belongs to kind rows"),
        ({"kind": "rows", "rank": 0}, "models.0.rank"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(
            "family_approaches", {**CHANGES, "models": [{"name": "wrong", **change}], "reference": "wrong"}
        )

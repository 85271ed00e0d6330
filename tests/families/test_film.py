"""FiLM: what a task owns, what stays frozen, and which control differs in what."""

import pytest
import torch

from workbench.datasets.digits import permuted, rotated_and_flipped
from workbench.errors import RecipeError
from workbench.families.film import NEW, TASKS, classifier, load_data, measure, network, turns
from workbench.families.tasks import accuracies, learn
from workbench.hypernetworks import ChannelAffine
from workbench.papers import load_recipe
from workbench.training import seed_everything

MODELS = [
    {"name": "film", "kind": "film", "stream": "relabelled", "own_rate": 0.05},
    {"name": "film_permuted", "kind": "film", "stream": "permuted", "own_rate": 0.05},
    {"name": "factors", "kind": "factors", "rank": 2, "stream": "permuted", "own_rate": 0.05},
    {"name": "hyper", "kind": "hyper", "beta": 1, "stream": "permuted"},
    {"name": "separate", "kind": "separate", "stream": "relabelled", "own_rate": 0.1},
    {"name": "shared", "kind": "shared", "stream": "relabelled"},
]
CHANGES = {
    "seeds": [0], "base_epochs": 1, "models": MODELS, "reference": "film", "bars": [], "published": [],
    "training": {"epochs": 1, "batch_size": 64, "learning_rate": 1e-2},
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_film", CHANGES)


@pytest.fixture(scope="module")
def digits(recipe):
    return load_data(recipe).content


def built(recipe, name):
    seed_everything(0)
    return network(next(model for model in recipe.models if model.name == name))


def test_film_scales_and_shifts_the_channels_of_a_shared_network_by_hand(recipe, digits):
    net, inputs = built(recipe, "film"), digits.inputs["test"][None, :6]
    with torch.no_grad():
        net.net.generator.head.weight.normal_()
    weights = {name: one[0] for name, one in net.weights(slice(2, 3)).tensors.items()}
    hidden = inputs[0]
    for layer, affine in ((0, 1), (3, 4)):
        hidden = hidden @ net.net.target[layer].weight.T + net.net.target[layer].bias
        hidden = torch.relu((1 + weights[f"{affine}.weight"]) * hidden + weights[f"{affine}.bias"])
    expected = hidden @ net.net.target[6].weight.T + net.net.target[6].bias
    torch.testing.assert_close(net(inputs, slice(2, 3))[0], expected, rtol=1e-4, atol=1e-5)


def test_film_starts_at_the_identity_and_owns_two_numbers_a_channel(recipe, digits):
    net, inputs = built(recipe, "film"), digits.inputs["test"][:6]
    plain = net.net.target(inputs)
    assert torch.equal(net(inputs[None], slice(7, 8))[0], plain)
    # Two hidden layers of 128 channels, a scale and a shift each.
    assert net.net.spec.numel == 2 * 128 * 2


def test_the_identity_of_the_network_itself_is_never_trained():
    assert len(classifier(1)) == 4
    for module in classifier(2):
        if isinstance(module, ChannelAffine):
            assert not any(one.requires_grad for one in module.parameters())


@pytest.mark.parametrize("name", ["film", "factors"])
def test_new_tasks_leave_the_old_ones_and_the_network_bit_for_bit(recipe, digits, name, tmp_path):
    net, tasks = built(recipe, name), permuted(digits, TASKS, 0)
    learn(net, tasks, slice(0, NEW), recipe.training, tmp_path / "a", seed=0)
    net.net.target.requires_grad_(False)
    before = {key: one.clone() for key, one in net.state_dict().items()}
    old = accuracies(net, tasks, NEW)
    learn(net, tasks, slice(NEW, TASKS), recipe.training, tmp_path / "b", seed=0)
    after = net.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        "net.generator.head.weight"
    }
    rows = (before["net.generator.head.weight"] != after["net.generator.head.weight"]).any(1)
    assert rows.tolist() == [False] * NEW + [True] * (TASKS - NEW)
    assert torch.equal(accuracies(net, tasks, NEW), old)


def test_loss_falls_and_every_kind_gives_tasks_weights_of_their_own(recipe, digits, tmp_path):
    tasks = rotated_and_flipped(digits, TASKS)
    training = recipe.training.model_copy(update={"epochs": 2})
    for name in ("film", "factors", "hyper", "separate"):
        net = built(recipe, name)
        history = learn(net, tasks, slice(0, 2), training, tmp_path / name, seed=0)
        assert history[-1]["loss"] < history[0]["loss"]
        weights = net.weights(slice(0, 2)).tensors
        assert all(not torch.equal(one[0], one[1]) for one in weights.values())


def test_which_tasks_learn_at_once_depends_on_what_they_share(recipe):
    found = {model.name: turns(model) for model in recipe.models}
    assert found["film"] == found["separate"] == [slice(0, 5), slice(5, 10)]
    assert found["hyper"] == [slice(0, 5), *(slice(task, task + 1) for task in range(5, 10))]
    assert found["shared"] == [slice(task, task + 1) for task in range(10)]
    assert turns(recipe.models[0].model_copy(update={"base": 1})) == [slice(0, 1), slice(1, 10)]


@pytest.fixture(scope="module")
def outcomes(recipe, digits, tmp_path_factory):
    found = {}
    for model in recipe.models:
        if model.name != "hyper":  # slow, and its parts are tested above and in test_continual
            seed_everything(0)
            found[model.name] = measure(recipe, digits, model, 0, tmp_path_factory.mktemp(model.name))
    return found


def test_only_what_is_frozen_or_apart_forgets_exactly_nothing(outcomes):
    for name in ("film", "film_permuted", "factors", "separate"):
        assert outcomes[name].values["old_drop"] == 0.0
    assert outcomes["shared"].values["old_drop"] > 0.1


def test_the_card_says_what_a_task_owns(outcomes):
    assert outcomes["film"].values["numbers_per_task"] == 512
    # Rank 2 of 64 x 128, 128 x 128 and 128 x 10, and the biases: 2 (192 + 256 + 138) + 128 + 128 + 10.
    assert outcomes["factors"].values["numbers_per_task"] == 1438
    # 65 * 128 + 129 * 128 + 129 * 10.
    assert outcomes["separate"].values["numbers_per_task"] == 26_122
    assert "numbers_per_task" not in outcomes["shared"].values
    assert outcomes["film"].about["cost"]["break_even_conditions"] == 10
    assert outcomes["film"].about["health"]["moved"] == 1  # it started at zero


def test_the_same_seed_gives_the_same_numbers(recipe, digits, outcomes, tmp_path):
    seed_everything(0)
    assert measure(recipe, digits, recipe.models[1], 0, tmp_path).values == outcomes["film_permuted"].values


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "film", "rank": 2}, "a rank goes with kind factors"),
        ({"kind": "factors"}, "a rank goes with kind factors"),
        ({"kind": "factors", "rank": 11}, "models.0.rank"),
        ({"kind": "film", "beta": 1}, "beta holds a generator in place"),
        ({"kind": "film", "stream": "other"}, "models.0.stream"),
        ({"kind": "film", "base": 6}, "models.0.base"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, said):
    model = {"name": "wrong", "stream": "permuted", **change}
    with pytest.raises(RecipeError, match=said):
        load_recipe("family_film", {**CHANGES, "models": [model], "reference": "wrong"})

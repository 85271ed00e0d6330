"""Starts of a generator: their equations, what they do to a deep network, and divergence as a result."""

import math

import pytest
import torch

from workbench.errors import RecipeError, RunError
from workbench.families.initialisation import (
    CODE,
    GENERATOR,
    LAYERS,
    classifier,
    load_data,
    measure,
    network,
    signal,
)
from workbench.families.tasks import learn_by_sgd
from workbench.papers import load_recipe
from workbench.training import seed_everything

KINDS = ("default", "kaiming", "hyperfan_in", "bias_hyperinit", "unit", "unit_base")
MODELS = [
    {"name": f"{kind}_{optimiser}", "kind": kind, "optimiser": optimiser}
    for kind in KINDS
    for optimiser in ("adam", "sgd")
]
CHANGES = {
    "seeds": [0], "tasks": 2, "models": MODELS, "reference": "default_adam", "bars": [], "published": [],
    "training": {"epochs": 1, "batch_size": 64, "learning_rate": 1e-3, "schedule": "constant", "warmup": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_initialisation", CHANGES)


@pytest.fixture(scope="module")
def digits(recipe):
    return load_data(recipe).content


def built(recipe, name, seed=0, tasks=64):
    seed_everything(seed)
    return network(next(model for model in recipe.models if model.name == name), tasks)


def deviations(net):
    """Standard deviation of every slot's coefficients as they act, over 64 codes."""
    with torch.no_grad():
        return {name: float(one.std()) for name, one in net.weights(slice(None)).tensors.items()}


def test_hyperfan_in_gives_weights_half_of_the_variance_that_keeps_the_signal(recipe):
    found = deviations(built(recipe, "hyperfan_in_adam"))
    # d_h * 2 / (2 d_h n E[h^2]) * E[h^2] = 1 / n, and 1 for a bias: together what a ReLU asks for.
    for name, fan_in in {"0.weight": 64, "2.weight": 32, "10.weight": 32}.items():
        assert found[name] == pytest.approx(math.sqrt(1 / fan_in), rel=0.25)
    assert found["2.bias"] == pytest.approx(1, rel=0.35)


def test_the_unit_start_gives_weights_the_variance_that_keeps_the_signal(recipe):
    found = deviations(built(recipe, "unit_adam"))
    for name, fan_in in {"0.weight": 64, "2.weight": 32, "10.weight": 32}.items():
        assert found[name] == pytest.approx(math.sqrt(2 / fan_in), rel=0.15)


def test_kaiming_on_the_generator_gives_every_weight_the_scale_of_its_hidden_vector(recipe):
    net = built(recipe, "kaiming_adam")
    with torch.no_grad():
        second = float(net.net.generator.body(net.codes.weight).square().mean())
    # d_h * (2 / d_h) * E[h^2], whatever the fan-in.
    found = deviations(net)
    assert found["0.weight"] == pytest.approx(math.sqrt(2 * second), rel=0.15)
    assert found["2.weight"] == pytest.approx(math.sqrt(2 * second), rel=0.15)


def test_bias_hyperinit_starts_every_task_at_one_ordinary_network(recipe, digits):
    net = built(recipe, "bias_hyperinit_adam")
    inputs = digits.inputs["test"][:5]
    logits = net(inputs.expand(2, -1, -1), slice(0, 2))
    plain = net.net.target(inputs)
    torch.testing.assert_close(logits[0], plain)
    torch.testing.assert_close(logits[1], plain)


def test_the_learned_base_is_trained_and_replaced_weights_are_not(recipe):
    for name, trained in (("unit_base_sgd", True), ("unit_sgd", False)):
        assert {one.requires_grad for one in built(recipe, name).net.target.parameters()} == {trained}


def test_the_control_loses_the_scale_and_the_unit_start_keeps_it(recipe, digits):
    inputs = digits.inputs["test"]
    lost, kept = signal(built(recipe, "kaiming_sgd"), inputs), signal(built(recipe, "unit_sgd"), inputs)
    assert len(lost) == len(kept) == LAYERS
    assert lost[-1] > 3
    assert lost == sorted(lost)
    assert abs(kept[-1]) < 1


def test_signal_is_that_of_the_first_tasks_network(recipe, digits):
    net, inputs = built(recipe, "unit_adam"), digits.inputs["test"][:50]
    hidden = inputs @ net.net.freeze(net.codes.weight[0])[0].weight.T
    assert signal(net, inputs)[0] == pytest.approx(math.log10(float(hidden.detach().std())), abs=0.1)


@pytest.mark.parametrize("generator", ["chunked", "factors"])
def test_the_default_start_is_in_range_for_every_generator(digits, generator):
    model = {"name": "one", "kind": "unit_base", "optimiser": "sgd", "generator": generator}
    recipe = load_recipe("family_initialisation", {**CHANGES, "models": [model], "reference": "one"})
    net = built(recipe, "one", tasks=8)
    with torch.no_grad():
        logits = net(digits.inputs["test"].expand(8, -1, -1), slice(None))
    assert 0.1 < float(logits.std()) < 10


def test_learning_by_sgd_takes_the_steps_of_sgd_with_momentum():
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    training = load_recipe("family_initialisation", CHANGES).training
    # Loss w: gradient 1. Two epochs of one batch: w = 1 - 0.1 * 1, then 0.9 - 0.1 * (0.9 * 1 + 1) = 0.71.
    twice = training.model_copy(update={"epochs": 2})
    history = learn_by_sgd(net, lambda items: net.weight.sum(), 3, twice, rate=0.1, seed=0)
    assert float(net.weight.detach()) == pytest.approx(0.71)
    assert [one["loss"] for one in history] == pytest.approx([1.0, 0.9])


def test_learning_by_sgd_stops_at_a_loss_that_is_not_finite(recipe):
    net = torch.nn.Linear(1, 1)
    with pytest.raises(RunError, match="the loss is nan in epoch 1 with learning rate 0.1"):
        learn_by_sgd(net, lambda items: net.weight.sum() * math.nan, 3, recipe.training, rate=0.1, seed=0)


def test_a_diverged_training_counts_as_guessing_and_says_so(recipe, digits, tmp_path):
    model = next(one for one in recipe.models if one.name == "kaiming_sgd")
    seed_everything(0)
    outcome = measure(recipe, digits, model, 0, tmp_path)
    assert outcome.values["accuracy"] == 0.1
    assert outcome.values["diverged"] == 1
    assert outcome.values["log10_logit_std"] > 3
    assert "loss is" in outcome.about["diverged"] or "NaN" in outcome.about["diverged"]
    assert "health" not in outcome.about
    assert all(math.isfinite(value) for value in outcome.values.values())


@pytest.mark.parametrize("name", ["unit_base_sgd", "bias_hyperinit_adam"])
def test_loss_falls_the_same_seed_repeats_and_the_gradient_reaches_the_generator(
    recipe, digits, name, tmp_path
):
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 2})})
    model = next(one for one in recipe.models if one.name == name)
    found = []
    for folder in ("a", "b"):
        seed_everything(0)
        found.append(measure(longer, digits, model, 0, tmp_path / folder))
    assert found[0].values == found[1].values
    assert found[0].values["diverged"] == 0
    loss = found[0].curves["training loss"][1]
    assert loss[-1] < loss[0]
    assert found[0].about["health"]["moved"] > 0


def test_the_network_is_deep_and_its_generator_as_large_as_stated(recipe):
    # 64 * 32 + 32, four of 32 * 32 + 32, 32 * 10 + 10.
    generated = 2080 + 4 * 1056 + 330
    assert sum(one.numel() for one in classifier().parameters()) == generated
    cost = built(recipe, "unit_adam").net.cost()
    assert cost["generator_parameters"] == (CODE + 1) * GENERATOR[0] + (GENERATOR[0] + 1) * generated


@pytest.mark.parametrize("change", [{"kind": "other"}, {"optimiser": "other"}, {"generator": "other"}])
def test_settings_that_make_no_sense_are_refused(change):
    model = {"name": "wrong", "kind": "unit", "optimiser": "sgd", **change}
    with pytest.raises(RecipeError, match=f"models.0.{next(iter(change))}"):
        load_recipe("family_initialisation", {**CHANGES, "models": [model], "reference": "wrong"})

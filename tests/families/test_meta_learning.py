"""Few-shot regression: the equations, the equal treatment of rows, and the closed forms of the limit."""

import math

import pytest
import torch
from sklearn.linear_model import Ridge

from workbench.errors import RecipeError
from workbench.families import lines as limit
from workbench.families.meta_learning import (
    QUESTIONS,
    SHOTS,
    Concatenated,
    Generated,
    Gradient,
    answer,
    load_data,
    measure,
)
from workbench.families.waves import sinusoids
from workbench.papers import load_recipe
from workbench.training import seed_everything

MODELS = [
    {"name": "maml", "kind": "gradient", "inner_steps": 1, "steps": 20, "width": 8},
    {"name": "joint", "kind": "gradient", "steps": 20, "width": 8},
    {"name": "hyper", "kind": "hyper", "steps": 20, "width": 8},
    {"name": "concat", "kind": "concat", "steps": 20, "width": 8},
    {"name": "generated_lines", "kind": "generated_lines", "steps": 20},
    {"name": "least_squares", "kind": "least_squares"},
    {"name": "ridge", "kind": "ridge"},
]
CHANGES = {"seeds": [0], "models": MODELS, "reference": "maml", "bars": [], "test_tasks": 40}


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_meta_learning", CHANGES)


def tasks(count=4, seed=0):
    return sinusoids(count, SHOTS + QUESTIONS, torch.Generator().manual_seed(seed))


def test_a_task_is_a_sine_of_height_up_to_five_over_minus_five_to_five():
    x, y = tasks(500)
    assert x.abs().max() <= 5
    assert y.abs().max() <= 5
    # Mean of A^2 / 2 over A in 0.1..5: (5^3 - 0.1^3) / (3 * 4.9 * 2) = 4.25.
    assert float(y.square().mean()) == pytest.approx(4.25, abs=0.5)


def test_points_of_a_task_lie_on_one_sine():
    x, y = (one.double() for one in tasks(3))
    for task in range(3):
        # A sin(x + p) = a sin x + b cos x: two numbers fit all points of a task.
        waves = torch.cat([torch.sin(x[task]), torch.cos(x[task])], 1)
        fitted = torch.linalg.lstsq(waves, y[task]).solution
        torch.testing.assert_close(waves @ fitted, y[task], atol=1e-4, rtol=1e-4)


def test_what_the_examples_say_does_not_depend_on_their_order():
    torch.manual_seed(0)
    x, y = tasks()
    turned = torch.randperm(SHOTS)
    for net in (Generated(8), Concatenated(8)):
        mixed = [torch.cat([one[:, turned], one[:, SHOTS:]], 1) for one in (x, y)]
        torch.testing.assert_close(answer(net, *mixed, 0, 0.1), answer(net, x, y, 0, 0.1))


def test_other_examples_give_other_weights_and_the_gradient_reaches_reader_and_generator():
    torch.manual_seed(0)
    net, (x, y) = Generated(8), tasks()
    weights = net.start(x[:, :SHOTS], y[:, :SHOTS])
    assert all(not torch.equal(one[0], one[1]) for one in weights.values())
    answer(net, x, y, 0, 0.1).square().mean().backward()
    for part in (net.read, net.task.generator, net.target):
        assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in part.parameters())


def test_answers_to_questions_never_see_their_own_truth():
    torch.manual_seed(0)
    x, y = tasks()
    hidden = y.clone()
    hidden[:, SHOTS:] = math.nan
    for net, steps in ((Gradient(8), 2), (Generated(8), 0), (Concatenated(8), 0)):
        assert torch.equal(answer(net, x, hidden, steps, 0.01), answer(net, x, y, steps, 0.01))


def test_maml_and_joint_training_differ_in_the_inner_step_alone():
    recipe = load_recipe("family_meta_learning")
    maml, joint = (next(one for one in recipe.models if one.name == name) for name in ("maml", "joint"))
    same = maml.model_dump().keys() - {"name", "inner_steps", "steps", "learning_rate"}
    assert all(getattr(maml, key) == getattr(joint, key) for key in same)
    assert (maml.inner_steps, joint.inner_steps) == (1, 0)


def test_ridge_and_least_squares_are_those_of_scikit_learn():
    x, y, _ = limit.lines(3, torch.Generator().manual_seed(0))
    for penalty in limit.CLOSED.values():
        found = limit.closed_form(x, y, penalty)
        for task in range(3):
            expected = Ridge(penalty, fit_intercept=False).fit(
                x[task].double().numpy(), y[task, :, 0].double()
            )
            torch.testing.assert_close(
                found[task, :, 0].double(), torch.from_numpy(expected.coef_), atol=1e-4, rtol=1e-4
            )


def test_the_expected_error_of_least_squares_is_what_the_formula_says():
    x, y, truth = limit.lines(20_000, torch.Generator().manual_seed(0))
    errors = {
        name: float((limit.closed_form(x, y, q) - truth).square().sum(1).mean())
        for name, q in limit.CLOSED.items()
    }
    # Noise variance times d / (n - d - 1): 0.0625 * 8 / 3 = 0.1667.
    assert errors["least_squares"] == pytest.approx(0.1667, abs=0.01)
    assert errors["ridge"] < errors["least_squares"] - 0.03


def test_lines_are_read_as_what_a_closed_form_needs():
    x, y, _ = limit.lines(2, torch.Generator().manual_seed(0))
    net = limit.GeneratedLines()
    codes = net.codes(x, y)
    # 8 * 9 / 2 = 36 products of inputs, 8 of inputs and answer.
    assert codes.shape == (2, 44)
    assert float(codes[0, 0]) == pytest.approx(float((x[0, :, 0] ** 2).mean()), rel=1e-5)
    assert float(codes[0, -1]) == pytest.approx(float((x[0, :, 7] * y[0, :, 0]).mean()), rel=1e-4)


@pytest.fixture(scope="module")
def outcomes(recipe, tmp_path_factory):
    found = {}
    for model in recipe.models:
        seed_everything(0)
        found[model.name] = measure(recipe, None, model, 0, tmp_path_factory.mktemp(model.name))
    return found


def test_training_lowers_the_error_of_every_learned_row(recipe, outcomes, tmp_path):
    one_step = load_recipe(
        "family_meta_learning", {**CHANGES, "models": [{**m, "steps": 1} for m in MODELS[:5]]}
    )
    for model in one_step.models:
        seed_everything(0)
        first = measure(one_step, None, model, 0, tmp_path / model.name).values
        metric = "mse_lines" if model.kind == "generated_lines" else "mse"
        assert outcomes[model.name].values[metric] < first[metric]


def test_rows_report_the_ratio_of_parameters_and_the_steps_they_can_take(outcomes):
    # 1-8-8-1 has 97 numbers, the reference 1-40-40-1 has 1,761.
    assert outcomes["maml"].values["parameter_ratio"] == pytest.approx(97 / 1761)
    assert outcomes["maml"].values["mse"] == outcomes["maml"].values["mse_step_10"]
    assert outcomes["hyper"].values["mse"] == outcomes["hyper"].values["mse_step_0"]
    assert "mse_step_1" not in outcomes["concat"].values
    assert outcomes["hyper"].about["cost"]["generated_parameters"] == 97
    assert outcomes["hyper"].about["health"]["verdict"] == "sound"
    assert outcomes["maml"].about["cpu_seconds"] > 0
    assert len(outcomes["joint"].curves["mse_by_step"][0]) == 11
    assert len(outcomes["concat"].curves["shown"][0]) == SHOTS


def test_the_same_seed_gives_the_same_numbers(recipe, outcomes, tmp_path):
    for name in ("maml", "hyper"):
        model = next(one for one in recipe.models if one.name == name)
        seed_everything(0)
        assert measure(recipe, None, model, 0, tmp_path / name).values == outcomes[name].values


def test_the_data_is_described():
    assert load_data(load_recipe("family_meta_learning", CHANGES)).counts == {
        "test": {"sinusoids": 40, "lines": 40}
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "hyper", "steps": 1, "inner_steps": 1}, "inner_steps belong to kind gradient"),
        ({"kind": "ridge", "steps": 1}, "steps of training go with every kind but"),
        ({"kind": "hyper"}, "steps of training go with every kind but"),
        ({"kind": "hyper", "steps": 1, "width": 0}, "models.0.width"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(
            "family_meta_learning", {**CHANGES, "models": [{"name": "wrong", **change}], "reference": "wrong"}
        )

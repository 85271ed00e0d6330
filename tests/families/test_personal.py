"""Personal weights: the closed forms against scikit-learn, and what the generator reads."""

import math

import pytest
import torch
from sklearn.linear_model import Ridge

from workbench.errors import RecipeError
from workbench.families.personal import (
    NOISE,
    PENALTIES,
    TASTE,
    D,
    Personal,
    best_penalty,
    learned_penalty,
    load_data,
    measure,
    rated,
    solved,
    squared_error,
)
from workbench.papers import load_recipe
from workbench.training import seed_everything

MODELS = [{"name": kind, "kind": kind} for kind in ("mean", "ridge", "learned_ridge", "hyper")]
CHANGES = {"seeds": [0], "models": MODELS, "reference": "ridge", "bars": [], "steps": 20, "hidden": 16}


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_personal", CHANGES)


@pytest.fixture(scope="module")
def basis(recipe):
    return load_data(recipe).content


def ratings_of(basis, users=50, each=12, seed=0):
    return rated(basis, users, each, torch.Generator().manual_seed(seed))


def test_ratings_have_the_variance_that_the_equation_gives(basis):
    items, ratings = ratings_of(basis, 4000, 4)
    # |Q t|^2 is 4 numbers of variance 1/4 each, and the noise adds 0.09.
    assert float(ratings.square().mean()) == pytest.approx(1 + NOISE**2, rel=0.05)
    assert items.shape == (4000, 4, D)


def test_ridge_is_that_of_scikit_learn(basis):
    items, ratings = ratings_of(basis, 3)
    found = solved(items, ratings, 2.0 * torch.eye(D))
    for user in range(3):
        expected = Ridge(2.0, fit_intercept=False).fit(items[user].double(), ratings[user].double())
        torch.testing.assert_close(
            found[user].double(), torch.from_numpy(expected.coef_), atol=1e-4, rtol=1e-4
        )


def test_squared_error_by_hand():
    weights = torch.zeros(1, D)
    weights[0, :2] = torch.tensor([1.0, 2.0])
    items = torch.zeros(1, 2, D)
    items[0, 0, 0], items[0, 1, 1] = 1.0, 1.0
    # Answers 1 and 2, ratings 3 and 2: (4 + 0) / 2.
    assert float(squared_error(weights, items, torch.tensor([[3.0, 2.0]]))) == 2.0


def test_the_penalty_is_chosen_on_known_users_near_what_bayes_says(basis):
    chosen = best_penalty(ratings_of(basis, 300, 40), 5)
    # Tastes over all 16 numbers have variance 1/16 each: 0.09 * 16 = 1.44; the true ones use 4 of them.
    assert chosen in PENALTIES
    assert 0.5 <= chosen <= 8


def test_the_learned_penalty_knows_the_directions_that_tastes_have(basis):
    penalty = learned_penalty(ratings_of(basis, 2000, 40))
    inside = torch.linalg.eigvalsh(basis.T @ penalty @ basis)
    # v / (1/4) = 0.36 along each taste, and far more where nobody differs.
    torch.testing.assert_close(inside, torch.full((TASTE,), 4 * NOISE**2), rtol=0.15, atol=0)
    assert float(torch.linalg.eigvalsh(penalty)[TASTE]) > 5


def test_with_the_true_covariance_the_learned_form_beats_ridge_at_few_ratings(basis):
    items, ratings = ratings_of(basis, 500, 60)
    shown, asked = (items[:, :5], ratings[:, :5]), (items[:, 5:], ratings[:, 5:])
    learned = squared_error(solved(*shown, learned_penalty(ratings_of(basis, 300, 40, 1))), *asked)
    own = squared_error(solved(*shown, 1.44 * torch.eye(D)), *asked)
    assert learned < 0.6 * own


def test_the_generator_reads_a_set_and_knows_how_large_it_is(basis):
    torch.manual_seed(0)
    net, (items, ratings) = Personal(16), ratings_of(basis, 4, 6)
    turned = torch.randperm(6)
    torch.testing.assert_close(
        net.codes(items[:, turned], ratings[:, turned]), net.codes(items, ratings), atol=1e-4, rtol=1e-4
    )
    twice = net.codes(items.repeat(1, 2, 1), ratings.repeat(1, 2))
    torch.testing.assert_close(twice, 2 * net.codes(items, ratings), atol=1e-4, rtol=1e-4)


def test_another_user_gets_other_weights_and_the_gradient_reaches_all_that_is_learned(basis):
    torch.manual_seed(0)
    net, (items, ratings) = Personal(16), ratings_of(basis, 4, 6)
    weights = net.weights(items, ratings)
    assert weights.shape == (4, D)
    assert not torch.equal(weights[0], weights[1])
    squared_error(weights, items, ratings).backward()
    for name, one in net.named_parameters():
        if one.requires_grad:
            assert one.grad.abs().sum() > 0, name
    # What the scorer would have of its own is replaced.
    assert not net.scorer.target.weight.requires_grad


@pytest.fixture(scope="module")
def outcomes(recipe, basis, tmp_path_factory):
    found = {}
    for model in recipe.models:
        seed_everything(0)
        found[model.name] = measure(recipe, basis, model, 0, tmp_path_factory.mktemp(model.name))
    return found


def test_closed_forms_rank_as_theory_says_at_every_number_of_ratings(outcomes):
    for given in (3, 5, 10, 20):
        mean, ridge, learned = (
            outcomes[name].values[f"mse_{given}"] for name in ("mean", "ridge", "learned_ridge")
        )
        assert NOISE**2 < learned < ridge < mean
    assert outcomes["mean"].values["mse_3"] == outcomes["mean"].values["mse_20"]
    assert outcomes["ridge"].values["share_of_ridge_5"] == 1.0


def test_twenty_steps_lower_the_error_of_the_generator(recipe, basis, outcomes, tmp_path):
    once = load_recipe("family_personal", {**CHANGES, "steps": 1})
    seed_everything(0)
    start = measure(once, basis, recipe.models[3], 0, tmp_path).values
    assert outcomes["hyper"].values["mse_20"] < start["mse_20"] - 0.05


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(recipe, basis, outcomes, tmp_path):
    seed_everything(0)
    again = measure(recipe, basis, recipe.models[3], 0, tmp_path / "a")
    assert again.values == outcomes["hyper"].values
    assert measure(recipe, basis, recipe.models[1], 1, tmp_path / "b").values != outcomes["ridge"].values


def test_the_card_says_what_the_generator_costs(outcomes):
    about = outcomes["hyper"].about
    assert about["cost"]["generated_parameters"] == D
    # Features 16 x 8 are learned beside the generator.
    assert about["parameters"] == about["cost"]["generator_parameters"] + 128
    assert about["health"]["conditions"] == 64
    assert math.isfinite(about["history"][0]["loss"])
    assert outcomes["hyper"].curves["mse_by_ratings"][0] == [3.0, 5.0, 10.0, 20.0]


@pytest.mark.parametrize(
    ("change", "said"), [({"kind": "tree"}, "models.0.kind"), ({"kind": "hyper", "rank": 2}, "models.0.rank")]
)
def test_settings_that_make_no_sense_are_refused(change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(
            "family_personal", {**CHANGES, "models": [{"name": "wrong", **change}], "reference": "wrong"}
        )

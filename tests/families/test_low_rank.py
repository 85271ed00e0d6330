"""Rank of generated weights: the pairs by hand, the rank of what acts, and what each control lacks."""

import pytest
import torch
from torch.nn.functional import normalize

from workbench.errors import RecipeError
from workbench.families.low_rank import (
    CANDIDATES,
    SEEN,
    TRUE_RANK,
    UNSEEN,
    D,
    Embed,
    load_data,
    measure,
    pairs,
    recall,
)
from workbench.papers import load_recipe
from workbench.training import seed_everything

MODELS = [
    {"name": "none", "kind": "none"},
    {"name": "gate", "kind": "gate", "hidden": 16},
    {"name": "concat", "kind": "concat", "hidden": 16},
    {"name": "rank_2", "kind": "matrix", "rank": 2, "hidden": 16},
    {"name": "full", "kind": "matrix", "hidden": 16},
    {"name": "rank_2_on_base", "kind": "matrix", "rank": 2, "base": True, "hidden": 16},
]
CHANGES = {
    "seeds": [0], "models": MODELS, "reference": "concat", "bars": [], "steps": 20, "test_rounds": 1,
    "training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2},
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_low_rank", CHANGES)


@pytest.fixture(scope="module")
def aspects(recipe):
    return load_data(recipe).content


def built(recipe, name):
    seed_everything(0)
    return Embed(next(model for model in recipe.models if model.name == name))


def test_a_condition_names_a_subspace_of_the_true_rank_with_an_orthonormal_basis(aspects):
    conditions, bases = aspects
    assert conditions.shape == (SEEN + UNSEEN, 3)
    eye = torch.eye(TRUE_RANK).expand(SEEN + UNSEEN, -1, -1)
    torch.testing.assert_close(bases.mT @ bases, eye, atol=1e-5, rtol=0)


def test_a_pair_agrees_inside_its_subspace_and_nowhere_else(aspects):
    bases = aspects[1][:2]
    one, two = pairs(bases, 4000, torch.Generator().manual_seed(0))
    inside = (one - two) @ bases
    # Each side adds noise of variance 0.1^2 to the same numbers: the difference has twice that.
    assert float(inside.square().mean()) == pytest.approx(2 * 0.1**2, rel=0.1)
    assert float((one @ bases).square().mean()) == pytest.approx(1 + 0.1**2, rel=0.1)
    outside = (one - two) - inside @ bases.mT
    # 42 of 48 directions are left, each with variance 2.
    assert float(outside.square().sum(-1).mean()) == pytest.approx(2 * (D - TRUE_RANK), rel=0.05)


def test_the_projection_to_the_true_subspace_finds_nearly_every_partner(aspects):
    conditions, bases = aspects

    class Oracle(torch.nn.Module):
        def forward(self, inputs, conditions):
            return normalize(inputs @ bases[SEEN:], dim=-1)

    class Blind(torch.nn.Module):
        def forward(self, inputs, conditions):
            return normalize(torch.randn(inputs.shape[:2] + (8,)), dim=-1)

    unseen = conditions[SEEN:], bases[SEEN:]
    assert recall(Oracle(), unseen, 1, 0) > 0.95
    torch.manual_seed(0)
    # One in a hundred by chance.
    assert recall(Blind(), unseen, 3, 0) == pytest.approx(1 / CANDIDATES, abs=0.01)


def test_without_a_base_the_whole_map_has_the_rank_that_is_generated(recipe, aspects):
    for name, expected in (("rank_2", 2), ("full", D), ("rank_2_on_base", D)):
        made = built(recipe, name).body.freeze(aspects[0][0])[0].weight
        assert int(torch.linalg.matrix_rank(made.double(), rtol=1e-5)) == expected


def test_low_rank_embeddings_by_hand(recipe, aspects):
    net, conditions = built(recipe, "rank_2"), aspects[0][:3]
    inputs = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))
    weights = net.body.weights(conditions).tensors
    expected = normalize(inputs @ (weights["0.down"] @ weights["0.up"]), dim=-1)
    torch.testing.assert_close(net(inputs, conditions), expected, atol=1e-5, rtol=1e-4)


def test_a_gate_that_yields_nothing_is_the_unconditioned_map(recipe, aspects):
    net, conditions = built(recipe, "gate"), aspects[0][:2]
    for one in net.gate[-1].parameters():
        torch.nn.init.zeros_(one)
    inputs = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(inputs, conditions), normalize(net.body(inputs), dim=-1))


def test_only_the_unconditioned_row_embeds_alike_under_all_conditions(recipe, aspects):
    inputs = torch.randn(1, 5, D, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1)
    for model in recipe.models:
        with torch.no_grad():
            one, two = built(recipe, model.name)(inputs, aspects[0][:2])
        assert torch.allclose(one, two, atol=1e-6) == (model.kind == "none")


@pytest.fixture(scope="module")
def outcomes(recipe, aspects, tmp_path_factory):
    found = {}
    for model in recipe.models:
        seed_everything(0)
        found[model.name] = measure(recipe, aspects, model, 0, tmp_path_factory.mktemp(model.name))
    return found


def test_twenty_steps_raise_the_recall_of_full_matrices(recipe, aspects, outcomes):
    unseen = aspects[0][SEEN:], aspects[1][SEEN:]
    start = recall(built(recipe, "full"), unseen, 1, 10_000_019)
    assert outcomes["full"].values["recall_at_1"] >= start + 0.03


def test_the_base_is_learned_only_where_the_row_says_so(recipe, outcomes):
    base = D * D
    for name, extra in (("rank_2", 0), ("full", 0), ("rank_2_on_base", base)):
        about = outcomes[name].about
        assert about["parameters"] == about["cost"]["generator_parameters"] + extra
    assert outcomes["rank_2"].about["cost"]["generated_parameters"] == 2 * 2 * D
    assert outcomes["none"].about["parameters"] == base


def test_the_knee_can_be_drawn_from_the_curves(outcomes):
    found = outcomes["rank_2"]
    assert found.curves["recall_by_rank"] == ([2.0], [found.values["recall_at_1"]])
    assert outcomes["full"].curves["recall_by_rank"][0] == [48.0]
    spectrum = found.curves["spectrum"][1]
    assert spectrum[0] == 1
    assert spectrum[1] > 1e-3
    assert max(spectrum[2:]) < 1e-5
    assert "recall_by_rank" not in outcomes["concat"].curves


def test_the_same_seed_gives_the_same_numbers(recipe, aspects, outcomes, tmp_path):
    seed_everything(0)
    found = measure(recipe, aspects, recipe.models[3], 0, tmp_path)
    assert found.values == outcomes["rank_2"].values
    assert found.about["health"]["verdict"] == "sound"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "gate", "rank": 2}, "rank and base belong to kind matrix"),
        ({"kind": "none", "base": True}, "rank and base belong to kind matrix"),
        ({"kind": "matrix", "rank": 49}, "models.0.rank"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(
            "family_low_rank", {**CHANGES, "models": [{"name": "wrong", **change}], "reference": "wrong"}
        )

"""Shapes from latent codes: equation (1) by hand, the rows, and what stays as it is."""

import json

import pytest
import torch

from tests.families.histories import mean_loss
from workbench.errors import RecipeError
from workbench.families import implicit
from workbench.families.fields import origin_codes
from workbench.families.implicit import Family
from workbench.families.superellipsoids import Shapes
from workbench.papers import load_recipe

TINY = {
    "name": "tiny", "paper": "implicit", "title": "tiny", "seeds": [0], "data": {"name": "drawn"},
    "metric": "iou", "reference": "hyper", "steps": 20, "shapes": 6, "held_out": 3, "code_steps": 5,
    "training": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2},
    "models": [{"name": "hyper", "kind": "generated", "width": 8}],
}  # fmt: skip


def recipe(**changes):
    return implicit.RECIPE.model_validate_json(json.dumps({**TINY, **changes}))


def one(kind, **settings):
    return implicit.ImplicitModel(name="one", kind=kind, width=8, **settings)


def run(model, folder, settings=None):
    settings = settings or recipe()
    torch.manual_seed(0)
    return implicit.measure(settings, implicit.load_data(settings).content, model, 0, folder)


def test_a_superellipsoid_goes_from_diamond_to_ellipse_to_box_with_its_exponent():
    points = torch.tensor([[[0.5, 0.5], [0.7, 0.7], [0.9, 0.9], [1.1, 0.0]]])
    for power, inside in ((1.0, [1, 0, 0, 0]), (2.0, [1, 1, 0, 0]), (8.0, [1, 1, 1, 0])):
        # |x|^e + |y|^e at (.7, .7): 1.4, 0.98, 0.12; at (.9, .9): 1.8, 1.62, 0.86
        shape = Shapes(torch.ones(1, 2), torch.full((1, 2), power), torch.eye(2)[None])
        assert shape.contain(points).int().tolist() == [inside]


def test_axes_stretch_and_a_quarter_turn_swaps_them():
    turned = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])
    shape = Shapes(torch.tensor([[2.0, 0.5]]), torch.full((1, 2), 2.0), turned)
    # long axis 2 now along y: (0, 1.5) is inside, (1.5, 0) is not
    assert shape.contain(torch.tensor([[[0.0, 1.5], [1.5, 0.0]]])).tolist() == [[True, False]]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_half_of_the_drawn_points_lie_close_enough_to_show_the_shape(dimensions):
    shapes = implicit.load_data(recipe(dimensions=dimensions)).content
    points = shapes.sample(400, 1)
    assert points.shape == (9, 400, dimensions)
    share = shapes.contain(points).float().mean(1)
    assert (share > 0.1).all()
    assert (share < 0.7).all()


def test_the_code_at_the_origin_is_minus_the_gradient_by_finite_differences():
    torch.manual_seed(0)
    family = Family(recipe(), one("gradient_origin")).double()
    points, inside = torch.randn(1, 30, 3).double(), torch.rand(1, 30) > 0.5

    def loss(codes):
        value = torch.nn.functional.binary_cross_entropy_with_logits(
            family.field(points, codes), inside.double()
        )
        return float(value.detach())

    step = 1e-5 * torch.eye(implicit.CODE).double()
    slope = [(loss(row[None]) - loss(-row[None])) / 2e-5 for row in step]
    found = origin_codes(family.field, implicit.CODE, points, inside)[0]
    assert found.tolist() == pytest.approx([-value for value in slope], abs=1e-7)


@pytest.mark.parametrize("kind", ["generated", "concat", "gradient_origin", "alone"])
def test_the_loss_falls_in_some_steps_and_the_same_seed_gives_the_same_numbers(kind, tmp_path):
    settings = recipe(code_steps=20)
    first = run(one(kind), tmp_path / "a", settings)
    assert first.values == run(one(kind), tmp_path / "b", settings).values
    longer = run(one(kind), tmp_path / "c", recipe(steps=80, code_steps=80))
    assert mean_loss(longer.about["history"]) < mean_loss(first.about["history"])


def test_only_the_generator_row_reports_a_generator_and_its_health(tmp_path):
    about = run(one("generated"), tmp_path / "a").about
    weights = 3 * 8 + 8 + 2 * (8 * 8 + 8) + 8 + 1
    assert about["cost"]["generated_parameters"] == about["per_query"] == weights
    assert about["health"]["verdict"] == "sound"
    concat = run(one("concat"), tmp_path / "b").about
    assert "health" not in concat
    # the control differs in the first layer only: 8 more inputs for 8 units
    assert concat["per_query"] == weights + 8 * 8


@pytest.mark.parametrize("kind", ["generated", "concat"])
def test_in_the_plane_a_point_has_one_number_less_and_all_else_stays(kind, tmp_path):
    space, plane = (
        run(one(kind), tmp_path / str(dimensions), recipe(dimensions=dimensions)) for dimensions in (3, 2)
    )
    assert space.about["per_query"] - plane.about["per_query"] == 8
    assert {*space.values} == {*plane.values}
    assert {*space.curves} == {*plane.curves}


def test_the_recipe_of_the_plane_differs_from_that_of_space_in_dimensions_and_rows_only():
    space, plane = (load_recipe(name).model_dump() for name in ("family_implicit", "family_implicit_2d"))
    apart = {key for key in space if space[key] != plane[key]}
    assert apart == {"name", "title", "sets", "dimensions", "models", "bars", "reading"}
    assert all(row in space["models"] for row in plane["models"])


def test_the_gradient_reaches_the_generator_and_another_code_gives_other_weights():
    family = Family(recipe(), one("generated"))
    shape, codes = family.field.shape, family.codes.weight
    family.field(torch.randn(6, 5, 3), codes).sum().backward()
    assert shape.generator.head.weight.grad.abs().sum() > 0
    assert codes.grad.abs().sum() > 0
    assert (shape.weights(codes).distances("0.weight").fill_diagonal_(1) > 0).all()


def test_the_nearest_shape_trains_nothing_and_finds_a_shape_that_it_knows(tmp_path):
    settings = recipe()
    shapes = implicit.load_data(settings).content
    known = Shapes(*(torch.cat([part[:6], part[:3]]) for part in shapes))
    assert implicit.measure(settings, known, one("nearest"), 0, tmp_path).values == {"iou": 1.0}


def test_pictures_are_slices_of_true_and_answered_shapes(tmp_path):
    found = run(one("generated"), tmp_path).curves
    assert {*found} == {f"shape_{n}{end}" for n in range(3) for end in ("", "_true")}
    assert all(len(x) == len(y) == implicit.GRID**2 for x, y in found.values())
    assert {*found["shape_0_true"][1]} == {0.0, 1.0}


def test_an_unknown_kind_and_a_fourth_dimension_are_refused():
    with pytest.raises(RecipeError, match="dimensions"):
        load_recipe("family_implicit", {"dimensions": 4})
    with pytest.raises(RecipeError, match="kind"):
        load_recipe("family_implicit", {"models": [{"name": "hyper", "kind": "magic"}], "reference": "hyper"})

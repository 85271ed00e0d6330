"""Articulation: the arm by hand, codes between states, and controls that differ in one thing."""

import json
import math

import pytest
import torch

from tests.families.histories import mean_loss
from workbench.errors import RecipeError
from workbench.families import articulation
from workbench.families.articulation import Arm, ArticulationModel, arm, halfway
from workbench.papers import load_recipe

TINY = {
    "name": "tiny", "paper": "articulation", "title": "tiny", "seeds": [0], "data": {"name": "drawn"},
    "metric": "iou", "reference": "hyper", "steps": 20, "states": 3,
    "training": {"epochs": 1, "batch_size": 1, "learning_rate": 1e-2},
    "models": [{"name": "hyper", "kind": "generated", "width": 8}],
}  # fmt: skip


def recipe(**changes):
    return articulation.RECIPE.model_validate_json(json.dumps({**TINY, **changes}))


def one(kind, **settings):
    return ArticulationModel(name="one", kind=kind, width=8, **settings)


def run(model, folder, settings=None):
    settings = settings or recipe()
    torch.manual_seed(0)
    return articulation.measure(settings, articulation.load_data(settings).content, model, 0, folder)


def test_the_arm_is_two_links_and_the_second_turns_about_the_elbow():
    # shoulder (-0.7, 0), elbow (0, 0), links 0.7 long, radius 0.12
    points = torch.tensor([[[-0.35, 0.1], [0.35, 0.1], [0.0, 0.6], [-0.35, 0.2], [0.9, 0.0]]])
    straight, bent = arm(points, torch.tensor([0.0]))[0], arm(points, torch.tensor([math.pi / 2]))[0]
    assert straight.tolist() == [True, True, False, False, False]
    assert bent.tolist() == [True, False, True, False, False]


def test_arms_bent_up_and_down_are_mirror_images():
    points = articulation.grid(21)[None]
    up, down = (arm(points, torch.tensor([angle]))[0].view(21, 21) for angle in (0.7, -0.7))
    assert torch.equal(up, down.flip(0))


def test_a_halfway_state_is_the_mean_of_its_neighbours_codes():
    assert halfway(3).tolist() == [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    torch.manual_seed(0)
    own, points = Arm(recipe(), one("generated")), torch.randn(2, 5, 2)
    by_hand = own.field(points, (own.codes[:-1] + own.codes[1:]) / 2)
    assert torch.allclose(own(points, halfway(3)), by_hand)


def test_a_table_averages_weights_where_the_generator_averages_codes():
    torch.manual_seed(0)
    own, points = Arm(recipe(), one("table")), torch.randn(1, 5, 2)
    rows = own.field.codes
    assert torch.equal(rows[0], rows[2])  # all start alike
    with torch.no_grad():
        rows[1].normal_()
    mean = own.field.shape.spec.compose(((rows[0] + rows[1]) / 2)[None])
    found = own(points, torch.tensor([[0.5, 0.5, 0.0]]))
    assert torch.allclose(found, own.field.shape(points, mean)[..., 0], atol=1e-6)


@pytest.mark.parametrize("kind", ["generated", "concat", "table"])
def test_the_loss_falls_and_the_same_seed_gives_the_same_numbers(kind, tmp_path):
    first = run(one(kind), tmp_path / "a")
    assert first.values == run(one(kind), tmp_path / "b").values
    longer = run(one(kind), tmp_path / "c", recipe(steps=100))
    assert mean_loss(longer.about["history"]) < mean_loss(first.about["history"])


def test_known_angles_are_codes_that_training_leaves_bit_for_bit():
    own = Arm(recipe(), one("generated", code="angle"))
    assert [name for name, _ in own.named_parameters() if "codes" in name] == []
    assert own.codes[:, 0].tolist() == pytest.approx([-1.7, 0, 1.7])


def test_the_gradient_reaches_generator_and_codes_and_states_differ():
    own = Arm(recipe(), one("generated"))
    own(torch.randn(3, 5, 2), torch.eye(3)).sum().backward()
    shape = own.field.shape
    assert shape.generator.head.weight.grad.abs().sum() > 0
    assert own.codes.grad.abs().sum() > 0
    assert (shape.weights(own.codes).distances("0.weight").fill_diagonal_(1) > 0).all()


def test_the_nearest_state_is_right_only_where_neighbours_overlap(tmp_path):
    coarse, fine = (run(one("nearest"), tmp_path, recipe(states=count)).values["iou"] for count in (3, 33))
    assert 0 < coarse < fine < 1
    assert fine > 0.9


def test_the_card_reports_the_generator_and_pictures_come_with_the_truth(tmp_path):
    found = run(one("generated"), tmp_path)
    assert found.about["cost"]["generated_parameters"] == 2 * 8 + 8 + 2 * (8 * 8 + 8) + 8 + 1
    assert found.about["health"]["verdict"] == "sound"
    assert {*found.curves} == {"arm_0", "arm_0_true"}  # two halfway states, of which the first is drawn
    assert run(one("table"), tmp_path / "t").about["health"]["conditions"] == 3


def test_one_state_is_refused_since_nothing_lies_between():
    with pytest.raises(RecipeError, match="states"):
        load_recipe("family_articulation", {"states": 1})

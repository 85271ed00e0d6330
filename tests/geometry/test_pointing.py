"""Scenes of four and where heat maps of trained towers point: by hand, and as a sum."""

import pytest
import torch

from workbench.classifier import Classifier
from workbench.datasets.scenes import _RGB
from workbench.geometry import pointing as module
from workbench.geometry.pointing import COLOURS, NAMES, QUARTERS, class_maps, draw_fours, pointing


def test_four_objects_of_four_colours_stand_in_their_quarters():
    fours = draw_fours(3, seed=1)
    assert fours.pixels.shape == (3, 3, 128, 128)
    for pixels, colours in zip(fours.pixels, fours.colours.tolist(), strict=True):
        assert len(set(colours)) == 4
        for place, (top, left, *_) in zip(colours, (128 * QUARTERS).int().tolist(), strict=True):
            quarter = pixels[:, top : top + 64, left : left + 64].float().flatten(1)
            apart = (quarter - torch.tensor(_RGB[COLOURS[place]]).float()[:, None]).norm(dim=0)
            # An object covers about an eighth of its quarter; its colour is off by 12 in each channel.
            assert (apart < 60).float().mean() > 0.03
    assert torch.equal(draw_fours(3, seed=1).pixels, fours.pixels)


def test_maps_of_an_adapted_tower_sum_to_the_cosine_with_each_class(image_text_model):
    model = image_text_model()
    classifier = model.adapt(["red", "green", "blue"])
    pixels = draw_fours(2).pixels
    maps = class_maps(classifier, pixels)
    assert maps.shape == (2, 3, 4, 4)
    expected = model.embed(pixels, classifier.weights) @ classifier.directions.T
    torch.testing.assert_close(maps.sum((2, 3)), expected, atol=1e-5, rtol=0)
    other = class_maps(model.adapt(["one", "two"]), pixels)
    assert (maps[:, :2] - other).abs().max() > 1e-4  # other classes, another encoder


def test_a_map_that_points_at_the_object_asked_for_is_a_hit(monkeypatch, image_text_model):
    fours = draw_fours(2)
    heat = torch.zeros(2, len(COLOURS), 2, 2)
    for scene, colours in enumerate(fours.colours.tolist()):
        for quarter, place in enumerate(colours):
            # All point right in the first scene; in the second all point at the first quarter.
            heat[scene, place].view(-1)[quarter if scene == 0 else 0] = 1
    monkeypatch.setattr(module, "class_maps", lambda *_: heat)
    # 4 of 4, then 1 of 4; drawn scenes are both the one, both the other, or one of each.
    found = pointing(image_text_model().adapt(NAMES), fours)
    assert found == {"value": pytest.approx(5 / 8), "low": 0.25, "high": 1.0, "scenes": 2}


def test_a_tower_that_knows_no_place_points_right_by_chance_only(image_text_model):
    classifier = image_text_model().adapt(NAMES)
    assert isinstance(classifier, Classifier)
    found = pointing(classifier, draw_fours(40))
    assert found["value"] == pytest.approx(0.25, abs=0.15)
    assert found["low"] < found["value"] < found["high"]

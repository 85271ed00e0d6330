"""Random hypernetworks: weights from a code by hand, nothing trained but the code, SIREN's scales."""

import json
import math

import pytest
import torch

from workbench.errors import RecipeError
from workbench.families import random_hypernetwork
from workbench.families.random_hypernetwork import Pictures, RandomModel, signal_to_noise, siren
from workbench.papers import load_recipe

TINY = {
    "name": "tiny", "paper": "random_hypernetwork", "title": "tiny", "seeds": [0], "data": {"name": "photos"},
    "metric": "psnr", "reference": "k8", "steps": 20,
    "training": {"epochs": 1, "batch_size": 1, "learning_rate": 0.05},
    "models": [{"name": "k8", "kind": "random", "code": 8, "width": 6}],
}  # fmt: skip


def recipe(**changes):
    return random_hypernetwork.RECIPE.model_validate_json(json.dumps({**TINY, **changes}))


def one(kind, code=0):
    return RandomModel(name="one", kind=kind, code=code, width=6)


def run(model, folder, settings=None, seed=0):
    settings = settings or recipe()
    torch.manual_seed(seed)
    pictures = random_hypernetwork.load_data(settings).content
    return random_hypernetwork.measure(settings, pictures, model, seed, folder)


def test_weights_are_the_code_through_the_fixed_map_times_the_layers_scale():
    own = Pictures(one("random", 8), 2, seed=3)
    draw = torch.randn(8, own.picture.spec.numel, generator=torch.Generator().manual_seed(3))
    by_hand = own.codes @ draw / math.sqrt(8)
    # the first slot is the first layer's weight, 6 x 2, with deviation 1 / (2 sqrt(3))
    found = own.picture.weights(own.codes).tensors["0.weight"].flatten(1)
    assert torch.allclose(found, by_hand[:, :12] / (2 * math.sqrt(3)), atol=1e-6)


def test_only_the_codes_are_trained_and_the_map_stays_bit_for_bit():
    own = Pictures(one("random", 8), 2, seed=0)
    trained = [name for name, one in own.named_parameters() if one.requires_grad]
    assert trained == ["codes"]
    before = own.picture.generator.projection.clone()
    own(random_hypernetwork.grid(4)).sum().backward()
    assert own.codes.grad.abs().sum() > 0
    assert torch.equal(before, own.picture.generator.projection)


def test_another_code_gives_other_weights_and_another_seed_another_map():
    own = Pictures(one("random", 8), 2, seed=0)
    assert own.picture.weights(own.codes).distances("2.weight")[0, 1] > 0
    other = Pictures(one("random", 8), 2, seed=1)
    assert not torch.equal(own.picture.generator.projection, other.picture.generator.projection)


def test_the_start_has_sirens_scales():
    # Table rows are unit normal: sqrt(6 / n) / w_0 uniform has deviation sqrt(2 / n) / w_0.
    _, spec = siren(24)
    deviation = {name: value for slot in spec.slots for name, (_, value) in slot.parts.items()}
    assert deviation["0.weight"] == pytest.approx(1 / (2 * math.sqrt(3)))
    assert deviation["2.weight"] == pytest.approx(math.sqrt(2 / 24) / random_hypernetwork.FREQUENCY)


@pytest.mark.parametrize(("width", "weights"), [(24, 1297), (10, 261)])
def test_a_siren_has_as_many_weights_as_its_width_says(width, weights):
    # 2 w + w, twice w w + w, w + 1
    assert siren(width)[1].numel == weights


def test_noise_is_measured_against_the_range_of_two():
    true = torch.zeros(2, 100)
    drawn = torch.stack([torch.full((100,), 0.2), torch.full((100,), 0.02)])
    # 10 log10(4 / 0.04) = 20 and ten times less error 20 dB more
    assert signal_to_noise(drawn, true).tolist() == pytest.approx([20, 40], abs=1e-4)


@pytest.mark.parametrize("model", [one("random", 8), one("table")])
def test_the_loss_falls_and_the_same_seed_gives_the_same_numbers(model, tmp_path):
    first = run(model, tmp_path / "a")
    assert first.values == run(model, tmp_path / "b").values
    longer = run(model, tmp_path / "c", recipe(steps=100))
    assert longer.values["psnr"] > first.values["psnr"]


def test_the_card_counts_what_a_picture_costs(tmp_path):
    random = run(one("random", 8), tmp_path / "a")
    assert random.about["per_picture"] == 8
    assert random.about["parameters"] == 16
    assert random.about["cost"]["generator_parameters"] == 0
    table = run(one("table"), tmp_path / "b")
    assert table.values["numbers_per_picture"] == siren(6)[1].numel


def test_pictures_come_with_the_truth_in_the_range_that_is_said(tmp_path):
    curves = run(one("random", 8), tmp_path).curves
    assert {*curves} == {f"picture_{n}{end}" for n in range(2) for end in ("", "_true")}
    true = curves["picture_0_true"][1]
    assert len(true) == 32 * 32
    assert -1 <= min(true) < 0 < max(true) <= 1


def test_a_code_goes_with_random_weights_and_with_no_others():
    for wrong in (one("random"), one("table", 8)):
        with pytest.raises(ValueError, match="code goes with kind 'random'"):
            Pictures(wrong, 2, seed=0)
    with pytest.raises(RecipeError, match="steps"):
        load_recipe("family_random_hypernetwork", {"steps": 0})

"""The static hypernetwork: its two equations, how many numbers each row keeps, and the tied control."""

import pytest
import torch
from torch.nn import functional

from workbench.errors import RecipeError
from workbench.families.static import (
    CHANNELS,
    CODE,
    LAYERS,
    PLACES,
    KernelGenerator,
    ResidualNet,
    load_data,
    measure,
)
from workbench.hypernetworks import ParamSpec, Slot
from workbench.papers import load_recipe
from workbench.training import seed_everything

MODELS = [
    {"name": "free", "kind": "free"},
    {"name": "hyper", "kind": "hyper", "against": "tied"},
    {"name": "tied", "kind": "tied"},
    {"name": "narrow", "kind": "free", "channels": 6},
]
CHANGES = {
    "seeds": [0], "models": MODELS, "reference": "free", "bars": [], "published": [],
    "training": {"epochs": 2, "batch_size": 64, "learning_rate": 3e-2},
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_static", CHANGES)


@pytest.fixture(scope="module")
def digits(recipe):
    return load_data(recipe).content


def built(recipe, name):
    seed_everything(0)
    return ResidualNet(next(model for model in recipe.models if model.name == name))


def test_a_kernel_is_generated_input_channel_by_input_channel():
    torch.manual_seed(0)
    channels = 3
    spec = ParamSpec((Slot("kernel", (channels, channels, PLACES, PLACES), "tensor", gain=2.0),))
    generator, code = KernelGenerator(spec, channels), torch.randn(1, CODE)
    kernel = generator(code).tensors["kernel"][0]
    enter, head = generator.enter, generator.head
    for channel in range(channels):
        own = slice(channel * CODE, (channel + 1) * CODE)
        vector = enter.weight[own] @ code[0] + enter.bias[own]  # equation (1)
        flat = head.weight @ vector + head.bias  # equation (2), for all output channels
        # The spec's scale: gain 2 over the root of the fan-in 3 * 3 * 3.
        expected = 2 / 27**0.5 * flat.view(channels, PLACES, PLACES)
        torch.testing.assert_close(kernel[:, channel], expected)


def test_each_row_keeps_the_numbers_that_the_formula_says(recipe):
    # Six kernels of 12 * 12 * 9; one; six of 6 * 6 * 9.
    assert built(recipe, "free").convolution_numbers() == 7776
    assert built(recipe, "tied").convolution_numbers() == 1296
    assert built(recipe, "narrow").convolution_numbers() == 1944
    # d (d + 1) N_in + f^2 N_out (d + 1) + L d, with d = 8: 864 + 972 + 48.
    assert built(recipe, "hyper").convolution_numbers() == 1884


def test_layers_are_applied_one_after_another_each_with_its_kernel(recipe, digits):
    net, images = built(recipe, "free"), digits.inputs["test"][:4]
    hidden = functional.conv2d(images.view(4, 1, 8, 8), net.enter.weight, net.enter.bias, padding=1)
    for kernel in net.generator(torch.arange(LAYERS)).tensors["kernel"]:
        hidden = hidden + functional.conv2d(hidden.clamp_min(0), kernel, padding=1)
    quarters = hidden.clamp_min(0).unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))
    expected = quarters.flatten(1) @ net.answer.weight.T + net.answer.bias
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


def test_the_tied_control_uses_one_kernel_in_all_layers_and_the_others_do_not(recipe):
    kernels = {name: built(recipe, name) for name in ("tied", "free", "hyper")}
    kernels = {name: net.generator(net.conditions()).tensors["kernel"] for name, net in kernels.items()}
    assert all(one.shape == (LAYERS, CHANNELS, CHANNELS, PLACES, PLACES) for one in kernels.values())
    assert torch.equal(kernels["tied"], kernels["tied"][:1].expand(LAYERS, -1, -1, -1, -1))
    for name in ("free", "hyper"):
        assert not torch.allclose(kernels[name][0], kernels[name][1])


def test_layers_lie_apart_unless_they_are_tied(recipe):
    assert built(recipe, "tied").apartness().tolist() == pytest.approx([0] * LAYERS, abs=1e-6)
    net = built(recipe, "free")
    with torch.no_grad():
        net.generator.head.weight.fill_(1.0)
        net.generator.head.weight[0] = 7.0
    # The mean of 7, 1, 1, 1, 1, 1 is 2: 5 / 2 away, and five times 1 / 2.
    assert net.apartness().tolist() == pytest.approx([2.5] + [0.5] * 5)


def test_equal_codes_are_the_tied_control(recipe, digits):
    net = built(recipe, "hyper")
    with torch.no_grad():
        net.codes.weight.copy_(net.codes.weight[:1].expand(LAYERS, -1))
    kernels = net.generator(net.conditions()).tensors["kernel"]
    torch.testing.assert_close(kernels, kernels[:1].expand_as(kernels))


def test_rows_start_alike(recipe):
    deviation = {}
    for name in ("free", "hyper", "tied"):
        net = built(recipe, name)
        deviation[name] = float(net.generator(net.conditions()).tensors["kernel"].detach().std())
    # The gain 0.5 * sqrt(2) over the root of the fan-in 12 * 9; the generator's own draw moves it.
    assert deviation["free"] == pytest.approx(0.5 * (2 / 108) ** 0.5, rel=0.05)
    assert deviation["tied"] == pytest.approx(deviation["free"], rel=0.1)
    assert deviation["hyper"] == pytest.approx(deviation["free"], rel=0.5)


def test_the_gradient_reaches_codes_and_generator(recipe, digits):
    net = built(recipe, "hyper")
    loss = functional.cross_entropy(net(digits.inputs["train"][:32]), digits.labels["train"][:32])
    loss.backward()
    for part in (net.codes.weight, net.generator.enter.weight, net.generator.head.weight):
        assert float(part.grad.abs().sum()) > 0


def test_every_row_learns_repeats_and_says_what_it_costs(recipe, digits, tmp_path):
    for model in recipe.models:
        found = []
        for folder in ("a", "b") if model.name == "hyper" else ("a",):
            seed_everything(0)
            found.append(measure(recipe, digits, model, 0, tmp_path / model.name / folder))
        loss = found[0].curves["training loss"][1]
        assert loss[-1] < loss[0]
        assert found[0].values == found[-1].values
        assert found[0].values["size_to_free"] == found[0].values["convolution_numbers"] / 7776
        assert ("cost" in found[0].about) == (model.name == "hyper")
    about = measure(recipe, digits, recipe.models[1], 0, tmp_path / "card").about
    # 1,836 numbers beside 1,296 of a kernel.
    assert about["cost"]["break_even_conditions"] == 2
    assert about["health"]["conditions"] == LAYERS
    assert about["health"]["verdict"] == "sound"


@pytest.mark.parametrize("change", [{"kind": "other"}, {"channels": 0}, {"learning_rate": 0}])
def test_settings_that_make_no_sense_are_refused(change):
    model = {"name": "wrong", "kind": "free", **change}
    with pytest.raises(RecipeError, match=f"models.0.{next(iter(change))}"):
        load_recipe("family_static", {**CHANGES, "models": [model], "reference": "wrong"})

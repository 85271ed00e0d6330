"""Generated convolutions and linear layers against plain towers and arithmetic."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from workbench.hypernetworks import GeneratedWeights
from workbench.hypernetworks.overrides import ConditionedWeight, Overrides

TOWERS = ("test_efficientnet", "test_convnext", "test_vit")
KINDS = ("linear", "convolutions")


def tower_of(name: str, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=6, **({"img_size": 32} if "vit" in name else {})).eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def weights_of(
    overrides: Overrides, *, count: int = 1, deviation: float = 0.5, seed: int = 3
) -> GeneratedWeights:
    spec, draw = overrides.spec(), torch.Generator().manual_seed(seed)
    return spec.compose(torch.randn(count, spec.numel, generator=draw) * deviation)


# --- which layers -------------------------------------------------------------------------------------------


def test_the_linear_kind_is_the_last_linear_layer():
    assert list(Overrides.wrap(tower_of("test_efficientnet"), "linear").layers) == ["classifier"]
    assert list(Overrides.wrap(tower_of("test_convnext"), "linear").layers) == ["head.fc"]
    tower = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.ReLU())
    assert list(Overrides.wrap(tower, "linear").layers) == ["1"]
    assert isinstance(tower[1], ConditionedWeight)
    assert isinstance(tower[0], nn.Linear)


def test_the_convolutions_are_the_first_and_those_with_a_kernel_per_channel():
    tower = nn.Sequential(
        nn.Conv2d(3, 8, 3),  # first
        nn.Conv2d(8, 8, 3, groups=8),  # a kernel per channel
        nn.Conv2d(8, 16, 3, groups=8),  # two kernels per channel
        nn.Conv2d(16, 16, 3, groups=4),  # channels in groups: many numbers
        nn.Conv2d(16, 16, 1),
    )
    overrides = Overrides.wrap(tower, "convolutions")
    assert list(overrides.layers) == ["0", "1", "2"]
    # 8 * 3 * 9 = 216, 8 * 9 = 72, 16 * 9 = 144
    assert [slot.shape for slot in overrides.spec().slots] == [(216,), (72,), (144,)]


def test_the_convolutions_of_a_tower_with_blocks():
    tower = tower_of("test_efficientnet")
    expected = [
        name
        for name, module in tower.named_modules()
        if name == "conv_stem" or (isinstance(module, nn.Conv2d) and module.weight.shape[1] == 1)
    ]
    assert len(expected) > 2
    assert list(Overrides.wrap(tower, "convolutions").layers) == expected


# --- a wrapped tower is the tower ---------------------------------------------------------------------------


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("name", TOWERS)
def test_wrapping_and_a_change_of_zero_are_exact(name, which):
    tower = tower_of(name)
    before, count = tower(pixels()), sum(part.numel() for part in tower.parameters())
    overrides = Overrides.wrap(tower, which)
    assert torch.equal(tower(pixels()), before)
    overrides.use(weights_of(overrides, deviation=0.0))
    assert torch.equal(tower(pixels()), before)
    assert sum(part.numel() for part in tower.parameters()) == count


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("name", TOWERS)
def test_generated_weights_act_like_weights_written_into_the_layers(name, which):
    tower = tower_of(name)
    expected = copy.deepcopy(tower)
    overrides = Overrides.wrap(tower, which)
    own, weights = tower(pixels()), weights_of(overrides)
    with torch.no_grad():
        for slot, change in weights.tensors.items():
            layer = expected.get_submodule(slot.removesuffix(".weight"))
            layer.weight.add_(change.view(layer.weight.shape))
    overrides.use(weights)
    found = tower(pixels())
    assert torch.equal(found, expected(pixels()))
    assert not torch.allclose(found, own)
    overrides.reset()
    assert torch.equal(tower(pixels()), own)


def test_a_linear_layer_by_hand():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
    tower = nn.Sequential(layer)
    overrides = Overrides.wrap(tower, "linear")
    # Slots are scaled by 1 / sqrt(2 inputs); a gain of sqrt(2) takes that back.
    overrides.use(overrides.spec(gain=2**0.5).compose(torch.tensor([[0.5, -1.0, 0.0, 1.0]])))
    # (1 + 0.5) * 2 + (2 - 1) * 1 + 10 = 14 and (3 + 0) * 2 + (4 + 1) * 1 + 20 = 31
    assert tower(torch.tensor([[2.0, 1.0]])).tolist() == [pytest.approx([14.0, 31.0])]


def test_a_convolution_by_hand():
    layer = nn.Conv2d(2, 2, (1, 2), groups=2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 1, 1, 2))
    tower = nn.Sequential(layer)
    overrides = Overrides.wrap(tower, "convolutions")
    # Slots are scaled by 1 / sqrt(2 entries of a kernel).
    overrides.use(overrides.spec(gain=2**0.5).compose(torch.tensor([[1.0, 0.0, -3.0, 1.0]])))
    # (1 + 1) * 5 + (2 + 0) * 6 = 22 and (3 - 3) * 7 + (4 + 1) * 8 = 40
    found = tower(torch.tensor([[5.0, 6.0], [7.0, 8.0]]).view(1, 2, 1, 2))
    assert found.flatten().tolist() == pytest.approx([22.0, 40.0])


def test_unit_coefficients_are_scaled_to_the_fan_in_of_each_layer():
    tower = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 5, groups=8), nn.Linear(100, 7))
    convolutions = Overrides.wrap(tower, "convolutions").spec(gain=2.0).slots
    # 2 / sqrt(3 * 9) and 2 / sqrt(25)
    assert [slot.gain for slot in convolutions] == [pytest.approx(2 / 27**0.5), pytest.approx(2 / 5)]
    assert Overrides.wrap(tower, "linear").spec().slots[0].gain == pytest.approx(0.1)


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("which", KINDS)
def test_gradients_reach_generated_weights_and_the_layers_own_only_if_asked_to(which, own):
    tower = tower_of("test_efficientnet").train()
    overrides = Overrides.wrap(tower, which)
    overrides.train_own(own)
    generated = (torch.randn(1, overrides.spec().numel) * 0.1).requires_grad_()
    overrides.use(overrides.spec().compose(generated))
    tower(pixels()).square().sum().backward()
    for name, part in overrides.spec().compose(generated.grad).tensors.items():
        assert part.abs().sum() > 0, name
    for layer in overrides.layers.values():
        assert (layer.own.grad is not None and layer.own.grad.abs().sum() > 0) == own


def test_frozen_layers_stay_frozen():
    tower = tower_of("test_efficientnet").requires_grad_(False)
    Overrides.wrap(tower, "convolutions")
    assert not any(part.requires_grad for part in tower.parameters())


def gradients(name: str, which: str, *, checkpointing: bool, swapped: bool) -> list[Tensor]:
    """Gradients for the generated numbers and all but the replaced weights, swapping parameters or not."""
    tower = tower_of(name).train()
    tower.set_grad_checkpointing(checkpointing)
    plain = copy.deepcopy(tower)
    overrides = Overrides.wrap(tower, which)
    overrides.train_own(False)
    weights = weights_of(overrides, deviation=1.0)
    generated = torch.cat(list(weights.tensors.values()), 1).requires_grad_()
    composed = overrides.spec().compose(generated)
    if swapped:
        parameters = dict(plain.named_parameters())
        held = {
            slot: parameters[slot].detach() + change[0].view(parameters[slot].shape)
            for slot, change in composed.tensors.items()
        }
        functional_call(plain, held, (pixels(),)).square().sum().backward()
        rest = [part for key, part in parameters.items() if key not in held]
    else:
        overrides.use(composed)
        tower(pixels()).square().sum().backward()
        replaced = {id(layer.own) for layer in overrides.layers.values()}
        rest = [part for part in tower.parameters() if id(part) not in replaced]
    return [generated.grad] + [part.grad for part in rest]


def worst_error(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).norm() / other.norm().clamp_min(1e-12)) for one, other in pairs)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_gradient_checkpointing_is_exact_where_swapping_parameters_is_wrong(name):
    exact = gradients(name, "convolutions", checkpointing=False, swapped=False)
    # Another way to the same numbers; single precision.
    swapped = gradients(name, "convolutions", checkpointing=False, swapped=True)
    assert worst_error(swapped, exact) < 1e-5
    for one, other in zip(
        gradients(name, "convolutions", checkpointing=True, swapped=False), exact, strict=True
    ):
        assert torch.equal(one, other)
    # The naive way raises nothing and is wrong by per cents at least.
    wrong = gradients(name, "convolutions", checkpointing=True, swapped=True)
    assert worst_error(wrong, exact) > 0.01


# --- precision, copies, baking ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", KINDS)
def test_autocast_runs_in_half_precision(which):
    tower = tower_of("test_efficientnet")
    overrides = Overrides.wrap(tower, which)
    weights = weights_of(overrides)
    overrides.use(weights)
    expected = tower(pixels()).detach()
    half = {slot: part.bfloat16().requires_grad_() for slot, part in weights.tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        overrides.use(GeneratedWeights(weights.spec, half))
        found = tower(pixels())
    assert found.dtype == torch.bfloat16
    # Eight bits of mantissa, through a dozen layers.
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())
    found.float().sum().backward()
    assert all(part.grad.isfinite().all() for part in half.values())


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("which", KINDS)
def test_saved_weights_come_back_into_use(which, assign):
    source, target = tower_of("test_efficientnet"), tower_of("test_efficientnet", seed=1)
    Overrides.wrap(source, which)
    overrides = Overrides.wrap(target, which)
    overrides.use(weights_of(overrides))  # a loading ends what was in use
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert torch.equal(target(pixels()), source(pixels()))
    assert all(layer.layer.weight is layer.own for layer in overrides.layers.values())


def test_copies_and_moves_keep_the_weight_in_use():
    tower = tower_of("test_efficientnet")
    overrides = Overrides.wrap(tower, "convolutions")
    other = copy.deepcopy(tower)
    with torch.no_grad():
        other.conv_stem.own.add_(1)
    assert not torch.allclose(other(pixels()), tower(pixels()))
    double = copy.deepcopy(tower).double()
    assert double(pixels().double()).dtype == torch.float64
    tower.to("meta")
    assert all(layer.layer.weight is layer.own and layer.own.is_meta for layer in overrides.layers.values())


@pytest.mark.parametrize("which", KINDS)
def test_baked_weights_are_the_towers_own(which):
    tower = tower_of("test_efficientnet")
    overrides = Overrides.wrap(tower, which)
    overrides.use(weights_of(overrides))
    expected = tower(pixels())
    overrides.bake()
    assert torch.equal(tower(pixels()), expected)
    overrides.reset()
    assert torch.equal(tower(pixels()), expected)
    fresh = tower_of("test_efficientnet", seed=5)
    Overrides.wrap(fresh, which)
    fresh.load_state_dict(tower.state_dict())
    assert torch.equal(fresh(pixels()), expected)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", KINDS)
def test_a_tower_without_such_a_layer_is_refused(which):
    with pytest.raises(
        ValueError, match=f"Sequential has no layer of the kind {which} to generate weights for"
    ):
        Overrides.wrap(nn.Sequential(nn.LayerNorm(3), nn.ReLU()), which)


@pytest.mark.parametrize(("count", "rows"), [(2, None), (2, torch.tensor([0, 1])), (1, torch.tensor([0, 0]))])
def test_several_conditions_and_rows_are_refused(count, rows):
    overrides = Overrides.wrap(tower_of("test_efficientnet"), "linear")
    with pytest.raises(ValueError, match="take one condition for the whole batch"):
        overrides.use(weights_of(overrides, count=count), rows)

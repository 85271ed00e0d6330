"""Generated norms against plain towers and loops over rows, and where swapping parameters goes wrong."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm import layers as timm_layers
from torch import Tensor, nn
from torch.func import functional_call

from workbench.hypernetworks import Affines, ChannelAffine, ConditionedNorm, GeneratedWeights
from workbench.hypernetworks.norms import is_norm

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=40, deadline=None, database=None)

# Name -> number of norms by class: batch, group and layer norms, channels second and channels last.
TOWERS = {
    "test_efficientnet": {"BatchNormAct2d": 13},
    "test_efficientnet_gn": {"GroupNormAct": 13},
    "test_efficientnet_ln": {"LayerNormAct2d": 13},
    "test_convnext": {"LayerNorm": 9, "LayerNorm2d": 5},
    "test_vit": {"LayerNorm": 13},
    "mobilenetv3_small_050": {"BatchNormAct2d": 34},
}
BATCH_NORM = ("test_efficientnet", "mobilenetv3_small_050")


def tower_of(name: str, *, seed: int = 0) -> nn.Module:
    """A timm tower whose norms and statistics are not those of a fresh one, in evaluation mode."""
    torch.manual_seed(seed)
    tower = timm.create_model(name, num_classes=6, **({"img_size": 32} if "vit" in name else {}))
    for module in tower.modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return tower.eval()


def pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def weights_of(
    affines: Affines, count: int = 1, *, deviation: float = 0.2, seed: int = 3
) -> GeneratedWeights:
    spec, draw = affines.spec(), torch.Generator().manual_seed(seed)
    return spec.compose(torch.randn(count, spec.numel, generator=draw) * deviation)


def one_of(weights: GeneratedWeights, condition: int) -> GeneratedWeights:
    return GeneratedWeights(
        weights.spec, {name: part[condition][None] for name, part in weights.tensors.items()}
    )


def written_in(tower: nn.Module, weights: GeneratedWeights) -> nn.Module:
    """A plain copy of a tower whose own norms hold the changed values: what has to come out."""
    changed = copy.deepcopy(tower)
    with torch.no_grad():
        for name, change in weights.tensors.items():
            path, _, part = name.rpartition(".")
            layer = changed.get_submodule(path)
            (layer.weight if part == "scale" else layer.bias).add_(change[0])
    return changed


# --- which layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_every_norm_of_a_tower_is_found(name):
    tower = tower_of(name)
    affines = Affines.wrap(tower)
    kinds = [type(norm.norm).__name__ for norm in affines.norms.values()]
    assert {kind: kinds.count(kind) for kind in kinds} == TOWERS[name]
    for path, norm in affines.norms.items():
        assert tower.get_submodule(path) is norm
        assert isinstance(norm, ConditionedNorm)


@pytest.mark.parametrize(
    ("name", "norms", "parameters"), [("efficientnet_b0", 49, 42_016), ("edgenext_xx_small", 20, 3_328)]
)
def test_parameters_of_norms_are_as_many_as_measured_elsewhere(name, norms, parameters):
    # The numbers of the fact sheet's table, measured on the plain towers.
    tower = timm.create_model(name, num_classes=0)
    total = sum(part.numel() for part in tower.parameters())
    affines = Affines.wrap(tower)
    assert len(affines.norms) == norms
    assert affines.spec().numel == parameters
    assert sum(norm.scale.numel() + norm.shift.numel() for norm in affines.norms.values()) == parameters
    assert sum(part.numel() for part in tower.parameters()) == total


def test_a_layer_is_a_norm_by_its_class_and_not_its_name():
    class Scaling(nn.LayerNorm):
        """A norm without the word in its name."""

    class NormLikeHead(nn.Module):
        """The word without a norm, as timm's NormMlpClassifierHead."""

        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    assert is_norm(Scaling(3))
    assert not is_norm(NormLikeHead())


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4), nn.LayerNorm(4),
        nn.GroupNorm(2, 4), ChannelAffine(4), timm_layers.BatchNormAct2d(4), timm_layers.GroupNormAct(4, 2),
        timm_layers.LayerNorm2d(4), timm_layers.LayerNormAct2d(4), timm_layers.LayerNormAct(4),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_layers_with_a_scale_and_shift_per_channel_are_norms(layer):
    assert is_norm(layer)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4, affine=False), nn.LayerNorm(4, elementwise_affine=False),
        nn.LayerNorm(4, bias=False), nn.GroupNorm(2, 4, affine=False), nn.LayerNorm((4, 5)),
        nn.Linear(4, 4), nn.Conv2d(4, 4, 1),
    ],
    ids=["batch", "layer", "no-shift", "group", "whole-maps", "linear", "convolution"],
)  # fmt: skip
def test_layers_without_a_scale_and_shift_per_channel_are_left_alone(layer):
    assert not is_norm(layer)
    kept = nn.Sequential(layer, nn.LayerNorm(5))
    affines = Affines.wrap(kept)
    assert list(affines.norms) == ["1"]
    assert kept[0] is layer


# --- a wrapped tower is the tower ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", TOWERS)
def test_wrapping_changes_no_output_no_gradient_and_no_statistic(name, mode):
    plain = tower_of(name).train(mode)
    wrapped = copy.deepcopy(plain)
    Affines.wrap(wrapped)
    before = {key: value.clone() for key, value in plain.named_buffers()}
    for tower in (plain, wrapped):
        torch.manual_seed(1)
        tower(pixels()).square().sum().backward()
        tower.result = tower(pixels())
    assert torch.equal(plain.result, wrapped.result)
    moved = [not torch.equal(before[key], value) for key, value in plain.named_buffers() if "running" in key]
    assert all(moved) == mode or not moved
    ours = dict(wrapped.named_buffers())
    for key, value in plain.named_buffers():
        path, _, last = key.rpartition(".")
        assert torch.equal(value, ours[f"{path}.norm.{last}"])
    parameters = dict(wrapped.named_parameters())
    for key, value in plain.named_parameters():
        path, _, last = key.rpartition(".")
        inner = f"{path}.{'scale' if last == 'weight' else 'shift'}"
        assert torch.equal(value.grad, parameters.pop(inner if inner in parameters else key).grad), key
    assert not parameters


@pytest.mark.parametrize("name", TOWERS)
def test_parameters_are_counted_once(name):
    plain = tower_of(name)
    wrapped = copy.deepcopy(plain)
    affines = Affines.wrap(wrapped)

    def count() -> int:
        return sum(part.numel() for part in wrapped.parameters())

    expected = sum(part.numel() for part in plain.parameters())
    assert count() == expected
    affines.use(weights_of(affines))
    assert count() == expected
    affines.use(weights_of(affines, 2), torch.tensor([0, 1]))
    assert count() == expected
    affines.reset()
    assert count() == expected
    assert len(list(wrapped.parameters())) == len(list(plain.parameters()))


def test_frozen_norms_stay_frozen_and_an_optimizer_made_before_still_moves_them():
    tower = tower_of("test_efficientnet")
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    tower.requires_grad_(False)
    affines = Affines.wrap(tower)
    assert not any(part.requires_grad for part in tower.parameters())
    affines.train_own(True)
    before = [norm.scale.detach().clone() for norm in affines.norms.values()]
    tower(pixels()).square().sum().backward()
    optimizer.step()
    for norm, value in zip(affines.norms.values(), before, strict=True):
        assert not torch.equal(norm.scale, value)


def test_a_norm_in_two_places_gets_one_wrapper_with_its_activation_at_both():
    shared = timm_layers.BatchNormAct2d(3)
    tower = nn.Sequential(shared, nn.Sequential(nn.Conv2d(3, 3, 1), shared)).eval()
    inputs = pixels()
    before = tower(inputs)
    affines = Affines.wrap(tower)
    assert list(affines.norms) == ["0"]
    assert tower[0] is tower[1][1]
    assert torch.equal(tower(inputs), before)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_saved_weights_come_back_into_use(name, assign):
    source, target = tower_of(name), tower_of(name, seed=1)
    Affines.wrap(source)
    affines = Affines.wrap(target)
    affines.use(weights_of(affines))  # a loading ends what was in use
    assert source.state_dict().keys() == target.state_dict().keys()
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert torch.equal(target(pixels()), source(pixels()))
    for norm in affines.norms.values():
        assert norm.norm.weight is norm.scale
        assert norm.norm.bias is norm.shift


@pytest.mark.parametrize("generated", [False, True], ids=["own", "generated"])
@pytest.mark.parametrize("rows", [False, True], ids=["batch", "rows"])
def test_a_deep_copy_computes_the_same_and_moves_on_its_own(generated, rows):
    model = nn.ModuleDict({"tower": tower_of("test_efficientnet")})
    model.affines = Affines.wrap(model["tower"])
    if generated:
        chosen = torch.tensor([1, 0]) if rows else None
        with torch.no_grad():  # torch copies no tensor that has a history
            model.affines.use(weights_of(model.affines, 1 + rows), chosen)
    other = copy.deepcopy(model)
    expected = model["tower"](pixels())
    assert torch.equal(other["tower"](pixels()), expected)
    other.affines.reset()
    with torch.no_grad():
        for norm in other.affines.norms.values():
            norm.scale.mul_(2)
    assert not torch.allclose(other["tower"](pixels()), expected)
    assert torch.equal(model["tower"](pixels()), expected)


def test_a_move_to_another_type_or_device_keeps_scale_and_shift_in_use():
    tower = tower_of("test_efficientnet")
    affines, double = Affines.wrap(tower), copy.deepcopy(tower).double()
    expected = double(pixels().double())
    tower.to(torch.float64)
    assert torch.equal(tower(pixels().double()), expected)
    tower.to("meta")
    for norm in affines.norms.values():
        assert norm.norm.weight is norm.scale
        assert norm.norm.bias is norm.shift
        assert norm.scale.is_meta
    assert tower(torch.empty(2, 3, 32, 32, dtype=torch.float64, device="meta")).is_meta


# --- generated values act -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_a_change_of_zero_is_exact(name):
    tower = tower_of(name)
    affines = Affines.wrap(tower)
    before = tower(pixels())
    affines.use(weights_of(affines, deviation=0.0))
    assert torch.equal(tower(pixels()), before)


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", TOWERS)
def test_generated_values_act_like_values_written_into_the_layers(name, mode):
    tower = tower_of(name)
    weights = weights_of(Affines.wrap(copy.deepcopy(tower)))
    expected = written_in(tower, weights).train(mode)
    affines = Affines.wrap(tower)
    tower.train(mode)
    affines.use(weights)
    assert torch.equal(tower(pixels()), expected(pixels()))
    # The running statistics, too: later layers see changed inputs.
    ours = dict(tower.named_buffers())
    for key, value in expected.named_buffers():
        path, _, last = key.rpartition(".")
        assert torch.equal(value, ours[f"{path}.norm.{last}"])


def use_on(layer: nn.Module, scale: list[float], shift: list[float]) -> nn.Module:
    tower = nn.Sequential(layer).eval()
    affines = Affines.wrap(tower)
    assert [slot.name for slot in affines.spec().slots] == ["0.scale", "0.shift"]
    affines.use(affines.spec().compose(torch.tensor([scale + shift])))
    return tower


def test_batch_norm_by_hand():
    layer = nn.BatchNorm2d(2, eps=1.0)
    with torch.no_grad():
        layer.running_mean.copy_(torch.tensor([1.0, -2.0]))
        layer.running_var.copy_(torch.tensor([3.0, 8.0]))
        layer.weight.copy_(torch.tensor([2.0, 3.0]))
        layer.bias.copy_(torch.tensor([0.5, 0.0]))
    found = use_on(layer, [0.5, -1.0], [1.0, 4.0])(torch.tensor([[[[5.0]], [[7.0]]]]))
    # (5 - 1) / sqrt(3 + 1) * (2 + 0.5) + (0.5 + 1) = 2 * 2.5 + 1.5 = 6.5
    # (7 + 2) / sqrt(8 + 1) * (3 - 1) + (0 + 4) = 3 * 2 + 4 = 10
    assert found.flatten().tolist() == pytest.approx([6.5, 10.0])


def test_batch_norm_with_an_activation_by_hand():
    layer = timm_layers.BatchNormAct2d(2, eps=0.0)  # mean 0, variance 1, ReLU
    found = use_on(layer, [1.0, 1.0], [-7.0, 1.0])(torch.tensor([[[[3.0]], [[4.0]]]]))
    # ReLU(3 * 2 - 7) = 0 and ReLU(4 * 2 + 1) = 9; an activation before the scale would give -1 for the first.
    assert found.flatten().tolist() == pytest.approx([0.0, 9.0])


def test_layer_norm_by_hand():
    # 1 and 5 have mean 3 and deviation 2: -1 and 1. -1 * (1 + 1) + 0.5 = -1.5 and 1 * (1 - 3) + 2 = 0.
    found = use_on(nn.LayerNorm(2, eps=0.0), [1.0, -3.0], [0.5, 2.0])(torch.tensor([[1.0, 5.0]]))
    assert found.flatten().tolist() == pytest.approx([-1.5, 0.0])


def test_group_norm_by_hand():
    # Two groups of two channels: (1, 5) and (10, 30) become (-1, 1) each; times 2, 3, 4, 5, plus 1, 0, 0, 6.
    found = use_on(nn.GroupNorm(2, 4, eps=0.0), [1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 6.0])(
        torch.tensor([[[[1.0]], [[5.0]], [[10.0]], [[30.0]]]])
    )
    assert found.flatten().tolist() == pytest.approx([-1.0, 3.0, -4.0, 11.0])


@pytest.mark.parametrize("sides", [(), (2,), (2, 3)])
def test_channel_affine_by_hand(sides):
    # 4 * (1 + 0.5) + 3 = 9 and 2 * (1 - 2) + 0 = -2, at every place.
    inputs = torch.tensor([4.0, 2.0]).view(1, 2, *(1,) * len(sides)).expand(1, 2, *sides)
    found = use_on(ChannelAffine(2), [0.5, -2.0], [3.0, 0.0])(inputs)
    assert found.shape == inputs.shape
    assert (found[:, 0] == 9).all()
    assert (found[:, 1] == -2).all()


def test_a_channel_affine_starts_as_the_identity():
    inputs = pixels()
    assert torch.equal(ChannelAffine(3)(inputs), inputs)


def test_a_gain_scales_what_is_generated():
    affines = Affines.wrap(nn.Sequential(nn.LayerNorm(2)))
    weights = affines.spec(gain=0.1).compose(torch.ones(1, 4))
    assert torch.equal(weights.tensors["0.scale"], torch.full((1, 2), 0.1))


def test_reset_goes_back_to_the_towers_own():
    tower = tower_of("test_convnext")
    affines = Affines.wrap(tower)
    own = tower(pixels())
    for rows in (None, torch.tensor([0, 0])):
        affines.use(weights_of(affines), rows)
        assert not torch.allclose(tower(pixels()), own)
        affines.reset()
        assert torch.equal(tower(pixels()), own)


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("rows", [None, torch.tensor([1, 0])], ids=["batch", "rows"])
@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_gradients_reach_generated_values_and_the_towers_own_only_if_asked_to(name, rows, own):
    tower = tower_of(name).train()
    affines = Affines.wrap(tower)
    affines.train_own(own)
    count = affines.spec().numel
    generated = (torch.randn(1 if rows is None else 2, count) * 0.1).requires_grad_()
    affines.use(affines.spec().compose(generated), rows)
    tower(pixels()).square().sum().backward()
    for name, part in affines.spec().compose(generated.grad).tensors.items():
        assert (part.abs().sum(1) > 0).all(), name
    for norm in affines.norms.values():
        assert (norm.scale.grad is not None and norm.scale.grad.abs().sum() > 0) == own
        assert (norm.shift.grad is not None and norm.shift.grad.abs().sum() > 0) == own
    # What is no norm is trained in any case.
    theirs = {id(part) for norm in affines.norms.values() for part in (norm.scale, norm.shift)}
    assert all(part.grad is not None for part in tower.parameters() if id(part) not in theirs)


def gradients(tower: nn.Module, call, generated: Tensor) -> list[Tensor]:
    """Gradients of a loss for the generated numbers and for all that is no norm, in order."""
    call().square().sum().backward()
    return [generated.grad] + [part.grad for part in tower.parameters() if part.dim() > 1]


def wrapped_gradients(name: str, *, checkpointing: bool, rows: Tensor | None = None) -> list[Tensor]:
    tower = tower_of(name).train()
    tower.set_grad_checkpointing(checkpointing)
    affines = Affines.wrap(tower)
    affines.train_own(False)
    weights = weights_of(affines, 1 if rows is None else 2, deviation=0.5)
    generated = torch.cat([part.flatten(1) for part in weights.tensors.values()], 1).requires_grad_()
    affines.use(affines.spec().compose(generated), rows)
    return gradients(tower, lambda: tower(pixels()), generated)


def swapped_gradients(name: str, *, checkpointing: bool) -> list[Tensor]:
    """The same with parameters swapped for the length of the forward call."""
    tower = tower_of(name).train()
    tower.set_grad_checkpointing(checkpointing)
    spec = Affines.wrap(copy.deepcopy(tower)).spec()
    weights = weights_of(Affines.wrap(copy.deepcopy(tower)), deviation=0.5)
    generated = torch.cat([part.flatten(1) for part in weights.tensors.values()], 1).requires_grad_()
    swapped, own = {}, dict(tower.named_parameters())
    for slot, change in spec.compose(generated).tensors.items():
        path, _, part = slot.rpartition(".")
        key = f"{path}.{'weight' if part == 'scale' else 'bias'}"
        swapped[key] = own[key].detach() + change[0]
    return gradients(tower, lambda: functional_call(tower, swapped, (pixels(),)), generated)


def worst_error(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).norm() / other.norm().clamp_min(1e-12)) for one, other in pairs)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_efficientnet_ln", "test_convnext", "test_vit"])
def test_gradient_checkpointing_is_exact_where_swapping_parameters_is_wrong(name):
    exact = wrapped_gradients(name, checkpointing=False)
    # Another way to the same numbers: this is no comparison of ours with ours. Single precision.
    assert worst_error(swapped_gradients(name, checkpointing=False), exact) < 1e-5
    for one, other in zip(wrapped_gradients(name, checkpointing=True), exact, strict=True):
        assert torch.equal(one, other)
    # The naive way raises nothing and is wrong by per cents at least.
    assert worst_error(swapped_gradients(name, checkpointing=True), exact) > 0.01


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_gradient_checkpointing_is_exact_with_values_per_row(name):
    rows = torch.tensor([1, 0])
    exact = wrapped_gradients(name, checkpointing=False, rows=rows)
    for one, other in zip(wrapped_gradients(name, checkpointing=True, rows=rows), exact, strict=True):
        assert torch.equal(one, other)


# --- precision and compilation ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 0])], ids=["batch", "rows"])
@pytest.mark.parametrize("name", ["test_efficientnet", "test_efficientnet_gn", "test_convnext", "test_vit"])
def test_autocast_runs_in_half_precision_with_scales_in_single(name, rows):
    tower = tower_of(name)
    affines = Affines.wrap(tower)
    single = weights_of(affines, 1 if rows is None else 2)
    affines.use(single, rows)
    expected = tower(pixels()).detach()
    half = {slot: part.bfloat16().requires_grad_() for slot, part in single.tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        affines.use(GeneratedWeights(single.spec, half), rows)
        found = tower(pixels())
    assert found.dtype == torch.bfloat16
    for norm in affines.norms.values():
        used = norm.by_row or (norm.norm.weight, norm.norm.bias)
        assert all(part.dtype == torch.float32 for part in used)
    # Eight bits of mantissa, through a dozen layers.
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())
    found.float().sum().backward()
    assert all(part.grad.isfinite().all() for part in half.values())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_tower_of_another_precision_is_scaled_in_that_precision(kind):
    tower = tower_of("test_efficientnet").to(kind)
    affines = Affines.wrap(tower)
    affines.use(weights_of(affines))
    assert tower(pixels().to(kind)).dtype == kind
    affines.bake()
    assert {norm.scale.dtype for norm in affines.norms.values()} == {kind}


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch asks every input
def test_a_compiled_tower_follows_what_is_in_use_without_being_compiled_again():
    # One of each kind; whole towers take long to compile.
    torch.manual_seed(0)
    tower = nn.Sequential(
        nn.Conv2d(3, 4, 3), timm_layers.BatchNormAct2d(4), nn.Conv2d(4, 4, 3), timm_layers.GroupNormAct(4, 2),
        timm_layers.LayerNorm2d(4), ChannelAffine(4), nn.Flatten(2), nn.LayerNorm(28 * 28),
    ).eval()  # fmt: skip
    affines = Affines.wrap(tower)
    torch._dynamo.reset()
    compiled = torch.compile(tower, backend="aot_eager")
    for seed in (1, 2):
        found = []
        for call in (compiled, tower):
            weights = weights_of(affines, seed=seed)
            generated = torch.cat(list(weights.tensors.values()), 1).requires_grad_()
            affines.use(affines.spec().compose(generated))
            with torch.compiler.set_stance("fail_on_recompile" if seed == 2 else "default"):
                output = call(pixels())
            output.square().sum().backward()
            found.append([output.detach(), generated.grad])
        # The same kernels, possibly in another order.
        assert worst_error(*found) < 1e-5
        assert found[0][1].abs().sum() > 0


# --- one condition per row ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_values_per_row_equal_a_loop_over_rows(name):
    tower = tower_of(name)
    affines = Affines.wrap(tower)
    weights, rows, images = weights_of(affines, 3), torch.tensor([0, 2, 1, 1]), pixels(4)
    affines.use(weights, rows)
    found = tower(images)
    for row, condition in enumerate(rows.tolist()):
        affines.use(one_of(weights, condition))
        # Normalising and scaling in two steps moves the last bits.
        torch.testing.assert_close(found[row : row + 1], tower(images[row : row + 1]), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found[2], found[3])  # one condition, two images


LAYERS = {
    "channels second": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "channels second, in groups": (lambda: nn.GroupNorm(1, 3), (4, 3, 2, 2)),
    "channels second, layer norm": (lambda: timm_layers.LayerNorm2d(3), (4, 3, 2, 2)),
    "channels second, one side": (lambda: nn.BatchNorm1d(3), (4, 3, 3)),
    "channels second, with an activation": (lambda: timm_layers.BatchNormAct2d(3), (4, 3, 2, 2)),
    "layer norm with an activation": (lambda: timm_layers.LayerNormAct2d(3), (4, 3, 2, 2)),
    "channels last, maps": (lambda: nn.LayerNorm(3), (4, 3, 3, 3)),
    "channels last, tokens": (lambda: nn.LayerNorm(3), (4, 3, 3)),
    "channels last, with an activation": (lambda: timm_layers.LayerNormAct(3), (4, 3, 3)),
    "no sides": (lambda: nn.LayerNorm(3), (4, 3)),
    "affine alone": (lambda: ChannelAffine(3), (4, 3, 2, 2)),
}


@pytest.mark.parametrize("kind", LAYERS)
@quick
@given(rows=st.lists(st.integers(0, 2), min_size=4, max_size=4), seed=st.integers(0, 1000))
def test_each_row_is_scaled_and_shifted_by_its_conditions_values(kind, rows, seed):
    # As many sides as channels, so that scales along a wrong axis do not fail by their shape.
    build, shape = LAYERS[kind]
    tower = nn.Sequential(build()).eval()
    affines, draw = Affines.wrap(tower), torch.Generator().manual_seed(seed)
    weights, inputs = weights_of(affines, 3, deviation=1.0, seed=seed), torch.randn(shape, generator=draw)
    affines.use(weights, torch.tensor(rows))
    found = tower(inputs)
    for row, condition in enumerate(rows):
        affines.use(one_of(weights, condition))
        # Normalising and scaling in two steps moves the last bits.
        torch.testing.assert_close(found[row : row + 1], tower(inputs[row : row + 1]), rtol=1e-4, atol=1e-5)


def test_values_per_row_in_training_share_the_statistics_of_the_batch():
    tower = nn.Sequential(nn.BatchNorm1d(1, eps=1e-12))
    affines = Affines.wrap(tower)
    affines.use(affines.spec().compose(torch.tensor([[1.0, 0.0], [0.0, 5.0]])), torch.tensor([0, 1]))
    # 2 and 6 have mean 4 and deviation 2: -1 * (1 + 1) + 0 = -2 and 1 * (1 + 0) + 5 = 6.
    assert tower(torch.tensor([[2.0], [6.0]])).flatten().tolist() == pytest.approx([-2.0, 6.0])
    # momentum 0.1: 0.1 * 4, and 0.9 + 0.1 * the unbiased variance 8.
    assert tower[0].norm.running_mean.item() == pytest.approx(0.4)
    assert tower[0].norm.running_var.item() == pytest.approx(1.7)


# --- baking, errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_baked_values_are_the_towers_own(name):
    tower = tower_of(name)
    affines = Affines.wrap(tower)
    weights = weights_of(affines)
    affines.use(weights)
    expected = tower(pixels())
    affines.bake()
    assert torch.equal(tower(pixels()), expected)
    for norm in affines.norms.values():
        assert norm.norm.weight is norm.scale
        assert norm.scale.is_leaf
    affines.reset()
    assert torch.equal(tower(pixels()), expected)
    # The numbers themselves stand where a saved file looks for them.
    fresh = tower_of(name, seed=5)
    Affines.wrap(fresh)
    fresh.load_state_dict(tower.state_dict())
    assert torch.equal(fresh(pixels()), expected)


def test_baking_without_generated_values_changes_nothing():
    tower = tower_of("test_convnext")
    affines = Affines.wrap(tower)
    expected = tower(pixels())
    affines.bake()
    assert torch.equal(tower(pixels()), expected)


def test_values_per_row_cannot_be_baked_in():
    tower = tower_of("test_convnext")
    affines = Affines.wrap(tower)
    own = tower(pixels())
    affines.use(weights_of(affines, 2), torch.tensor([0, 1]))
    with pytest.raises(
        ValueError, match="scales per row cannot be baked in; use the weights of one condition"
    ):
        affines.bake()
    affines.reset()
    assert torch.equal(tower(pixels()), own)


def test_a_tower_without_norms_is_refused_and_told_what_to_do():
    with pytest.raises(ValueError, match="Sequential has no norm layer .* add a ChannelAffine after"):
        Affines.wrap(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4, affine=False)))


def test_a_wrapped_tower_is_not_wrapped_again():
    tower = tower_of("test_convnext")
    Affines.wrap(tower)
    own = tower(pixels())
    with pytest.raises(ValueError, match="ConvNeXt has no norm layer .* or is wrapped already"):
        Affines.wrap(tower)
    assert torch.equal(tower(pixels()), own)


def test_several_conditions_without_rows_are_refused():
    affines = Affines.wrap(nn.Sequential(nn.LayerNorm(2)))
    with pytest.raises(ValueError, match="weights of 3 conditions need to be told which row has which"):
        affines.use(weights_of(affines, 3))

"""Generators: unit-variance conditions in, weights of the scale their slots need out."""

import math

import pytest
import torch
from torch import nn

from workbench.hypernetworks import LinearGenerator, ParamSpec, Rows, Slot, project
from workbench.hypernetworks.generators import MLPGenerator, standardise, token_scale

WIDTH = 64


def spec_of(rank: int | None, *, scaled: bool = True, identity: bool = False) -> ParamSpec:
    mode = "lowrank" if rank else "full"
    return ParamSpec((Slot("projection", (WIDTH, WIDTH), mode, rank, identity),), scaled)


@pytest.mark.parametrize("rank", [None, 4, 32])
@pytest.mark.parametrize(
    "layers", [{}, {"bottleneck": 48}, {"transform": True}, {"bottleneck": 48, "transform": True}]
)
def test_a_scaled_start_gives_unit_variance_outputs_for_unit_variance_inputs(rank, layers):
    torch.manual_seed(1)
    generator = LinearGenerator(96, spec_of(rank), dropout=0.0, **layers)
    conditions, inputs = torch.randn(48, 96), torch.randn(48 * 8, WIDTH)
    outputs = project(inputs, generator(conditions), Rows.of(torch.arange(48).repeat(8))).detach()
    # 48 conditions share one generator, so its own draw moves the variance by about 10 %.
    assert outputs.var() == pytest.approx(1, abs=0.3)
    assert outputs.mean() == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("layers", [{}, {"bottleneck": 5}, {"transform": True}])
def test_a_scaled_start_leaves_nothing_that_all_conditions_share(layers):
    generator = LinearGenerator(7, spec_of(4), **layers)
    assert all((layer.bias == 0).all() for layer in generator.modules() if isinstance(layer, nn.Linear))


def test_an_unscaled_start_is_that_of_a_linear_layer():
    torch.manual_seed(3)
    generator = LinearGenerator(7, spec_of(4, scaled=False), dropout=0.0)
    torch.manual_seed(3)
    reference = nn.Linear(7, 2 * WIDTH * 4)
    conditions = torch.randn(3, 7)
    tensors = generator(conditions).tensors
    assert torch.equal(
        torch.cat([part.flatten(1) for part in tensors.values()], dim=1), reference(conditions)
    )
    assert generator.head.bias.abs().max() > 0


def test_a_head_at_zero_with_an_identity_slot_leaves_the_input_as_it_is():
    generator = LinearGenerator(7, spec_of(4, identity=True))
    nn.init.zeros_(generator.head.weight)
    inputs = torch.randn(9, WIDTH)
    assert torch.equal(project(inputs, generator(torch.randn(3, 7)), Rows.of(torch.arange(9) % 3)), inputs)


def test_layers_act_in_order_transform_bottleneck_head():
    generator = LinearGenerator(7, ParamSpec((Slot("v", (4,), "vector"),)), bottleneck=3, transform=True)
    generator.eval()
    conditions = torch.randn(5, 7)
    expected = conditions
    for layer in (generator.transform, generator.narrow, generator.head):
        expected = expected @ layer.weight.T + layer.bias
    # Another order of summation moves the last bits.
    torch.testing.assert_close(generator(conditions).tensors["v"], expected, rtol=1e-4, atol=1e-5)


def test_a_bottleneck_bounds_the_rank_over_conditions():
    generator = LinearGenerator(32, spec_of(None), bottleneck=3).eval()
    table = generator(torch.randn(20, 32)).tensors["projection"].flatten(1)
    assert torch.linalg.matrix_rank(table.detach(), rtol=1e-4) == 3


@pytest.mark.parametrize(("transform", "times"), [(False, 1), (True, 2)])
def test_condition_entries_are_dropped_in_training_only(transform, times):
    torch.manual_seed(0)
    generator = LinearGenerator(50, ParamSpec((Slot("v", (4,), "vector"),)), transform=transform, dropout=0.5)
    kept = []
    generator.dropout.register_forward_hook(
        lambda _, inputs, output: kept.append((output != 0).float().mean())
    )
    conditions = torch.ones(200, 50)
    generator.train()(conditions)
    assert len(kept) == times
    # 10,000 fair draws: five standard deviations are 0.025.
    assert all(share == pytest.approx(0.5, abs=0.025) for share in kept)
    generator.eval()
    assert torch.equal(generator(conditions).tensors["v"], generator(conditions).tensors["v"])
    assert kept[-1] == 1


@pytest.mark.parametrize("layers", [{}, {"bottleneck": 3}, {"transform": True}])
def test_conditions_of_another_width_are_refused_with_both_widths(layers):
    with pytest.raises(ValueError, match="conditions of width 7, got 8"):
        LinearGenerator(7, spec_of(4), **layers)(torch.randn(2, 8))


def test_cost_is_counted_by_hand():
    generator = LinearGenerator(10, ParamSpec((Slot("w", (4, 6), "full"),)))
    # 10 x 24 weights and 24 biases; 264 / 24 = 11 conditions until a learned row each costs as much.
    assert generator.cost() == {
        "generator_parameters": 264,
        "generated_parameters": 24,
        "break_even_conditions": 11,
    }


def test_break_even_is_rounded_up():
    generator = LinearGenerator(10, ParamSpec((Slot("w", (4, 6), "full"),)), bottleneck=2)
    # 10 x 2 + 2 and 2 x 24 + 24 make 94; 94 / 24 = 3.9.
    assert generator.cost()["break_even_conditions"] == 4


def test_standardising_brings_unit_norm_rows_to_unit_mean_square():
    embeddings = nn.functional.normalize(torch.randn(5, 384), dim=-1)
    # Single precision.
    torch.testing.assert_close(standardise(embeddings).square().mean(-1), torch.ones(5), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        standardise(torch.tensor([[0.6, 0.8, 0, 0]])), torch.tensor([[1.2, 1.6, 0, 0]])
    )


def test_token_states_are_scaled_one_by_one_and_padding_stays_zero():
    states = torch.tensor([[[1.0, 3.0, 1.0, 3.0], [10.0, 10.0, 10.0, 50.0], [0.0, 0.0, 0.0, 0.0]]])
    # (1, 3, 1, 3): mean 2, deviation 1. (10, 10, 10, 50): mean 20, variance (3 * 100 + 900) / 4 = 300.
    root = math.sqrt(300)
    expected = torch.tensor(
        [[[-1.0, 1, -1, 1], [-10 / root, -10 / root, -10 / root, 30 / root], [0, 0, 0, 0]]]
    )
    # layer_norm adds 1e-5 to the variance.
    torch.testing.assert_close(token_scale(states), expected, rtol=1e-4, atol=1e-5)


def mlp_of(hidden: tuple[int, ...] = (8, 16)) -> MLPGenerator:
    return MLPGenerator(
        5, ParamSpec((Slot("w", (4, 6), "full"), Slot("b", (6,), "vector", gain=0.5))), hidden, unit=False
    )


@pytest.mark.parametrize("hidden", [(8,), (8, 16), (3, 4, 5)])
def test_hidden_layers_with_gelu_act_in_order_before_one_head(hidden):
    generator, codes = mlp_of(hidden), torch.randn(3, 5)
    layers = [layer for layer in generator.modules() if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in layers] == [*hidden, 30]
    expected = codes
    for layer in layers:
        expected = expected @ layer.weight.T + layer.bias
        if layer is not generator.head:
            expected = expected * (1 + torch.erf(expected / math.sqrt(2))) / 2
    weights = generator(codes)
    # The spec brings a full matrix to 1 / sqrt(fan in) and the vector to its gain; single precision.
    torch.testing.assert_close(weights.tensors["w"], expected[:, :24].view(3, 4, 6) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights.tensors["b"], expected[:, 24:] / 2, rtol=1e-4, atol=1e-6)


def test_an_mlp_has_the_published_widths_if_nothing_is_said():
    generator = MLPGenerator(32, ParamSpec((Slot("v", (4,), "vector"),)))
    layers = [layer.out_features for layer in generator.modules() if isinstance(layer, nn.Linear)]
    assert layers == [128, 512, 4]


def test_the_layers_of_an_mlp_start_as_linear_layers_do_where_that_is_asked_for():
    torch.manual_seed(3)
    generator = mlp_of()
    torch.manual_seed(3)
    for layer in (generator.body[0], generator.body[2], generator.head):
        reference = nn.Linear(layer.in_features, layer.out_features)
        assert torch.equal(layer.weight, reference.weight)
        assert torch.equal(layer.bias, reference.bias)


def test_an_mlp_starts_with_coefficients_of_unit_variance_if_nothing_is_said():
    torch.manual_seed(0)
    spec = ParamSpec((Slot("v", (4000,), "vector"),))
    for scale in (0.1, 10.0):
        found = MLPGenerator(32, spec)(scale * torch.randn(16, 32)).tensors["v"]
        # 64,000 draws; those of one condition share the norm of a hidden layer of 512, which is exact.
        assert found.std().item() == pytest.approx(1, rel=0.03)
        assert abs(found.mean().item()) < 0.03


def test_the_cost_of_an_mlp_is_counted_by_hand():
    # 5 x 8 + 8, 8 x 16 + 16 and 16 x 30 + 30 make 48 + 144 + 510 = 702; 702 / 30 = 23.4.
    assert mlp_of().cost() == {
        "generator_parameters": 702,
        "generated_parameters": 30,
        "break_even_conditions": 24,
    }

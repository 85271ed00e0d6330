"""Any module under generated weights: one condition, many at once, rows in any order, and a plain copy."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from workbench.errors import RunError
from workbench.hypernetworks import (
    Conditioned,
    GeneratedWeights,
    MLPGenerator,
    ParamSpec,
    RandomProjection,
    Rows,
    Slot,
    Table,
)
from workbench.hypernetworks.conditioned import FactoredLinear

CODE, CONDITIONS, MEMBERS, WIDTH, OUT = 5, 4, 6, 8, 3
KINDS = {
    "added": {},
    "factors": {"rank": 2},
    "replaced": {"joins": "replace", "gain": math.sqrt(2)},
    "multiplied": {"joins": "multiply"},
    "norms only": {"include": "*norm*"},
    "weights only": {"include": "*.weight", "rank": 1},
}


class Target(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Linear(WIDTH, 16), nn.GroupNorm(4, 16)
        self.leave = nn.Linear(16, OUT, bias=False)

    def forward(self, inputs):
        return self.leave(torch.relu(self.norm(self.enter(inputs))))


def model_of(kind="added", **more):
    torch.manual_seed(0)
    target = Target()
    settings = dict(KINDS[kind])
    spec = ParamSpec.of(target, settings.pop("include", "*"), **settings)
    return Conditioned(target, MLPGenerator(CODE, spec, (12,), unit=True), **more)


@pytest.fixture
def conditions():
    return torch.randn(CONDITIONS, CODE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def inputs():
    return torch.randn(CONDITIONS, MEMBERS, WIDTH, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_of_applying_agree_with_a_plain_copy(kind, conditions, inputs):
    model = model_of(kind)
    together = model(inputs, model.weights(conditions))
    for place in range(CONDITIONS):
        plain = model.freeze(conditions[place])
        assert not any(isinstance(part, FactoredLinear) for part in plain.modules())
        # Batched and single products differ in the order they add up: 1e-5 of values about 1.
        torch.testing.assert_close(together[place], plain(inputs[place]), rtol=1e-4, atol=1e-5)
        alone = model(inputs[place], model.weights(conditions[place : place + 1]))
        torch.testing.assert_close(alone, plain(inputs[place]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_any_order_give_what_their_condition_gives(kind, conditions, inputs):
    model = model_of(kind)
    weights = model.weights(conditions)
    expected = model(inputs, weights).flatten(0, 1)
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(3))
    rows = torch.arange(CONDITIONS).repeat_interleave(MEMBERS)[order]
    found = model(inputs.flatten(0, 1)[order], weights, rows)
    torch.testing.assert_close(found, expected[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "which", [[0, 1, 2, 3], [0, 0, 0, 0, 1, 2, 2, 3], [3, 3, 3, 0], [1, 2, 2, 2, 2, 2, 0, 3]]
)
def test_rows_of_unequal_numbers_give_what_their_condition_gives(which, conditions):
    model, rows = model_of(), torch.tensor(which)
    inputs = torch.randn(len(which), WIDTH, generator=torch.Generator().manual_seed(3))
    found = model(inputs, model.weights(conditions), rows)
    for one, row, number in zip(found, inputs, which, strict=True):
        alone = model(row[None], model.weights(conditions[number : number + 1]))[0]
        torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-5)


def test_conditions_without_rows_are_left_out_and_cost_no_order():
    model = model_of()
    codes, inputs = torch.randn(CONDITIONS, CODE), torch.randn(5, WIDTH)
    rows = torch.tensor([3, 1, 3, 3, 1])
    found = model(inputs, model.weights(codes), rows)
    for place in (1, 3):
        expected = model(inputs[rows == place], model.weights(codes[place : place + 1]))
        torch.testing.assert_close(found[rows == place], expected, rtol=1e-4, atol=1e-5)


def test_a_plain_copy_has_the_names_of_the_module_it_was_made_of(conditions):
    names = {kind: list(model_of(kind).freeze(conditions[0]).state_dict()) for kind in KINDS}
    assert all(found == list(Target().state_dict()) for found in names.values())
    Target().load_state_dict(model_of("factors").freeze(conditions[0]).state_dict())


def test_a_plain_copy_leaves_the_model_as_it_was(conditions, inputs):
    model = model_of("factors")
    before = copy.deepcopy(model.state_dict())
    model.freeze(conditions[0])
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_one_weight_by_hand():
    """w = 2, x = 3, g = 0.5: replaced 0.5 x 3 = 1.5, added 2.5 x 3 = 7.5, multiplied 2 x 1.5 x 3 = 9."""
    for joins, expected in (("replace", 1.5), ("add", 7.5), ("multiply", 9.0)):
        target = nn.Sequential(nn.Linear(1, 1, bias=False))
        nn.init.constant_(target[0].weight, 2.0)
        table = Table(1, ParamSpec.of(target, joins=joins, gain=1.0))
        nn.init.constant_(table.head.weight, 0.5)
        model = Conditioned(target, table)
        assert model(torch.tensor([[3.0]]), model.weights(torch.tensor([0]))).item() == expected


def test_factors_are_added_without_their_product():
    """x = (1, 2), down = (1, 1)^T, up = (1, -1), W = identity: y = x + 3 (1, -1) = (4, -1)."""
    target = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.eye_(target[0].weight)
    spec = ParamSpec.of(target, rank=1, gain=1.0)
    table = Table(1, ParamSpec(spec.slots, scaled=False))
    table.head.weight.data = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    model = Conditioned(target, table)
    assert model(torch.tensor([[1.0, 2.0]]), model.weights(torch.tensor([0]))).tolist() == [[4.0, -1.0]]


def test_the_generator_starts_every_coefficient_at_unit_variance_whatever_the_width():
    for hidden in ((8,), (256,)):
        torch.manual_seed(0)
        spec = ParamSpec.of(nn.Linear(64, 64), joins="replace", gain=1.0)
        made = MLPGenerator(16, spec, hidden)(torch.randn(64, 16))
        # Weights of fan-in 64 and gain 1: standard deviation 1/8; 64 x 4,096 draws of few degrees of freedom.
        assert made.tensors["weight"].std().item() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_generator_and_what_is_learned_of_the_target(kind, conditions, inputs):
    model = model_of(kind)
    model(inputs, model.weights(conditions)).square().sum().backward()
    assert all(one.grad.abs().sum() > 0 for one in model.generator.parameters())
    for name, one in model.target.named_parameters():
        assert (one.grad is None) == (kind == "replaced"), name


def test_a_base_that_is_not_learned_gets_no_gradient(conditions, inputs):
    model = model_of(learn_base=False)
    model(inputs, model.weights(conditions)).sum().backward()
    assert all(one.grad is None for one in model.target.parameters())


def test_a_failing_call_leaves_nothing_behind(conditions, inputs):
    model = model_of("factors")
    before = model.target(inputs[0])
    with pytest.raises(RuntimeError):
        model(inputs[:, :, :3], model.weights(conditions))
    assert torch.equal(model.target(inputs[0]), before)


def test_a_pattern_that_matches_nothing_lists_what_there_is():
    with pytest.raises(ValueError, match=r"named like '\*\.wieght'; there are: enter\.weight, enter\.bias"):
        ParamSpec.of(Target(), ["*.bias", "*.wieght"])


def test_shared_parameters_are_refused_by_both_names():
    target = Target()
    target.again = target.leave
    with pytest.raises(ValueError, match=r"leave\.weight is shared with again\.weight"):
        ParamSpec.of(target)
    assert [slot.name for slot in ParamSpec.of(target, "norm.*").slots] == ["norm.weight", "norm.bias"]


def test_integers_and_nameless_factors_are_refused():
    target = nn.Module()
    target.count = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    with pytest.raises(ValueError, match=r"count holds torch\.int64"):
        ParamSpec.of(target)
    with pytest.raises(ValueError, match="wrap it"):
        ParamSpec.of(nn.Linear(4, 4), rank=2)
    with pytest.raises(ValueError, match="joins='add'"):
        ParamSpec.of(Target(), rank=2, joins="multiply")


def test_a_generator_for_another_module_is_refused():
    generator = MLPGenerator(CODE, ParamSpec.of(Target()), (12,))
    with pytest.raises(ValueError, match=r"enter\.weight .* no such parameter"):
        Conditioned(nn.Linear(WIDTH, 16), generator)
    other = Target()
    other.leave = nn.Linear(16, OUT + 1, bias=False)
    with pytest.raises(ValueError, match=r"leave\.weight of shape \(3, 16\).*there it is \(4, 16\)"):
        Conditioned(other, generator)


def widened(kind):
    """A target that has more, fewer or larger parameters than ours."""
    other = Target()
    if kind == "superset":
        other.more = nn.Linear(2, 2)
    elif kind == "missing":
        other.norm = nn.Identity()
    else:
        other.leave = nn.Linear(16, OUT + 1, bias=False)
    return other


@pytest.mark.parametrize("rows", [None, torch.zeros(MEMBERS, dtype=torch.long)])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("superset", r"more\.weight is tensor \(2, 2\), joins 'add', here it is missing"),
        ("missing", r"norm\.weight is missing, here it is vector \(16,\)"),
        ("other shapes", r"leave\.weight is tensor \(4, 16\), joins 'add', here it is tensor \(3, 16\)"),
    ],
)
def test_weights_generated_for_another_module_are_refused_at_the_call(kind, said, rows, conditions, inputs):
    model, other = model_of(), widened(kind)
    theirs = MLPGenerator(CODE, ParamSpec.of(other), (12,))(conditions[:1])
    with pytest.raises(ValueError, match=said):
        model(inputs[0], theirs, rows)


def test_weights_that_join_otherwise_or_are_not_what_their_spec_says_are_refused(conditions, inputs):
    model, other = model_of(), model_of("replaced")
    with pytest.raises(ValueError, match=r"enter\.weight is .* joins 'replace', here it is .* joins 'add'"):
        model(inputs[0], other.weights(conditions[:1]))
    weights = model.weights(conditions[:1])
    whole = {name: one for name, one in weights.tensors.items() if name != "norm.bias"}
    with pytest.raises(ValueError, match=r"norm\.bias is missing, here it is \(16,\)"):
        model(inputs[0], GeneratedWeights(weights.spec, whole))
    turned = weights.tensors | {"leave.weight": weights.tensors["leave.weight"].mT}
    with pytest.raises(ValueError, match=r"leave\.weight is \(16, 3\), here it is \(3, 16\)"):
        model(inputs[0], GeneratedWeights(weights.spec, turned))


def test_weights_of_an_equal_spec_and_of_another_scale_fit(conditions, inputs):
    model = model_of()
    spec = ParamSpec.from_dict(model.spec.to_dict())
    again = ParamSpec.of(Target(), gain=0.1)
    for one in (spec, again):
        coefficients = torch.zeros(CONDITIONS, one.numel)
        found = model(inputs, one.compose(coefficients))
        torch.testing.assert_close(found, model.target(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2]))


def test_a_spec_made_by_hand_or_loaded_may_not_generate_shared_parameters():
    target = Target()
    target.again = target.leave
    written = ParamSpec((Slot("leave.weight", (OUT, 16), "tensor"),)).to_dict()
    for name in ("leave.weight", "again.weight"):
        spec = ParamSpec.from_dict({**written, "slots": [{**written["slots"][0], "name": name}]})
        with pytest.raises(ValueError, match=rf"{name} is shared with (leave|again)\.weight"):
            Conditioned(target, MLPGenerator(CODE, spec, (12,)))
    factors = ParamSpec((Slot("leave", (16, OUT), "lowrank", 2, joins="add"),))
    with pytest.raises(ValueError, match=r"leave\.weight is shared with again\.weight"):
        Conditioned(target, Table(2, factors))
    norms = ParamSpec.from_dict(ParamSpec.of(target, "norm.*").to_dict())
    assert Conditioned(target, Table(2, norms)).weights(torch.arange(2)).tensors


def test_a_number_that_a_table_has_no_row_for_is_named():
    table = Table(3, ParamSpec.of(Target()))
    for number in (3, -1):
        with pytest.raises(
            ValueError, match=rf"condition {number} of a table of 3; give numbers from 0 to 2"
        ):
            table(torch.tensor([0, number]))
    assert len(table(torch.tensor([2, 0]))) == 2


def test_conditions_of_another_width_and_numbers_that_are_none_are_said(conditions):
    model = model_of()
    with pytest.raises(ValueError, match="width 5, got 4"):
        model.weights(conditions[:, :4])
    with torch.no_grad():
        model.generator.head.bias[7] = math.nan
    with pytest.raises(RunError, match=r"NaN or infinity for enter\.weight"):
        model.weights(conditions)
    with torch.no_grad():
        model.generator.head.bias[7:9] = torch.tensor([math.inf, -math.inf])  # their sum is no number either
    with pytest.raises(RunError, match=r"NaN or infinity for enter\.weight"):
        model.weights(conditions)


def test_numbers_whose_sum_overflows_are_numbers(conditions):
    model = model_of()
    with torch.no_grad():
        model.generator.head.bias[:20] = 3e38
    found = model.weights(conditions)
    assert any(not torch.isfinite(one.sum()) for one in found.tensors.values())


@pytest.mark.parametrize("with_inputs", [False, True])
def test_health_of_numbers_that_are_none_says_the_same(with_inputs, conditions, inputs):
    model = model_of()
    model.generator.head.bias.data[7] = math.nan
    with pytest.raises(RunError, match=r"NaN or infinity for enter\.weight"):
        model.health(conditions, inputs[0] if with_inputs else None)


def test_inputs_that_fit_no_number_of_conditions_are_said(conditions, inputs):
    model = model_of()
    weights = model.weights(conditions)
    with pytest.raises(ValueError, match=r"4 conditions need inputs of shape \[4, M"):
        model(inputs[:3], weights)


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        ([0, -1, 2], r"from -1 to 2, of shape \(3,\)"),
        ([0, 4, 2], r"from 0 to 4, of shape \(3,\)"),
        ([0.0, 1.0, 2.0], r"of shape \(3,\) and type torch\.float32"),
        ([True] * 3, r"of shape \(3,\) and type torch\.bool"),
        ([[0], [1], [2]], r"from 0 to 2, of shape \(3, 1\)"),
        (torch.empty(0, dtype=torch.long), r"of shape \(0,\) and type torch\.int64"),
        (Rows.of(torch.tensor([0, -1, 2])), r"from -1 to 2, of shape \(3,\)"),
        (Rows.of(torch.tensor([0, 0])), r"from 0 to 0, of shape \(2,\)"),
    ],
)
def test_rows_that_are_no_condition_of_each_input_are_refused(rows, got, conditions):
    model, rows = model_of(), torch.tensor(rows) if isinstance(rows, list) else rows
    said = rf"integers from 0 to 3, as many as inputs \(3\) and at least one; got numbers {got}"
    with pytest.raises(ValueError, match=said):
        model(torch.randn(3, WIDTH), model.weights(conditions), rows)


def test_rows_may_be_integers_of_any_size(conditions):
    model, inputs, rows = model_of(), torch.randn(3, WIDTH), torch.tensor([3, 1, 3])
    weights = model.weights(conditions)
    for kind in (torch.int32, torch.uint8):
        assert torch.equal(model(inputs, weights, rows.to(kind)), model(inputs, weights, rows))


def test_running_statistics_under_several_conditions_are_refused_by_name(conditions):
    target = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16))
    model = Conditioned(target, MLPGenerator(CODE, ParamSpec.of(target), (12,)))
    weights, inputs = model.weights(conditions), torch.randn(CONDITIONS, MEMBERS, WIDTH)
    with pytest.raises(ValueError, match="1 is BatchNorm1d in training mode"):
        model(inputs, weights)
    assert model(inputs[0], model.weights(conditions[:1])).shape == (MEMBERS, 16)
    assert model.eval()(inputs, weights).shape == (CONDITIONS, MEMBERS, 16)


def test_a_misspelt_name_would_be_ignored_by_torch_and_is_why_names_are_checked():
    layer, inputs = nn.Linear(2, 2), torch.ones(1, 2)
    assert torch.equal(functional_call(layer, {"wieght": torch.zeros(2, 2)}, (inputs,)), layer(inputs))


def test_health_tells_a_silent_generator_and_one_whose_weights_reach_no_output(conditions, inputs):
    model = model_of()
    assert model.health(conditions, inputs[0]).verdict == "the generator did not train"
    with torch.no_grad():
        model.generator.head.weight += 0.1 * torch.randn_like(model.generator.head.weight)
    assert model.health(conditions, inputs[0]).verdict == "sound"
    nn.init.zeros_(model.target.leave.weight)
    model.spec = ParamSpec(tuple(slot for slot in model.spec.slots if slot.name != "leave.weight"))
    assert "do not move the output" in model.health(conditions, inputs[0]).verdict


def test_a_card_says_what_the_generator_costs_and_how_it_is(conditions, inputs):
    model = model_of()
    health = model.health(conditions, inputs[0]).to_dict()
    assert model.card(conditions, inputs[0]) == {"cost": model.cost(), "health": health}


def test_the_health_of_a_fixed_projection_says_nothing_of_training(conditions, inputs):
    target = Target()
    model = Conditioned(target, RandomProjection(CODE, ParamSpec.of(target), 0))
    found = model.health(conditions, inputs[0])
    assert found.moved is None
    assert "moved" not in found.to_dict()
    assert found.verdict == "sound"
    assert "conditions do not move the weights" in model.health(torch.ones_like(conditions)).verdict


def test_a_fixed_projection_trains_nothing_and_repeats_by_its_seed():
    spec = ParamSpec.of(Target(), joins="replace")
    one, two, other = (RandomProjection(CODE, spec, seed) for seed in (0, 0, 1))
    code = torch.randn(1, CODE)
    assert not list(one.parameters())
    assert one.cost()["generator_parameters"] == 0
    name = "enter.weight"
    assert torch.equal(one(code).tensors[name], two(code).tensors[name])
    assert not torch.equal(one(code).tensors[name], other(code).tensors[name])

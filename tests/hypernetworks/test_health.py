"""Health tells a generator that is alive from the silent failures."""

import copy
import math

import pytest
import torch
from torch import nn

from workbench.hypernetworks import Conditioned, LinearGenerator, ParamSpec, Slot, Table, health_of
from workbench.hypernetworks.health import health_of_weights


def table_of(rows: list[list[float]]) -> LinearGenerator:
    """A generator on one-hot conditions whose weights are the given rows."""
    values = torch.tensor(rows)
    spec = ParamSpec((Slot("v", (values.shape[1],), "vector"),))
    generator = LinearGenerator(len(rows), spec, dropout=0.0).eval()
    with torch.no_grad():
        generator.head.weight.copy_(values.T)
    return generator


def low_rank() -> LinearGenerator:
    torch.manual_seed(0)
    return LinearGenerator(16, ParamSpec((Slot("p", (12, 12), "lowrank", 3),))).eval()


def test_an_untrained_generator_is_flagged():
    generator = low_rank()
    health = health_of(generator, torch.randn(6, 16), generator.head.weight.detach().clone())
    assert health.moved == 0
    assert health.verdict == "the generator did not train"


@pytest.mark.parametrize(("now", "moved"), [(2.0, 1.0), (0.0, 0.0)])
def test_a_head_that_started_at_zero_has_moved_all_the_way_or_not_at_all(now, moved):
    generator = table_of([[now, 0.0], [0.0, now]])
    assert health_of(generator, torch.eye(2), torch.zeros(2, 2)).moved == moved


def test_a_generator_whose_conditions_do_not_move_the_weights_is_flagged():
    generator = low_rank()
    start = generator.head.weight.detach().clone()
    nn.init.zeros_(generator.head.weight)
    nn.init.normal_(generator.head.bias)
    health = health_of(generator, torch.randn(6, 16), start)
    assert "conditions do not move the weights" in health.verdict
    assert "most conditions share their weights" in health.verdict
    assert "did not train" not in health.verdict
    assert health.effective_rank == 0
    assert health.near_copies == 1
    # Rounding of single-precision inner products.
    assert health.relative_spread == pytest.approx(0, abs=1e-3)


def test_a_sound_generator_is_called_sound():
    generator = low_rank()
    start = generator.head.weight.detach().clone()
    with torch.no_grad():
        generator.head.weight.mul_(1.5)
    health = health_of(generator, torch.randn(6, 16), start)
    assert health.verdict == "sound"
    # |1.5 W - W| / |W|, in single precision.
    assert health.moved == pytest.approx(0.5, rel=1e-5)
    assert health.near_copies == 0
    assert 1 < health.effective_rank <= 5
    assert health.conditions == 6


def test_the_spread_is_the_deviation_over_the_root_mean_square():
    generator = table_of([[3.0, 4.0], [3.0, 0.0]])
    health = health_of(generator, torch.eye(2), torch.ones(2, 2))
    # Mean (3, 2), both rows 2 away: sqrt(4 / ((25 + 9) / 2)).
    assert health.relative_spread == pytest.approx(math.sqrt(4 / 17), rel=1e-4)


def test_weights_alone_have_the_health_of_what_generates_them():
    generator = low_rank()
    start, conditions = generator.head.weight.detach().clone(), torch.randn(6, 16)
    with torch.no_grad():
        generator.head.weight.mul_(1.5)
    weights = generator(conditions)
    assert health_of_weights(weights, generator.head.weight, start) == health_of(generator, conditions, start)
    assert health_of_weights(weights).moved is None


@pytest.mark.parametrize(
    ("size", "verdict"),
    [
        (0.9e-4, "generated weights are lost beside the target's own"),
        (1.1e-4, "sound"),
        (9.9, "sound"),
        (10.1, "generated weights drown the target's own"),
    ],
)
def test_what_is_added_is_held_against_the_layers_own_numbers(size, verdict):
    """Own (3, 0), (0, 4) and a bias of zeros have norm 5; added by condition are 5 size or a little less."""
    target = nn.Sequential(nn.Linear(2, 2))
    table = Table(2, ParamSpec(ParamSpec.of(target).slots, scaled=False))
    model = Conditioned(target, table)
    with torch.no_grad():
        target[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        target[0].bias.zero_()
        table.head.weight.copy_(size * torch.tensor([[3.0, 0, 0, 0, 0, 4], [0.0, 3, 0, 3, 0, 0]]))
    health = model.health(torch.arange(2))
    assert health.over_own == pytest.approx(size)
    assert health.verdict == verdict
    assert health.to_dict()["over_own"] == health.over_own


def test_the_largest_layer_counts_and_factors_count_by_their_product():
    """Layer 0: down up = (2, 2)^T (1, 1), norm 4 over 8. Layer 1: the bias adds 3 to a layer of norm 4."""
    target = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(1, 1))
    spec = ParamSpec((*ParamSpec.of(target, "0.weight", rank=1).slots, *ParamSpec.of(target, "1.bias").slots))
    for layer, size in zip(target, (4.0, 4.0), strict=True):
        nn.init.constant_(layer.weight, size)
    nn.init.zeros_(target[1].bias)
    table = Table(1, ParamSpec(spec.slots, scaled=False))
    for bias, expected in ((3.0, 0.75), (1.0, 0.5)):
        table.head.weight.data = torch.tensor([[2.0, 2, 1, 1, bias]])
        assert Conditioned(copy.deepcopy(target), table).health(torch.tensor([0])).over_own == expected


@pytest.mark.parametrize("joins", ["replace", "multiply", "add"])
def test_nothing_is_held_against_own_numbers_that_are_replaced_multiplied_or_all_zeros(joins):
    target = nn.Sequential(nn.Linear(2, 2))
    for one in target.parameters():
        nn.init.constant_(one, float(joins != "add"))
    health = Conditioned(target, Table(3, ParamSpec.of(target, joins=joins))).health(torch.arange(3))
    assert health.over_own is None
    assert "over_own" not in health.to_dict()


def test_near_copies_are_a_share_of_pairs():
    # Of 6 pairs, the 3 among the first three rows (one longer: a copy in direction) are copies.
    generator = table_of([[1.0, 0.0], [1.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    health = health_of(generator, torch.eye(4), torch.ones(2, 4))
    assert health.near_copies == pytest.approx(0.5)
    assert "share their weights" not in health.verdict


def test_most_conditions_sharing_their_weights_is_flagged():
    # Of 10 pairs, the 6 among the first four rows are copies.
    generator = table_of([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    health = health_of(generator, torch.eye(5), torch.ones(2, 5))
    assert health.near_copies == pytest.approx(0.6)
    assert health.verdict == "most conditions share their weights"


def test_the_slot_with_the_most_numbers_is_looked_at():
    spec = ParamSpec((Slot("small", (2,), "vector"), Slot("large", (2, 3), "full")))
    generator = LinearGenerator(3, spec, dropout=0.0).eval()
    with torch.no_grad():
        generator.head.weight.zero_()
        generator.head.weight[:2] = torch.randn(2, 3)  # conditions move the small slot only
        generator.head.bias.fill_(1.0)
    health = health_of(generator, torch.eye(3), torch.ones(8, 3))
    assert "conditions do not move the weights" in health.verdict


def test_one_condition_has_no_pairs_and_no_verdict_on_spread():
    generator = table_of([[1.0, 2.0]])
    health = health_of(generator, torch.eye(1), torch.ones(2, 1))
    assert health.near_copies == 0
    assert health.verdict == "sound"


def test_health_is_written_as_numbers_with_the_verdict():
    generator = table_of([[1.0, 0.0], [0.0, 1.0]])
    written = health_of(generator, torch.eye(2), torch.ones(2, 2)).to_dict()
    assert set(written) == {
        "moved",
        "relative_spread",
        "effective_rank",
        "near_copies",
        "conditions",
        "verdict",
    }
    assert written["verdict"] == "sound"
    assert all(isinstance(written[name], float | int) for name in set(written) - {"verdict"})

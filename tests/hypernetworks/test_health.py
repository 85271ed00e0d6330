"""Health tells a generator that is alive from the silent failures."""

import math

import pytest
import torch
from torch import nn

from workbench.hypernetworks import LinearGenerator, ParamSpec, Slot, health_of
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

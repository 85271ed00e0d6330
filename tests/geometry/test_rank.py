"""Ranks of sets of vectors whose spectrum is known, and the alarm for a collapsed generator."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from workbench.errors import DataError
from workbench.families.continual import ContinualModel, network
from workbench.geometry.matrices import singular_values
from workbench.geometry.rank import STILL, Ranks, ranks, ranks_of_products, spectrum_rank
from workbench.hypernetworks import LinearGenerator, ParamSpec, Slot, health_of

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=40, deadline=None, database=None)


def drawn(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_the_effective_rank_of_a_spectrum_by_hand():
    assert spectrum_rank(np.array([2.0, 2.0, 0.0])) == pytest.approx(2)
    # Shares 3/4 and 1/4: entropy 0.75 log(4/3) + 0.25 log 4 = 0.5623, exp 1.7548.
    assert spectrum_rank(np.array([3.0, 1.0])) == pytest.approx(1.7548, abs=1e-4)
    assert spectrum_rank(np.zeros(3)) == 0


@quick
@given(st.integers(0, 2**16))
def test_the_effective_rank_of_a_matrix_ignores_scale_and_rotation_and_lies_in_its_range(seed):
    matrix = drawn(5, 4, seed)
    turned = torch.linalg.qr(drawn(5, 5, seed + 1)).Q @ matrix * 7
    rank = spectrum_rank(singular_values(matrix))
    assert 1 <= rank <= 4
    assert spectrum_rank(singular_values(turned)) == pytest.approx(rank, rel=1e-9)


def test_ranks_by_hand():
    # Mean 0, singular values sqrt(2) * 3 and sqrt(2) * 1: shares 3/4 and 1/4.
    rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    found = ranks(rows)
    assert found.effective == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert found.stable == pytest.approx((9 + 1) / 9)
    assert found.possible == 2


def test_directions_of_one_size_count_in_full():
    rows = torch.cat([torch.eye(5), -torch.eye(5)])
    found = ranks(rows)
    assert found.effective == pytest.approx(5)
    assert found.stable == pytest.approx(5)


def test_the_effective_rank_is_scipys_entropy_of_the_spectrum():
    rows = drawn(30, 7)
    values = torch.linalg.svdvals(rows - rows.mean(0)).numpy()
    assert ranks(rows).effective == pytest.approx(math.exp(entropy(values)))


@quick
@given(st.integers(2, 12), st.integers(1, 8), st.integers(0, 10_000))
def test_ranks_stay_in_range_and_ignore_turning_shifting_and_scale(count, width, seed):
    rows = drawn(count, width, seed)
    found = ranks(rows)
    turn = torch.linalg.qr(drawn(width, width, seed + 1)).Q
    again = ranks(7 * rows @ turn + drawn(1, width, seed + 2))
    assert again.effective == pytest.approx(found.effective, rel=1e-6)
    assert again.stable == pytest.approx(found.stable, rel=1e-6)
    assert found.stable >= 1 - 1e-9
    assert 1 - 1e-9 <= found.effective <= found.possible + 1e-9
    assert found.stable <= found.possible + 1e-9


@quick
@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 10_000))
def test_products_alone_give_the_same_ranks(count, width, seed):
    rows = drawn(count, width, seed)
    one, other = ranks(rows), ranks_of_products(rows @ rows.T)
    # The root of a rounding error of 1e-16 is 1e-8, and there are a few of them.
    assert other.effective == pytest.approx(one.effective, abs=1e-4)
    assert other.stable == pytest.approx(one.stable, rel=1e-6)


def test_the_relative_spread_by_hand():
    # Mean (3, 2), both rows 2 away: sqrt(2 * 4 / (25 + 9)).
    rows = torch.tensor([[3.0, 4.0], [3.0, 0.0]])
    for found in (ranks(rows), ranks_of_products(rows.double() @ rows.double().T)):
        assert found.relative_spread == pytest.approx(math.sqrt(8 / 34))


@pytest.mark.parametrize(("size", "verdict"), [(0.5 * STILL, "collapsed"), (2 * STILL, "sound")])
def test_rows_that_hardly_differ_have_collapsed_whatever_their_rank(size, verdict):
    rows = 10 * torch.nn.functional.normalize(torch.ones(1, 20).double(), dim=1) + drawn(200, 20) * (
        size * 10 / math.sqrt(20)
    )
    for found in (ranks(rows), ranks_of_products(rows @ rows.T)):
        assert found.effective > 15
        assert found.relative_spread == pytest.approx(size, rel=0.1)  # 4,000 draws
        assert found.verdict.startswith(verdict)


def test_equal_rows_have_rank_zero_however_long_they_are():
    for rows in (torch.zeros(4, 3), 1e6 * torch.ones(4, 3)):
        for found in (ranks(rows), ranks_of_products(rows.double() @ rows.double().T)):
            assert (found.effective, found.stable) == (0, 0)
            assert found.verdict == "collapsed: all rows are equal"


def test_rows_along_a_line_are_nearly_collapsed():
    found = ranks(torch.outer(torch.arange(9.0), torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert found.effective == pytest.approx(1)
    assert found.verdict == "nearly collapsed: 1.0 of 4 directions"


def test_two_rows_can_reach_no_more_than_one_direction_and_are_sound():
    assert ranks(torch.eye(2)).verdict == "sound"


def generator(mode: str) -> LinearGenerator:
    rank = 2 if mode == "lowrank" else None
    torch.manual_seed(0)
    return LinearGenerator(12, ParamSpec((Slot("projection", (6, 6), mode, rank),)), dropout=0.0).eval()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "lowrank"])
def test_a_generator_with_a_zero_head_is_flagged_and_a_fresh_one_is_sound(mode):
    conditions = drawn(20, 12).float()
    healthy, dead = generator(mode), generator(mode)
    dead.head.weight.zero_()
    dead.head.bias.fill_(1.0)
    assert healthy(conditions).ranks("projection").effective > 3
    assert healthy(conditions).ranks("projection").verdict == "sound"
    assert dead(conditions).ranks("projection").effective == 0
    assert "collapsed" in dead(conditions).ranks("projection").verdict
    # The number that a run's card shows is this one.
    assert (
        healthy(conditions).effective_rank("projection") == healthy(conditions).ranks("projection").effective
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hyper", "chunked"])
@pytest.mark.parametrize(
    ("share", "verdict", "healthy"),
    [
        (1.5, "sound", True),
        (0.0, "collapsed: all rows are equal", False),
        (1e-4, "collapsed: rows differ", False),
    ],
)
def test_the_alarm_agrees_with_the_health_of_a_familys_generator(kind, share, verdict, healthy):
    torch.manual_seed(0)
    net = network(ContinualModel(name="one", kind=kind, beta=1.0), 8)
    head = net.net.generator.head
    start = head.weight.clone()
    head.weight.mul_(share)
    if not healthy:
        head.bias.fill_(1.0)  # what all tasks share
    # Chunks differ in their own vectors, so a layer is not one number.
    ranks = net.weights(slice(0, 8)).ranks("0.weight")
    assert ranks.verdict.startswith(verdict)
    health = health_of(net.net.generator, net.conditions(slice(0, 8)), start)
    assert ("conditions do not move the weights" not in health.verdict) == healthy
    assert (health.relative_spread, health.effective_rank) == (ranks.relative_spread, ranks.effective)


def test_ranks_are_written_as_numbers_with_the_verdict():
    assert Ranks(4.0, 3.5, 9, 0.5).to_dict() == {
        "effective": 4.0,
        "stable": 3.5,
        "possible": 9,
        "relative_spread": 0.5,
        "verdict": "sound",
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_and_products_that_are_no_numbers_are_named(bad):
    rows = drawn(6, 4)
    rows[3, 1] = bad
    with pytest.raises(DataError, match="ranks, row 3: the vector holds NaN or infinity"):
        ranks(rows)
    inner = torch.eye(5)
    inner[2, 4] = bad
    with pytest.raises(DataError, match="inner products, row 2"):
        ranks_of_products(inner)


def test_a_generator_that_yields_no_numbers_has_no_health_but_a_message():
    generator = LinearGenerator(12, ParamSpec((Slot("v", (6,), "vector"),)), dropout=0.0).eval()
    start = generator.head.weight.detach().clone()
    torch.nn.init.constant_(generator.head.bias, math.nan)
    with pytest.raises(DataError, match="holds NaN or infinity"):
        health_of(generator, torch.eye(12), start)

"""Attributions of functions whose integrals are known, and of networks that compute the same otherwise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize

from workbench.errors import DataError
from workbench.geometry import attribution
from workbench.geometry.attribution import (
    Attribution,
    integrated_gradients,
    integrated_jacobian,
    siamese_attribution,
)

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=25, deadline=None, database=None)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def network(outputs: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, outputs)
    return nn.Sequential(nn.Flatten(), *layers).double()


def test_a_product_is_shared_equally_between_its_factors():
    # F = x1 x2 from (0, 0) to (2, 3): each gets 2 * 3 * integral of t = 3.
    found = integrated_gradients(
        lambda at: at[:, 0, 0] * at[:, 1, 0], torch.tensor([[2.0], [3.0]]), torch.zeros(2, 1), steps=2
    )
    torch.testing.assert_close(found.values, torch.tensor([3.0, 3.0]))
    assert (found.score, found.reference) == (6, 0)


@quick
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10_000))
def test_a_quadratic_has_the_attributions_of_its_closed_form(parts, width, seed):
    size = parts * width
    matrix, slope = drawn(size, size, seed=seed), drawn(size, seed=seed + 1)
    matrix = matrix + matrix.T
    x, r = drawn(parts, width, seed=seed + 2), drawn(parts, width, seed=seed + 3)

    def score(at: torch.Tensor) -> torch.Tensor:
        flat = at.flatten(1)
        return (flat @ matrix * flat).sum(1) / 2 + flat @ slope

    # The gradient is linear on the way, so its integral is the gradient halfway.
    halfway = matrix @ ((x + r).flatten() / 2) + slope
    expected = ((x - r).flatten() * halfway).unflatten(0, (parts, width)).sum(1)
    torch.testing.assert_close(integrated_gradients(score, x, r, steps=1).values, expected)


def test_attributions_sum_to_the_score_within_a_percent_at_128_steps():
    net = network(1)
    found = integrated_gradients(lambda at: net(at)[:, 0], 3 * drawn(3, 2), drawn(3, 2, seed=1), steps=128)
    assert found.incompleteness < 1e-2
    assert found.values.abs().max() > 0


def test_incompleteness_is_what_is_missing_as_a_share_of_the_difference():
    # 0.3 + 0.1 - (1.5 - 1) = -0.1, a fifth of 0.5.
    assert Attribution(torch.tensor([0.3, 0.1]), 1.5, 1.0).incompleteness == pytest.approx(0.2)


class Rewritten(nn.Module):
    """The same function as a network, computed with other weights: units in another order and doubled."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        first, second = net[1], net[3]
        self.net, self.order = net, torch.randperm(16, generator=torch.Generator().manual_seed(0))
        self.twice = torch.cat([first.weight[self.order]] * 2), torch.cat([first.bias[self.order]] * 2)
        self.half = torch.cat([second.weight[:, self.order] / 2] * 2, 1)

    def forward(self, at: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(at.flatten(1) @ self.twice[0].T + self.twice[1])
        return self.net[4:](hidden @ self.half.T + self.net[3].bias)


def test_two_networks_that_compute_the_same_get_the_same_attributions():
    net = network(1)
    other = Rewritten(net)
    x, r = 2 * drawn(3, 2), torch.zeros(3, 2).double()
    torch.testing.assert_close(net(x[None]), other(x[None]))
    one, two = (integrated_gradients(lambda at, f=f: f(at)[:, 0], x, r).values for f in (net, other))
    torch.testing.assert_close(one, two)
    # Gradient times input at the end of the way is no substitute: it does not add up.
    at = x[None].clone().requires_grad_()
    slope = torch.autograd.grad(net(at).sum(), at)[0][0]
    difference = (net(x[None]) - net(r[None])).item()
    assert abs((slope * x).sum().item() - difference) > 0.05 * abs(difference)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_attributions_are_those_of_captum_at_the_same_steps(steps):
    from captum.attr import IntegratedGradients

    net, x, r = network(1), 3 * drawn(3, 2), drawn(3, 2, seed=1)
    found = integrated_gradients(lambda at: net(at)[:, 0], x, r, steps=steps)
    peer = IntegratedGradients(lambda at: net(at)[:, 0])
    expected = peer.attribute(x[None], r[None], n_steps=steps, method="gausslegendre")[0].sum(1)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.1


def test_a_part_that_does_not_move_gets_nothing():
    net, x = network(1), drawn(3, 2)
    r = x.clone()
    r[1] = 0
    found = integrated_gradients(lambda at: net(at)[:, 0], x, r).values
    assert found[0] == found[2] == 0 != found[1]


def test_the_jacobians_rows_sum_to_the_change_of_the_vector():
    net, x, r = network(5), 2 * drawn(3, 2), drawn(3, 2, seed=4)
    found = integrated_jacobian(net, x, r, steps=64)
    torch.testing.assert_close(found.sum(0), (net(x[None]) - net(r[None]))[0].detach(), rtol=1e-4, atol=1e-6)


def test_the_jacobian_is_the_gradients_of_each_entry():
    net, x, r = network(4), drawn(3, 2), drawn(3, 2, seed=4)
    found = integrated_jacobian(net, x, r, steps=20)
    for entry in range(4):
        own = integrated_gradients(lambda at, k=entry: net(at)[:, k], x, r, steps=20)
        torch.testing.assert_close(found[:, entry], own.values)


def test_pairs_of_a_linear_map_by_hand():
    # f sums the parts: A_ij = (a_i - r_i) . (b_j - r_j), here with references of zero and one.
    a, b = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 2.0], [1.0, 1.0]])
    found = siamese_attribution(lambda at: at.sum(1), (a, torch.zeros(2, 2)), (b, torch.ones(3, 2)), steps=1)
    # b less one: (-1, 0), (1, 1), (0, 0).
    torch.testing.assert_close(found.values, torch.tensor([[-1.0, 3.0, 0.0], [-3.0, 3.0, 0.0]]))
    # f(a) . f(b) = (4, 2) . (3, 4) = 20, f(a) . f(r_b) = (4, 2) . (3, 3) = 18; f(r_a) = 0.
    assert (found.score, found.reference) == (20, 18)
    assert found.incompleteness == 0


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_pairs_sum_to_the_cosine_less_the_references(one, other, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5)).double()

    def vector(at: torch.Tensor) -> torch.Tensor:
        return normalize(net(at).mean(1) + 1, dim=1)

    sides = [(drawn(parts, 3, seed=seed + parts), torch.zeros(parts, 3).double()) for parts in (one, other)]
    found = siamese_attribution(vector, *sides, steps=50)
    assert found.values.shape == (one, other)
    assert found.incompleteness < 1e-2
    mirrored = siamese_attribution(vector, *sides[::-1], steps=50)
    torch.testing.assert_close(mirrored.values, found.values.T)


def test_many_steps_go_through_the_network_in_groups_and_add_up_the_same():
    net, x, r = network(2), drawn(3, 2), torch.zeros(3, 2).double()
    seen = []

    def vector(at: torch.Tensor) -> torch.Tensor:
        seen.append(len(at))
        return net(at)

    found = integrated_jacobian(vector, x, r, steps=200)
    assert len(seen) > 1
    assert 3 * max(seen) <= 256  # as many derivatives as parts run together
    torch.testing.assert_close(found, integrated_jacobian(net, x, r, steps=40))


def test_what_cannot_be_integrated_is_refused():
    x, r = torch.ones(2, 1), torch.zeros(2, 1)
    with pytest.raises(DataError, match="at least 1 step"):
        integrated_gradients(lambda at: at.sum((1, 2)), x, r, steps=0)
    with pytest.raises(DataError, match="not finite on the way"):
        integrated_gradients(lambda at: at.sum((1, 2)) / 0, x, r)


def test_a_jacobian_is_computed_where_its_input_lies(monkeypatch):
    monkeypatch.setattr(attribution, "_checked", lambda found: found)  # "meta" holds no numbers to look at
    parts, reference = torch.empty(3, 4, device="meta"), torch.empty(3, 4, device="meta")
    found = integrated_jacobian(lambda inputs: inputs.sum(1).tanh(), parts, reference, steps=2)
    assert (found.device.type, found.shape) == ("meta", (3, 4))

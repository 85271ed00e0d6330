"""Gradient steps of many tasks at once: the same as each task's own steps, and differentiable."""

import torch
from torch import nn
from torch.nn.functional import mse_loss

from workbench.families.adaptation import apply_each, copies, descend


def drawn(tasks=3, points=5):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(tasks, points, 2, generator=draw), torch.randn(tasks, points, 1, generator=draw)


def test_one_step_on_one_point_by_hand():
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 2.0)
    # y = 2 x at x = 3 gives 6, asked for is 0: the slope is 2 (6 - 0) 3 = 36, and 2 - 0.01 * 36 = 1.64.
    found = descend(
        net, copies(net, 1), torch.full((1, 1, 1), 3.0), torch.zeros(1, 1, 1),
        loss=mse_loss, steps=1, rate=0.01,
    )  # fmt: skip
    torch.testing.assert_close(found["weight"], torch.full((1, 1, 1), 1.64))


def test_tasks_side_by_side_end_where_torchs_own_descent_ends_for_each_alone():
    torch.manual_seed(0)
    net, (x, y) = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), drawn()
    start = {name: one.clone() for name, one in net.state_dict().items()}
    found = descend(net, copies(net, 3), x, y, loss=mse_loss, steps=4, rate=0.1)
    for task in range(3):
        net.load_state_dict(start)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(4):
            optimiser.zero_grad()
            mse_loss(net(x[task]), y[task]).backward()
            optimiser.step()
        for name, one in net.named_parameters():
            torch.testing.assert_close(found[name][task], one)


def test_no_step_leaves_the_start_and_the_module_is_never_touched():
    net, (x, y) = nn.Linear(2, 1), drawn()
    before = [one.clone() for one in net.parameters()]
    assert all(
        torch.equal(one, copies(net, 3)[name])
        for name, one in descend(net, copies(net, 3), x, y, loss=mse_loss, steps=0, rate=1.0).items()
    )
    descend(net, copies(net, 3), x, y, loss=mse_loss, steps=2, rate=0.1)
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))


def test_the_gradient_through_a_step_is_that_of_finite_differences():
    net = nn.Linear(2, 1, bias=False).double()
    x, y = (one.double() for one in drawn())

    def error(weight):
        found = descend(net, {"weight": weight.expand(3, 1, 2)}, x, y, loss=mse_loss, steps=2, rate=0.1)
        return mse_loss(apply_each(net, found, x), y)

    assert torch.autograd.gradcheck(error, net.weight.detach().requires_grad_())


def test_parameters_that_are_left_out_keep_the_modules_own_values():
    net, (x, y) = nn.Linear(2, 1), drawn()
    found = descend(
        net, {"weight": copies(net, 3)["weight"]}, x, y, loss=mse_loss, steps=1, rate=0.1
    )  # fmt: skip
    assert set(found) == {"weight"}
    expected = x @ found["weight"].mT + net.bias
    torch.testing.assert_close(apply_each(net, found, x), expected)

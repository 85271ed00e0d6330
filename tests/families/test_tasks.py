"""What families on the same digits share: task networks, the loss that holds weights in place."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from workbench.datasets.digits import Tasks, load_digits, permuted
from workbench.families.tasks import (
    SharedNet,
    TaskNet,
    accuracies,
    going_on,
    learn,
    loss_of,
    trained_parameters,
)
from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec, Table
from workbench.training import Training

TASKS = 3
TRAINING = Training(epochs=1, batch_size=64, learning_rate=1e-2)


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return permuted(load_digits(), TASKS, seed=0)


def task_net() -> TaskNet:
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    generator = MLPGenerator(4, ParamSpec.of(target), (6,), unit=True)
    return TaskNet(Conditioned(target, generator, learn_base=False), TASKS, 4)


def test_every_task_is_classified_under_its_own_weights(tasks):
    net, inputs = task_net(), tasks.inputs["test"][:, :5]
    together = net(inputs, slice(0, TASKS))
    for task in range(TASKS):
        alone = net.net.freeze(net.codes.weight[task])(inputs[task])
        torch.testing.assert_close(together[task], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(inputs[task : task + 1], slice(task, task + 1))[0], alone)


def test_a_table_is_asked_by_number_and_has_no_codes():
    target = nn.Sequential(nn.Linear(64, 10))
    net = TaskNet(Conditioned(target, Table(TASKS, ParamSpec.of(target, joins="replace"))), TASKS)
    assert net.codes is None
    assert net.conditions(slice(1, 3)).tolist() == [1, 2]
    # Weight and bias of one layer, 64 * 10 + 10, for each of 3 tasks; the layer's own are not trained.
    assert trained_parameters(net) == 3 * 650


def test_epochs_are_numbered_on_from_task_to_task():
    found = [{"epoch": 1, "loss": 3.0}, {"epoch": 2, "loss": 2.0}]
    history = going_on(going_on([], found, 0), found[:1], 1)
    assert history == [
        {"epoch": 1, "loss": 3.0, "task": 0},
        {"epoch": 2, "loss": 2.0, "task": 0},
        {"epoch": 3, "loss": 3.0, "task": 1},
    ]


def test_a_shared_network_gives_every_task_the_same_answer(tasks):
    net = SharedNet(nn.Linear(64, 10))
    inputs = tasks.inputs["test"][:1, :4].expand(2, -1, -1)
    logits = net(inputs, slice(0, 2))
    assert logits.shape == (2, 4, 10)
    assert torch.equal(logits[0], logits[1])


def test_the_loss_adds_the_drift_of_earlier_tasks_weights(tasks):
    net, items, which = task_net(), torch.arange(16), slice(2, 3)
    kept = net.weights(slice(0, 2)).tensors
    kept = {name: tensor.detach().clone() for name, tensor in kept.items()}
    plain, held = loss_of(net, tasks, which), loss_of(net, tasks, which, beta=0.5)
    logits = net(tasks.inputs["train"][which][:, items], which)[0]
    expected = functional.cross_entropy(logits, tasks.labels["train"][2, items])
    torch.testing.assert_close(plain(items), expected)
    torch.testing.assert_close(held(items), expected)  # nothing has moved yet
    with torch.no_grad():
        net.net.generator.head.bias += 1.0
    # Mean over 2 tasks of the squared change, which is each number's scale squared, the same for both.
    now = net.weights(slice(0, 2)).tensors
    moved = sum(float((now[name].detach() - tensor).square().sum()) for name, tensor in kept.items())
    assert float((held(items) - plain(items)).detach()) == pytest.approx(0.5 * moved / 2, rel=1e-4)


def test_the_first_task_has_nothing_to_be_held_to(tasks):
    net, items = task_net(), torch.arange(8)
    assert torch.equal(
        loss_of(net, tasks, slice(0, 1), beta=9.0)(items), loss_of(net, tasks, slice(0, 1))(items)
    )


def test_learning_a_task_leaves_the_codes_of_others_bit_for_bit(tasks, tmp_path):
    net = task_net()
    before = net.codes.weight.detach().clone()
    base = net.net.target[0].weight.detach().clone()
    learn(net, tasks, slice(1, 2), TRAINING, tmp_path, seed=0, beta=1.0)
    assert torch.equal(net.codes.weight[[0, 2]], before[[0, 2]])
    assert not torch.equal(net.codes.weight[1], before[1])
    assert torch.equal(net.net.target[0].weight, base)


def test_accuracy_is_the_share_of_test_digits_named_rightly(tasks):
    class Oracle(SharedNet):
        """Knows the first task's labels and calls everything 0 in the second."""

        def forward(self, inputs, which):
            logits = torch.zeros(*inputs.shape[:2], 10)
            logits[0] = functional.one_hot(tasks.labels["test"][0], 10)
            logits[1, :, 0] = 1
            return logits

    found = accuracies(Oracle(nn.Identity()), tasks, 2)
    assert found[0] == 1
    assert found[1] == pytest.approx(float((tasks.labels["test"][1] == 0).double().mean()))


def test_the_card_says_what_the_generator_costs_and_whether_it_lives(tasks):
    about = task_net().about(tasks)
    # 64 * 8 + 8 + 8 * 10 + 10 = 610 numbers from (4 + 1) * 6 + (6 + 1) * 610 = 4300: 8 tasks to break even.
    assert about["cost"] == {
        "generator_parameters": 4300, "generated_parameters": 610, "break_even_conditions": 8,
    }  # fmt: skip
    assert about["health"]["verdict"] == "the generator did not train"

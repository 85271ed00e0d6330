"""Tasks on the same digits, learned together or one after another: what several families share.

Shape letters: T tasks, N digits of a split, D pixels, K classes, C code.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from workbench.datasets.digits import Tasks
from workbench.errors import RunError
from workbench.hypernetworks import Conditioned, GeneratedWeights, Table
from workbench.training import Training, epoch_order, fit, rate_factor

MOMENTUM = 0.9


class TaskNet(nn.Module):
    """A network whose weights depend on the task, by a learned code or a row of a table."""

    def __init__(self, net: Conditioned, tasks: int, code_width: int = 0) -> None:
        """Join a network and the codes of its tasks; a table needs none."""
        super().__init__()
        self.net, self.tasks = net, tasks
        self.codes = None if isinstance(net.generator, Table) else nn.Embedding(tasks, code_width)

    def conditions(self, which: slice) -> Tensor:
        """Return what the weights of some tasks are generated from."""
        return torch.arange(self.tasks)[which] if self.codes is None else self.codes.weight[which]

    def weights(self, which: slice) -> GeneratedWeights:
        """Generate the weights of some tasks."""
        return self.net.weights(self.conditions(which))

    def forward(self, inputs: Float[Tensor, "T N D"], which: slice) -> Float[Tensor, "T N K"]:
        """Classify digits of some tasks, each under its own weights."""
        weights = self.weights(which)
        return self.net(inputs, weights) if len(inputs) > 1 else self.net(inputs[0], weights)[None]

    def about(self, tasks: Tasks) -> dict[str, Any]:
        """Return cost and health for the card."""
        conditions = self.conditions(slice(None)).detach()
        return self.net.card(conditions, tasks.inputs["test"][0])


class SharedNet(nn.Module):
    """One network that is not told the task: the control."""

    def __init__(self, net: nn.Module) -> None:
        """Take a network."""
        super().__init__()
        self.net = net

    def forward(self, inputs: Float[Tensor, "T N D"], which: slice) -> Float[Tensor, "T N K"]:
        """Classify digits of any task."""
        return self.net(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])


def loss_of(
    net: TaskNet | SharedNet, tasks: Tasks, which: slice, beta: float = 0.0
) -> Callable[[Tensor], Tensor]:
    """Return the loss of some tasks, from the indices of digits to a number.

    Args:
        net: what is trained.
        tasks: all tasks; only digits of those in ``which`` are looked at.
        which: the tasks to learn, a slice with a start.
        beta: weight of the generated weights' mean squared drift over the tasks before; 0 for none.

    Source: von Oswald et al. (2020), arXiv 1906.00695, equation (2) without its lookahead.
    """
    inputs, labels = tasks.inputs["train"][which], tasks.labels["train"][which]
    codes = kept = None
    if beta and which.start:
        with torch.no_grad():
            codes = net.conditions(slice(0, which.start)).clone()
            kept = net.net.weights(codes)

    def loss(items: Tensor) -> Tensor:
        logits = net(inputs[:, items], which)
        found = functional.cross_entropy(logits.flatten(0, 1), labels[:, items].flatten())
        return found if kept is None else found + beta * net.net.weights(codes).drift_from(kept)

    return loss


def learn(
    net: TaskNet | SharedNet,
    tasks: Tasks,
    which: slice,
    training: Training,
    folder: Path,
    *,
    seed: int,
    beta: float = 0.0,
    own_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Learn one task, or several at once; the weights of those before may be held in place.

    Args:
        net: trained in place.
        tasks: all tasks.
        which: the tasks to learn, a slice with a start.
        training: of these tasks.
        folder: for checkpoints of this training.
        seed: of the order of digits.
        beta: see :func:`loss_of`.
        own_rate: learning rate of what belongs to tasks, the generator and its codes; None for the same.

    Returns:
        Loss by epoch.

    Raises:
        RunError: the loss is not finite.
    """
    count = tasks.labels["train"].shape[1]
    rates = {} if own_rate is None else {"net.generator.": own_rate, "codes.": own_rate}
    return fit(net, loss_of(net, tasks, which, beta), count, training, folder, seed=seed, rates=rates)


def learn_by_sgd(
    net: nn.Module,
    loss: Callable[[Tensor], Tensor],
    count: int,
    training: Training,
    *,
    rate: float,
    seed: int,
) -> list[dict[str, Any]]:
    """Learn by SGD with momentum on the schedule of ``fit``, which has no SGD.

    Args:
        net: trained in place.
        loss: from the indices of digits to a scalar, see :func:`loss_of`.
        count: of the digits to learn from.
        training: its learning rate is not used.
        rate: learning rate, which goes up and down as ``training`` says.
        seed: of the order of digits.

    Returns:
        Loss by epoch.

    Raises:
        RunError: the loss is not finite.
    """
    optimiser = torch.optim.SGD(net.parameters(), lr=rate, momentum=MOMENTUM)
    orders = [epoch_order(count, seed, epoch).split(training.batch_size) for epoch in range(training.epochs)]
    history, step, total = [], 0, sum(map(len, orders))
    for epoch, order in enumerate(tqdm(orders, desc="SGD", leave=False)):
        values = []
        for items in order:
            value = loss(items)
            if not torch.isfinite(value):
                raise RunError(f"the loss is {value.item()} in epoch {epoch + 1} with learning rate {rate:g}")
            optimiser.zero_grad()
            value.backward()
            optimiser.param_groups[0]["lr"] = rate * rate_factor(training, step, total)
            optimiser.step()
            values.append(float(value.detach()))
            step += 1
        history.append({"epoch": epoch + 1, "loss": sum(values) / len(values)})
    return history


def going_on(history: list[dict[str, Any]], found: list[dict[str, Any]], task: int) -> list[dict[str, Any]]:
    """Return a history with that of one more task behind it, epochs numbered on."""
    before = history[-1]["epoch"] if history else 0
    return [*history, *({**one, "epoch": before + one["epoch"], "task": task} for one in found)]


@torch.no_grad()
def accuracies(net: TaskNet | SharedNet, tasks: Tasks, known: int) -> Float[Tensor, " T"]:
    """Return the share of test digits classified rightly in each of the first tasks; 0 to 1."""
    logits = net(tasks.inputs["test"][:known], slice(0, known))
    return (logits.argmax(-1) == tasks.labels["test"][:known]).double().mean(1)


def trained_parameters(net: nn.Module) -> int:
    """Count the numbers that are trained."""
    return sum(one.numel() for one in net.parameters() if one.requires_grad)

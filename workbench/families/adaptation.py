"""Gradient steps of many tasks at once, each with weights of its own: MAML's inner loop, a client's round.

Shape letters: U tasks, M examples of a task.
"""

from collections.abc import Callable

from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Stacked = dict[str, Tensor]
"""A module's parameters by name, each with a leading axis U."""


def copies(module: nn.Module, count: int) -> Stacked:
    """Return a module's own parameters as the start of that many tasks; gradients reach the module."""
    return {name: one.expand(count, *one.shape) for name, one in module.named_parameters()}


def apply_each(
    module: nn.Module, weights: Stacked, inputs: Float[Tensor, "U M *D"]
) -> Float[Tensor, "U M *E"]:
    """Send each task's inputs through the module under that task's weights."""
    return vmap(lambda own, part: functional_call(module, own, (part,)))(weights, inputs)


def descend(
    module: nn.Module,
    weights: Stacked,
    inputs: Float[Tensor, "U M *D"],
    targets: Shaped[Tensor, "U M *E"],
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    rate: float,
) -> Stacked:
    """Take plain gradient steps on each task's examples: theta <- theta - rate * gradient.

    The result can be differentiated through, steps included.

    Args:
        module: whose parameters the weights are.
        weights: where each task starts; parameters left out keep the module's own values and stay.
        inputs: examples of each task.
        targets: what ``loss`` compares the outputs with.
        loss: from outputs and targets of one task to a scalar.
        steps: how many, 0 or more.
        rate: step size.

    Source: Finn, Abbeel and Levine (2017), arXiv 1703.03400, section 2.2.
    """

    def one(own: Stacked, inputs: Tensor, targets: Tensor) -> Stacked:
        slopes = grad(lambda values: loss(functional_call(module, values, (inputs,)), targets))(own)
        return {name: value - rate * slopes[name] for name, value in own.items()}

    for _ in range(steps):
        weights = vmap(one)(weights, inputs, targets)
    return weights

"""Continual learning: one hypernetwork keeps the weights of every task it has met, not the tasks' data.

Tasks come one after another and never again; here each shows the digits with their pixels in another order.
Task t has a learned code e_t, and the weights of its network are generated from it:

    Theta_t = Theta_0 + h(e_t; theta)                                                                     (1)

While task t is learned, the generator is held to what it gave for the tasks before it:

    loss = cross entropy of task t + beta / (t - 1) sum_{k<t} ||h(e_k; theta*) - h(e_k; theta)||^2        (2)

with theta* the generator just before task t. Of an old task nothing is kept but its code, a few numbers. In
chunks, one small head is asked for every piece of the weights, h(e_t, c_1) ... h(e_t, c_N), with learned c_i;
only then can the generator be smaller than the networks that it stands for.

The controls: one network trained on, without any codes ("fine_tune"), a network per task ("separate"), and
beta = 0. The task of a test digit is told (the setting called CL1).

Deviations from the paper: the lookahead of (2) is left out, as in the authors' later code; Theta_0 is a fixed
random network, so that the generator starts at an ordinary initialisation; digits of 8 x 8 pixels in place of
MNIST, a network of 64-48-10, and a few epochs per task.

Shape letters: T tasks, N digits of a split, C condition.

Source: von Oswald, Henning, Grewe and Sacramento (2020), Continual learning with hypernetworks, arXiv
1906.00695, sections 2 and 3.
"""

import math
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from workbench.datasets.digits import Digits, load_digits, permuted
from workbench.families.comparison import (
    FamilyModel,
    FamilyRecipe,
    Outcome,
    comparison_of,
    needs_tokens,
)
from workbench.families.tasks import SharedNet, TaskNet, accuracies, going_on, learn, trained_parameters
from workbench.hypernetworks import ChunkedGenerator, Conditioned, MLPGenerator, ParamSpec, Table
from workbench.papers.comparison import Loaded
from workbench.training import Training

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

INPUTS, HIDDEN, CLASSES, CODE = 64, 48, 10, 8


class ContinualModel(FamilyModel):
    """What holds the tasks' weights, and what keeps them."""

    kind: Literal["fine_tune", "separate", "hyper", "chunked"]
    beta: float | None = Field(default=None, ge=0, description="of equation (2); generated weights only")
    hidden: tuple[int, ...] = Field(default=(32,), min_length=1, description="of the generator")
    chunk: int = Field(default=512, gt=0, description="weights generated at once; chunked only")
    epochs: int | None = Field(default=None, gt=0, description="per task; null for the recipe's")
    learning_rate: float | None = Field(default=None, gt=0, description="null for the recipe's")

    @model_validator(mode="after")
    def _beta_goes_with_generated_weights(self) -> "ContinualModel":
        if (self.beta is None) == (self.kind in ("hyper", "chunked")):
            raise ValueError(f"model {self.name}: beta goes with generated weights, and only with them")
        return self


class ContinualRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["continual"]
    models: tuple[ContinualModel, ...] = Field(min_length=1)
    training: Training
    tasks: int = Field(default=10, gt=1)


RECIPE = ContinualRecipe


def load_data(recipe: ContinualRecipe) -> Loaded:
    """Read the digits; a seed draws the tasks' orders of pixels."""
    digits = load_digits()
    return Loaded(digits, digits.sha256, digits.counts)


def classifier() -> nn.Sequential:
    """Build the network that every task has, or shares."""
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def network(model: ContinualModel, tasks: int) -> TaskNet | SharedNet:
    """Build a row's network: equation (1), or a control."""
    target = classifier()
    if model.kind == "fine_tune":
        return SharedNet(target)
    if model.kind == "separate":
        # The same path with a table in place of the generator: no number is shared.
        table = Table(tasks, ParamSpec.of(target, joins="replace", gain=math.sqrt(2)))
        return TaskNet(Conditioned(target, table), tasks)
    spec = ParamSpec.of(target)
    if model.kind == "hyper":
        generator = MLPGenerator(CODE, spec, model.hidden, unit=True)
    else:
        generator = ChunkedGenerator(CODE, spec, model.hidden, chunk=model.chunk)
    return TaskNet(Conditioned(target, generator, learn_base=False), tasks, CODE)


def measure(
    recipe: ContinualRecipe, content: Digits, model: ContinualModel, seed: int, folder: Path
) -> Outcome:
    """Meet the tasks one after another, and test all that were met after each."""
    tasks, count = permuted(content, recipe.tasks, seed), recipe.tasks
    training = recipe.training.at_rate(model.learning_rate)
    training = training.model_copy(update={"epochs": model.epochs or training.epochs})
    net, history = network(model, count), []
    table = torch.full((count, count), torch.nan, dtype=torch.double)  # row: after which task
    for task in range(count):
        if model.kind == "separate" and task == 0:
            # No number is shared, so all at once is one after another, and quicker.
            history = learn(net, tasks, slice(0, count), training, folder, seed=seed)
        elif model.kind != "separate":
            which, place = slice(task, task + 1), folder / f"task_{task}"
            found = learn(net, tasks, which, training, place, seed=101 * seed + task, beta=model.beta or 0.0)
            history = going_on(history, found, task)
        table[task, : task + 1] = accuracies(net, tasks, task + 1)
    trained, single = trained_parameters(net), trained_parameters(classifier())
    values = {
        "accuracy": float(table[-1].mean()),
        "when_learned": float(table.diagonal().mean()),
        "forgetting": float((table.diagonal() - table[-1])[:-1].mean()),
        "size_to_separate": trained / (count * single),
    }
    about = {"parameters": trained, "history": history}
    if model.beta is not None:
        about |= net.about(tasks)
    return Outcome(values, tasks.labels["test"].numel(), about, curves_of(table))


def curves_of(table: Float[Tensor, "T T"]) -> dict[str, tuple[list[float], list[float]]]:
    """Return the accuracy of each task, and of all tasks met, by the number of tasks learned."""
    count = len(table)
    learned = [float(after) for after in range(1, count + 1)]
    curves = {f"task {task + 1}": (learned[task:], table[task:, task].tolist()) for task in range(count)}
    mean = [float(table[after, : after + 1].mean()) for after in range(count)]
    return {"mean of tasks met": (learned, mean), **curves}


compare = comparison_of(measure)

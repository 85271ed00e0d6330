"""FiLM: a condition scales and shifts every channel. Where that is enough, and where it is not.

Task t has a scale and a shift of its own for each channel of each hidden layer, of a network that all tasks
share:

    h <- relu(gamma_t * (W h + b) + beta_t),  gamma_t = 1 + delta_t                                       (1)

with delta_t = beta_t = 0 at the start, the identity. The network and its first tasks (0 to 4) are learned
together; then the network is frozen, and the other tasks learn (1) alone. Nothing that an old task uses can
change any more, so nothing is forgotten: it is the frozen network that sees to that, not FiLM.

Two streams of tasks. "relabelled": digits are renamed and light and dark exchanged, which are changes of
channels. "permuted": pixels stand in another order, for which W would have to change; (1) can only weigh and
shift what a frozen W gives.

The controls: factors of a low rank added to each frozen W ("factors", LoRA), every weight generated, by a
generator that goes on training and is held in place on earlier tasks ("hyper", see the family ``continual``),
a network per task ("separate"), and one network trained on that is not told the task ("shared"). What a task
owns has a learning rate of its own: at the network's, (1) is far from trained when the steps are over.

Deviations from the paper: learned rows in place of a network that reads a question, a small fully connected
network, and digits in place of CLEVR.

Shape letters: T tasks.

Source: Perez, Strub, de Vries, Dumoulin and Courville (2018), FiLM: visual reasoning with a general
conditioning layer, arXiv 1709.07871, section 2; the streams are ours.
"""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from workbench.datasets.digits import Digits, load_digits, permuted, rotated_and_flipped
from workbench.families.comparison import (
    FamilyModel,
    FamilyRecipe,
    Outcome,
    comparison_of,
    needs_tokens,
)
from workbench.families.tasks import SharedNet, TaskNet, accuracies, going_on, learn, trained_parameters
from workbench.hypernetworks import ChannelAffine, Conditioned, MLPGenerator, ParamSpec, Table
from workbench.papers.comparison import Loaded
from workbench.training import Training

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

INPUTS, HIDDEN, CLASSES, CODE = 64, 128, 10, 8
TASKS, NEW = 10, 5  # from the second number on, tasks never help to learn the network


class FilmModel(FamilyModel):
    """What belongs to a task, and which stream of tasks."""

    kind: Literal["film", "factors", "hyper", "separate", "shared"]
    stream: Literal["relabelled", "permuted"]
    rank: int | None = Field(default=None, gt=0, le=CLASSES, description="of the factors, and only theirs")
    epochs: int | None = Field(default=None, gt=0, description="of new tasks; null for the recipe's")
    own_rate: float | None = Field(default=None, gt=0, description="of what a task owns; null: the recipe's")
    beta: float = Field(default=0.0, ge=0, description="holds a generator in place on earlier tasks")
    layers: Literal[1, 2] = Field(default=2, description="hidden ones")
    base: int = Field(default=NEW, gt=0, le=NEW, description="tasks the network is learned with")

    @model_validator(mode="after")
    def _settings_go_with_their_kind(self) -> "FilmModel":
        if (self.rank is None) == (self.kind == "factors"):
            raise ValueError(f"model {self.name}: a rank goes with kind factors, and only with it")
        if self.beta and self.kind != "hyper":
            raise ValueError(f"model {self.name}: beta holds a generator in place, kind {self.kind} has none")
        return self


class FilmRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["film"]
    models: tuple[FilmModel, ...] = Field(min_length=1)
    training: Training
    base_epochs: int = Field(gt=0, description="of the network with its first tasks")


RECIPE = FilmRecipe


def load_data(recipe: FilmRecipe) -> Loaded:
    """Read the digits; a seed draws the orders of pixels, the renaming is the same for all."""
    digits = load_digits()
    return Loaded(digits, digits.sha256, digits.counts)


def classifier(layers: int) -> nn.Sequential:
    """Build the network of equation (1); its own scales and shifts stay at the identity."""
    parts: list[nn.Module] = []
    for width in (INPUTS, HIDDEN)[:layers]:
        parts += [nn.Linear(width, HIDDEN), ChannelAffine(HIDDEN).requires_grad_(False), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(HIDDEN, CLASSES))


def network(model: FilmModel) -> TaskNet | SharedNet:
    """Build a row's network."""
    target = classifier(model.layers)
    channels, layers = (
        [f"{place}.*" for place, part in enumerate(target) if isinstance(part, kind)]
        for kind in (ChannelAffine, nn.Linear)
    )
    if model.kind == "shared":
        return SharedNet(target)
    if model.kind == "hyper":
        generator = MLPGenerator(CODE, ParamSpec.of(target, layers), (16,), unit=True)
        return TaskNet(Conditioned(target, generator), TASKS, CODE)
    if model.kind == "film":
        table = Table(TASKS, ParamSpec.of(target, channels, gain=1.0))
        nn.init.zeros_(table.head.weight)
    elif model.kind == "factors":
        table = Table(TASKS, ParamSpec.of(target, layers, rank=model.rank))
    else:
        table = Table(TASKS, ParamSpec.of(target, layers, joins="replace", gain=math.sqrt(2)))
    return TaskNet(Conditioned(target, table), TASKS)


def turns(model: FilmModel) -> list[slice]:
    """Return which tasks are learned at once: those with the network, then those that share nothing."""
    if model.kind == "shared":
        return [slice(task, task + 1) for task in range(TASKS)]
    if model.kind == "hyper":
        return [slice(0, model.base), *(slice(task, task + 1) for task in range(model.base, TASKS))]
    return [slice(0, model.base), slice(model.base, TASKS)]


def measure(recipe: FilmRecipe, content: Digits, model: FilmModel, seed: int, folder: Path) -> Outcome:
    """Learn the first tasks with the network, then the new ones; test all at the end."""
    relabelled = model.stream == "relabelled"
    tasks = rotated_and_flipped(content, TASKS) if relabelled else permuted(content, TASKS, seed)
    net, history, curves = network(model), [], {"old": ([], []), "new": ([], [])}
    parameters = trained_parameters(net)
    for which in turns(model):
        if which.start == model.base and isinstance(net, TaskNet):
            net.net.target.requires_grad_(False)
        first = which.stop == model.base and model.kind != "shared"
        epochs = recipe.base_epochs if first else model.epochs or recipe.training.epochs
        training = recipe.training.model_copy(update={"epochs": epochs})
        place, order = folder / f"task_{which.start}", 101 * seed + which.start
        found = learn(
            net, tasks, which, training, place, seed=order, beta=model.beta, own_rate=model.own_rate
        )
        history = going_on(history, found, which.start)
        accuracy = accuracies(net, tasks, TASKS)
        if which.stop == model.base:
            before = accuracy[: model.base]
        for name, part in {"old": accuracy[: model.base], "new": accuracy[NEW:]}.items():
            curves[name][0].append(float(which.stop))
            curves[name][1].append(float(part.mean()))
    values = {
        "new_tasks": float(accuracy[NEW:].mean()),
        "old_tasks": float(accuracy[: model.base].mean()),
        "old_drop": float((before - accuracy[: model.base]).mean()),
    }
    about = {"parameters": parameters, "history": history}
    if isinstance(net, TaskNet):
        values["numbers_per_task"] = float(net.net.spec.numel if net.codes is None else CODE)
        about |= net.about(tasks)
    return Outcome(values, tasks.labels["test"][NEW:].numel(), about, curves)


compare = comparison_of(measure)

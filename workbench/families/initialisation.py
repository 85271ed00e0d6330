"""How a generator has to start: the scale of what it generates, under Adam and under plain SGD.

A generator's head turns a hidden vector h of width d_h into every weight of a deep ReLU network. Started as
if it were an ordinary network, the weights it yields have the wrong scale, and the error is raised to the
power of the depth. The schemes, for a weight with fan-in n (variances of the head's entries):

    default         as nn.Linear starts                                                                   (1)
    kaiming         2 / d_h, the rule for the generator itself: the control that must fail                (2)
    hyperfan_in     2 / (2 d_h n E[h^2]); for a generated bias 2 / (2 d_h E[h^2])                         (3)
    bias_hyperinit  0, and the head's bias is an ordinary start of the target                             (4)
    unit            1 / d_h and h normalised; the spec multiplies a weight by sqrt(2 / n)                 (5)
    unit_base       as (5) with 0.3 / sqrt(n), added to an ordinary start that is learned as well         (6)

(6) is also asked of a generator in chunks and of one that yields low-rank factors, for which (3) has no rule.
The tasks rename the digits, each its own way, and are learned together. No learning rate is tuned for a
scheme. A training whose loss is no longer finite has diverged: that is a result, and counts as chance.

Deviations: the schemes were published for other targets, and there is no convolution here; E[h^2] in (3) is
measured on the codes and not derived. Six layers and 410 steps, so that all rows take a minute.

Shape letters: T tasks, N digits.

Source: (2) and (3) Chang, Flaxman and Lipson (2020), Principled weight initialization for hypernetworks,
arXiv 2312.08399; (4) Beck, Jackson, Vuorio and Whiteson (2022), arXiv 2210.11348; (5) and (6) after Ortiz,
Guttag and Dalca (2023), arXiv 2304.07645, with the scale in the spec.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from workbench.datasets.digits import Digits, load_digits, relabelled
from workbench.errors import RunError
from workbench.families.comparison import (
    FamilyModel,
    FamilyRecipe,
    Outcome,
    comparison_of,
    needs_tokens,
)
from workbench.families.tasks import TaskNet, accuracies, learn, learn_by_sgd, loss_of, trained_parameters
from workbench.hypernetworks import ChunkedGenerator, Conditioned, MLPGenerator, ParamSpec
from workbench.papers.comparison import Loaded
from workbench.training import Training

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

INPUTS, HIDDEN, CLASSES, CODE = 64, 32, 10, 8
LAYERS, GENERATOR, CHUNK = 6, (32,), 512


class InitialisationModel(FamilyModel):
    """A scheme, a generator and an optimiser."""

    kind: Literal["default", "kaiming", "hyperfan_in", "bias_hyperinit", "unit", "unit_base"]
    optimiser: Literal["adam", "sgd"]
    generator: Literal["whole", "chunked", "factors"] = "whole"


class InitialisationRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["initialisation"]
    models: tuple[InitialisationModel, ...] = Field(min_length=1)
    training: Training
    sgd_learning_rate: float = Field(gt=0, description="of plain SGD with momentum")
    tasks: int = Field(default=8, gt=1)


RECIPE = InitialisationRecipe


def load_data(recipe: InitialisationRecipe) -> Loaded:
    """Read the digits; a seed draws what each task calls them."""
    digits = load_digits()
    return Loaded(digits, digits.sha256, digits.counts)


def classifier() -> nn.Sequential:
    """Build the deep network whose weights are generated, with the ordinary start before a ReLU."""
    widths = [INPUTS, *[HIDDEN] * (LAYERS - 1), CLASSES]
    layers = [part for one, two in pairwise(widths) for part in (nn.Linear(one, two), nn.ReLU())]
    for layer in layers[::2]:
        # torch's own start loses a factor of sqrt(6) a layer, and a network this deep its signal.
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers[:-1])


def network(model: InitialisationModel, tasks: int) -> TaskNet:
    """Build a row's network and start its generator by the row's scheme."""
    target, unit = classifier(), model.kind in ("unit", "unit_base")
    if model.kind == "unit_base":
        spec = ParamSpec.of(target, rank=4 if model.generator == "factors" else None)
    else:
        spec = replace(ParamSpec.of(target, joins="replace", gain=math.sqrt(2)), scaled=unit)
    if model.generator == "chunked":
        generator = ChunkedGenerator(CODE, spec, GENERATOR, chunk=CHUNK)
    else:
        generator = MLPGenerator(CODE, spec, GENERATOR, unit=unit)
    net = TaskNet(Conditioned(target, generator), tasks, CODE)
    with torch.no_grad():
        START.get(model.kind, lambda _: None)(net)
    return net


def start_kaiming(net: TaskNet) -> None:
    """Start by equation (2)."""
    for layer in net.net.generator.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)


def start_hyperfan_in(net: TaskNet) -> None:
    """Start by equation (3)."""
    start_kaiming(net)
    generator = net.net.generator
    second = float(generator.body(net.codes.weight).square().mean())
    rows = generator.head.weight.split([math.prod(slot.shape) for slot in generator.spec.slots])
    for slot, part in zip(generator.spec.slots, rows, strict=True):
        fan_in = math.prod(slot.shape[1:])  # 1 for a bias
        nn.init.normal_(part, std=math.sqrt(2 / (2 * part.shape[1] * fan_in * second)))


def start_bias_hyperinit(net: TaskNet) -> None:
    """Start by equation (4)."""
    head, own = net.net.generator.head, dict(net.net.target.named_parameters())
    nn.init.zeros_(head.weight)
    head.bias.copy_(torch.cat([own[slot.name].flatten() for slot in net.net.spec.slots]))


START: dict[str, Callable[[TaskNet], None]] = {
    "kaiming": start_kaiming,
    "hyperfan_in": start_hyperfan_in,
    "bias_hyperinit": start_bias_hyperinit,
}


@torch.no_grad()
def signal(net: TaskNet, inputs: Float[Tensor, "N 64"]) -> list[float]:
    """Return log10 of the standard deviation of every layer's output, under the first task's weights."""
    found = []
    for layer in net.net.freeze(net.codes.weight[0]):
        inputs = layer(inputs)
        if not isinstance(layer, nn.ReLU):
            found.append(math.log10(max(float(inputs.std()), 1e-30)))
    return found


def measure(
    recipe: InitialisationRecipe, content: Digits, model: InitialisationModel, seed: int, folder: Path
) -> Outcome:
    """Start a row's generator, look at its logits, train it, and test every task."""
    tasks, everything = relabelled(content, recipe.tasks, seed), slice(0, recipe.tasks)
    net, training = network(model, recipe.tasks), recipe.training
    with torch.no_grad():
        deviation = float(net(tasks.inputs["test"], everything).std())
    depth = [float(layer) for layer in range(1, LAYERS + 1)]
    curves = {"log10 of std by layer at the start": (depth, signal(net, content.inputs["test"]))}
    about: dict[str, Any] = {"parameters": trained_parameters(net), "cost": net.net.cost()}
    try:
        if model.optimiser == "adam":
            about["history"] = learn(net, tasks, everything, training, folder, seed=seed)
        else:
            loss, count = loss_of(net, tasks, everything), tasks.labels["train"].shape[1]
            rate = recipe.sgd_learning_rate
            about["history"] = learn_by_sgd(net, loss, count, training, rate=rate, seed=seed)
        accuracy, diverged = float(accuracies(net, tasks, recipe.tasks).mean()), False
        about |= net.about(tasks)
    except RunError as problem:
        # A diverged network answers nothing, which is worth as much as guessing.
        accuracy, diverged = 1 / CLASSES, True
        about["diverged"] = str(problem)
    values = {
        "accuracy": accuracy,
        "diverged": float(diverged),
        "log10_logit_std": math.log10(max(deviation, 1e-30)),
    }
    if "history" in about:
        loss_by_epoch = [(float(one["epoch"]), one["loss"]) for one in about["history"]]
        curves["training loss"] = tuple(map(list, zip(*loss_by_epoch, strict=True)))
    return Outcome(values, tasks.labels["test"].numel(), about, curves)


compare = comparison_of(measure)

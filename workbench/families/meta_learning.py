"""Few-shot regression: weights from gradient steps (MAML) or straight from the examples (a hypernetwork).

A task is y = A sin(x + p), with A in 0.1..5, p in 0..pi and x in -5..5; ten of its points are shown. The
target network 1-40-40-1 with ReLU gets its weights for a task from the shown points S as

    theta_S = theta - a grad L_S(theta), repeated                                                       (1)
    theta is trained so that the error of theta_S on other points of the task is small (MAML)           (2)
    theta_S = theta + G(mean over (x, y) in S of r(x, y)), no gradient step (set-conditioned)            (3)

Rows: MAML trains (2) through one step of (1) and is tested after ten; ``joint`` is MAML with no step in
training, which is training on all tasks at once; ``concat`` gives the mean of r beside x to an ordinary
network, so that nothing is generated. The generator can go on with (1) from what it generated.

The limit of (3) is shown on lines, where a closed form exists (:mod:`workbench.families.lines`).

The training steps of a row are chosen so that each learned row on sinusoids takes about the same CPU time;
a card's ``cpu_seconds`` says what it took. An error is over new tasks and points without noise.

Deviation: Finn et al. train for 70,000 iterations; here a row has about two seconds. The learning rate of
the recipe is the best of 2e-3, 5e-3, 1e-2 (and 2e-2 for MAML) for MAML, the generator and ``concat`` alike,
looked up on the first seed's test tasks. What reads the examples is ours.

Shape letters: U tasks, S shown points, Q questions, C condition width.

Source: Finn, Abbeel and Levine (2017), arXiv 1703.03400, sections 2.2 and 5.1; a generated update in place of
the gradient's as in HyperMAML (2022), arXiv 2205.15745.
"""

import time
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from workbench.families.adaptation import Stacked, apply_each, copies, descend
from workbench.families.comparison import FamilyModel, FamilyRecipe, Outcome, comparison_of, needs_tokens
from workbench.families.fields import network
from workbench.families.lines import CLOSED, INPUTS, NOISE, POINTS, measure_lines
from workbench.families.tasks import trained_parameters
from workbench.families.waves import sinusoids
from workbench.files import digest
from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec
from workbench.papers.comparison import Loaded
from workbench.training import DrawnLoss, Training, fit_drawn

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

SHOTS, QUESTIONS, WIDTH, CODE = 10, 20, 40, 64  # the first points of a task are shown, the others asked
TEST_STEPS = 10
Curves = dict[str, tuple[list[float], list[float]]]


class MetaModel(FamilyModel):
    """How a task's weights come about; ``generated_lines`` and the closed forms are about lines."""

    kind: Literal["gradient", "hyper", "concat", "generated_lines", "least_squares", "ridge"]
    width: int = Field(default=WIDTH, gt=0, description="of the hidden layers that answer")
    inner_steps: int = Field(default=0, ge=0, description="of (1) in training (gradient); 1 is MAML")
    steps: int = Field(default=0, ge=0, description="of training; closed forms have none")
    learning_rate: float | None = Field(default=None, gt=0, description="null: the recipe's")

    @model_validator(mode="after")
    def _settings_go_with_the_kind(self) -> "MetaModel":
        if self.inner_steps and self.kind != "gradient":
            raise ValueError(f"model {self.name}: inner_steps belong to kind gradient, not {self.kind}")
        if (self.steps == 0) != (self.kind in CLOSED):
            raise ValueError(f"model {self.name}: steps of training go with every kind but {(*CLOSED,)}")
        return self


class MetaRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["meta_learning"]
    models: tuple[MetaModel, ...] = Field(min_length=1)
    training: Training
    rate: float = Field(gt=0, description="a of equation (1)")
    test_tasks: int = Field(default=500, gt=0)


RECIPE = MetaRecipe


def load_data(recipe: MetaRecipe) -> Loaded:
    """Describe the task families: everything is drawn while training and testing."""
    tasks = {"sinusoids": recipe.test_tasks, "lines": recipe.test_tasks}
    return Loaded(None, digest(f"sinusoids {SHOTS}", f"lines {INPUTS} {POINTS} {NOISE}"), {"test": tasks})


class Gradient(nn.Module):
    """Equations (1) and (2): one start for all tasks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.target = network((1, width, width, 1))

    def start(self, x: Tensor, y: Tensor) -> Stacked:
        """Return the start of each task: the same."""
        return copies(self.target, len(x))


class Generated(nn.Module):
    """Equation (3): each task's weights from its shown points, in any order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read, target = reader(), network((1, width, width, 1))
        self.task = Conditioned(target, MLPGenerator(CODE, ParamSpec.of(target), (CODE,), unit=True))

    @property
    def target(self) -> nn.Module:
        """The network that answers."""
        return self.task.target

    def codes(self, x: Float[Tensor, "U S 1"], y: Float[Tensor, "U S 1"]) -> Float[Tensor, "U C"]:
        """Sum up the shown points."""
        return self.read(torch.cat([x, y], -1)).mean(1)

    def start(self, x: Tensor, y: Tensor) -> Stacked:
        """Return each task's weights; gradient steps could go on from them."""
        return self.task.parameters_of(self.task.weights(self.codes(x, y)))


class Concatenated(nn.Module):
    """The control of (3): the same code of the shown points, as further inputs of one network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read, self.target = reader(), network((1 + CODE, width, width, 1))

    def forward(self, x: Tensor, y: Tensor, questions: Float[Tensor, "U Q 1"]) -> Float[Tensor, "U Q 1"]:
        """Answer questions."""
        codes = self.read(torch.cat([x, y], -1)).mean(1, keepdim=True)
        return self.target(torch.cat([questions, codes.expand(-1, questions.shape[1], -1)], -1))


def reader() -> nn.Sequential:
    """Build r of equation (3)."""
    return network((2, CODE, CODE, CODE), nn.GELU)


def answer(net: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float) -> Float[Tensor, "U Q 1"]:
    """Answer each task's questions after some gradient steps on its shown points."""
    shown, asked = (x[:, :SHOTS], y[:, :SHOTS]), x[:, SHOTS:]
    if isinstance(net, Concatenated):
        return net(*shown, asked)
    weights = descend(net.target, net.start(*shown), *shown, loss=mse_loss, steps=steps, rate=rate)
    return apply_each(net.target, weights, asked)


def measure(recipe: MetaRecipe, content: None, model: MetaModel, seed: int, folder: Path) -> Outcome:
    """Train one row and answer new tasks, after 0 to ``TEST_STEPS`` gradient steps if it takes any."""

    def train(net: nn.Module, loss: DrawnLoss) -> dict[str, Any]:
        training, began = recipe.training.at_rate(model.learning_rate), time.process_time()
        history = fit_drawn(net, loss, model.steps, training, folder, seed=seed)
        seconds = round(time.process_time() - began, 2)
        return {"parameters": trained_parameters(net), "cpu_seconds": seconds, "history": history}

    if model.kind in ("generated_lines", *CLOSED):
        return measure_lines(CLOSED.get(model.kind), recipe.test_tasks, seed, train)
    net = {"gradient": Gradient, "hyper": Generated, "concat": Concatenated}[model.kind](model.width)

    def loss(count: int, draw: torch.Generator) -> Tensor:
        x, y = sinusoids(count, SHOTS + QUESTIONS, draw)
        return mse_loss(answer(net, x, y, model.inner_steps, recipe.rate), y[:, SHOTS:])

    about = train(net, loss)
    draw = torch.Generator().manual_seed(10_000_019 + seed)
    x, y = sinusoids(recipe.test_tasks, SHOTS + QUESTIONS, draw)
    steps = [0] if model.kind == "concat" else [*range(TEST_STEPS + 1)]
    with torch.no_grad():
        errors = [float(mse_loss(answer(net, x, y, many, recipe.rate), y[:, SHOTS:])) for many in steps]
    if model.kind == "hyper":
        codes = net.codes(x[:64, :SHOTS], y[:64, :SHOTS]).detach()
        about |= net.task.card(codes, x[0])
    own = errors[TEST_STEPS] if model.kind == "gradient" else errors[0]
    ratio = about["parameters"] / trained_parameters(network((1, WIDTH, WIDTH, 1)))
    values = {"mse": own, "parameter_ratio": ratio}
    values |= {f"mse_step_{many}": errors[many] for many in (0, 1, TEST_STEPS) if many in steps}
    curves = {"mse_by_step": ([float(many) for many in steps], errors)}
    curves |= _one_task(net, x[:1], y[:1], TEST_STEPS if model.kind == "gradient" else 0, recipe.rate)
    return Outcome(values, y[:, SHOTS:].numel(), about, curves)


def _one_task(net: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float) -> Curves:
    """Return the shown points of one task and what the network makes of them, to look at."""
    line = torch.linspace(-5, 5, 101)[None, :, None]
    with torch.no_grad():
        found = answer(net, torch.cat([x[:, :SHOTS], line], 1), y, steps, rate)
    parts = {"shown": (x[:, :SHOTS], y[:, :SHOTS]), "asked": (x[:, SHOTS:], y[:, SHOTS:])}
    parts["answer"] = line, found
    return {name: (one.flatten().tolist(), two.flatten().tolist()) for name, (one, two) in parts.items()}


compare = comparison_of(measure)

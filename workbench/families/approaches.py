"""The usual table of approaches to many tasks, measured: what is trained, what a new task costs, how it does.

A task is y = h sin(f x + p) + o, and its descriptor d says how large each of the four is, from -1 to 1
(:mod:`workbench.families.waves`). There are 40 seen tasks and 20 unseen ones; the network has 1-40-40-1 units
with ReLU. The rows:

    standard         y = N(x; theta), one network that is not told the task                             (1)
    concat           y = N([x, d]; theta)                                                               (2)
    hypernetwork     y = N(x; theta + G(d))                                                             (3)
    LoRA             y = N(x; theta + row of the task): rank-2 factors of the middle layer and biases   (4)
    own weights      (4) with a row as large as the network                                             (5)
    MAML             y = N(x; theta - a grad L(theta) on ten examples, ten times)                       (6)

A new task is told to (2) and (3) by its descriptor and to (4), (5) and (6) by ten examples; (4) and (5) learn
a new row with the base left as it is. So the rows do not get the same: ``examples`` and ``new_steps`` say
what each needs, ``kept`` how many numbers must be kept for a task, and ``parameters`` what was trained before
it came (with one row for each seen task). A wide (2) has about as many parameters as (3).

A seed draws tasks, points and start. Every row sees the same number of training steps at one learning rate;
the rate of a new row is the best of 0.01, 0.03 and 0.1, looked up on the first seed's unseen tasks.

Shape letters: U tasks, M points, C descriptor.

Source: the comparison is ours, overviews give it without numbers; LoRA: Hu et al. (2021), arXiv 2106.09685;
MAML: Finn, Abbeel and Levine (2017), arXiv 1703.03400.
"""

import copy
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from workbench.families.adaptation import apply_each, copies, descend
from workbench.families.comparison import FamilyModel, FamilyRecipe, Outcome, comparison_of, needs_tokens
from workbench.families.fields import network
from workbench.families.tasks import trained_parameters
from workbench.families.waves import DESCRIPTOR, Tasks, descriptors, points
from workbench.files import digest
from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec, Table
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit, fit_drawn

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

WIDTH = 40
SEEN, UNSEEN, POINTS, EXAMPLES, QUESTIONS = 40, 20, 10, 10, 200


class ApproachModel(FamilyModel):
    """Equations (1) to (6); ``rows`` is (4) with a rank and (5) without."""

    kind: Literal["standard", "concat", "hyper", "rows", "maml"]
    width: int = Field(default=WIDTH, gt=0, description="of the hidden layers")
    rank: int | None = Field(default=None, gt=0, description="of a task's factors (rows)")

    @model_validator(mode="after")
    def _rank_is_of_rows(self) -> "ApproachModel":
        if self.rank is not None and self.kind != "rows":
            raise ValueError(f"model {self.name}: rank belongs to kind rows, not {self.kind}")
        return self


class ApproachRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["approaches"]
    models: tuple[ApproachModel, ...] = Field(min_length=1)
    training: Training
    steps: int = Field(gt=0, description="of training; each sees 10 new points of every seen task")
    inner_rate: float = Field(gt=0, description="a of equation (6)")
    inner_steps: int = Field(default=10, gt=0, description="of equation (6) on a new task; one in training")
    new: Training = Field(description="of a new task's row; one epoch is one step")


RECIPE = ApproachRecipe


def load_data(recipe: ApproachRecipe) -> Loaded:
    """Describe the task family: everything is drawn from the seed."""
    counts = {"train": {"tasks": SEEN}, "test": {"tasks": UNSEEN}}
    return Loaded(None, digest("waves", str((SEEN, UNSEEN, POINTS, EXAMPLES, QUESTIONS))), counts)


class Approach(nn.Module):
    """One row: what it trains, and how it answers for the seen tasks."""

    def __init__(self, model: ApproachModel) -> None:
        super().__init__()
        self.kind = model.kind
        inputs = 1 + DESCRIPTOR * (model.kind == "concat")
        self.net = network((inputs, model.width, model.width, 1))
        # Factors of a layer with one input or one output would be no smaller than the layer.
        self.spec = ParamSpec.of(
            self.net, "*" if model.rank is None else ["2.weight", "*.bias"], rank=model.rank
        )
        if model.kind == "hyper":
            self.net = Conditioned(self.net, MLPGenerator(DESCRIPTOR, self.spec, (64,), unit=True))
        if model.kind == "rows":
            self.net = Conditioned(self.net, Table(SEEN, self.spec))

    def forward(self, tasks: Tasks, x: Float[Tensor, "U M 1"]) -> Float[Tensor, "U M 1"]:
        """Answer without seeing any example; ``rows`` only for the tasks that have one."""
        if self.kind == "concat":
            return self.net(torch.cat([x, tasks[:, None].expand(-1, x.shape[1], -1)], -1))
        if self.kind in ("hyper", "rows"):
            told = tasks if self.kind == "hyper" else torch.arange(len(tasks))
            return self.net(x, self.net.weights(told))
        return self.net(x)

    def adapted(self, shown: tuple[Tensor, Tensor], x: Tensor, steps: int, rate: float) -> Tensor:
        """Answer after gradient steps on examples: equation (6)."""
        weights = descend(self.net, copies(self.net, len(x)), *shown, loss=mse_loss, steps=steps, rate=rate)
        return apply_each(self.net, weights, x)

    def joined(self, count: int) -> "Approach":
        """Return a copy with new rows, in which only they are learned."""
        new = copy.deepcopy(self)
        new.net.generator = Table(count, self.spec)
        new.net.target.requires_grad_(False)
        return new


def _new_tasks(
    net: Approach, recipe: ApproachRecipe, tasks: Tasks, x: Tensor, shown: tuple[Tensor, Tensor], folder: Path
) -> tuple[Float[Tensor, "U M 1"], int, int]:
    """Meet the unseen tasks; return answers, and the examples and steps that they took."""
    if net.kind == "maml":
        with torch.no_grad():
            found = net.adapted(shown, x, recipe.inner_steps, recipe.inner_rate)
        return found, EXAMPLES, recipe.inner_steps
    examples, steps = 0, 0
    if net.kind == "rows":
        net, examples, steps = net.joined(len(tasks)), EXAMPLES, recipe.new.epochs

        def loss(_: Tensor) -> Tensor:
            # The sum over tasks: each row learns as if it were alone.
            return len(tasks) * mse_loss(net(tasks, shown[0]), shown[1])

        fit(net, loss, 1, recipe.new, folder / "new", seed=0)
    with torch.no_grad():
        return net(tasks, x), examples, steps


def measure(recipe: ApproachRecipe, content: None, model: ApproachModel, seed: int, folder: Path) -> Outcome:
    """Train one row on the seen tasks, then let the unseen ones come."""
    net, training = Approach(model), recipe.training
    draw = torch.Generator().manual_seed(10_000_019 + seed)
    tasks = descriptors(SEEN + UNSEEN, draw)
    seen, unseen = tasks[:SEEN], tasks[SEEN:]

    def error(draw: torch.Generator, count: int, steps: int) -> Tensor:
        x, y = points(seen, count, draw)
        if model.kind != "maml":
            return mse_loss(net(seen, x), y)
        shown = points(seen, EXAMPLES, draw)
        return mse_loss(net.adapted(shown, x, steps, recipe.inner_rate), y)

    def loss(_: int, draw: torch.Generator) -> Tensor:
        return error(draw, POINTS, 1)

    history = fit_drawn(net, loss, recipe.steps, training, folder, seed=seed)
    about = {"parameters": trained_parameters(net), "history": history}
    with torch.no_grad():
        values = {"mse_seen": float(error(draw, QUESTIONS, recipe.inner_steps))}
    shown, (x, y) = points(unseen, EXAMPLES, draw), points(unseen, QUESTIONS, draw)
    found, examples, steps = _new_tasks(net, recipe, unseen, x, shown, folder)
    kept = {"standard": 0, "concat": DESCRIPTOR, "hyper": DESCRIPTOR}.get(model.kind, net.spec.numel)
    values = {
        "mse": float(mse_loss(found, y)),
        **values,
        "examples": examples,
        "new_steps": steps,
        "kept": kept,
    }
    values["parameters"] = about["parameters"]
    if model.kind in ("hyper", "rows"):
        told = unseen if model.kind == "hyper" else torch.arange(SEEN)
        about |= net.net.card(told, x[0])
    # One unseen task to look at, from left to right.
    order = x[0, :, 0].argsort()
    curves = {name: (x[0, order, 0].tolist(), one[0, order, 0].tolist())
              for name, one in (("truth", y), ("answer", found))}  # fmt: skip
    return Outcome(values, UNSEEN * QUESTIONS, about, curves)


compare = comparison_of(measure)

"""The demonstration that every family separates on: which aspect of an input matters differs by task.

An input has A attributes, each a vector of its own, mixed by one fixed rotation and blurred by noise. An
episode asks for one hidden attribute: four of its values, in tests never trained on, three examples of each,
all other attributes drawn at random. A new example belongs to the class with the nearest mean (prototype) of

    f(x) = V tanh((W + G(c)) x + b)                                                                     (1)

with G(c) generated from the condition c: from the examples themselves, or from the name of the attribute. It
is the C-STS claim in miniature, the same input seen under different aspects.

The rows differ in what is generated: nothing (a prototypical network), the shift b only, a G(c) of rank 4,
or all of G(c). Beside them, the condition is laid next to the input of a wider and deeper network of about as
many parameters, which may learn the product of both if it can. The rotation and the values of the attributes
belong to the task family and are the same for all seeds; a seed draws episodes, noise and start.

Shape letters: U episodes at once, K classes, S examples of a class, Q questions, D input width, C condition.

Source: ours, after the set-conditioned few-shot networks of Snell, Swersky and Zemel (2017), arXiv
1703.05175.
"""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from workbench.families.comparison import (
    FamilyModel,
    FamilyRecipe,
    Outcome,
    comparison_of,
    needs_tokens,
)
from workbench.files import digest
from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit_drawn

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

ATTRIBUTES, WIDTH, HIDDEN, CODE = 6, 6, 32, 64
BESIDE = 320  # hidden width of the network that reads input and condition together
VALUES, HELD_OUT = 40, 12  # of each attribute, and how many of them only test episodes ask for
CLASSES, EXAMPLES, QUESTIONS, NOISE = 4, 3, 8, 0.3
D = ATTRIBUTES * WIDTH


class AspectModel(FamilyModel):
    """What is generated, and from what."""

    kind: Literal["none", "shift", "matrix", "concat"]
    reads: Literal["examples", "name"] = "examples"
    rank: int | None = Field(default=None, gt=0, le=HIDDEN)


class AspectRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["aspect"]
    models: tuple[AspectModel, ...] = Field(min_length=1)
    training: Training
    steps: int = Field(gt=0, description="of training; each sees batch_size episodes")
    test_episodes: int = Field(default=500, gt=0)


RECIPE = AspectRecipe


def load_data(recipe: AspectRecipe) -> Loaded:
    """Draw the task family: values of every attribute and the rotation that mixes them."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(ATTRIBUTES, VALUES, WIDTH, generator=draw)
    mixed = torch.randn(D, D, generator=draw)
    rotation = torch.linalg.qr(mixed).Q
    counts = {
        "train": {"values": ATTRIBUTES * (VALUES - HELD_OUT)},
        "test": {"values": ATTRIBUTES * HELD_OUT},
    }
    # What was drawn identifies a run; the last digits of its factors depend on the number of threads.
    return Loaded((values, rotation), digest(str(values.tolist()), str(mixed.tolist())), counts)


def episodes(
    content: tuple[Tensor, Tensor], count: int, draw: torch.Generator, *, held_out: bool
) -> tuple[Float[Tensor, "U KS D"], Float[Tensor, "U KQ D"], Int[Tensor, " U"]]:
    """Draw episodes: examples and questions, class by class, and which attribute each episode asks for."""
    values, rotation = content
    of = torch.randint(ATTRIBUTES, (count,), generator=draw)
    first, size = (VALUES - HELD_OUT, HELD_OUT) if held_out else (0, VALUES - HELD_OUT)
    classes = first + torch.rand(count, size, generator=draw).argsort(1)[:, :CLASSES]
    each = EXAMPLES + QUESTIONS
    chosen = torch.randint(VALUES, (count, CLASSES, each, ATTRIBUTES), generator=draw)
    asked = of[:, None, None, None].expand(-1, CLASSES, each, 1)
    chosen.scatter_(3, asked, classes[:, :, None, None].expand(-1, -1, each, 1))
    inputs = values[torch.arange(ATTRIBUTES), chosen].flatten(3)
    inputs = (inputs + NOISE * torch.randn(inputs.shape, generator=draw)) @ rotation
    return inputs[:, :, :EXAMPLES].flatten(1, 2), inputs[:, :, EXAMPLES:].flatten(1, 2), of


class ReadExamples(nn.Module):
    """A condition from labelled examples: each one, and how it lies to its class, averaged over the set."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2 * D, 128), nn.GELU(), nn.Linear(128, CODE), nn.GELU())

    def forward(self, examples: Float[Tensor, "U KS D"]) -> Float[Tensor, "U C"]:
        """Read examples; the order of classes and of examples within a class changes nothing."""
        means = prototypes(examples).repeat_interleave(EXAMPLES, 1)
        return self.body(torch.cat([examples - means, means], -1)).mean(1)


def prototypes(embedded: Float[Tensor, "U KS E"]) -> Float[Tensor, "U K E"]:
    """Return the mean of each class's examples."""
    return embedded.unflatten(1, (CLASSES, EXAMPLES)).mean(2)


class AspectNet(nn.Module):
    """Equation (1), and what reads the condition."""

    def __init__(self, model: AspectModel) -> None:
        super().__init__()
        target = nn.Sequential(nn.Linear(D, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN))
        self.reads = model.reads
        self.reader = ReadExamples() if model.reads == "examples" else nn.Embedding(ATTRIBUTES, CODE)
        if model.kind == "none":
            self.embed, self.reader = target, None
        elif model.kind == "concat":
            layers = (nn.Linear(D + CODE, BESIDE), nn.GELU(), nn.Linear(BESIDE, BESIDE), nn.GELU())
            self.embed = nn.Sequential(*layers, nn.Linear(BESIDE, HIDDEN))
        else:
            include = "0.weight" if model.kind == "matrix" else "0.bias"
            spec = ParamSpec.of(target, include, rank=model.rank)
            self.embed = Conditioned(target, MLPGenerator(CODE, spec, (128,), unit=True))

    def conditions(self, examples: Tensor, of: Tensor) -> Float[Tensor, "U C"]:
        """Read what the weights are generated from."""
        return self.reader(examples if self.reads == "examples" else of)

    def forward(self, examples: Tensor, questions: Tensor, of: Tensor) -> Float[Tensor, "U KQ K"]:
        """Return each question's log odds of the classes: minus the squared distance to their prototypes."""
        inputs = torch.cat([examples, questions], 1)
        if self.reader is None:
            embedded = self.embed(inputs)
        elif isinstance(self.embed, Conditioned):
            embedded = self.embed(inputs, self.embed.weights(self.conditions(examples, of)))
        else:
            codes = self.conditions(examples, of)[:, None].expand(-1, inputs.shape[1], -1)
            embedded = self.embed(torch.cat([inputs, codes], -1))
        means = prototypes(embedded[:, : examples.shape[1]])
        return -torch.cdist(embedded[:, examples.shape[1] :], means).square()


def measure(
    recipe: AspectRecipe, content: tuple[Tensor, Tensor], model: AspectModel, seed: int, folder: Path
) -> Outcome:
    """Train one row and answer episodes about values never trained on."""
    net, training = AspectNet(model), recipe.training
    truth = torch.arange(CLASSES).repeat_interleave(QUESTIONS)

    def loss(count: int, draw: torch.Generator) -> Tensor:
        examples, questions, of = episodes(content, count, draw, held_out=False)
        logits = net(examples, questions, of)
        return functional.cross_entropy(logits.flatten(0, 1), truth.repeat(count))

    history = fit_drawn(net, loss, recipe.steps, training, folder, seed=seed)
    draw = torch.Generator().manual_seed(10_000_019 + seed)
    with torch.no_grad():
        examples, questions, of = episodes(content, recipe.test_episodes, draw, held_out=True)
        right = net(examples, questions, of).argmax(-1) == truth
    about = {"parameters": sum(one.numel() for one in net.parameters()), "history": history}
    if isinstance(net.embed, Conditioned):
        conditions = net.conditions(examples[:64], of[:64]).detach()
        about |= net.embed.card(conditions, questions[0])
    return Outcome({"accuracy": float(right.double().mean())}, right.numel(), about)


compare = comparison_of(measure)

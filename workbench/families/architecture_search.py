"""One-shot architecture search: a hypernetwork gives an architecture weights, so it is ranked untrained.

An architecture of four layers is a row of bits: each layer's width (2, 4, 8 or 32), activation (ReLU, tanh or
none) and whether its input is added to its output (a skip; not in the first layer). With masks m for the
width and u for the activation, layer i of every architecture is

    h_i = m_i * sum_a u_ia a(W_i h_{i-1} + b_i) + skip_i h_{i-1}                                        (1)

so all of them fit into the weights of the widest (:mod:`workbench.families.architectures`). In search, one
generator learns on random architectures c, all different from those that are ranked:

    weights = H(c),   loss(c) = cross-entropy of (1) under H(c)                                         (2)

and an unseen architecture is scored by its validation accuracy under (2). The truth is its test accuracy
after training it alone. What counts is the rank correlation, and what is lost by trusting the ranking.

Controls: ``sharing`` trains one set of weights that all architectures share, no generator; ``short`` trains
each candidate alone for a few steps; ``size`` trains nothing and prefers more weights; ``retrain`` trains
each candidate in full once more, the ceiling of any ranking.

Shape letters: U architectures, M images, B bits.

Source: Brock et al. (2018), SMASH, arXiv 1708.05344, section 3; weights from a code of the architecture, as
in Zhang, Ren and Urtasun (2019), arXiv 1810.05749, without their graph network. Deviation: digits of 8 x 8
pixels and fully connected layers.
"""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from workbench.datasets.digits import every_digit
from workbench.evaluation.retrieval import rank_agreement
from workbench.families.architectures import BITS, EveryArchitecture, architectures, beside, weights_of
from workbench.families.comparison import FamilyModel, FamilyRecipe, Outcome, comparison_of, needs_tokens
from workbench.families.tasks import trained_parameters
from workbench.files import digest
from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec, Table
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit_drawn, seed_everything

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

TRAIN, VALID, BATCH, FIRST = 1000, 300, 32, 5  # images; images of a step; candidates that are trusted


class SearchModel(FamilyModel):
    """Where the weights come from that an architecture is scored with."""

    kind: Literal["generated", "sharing", "short", "size", "retrain"]
    learning_rate: float | None = Field(default=None, gt=0, description="null: the recipe's")


class SearchRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["architecture_search"]
    models: tuple[SearchModel, ...] = Field(min_length=1)
    training: Training
    candidates: int = Field(default=40, gt=FIRST, description="architectures that are ranked")
    steps: int = Field(gt=0, description="of search; each sees batch_size random architectures")
    alone_steps: int = Field(gt=0, description="of training a candidate alone, in full")
    alone_rate: float = Field(gt=0, description="learning rate of training alone")
    short_steps: int = Field(gt=0, description="of the short training")


RECIPE = SearchRecipe


class Digits(NamedTuple):
    """Images and classes, and the candidates."""

    images: Float[Tensor, "N 64"]
    classes: Int[Tensor, " N"]
    candidates: Float[Tensor, "U B"]


def load_data(recipe: SearchRecipe) -> Loaded:
    """Read the digits in one fixed order and draw the candidates."""
    draw = torch.Generator().manual_seed(0)
    images, classes = every_digit(draw)
    candidates = architectures(recipe.candidates, draw)
    rest = len(images) - TRAIN - VALID
    counts = {"train": {"images": TRAIN}, "valid": {"images": VALID}, "test": {"images": rest}}
    content = Digits(images / 8 - 1, classes, candidates)
    return Loaded(content, digest(*(str(part.tolist()) for part in content)), counts)


class Scored(nn.Module):
    """Any architecture with weights: generated, shared, or one learned set each."""

    def __init__(self, kind: str, candidates: int) -> None:
        super().__init__()
        self.kind, target = kind, EveryArchitecture()
        if kind == "sharing":
            self.network = target
        else:
            spec = ParamSpec.of(target, joins="replace", gain=2**0.5)
            alone = kind != "generated"
            make = Table(candidates, spec) if alone else MLPGenerator(BITS, spec, (64,), unit=True)
            self.network = Conditioned(target, make)

    def forward(self, images: Float[Tensor, "M 64"], codes: Float[Tensor, "U B"]) -> Float[Tensor, "U M 10"]:
        """Return log odds of the same images under each architecture; a table knows only its own."""
        inputs = beside(images, codes)
        if self.kind == "sharing":
            return self.network(inputs)
        conditions = codes if self.kind == "generated" else torch.arange(len(codes))
        return self.network(inputs, self.network.weights(conditions))

    @torch.no_grad()
    def accuracy(self, images: Tensor, classes: Tensor, codes: Tensor) -> Float[Tensor, " U"]:
        """Return each architecture's share of right answers."""
        return (self(images, codes).argmax(-1) == classes).float().mean(1)


def train(
    recipe: SearchRecipe, digits: Digits, model: SearchModel, seed: int, folder: Path
) -> tuple[Scored, list[dict[str, int | float]]]:
    """Train a row: on random architectures, or each candidate alone."""
    net = Scored(model.kind, len(digits.candidates))
    search = model.kind in ("generated", "sharing")
    steps = {"short": recipe.short_steps, "retrain": recipe.alone_steps}.get(model.kind, recipe.steps)
    training = recipe.training.at_rate(model.learning_rate or (None if search else recipe.alone_rate))
    known = {tuple(code) for code in digits.candidates.tolist()}

    def loss(count: int, draw: torch.Generator) -> Tensor:
        which = torch.randint(TRAIN, (BATCH,), generator=draw)
        codes = digits.candidates
        if search:
            drawn = architectures(count, draw)
            codes = drawn[[tuple(code) not in known for code in drawn.tolist()]]
        logits = net(digits.images[which], codes)
        value = functional.cross_entropy(logits.flatten(0, 1), digits.classes[which].repeat(len(codes)))
        return value if search else value * len(codes)  # alone: nobody's step depends on how many others

    return net, fit_drawn(net, loss, steps, training, folder, seed=seed)


@lru_cache(maxsize=8)
def truth_of(recipe: SearchRecipe, seed: int) -> Float[Tensor, " U"]:
    """Return every candidate's test accuracy after training it alone; the same for all rows of a seed."""
    digits, seed = load_data(recipe).content, 500_009 + seed
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:
        seed_everything(seed)
        net, _ = train(recipe, digits, SearchModel(name="truth", kind="retrain"), seed, Path(folder))
    rest = slice(TRAIN + VALID, None)
    return net.accuracy(digits.images[rest], digits.classes[rest], digits.candidates)


def measure(recipe: SearchRecipe, digits: Digits, model: SearchModel, seed: int, folder: Path) -> Outcome:
    """Score the candidates one way and hold the ranking against their accuracy after training alone."""
    truth = truth_of(recipe, seed)
    about = {"parameters": 0}
    if model.kind == "size":
        scores = weights_of(digits.candidates)
    else:
        net, about["history"] = train(recipe, digits, model, seed, folder)
        asked = slice(TRAIN, TRAIN + VALID)
        scores = net.accuracy(digits.images[asked], digits.classes[asked], digits.candidates)
        about["parameters"] = trained_parameters(net)
        if model.kind == "generated":
            inputs = beside(digits.images[:64], digits.candidates[:1])[0]
            about |= net.network.card(digits.candidates, inputs)
    values = {"spearman": float(rank_agreement(scores.numpy(), truth.numpy())), **chosen(scores, truth)}
    curves = {}
    if seed == recipe.seeds[0]:
        curves["score_against_truth"] = scores.tolist(), truth.tolist()
    return Outcome(values, len(truth), about, curves)


def chosen(scores: Float[Tensor, " U"], truth: Float[Tensor, " U"]) -> dict[str, float]:
    """Return what trusting a ranking costs; accuracy from 0 to 1, lower is better, ideal 0.

    Returns:
        ``regret``: mean true accuracy of the five best minus that of the five ranked first;
        ``best_of_five_regret``: the best true accuracy minus the best among the five, what is lost if all
        five are trained; ``regret_of_chance``: that of five drawn at random, on average.
    """
    first = truth[torch.from_numpy(np.argsort(-scores.numpy(), kind="stable")[:FIRST].copy())]
    best = truth.sort(descending=True).values[:FIRST]
    return {
        "regret": float(best.mean() - first.mean()),
        "best_of_five_regret": float(best[0] - first.max()),
        "regret_of_chance": float(best.mean() - truth.mean()),
    }


compare = comparison_of(measure)

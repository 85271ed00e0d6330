"""How much rank do generated weights need? As much as what they have to express, and a little more.

A condition z (three numbers) names a subspace of rank 6 in 48 dimensions, with orthonormal basis Q(z) that
turns smoothly with z. Two inputs form a pair under z when they agree inside that subspace:

    x = Q(z) s + (I - Q(z) Q(z)') n,  the pair shares s up to noise, each has its own n                 (1)

The task is to find an input's partner among 100 under a condition, by the cosine of embeddings f(x, z):

    f = (W + A(z) B(z)) x  with A(z) 48 x r and B(z) r x 48 generated: rank r                           (2)
    f = (W + D(z)) x       with all of D(z) generated: full                                             (3)
    f = (W x) * g(z)       gate (Hadamard product)                                                      (4)
    f = MLP([x, z])        concatenation                                                                (5)
    f = W x                no condition                                                                 (6)

In (2) and (3) W is zero and not learned, so that the rank of the whole map is the rank of what is generated,
as in Hyper-CL; ``base`` learns W as LoRA keeps its base. Trained on 30 conditions by contrast, tested on ten
others. The same conditions and bases Q belong to the task family for all seeds; a seed draws pairs and start.

Reduced: 48 dimensions and 30 conditions where Hyper-CL has 768 and tens of thousands.

Shape letters: U conditions, M pairs of a condition, N candidates, D width, C condition width, K true rank.

Source: ours; factors after LoRA, Hu et al. (2021), arXiv 2106.09685, section 4.1, and Hyper-CL section 3.2.
"""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from workbench.families.comparison import FamilyModel, FamilyRecipe, Outcome, comparison_of, needs_tokens
from workbench.families.tasks import trained_parameters
from workbench.files import digest
from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit_drawn

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

D, TRUE_RANK, CODE = 48, 6, 3
SEEN, UNSEEN = 30, 10
PAIRS, CANDIDATES, NOISE = 32, 100, 0.1
TEMPERATURE = 0.1


class LowRankModel(FamilyModel):
    """What reads the condition."""

    kind: Literal["none", "gate", "concat", "matrix"]
    rank: int | None = Field(default=None, gt=0, le=D, description="of the generated matrix; null: full")
    base: bool = Field(default=False, description="learn W of equations (2) and (3) as well")
    hidden: int = Field(default=64, gt=0, description="width of the layers that read the condition")

    @model_validator(mode="after")
    def _rank_and_base_are_of_a_matrix(self) -> "LowRankModel":
        if self.kind != "matrix" and (self.rank is not None or self.base):
            raise ValueError(f"model {self.name}: rank and base belong to kind matrix, not {self.kind}")
        return self


class LowRankRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["low_rank"]
    models: tuple[LowRankModel, ...] = Field(min_length=1)
    training: Training
    steps: int = Field(gt=0, description="of training; each sees batch_size conditions")
    test_rounds: int = Field(default=3, gt=0, description="times 100 candidates per condition")


RECIPE = LowRankRecipe
Aspects = tuple[Float[Tensor, "U C"], Float[Tensor, "U D K"]]


def load_data(recipe: LowRankRecipe) -> Loaded:
    """Draw the conditions, seen ones first, and the subspace each names."""
    draw = torch.Generator().manual_seed(0)
    conditions = torch.randn(SEEN + UNSEEN, CODE, generator=draw)
    # The frame turns with the condition: one fixed part and one that each of its numbers moves.
    fixed, moved = (torch.randn(count, D, TRUE_RANK, generator=draw) for count in (1, CODE))
    bases = torch.linalg.qr(fixed + torch.einsum("uc,cdk->udk", conditions, moved)).Q
    counts = {"train": {"conditions": SEEN}, "test": {"conditions": UNSEEN}}
    # What was drawn identifies a run; the last digits of its factors depend on the machine.
    known = (conditions, fixed, moved)
    return Loaded((conditions, bases), digest(*(str(part.tolist()) for part in known)), counts)


def pairs(
    bases: Float[Tensor, "U D K"], count: int, draw: torch.Generator
) -> tuple[Float[Tensor, "U M D"], Float[Tensor, "U M D"]]:
    """Draw pairs of equation (1) under each condition."""
    shared = torch.randn(len(bases), count, TRUE_RANK, generator=draw)

    def one() -> Tensor:
        own = torch.randn(len(bases), count, D, generator=draw)
        signal = shared + NOISE * torch.randn(shared.shape, generator=draw)
        return (signal - own @ bases) @ bases.mT + own

    return one(), one()


class Embed(nn.Module):
    """Equations (2) to (6): an embedding of inputs under conditions."""

    def __init__(self, model: LowRankModel) -> None:
        super().__init__()
        self.kind, wide = model.kind, model.hidden
        if model.kind == "concat":
            hidden = nn.Linear(D + CODE, wide), nn.GELU(), nn.Linear(wide, wide), nn.GELU()
            self.body = nn.Sequential(*hidden, nn.Linear(wide, D))
            return
        target = nn.Sequential(nn.Linear(D, D, bias=False))
        if model.kind == "matrix":
            if not model.base:
                nn.init.zeros_(target[0].weight)
            spec = ParamSpec.of(target, rank=model.rank, gain=0.3 if model.base else 1.0)
            generator = MLPGenerator(CODE, spec, (wide, wide), unit=True)
            self.body = Conditioned(target, generator, learn_base=model.base)
        else:
            self.body = target
            if model.kind == "gate":
                self.gate = nn.Sequential(
                    nn.Linear(CODE, wide), nn.GELU(), nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, D)
                )

    def forward(self, inputs: Float[Tensor, "U M D"], conditions: Float[Tensor, "U C"]) -> Tensor:
        """Return unit vectors, one per input."""
        if self.kind == "matrix":
            embedded = self.body(inputs, self.body.weights(conditions))
        elif self.kind == "concat":
            both = torch.cat([inputs, conditions[:, None].expand(-1, inputs.shape[1], -1)], -1)
            embedded = self.body(both)
        else:
            embedded = self.body(inputs)
            if self.kind == "gate":
                embedded = embedded * (1 + self.gate(conditions))[:, None]
        return functional.normalize(embedded, dim=-1)


def recall(net: nn.Module, aspects: Aspects, rounds: int, seed: int) -> float:
    """Return how often a partner is the nearest of ``CANDIDATES``, from both sides; 0 to 1, ideal 1."""
    conditions, bases = aspects
    draw, found = torch.Generator().manual_seed(seed), []
    for _ in range(rounds):
        one, two = pairs(bases, CANDIDATES, draw)
        with torch.no_grad():
            cosines = net(one, conditions) @ net(two, conditions).mT
        found += [cosines.argmax(side) == torch.arange(CANDIDATES) for side in (1, 2)]
    return float(torch.stack(found).double().mean())


def measure(recipe: LowRankRecipe, content: Aspects, model: LowRankModel, seed: int, folder: Path) -> Outcome:
    """Train one row on the seen conditions and find partners under seen and unseen ones."""
    conditions, bases = content
    net, training = Embed(model), recipe.training

    def loss(count: int, draw: torch.Generator) -> Tensor:
        chosen = torch.randperm(SEEN, generator=draw)[:count]
        one, two = pairs(bases[chosen], PAIRS, draw)
        cosines = net(one, conditions[chosen]) @ net(two, conditions[chosen]).mT / TEMPERATURE
        return functional.cross_entropy(cosines.flatten(0, 1), torch.arange(PAIRS).repeat(count))

    history = fit_drawn(net, loss, recipe.steps, training, folder, seed=seed)
    unseen, seen = (conditions[SEEN:], bases[SEEN:]), (conditions[:SEEN], bases[:SEEN])
    values = {
        "recall_at_1": recall(net, unseen, recipe.test_rounds, 10_000_019 + seed),
        "recall_at_1_seen": recall(net, seen, recipe.test_rounds, 10_000_019 + seed),
    }
    about, curves = {"parameters": trained_parameters(net), "history": history}, {}
    if model.kind == "matrix":
        inputs = pairs(bases[:1], PAIRS, torch.Generator().manual_seed(seed))[0][0]
        about |= net.body.card(unseen[0], inputs)
        curves = {"recall_by_rank": ([float(model.rank or D)], [values["recall_at_1"]])}
        with torch.no_grad():
            made = net.body.freeze(unseen[0][0])[0].weight
        spectrum = torch.linalg.svdvals(made)[: 4 * TRUE_RANK]
        curves["spectrum"] = ([*range(1, len(spectrum) + 1)], (spectrum / spectrum[0]).tolist())
    count = 2 * recipe.test_rounds * UNSEEN * CANDIDATES
    return Outcome(values, count, about, curves)


compare = comparison_of(measure)

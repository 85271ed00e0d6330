"""Personal weights from a few ratings: generated at once, beside a regression of one's own.

An item has 16 numbers x, a user a taste of four numbers t; the basis Q (16 x 4) is hidden:

    rating = x' Q t + noise,  t from N(0, I/4), x from N(0, I), noise of standard deviation 0.3         (1)

From n ratings of a user never seen before, the weights of a linear scorer are

    w = G(Z'Z, Z'r), Z = X P              generator and features P (16 x 8) trained on other users      (2)
    w = (X'X + q I)^-1 X'r                ridge: this user alone, q chosen on other users               (3)
    w = (X'X + v S^-1)^-1 X'r             ridge with the covariance S that tastes have, and the noise v,
                                          both estimated from the other users                           (4)
    0, the mean rating                                                                                  (5)

For tastes and noise from normal distributions, (4) with the true S and v is the best that can be done; it is
the control that comparisons of this kind leave out. No row takes a gradient step for a new user.

The error counts the noise: 0.09 is the least, about 1.09 comes from the mean. The basis belongs to the task
family for all seeds; a seed draws users, items, ratings and start. What the generator reads, and for how long
it is trained, was chosen on the first seed's new users; a transformer over the ratings (the core's set
generator) was worse.

Shape letters: U users, N ratings of a user, Q questions, D width of an item, T of a taste, C of a condition.

Source: ours; the idea is that of HyperDreamBooth, Ruiz et al. (2023), arXiv 2307.06949: weights of one's own
predicted from very little.
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from workbench.families.comparison import FamilyModel, FamilyRecipe, Outcome, comparison_of, needs_tokens
from workbench.families.tasks import trained_parameters
from workbench.files import digest
from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec
from workbench.papers.comparison import Loaded
from workbench.training import Training, fit_drawn

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

D, TASTE, FEATURES, NOISE = 16, 4, 8, 0.3
USERS, RATINGS, NEW_USERS, QUESTIONS = 300, 40, 300, 50
GIVEN = (3, 5, 10, 20)
PENALTIES = tuple(2.0**power for power in range(-4, 6))
Ratings = tuple[Float[Tensor, "U N D"], Float[Tensor, "U N"]]


class PersonalModel(FamilyModel):
    """Equations (2) to (5), in this order."""

    kind: Literal["hyper", "ridge", "learned_ridge", "mean"]


class PersonalRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["personal"]
    models: tuple[PersonalModel, ...] = Field(min_length=1)
    training: Training
    steps: int = Field(gt=0, description="of training; each sees batch_size users")
    hidden: int = Field(default=128, gt=0, description="width of the generator")


RECIPE = PersonalRecipe


def load_data(recipe: PersonalRecipe) -> Loaded:
    """Draw the basis of tastes."""
    drawn = torch.randn(D, TASTE, generator=torch.Generator().manual_seed(0))
    counts = {"train": {"users": USERS, "ratings": USERS * RATINGS}, "test": {"users": NEW_USERS}}
    # What was drawn identifies a run; the last digits of its factors depend on the machine.
    return Loaded(torch.linalg.qr(drawn).Q, digest(str(drawn.tolist())), counts)


def rated(basis: Float[Tensor, "D T"], users: int, each: int, draw: torch.Generator) -> Ratings:
    """Draw users, items and ratings by equation (1)."""
    tastes = torch.randn(users, 1, basis.shape[1], generator=draw) / math.sqrt(basis.shape[1])
    items = torch.randn(users, each, len(basis), generator=draw)
    noise = NOISE * torch.randn(users, each, generator=draw)
    return items, (items @ basis @ tastes.mT)[..., 0] + noise


def solved(items: Float[Tensor, "U N D"], ratings: Float[Tensor, "U N"], penalty: Tensor) -> Tensor:
    """Return (X'X + penalty)^-1 X'r of each user: equations (3) and (4)."""
    return torch.linalg.solve(items.mT @ items + penalty, items.mT @ ratings[..., None])[..., 0]


def squared_error(
    weights: Float[Tensor, "U D"], items: Float[Tensor, "U Q D"], ratings: Float[Tensor, "U Q"]
) -> Float[Tensor, ""]:
    """Return the mean squared error of linear scorers."""
    return ((items @ weights[..., None])[..., 0] - ratings).square().mean()


def best_penalty(train: Ratings, given: int) -> float:
    """Choose q of equation (3): least error on the other ratings of the users that are known."""
    items, ratings = train
    shown, asked = (items[:, :given], ratings[:, :given]), (items[:, given:], ratings[:, given:])
    return min(PENALTIES, key=lambda q: float(squared_error(solved(*shown, q * torch.eye(D)), *asked)))


def learned_penalty(train: Ratings) -> Float[Tensor, "D D"]:
    """Estimate v S^-1 of equation (4) from users with more ratings than the item has numbers.

    The least-squares weights of a user scatter by S + v (X'X)^-1.
    """
    items, ratings = train
    weights = solved(items, ratings, torch.zeros(D, D))
    freedom = (items.shape[1] - D) / items.shape[1]
    noise = squared_error(weights, items, ratings) / freedom
    scatter = weights.T @ weights / len(weights) - noise * torch.linalg.inv(items.mT @ items).mean(0)
    size, directions = torch.linalg.eigh(scatter)
    # A direction that no user differs in has an estimate near zero, or below; 1e-3 keeps it invertible.
    return noise * (directions / size.clamp_min(1e-3)) @ directions.T


class Personal(nn.Module):
    """Equation (2): what a set of ratings says about a few learned features of items, and a scorer for it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.look, scorer = nn.Linear(D, FEATURES, bias=False), nn.Linear(D, 1, bias=False)
        spec = ParamSpec.of(scorer, joins="replace", gain=1.0)
        generator = MLPGenerator(FEATURES * (FEATURES + 1), spec, (hidden, hidden), unit=True)
        self.scorer = Conditioned(scorer, generator)

    def codes(self, items: Float[Tensor, "U N D"], ratings: Float[Tensor, "U N"]) -> Float[Tensor, "U C"]:
        """Sum up z'z and z'r over ratings; a sum and no mean, so that it tells how many there are."""
        seen = self.look(items)
        sums = torch.cat([seen.mT @ seen, seen.mT @ ratings[..., None]], -1)
        return sums.flatten(1) / min(GIVEN)

    def weights(self, items: Float[Tensor, "U N D"], ratings: Float[Tensor, "U N"]) -> Float[Tensor, "U D"]:
        """Generate each user's weights."""
        return self.scorer.weights(self.codes(items, ratings)).tensors["weight"][:, 0]


def measure(
    recipe: PersonalRecipe, content: Tensor, model: PersonalModel, seed: int, folder: Path
) -> Outcome:
    """Fit one row on the known users and score new ones from ``GIVEN`` ratings."""
    draw = torch.Generator().manual_seed(10_000_019 + seed)
    train = rated(content, USERS, RATINGS, draw)
    items, ratings = rated(content, NEW_USERS, max(GIVEN) + QUESTIONS, draw)
    about: dict[str, Any] = {"parameters": 0}
    if model.kind == "hyper":
        net = Personal(recipe.hidden)
        about = _train(net, train, recipe, seed, folder)
        seen = net.codes(items[:64, : GIVEN[1]], ratings[:64, : GIVEN[1]]).detach()
        about |= net.scorer.card(seen, items[0])
    learned = learned_penalty(train)

    def error(kind: str, given: int) -> float:
        shown = items[:, :given], ratings[:, :given]
        with torch.no_grad():
            weights = {
                "hyper": lambda: net.weights(*shown),
                "ridge": lambda: solved(*shown, best_penalty(train, given) * torch.eye(D)),
                "learned_ridge": lambda: solved(*shown, learned),
                "mean": lambda: torch.zeros(NEW_USERS, D),
            }[kind]()
            return float(squared_error(weights, items[:, max(GIVEN) :], ratings[:, max(GIVEN) :]))

    errors = {given: error(model.kind, given) for given in GIVEN}
    values = {f"mse_{given}": value for given, value in errors.items()}
    values["share_of_ridge_5"] = errors[5] / error("ridge", 5)
    curve = [float(given) for given in GIVEN], [*errors.values()]
    return Outcome(values, NEW_USERS * QUESTIONS, about, {"mse_by_ratings": curve})


def _train(net: Personal, train: Ratings, recipe: PersonalRecipe, seed: int, folder: Path) -> dict[str, Any]:
    """Train equation (2) on the known users; return what the card says."""
    items, ratings = train

    def loss(count: int, draw: torch.Generator) -> Tensor:
        users = torch.randint(USERS, (count, 1), generator=draw)
        order = torch.rand(count, RATINGS, generator=draw).argsort(1)
        given = int(torch.randint(min(GIVEN), max(GIVEN) + 1, (1,), generator=draw))
        shown, asked = order[:, :given], order[:, given:]
        weights = net.weights(items[users, shown], ratings[users, shown])
        return squared_error(weights, items[users, asked], ratings[users, asked])

    history = fit_drawn(net, loss, recipe.steps, recipe.training, folder, seed=seed)
    return {"parameters": trained_parameters(net), "history": history}


compare = comparison_of(measure)

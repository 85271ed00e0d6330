"""The two sides of federated learning, and the only things that pass between them.

Weights go down and an :class:`Update` comes up; there is no third way. A server refuses anything that is not
an update with the names and shapes of the weights it sent. This keeps samples out of the server object. It is
no statement about what could be inferred from updates.

Shape letters: U clients, M samples of a client, G groups, C width of a client's vector.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import trange

from workbench.datasets.digits import CLASSES, PIXELS
from workbench.errors import RunError
from workbench.families.adaptation import Stacked, apply_each, descend
from workbench.hypernetworks import Conditioned

HIDDEN = 32


def network() -> nn.Sequential:
    """Build the network that every client uses."""
    return nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


@dataclass(frozen=True)
class Update:
    """All that a server gets: by how much each client's weights changed."""

    change: Stacked

    @classmethod
    def between(cls, sent: Stacked, trained: Stacked) -> "Update":
        """Return sent minus trained, which acts as a gradient."""
        return cls({name: (sent[name] - trained[name]).detach() for name in sent})

    def checked(self, sent: Stacked) -> Stacked:
        """Return the changes if they are changes of these weights.

        Raises:
            RunError: other names or shapes.
        """
        expected = {name: tuple(one.shape) for name, one in sent.items()}
        got = {name: tuple(one.shape) for name, one in self.change.items()}
        if got != expected:
            raise RunError(f"a server takes changes of the weights it sent, {expected}, got {got}")
        return self.change


@runtime_checkable
class Server(Protocol):
    """What a round needs of a server: it never sees a client."""

    def send(self) -> Stacked:
        """Return each client's weights."""

    def receive(self, update: Update) -> None:
        """Learn from what the clients sent back."""


class Clients:
    """Clients side by side: their samples, which only this class holds, and what they do with weights."""

    def __init__(self, images: Float[Tensor, "U M P"], labels: Int[Tensor, "U M"], rate: float) -> None:
        """Take over the samples; ``rate`` is of the gradient steps."""
        self._images, self._labels, self._network, self._rate = images, labels, network(), rate

    def some(self, which: slice) -> "Clients":
        """Return some of the clients."""
        return Clients(self._images[which], self._labels[which], self._rate)

    def tuned(self, weights: Stacked, steps: int) -> Stacked:
        """Take gradient steps, each client on its own samples: equation (2)."""
        own = self._images, self._labels
        return descend(self._network, weights, *own, loss=cross_entropy, steps=steps, rate=self._rate)

    def train(self, weights: Stacked, steps: int) -> Update:
        """Take gradient steps and tell only the change."""
        return Update.between(weights, self.tuned(weights, steps))

    @torch.no_grad()
    def accuracy(self, weights: Stacked) -> float:
        """Return the share of samples named as their client names them; 0 to 1."""
        return float(
            (apply_each(self._network, weights, self._images).argmax(-1) == self._labels).double().mean()
        )


class Averaging:
    """A server that averages changes within groups: one group is FedAvg, one per client no exchange."""

    def __init__(self, weights: Stacked, groups: Int[Tensor, " U"]) -> None:
        """Start.

        Args:
            weights: of each group.
            groups: which one each client belongs to.
        """
        self.weights, self.groups = {name: one.detach().clone() for name, one in weights.items()}, groups

    def send(self) -> Stacked:
        """Return each client's weights: its group's."""
        return {name: one[self.groups] for name, one in self.weights.items()}

    def receive(self, update: Update) -> None:
        """Move each group's weights by the mean change of its clients."""
        sizes = torch.bincount(self.groups, minlength=len(next(iter(self.weights.values())))).clamp_min(1)
        for name, change in update.checked(self.send()).items():
            own = self.weights[name]
            share = sizes.view(-1, *[1] * (own.ndim - 1))
            own -= torch.zeros_like(own).index_add_(0, self.groups, change) / share


class HyperServer(nn.Module):
    """Equations (1) and (3): the server's hypernetwork and a vector per client."""

    def __init__(
        self, task: Conditioned, vectors: Float[Tensor, "U C"], rate: float, learn: bool = True
    ) -> None:
        """Join them.

        Args:
            task: target and generator.
            vectors: where the clients' vectors start.
            rate: of Adam.
            learn: also learn generator and target; false for new clients, equation (4).
        """
        super().__init__()
        self.task, self.vectors = task, nn.Parameter(vectors.clone())
        self.learned = [self.vectors]
        if learn:
            self.learned += [one for one in task.parameters() if one.requires_grad]
        self.optimiser = torch.optim.Adam(self.learned, lr=rate)
        self._sent: Stacked = {}

    def send(self) -> Stacked:
        """Generate each client's weights."""
        self._sent = self.task.parameters_of(self.task.weights(self.vectors))
        return {name: one.detach() for name, one in self._sent.items()}

    def receive(self, update: Update) -> None:
        """Make one step along equation (3)."""
        change = update.checked(self._sent)
        names = [*change]
        slopes = torch.autograd.grad([self._sent[n] for n in names], self.learned, [change[n] for n in names])
        for parameter, slope in zip(self.learned, slopes, strict=True):
            parameter.grad = slope
        self.optimiser.step()


def run_rounds(server: Server, clients: Clients, test: Clients, rounds: int, steps: int) -> list[float]:
    """Pass weights down and updates up; return the accuracy before the first and after every tenth round."""
    found = [test.accuracy(server.send())]
    for number in trange(1, rounds + 1, desc="rounds", leave=False):
        server.receive(clients.train(server.send(), steps))
        if number % 10 == 0 or number == rounds:
            found.append(test.accuracy(server.send()))
    return found

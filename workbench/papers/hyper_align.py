"""Hyper-Align and what it competes with: connecting N image encoders to M text encoders, all frozen.

Notation
    x_i       unit embedding of caption i by one text encoder, width X
    z_i^j     unit feature of its image by image encoder j, width Z_j
    f_j       connector, x -> W_j x + b_j, brought to unit norm; the image side is used as it is
    t         inverse temperature, 100 in the papers
    c_j       code of encoder j: the mean of z^j over the batch, or a learned vector
    H         hypernetwork, code -> (W_j, b_j)

Equations
    (1)  L_j = InfoNCE(t f_j(x), z^j), symmetric over the batch        objectives.paired_contrastive
    (2)  APE:          min over W_j, b_j of L_j, each pair alone
    (3)  Hyper-Align:  min over H of (1/B) sum_j L_j with (W_j, b_j) = H(c_j), B encoders a step, in turn
    (4)  direct:       min over all W_j, b_j of (1/N) sum_j L_j, one product W x for all j
    (5)  closed form:  W_j from means and covariances                  geometry.closed_form
    (6)  search:       (5) for all pairs, (4) for fewer and fewer      these three in
    (7)  hub:          W_ij = V_j^T U_i, N + M maps for N M pairs      papers.hyper_align_search
    (8)  relative:     cosines to shared items, nothing trained

Gradients of (4) for different W_j never meet, so with the batches of (2) it is (2), only faster: whatever
(3) saves against (2) has to be held against (4) at the batch size of (3).

Source: Hyper-Align, the workshop poster and its authors' code; its successor HYMA, Singh et al. (2025), arXiv
2507.10015; APE, Rosenfeld et al. (2022), arXiv 2210.03927. Deviations: batches are shuffled (there: in
order), evaluation uses the mean of all training features as c_j (there: of the last batch), one hypernetwork
emits every width and each encoder uses its own first columns.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from workbench.flops import count_flops
from workbench.geometry.closed_form import (
    Canonical,
    LinearMap,
    bilinear,
    canonical,
    factor,
    procrustes,
    ridge,
)
from workbench.hypernetworks.connectors import ConnectorBank, ConnectorGenerator, sum_by_parts
from workbench.objectives import paired_contrastive
from workbench.papers.hyper_align_settings import AlignModelSettings
from workbench.training import Training, fit
from workbench.zoo import Zoo

Pair = tuple[str, str]  # text encoder, image encoder
PART_BYTES = 256 * 2**20  # of activations that live at a time
_COUNTED: dict[tuple[Any, ...], int] = {}  # operations of a training of connectors by its shapes
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Connected:
    """Maps of both sides on the CPU (None leaves images as they are), which are then compared by cosine."""

    of_text: Map
    of_image: Map | None = None


@dataclass(frozen=True)
class Outcome:
    """What a way found.

    Attributes:
        pairs: the connectors.
        flops: of training, by torch's counter; features and optimiser steps not counted.
        parameters: trained numbers.
        history: of the first training, loss by epoch.
        about: more for the card.
    """

    pairs: dict[Pair, Connected]
    flops: int
    parameters: int
    history: list[dict[str, Any]]
    about: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One way under one seed, on one zoo.

    Attributes:
        zoo: the features.
        model: settings of the way.
        training: batch size, epochs and so on.
        seed: of order, captions and starts.
        folder: private; holds checkpoints.
        device: where connectors are trained.
    """

    zoo: Zoo
    model: AlignModelSettings
    training: Training
    seed: int
    folder: Path
    device: str = "cpu"

    @property
    def texts(self) -> tuple[str, ...]:
        """Text encoders that this way is tried on."""
        return tuple(name for name in self.zoo.texts if name in (self.model.texts or self.zoo.texts))

    @property
    def rows(self) -> Int[Tensor, " M"]:
        """Image rows that are trained on."""
        return self.zoo.splits["train"]

    def captions(self, items: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Draw one caption for each training item."""
        own = self.zoo.choices[self.rows[items]]
        return own[torch.arange(len(own)), torch.randint(own.shape[1], (len(own),))]

    def text_batch(self, name: str, captions: Int[Tensor, " B"]) -> Float[Tensor, "B X"]:
        """Return unit embeddings of captions."""
        return self.zoo.texts[name].unit(captions).to(self.device)

    def image_batch(self, name: str, items: Int[Tensor, " B"]) -> Float[Tensor, "B Z"]:
        """Return unit features of training items, their mean taken away first if that is set."""
        unit = self.zoo.images[name].unit(self.rows[items]).to(self.device)
        return functional.normalize(unit - self.mean(name), dim=1) if self.model.centre else unit

    def mean(self, name: str) -> Float[Tensor, " Z"]:
        """Return the mean unit feature of an image encoder over the training rows."""
        return self.zoo.images[name].moments(self.rows).mean.float().to(self.device)

    def connected(self, image: str, of_text: Map) -> Connected:
        """Pair a trained map of texts with what this task did to the images."""
        if not self.model.centre:
            return Connected(of_text)
        mean = self.mean(image).cpu()
        return Connected(of_text, lambda features: features - mean)


class BankLoss:
    """Equations (2) and (4): the mean of L_j over the connectors of a bank."""

    def __init__(self, bank: ConnectorBank, task: Task, text: str, images: Sequence[str]) -> None:
        """Name what is connected."""
        self.bank, self.task, self.text, self.images = bank, task, text, tuple(images)

    def __call__(self, items: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """Return the loss of a batch of training items."""
        texts = self.task.text_batch(self.text, self.task.captions(items))
        parts = [self._part(texts, items, places) for places in self._blocks(len(items))]
        return sum_by_parts(parts, self.bank)

    def _part(self, texts: Tensor, items: Tensor, places: range) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            mapped = self.bank(texts, places)
            found = [
                paired_contrastive(
                    one, self.task.image_batch(self.images[place], items), self.task.model.logit_scale
                )
                for place, one in zip(places, mapped, strict=True)
            ]
            return torch.stack(found).sum() / len(self.images)

        return loss

    def _blocks(self, batch: int) -> list[range]:
        """Cut the connectors into runs whose activations fit into memory together."""
        found, start, held = [], 0, 0
        for place, width in enumerate(self.bank.outputs):
            needed = (
                16 * batch * (width + (self.bank.hidden or 0))
            )  # four single-precision tables of that width
            if held and held + needed > PART_BYTES:
                found.append(range(start, place))
                start, held = place, 0
            held += needed
        return [*found, range(start, len(self.bank.outputs))]


def training_flops(
    module: nn.Module, loss: Callable[[Tensor], Tensor], count: int, training: Training, cycle: int = 1
) -> int:
    """Return the operations of a whole training from those of one step, forward and backward.

    Args:
        module: left as it was.
        loss: of a batch of items.
        count: items of an epoch.
        training: epochs and batch size.
        cycle: steps after which their shapes repeat; the mean over one cycle is taken.
    """
    whole, rest = divmod(count, training.batch_size)
    total = 0
    state = {name: tensor.clone() for name, tensor in module.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        for size, times in ((training.batch_size, whole), (rest, int(rest > 0))):
            for _ in range(cycle if times else 0):
                _, flops = count_flops(lambda size=size: loss(torch.arange(size)).backward())
                total += times * flops / cycle
    for name, tensor in module.named_buffers():
        tensor.copy_(state[name])
    module.zero_grad(set_to_none=True)
    return round(total * training.epochs)


def train_bank(
    task: Task,
    text: str,
    images: Sequence[str],
    training: Training,
    folder: Path,
    start: dict[str, LinearMap],
) -> tuple[ConnectorBank, int, list[dict[str, Any]]]:
    """Train the connectors of some image encoders together, from known maps where there are any.

    Returns:
        The bank, its training's operations, and the loss by epoch.
    """
    zoo, hidden = task.zoo, task.model.connector_hidden
    bank = ConnectorBank(zoo.texts[text].width, [zoo.images[name].width for name in images], hidden)
    for place, name in enumerate(images):
        if name in start:
            bank.fill(place, start[name].weight, start[name].bias)
    bank.to(task.device)
    loss = BankLoss(bank, task, text, images)
    count = len(task.rows)
    # Counting takes as long as an epoch of large batches, and other seeds and pairs have the same shapes.
    shapes = zoo.texts[text].width, bank.outputs, hidden, count, training.batch_size, training.epochs
    if shapes not in _COUNTED:
        _COUNTED[shapes] = training_flops(bank, loss, count, training)
    flops = _COUNTED[shapes]
    folder.mkdir(parents=True, exist_ok=True)
    history = fit(bank, loss, count, training, folder, seed=task.seed)
    return bank, flops, history


def map_of(bank: ConnectorBank, place: int) -> Map:
    """Return one connector of a trained bank as a function of texts on the CPU."""
    bank.requires_grad_(False).cpu()
    if not bank.hidden:
        return LinearMap(*(part.clone() for part in bank.linear(place)))
    return lambda texts: bank(texts, range(place, place + 1))[0]


def ape(task: Task, together: bool) -> Outcome:
    """Equation (2), each pair alone; or equation (4), all image encoders of a text encoder together."""
    pairs, parameters, histories = {}, 0, []
    names = tuple(task.zoo.images)
    starts, flops = closed_starts(task) if task.model.warm_start else ({}, 0)
    for text in task.texts:
        start = {image: one for (own, image), one in starts.items() if own == text}
        for group in (names,) if together else [(name,) for name in names]:
            folder = task.folder / f"{len(pairs)}"
            bank, spent, history = train_bank(task, text, group, task.training, folder, start)
            pairs |= {
                (text, name): task.connected(name, map_of(bank, place)) for place, name in enumerate(group)
            }
            flops, parameters = flops + spent, parameters + sum(one.numel() for one in bank.parameters())
            histories.append(history)
    return Outcome(pairs, flops, parameters, histories[0], {})


class HyperLoss:
    """Equation (3): the mean of L_j over the encoders whose turn it is."""

    def __init__(self, module: ConnectorGenerator, task: Task, text: str, images: Sequence[str]) -> None:
        """Group encoders of like width; the step is a buffer of the module, so that a resumed run goes on."""
        self.module, self.task, self.text, self.images = module, task, text, tuple(images)
        order = sorted(range(len(images)), key=lambda place: module.outputs[place])
        size = task.model.encoders_per_step or len(order)
        self.turns = [order[start : start + size] for start in range(0, len(order), size)]
        module.register_buffer("step", torch.zeros((), dtype=torch.long))

    def __call__(self, items: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """Return the loss of a batch of training items for this step's encoders."""
        places = self.turns[int(self.module.step) % len(self.turns)]
        self.module.step += 1
        texts = self.task.text_batch(self.text, self.task.captions(items))
        images = [self.task.image_batch(self.images[place], items) for place in places]
        weights = self.module(self.module.code(places, [one.mean(0) for one in images]), places)
        found = [
            paired_contrastive(
                functional.normalize(texts @ weight + bias, dim=1), image, self.task.model.logit_scale
            )
            for (weight, bias), image in zip(weights, images, strict=True)
        ]
        return torch.stack(found).mean()


def hyper_align(task: Task) -> Outcome:
    """Equation (3), one hypernetwork per text encoder."""
    pairs, flops, parameters, histories, model = {}, 0, 0, [], task.model
    names = tuple(task.zoo.images)
    outputs = [task.zoo.images[name].width for name in names]
    for text in task.texts:
        settings = {"code": model.code, "code_width": model.code_width, "hidden": model.hidden}
        module = ConnectorGenerator(task.zoo.texts[text].width, outputs, **settings).to(task.device)
        loss = HyperLoss(module, task, text, names)
        flops += training_flops(module, loss, len(task.rows), task.training, len(loss.turns))
        folder = task.folder / f"{len(pairs)}"
        folder.mkdir(parents=True, exist_ok=True)
        histories.append(fit(module, loss, len(task.rows), task.training, folder, seed=task.seed))
        parameters += sum(one.numel() for one in module.parameters())
        means = [task.mean(name) for name in names]
        if model.centre:  # what an encoder's batch mean is once it has been taken away
            means = [torch.zeros_like(mean) for mean in means]
        with torch.no_grad():
            weights = module(module.code(range(len(names)), means), range(len(names)))
        for name, (weight, bias) in zip(names, weights, strict=True):
            pairs[text, name] = task.connected(name, LinearMap(weight.cpu().clone(), bias.cpu().clone()))
        cost = module.generator.cost()
    return Outcome(pairs, flops, parameters, histories[0], {"cost": cost})


def cross_covariances(task: Task, text: str, images: Sequence[str]) -> dict[str, Float[Tensor, "X Z"]]:
    """Return the cross-covariance of a text encoder with some image encoders, in one pass over the rows.

    An image's captions are averaged first: each goes with the same image, so the sums are the same.
    """
    texts, captions = task.zoo.texts[text], task.zoo.choices[task.rows]
    known = {name: task.zoo.images[name] for name in images}
    totals = {name: torch.zeros(texts.width, one.width, dtype=torch.double) for name, one in known.items()}
    for own, rows in zip(captions.split(4096), task.rows.split(4096), strict=True):
        mean = texts.unit(own.flatten()).view(*own.shape, -1).mean(1)
        for name, one in known.items():
            totals[name] += (mean.T @ one.unit(rows)).double()
    middle = texts.moments(captions.flatten()).mean
    return {
        name: total / len(task.rows) - torch.outer(middle, known[name].moments(task.rows).mean)
        for name, total in totals.items()
    }


Solved = dict[Pair, LinearMap | Canonical]


def solve_all(task: Task, kind: str, pairs: Iterable[Pair] | None = None) -> tuple[Solved, int]:
    """Equation (5) for some pairs or all, and what it cost; moments and factors once per encoder."""
    zoo, model = task.zoo, task.model
    wanted: dict[str, list[str]] = {}
    for text, image in product(task.texts, zoo.images) if pairs is None else pairs:
        wanted.setdefault(text, []).append(image)
    texts = {name: zoo.texts[name].moments(zoo.choices[task.rows].flatten()) for name in wanted}
    images = {name: zoo.images[name].moments(task.rows) for own in wanted.values() for name in own}
    # What the moments cost, 2 R D^2 each: counted by formula, since the store may have them already.
    flops = sum(2 * one.count * len(one.mean) ** 2 for one in (*texts.values(), *images.values()))

    def solve() -> Solved:
        found: Solved = {}
        whitens = kind in ("cca", "connector")
        of_image = {name: factor(one, model.strengths[1]) for name, one in images.items() if whitens}
        for text, one in texts.items():
            of_text = factor(one, model.strengths[0]) if whitens else None
            for name, cross in cross_covariances(task, text, wanted[text]).items():
                known = one, images[name], cross
                if kind == "ridge":
                    found[text, name] = ridge(*known, model.strength)
                elif kind == "procrustes":
                    found[text, name] = procrustes(*known)
                elif kind == "connector":
                    found[text, name] = bilinear(*known, (of_text, of_image[name]))
                else:
                    found[text, name] = canonical(*known, (of_text, of_image[name]), model.kept)
        return found

    found, spent = count_flops(solve)
    return found, flops + spent


def closed_form(task: Task, kind: str) -> Outcome:
    """Equation (5) as a way of its own."""
    solved, flops = solve_all(task, kind)
    pairs = {
        pair: Connected(one) if isinstance(one, LinearMap) else Connected(one.of_text, one.of_image)
        for pair, one in solved.items()
    }
    parameters = sum(task.zoo.texts[text].width * task.zoo.images[image].width for text, image in pairs)
    return Outcome(pairs, flops, parameters, [], {})


def closed_starts(task: Task, pairs: Iterable[Pair] | None = None) -> tuple[dict[Pair, LinearMap], int]:
    """Return the closed-form connectors of some pairs or all, scaled for training, and what they cost."""
    solved, flops = solve_all(task, "connector", pairs)
    starts = {}
    for (text, image), one in solved.items():
        some = task.zoo.texts[text].unit(task.zoo.choices[task.rows[:1024], 0])
        size = one(some).norm(dim=1).mean()  # outputs of about unit norm: steps of a known size
        starts[text, image] = LinearMap(one.weight / size, one.bias / size)
    return starts, flops

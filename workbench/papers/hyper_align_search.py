"""Cheaper ways to connect a zoo that the poster does not compare with: search, a hub, and no map at all.

Shape letters: as in :mod:`workbench.papers.hyper_align`, whose equations (6) to (8) these are; B rows,
D feature width, S width of a sketch.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from workbench.evaluation.retrieval import recall_values, retrieval_ranks
from workbench.features import Features
from workbench.flops import count_flops
from workbench.geometry.closed_form import LinearMap
from workbench.geometry.relative import relative
from workbench.objectives import paired_contrastive
from workbench.papers.hyper_align import (
    Connected,
    Outcome,
    Pair,
    Task,
    closed_starts,
    map_of,
    train_bank,
    training_flops,
)
from workbench.training import fit

ANCHORS = 512  # training images that relative representations are cosines to


def both_sides(
    connected: Connected, texts: Float[Tensor, "N X"], images: Float[Tensor, "M Z"]
) -> tuple[Float[Tensor, "N E"], Float[Tensor, "M E"]]:
    """Map both sides of a pair and bring them to unit norm."""
    images = images if connected.of_image is None else connected.of_image(images)
    return functional.normalize(connected.of_text(texts), dim=-1), functional.normalize(images, dim=-1)


def linear_maps(pairs: dict[Pair, Connected]) -> dict[Pair, LinearMap]:
    """Return the connectors that are plain maps of texts and leave images as they are."""
    plain = {pair: one.of_text for pair, one in pairs.items() if one.of_image is None}
    return {pair: one for pair, one in plain.items() if isinstance(one, LinearMap)}


def selection_score(task: Task, pair: Pair, connected: Connected) -> float:
    """Return R@10, mean of both directions, on the split valid with one caption per image; 0 to 1."""
    zoo, (text, image) = task.zoo, pair
    rows = zoo.splits["valid"]
    sides = zoo.texts[text].unit(zoo.choices[rows, 0]), zoo.images[image].unit(rows)
    mapped, features = both_sides(connected, *sides)
    ranks = retrieval_ranks(mapped[:, None], features)
    return float(recall_values(*(one.numpy() for one in ranks))["recall_at_10"].mean())


def _scores_of(task: Task, pairs: dict[Pair, Connected]) -> dict[Pair, float]:
    return {pair: selection_score(task, pair, connected) for pair, connected in pairs.items()}


@dataclass(frozen=True)
class Sketch:
    """A random projection with orthonormal columns: each number of a feature is added to one of S sums.

    That is one addition a number, where a dense projection takes 2 S operations.

    Attributes:
        place: which sum a number goes to; the sums have equally many numbers, or one more.
        share: what it is multiplied by, of random sign; the squares of one sum's shares add up to 1.

    Source: count sketch, Charikar, Chen and Farach-Colton (2002); here balanced.
    """

    place: Int[Tensor, " D"]
    share: Float[Tensor, " D"]

    @classmethod
    def draw(cls, wide: int, width: int, seed: int) -> "Sketch":
        """Draw a sketch from ``wide`` numbers to ``width``, at most as many."""
        rng = torch.Generator().manual_seed(seed)
        place = torch.randperm(wide, generator=rng) % width
        sign = 2.0 * torch.randint(2, (wide,), generator=rng) - 1
        return cls(place, sign * torch.bincount(place)[place] ** -0.5)

    def narrow(self, rows: Float[Tensor, "B D"]) -> Float[Tensor, "B S"]:
        """Project rows."""
        sums = torch.zeros(len(rows), int(self.place.max()) + 1)
        return sums.index_add_(1, self.place, rows * self.share)

    def lift(self, known: LinearMap) -> LinearMap:
        """Lead a map into the sketched space on to the space that was sketched.

        The product of a lifted output with a feature is that of the output with the feature's sketch, and
        norms of outputs stay, so the connector leaves images as they are.
        """
        return LinearMap(known.weight[:, self.place] * self.share, known.bias[self.place] * self.share)


def screen(task: Task) -> tuple[dict[Pair, LinearMap], int]:
    """Return a connector of every pair in closed form, and what all cost; wide features may be sketched."""
    most, zoo = task.model.screen_width, task.zoo
    wide = {name: one for name, one in zoo.images.items() if most and one.width > most}
    sketches = {name: Sketch.draw(one.width, most, task.seed) for name, one in wide.items()}
    narrow = {}
    for name, one in wide.items():
        parts = [sketches[name].narrow(one.unit(rows)) for rows in torch.arange(len(one)).split(4096)]
        narrow[name] = Features(name, torch.cat(parts).numpy(), one.order, None, one.parameters)
    starts, flops = closed_starts(replace(task, zoo=replace(zoo, images=zoo.images | narrow)))
    lifted = {pair: sketches[pair[1]].lift(starts[pair]) for pair in starts if pair[1] in sketches}
    return starts | lifted, flops


def search(task: Task) -> Outcome:
    """Equation (6): screen all pairs in closed form, train the best from there, keep the best of these.

    After the screen and after every round the share ``keep_share`` of the pairs goes on, the last round's
    training being the longest. A pair that was left behind keeps the connector it had, which is a poorer one
    where features were sketched for the screen.

    Source: successive halving, Jamieson and Talwalkar (2016), arXiv 1502.07943; closed-form start ours.
    """
    starts, flops = screen(task)
    history, trained, log = [], 0, []
    pairs = {pair: task.connected(pair[1], one) for pair, one in starts.items()}
    scores, left = {}, [pair for pair in task.zoo.pairs() if pair in pairs]  # no control is chosen
    for number, epochs in enumerate((0, *task.model.rounds)):
        if number == 1 and task.model.screen_width:  # few are left: these can afford their full width
            exact, spent = closed_starts(task, left)
            starts, flops = starts | exact, flops + spent
        for text in {text: None for text, _ in left} if epochs else ():
            names = [name for one, name in left if one == text]
            training = task.training.model_copy(update={"epochs": epochs})
            warm = {name: starts[text, name] for name in names}
            folder = task.folder / f"round{number}-{list(task.zoo.texts).index(text)}"
            bank, spent, history = train_bank(task, text, names, training, folder, warm)
            flops, trained = flops + spent, trained + sum(one.numel() for one in bank.parameters())
            for place, name in enumerate(names):
                starts[text, name] = map_of(bank, place)
                pairs[text, name] = task.connected(name, starts[text, name])
        found, spent = count_flops(partial(_scores_of, task, {pair: pairs[pair] for pair in left}))
        flops, scores = flops + spent, scores | found
        log.append({"epochs": epochs, "pairs": len(left), "best": max(found.values())})
        left = sorted(left, key=lambda pair: -scores[pair])
        left = left[: max(1, math.ceil(task.model.keep_share * len(left)))]
    about = {"chosen": list(left[0]), "rounds": log}
    return Outcome(pairs, flops, trained, history, about)


class Hub(nn.Module):
    """Equation (7): one linear map per encoder into a shared space."""

    def __init__(self, texts: dict[str, int], images: dict[str, int], width: int) -> None:
        """Build the maps from encoder widths; names are kept in order."""
        super().__init__()
        self.names = tuple(texts), tuple(images)
        self.of_text = nn.ModuleList([nn.Linear(size, width) for size in texts.values()])
        self.of_image = nn.ModuleList([nn.Linear(size, width) for size in images.values()])
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def map_of(self, name: str, side: int) -> nn.Linear:
        """Return an encoder's map; side 0 is text, 1 image."""
        return (self.of_text, self.of_image)[side][self.names[side].index(name)]


def hub(task: Task) -> Outcome:
    """Equation (7): each step trains every image encoder against one text encoder, in turn."""
    zoo = task.zoo
    widths = [{name: part[name].width for name in names}
              for part, names in ((zoo.texts, task.texts), (zoo.images, zoo.images))]  # fmt: skip
    module = Hub(*widths, task.model.hub_width).to(task.device)

    def loss(items: Tensor) -> Tensor:
        captions, step = task.captions(items), int(module.step)
        module.step += 1
        texts = [
            functional.normalize(module.map_of(name, 0)(task.text_batch(name, captions)), dim=1)
            for name in task.texts
        ]
        found = []
        for place, name in enumerate(zoo.images):
            image = functional.normalize(module.map_of(name, 1)(task.image_batch(name, items)), dim=1)
            text = texts[(place + step) % len(texts)]
            found.append(paired_contrastive(text, image, task.model.logit_scale))
        return torch.stack(found).mean()

    flops = training_flops(module, loss, len(task.rows), task.training, len(task.texts))
    history = fit(module, loss, len(task.rows), task.training, task.folder, seed=task.seed)
    module.requires_grad_(False).cpu()
    pairs = {
        (text, name): Connected(module.map_of(text, 0), module.map_of(name, 1))
        for text in task.texts
        for name in zoo.images
    }
    return Outcome(pairs, flops, sum(one.numel() for one in module.parameters()), history, {})


def relative_cosines(task: Task) -> Outcome:
    """Equation (8): each side as its cosines to the same training images, evenly spaced; nothing is fitted.

    A text anchor is the mean of its image's captions.

    Source: Moschella et al. (2023), arXiv 2209.15430; between texts and images as in Norelli et al. (2022),
    ASIF, arXiv 2210.01738. Deviation: ASIF keeps the largest cosines of a row only, raised to a power.
    """
    zoo, places = task.zoo, torch.arange(min(ANCHORS, len(task.rows)))
    rows = task.rows[places * len(task.rows) // len(places)]
    captions = zoo.choices[rows]
    texts = {
        name: zoo.texts[name].unit(captions.flatten()).view(*captions.shape, -1).mean(1)
        for name in task.texts
    }
    images = {name: known.unit(rows) for name, known in zoo.images.items()}
    pairs = {
        (text, image): Connected(
            partial(relative, anchors=texts[text]), partial(relative, anchors=images[image])
        )
        for text in texts
        for image in images
    }
    return Outcome(pairs, 0, 0, [], {})

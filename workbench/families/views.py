"""Two views of the same things: the halves of a digit, or a photograph and its captions.

What belongs together is known, so that maps of the views can be trained to find it and asked for it.

Shape letters: N things trained on, M asked about, K first views of a thing (captions), D and E widths.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from workbench.datasets.caption_pairs import PairData, load_pairs
from workbench.datasets.digits import load_digits
from workbench.papers.comparison import Loaded
from workbench.zoo import read_pair

Sides = tuple[Float[Tensor, "N K D"], Float[Tensor, "N E"]]
DIGITS = 1024  # to train on: whole batches of 32 and of 256; the others left of the training set are valid


@dataclass(frozen=True)
class Views:
    """First views and second ones, row by row, of the things that are trained on and of those asked about."""

    train: Sides
    asked: tuple[Float[Tensor, "M K D"], Float[Tensor, "M E"]]

    def drawn(self, items: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B E"]]:
        """Return training things, each by one of its first views."""
        first, second = self.train
        return first[items, torch.randint(first.shape[1], items.shape)], second[items]

    def pairs(self) -> tuple[Float[Tensor, "NK D"], Float[Tensor, "NK E"]]:
        """Return every first view of the training things beside its second one."""
        first, second = self.train
        return first.flatten(0, 1), second.repeat_interleave(first.shape[1], 0)


def digit_halves(split: str) -> Loaded:
    """Cut the digits that come with scikit-learn into even and odd columns; 32 numbers each, K = 1.

    Left and right halves share too little to tell losses apart.

    Args:
        split: valid or test, the one that is asked about.
    """
    digits = load_digits()
    known = digits.inputs["train"]
    parts = known[:DIGITS], {"valid": known[DIGITS:], "test": digits.inputs["test"]}[split]
    views = Views(*((part[:, None, ::2], part[:, 1::2]) for part in parts))
    counts = {"train": {"digits": DIGITS}, split: {"digits": len(parts[1])}}
    return Loaded(views, digits.sha256, counts)


def captioned_photographs(name: str, text: str, image: str, split: str) -> Loaded:
    """Read the captions and pictures of a prepared set by two frozen encoders.

    Vectors are unit vectors about the mean of the training set: frozen encoders put all they read near one
    direction, and hundreds of steps pass until a map has moved it away.

    Args:
        name: of a manifest with captioned pictures.
        text: text encoder.
        image: image encoder.
        split: valid or test, the one that is asked about.

    Raises:
        DataError: no such encoder, or features that cannot be used.
        ManifestError: the set or an encoder is not on this machine.
    """
    data = PairData(source="manifest", name=name)
    pairs = load_pairs(data)
    words, pictures = read_pair(pairs, text, image, largest=data.size)
    rows, choices = pairs.splits, pairs.choices
    texts = {one: words.unit(choices[rows[one]].flatten()) for one in ("train", split)}
    seen = {one: pictures.unit(rows[one]) for one in ("train", split)}
    centres = texts["train"].mean(0), seen["train"].mean(0)
    views = Views(*(
        (functional.normalize(texts[one] - centres[0], dim=-1).unflatten(0, (-1, choices.shape[1])),
         functional.normalize(seen[one] - centres[1], dim=-1))
        for one in ("train", split)
    ))  # fmt: skip
    counts = {
        one: {"pictures": len(rows[one]), "captions": rows[one].numel() * choices.shape[1]} for one in texts
    }
    return Loaded(views, pairs.order, counts)

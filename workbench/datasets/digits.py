"""Handwritten digits, 8 x 8, that come with scikit-learn, and families of tasks made from them.

A task shows the digits another way: its pixels in another order, its labels renamed, or light and dark
exchanged. Each alone is as easy as the digits are; a network that is not told the task cannot do two.

Shape letters: T tasks, N digits of a split.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.files import digest

PIXELS, CLASSES, TEST = 64, 10, 500
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Digits:
    """Digits of both splits; the split is the same for every seed.

    Attributes:
        inputs: split -> pixels from -1 (paper) to 1 (ink), row by row.
        labels: split -> the digit.
    """

    inputs: dict[str, Float[Tensor, "N 64"]]
    labels: dict[str, Int[Tensor, " N"]]

    @property
    def sha256(self) -> str:
        """Hash of all pixels and labels, as kept in memory."""
        parts = [*self.inputs.values(), *self.labels.values()]
        return digest(*(part.numpy().tobytes() for part in parts))

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Digits of each split."""
        return {split: {"digits": len(labels)} for split, labels in self.labels.items()}


@dataclass(frozen=True)
class Tasks:
    """Tasks made of the same digits.

    Attributes:
        inputs: split -> pixels as each task shows them.
        labels: split -> labels as each task names them.
    """

    inputs: dict[str, Float[Tensor, "T N 64"]]
    labels: dict[str, Int[Tensor, "T N"]]

    def __len__(self) -> int:
        """Number of tasks T."""
        return len(self.labels["train"])


def every_digit(draw: torch.Generator) -> tuple[Float[Tensor, "N 64"], Int[Tensor, " N"]]:
    """Read all 1,797 digits in an order that is drawn: pixels from 0 (paper) to 16 (ink), and the digit.

    Source: E. Alpaydin and C. Kaynak (1998), Optical recognition of handwritten digits, UCI.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    order = torch.randperm(len(bunch.target), generator=draw)
    return torch.from_numpy(bunch.data)[order].float(), torch.from_numpy(bunch.target)[order].long()


def load_digits() -> Digits:
    """Read the digits: 1,297 to learn from, 500 to test on."""
    pixels, labels = every_digit(torch.Generator().manual_seed(0))
    inputs = pixels / 8 - 1
    return Digits({"train": inputs[TEST:], "test": inputs[:TEST]},
                  {"train": labels[TEST:], "test": labels[:TEST]})  # fmt: skip


def tasks_of(
    digits: Digits,
    pixels: Int[Tensor, "T 64"] | None = None,
    names: Int[Tensor, "T 10"] | None = None,
    signs: Float[Tensor, " T"] | None = None,
) -> Tasks:
    """Show digits another way in every task; what is None stays as it is, one of the three is needed.

    Args:
        digits: both splits.
        pixels: which pixel of the digit stands at each place.
        names: what each digit is called.
        signs: 1, or -1 to exchange light and dark.
    """
    count = len(next(given for given in (pixels, names, signs) if given is not None))
    pixels = torch.arange(PIXELS).expand(count, -1) if pixels is None else pixels
    names = torch.arange(CLASSES).expand(count, -1) if names is None else names
    signs = torch.ones(count) if signs is None else signs
    return Tasks(
        {split: digits.inputs[split][:, pixels].movedim(1, 0) * signs[:, None, None] for split in SPLITS},
        {split: names[:, digits.labels[split]] for split in SPLITS},
    )


def permuted(digits: Digits, count: int, seed: int) -> Tasks:
    """Draw an order of the pixels for each task."""
    draw = torch.Generator().manual_seed(seed)
    return tasks_of(digits, pixels=torch.rand(count, PIXELS, generator=draw).argsort(1))


def relabelled(digits: Digits, count: int, seed: int) -> Tasks:
    """Draw names of the digits for each task."""
    draw = torch.Generator().manual_seed(seed)
    return tasks_of(digits, names=torch.rand(count, CLASSES, generator=draw).argsort(1))


def rotated_and_flipped(digits: Digits, count: int) -> Tasks:
    """Call digit d in task t (d + t) mod 10, and exchange light and dark in every other task."""
    steps = torch.arange(count)
    names = (torch.arange(CLASSES) + steps[:, None]) % CLASSES
    return tasks_of(digits, names=names, signs=1.0 - 2.0 * (steps % 2))

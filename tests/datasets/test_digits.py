"""Digits and the tasks made of them: what a task changes, and that it changes nothing else."""

import pytest
import torch

from workbench.datasets.digits import (
    Digits,
    every_digit,
    load_digits,
    permuted,
    relabelled,
    rotated_and_flipped,
    tasks_of,
)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


def test_every_digit_of_the_set_is_in_one_split(digits):
    from sklearn import datasets

    # 1,797 in all, 500 of them for testing.
    assert digits.counts == {"train": {"digits": 1297}, "test": {"digits": 500}}
    ours = torch.cat([digits.inputs["train"], digits.inputs["test"]])
    theirs = torch.from_numpy(datasets.load_digits().data).float() / 8 - 1
    assert torch.equal(ours.unique(dim=0), theirs.unique(dim=0))
    assert (ours.min(), ours.max()) == (-1, 1)


def test_every_digit_comes_once_in_the_order_drawn_and_in_grey_levels():
    from sklearn import datasets

    draw = torch.Generator().manual_seed(3)
    pixels, labels = every_digit(draw)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(3))
    theirs = datasets.load_digits()
    assert torch.equal(pixels, torch.from_numpy(theirs.data).float()[order])
    assert torch.equal(labels, torch.from_numpy(theirs.target)[order])
    assert (pixels.min(), pixels.max()) == (0, 16)


def test_the_split_and_its_hash_are_the_same_every_time(digits):
    assert load_digits().sha256 == digits.sha256
    assert torch.equal(load_digits().labels["test"], digits.labels["test"])


def test_a_task_says_where_pixels_come_from_and_what_digits_are_called(digits):
    pixels = torch.arange(64).flip(0)[None]
    names = (torch.arange(10)[None] + 3) % 10
    tasks = tasks_of(digits, pixels=pixels, names=names, signs=torch.tensor([-1.0]))
    assert len(tasks) == 1
    # The last pixel comes first, and light is dark.
    assert torch.equal(tasks.inputs["test"][0], -digits.inputs["test"].flip(1))
    # An 8 is called 8 + 3 - 10 = 1.
    assert (tasks.labels["train"][0][digits.labels["train"] == 8] == 1).all()


def test_an_order_of_pixels_moves_them_and_leaves_labels(digits):
    tasks = permuted(digits, 3, seed=5)
    assert tasks.inputs["train"].shape == (3, 1297, 64)
    for task in range(3):
        assert torch.equal(tasks.labels["test"][task], digits.labels["test"])
        assert torch.equal(tasks.inputs["test"][task].sort(1).values, digits.inputs["test"].sort(1).values)
    assert not torch.equal(tasks.inputs["test"][0], tasks.inputs["test"][1])
    assert torch.equal(permuted(digits, 3, seed=5).inputs["test"], tasks.inputs["test"])
    assert not torch.equal(permuted(digits, 3, seed=6).inputs["test"], tasks.inputs["test"])


def test_renaming_gives_every_digit_one_name_and_leaves_pixels(digits):
    tasks = relabelled(digits, 4, seed=1)
    for task in range(4):
        assert torch.equal(tasks.inputs["train"][task], digits.inputs["train"])
        pairs = torch.stack([digits.labels["train"], tasks.labels["train"][task]], 1).unique(dim=0)
        assert len(pairs) == 10
        assert sorted(pairs[:, 1].tolist()) == list(range(10))


def test_renamed_digits_rotate_and_every_other_task_exchanges_light_and_dark(digits):
    tasks = rotated_and_flipped(digits, 3)
    assert torch.equal(tasks.labels["test"][0], digits.labels["test"])
    assert torch.equal(tasks.labels["test"][2], (digits.labels["test"] + 2) % 10)
    assert torch.equal(tasks.inputs["test"][1], -digits.inputs["test"])
    assert torch.equal(tasks.inputs["test"][2], digits.inputs["test"])

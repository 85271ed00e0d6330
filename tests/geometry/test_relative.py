"""Relative representations: by hand, as an invariance, and stitching encoders trained apart."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn
from torch.nn import functional

from workbench.errors import DataError
from workbench.geometry.relative import Space, mapped, relative, stitching

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=30, deadline=None, database=None)


def drawn(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_relative_representations_by_hand():
    # Anchors (0, 0), (2, 0), (1, 3) have mean (1, 1); from there they point to (-1, -1), (1, -1), (0, 2).
    anchors = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]])
    found = relative(torch.tensor([[4.0, 1.0]]), anchors)  # from the mean: (3, 0)
    torch.testing.assert_close(found, torch.tensor([[-(0.5**0.5), 0.5**0.5, 0.0]]))


def test_relative_representations_are_scikit_learns_cosines_about_the_mean():
    rows, anchors = drawn(7, 4), drawn(5, 4, 1) + 3
    centre = anchors.mean(0)
    expected = cosine_similarity((rows - centre).numpy(), (anchors - centre).numpy())
    np.testing.assert_allclose(relative(rows, anchors), expected, atol=1e-12)


@quick
@given(st.integers(2, 6), st.integers(0, 10_000), st.floats(0.1, 10))
def test_turning_shifting_and_stretching_a_space_change_nothing(width, seed, scale):
    rows, anchors, shift = drawn(5, width, seed), drawn(6, width, seed + 1), drawn(1, width, seed + 2)
    turn = torch.linalg.qr(drawn(width, width, seed + 3)).Q
    expected = relative(rows, anchors)
    found = relative(*(scale * part @ turn + shift for part in (rows, anchors)))
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("anchors", [torch.ones(1, 3), torch.ones(4, 3)])
def test_anchors_without_a_direction_are_refused(anchors):
    with pytest.raises(DataError, match="at least 2 that differ"):
        relative(torch.randn(2, 3), anchors)


def test_a_space_and_its_mirror_image_share_heads_only_by_relative_representations():
    rows = drawn(300, 4)
    labels = (rows[:, 0] > 0).long().numpy()
    one = Space(rows[:200].float(), rows[200:].float())
    spaces = {
        "one": one,
        "mirrored": Space(-one.train, -one.test),
        "wider": Space(*(functional.pad(part, (0, 1)) for part in (one.train, one.test))),
    }
    found = stitching(spaces, (labels[:200], labels[200:]), torch.arange(50))
    assert found.height == 3 * 3 * 3
    value = {(row["kind"], row["head"], row["encoder"]): row["accuracy"] for row in found.to_dicts()}
    assert value["absolute", "one", "one"] > 0.9
    assert value["absolute", "one", "mirrored"] < 0.1
    assert value["absolute", "one", "wider"] is None
    assert value["relative", "one", "mirrored"] == value["relative", "one", "one"] > 0.9
    assert value["relative", "wider", "mirrored"] > 0.9
    assert value["mapped", "one", "mirrored"] > 0.9
    assert value["mapped", "wider", "mirrored"] > 0.9


def test_a_map_between_spaces_by_hand():
    # Anchors -1 and 1: mean 0, variance 1. Targets (0, 3) and (2, 3): mean (1, 3), covariance with the
    # anchors (((-1)(-1) + 1 * 1) / 2, 0) = (1, 0). Slope 1 / (1 + 0.1), so 2.2 goes to 1 + 2 and 3.
    anchors, targets = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.0, 3.0], [2.0, 3.0]])
    torch.testing.assert_close(mapped(torch.tensor([[2.2]]), anchors, targets), torch.tensor([[3.0, 3.0]]))


@quick
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10_000), st.floats(0.1, 10))
def test_turning_shifting_and_stretching_the_space_that_is_mapped_change_nothing(width, other, seed, scale):
    rows, anchors = drawn(5, width, seed).float(), drawn(12, width, seed + 1).float()
    targets, shift = drawn(12, other, seed + 2).float(), drawn(1, width, seed + 3).float()
    turn = torch.linalg.qr(drawn(width, width, seed + 4)).Q.float()
    expected = mapped(rows, anchors, targets)
    found = mapped(*(scale * part @ turn + shift for part in (rows, anchors)), targets)
    # Single precision; a shift of many times the spread takes digits.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    # The other space's own turns and shifts come through, and the mean goes to the mean.
    away, bent = drawn(1, other, seed + 5).float(), torch.linalg.qr(drawn(other, other, seed + 6)).Q.float()
    moved = mapped(rows, anchors, targets @ bent + away)
    torch.testing.assert_close(moved, expected @ bent + away, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        mapped(anchors, anchors, targets).mean(0), targets.mean(0), rtol=1e-3, atol=1e-3
    )


def test_a_map_between_spaces_is_scikit_learns_ridge_regression():
    rows, anchors, targets = drawn(4, 3).float(), drawn(30, 3, 1).float(), drawn(30, 5, 2).float()
    # The penalty is 0.1 mean variances a row; scikit-learn's is of sums over rows.
    penalty = 0.1 * float(anchors.double().var(0, correction=0).mean()) * len(anchors)
    expected = Ridge(alpha=penalty).fit(anchors.numpy(), targets.numpy()).predict(rows.numpy())
    found = mapped(rows, anchors, targets)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def digit_spaces(seeds: range) -> tuple[dict[str, Space], tuple[np.ndarray, np.ndarray]]:
    """Encoders of digits that differ in nothing but their seed, each trained with a head of its own."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    rows, labels = torch.tensor(pixels[order] / 16, dtype=torch.float32), labels[order]
    target, spaces = torch.from_numpy(labels), {}
    for seed in seeds:
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        head = nn.Linear(32, 10)
        optimiser = torch.optim.Adam([*encoder.parameters(), *head.parameters()], 3e-3)
        for _ in range(12):
            for part in torch.randperm(1200).split(64):
                loss = functional.cross_entropy(head(encoder(rows[part]).relu()), target[part])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        with torch.no_grad():
            spaces[f"seed {seed}"] = Space(encoder(rows[:1200]), encoder(rows[1200:]))
    return spaces, (labels[:1200], labels[1200:])


def test_encoders_of_digits_trained_apart_are_stitched_by_128_anchors_and_not_without():
    spaces, labels = digit_spaces(range(3))
    found = stitching(spaces, labels, torch.arange(128))
    foreign = pl.col("head") != pl.col("encoder")
    mean = dict(found.filter(foreign).group_by("kind").agg(pl.col("accuracy").mean()).iter_rows())
    own = dict(found.filter(~foreign).group_by("kind").agg(pl.col("accuracy").mean()).iter_rows())
    assert mean["absolute"] <= 0.20  # chance is 0.10
    assert mean["relative"] >= 0.90
    assert own["relative"] >= 0.93
    assert mean["mapped"] >= 0.90
    # The anchors do it: as many numbers from anchors that the other space knows in another order do not.
    name, other = list(spaces)[:2]
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(128))
    view = {
        name: Space(*(relative(part, spaces[name].train[:128]) for part in vars(spaces[name]).values())),
        other: Space(
            *(relative(part, spaces[other].train[shuffled]) for part in vars(spaces[other]).values())
        ),
    }
    broken = stitching(view, labels, torch.arange(128)).filter(foreign, kind="absolute")
    assert broken["accuracy"].max() <= 0.35


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_and_anchors_that_are_no_numbers_are_named(bad):
    rows, good = drawn(6, 4), drawn(6, 4, seed=1)
    rows[2, 3] = bad
    with pytest.raises(DataError, match="embedding, row 2: the vector holds NaN or infinity"):
        relative(rows, good)
    with pytest.raises(DataError, match="anchor, row 2"):
        relative(good, rows)
    for one in ((rows, good, good), (good, rows, good), (good, good, rows)):
        with pytest.raises(DataError, match="embedding, row 2"):
            mapped(*one)
    spaces = {"one": Space(good, good), "other": Space(good, rows)}
    with pytest.raises(DataError, match="embedding, row 2"):
        stitching(spaces, (np.arange(6) % 2, np.arange(6) % 2), torch.arange(4))

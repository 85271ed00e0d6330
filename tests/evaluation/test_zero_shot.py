"""Ranks of true classes against loops, accuracies against scikit-learn, and what may never look right."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import balanced_accuracy_score, recall_score, top_k_accuracy_score
from torch.nn import functional

from workbench.evaluation.zero_shot import accuracy_values, class_ranks, per_class_weights

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=80, deadline=None, database=None)


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane."""
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


# --- ranks --------------------------------------------------------------------------------------------------


def test_ranks_of_a_hand_case():
    # Classes at 0, 30, 90 and 180 degrees. From 10 they are 10, 20, 80 and 170 away, from 80 it is
    # 80, 50, 10 and 100.
    classes, images = at(0, 30, 90, 180), at(10, 80)
    for label, expected in (((0, 0), (1, 3)), ((1, 1), (2, 2)), ((2, 2), (3, 1)), ((3, 3), (4, 4))):
        rank, predicted = class_ranks(images, classes, torch.tensor(label))
        assert tuple(rank.tolist()) == expected
        assert predicted.tolist() == [0, 2]


def test_a_tie_counts_against_the_model():
    # Classes 1 and 2 have one direction, as have classes of the same name: neither is ever first.
    rank, _ = class_ranks(at(30, 30, 0), at(0, 30, 30), torch.tensor([1, 2, 0]))
    assert rank.tolist() == [2, 2, 1]


@pytest.mark.parametrize("classes", [2, 3, 5, 7, 10, 37, 100])
@pytest.mark.parametrize("images", [1, 8, 64, 200])
def test_a_model_that_tells_no_class_from_another_is_never_right(images, classes):
    # A matrix product may sum equal columns in different orders and find one of them higher by a rounding.
    torch.manual_seed(0)
    for width in (16, 256, 384):
        directions = functional.normalize(torch.randn(1, width), dim=-1).repeat(classes, 1)
        pictures = functional.normalize(torch.randn(images, width), dim=-1)
        rank, _ = class_ranks(pictures, directions, torch.randint(classes, (images,)))
        assert (rank == classes).all()


def test_small_differences_are_no_ties():
    # Of a tenth of a degree, at 45 degrees: 0.001 in the cosine.
    rank, _ = class_ranks(at(0), at(45, 45.1), torch.tensor([0]))
    assert rank.tolist() == [1]


def test_a_score_that_is_no_number_counts_against_the_model():
    classes = at(0, 30, 90)
    lost = torch.full((1, 2), float("nan"))
    # The image, the true class, another class.
    assert class_ranks(lost, classes, torch.tensor([0]))[0].tolist() == [3]
    assert class_ranks(at(0), torch.cat([lost, classes[1:]]), torch.tensor([0]))[0].tolist() == [3]
    assert class_ranks(at(0), torch.cat([classes[:2], lost]), torch.tensor([0]))[0].tolist() == [2]


@quick
@given(st.data())
def test_ranks_are_the_places_from_behind_in_a_full_sort(data):
    images, classes = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    # Few scores, so that many tie; pictures are unit vectors along an axis, so that scores are exact.
    values = st.integers(-2, 2)
    scores = data.draw(
        st.lists(st.lists(values, min_size=classes, max_size=classes), min_size=images, max_size=images)
    )
    label = data.draw(st.lists(st.integers(0, classes - 1), min_size=images, max_size=images))
    rank, predicted = class_ranks(torch.eye(images), torch.tensor(scores).float().T, torch.tensor(label))
    for row, true in enumerate(label):
        places = sorted(scores[row], reverse=True)
        assert rank[row] == classes - places[::-1].index(scores[row][true])
        assert scores[row][predicted[row]] == places[0]


@pytest.mark.parametrize("k", [1, 5])
def test_accuracy_is_scikit_learns(k):
    torch.manual_seed(k)
    images = functional.normalize(torch.randn(300, 8), dim=-1)
    weights, label = functional.normalize(torch.randn(12, 8), dim=-1), torch.randint(12, (300,))
    rank, predicted = class_ranks(images, weights, label)
    found = accuracy_values(rank.numpy(), np.full(300, 12))[f"top{k}"].mean()
    expected = top_k_accuracy_score(label.numpy(), (images @ weights.T).numpy(), k=k, labels=range(12))
    assert found == pytest.approx(expected)
    assert 0.02 < found < 0.98
    if k == 1:
        assert found == pytest.approx((predicted == label).float().mean().item())


# --- accuracies ---------------------------------------------------------------------------------------------


def test_accuracies_of_a_hand_case():
    # Two models, four images that are asked among 10, 10, 4 and 10 classes.
    rank = np.array([[1, 5, 4, 6], [2, 1, 1, 10]])
    found = accuracy_values(rank, np.array([10, 10, 4, 10]))
    assert found["top1"].tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    assert found["top5"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]


def test_a_guess_is_right_with_the_chance_of_its_class_set():
    # k / C, and never more than 1: among 4 classes the five best are all of them.
    found = accuracy_values(np.zeros((1, 3), dtype=int), np.array([10, 4, 20]))
    assert found["top1"].tolist() == [[pytest.approx(0.1), pytest.approx(0.25), pytest.approx(0.05)]]
    assert found["top5"].tolist() == [[pytest.approx(0.5), 1, pytest.approx(0.25)]]


@quick
@given(classes=st.integers(1, 30))
def test_a_guess_is_as_often_right_as_a_random_rank(classes):
    ranks = np.arange(1, classes + 1)
    asked = np.full(classes, classes)
    drawn, guess = accuracy_values(ranks, asked), accuracy_values(np.zeros_like(ranks), asked)
    for name in ("top1", "top5"):
        assert guess[name].mean() == pytest.approx(drawn[name].mean())


@quick
@given(arrays.arrays(int, (3, 7), elements=st.integers(0, 12)), st.integers(1, 12))
def test_accuracies_lie_between_0_and_1_and_the_five_best_hold_the_best(rank, classes):
    found = accuracy_values(np.minimum(rank, classes), np.full(7, classes))
    assert all(value.shape == rank.shape for value in found.values())
    assert ((found["top1"] >= 0) & (found["top1"] <= found["top5"]) & (found["top5"] <= 1)).all()


# --- the mean over classes ----------------------------------------------------------------------------------


def test_weights_per_class_of_a_hand_case():
    # Three images of class 0, one of class 2, none of class 1: 4 / (2 * 3) and 4 / (2 * 1).
    found = per_class_weights(np.array([0, 2, 0, 0]))
    assert found.tolist() == [pytest.approx(2 / 3), 2, pytest.approx(2 / 3), pytest.approx(2 / 3)]


@quick
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60))
def test_the_weighted_mean_is_scikit_learns_mean_recall(pairs):
    label, predicted = (np.array(one) for one in zip(*pairs, strict=True))
    weights = per_class_weights(label)
    assert weights.mean() == pytest.approx(1)
    found = (weights * (label == predicted)).mean()
    there = np.unique(label)
    assert found == pytest.approx(
        recall_score(label, predicted, labels=there, average="macro", zero_division=0)
    )
    # The same by another name, which warns of predicted classes without images: another wrong one for those.
    inside = np.isin(predicted, there)
    known = np.where(inside, predicted, there[(np.searchsorted(there, label) + 1) % len(there)])
    if len(there) > 1:
        assert found == pytest.approx(balanced_accuracy_score(label, known))


def test_equally_many_images_per_class_weigh_the_same():
    assert (per_class_weights(np.array([3, 1, 1, 3])) == 1).all()

"""Objectives against numbers worked out by hand."""

import math

import pytest
import torch

from workbench.objectives import pair_contrastive, same_condition_contrastive, similarity_mse


def test_the_squared_error_is_averaged_over_rows():
    # (0.5^2 + 1^2 + 0^2) / 3 = 1.25 / 3
    value = similarity_mse(torch.tensor([0.5, -0.5, 0.25]), torch.tensor([1.0, 0.5, 0.25]))
    assert float(value) == pytest.approx(1.25 / 3)


def test_the_pair_term_is_the_softmax_of_a_pairs_two_scores():
    # temperature 0.5: logits (1.6, 0.4) and (-0.2, 0.6); -log softmax of the first of each, mean of both.
    one = -math.log(math.exp(1.6) / (math.exp(1.6) + math.exp(0.4)))
    other = -math.log(math.exp(-0.2) / (math.exp(-0.2) + math.exp(0.6)))
    value = pair_contrastive(torch.tensor([0.8, -0.1]), torch.tensor([0.2, 0.3]), 0.5)
    assert float(value) == pytest.approx((one + other) / 2)


@pytest.mark.parametrize("temperature", [0.01, 1.5, 100.0])
def test_equal_scores_give_log_two_at_any_temperature(temperature):
    score = torch.tensor([0.3, -0.9])
    assert float(pair_contrastive(score, score, temperature)) == pytest.approx(math.log(2))


def test_the_pair_term_vanishes_when_right_and_grows_linearly_when_wrong():
    right, wrong = torch.tensor([1.0]), torch.tensor([-1.0])
    assert float(pair_contrastive(right, wrong, 0.01)) == pytest.approx(0, abs=1e-30)
    # softplus(x) = x for large x: 2 / 0.01.
    assert float(pair_contrastive(wrong, right, 0.01)) == pytest.approx(200)


def test_a_batch_without_pairs_adds_nothing_and_keeps_the_gradient_path():
    scores = torch.ones(3, requires_grad=True)
    value = pair_contrastive(scores[:0], scores[:0], 1.5)
    assert value.item() == 0
    value.backward()
    assert torch.equal(scores.grad, torch.zeros(3))


@pytest.mark.parametrize("temperature", [1e-3, 1.5])
def test_gradients_of_the_pair_term_are_finite_and_push_the_two_scores_apart(temperature):
    scores = torch.tensor([1.0, -1.0, 0.2], requires_grad=True)
    pair_contrastive(scores, -scores, temperature).backward()
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad <= 0).all()
    assert scores.grad[1] < 0


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane, times 3, since only their direction may count."""
    angles = torch.deg2rad(torch.tensor(degrees))
    return 3 * torch.stack([angles.cos(), angles.sin()], dim=1)


def test_negatives_are_the_second_sentences_of_the_same_condition_only():
    first, second = at(0, 90, 0, 45), at(0, 90, 60, 45)
    condition, label = torch.tensor([7, 7, 5, 7]), torch.tensor([1.0, 0.0, 1.0, 0.5])
    # Anchors: rows 0 and 2, the labels above 0.5. Row 2 is alone with its condition: -log 1 = 0. Row 0 sees
    # its own second sentence (cos 0 = 1), row 1's (cos 90 = 0) and row 3's (cos 45); row 2's is not seen.
    logits = [1.0 / 0.5, 0.0, math.cos(math.pi / 4) / 0.5]
    expected = -(logits[0] - math.log(sum(math.exp(logit) for logit in logits))) / 2
    value = same_condition_contrastive(first, second, condition, label, 0.5)
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_sentences_of_other_conditions_never_change_the_value():
    torch.manual_seed(0)
    first, second, label = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([1.0, 1, 0, 0, 0, 0])
    condition = torch.tensor([1, 1, 1, 2, 2, 3])
    value = same_condition_contrastive(first, second, condition, label, 0.1)
    moved = second.clone()
    moved[3:] = torch.randn(3, 4) * 100
    assert torch.equal(same_condition_contrastive(first, moved, condition, label, 0.1), value)
    moved[2] = torch.randn(4)  # same condition: this one is a negative
    assert not torch.isclose(same_condition_contrastive(first, moved, condition, label, 0.1), value)


def test_gradients_of_the_same_condition_term_are_finite():
    torch.manual_seed(0)
    first, second = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    condition, label = torch.tensor([1, 1, 2, 2, 3, 3]), torch.tensor([1.0, 0, 0.75, 1, 0, 0])
    same_condition_contrastive(first, second, condition, label, 0.01).backward()
    assert torch.isfinite(first.grad).all()
    assert torch.isfinite(second.grad).all()
    assert first.grad[0].abs().sum() > 0
    assert (second.grad[4:] == 0).all()  # condition 3 has no anchor


def test_a_batch_without_high_labels_adds_nothing_and_keeps_the_gradient_path():
    first = torch.randn(2, 4, requires_grad=True)
    condition, label = torch.tensor([1, 1]), torch.tensor([0.5, 0.0])
    value = same_condition_contrastive(first, torch.randn(2, 4), condition, label, 0.1)
    assert value.item() == 0
    value.backward()
    assert torch.equal(first.grad, torch.zeros(2, 4))


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(Exception, match="(?i)type-check"):
        similarity_mse(torch.zeros(3), torch.zeros(2))

"""Objectives against numbers worked out by hand, and against open_clip's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import SigLipLoss
from torch.nn import functional

from workbench.objectives import (
    pair_contrastive,
    same_condition_contrastive,
    sigmoid_contrastive,
    similarity_mse,
)

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=60, deadline=None, database=None)


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


# --- images and texts ---------------------------------------------------------------------------------------


def units(count: int, seed: int, width: int = 5) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, width, generator=draw, dtype=torch.double), dim=-1)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.double)


@quick
@given(
    count=st.integers(1, 8), scale=st.floats(0.1, 100), bias=st.floats(-10, 10), seed=st.integers(0, 10**6)
)
def test_one_text_per_image_is_open_clips_siglip_loss_in_value_and_gradients(count, scale, bias, seed):
    def inputs() -> list[torch.Tensor]:
        found = [units(count, seed), units(count, seed + 1), number(scale), number(bias)]
        return [tensor.requires_grad_() for tensor in found]

    ours, theirs = inputs(), inputs()
    images, texts, t, b = ours
    value = sigmoid_contrastive(images, texts, torch.eye(count, dtype=torch.bool), t, b)
    expected = SigLipLoss()(*theirs)
    value.backward()
    expected.backward()
    # Double precision.
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-7, atol=1e-9)


def test_images_and_texts_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    match = torch.tensor([[True, False, True], [False, True, False]])
    value = sigmoid_contrastive(images, texts, match, torch.tensor(2.0), torch.tensor(-1.0))
    # Logits 2 cos - 1: (1, -1, 0.2) and (-1, 1, 0.6). Signs: (+, -, +) and (-, +, -), so the six terms are
    # softplus of -1, -1, -0.2, -1, -1 and 0.6; their sum is shared by two images.
    softplus = [math.log1p(math.exp(x)) for x in (-1, -1, -0.2, -1, -1, 0.6)]
    assert float(value) == pytest.approx(sum(softplus) / 2)


def test_equal_texts_are_one_column_and_no_negatives_of_each_others_images():
    text = units(1, seed=0)
    images, scale, bias = text.repeat(2, 1), number(20.0), number(-10.0)
    match = torch.ones(2, 1, dtype=torch.bool)
    # Both images lie on their text: the logit is 20 - 10, each image adds softplus(-10) and nothing else.
    value = sigmoid_contrastive(images, text, match, scale, bias)
    assert float(value) == pytest.approx(math.log1p(math.exp(-10)))
    # SigLIP compares each image with both copies, once as true, once as false: softplus(-10) + softplus(10).
    twice = SigLipLoss()(images, text.repeat(2, 1), scale, bias)
    assert float(twice) == pytest.approx(math.log1p(math.exp(-10)) + math.log1p(math.exp(10)))


@quick
@given(images=st.integers(1, 6), texts=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_each_pair_adds_its_own_term_whatever_the_order(images, texts, seed):
    draw = torch.Generator().manual_seed(seed)
    x, y, match = units(images, seed), units(texts, seed + 1), torch.rand(images, texts, generator=draw) < 0.4
    value = float(sigmoid_contrastive(x, y, match, number(7.0), number(-2.0)))
    total = 0.0
    for i in range(images):
        for j in range(texts):
            logit = 7 * sum(float(a) * float(b) for a, b in zip(x[i], y[j], strict=True)) - 2
            chance = 1 / (1 + math.exp(-logit))
            total -= math.log(chance if match[i, j] else 1 - chance)
    assert value >= 0
    assert value == pytest.approx(total / images, rel=1e-9)
    rows, columns = torch.randperm(images, generator=draw), torch.randperm(texts, generator=draw)
    moved = sigmoid_contrastive(x[rows], y[columns], match[rows][:, columns], number(7.0), number(-2.0))
    assert float(moved) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("texts", [2, 5, 64])
def test_the_bias_that_is_right_at_the_start_is_the_log_odds_of_a_match(texts):
    # Nothing is known yet: all cosines are 0, and each image has one true text.
    bias = number(-math.log(texts - 1)).requires_grad_()
    match = torch.eye(texts, dtype=torch.bool)[:2]
    zeros = torch.zeros(2, 3, dtype=torch.double), torch.zeros(texts, 3, dtype=torch.double)
    sigmoid_contrastive(*zeros, match, number(10.0), bias).backward()
    # d/db = T sigmoid(b) - 1 = T / T - 1
    assert bias.grad.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
def test_gradients_of_the_sigmoid_term_are_finite(scale):
    images, texts = units(3, 0).requires_grad_(), units(4, 1).requires_grad_()
    match = torch.tensor([[True, False, False, True], [False] * 4, [True] * 4])
    sigmoid_contrastive(images, texts, match, number(scale), number(-5.0)).backward()
    assert torch.isfinite(images.grad).all()
    assert torch.isfinite(texts.grad).all()


def test_a_match_of_another_shape_is_refused():
    with pytest.raises(Exception, match="(?i)type-check"):
        sigmoid_contrastive(
            units(2, 0), units(3, 1), torch.eye(2, dtype=torch.bool), number(1.0), number(0.0)
        )

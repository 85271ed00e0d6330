"""Objectives against numbers worked out by hand, and against open_clip's."""

import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import SigLipLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.objectives import (
    in_batch_contrastive,
    pair_contrastive,
    paired_contrastive,
    same_condition_contrastive,
    sigmoid_contrastive,
    similarity_mse,
    triplet_margin,
    triplet_ratio,
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


@quick
@given(images=st.integers(1, 9), texts=st.integers(1, 9), chunk=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_chunks_of_the_batch_add_up_to_the_whole_in_value_and_gradients(images, texts, chunk, seed):
    draw = torch.Generator().manual_seed(seed)
    match = torch.rand(images, texts, generator=draw) < 0.4

    def inputs() -> list[torch.Tensor]:
        found = [units(images, seed), units(texts, seed + 1), number(7.0), number(-2.0)]
        return [tensor.requires_grad_() for tensor in found]

    whole, chunked = inputs(), inputs()
    sigmoid_contrastive(*whole[:2], match, *whole[2:]).backward()
    x, y, scale, bias = chunked
    total = 0.0
    # No softmax joins the pairs: a block needs nothing of the others, and only one is held at a time.
    for rows in torch.arange(images).split(chunk):
        for columns in torch.arange(texts).split(chunk):
            part = sigmoid_contrastive(x[rows], y[columns], match[rows][:, columns], scale, bias)
            (part * len(rows) / images).backward()
            total += part.item() * len(rows) / images
    expected = sigmoid_contrastive(
        *(tensor.detach() for tensor in whole[:2]), match, number(7.0), number(-2.0)
    )
    assert total == pytest.approx(float(expected), rel=1e-9)
    for one, other in zip(chunked, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-9)


def trained_recall(objective: str, batch: int, seed: int, epochs: int = 10) -> float:
    """Recall at 1 among 500 unseen pairs of two linear towers over noisy views of one content."""
    draw = torch.Generator().manual_seed(seed)
    content = torch.randn(1500, 12, generator=draw)
    views = [
        content @ torch.randn(12, 40, generator=draw) + 1.5 * torch.randn(1500, 40, generator=draw)
        for _ in range(2)
    ]
    torch.manual_seed(seed)
    towers = torch.nn.ModuleList(torch.nn.Linear(40, 12) for _ in range(2))
    scale, bias = (torch.nn.Parameter(torch.tensor(start)) for start in (math.log(10), -math.log(batch - 1)))
    optimiser = torch.optim.Adam([*towers.parameters(), scale, bias], 1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(1000).split(batch):
            one, other = (
                functional.normalize(tower(view[rows]), dim=1)
                for tower, view in zip(towers, views, strict=True)
            )
            if objective == "sigmoid":
                match = torch.eye(len(rows), dtype=torch.bool)
                loss = sigmoid_contrastive(one, other, match, scale.exp(), bias)
            else:
                loss = both_ways(one, other, scale.exp())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        one, other = (
            functional.normalize(tower(view[1000:]), dim=1) for tower, view in zip(towers, views, strict=True)
        )
    return float(((one @ other.T).argmax(1) == torch.arange(500)).double().mean())


def test_in_batches_of_32_the_sigmoid_term_ends_ahead_of_the_softmax():
    # Only once trained long enough: after 10 passes, not 30, the softmax has 0.935 and the sigmoid 0.915.
    sigmoid, softmax = (
        sum(trained_recall(name, 32, seed, epochs=30) for seed in range(2)) / 2
        for name in ("sigmoid", "softmax")
    )
    assert sigmoid >= softmax > 0.8  # chance is 0.002


# --- anchors among a batch's positives ----------------------------------------------------------------------


def test_anchors_among_positives_by_hand():
    # Cosines: the first pair 1, the second 0; across 0 and 1. t = 0.5:
    # row 1: log(e^2 + e^0) - 2 = 0.1269; row 2, its partner at 0, the other at 1: log(e^2 + 1) = 2.1269.
    one, two = torch.tensor([[2.0, 0.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    high, low = math.log(math.exp(2) + 1) - 2, math.log(math.exp(2) + 1)
    assert in_batch_contrastive(one, two, 0.5).item() == pytest.approx((high + low) / 2, rel=1e-6)
    alike = torch.ones(7, 3)
    assert in_batch_contrastive(alike, alike, 0.1).item() == pytest.approx(math.log(7), rel=1e-6)


@quick
@given(rows=st.integers(1, 9), temperature=st.floats(0.01, 2), seed=st.integers(0, 10**6))
def test_anchors_among_positives_give_sentence_transformers_loss_in_value_and_gradients(
    rows, temperature, seed
):
    def inputs() -> list[torch.Tensor]:
        return [(3 * units(rows, seed + one)).requires_grad_() for one in range(2)]

    ours, theirs = inputs(), inputs()
    value = in_batch_contrastive(*ours, temperature)
    reference = MultipleNegativesRankingLoss(None, scale=1 / temperature)
    expected = reference.compute_loss_from_embeddings(theirs, None)
    value.backward()
    expected.backward()
    # Double precision; logits reach 100.
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-7, atol=1e-9)


@quick
@given(rows=st.integers(1, 9), temperature=st.floats(0.05, 2), seed=st.integers(0, 10**6))
def test_anchors_among_positives_do_not_depend_on_order_or_length_and_both_ways_make_the_paired_term(
    rows, temperature, seed
):
    one, two, order = units(rows, seed), units(rows, seed + 1), torch.randperm(rows)
    value = in_batch_contrastive(one, two, temperature)
    assert value.item() >= -1e-12
    torch.testing.assert_close(in_batch_contrastive(2 * one[order], 5 * two[order], temperature), value)
    back = in_batch_contrastive(two, one, temperature)
    torch.testing.assert_close((value + back) / 2, paired_contrastive(one, two, 1 / temperature))


# --- triplets -----------------------------------------------------------------------------------------------


def test_triplets_by_hand():
    anchor = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    positive, negative = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    # Squared distances 2 and 0, then 0 and 4: max(0, 2 - 0 + 0.5) = 2.5 and max(0, 0 - 4 + 0.5) = 0.
    assert float(triplet_margin(anchor, positive, negative)) == pytest.approx(1.25)
    # Distances sqrt 2 and 0, then 0 and 2: the positive's shares are s(1.414) and s(-2), s the logistic.
    shares = [1 / (1 + math.exp(-math.sqrt(2))), 1 / (1 + math.exp(2))]
    assert float(triplet_ratio(anchor, positive, negative)) == pytest.approx(
        sum(share**2 for share in shares) / 2, rel=1e-5
    )


@quick
@given(rows=st.integers(1, 8), margin=st.floats(0.01, 4), seed=st.integers(0, 10**6))
def test_the_hinge_is_torchs_triplet_loss_with_squared_distances(rows, margin, seed):
    sides = [units(rows, seed + place) for place in range(3)]
    expected = functional.triplet_margin_with_distance_loss(
        *sides, distance_function=lambda one, other: (one - other).square().sum(-1), margin=margin
    )
    value = triplet_margin(*sides, margin)
    torch.testing.assert_close(value, expected)
    # On the unit sphere: 2 (cos(a, n) - cos(a, p)) + m.
    anchor, positive, negative = sides
    cosines = 2 * ((anchor * negative).sum(1) - (anchor * positive).sum(1)) + margin
    torch.testing.assert_close(value, cosines.clamp(min=0).mean())
    assert 0 <= float(triplet_ratio(*sides)) <= 1


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_equal_inputs_give_the_margin_a_quarter_and_finite_gradients(margin):
    sides = [units(3, 0).requires_grad_() for _ in range(3)]
    hinge, ratio = triplet_margin(*sides, margin), triplet_ratio(*sides)
    assert hinge.item() == pytest.approx(margin)
    assert ratio.item() == pytest.approx(0.25)
    (hinge + ratio).backward()
    assert all(torch.isfinite(side.grad).all() for side in sides)


def aspect_accuracy(objective: str, steps: int = 250) -> float:
    """Accuracy on held-out values of the aspect family, its matrix generated from the attribute's name."""
    from workbench.families.aspect import AspectModel, AspectNet, episodes, prototypes

    torch.manual_seed(0)
    content = torch.randn(6, 40, 6), torch.linalg.qr(torch.randn(36, 36)).Q
    net = AspectNet(AspectModel(name="name", kind="matrix", reads="name"))
    optimiser, truth = torch.optim.Adam(net.parameters(), 3e-3), torch.arange(4).repeat_interleave(8)
    draw = torch.Generator().manual_seed(0)

    def embedded(held_out: bool, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        examples, questions, of = episodes(content, count, draw, held_out=held_out)
        weights = net.embed.weights(net.conditions(examples, of))
        found = functional.normalize(net.embed(torch.cat([examples, questions], 1), weights), dim=-1)
        means = functional.normalize(prototypes(found[:, : examples.shape[1]]), dim=-1)
        return found[:, examples.shape[1] :], means

    for _ in range(steps):
        questions, means = embedded(held_out=False, count=8)
        cosine = questions @ means.mT
        if objective == "softmax":
            loss = functional.cross_entropy(10 * cosine.flatten(0, 1), truth.repeat(8))
        else:
            own = functional.one_hot(truth, 4).bool()
            nearest = cosine.masked_fill(own, -2).argmax(-1)  # the hardest of the other classes
            sides = means[:, truth], means.gather(1, nearest[..., None].expand_as(questions))
            loss = {"margin": triplet_margin, "ratio": triplet_ratio}[objective](
                questions.flatten(0, 1), *(side.flatten(0, 1) for side in sides)
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        questions, means = embedded(held_out=True, count=200)
        return float(((questions @ means.mT).argmax(-1) == truth).double().mean())


def test_triplets_teach_which_aspect_matters_nearly_as_well_as_a_softmax_does():
    softmax = aspect_accuracy("softmax")
    assert softmax > 0.9  # chance is 0.25, a network that is told nothing reaches 0.55
    assert aspect_accuracy("margin") >= 0.9 * softmax
    assert aspect_accuracy("ratio") >= 0.9 * softmax


# --- rows that belong together ------------------------------------------------------------------------------


def both_ways(mapped: torch.Tensor, images: torch.Tensor, scale: float) -> torch.Tensor:
    """Torch's own cross-entropy of all logits at once, over images and over texts."""
    logits, own = scale * mapped @ images.T, torch.arange(len(mapped))
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def tiles_of(rows: int, count: int, size: int = 8) -> int:
    """Bytes of a tile of so many rows; double precision has 8 bytes a number."""
    return rows * count * size


class Products(TorchDispatchMode):
    """Notes the size in bytes of every tensor that is made, and every product of matrices."""

    def __init__(self):
        super().__init__()
        self.bytes, self.products = [0], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.bytes.append(found.numel() * found.element_size())
            if function.overloadpacket is torch.ops.aten.mm:
                self.products.append(tuple(found.shape))
        return found


def test_rows_that_belong_together_by_hand():
    mapped = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # t = 2: logits (2, 1.2) and (0, 1.6). Over images, -log of e^2 / (e^2 + e^1.2) and e^1.6 / (e^0 + e^1.6);
    # over texts, of e^2 / (e^2 + e^0) and e^1.6 / (e^1.2 + e^1.6). That is softplus of the other less the own
    # logit: -0.8, -1.6, -2 and -0.4. The mean of the four.
    expected = sum(math.log1p(math.exp(x)) for x in (-0.8, -1.6, -2.0, -0.4)) / 4
    assert float(paired_contrastive(mapped, images, 2.0)) == pytest.approx(expected)


@quick
@given(
    count=st.integers(1, 9),
    width=st.integers(1, 6),
    rows=st.integers(1, 9),
    scale=st.floats(0.1, 200),
    seed=st.integers(0, 10**6),
)
def test_value_and_gradients_are_those_of_cross_entropy_both_ways_in_tiles_of_any_size(
    count, width, rows, scale, seed
):
    ours = [units(count, seed + one, width).requires_grad_() for one in range(2)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    value = paired_contrastive(*ours, scale, tiles_of(rows, count))
    expected = both_ways(*theirs, scale)
    # Double precision; logits reach 200.
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    assert float(value.detach()) >= -1e-11
    (3 * value).backward()
    (3 * expected).backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rows", [7, 3, 1])  # one tile, an uneven last tile, a row each
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_gradients_of_the_paired_term_are_those_of_differences(rows, needed):
    inputs = [units(7, seed).requires_grad_(need) for seed, need in enumerate(needed)]
    assert torch.autograd.gradcheck(lambda *both: paired_contrastive(*both, 5.0, tiles_of(rows, 7)), inputs)


@pytest.mark.parametrize("rows", [7, 2])
def test_an_input_that_needs_no_gradient_gets_none_and_changes_nothing(rows):
    whole = [units(7, seed).requires_grad_() for seed in range(2)]
    paired_contrastive(*whole, 20.0, tiles_of(rows, 7)).backward()
    for place in range(2):
        inputs = [units(7, seed).requires_grad_(seed == place) for seed in range(2)]
        paired_contrastive(*inputs, 20.0, tiles_of(rows, 7)).backward()
        assert inputs[1 - place].grad is None
        torch.testing.assert_close(inputs[place].grad, whole[place].grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("count", [1, 2, 64])
def test_rows_that_all_score_alike_give_the_log_of_their_number(count):
    rows = units(1, 0).repeat(count, 1)
    value = paired_contrastive(rows, units(1, 1).repeat(count, 1), 100.0, tiles_of(3, count))
    assert float(value) == pytest.approx(math.log(count), abs=1e-12)


def test_rows_that_only_match_their_own_lose_nothing_and_their_order_does_not_matter():
    rows = torch.eye(6, dtype=torch.double)
    # 5 others at e^-100 of the own each way.
    assert float(paired_contrastive(rows, rows)) == pytest.approx(5 * math.exp(-100), abs=1e-12)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    mapped, images = units(9, 0), units(9, 1)
    value = paired_contrastive(mapped, images, 10.0)
    torch.testing.assert_close(paired_contrastive(mapped[order], images[order], 10.0), value)
    torch.testing.assert_close(paired_contrastive(images, mapped, 10.0), value)
    assert not torch.isclose(paired_contrastive(mapped[order], images, 10.0), value)


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_the_paired_term_is_finite_in_single_precision_at_a_high_scale(scale):
    mapped, images = units(50, 0).float().requires_grad_(), units(50, 1).float().requires_grad_()
    value = paired_contrastive(mapped, images, scale, tiles_of(7, 50, size=4))
    value.backward()
    # Single precision of logits up to the scale.
    expected = both_ways(mapped.detach().double(), images.detach().double(), scale)
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-4)
    assert torch.isfinite(mapped.grad).all()
    assert torch.isfinite(images.grad).all()


@pytest.mark.parametrize("count", [60, 240])
def test_no_tensor_is_larger_than_a_tile_so_that_memory_grows_with_the_batch(count):
    inputs = [units(count, seed, 2).requires_grad_() for seed in range(2)]
    with Products() as made:
        paired_contrastive(*inputs, 10.0, tiles_of(4, count)).backward()
    assert max(made.bytes) == tiles_of(4, count)  # 4 / 60 and 4 / 240 of all logits


@pytest.mark.parametrize(("rows", "times", "held"), [(12, 1, 12), (6, 2, 6), (1, 2, 1), (1, 2, 0)])
def test_logits_of_one_tile_are_computed_once_and_others_once_more(rows, times, held):
    inputs = [units(12, seed, 3).requires_grad_() for seed in range(2)]
    with Products() as made:
        paired_contrastive(*inputs, 10.0, tiles_of(held, 12)).backward()
    assert made.products.count((rows, 12)) == times * 12 // rows


def test_without_gradients_only_the_value_is_computed():
    with Products() as made:
        paired_contrastive(units(12, 0, 3), units(12, 1, 3), 10.0, tiles_of(6, 12))
    assert made.products == [(6, 12)] * 2


def test_what_is_not_said_is_the_papers_scale():
    torch.testing.assert_close(
        paired_contrastive(units(9, 0), units(9, 1)), both_ways(units(9, 0), units(9, 1), 100.0)
    )


def test_a_second_derivative_is_refused_rather_than_wrong():
    mapped = units(4, 0).requires_grad_()
    value = paired_contrastive(mapped, units(4, 1)).square()
    (first,) = torch.autograd.grad(value, mapped, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("images", [(3, 5), (4, 6)])
def test_rows_or_widths_that_do_not_pair_up_are_refused(images):
    with pytest.raises(Exception, match="(?i)type-check"):
        paired_contrastive(units(4, 0), units(images[0], 1, images[1]))
    jaxtyping.config.update("jaxtyping_disable", True)  # as outside of tests
    try:
        with pytest.raises(
            ValueError, match=rf"\(4, 5\) mapped texts for \({images[0]}, {images[1]}\) images"
        ):
            paired_contrastive(units(4, 0), units(images[0], 1, images[1]))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)

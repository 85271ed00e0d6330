"""What the families of shapes share: two ways in for a code, codes found by descent, overlap."""

import pytest
import torch
from torch import nn

from workbench.families.fields import (
    ConcatField,
    GeneratedField,
    drawn_curves,
    fit_codes,
    grid,
    network,
    overlap,
    to_segment,
)


def test_overlap_is_shared_over_joined_area_and_one_for_two_empty_shapes():
    predicted = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    inside = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    # one point of three; nothing and nothing; nothing of one
    assert overlap(predicted, inside).tolist() == pytest.approx([1 / 3, 1, 0])


def test_overlap_is_symmetric_and_one_only_for_equal_shapes():
    draw = torch.Generator().manual_seed(0)
    one, two = (torch.rand(20, 50, generator=draw) > 0.5 for _ in range(2))
    assert torch.equal(overlap(one, two), overlap(two, one))
    assert (overlap(one, one) == 1).all()
    assert (overlap(one, two) < 1).all()


def test_distance_to_a_segment_is_to_its_line_between_the_ends_and_to_an_end_beyond():
    points = torch.tensor([[[0.5, 2.0], [-3.0, 4.0], [1.0, 0.0]]])
    found = to_segment(points, torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    # above the middle 2; from (-3, 4) to the end (0, 0): 3-4-5; on the other end 0
    assert found.tolist() == [[2.0, 5.0, 0.0]]


def test_the_distance_to_a_segment_is_that_to_the_nearest_of_many_points_on_it():
    draw = torch.Generator().manual_seed(0)
    start, end = (2 * torch.rand(4, 2, generator=draw) - 1 for _ in range(2))
    points = 2 * torch.rand(4, 30, 2, generator=draw) - 1
    along = torch.linspace(0, 1, 2001)[:, None, None]
    on_it = (start + along * (end - start)).transpose(0, 1)
    # Points on a segment of at most 2 * 2 ** 0.5 are 0.0015 apart, so the nearest is too far by less.
    torch.testing.assert_close(to_segment(points, start, end), torch.cdist(points, on_it).amin(-1),
                               rtol=0, atol=1.5e-3)  # fmt: skip
    shared = to_segment(points[:1], start, end)
    for one in range(4):
        assert torch.equal(shared[one], to_segment(points[:1], start[[one]], end[[one]])[0])


def test_the_grid_goes_row_by_row_with_the_first_coordinate_fastest():
    assert grid(2).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]


def test_a_generated_field_is_the_network_with_the_weights_frozen_for_that_code():
    field, codes = GeneratedField((2, 5, 1), 3), torch.randn(2, 3)
    points = torch.randn(2, 7, 2)
    found = field(points, codes)
    for number in range(2):
        plain = field.shape.freeze(codes[number])
        assert torch.allclose(plain(points[number])[:, 0], found[number], atol=1e-6)
    assert field.per_query == 2 * 5 + 5 + 5 + 1


def test_a_concatenated_code_is_a_shift_of_the_first_layer():
    # W [p, z] + b = W_p p + (W_z z + b): that is all concatenation can do.
    field, code, points = ConcatField((2, 5, 1), 3), torch.randn(1, 3), torch.randn(1, 7, 2)
    first = field.shape[0]
    shifted = points @ first.weight[:, :2].T + (code @ first.weight[:, 2:].T + first.bias)
    assert torch.allclose(field.shape[1:](shifted)[..., 0], field(points, code), atol=1e-6)


def test_fitting_codes_lowers_the_loss_and_leaves_the_field_and_the_start_bit_for_bit():
    torch.manual_seed(0)
    field, start = GeneratedField((2, 8, 1), 3), torch.zeros(2, 3)
    points = torch.randn(2, 60, 2)
    inside = points.norm(dim=-1) < torch.tensor([[0.8], [1.6]])
    before = [weight.clone() for weight in field.parameters()]
    codes = fit_codes(field, start, points, inside, steps=40, learning_rate=0.05)
    loss = nn.functional.binary_cross_entropy_with_logits
    assert loss(field(points, codes), inside.float()) < loss(field(points, start), inside.float())
    assert all(torch.equal(one, two) for one, two in zip(before, field.parameters(), strict=True))
    assert (start == 0).all()


def test_codes_are_fitted_side_by_side_as_if_each_were_alone():
    torch.manual_seed(0)
    field, points = ConcatField((2, 8, 1), 3), torch.randn(2, 60, 2)
    inside = points.norm(dim=-1) < torch.tensor([[0.8], [1.6]])
    settings = {"steps": 10, "learning_rate": 0.05}
    both = fit_codes(field, torch.zeros(2, 3), points, inside, **settings)
    alone = fit_codes(field, torch.zeros(1, 3), points[1:], inside[1:], **settings)
    assert torch.allclose(both[1:], alone, atol=1e-4)


def test_a_network_has_an_activation_between_layers_and_none_at_the_end():
    kinds = [type(part) for part in network((2, 4, 4, 1), nn.Tanh)]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]


def test_pictures_are_laid_out_as_numbers_beside_the_true_ones():
    found = drawn_curves("arm", torch.tensor([[True, False]]), torch.tensor([[0.5, 0.25]]))
    assert found == {"arm_0": ([0.0, 1.0], [1.0, 0.0]), "arm_0_true": ([0.0, 1.0], [0.5, 0.25])}

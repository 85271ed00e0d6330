"""What the families of shapes share: three ways in for a code, codes found by descent, overlap."""

import pytest
import torch
from torch import nn

from workbench.families.fields import (
    ConcatField,
    GeneratedField,
    TableField,
    drawn_curves,
    fit_alone,
    fit_codes,
    grid,
    network,
    origin_codes,
    overlap,
    to_segment,
)
from workbench.training import Training


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


def test_a_code_of_a_table_is_all_weights_of_its_shapes_network():
    torch.manual_seed(0)
    field, points = TableField((2, 5, 1), 3), torch.randn(3, 7, 2)
    found = field(points, field.codes)
    for number in range(3):
        plain = field.shape.freeze(torch.tensor(number))
        torch.testing.assert_close(found[number], plain(points[number])[:, 0])
    assert field.per_query == field.codes.shape[1] == 2 * 5 + 5 + 5 + 1


def test_networks_trained_alone_learn_their_shapes_and_nothing_of_each_other(tmp_path):
    draw = torch.Generator().manual_seed(0)
    points = 2 * torch.rand(2, 60, 2, generator=draw) - 1
    inside = points.norm(dim=-1) < torch.tensor([[0.5], [0.9]])
    training = Training(epochs=1, batch_size=16, learning_rate=0.02)
    found = []
    for number, known in enumerate((inside, torch.stack([inside[0], ~inside[1]]))):
        torch.manual_seed(0)
        field, history = fit_alone((2, 8, 1), points, known, training, 60, tmp_path / str(number), seed=0)
        assert history[-1]["loss"] < history[0]["loss"] / 1.5
        found.append(field.codes.detach())
    # The other truth of the second shape changes nothing of the first.
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1], atol=1e-2)


def test_codes_at_the_origin_are_of_their_own_shape_and_taken_where_gradients_are_off():
    torch.manual_seed(0)
    field, points = ConcatField((2, 8, 1), 3, nn.ELU), torch.randn(2, 60, 2)
    inside = points.norm(dim=-1) < torch.tensor([[0.8], [1.6]])
    with torch.no_grad():
        both = origin_codes(field, 3, points, inside)
    assert both.shape == (2, 3)
    assert not both.requires_grad
    torch.testing.assert_close(origin_codes(field, 3, points[1:], inside[1:]), both[1:])


def test_a_network_has_an_activation_between_layers_and_none_at_the_end():
    kinds = [type(part) for part in network((2, 4, 4, 1), nn.Tanh)]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]


def test_pictures_are_laid_out_as_numbers_beside_the_true_ones():
    found = drawn_curves("arm", torch.tensor([[True, False]]), torch.tensor([[0.5, 0.25]]))
    assert found == {"arm_0": ([0.0, 1.0], [1.0, 0.0]), "arm_0_true": ([0.0, 1.0], [0.5, 0.25])}

"""Coefficients generated a chunk at a time."""

import pytest
import torch
from torch import nn

from workbench.hypernetworks import ChunkedGenerator, ParamSpec, Slot

SPEC = ParamSpec((Slot("v", (1000,), "vector"),))


def test_all_coefficients_are_made_and_the_last_chunk_is_cut():
    generator = ChunkedGenerator(4, SPEC, (16,), chunk=300)
    # 1,000 coefficients in chunks of 300: four chunks, 200 numbers of the last are not used.
    assert generator.chunks.shape[0] == 4
    assert generator(torch.randn(3, 4)).tensors["v"].shape == (3, 1000)


def test_a_chunk_is_what_the_head_gives_for_its_own_vector():
    generator = ChunkedGenerator(4, SPEC, (16,), chunk=300)
    code = torch.randn(1, 4)
    expected = generator.head(generator.body(torch.cat([code[0], generator.chunks[2]])))
    torch.testing.assert_close(generator(code).tensors["v"][0, 600:900], expected)


def test_it_can_hold_fewer_numbers_than_it_generates():
    spec = ParamSpec.of(nn.Linear(128, 128))
    generator = ChunkedGenerator(8, spec, (16,), chunk=64)
    assert generator.cost()["break_even_conditions"] == 1
    assert generator.cost()["generator_parameters"] < spec.numel


def test_coefficients_start_at_unit_variance():
    torch.manual_seed(0)
    made = ChunkedGenerator(8, SPEC, (64,), chunk=100)(torch.randn(200, 8)).tensors["v"]
    # Chunks share a head of few outputs, so that the estimate is over about 64 x 100 free numbers.
    assert made.std().item() == pytest.approx(1, rel=0.1)


def test_codes_of_another_width_are_refused():
    with pytest.raises(ValueError, match="width 4, got 5"):
        ChunkedGenerator(4, SPEC, (16,))(torch.randn(2, 5))

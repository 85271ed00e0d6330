"""Rows, projection and token pooling against plain loops, and what must never be built."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.hypernetworks import LinearGenerator, ParamSpec, Rows, Slot, pool_tokens, project

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=80, deadline=None, database=None)
some_ids = st.lists(st.integers(-50, 10**12), min_size=1, max_size=60).flatmap(
    lambda pool: st.lists(st.sampled_from(pool), min_size=1, max_size=150)
)


class Sizes(TorchDispatchMode):
    """Records the shape of every tensor that any operation produces, backward included."""

    def __init__(self):
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        self.shapes += [output.shape for output in outputs if isinstance(output, torch.Tensor)]
        return result

    def largest(self) -> int:
        return max(math.prod(shape) for shape in self.shapes)


def generator_of(width: int, rank: int | None, *, identity: bool = False) -> LinearGenerator:
    slot = Slot("projection", (width, width), "lowrank" if rank else "full", rank, identity)
    torch.manual_seed(0)
    return LinearGenerator(4, ParamSpec((slot,)), dropout=0.0)


@quick
@given(some_ids)
def test_rows_send_every_row_through_the_function_of_its_id(ids):
    rows = Rows.of(torch.tensor(ids))
    assert len(rows) == len(ids)
    factors = (rows.unique % 97).float()
    inputs = torch.arange(len(ids), dtype=torch.float32)[:, None] + torch.tensor([1.0, 1000.0])
    outputs = rows.apply(inputs, lambda span, part: part * factors[span][:, None, None])
    naive = torch.stack([row * (number % 97) for row, number in zip(inputs, ids, strict=True)])
    assert torch.equal(outputs, naive)


@quick
@given(some_ids)
def test_rows_list_each_id_once_in_few_blocks_that_at_most_double_the_rows(ids):
    rows = Rows.of(torch.tensor(ids))
    assert sorted(rows.unique.tolist()) == sorted(set(ids))
    assert len(rows.blocks) <= math.log2(len(ids)) + 1
    assert sum(block.rows.numel() for block in rows.blocks) < 2 * len(ids)
    assert sum(int(block.real.sum()) for block in rows.blocks) == len(ids)
    assert [block.start for block in rows.blocks[1:]] == [block.stop for block in rows.blocks[:-1]]


def test_one_row_is_enough():
    rows = Rows.of(torch.tensor([7]))
    assert torch.equal(rows.apply(torch.ones(1, 2), lambda span, part: part * 3), torch.full((1, 2), 3.0))


@quick
@given(some_ids)
def test_each_row_is_given_the_vector_of_its_id(ids):
    rows = Rows.of(torch.tensor(ids))
    features = torch.stack([rows.unique.double(), rows.unique.double() / 7], dim=1)
    expected = torch.tensor([[float(number), float(number) / 7] for number in ids], dtype=torch.double)
    assert torch.equal(rows.spread(features), expected)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_projection_multiplies_each_row_by_its_conditions_formed_matrix(rank, identity):
    generator = generator_of(8, rank, identity=identity)
    ids = torch.tensor([4, 2, 4, 9, 2, 4, 4, 1])
    rows, inputs = Rows.of(ids), torch.randn(8, 8)
    weights = generator(torch.randn(4, 4))
    outputs = project(inputs, weights, rows)
    for row, number in enumerate(ids):
        condition = int((rows.unique == number).nonzero())
        if rank:
            down = weights.tensors["projection.down"][condition]
            matrix = down @ weights.tensors["projection.up"][condition]
        else:
            matrix = weights.tensors["projection"][condition]
        expected = inputs[row] @ matrix + (inputs[row] if identity else 0)
        # Another order of summation moves the last bits.
        torch.testing.assert_close(outputs[row], expected, rtol=1e-4, atol=1e-5)


def test_projection_between_different_widths():
    spec = ParamSpec((Slot("narrow", (6, 2), "lowrank", 2),))
    weights = spec.compose(torch.randn(1, spec.numel))
    inputs = torch.randn(3, 6)
    outputs = project(inputs, weights, Rows.of(torch.zeros(3, dtype=torch.long)), "narrow")
    # Another order of summation moves the last bits.
    torch.testing.assert_close(outputs, inputs @ weights.matrix("narrow", 0), rtol=1e-4, atol=1e-5)


def test_the_low_rank_product_is_never_formed_forward_or_backward():
    width, rank, unique, count = 97, 3, 5, 7
    generator = generator_of(width, rank, identity=True)
    rows, conditions, inputs = Rows.of(torch.arange(count) % unique), torch.randn(5, 4), torch.randn(7, width)
    with Sizes() as seen:
        project(inputs.requires_grad_(), generator(conditions), rows).square().sum().backward()
    assert generator.head.weight.grad.abs().sum() > 0
    assert inputs.grad is not None
    assert not [shape for shape in seen.shapes if tuple(shape[-2:]) == (width, width)]
    assert seen.largest() < width * width  # nor in any other layout


def test_the_watch_for_formed_products_sees_a_full_matrix():
    width = 97
    generator = generator_of(width, None)
    with Sizes() as seen:
        project(
            torch.randn(2, width), generator(torch.randn(2, 4)), Rows.of(torch.arange(2))
        ).sum().backward()
    assert [shape for shape in seen.shapes if tuple(shape[-2:]) == (width, width)]


@pytest.mark.parametrize("count", [4, 64])
def test_memory_grows_with_unique_conditions_times_rank_and_not_with_rows(count):
    width, rank, unique = 32, 8, 2
    generator = generator_of(width, rank)
    rows, inputs = Rows.of(torch.arange(count) % unique), torch.randn(count, width)
    weights = generator(torch.randn(unique, 4))
    assert sum(tensor.numel() for tensor in weights.tensors.values()) == unique * 2 * width * rank
    with Sizes() as seen:
        project(inputs, weights, rows)
    # Rows and a factor of all conditions are held; one factor copied per row would be count * width * rank.
    assert seen.largest() <= max(2 * count * width, unique * width * rank)


def test_each_conditions_weights_are_generated_once_however_many_rows_use_it():
    generator, calls = generator_of(6, 2), []
    generator.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    rows = Rows.of(torch.tensor([3, 8, 3, 3, 8, 1] * 50))
    project(torch.randn(300, 6), generator(torch.randn(4, 4)[rows.unique % 4]), rows)
    assert calls == [3]


def test_weights_of_another_number_of_conditions_are_refused():
    weights = generator_of(6, 2)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="weights of 2 conditions for rows of 3 conditions"):
        project(torch.randn(3, 6), weights, Rows.of(torch.arange(3)))


def test_inputs_of_another_width_are_refused():
    weights = generator_of(6, 2)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="slot projection maps width 6, the inputs have width 5"):
        project(torch.randn(2, 5), weights, Rows.of(torch.arange(2)))


def test_an_unknown_slot_is_refused():
    weights = generator_of(6, 2)(torch.randn(2, 4))
    with pytest.raises(KeyError, match="no slot 'gate'; there are: projection"):
        project(torch.randn(2, 6), weights, Rows.of(torch.arange(2)), "gate")


def masked(lengths: list[int], longest: int) -> torch.Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def test_pooling_equals_a_softmax_written_as_a_loop():
    torch.manual_seed(5)
    by_sentence = Rows.of(torch.tensor([2, 0, 1, 1, 2, 1]))
    tokens, mask, queries = torch.randn(3, 5, 4), masked([5, 1, 3], 5), torch.randn(6, 4)
    pooled = pool_tokens(queries, tokens, mask, by_sentence)
    for row, sentence in enumerate([2, 0, 1, 1, 2, 1]):
        place = by_sentence.unique.tolist().index(sentence)
        real = [tokens[place, n].tolist() for n in range(5) if mask[place, n]]
        scores = [sum(t * q for t, q in zip(token, queries[row].tolist(), strict=True)) / 2 for token in real]
        strengths = [math.exp(score) for score in scores]  # 2 above is sqrt(width 4)
        expected = [
            sum(w * token[d] for w, token in zip(strengths, real, strict=True)) / sum(strengths)
            for d in range(4)
        ]
        # Single against double precision.
        torch.testing.assert_close(pooled[row], torch.tensor(expected), rtol=1e-4, atol=1e-5)


@quick
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 10**6))
def test_pooling_gives_real_tokens_shares_that_sum_to_one_and_padding_none(lengths, seed):
    draw = torch.Generator().manual_seed(seed)
    sentences = torch.randint(len(lengths), (12,), generator=draw)
    by_sentence = Rows.of(sentences)
    # Tokens are unit vectors, so that a pooled vector lists each token's share.
    tokens = torch.eye(6).expand(len(by_sentence.unique), 6, 6).clone()
    mask = masked([lengths[number] for number in by_sentence.unique], 6)
    shares = pool_tokens(torch.randn(12, 6, generator=draw) * 10, tokens, mask, by_sentence)
    assert (shares >= 0).all()
    # Single precision.
    torch.testing.assert_close(shares.sum(1), torch.ones(12), rtol=1e-5, atol=0)
    for row, number in enumerate(sentences):
        assert (shares[row, lengths[number] :] == 0).all()


def test_what_stands_in_the_padding_changes_nothing():
    by_sentence = Rows.of(torch.tensor([0, 1, 1]))
    tokens, mask, queries = torch.randn(2, 4, 6), masked([2, 3], 4), torch.randn(3, 6)
    lengths = mask[:, :, None]
    pooled = [
        pool_tokens(queries, torch.where(lengths, tokens, filler), mask, by_sentence) for filler in (0.0, 1e6)
    ]
    assert torch.equal(*pooled)


def test_a_zero_query_pools_to_the_mean_of_the_real_tokens():
    tokens, mask = torch.randn(1, 4, 6), masked([3], 4)
    pooled = pool_tokens(torch.zeros(2, 6), tokens, mask, Rows.of(torch.zeros(2, dtype=torch.long)))
    # Single precision.
    torch.testing.assert_close(pooled, tokens[:, :3].mean(1).expand(2, -1), rtol=1e-5, atol=1e-6)

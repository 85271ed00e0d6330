"""The generator of a set: blind to order and repetition, almost silent at the start, of known cost."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workbench.hypernetworks import Affines, ParamSpec, SetGenerator, Slot
from workbench.hypernetworks.generators import cost_of, standardise

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=40, deadline=None, database=None)
WIDTH = 6


def spec_of(count: int = 10) -> ParamSpec:
    return ParamSpec((Slot("first", (count - 3,), "vector"), Slot("second", (3,), "vector")))


def generator_of(*, loud: bool = True, seed: int = 0, **sizes: int) -> SetGenerator:
    """A small generator; a loud one has a head of unit scale, so that differences are seen."""
    torch.manual_seed(seed)
    generator = SetGenerator(WIDTH, spec_of(), **{"width": 8, "heads": 2, "bottleneck": 4, **sizes})
    if loud:
        nn.init.normal_(generator.head.weight)
    return generator


def numbers(generator: SetGenerator, sets: Tensor) -> Tensor:
    return torch.cat(list(generator(sets).tensors.values()), 1).detach()


def members(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


# --- sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@quick
@given(
    order=st.integers(1, 8).flatmap(lambda size: st.permutations(range(size))),
    times=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_the_order_of_a_set_and_repeating_it_change_nothing(training, layers, order, times, seed):
    generator = generator_of(layers=layers).train(training)
    one = members(len(order), seed)
    other = one[torch.tensor(order)].repeat(times, 1)
    # Sums in another order.
    torch.testing.assert_close(
        numbers(generator, other[None]), numbers(generator, one[None]), rtol=1e-4, atol=1e-5
    )


@quick
@given(size=st.integers(2, 8), left=st.integers(0, 7), seed=st.integers(0, 1000))
def test_a_member_less_or_twice_changes_what_is_generated(size, left, seed):
    generator, whole = generator_of(), members(size, seed)
    left %= size
    part = torch.cat([whole[:left], whole[left + 1 :]])
    twice = torch.cat([whole, whole[left : left + 1]])
    for other in (part, twice):
        # A thousand times what rounding moves.
        assert (numbers(generator, other[None]) - numbers(generator, whole[None])).abs().max() > 1e-2


def test_members_see_each_other():
    # Without attention the mean over a set would be the mean over its members, each alone.
    generator, whole = generator_of(), members(5)
    alone = numbers(generator, whole[:, None])
    assert (numbers(generator, whole[None]) - alone.mean(0)).abs().max() > 1e-2


def test_several_sets_at_once_equal_one_at_a_time():
    generator, sets = generator_of(layers=2), members(4 * 5).view(4, 5, WIDTH)
    found = numbers(generator, sets)
    for one, numbers_of_one in zip(sets, found, strict=True):
        # Sums in another order.
        torch.testing.assert_close(numbers(generator, one[None])[0], numbers_of_one, rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_nothing_is_drawn_in_training():
    generator, sets = generator_of(), members(5)[None]
    assert torch.equal(numbers(generator.train(), sets), numbers(generator, sets))
    # Evaluation takes torch's fused layer, which rounds in another place.
    torch.testing.assert_close(
        numbers(generator.eval(), sets), numbers(generator.train(), sets), rtol=1e-4, atol=1e-5
    )


def test_a_bottleneck_bounds_the_rank_over_sets():
    generator = generator_of(bottleneck=3)
    table = numbers(generator, members(20 * 4).view(20, 4, WIDTH))
    assert torch.linalg.matrix_rank(table, rtol=1e-4) == 3


# --- the control that is told nothing -----------------------------------------------------------------------


def test_learned_tokens_ignore_the_set_wholly():
    generator = generator_of(tokens=3)
    sets, other = (members(2 * 5, seed).view(2, 5, WIDTH).requires_grad_() for seed in (1, 2))
    found = torch.cat(list(generator(sets).tensors.values()), 1)
    assert torch.equal(numbers(generator, other), found)
    # Sets of another size, even without numbers in them: all the same.
    assert torch.equal(numbers(generator, torch.full((2, 1, WIDTH), float("nan"))), found)
    # Sums in another order.
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    assert sets.grad is None
    assert generator.tokens.grad.abs().sum() > 0


def test_learned_tokens_act_as_a_set_of_their_own():
    generator, plain = generator_of(tokens=3), generator_of()
    plain.load_state_dict({key: value for key, value in generator.state_dict().items() if key != "tokens"})
    found = numbers(generator, members(5)[None])
    assert torch.equal(found, numbers(plain, generator.tokens.detach()[None]))
    assert sum(part.numel() for part in generator.parameters()) == 3 * WIDTH + sum(
        part.numel() for part in plain.parameters()
    )


# --- the start ----------------------------------------------------------------------------------------------


def test_the_start_is_almost_silent_and_not_quite():
    torch.manual_seed(0)
    generator = SetGenerator(64, spec_of(4000))
    found = numbers_of_unit_texts(generator)
    # The head's entries have deviation 0.001, its 32 inputs at most order one: sqrt(32) / 1000 = 0.006.
    assert 1e-4 < found.std() < 6e-3
    assert found.abs().max() < 0.03
    assert (generator.head.bias == 0).all()


def numbers_of_unit_texts(generator: SetGenerator, count: int = 10) -> Tensor:
    width = generator.enter.in_features
    texts = nn.functional.normalize(torch.randn(1, count, width), dim=-1)
    return numbers(generator, standardise(texts))


def test_a_tower_hardly_moves_at_the_start():
    torch.manual_seed(0)
    tower = timm.create_model("test_convnext", num_classes=6).eval()
    affines = Affines.wrap(tower)
    images = torch.randn(2, 3, 32, 32)
    own = tower(images)
    generator = SetGenerator(64, affines.spec())
    affines.use(generator(torch.randn(1, 10, 64)))
    changed = (tower(images) - own).norm() / own.norm()
    assert 1e-6 < changed < 0.05


def test_a_slots_gain_scales_what_is_generated():
    def build(gain: float) -> SetGenerator:
        torch.manual_seed(0)
        return SetGenerator(WIDTH, ParamSpec((Slot("v", (5,), "vector", gain=gain),)), width=8, heads=2)

    sets = members(4)[None]
    # Single precision.
    torch.testing.assert_close(numbers(build(0.1), sets), numbers(build(1.0), sets) * 0.1, rtol=1e-5, atol=0)


# --- cost ---------------------------------------------------------------------------------------------------


def total(width: int, layers: int, bottleneck: int) -> int:
    """Parameters of a generator for 512-wide texts and the 42,016 norm parameters of EfficientNet-B0."""
    with torch.device("meta"):
        spec = ParamSpec((Slot("norms", (42_016,), "vector"),))
        generator = SetGenerator(512, spec, width=width, layers=layers, bottleneck=bottleneck)
    return generator.cost()["generator_parameters"]


@pytest.mark.parametrize(("width", "layers", "millions"), [(256, 2, 3.11), (512, 2, 7.97)])
def test_parameters_are_as_many_as_measured_elsewhere(width, layers, millions):
    # The fact sheet's rows whose feed-forward layers are four times as wide as the transformer, as ours are.
    assert total(width, layers, 32) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("layers", "bottleneck", "millions"), [(1, 32, 8.11), (4, 32, 27.01), (4, 256, 36.59), (4, 768, 58.50)]
)
def test_parameters_differ_from_the_other_rows_by_the_feed_forward_width_alone(layers, bottleneck, millions):
    # Those have 2,560 and not 4 * 768 = 3,072 inner units, of 768 weights in, a bias and 768 weights out. The
    # last row is called one without a bottleneck; its count is that of a layer of 768 to 768.
    surplus = layers * (3072 - 2560) * (768 + 1 + 768)
    assert (total(768, layers, bottleneck) - surplus) / 1e6 == pytest.approx(millions, abs=0.005)


def test_cost_is_counted_by_hand():
    generator = SetGenerator(3, spec_of(10), width=4, layers=1, heads=2, bottleneck=2, tokens=5)
    # Tokens 5 * 3 = 15; in 3 * 4 + 4 = 16; attention 4 * 12 + 12 + 4 * 4 + 4 = 80; feed-forward 4 * 16 + 16
    # + 16 * 4 + 4 = 148; two norms 16; bottleneck 4 * 2 + 2 = 10; head 2 * 10 + 10 = 30. Sum 315.
    assert cost_of(generator) == generator.cost()
    assert generator.cost() == {
        "generator_parameters": 315,
        "generated_parameters": 10,
        "break_even_conditions": 32,
    }


# --- gradients, errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 3])
def test_the_gradient_reaches_every_parameter(tokens):
    generator = generator_of(loud=False, layers=2, tokens=tokens)
    loss = sum(
        (part - 1).square().sum() for part in generator(members(2 * 5).view(2, 5, WIDTH)).tensors.values()
    )
    loss.backward()
    for name, part in generator.named_parameters():
        assert part.grad.abs().sum() > 0, name


def test_the_gradient_reaches_the_set():
    sets = members(5)[None].requires_grad_()
    sum(part.square().sum() for part in generator_of()(sets).tensors.values()).backward()
    assert (sets.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("tokens", [0, 3])
def test_members_of_another_width_are_refused(tokens):
    with pytest.raises(ValueError, match=r"sets of one or more vectors of width 6, got \(4, 5\)"):
        generator_of(tokens=tokens)(torch.randn(2, 4, 5))


@pytest.mark.parametrize("tokens", [0, 3])
def test_an_empty_set_is_refused(tokens):
    with pytest.raises(ValueError, match=r"sets of one or more vectors of width 6, got \(0, 6\)"):
        generator_of(tokens=tokens)(torch.randn(2, 0, 6))

"""Connectors: a bank is its connectors one by one, and a sum by parts is the plain sum."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from workbench.hypernetworks.connectors import ConnectorBank, ConnectorGenerator, sum_by_parts
from workbench.objectives import paired_contrastive

WIDTH, OUTPUTS = 6, (5, 3, 8)
# Another order of summation moves the last bits of single precision.
ORDER = {"rtol": 1e-5, "atol": 1e-6}


def bank_of(hidden: int | None = None, outputs: tuple[int, ...] = OUTPUTS) -> ConnectorBank:
    torch.manual_seed(0)
    return ConnectorBank(WIDTH, outputs, hidden)


def texts_of(count: int = 9, width: int = WIDTH) -> torch.Tensor:
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(3)), dim=1)


def apart(bank: ConnectorBank) -> list[nn.Module]:
    """The same connectors as modules of their own, by the numbers of rows in the first layer."""
    found, start = [], 0
    for place, size in enumerate(bank.outputs):
        first = bank.hidden or size
        enter = nn.Linear(WIDTH, first)
        enter.weight.data = bank.enter.weight.data[start : start + first].clone()
        enter.bias.data = bank.enter.bias.data[start : start + first].clone()
        start += first
        if bank.hidden:
            leave = nn.Linear(bank.hidden, size)
            leave.load_state_dict(bank.leave[place].state_dict())
            found.append(nn.Sequential(enter, nn.ReLU(), leave))
        else:
            found.append(enter)
    return found


# --- a bank -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [None, 4])
def test_a_bank_gives_what_its_connectors_give_one_by_one_at_norm_one(hidden):
    bank = bank_of(hidden)
    mapped = bank(texts_of())
    assert [part.shape for part in mapped] == [(9, size) for size in OUTPUTS]
    for part, module in zip(mapped, apart(bank), strict=True):
        torch.testing.assert_close(part, normalize(module(texts_of()), dim=1), **ORDER)
        torch.testing.assert_close(part.norm(dim=1), torch.ones(9))


@pytest.mark.parametrize("hidden", [None, 4])
@pytest.mark.parametrize("which", [range(0, 1), range(1, 2), range(1, 3), range(3), range(2, 2), range(0)])
def test_some_connectors_give_what_they_give_among_all(hidden, which):
    bank = bank_of(hidden)
    some, whole = bank(texts_of(), which), bank(texts_of())
    assert len(some) == len(which)
    for place, part in zip(which, some, strict=True):
        torch.testing.assert_close(part, whole[place], **ORDER)


@pytest.mark.parametrize("hidden", [None, 4])
def test_connectors_that_are_not_asked_for_get_no_gradient(hidden):
    bank = bank_of(hidden)
    bank(texts_of(), range(1, 2))[0].sum().backward()
    rows = slice(4, 8) if hidden else slice(5, 8)
    assert bank.enter.weight.grad[rows].abs().sum() > 0
    rest = torch.ones(len(bank.enter.weight), dtype=torch.bool)
    rest[rows] = False
    assert (bank.enter.weight.grad[rest] == 0).all()
    if hidden:
        assert [layer.weight.grad is None for layer in bank.leave] == [True, False, True]


@pytest.mark.parametrize("hidden", [None, 50])
def test_every_connector_starts_as_a_linear_layer_does(hidden):
    torch.manual_seed(0)
    bank = ConnectorBank(100, (400, 300), hidden)
    # Uniform in +-1 / sqrt(fan in): standard deviation 1 / sqrt(3 * fan in).
    for module, width in [(bank.enter, 100), *((layer, 50) for layer in bank.leave)]:
        assert module.weight.abs().max() <= width**-0.5
        assert module.weight.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.05)
        assert 0 < module.bias.abs().max() <= width**-0.5
    # (400 + 300) * 101, or 2 * 50 * 101 and then (400 + 300) * 51.
    count = sum(one.numel() for one in bank.parameters())
    assert count == (70_700 if hidden is None else 10_100 + 35_700)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_connector_that_starts_at_a_known_map_is_that_map_and_the_others_stay(place):
    bank, before = bank_of(), bank_of()
    weight, bias = torch.randn(WIDTH, OUTPUTS[place]), torch.randn(OUTPUTS[place])
    bank.fill(place, weight, bias)
    for other in range(3):
        found = bank.linear(other)
        expected = (weight, bias) if other == place else before.linear(other)
        assert all(torch.equal(*two) for two in zip(found, expected, strict=True))
        assert not any(part.requires_grad for part in found)
    torch.testing.assert_close(bank(texts_of())[place], normalize(texts_of() @ weight + bias, dim=1), **ORDER)


def test_a_hidden_layer_is_no_linear_map():
    bank = bank_of(hidden=5)
    with pytest.raises(ValueError, match="only linear connectors .* set hidden: null"):
        bank.fill(0, torch.zeros(WIDTH, 5), torch.zeros(5))
    with pytest.raises(ValueError, match="only linear connectors .* set hidden: null"):
        bank.linear(0)


@pytest.mark.parametrize("hidden", [None, 7])
def test_training_a_bank_is_training_its_connectors_apart(hidden):
    bank = bank_of(hidden).double()
    modules = [module.double() for module in apart(bank)]
    draw = torch.Generator().manual_seed(1)
    images = [normalize(torch.randn(32, size, generator=draw).double(), dim=1) for size in OUTPUTS]
    texts = texts_of(32).double()
    together = torch.optim.Adam(bank.parameters(), lr=1e-2)
    alone = [torch.optim.Adam(module.parameters(), lr=1e-2) for module in modules]
    start = [part.detach() for part in bank(texts)]
    for step in range(20):
        rows = torch.randperm(32, generator=torch.Generator().manual_seed(step))[:16]
        together.zero_grad()
        losses = [
            paired_contrastive(part, image[rows], 20.0)
            for part, image in zip(bank(texts[rows]), images, strict=True)
        ]
        torch.stack(losses).sum().backward()
        together.step()
        for module, optimiser, image in zip(modules, alone, images, strict=True):
            optimiser.zero_grad()
            paired_contrastive(normalize(module(texts[rows]), dim=1), image[rows], 20.0).backward()
            optimiser.step()
    for part, module, first in zip(bank(texts), modules, start, strict=True):
        # Double precision, through 20 steps of Adam, whose first divides rounding by rounding.
        torch.testing.assert_close(part, normalize(module(texts), dim=1), rtol=0, atol=1e-5)
        assert (part - first).abs().max() > 0.05


# --- a generator --------------------------------------------------------------------------------------------


def generator_of(code: str = "mean", outputs: tuple[int, ...] = OUTPUTS, **more) -> ConnectorGenerator:
    torch.manual_seed(0)
    return ConnectorGenerator(WIDTH, outputs, code=code, code_width=4, hidden=(7, 9), **more)


def means_of(outputs: tuple[int, ...] = OUTPUTS, size: float = 0.5) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [size * normalize(torch.randn(width, generator=draw), dim=0) for width in outputs]


@pytest.mark.parametrize("code", ["mean", "learned"])
def test_generated_connectors_have_the_widths_of_their_encoders(code):
    module = generator_of(code)
    codes = module.code(range(3), means_of())
    assert codes.shape == (3, 4)
    found = module(codes, range(3))
    assert [(weight.shape, bias.shape) for weight, bias in found] == [((WIDTH, z), (z,)) for z in OUTPUTS]


def test_some_encoders_in_any_order_get_what_they_get_among_all():
    for kind in ("mean", "learned"):
        module, means = generator_of(kind), means_of()
        whole = module(module.code(range(3), means), range(3))
        places = [2, 0]
        some = module(module.code(places, [means[place] for place in places]), places)
        for place, (weight, bias) in zip(places, some, strict=True):
            torch.testing.assert_close(weight, whole[place][0], **ORDER)
            torch.testing.assert_close(bias, whole[place][1], **ORDER)


def test_a_narrow_encoders_weights_are_the_first_columns_of_the_widest():
    module = generator_of()
    one_code = torch.randn(1, 4).repeat(3, 1)
    narrow, narrower, widest = module(one_code, range(3))
    assert widest[0].shape == (WIDTH, 8)
    for found, width in ((narrow, 5), (narrower, 3)):
        torch.testing.assert_close(found[0], widest[0][:, :width], **ORDER)
        torch.testing.assert_close(found[1], widest[1][:width], **ORDER)


def test_generated_weights_start_at_the_scale_of_their_number():
    torch.manual_seed(0)
    width, widest = 40, 64
    module = ConnectorGenerator(width, (widest, 20))
    assert [layer.out_features for layer in module.generator.body if isinstance(layer, nn.Linear)] == [
        128,
        512,
    ]
    codes = torch.randn(1, 32)
    hidden = module.generator.body(codes)
    ((weight, bias),) = module(codes, [0])
    # The head's weights and biases are uniform in +-1 / sqrt(512): variance 1 / (3 * 512). A coefficient has
    # variance (|h|^2 + 1) / (3 * 512), and is brought to the number of all weights, or biases, to the -1/2.
    coefficient = math.sqrt((hidden.square().sum().item() + 1) / (3 * 512))
    assert weight.std().item() == pytest.approx(
        coefficient * (width * widest) ** -0.5, rel=0.05
    )  # 2,560 of them
    assert bias.std().item() == pytest.approx(coefficient * widest**-0.5, rel=0.3)  # 64 of them


def test_generated_weights_are_the_heads_coefficients_over_the_root_of_their_number():
    module = generator_of()
    codes = torch.randn(2, 4)
    coefficients = module.generator.head(module.generator.body(codes))
    weight, bias = module(codes, [2, 2])[1]
    torch.testing.assert_close(
        weight, coefficients[1, : WIDTH * 8].view(WIDTH, 8) / math.sqrt(WIDTH * 8), **ORDER
    )
    torch.testing.assert_close(bias, coefficients[1, WIDTH * 8 :] / math.sqrt(8), **ORDER)


def test_a_mean_is_filled_with_zeros_up_to_the_widest():
    module, means = generator_of(), means_of()
    codes = module.code(range(3), means)
    for place, mean in enumerate(means):
        filled = torch.zeros(8)
        filled[: len(mean)] = mean
        torch.testing.assert_close(codes[place], module.enter.weight @ filled + module.enter.bias, **ORDER)


def test_means_in_double_precision_as_moments_give_them_are_codes_too():
    module = generator_of()
    codes = module.code(range(3), [mean.double() for mean in means_of()])
    torch.testing.assert_close(codes, module.code(range(3), means_of()), **ORDER)


def test_a_learned_code_is_a_row_of_its_own_and_reads_no_means():
    module = generator_of("learned")
    assert torch.equal(module.code([2, 0], []), module.codes.weight[[2, 0]])
    assert module.enter is None
    assert generator_of("mean").codes is None
    with pytest.raises(Exception, match="(?i)type-check"):
        generator_of("other")


def test_encoders_whose_features_are_centred_all_get_one_connector():
    # The failure mode of mean codes: without means nothing tells encoders apart. Means of 1e-4 are what 1,000
    # rows of unit features leave over.
    module = generator_of(outputs=(8, 8, 8))
    centred = module(module.code(range(3), means_of((8, 8, 8), size=1e-4)), range(3))
    apart = module(module.code(range(3), means_of((8, 8, 8))), range(3))

    def spread(found: list) -> float:
        weights = torch.stack([weight for weight, _ in found])
        return ((weights - weights.mean(0)).norm() / weights.norm()).item()

    assert spread(centred) < 1e-5
    assert spread(apart) > 1e-3
    learned = generator_of("learned", outputs=(8, 8, 8))
    assert spread(learned(learned.code(range(3), []), range(3))) > 1e-2


@pytest.mark.parametrize("code", ["mean", "learned"])
def test_the_loss_of_a_connector_reaches_every_layer_and_no_column_beyond_its_width(code):
    module = generator_of(code)
    ((weight, bias),) = module(module.code([1], means_of()[1:2]), [1])
    (weight.square().sum() + bias.sum()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    # Encoder 1 has 3 of 8 columns: the head's rows of the other 5 are not touched.
    rows = module.generator.head.weight.grad[: WIDTH * 8].view(WIDTH, 8, -1)
    assert (rows[:, 3:] == 0).all()
    assert (rows[:, :3] != 0).any(-1).all()
    if code == "learned":
        assert (module.codes.weight.grad[[0, 2]] == 0).all()


def test_a_generator_learns_a_connector_for_each_of_two_encoders():
    module = generator_of("learned", (4, 4))
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    draw, texts, losses = torch.Generator().manual_seed(0), texts_of(40), []
    images = [normalize(texts @ torch.randn(WIDTH, 4, generator=draw), dim=1) for _ in range(2)]
    for _ in range(20):
        weights = module(module.code(range(2), []), range(2))
        mapped = [normalize(texts @ weight + bias, dim=1) for weight, bias in weights]
        loss = sum(paired_contrastive(*two, 10.0) for two in zip(mapped, images, strict=True))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


# --- sums by parts ------------------------------------------------------------------------------------------


def parts_of(module: nn.Module, count: int) -> list[Callable[[], torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 5, WIDTH, generator=draw)
    return [
        lambda own=own, power=power: (module(own) ** (power + 2)).mean() for power, own in enumerate(inputs)
    ]


def gradients_of(module: nn.Module, value: torch.Tensor) -> list[torch.Tensor | None]:
    module.zero_grad()
    (3 * value).backward()
    return [parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_sum_by_parts_is_the_plain_sum_in_value_and_gradients(count):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 2))
    parts = parts_of(module, count)
    by_parts, plain = sum_by_parts(parts, module), sum(part() for part in parts)
    torch.testing.assert_close(by_parts, plain)
    for one, other in zip(gradients_of(module, by_parts), gradients_of(module, plain), strict=True):
        torch.testing.assert_close(one, other, **ORDER)


def test_the_activations_of_two_parts_never_live_together():
    module = nn.Linear(WIDTH, 4)
    alive, most = [0], []

    def part() -> torch.Tensor:
        def keep(tensor: torch.Tensor) -> Kept:
            return Kept(tensor, alive)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
            value = module(torch.randn(5, WIDTH)).tanh().square().sum()
        most.append(alive[0])
        return value

    sum_by_parts([part] * 4, module).backward()
    assert most == [most[0]] * 4
    most.clear()
    sum(one() for one in [part] * 4).backward()
    assert most[-1] == 4 * most[0]


class Kept:
    """A tensor kept for the backward pass, counted while it lives."""

    def __init__(self, tensor: torch.Tensor, alive: list[int]):
        self.tensor, self.alive = tensor, alive
        alive[0] += 1

    def __del__(self):
        self.alive[0] -= 1


def test_what_no_part_uses_or_is_frozen_gets_no_gradient_as_in_a_plain_sum():
    module = nn.ModuleList([nn.Linear(WIDTH, 1) for _ in range(4)])
    module[3].requires_grad_(False)
    parts = [
        lambda: module[0](texts_of()).sum(),
        lambda: (module[1](texts_of()) + module[3](texts_of())).sum(),
    ]
    by_parts = gradients_of(module, sum_by_parts(parts, module))
    assert [grad is None for grad in by_parts] == [False] * 4 + [True] * 4
    plain = gradients_of(module, sum(part() for part in parts))
    for one, other in zip(by_parts, plain, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **ORDER)


def test_the_parts_are_computed_once_each_and_in_order():
    module, calls = nn.Linear(1, 1), []

    def part(number: int) -> torch.Tensor:
        calls.append(number)
        return module.weight.sum() * number

    total = sum_by_parts([lambda number=number: part(number) for number in (1, 2, 4)], module)
    assert calls == [1, 2, 4]
    total.backward()
    assert calls == [1, 2, 4]
    # d/dw (1 + 2 + 4) w
    assert module.weight.grad.item() == 7


@pytest.mark.parametrize("hidden", [None, 4])
def test_a_bank_by_parts_has_the_gradients_of_the_whole_bank(hidden):
    bank, draw = bank_of(hidden), torch.Generator().manual_seed(5)
    images = [normalize(torch.randn(9, size, generator=draw), dim=1) for size in OUTPUTS]

    def loss(places: range) -> torch.Tensor:
        mapped = bank(texts_of(), places)
        return sum(paired_contrastive(one, images[place]) for place, one in zip(places, mapped, strict=True))

    whole = loss(range(3))
    by_parts = sum_by_parts([lambda: loss(range(2)), lambda: loss(range(2, 3))], bank)
    torch.testing.assert_close(by_parts, whole, **ORDER)
    for one, other in zip(gradients_of(bank, by_parts), gradients_of(bank, whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

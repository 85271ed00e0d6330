"""Modules that take and return more than a tensor: under one condition, in groups, and rows in any order."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import BertConfig, BertModel

from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec, Table

CODE, CONDITIONS, MEMBERS, LENGTH, WIDTH = 5, 3, 4, 6, 8


class TwoOutputs(nn.Module):
    """Takes two inputs, a tensor for all, a number and a dict; gives two outputs and a constant."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, 7), nn.Linear(7, 2)

    def forward(self, inputs, other, shared=None, *, scale=1.0, extra=None):
        hidden = torch.tanh(self.enter(inputs) + other + (0 if shared is None else shared))
        if extra is not None:
            hidden = hidden * extra["gate"][0]
        return scale * self.leave(hidden), {"hidden": hidden, "none": None}


def model_of(target, **more):
    spec = ParamSpec.of(target, "*.weight", rank=2)
    return Conditioned(target, MLPGenerator(CODE, spec, (12,), unit=True), **more).eval()


def each(model, weights, place, *arguments, **keywords):
    """One condition's output by torch alone."""
    own = {name: one[place] for name, one in model.parameters_of(weights).items()}
    return functional_call(model.target, own, arguments, keywords)


@pytest.fixture
def codes():
    torch.manual_seed(0)
    return torch.randn(CONDITIONS, CODE)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_further_arguments_go_with_their_rows_and_others_to_all(codes, one_by_one):
    model = model_of(TwoOutputs(), one_by_one=one_by_one)
    weights = model.weights(codes)
    inputs, other = torch.randn(CONDITIONS, MEMBERS, WIDTH), torch.randn(CONDITIONS, MEMBERS, 7)
    gate, shared = torch.rand(CONDITIONS, MEMBERS, 1), torch.randn(7)
    together = model(inputs, weights, None, other, shared, scale=2.0, extra={"gate": [gate]})
    expected = [
        each(model, weights, u, inputs[u], other[u], shared, scale=2.0, extra={"gate": [gate[u]]})
        for u in range(CONDITIONS)
    ]
    order = torch.randperm(CONDITIONS * MEMBERS)
    rows = torch.arange(CONDITIONS).repeat_interleave(MEMBERS)[order]
    flat = [one.flatten(0, 1)[order] for one in (inputs, other, gate)]
    by_row = model(flat[0], weights, rows, flat[1], shared, scale=2.0, extra={"gate": [flat[2]]})
    # Batched and single products differ in the order they add up.
    near = {"rtol": 1e-4, "atol": 1e-5}
    for pick in (lambda found: found[0], lambda found: found[1]["hidden"]):
        each_one = torch.stack([pick(one) for one in expected])
        torch.testing.assert_close(pick(together), each_one, **near)
        torch.testing.assert_close(pick(by_row), each_one.flatten(0, 1)[order], **near)
    assert together[1]["none"] is by_row[1]["none"] is None
    alone = model(inputs[1], model.weights(codes[1:2]), None, other[1], shared, scale=2.0)
    torch.testing.assert_close(alone[0], each(model, weights, 1, inputs[1], other[1], shared, scale=2.0)[0])


def bert(**more):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=LENGTH, attn_implementation="eager", **more,
    )  # fmt: skip
    return BertModel(config).eval()


def texts():
    ids = torch.randint(20, (CONDITIONS, MEMBERS, LENGTH), generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(CONDITIONS * MEMBERS).view(CONDITIONS, MEMBERS) % LENGTH + 1
    return ids, (torch.arange(LENGTH) < lengths[..., None]).long()


# A mask of tokens is looked at by value, which conditions together cannot; one added to scores is not.
@pytest.mark.parametrize(
    ("one_by_one", "form"),
    [
        (True, lambda mask: mask),
        (False, lambda mask: (1.0 - mask[..., None, None, :].float()) * -1e9),
    ],
)
def test_a_transformer_with_a_mask_equals_a_loop_over_plain_calls(codes, one_by_one, form):
    model = model_of(bert(), one_by_one=one_by_one)
    weights, (ids, mask) = model.weights(codes), texts()
    mask = form(mask)
    expected = [each(model, weights, u, ids[u], attention_mask=mask[u]) for u in range(CONDITIONS)]
    together = model(ids, weights, attention_mask=mask)
    order = torch.randperm(CONDITIONS * MEMBERS)
    rows = torch.arange(CONDITIONS).repeat_interleave(MEMBERS)[order]
    by_row = model(ids.flatten(0, 1)[order], weights, rows, attention_mask=mask.flatten(0, 1)[order])
    alone = model(ids[2], model.weights(codes[2:]), attention_mask=mask[2])
    assert type(together) is type(by_row) is type(expected[0])
    for name in ("last_hidden_state", "pooler_output"):
        each_one = torch.stack([one[name] for one in expected])
        # Batched and single products differ in the order they add up.
        torch.testing.assert_close(together[name], each_one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(by_row[name], each_one.flatten(0, 1)[order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[name], each_one[2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.pooler_output, model(ids, weights).pooler_output)


def test_gradients_reach_the_generator_through_a_transformer_by_rows(codes):
    model = model_of(bert(), one_by_one=True)
    ids, mask = (one.flatten(0, 1) for one in texts())
    rows = torch.arange(len(ids)) % CONDITIONS
    model(ids, model.weights(codes), rows, attention_mask=mask).pooler_output.square().sum().backward()
    assert all(one.grad.abs().sum() > 0 for one in model.generator.parameters())


def test_a_module_that_branches_on_values_is_told_what_to_do(codes):
    model, (ids, mask) = model_of(bert()), texts()
    with pytest.raises(
        ValueError, match=r"BertModel does what cannot .* Conditioned\(\.\.\., one_by_one=True\)"
    ):
        model(ids, model.weights(codes), attention_mask=mask)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_an_output_without_a_row_per_input_is_refused_by_rows_and_fine_in_groups(codes, one_by_one):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, 2)

        def forward(self, inputs):
            return self.layer(inputs), inputs.mean()

    model = model_of(Pooled(), one_by_one=one_by_one)
    weights, inputs = model.weights(codes), torch.randn(CONDITIONS, MEMBERS, WIDTH)
    assert model(inputs, weights)[1].shape == (CONDITIONS,)
    with pytest.raises(ValueError, match=r"output 1 of Pooled has shape \(\) for 4 inputs; with rows="):
        model(inputs.flatten(0, 1), weights, torch.arange(CONDITIONS).repeat_interleave(MEMBERS))


def test_an_output_that_is_no_tensor_is_refused_for_several_conditions():
    class Odd(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs), {inputs.shape[0]}

    target = Odd(WIDTH, 2)
    model = Conditioned(target, Table(2, ParamSpec.of(target)))
    with pytest.raises(ValueError, match="Odd gives back a set"):
        model(torch.randn(2, MEMBERS, WIDTH), model.weights(torch.arange(2)))
    assert model(torch.randn(MEMBERS, WIDTH), model.weights(torch.tensor([0])))[1] == {MEMBERS}


def test_health_takes_the_modules_further_arguments(codes):
    model, (ids, mask) = model_of(bert(), one_by_one=True), texts()
    with torch.no_grad():
        model.generator.head.weight.mul_(0.5)
    found = model.health(codes, ids[0], attention_mask=mask[0])
    assert found.verdict == "sound"
    outputs = [
        each(model, model.weights(codes), u, ids[0], attention_mask=mask[0]) for u in range(CONDITIONS)
    ]
    flat = [torch.cat([one.flatten() for one in pair.to_tuple()]) for pair in outputs]
    rows = torch.stack(flat).detach().double()
    expected = (rows - rows.mean(0)).square().mean().sqrt() / rows.square().mean().sqrt()
    assert found.output_spread == pytest.approx(float(expected), rel=1e-3)

"""HyperLSTM: one step by hand, an independent LSTM, starts, and rows that differ in what they say."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.families.histories import mean_loss
from workbench.errors import RecipeError
from workbench.families import hyperlstm
from workbench.families.hyperlstm import HyperLstm, LstmModel
from workbench.families.recurrent import Lstm, Normalise
from workbench.papers import load_recipe

TINY = {
    "name": "tiny", "paper": "hyperlstm", "title": "tiny", "seeds": [0], "data": {"name": "python-help"},
    "metric": "bits_per_character", "lower_is_better": True, "reference": "hyper", "steps": 20, "length": 6,
    "training": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2},
    "models": [{"name": "hyper", "kind": "hyper", "width": 8, "small": 4, "signal": 2}],
}  # fmt: skip


def recipe(**changes):
    return hyperlstm.RECIPE.model_validate_json(json.dumps({**TINY, **changes}))


def one(kind, norm=False, width=8):
    return LstmModel(name="one", kind=kind, norm=norm, width=width, small=4, signal=2)


def train(model, folder, steps=20):
    """Train without the long test text: the contract is about training."""
    settings = recipe(steps=steps)
    text, kinds = hyperlstm.load_data(settings).content
    short = torch.cat([text[:400], text[-hyperlstm.HELD_OUT :][: 32 * 8]])
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hyperlstm, "HELD_OUT", 32 * 8)
        return hyperlstm.measure(settings, (short, kinds), model, 0, folder)


def randomised(net):
    """Move every parameter away from its start, where much is constant."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return net


def test_the_main_lstm_agrees_with_torchs():
    torch.manual_seed(0)
    net, text = randomised(Lstm(5, 8, norm=False)), torch.randint(5, (3, 7))
    theirs = nn.LSTM(5, 8, batch_first=True)
    order = torch.cat([torch.arange(8) + 8 * gate for gate in (0, 2, 1, 3)])  # torch: i, f, j, o
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(net.inputs.weight.T[order])
        theirs.weight_hh_l0.copy_(net.recurrent.weight[order])
        theirs.bias_ih_l0.copy_(net.bias[order])
        theirs.bias_hh_l0.zero_()
        states, _ = theirs(functional.one_hot(text, 5).float())
        assert torch.allclose(net(text), net.read(states), atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
def test_one_step_of_the_hyper_lstm_by_hand(norm):
    torch.manual_seed(0)
    net = randomised(HyperLstm(5, one("hyper", norm)))
    state = tuple(torch.randn(2, size) for size in (8, 8, 4, 4))
    character = torch.tensor([1, 4])
    hidden, cell, small, small_cell = state
    made = net.small_inputs(character) + torch.cat([hidden, small], 1) @ net.small_recurrent.weight.T
    small, small_cell = net.small_cell(made + net.small_bias, small_cell)
    signals = (small @ net.embed.weight.T + net.embed.bias).view(2, 3, 4, 2)
    maps = net.generate.view(3, 4, 2, 8)
    gates = []
    for gate in range(4):
        of_state, of_input, shift = (signals[:, part, gate] @ maps[part, gate] for part in range(3))
        rows = slice(8 * gate, 8 * gate + 8)
        wide = of_state * (hidden @ net.recurrent.weight[rows].T)
        wide = wide + of_input * net.inputs.weight[character][:, rows] + shift + net.bias[rows]
        if norm:
            wide = functional.layer_norm(wide, (8,)) * net.cell.gates.scale[rows] + net.cell.gates.shift[rows]
        gates.append(wide)
    i, j, f, o = gates
    cell = f.sigmoid() * cell + i.sigmoid() * j.tanh()
    seen = functional.layer_norm(cell, (8,)) * net.cell.cell.scale + net.cell.cell.shift if norm else cell
    expected = o.sigmoid() * seen.tanh(), cell, small, small_cell
    found = net.step(net.inputs(character), state, character)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_the_hyper_lstm_starts_as_the_plain_one():
    torch.manual_seed(0)
    hyper = HyperLstm(5, one("hyper"))
    plain = Lstm(5, 8, norm=False)
    plain.load_state_dict(hyper.state_dict(), strict=False)
    text = torch.randint(5, (3, 9))
    assert torch.allclose(hyper(text), plain(text), atol=1e-5)


def test_with_layer_norm_every_scale_starts_at_a_tenth():
    net = HyperLstm(5, one("hyper", norm=True))
    scales = net.scales(torch.randn(3, 4))
    assert torch.allclose(scales[:, :2], torch.full((3, 2, 32), 0.1))
    assert (scales[:, 2] == 0).all()


def test_layer_norm_treats_each_gate_on_its_own():
    normal = Normalise(2, 3, active=True)
    found = normal(torch.tensor([[1.0, 2.0, 3.0, 100.0, 200.0, 300.0]]))
    # both gates are (-1, 0, 1) / sqrt(2 / 3), up to the 1e-5 in the root
    assert found[0].tolist() == pytest.approx([-1.2247, 0, 1.2247] * 2, abs=1e-3)
    assert Normalise(2, 3, active=False)(found) is found


def test_bits_of_a_uniform_guess_are_the_logarithm_of_the_alphabet():
    logits, text = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.long)
    assert float(hyperlstm.bits_per_character(logits, text)) == pytest.approx(math.log2(8))


def test_a_prediction_never_sees_the_character_it_predicts():
    net, text = randomised(HyperLstm(5, one("hyper"))), torch.randint(5, (1, 6))
    changed = text.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 5
    same = (net(text) - net(changed)).abs().amax(-1)[0] == 0
    assert same.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    "model", [one("lstm"), one("lstm", norm=True), one("hyper"), one("hyper", norm=True)]
)
def test_the_loss_falls_and_the_same_seed_gives_the_same_numbers(model, tmp_path):
    first = train(model, tmp_path / "a")
    assert first.values == train(model, tmp_path / "b").values
    longer = train(model, tmp_path / "c", 60)
    assert mean_loss(longer.about["history"]) < mean_loss(first.about["history"])


def test_a_longer_row_is_the_same_row_with_more_steps(tmp_path):
    longer = one("lstm").model_copy(update={"longer": 3})
    assert train(longer, tmp_path / "a").values == train(one("lstm"), tmp_path / "b", 60).values


def test_after_training_the_moment_moves_the_weights(tmp_path):
    about = train(one("hyper", norm=True), tmp_path, 60).about
    assert about["health"]["moved"] > 1e-2  # an untrained one has 0 for both, see below
    assert about["health"]["relative_spread"] > 1e-2
    assert about["cost"]["generated_parameters"] == 3 * 4 * 8
    plain = sum(part.numel() for part in Lstm(103, 8, norm=True).parameters())
    hyper = sum(part.numel() for part in HyperLstm(103, one("hyper", norm=True)).parameters())
    assert about["cost"]["generator_parameters"] == hyper - plain


def test_an_untrained_generator_is_reported():
    net = HyperLstm(5, one("hyper"))
    found = hyperlstm.card(net, torch.randint(5, (4, 60)))
    assert found["health"]["verdict"].startswith(
        "the generator did not train; conditions do not move the weights"
    )


def test_the_recipes_wider_row_has_at_least_the_hyper_lstms_weights():
    models = {model.name: model for model in load_recipe("family_hyperlstm").models}
    wide = sum(part.numel() for part in Lstm(103, models["ln_lstm_wider"].width, norm=True).parameters())
    hyper = sum(part.numel() for part in HyperLstm(103, models["ln_hyper"]).parameters())
    assert hyper <= wide <= 1.1 * hyper


def test_a_piece_of_no_characters_is_refused():
    with pytest.raises(RecipeError, match="length"):
        load_recipe("family_hyperlstm", {"length": 0})

"""A generated adapter is one that PEFT itself loads."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BertConfig, BertModel

from workbench.errors import DataError
from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec, save_peft
from workbench.hypernetworks.peft_files import CONFIG, WEIGHTS


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))


def test_peft_gives_the_same_outputs_under_each_condition(tmp_path):
    base, target, inputs = layers(), layers(), torch.randn(7, 6)
    model = Conditioned(target, MLPGenerator(5, ParamSpec.of(target, "*.weight", rank=3), (12,), unit=True))
    conditions = torch.randn(3, 5)
    weights = model.weights(conditions)
    for place in range(3):
        folder = save_peft(weights, tmp_path / str(place), place)
        loaded = PeftModel.from_pretrained(layers(), folder)
        expected = model(inputs, model.weights(conditions[place : place + 1]))
        torch.testing.assert_close(loaded(inputs), expected)
        assert not torch.allclose(loaded(inputs), base(inputs))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_gives_the_same_in_a_transformer_with_ranks_that_differ(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                        vocab_size=30)  # fmt: skip
    bert = BertModel(config).eval()
    queries, values = (ParamSpec.of(bert, f"*.{name}.weight", rank=rank).slots
                       for name, rank in (("query", 2), ("value", 4)))  # fmt: skip
    spec = ParamSpec((*queries, *values))
    plain = BertModel(config).eval()
    plain.load_state_dict(bert.state_dict())
    model = Conditioned(bert, MLPGenerator(5, spec, (12,), unit=True)).eval()
    condition = torch.randn(1, 5)
    folder = save_peft(model.weights(condition), tmp_path)
    ids = torch.randint(30, (2, 9))
    expected = model.freeze(condition[0])(ids).last_hidden_state
    found = PeftModel.from_pretrained(plain, folder).eval()(ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_files_name_what_peft_itself_would_write(tmp_path):
    from safetensors import safe_open

    theirs = get_peft_model(layers(), LoraConfig(r=3, lora_alpha=3, target_modules=["0", "2"]))
    theirs.save_pretrained(tmp_path / "theirs")
    spec = ParamSpec.of(layers(), "*.weight", rank=3)
    save_peft(MLPGenerator(5, spec, (12,))(torch.randn(1, 5)), tmp_path / "ours")
    keys = {}
    for side in ("theirs", "ours"):
        with safe_open(tmp_path / side / WEIGHTS, "pt") as file:
            keys[side] = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    assert keys["ours"] == keys["theirs"]
    known = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert set(json.loads((tmp_path / "ours" / CONFIG).read_text())) <= set(known)


@pytest.mark.parametrize(
    ("include", "adapted"),
    [("0.weight", {"0"}), (["0.weight", "1.0.0.weight"], {"0", "1.0.0"}), (["1.0.2.weight"], {"1.0.2"})],
)
def test_modules_whose_names_end_alike_are_told_apart(include, adapted, tmp_path):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    target = nn.Sequential(nn.Linear(6, 6), nn.Sequential(inner, nn.Linear(6, 6)), nn.Linear(6, 6))
    plain = copy.deepcopy(target)
    slots = ParamSpec.of(target, include, rank=2).slots
    # Ranks that differ, the shortest name first: an ending would give the second the first one's.
    spec = ParamSpec(tuple(replace(slot, rank=2 + place) for place, slot in enumerate(slots)))
    model, condition = Conditioned(target, MLPGenerator(5, spec, (12,))), torch.randn(1, 5)
    weights, inputs = model.weights(condition), torch.randn(7, 6)
    # Warnings are errors: PEFT warns of adapters without weights.
    loaded = PeftModel.from_pretrained(plain, save_peft(weights, tmp_path))
    layers = {name: one for name, one in plain.named_modules() if isinstance(one, LoraLayer)}
    assert set(layers) == adapted
    assert {name: one.r["default"] for name, one in layers.items()} == {
        slot.name: slot.rank for slot in spec.slots
    }
    torch.testing.assert_close(loaded(inputs), model(inputs, weights))


def test_what_an_adapter_cannot_hold_is_refused(tmp_path):
    weights = MLPGenerator(5, ParamSpec.of(layers(), rank=2), (12,))(torch.randn(2, 5))
    with pytest.raises(DataError, match=r"0\.bias, 2\.bias were generated whole"):
        save_peft(weights, tmp_path)
    weights = MLPGenerator(5, ParamSpec.of(layers(), "*.weight", rank=2), (12,))(torch.randn(2, 5))
    with pytest.raises(DataError, match="condition 2 of 2; give 0 to 1"):
        save_peft(weights, tmp_path, 2)
    assert not list(tmp_path.iterdir())

"""Adapters per domain: the layer is the encoder's own, adapters by hand, what is frozen stays frozen."""

import polars as pl
import pytest
import torch
from torch.nn import functional

from tests.families.histories import outcome_of_each
from workbench.errors import RecipeError
from workbench.families import domains
from workbench.families.domains import (
    Bottleneck,
    DomainModel,
    accuracy,
    adapted,
    costs,
    domains_of,
    embed,
    load_data,
    measure,
    swap,
    train,
)
from workbench.hypernetworks import Conditioned
from workbench.papers import load_recipe
from workbench.training import seed_everything

DOMAINS = {
    "kitchen": {"recipe": "cook {} for dinner", "calories": "how many calories are in {}"},
    "travel": {"book_flight": "book me a flight to {}", "weather": "is it raining in {} today"},
    "home": {"order": "please order {} for me", "reminder": "remind me about {} tonight"},
}
THINGS = ["rice", "paris", "milk", "the old town", "soup", "london", "bread"]
CHANGES = {"domains": ["kitchen", "travel"], "new": ["home"], "steps": 4, "examples": 4, "questions": 3}


@pytest.fixture(scope="module")
def content(encoder):
    rows = [
        {"text": pattern.format(thing), "intent": intent, "domain": domain, "place": place}
        for domain, intents in DOMAINS.items()
        for intent, pattern in intents.items()
        for place, thing in enumerate(THINGS)
    ]
    table = pl.DataFrame(rows)
    known = pl.col("place") < 4
    return domains_of(encoder, table.filter(known), table.filter(~known), [*DOMAINS])


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_domains", CHANGES)


def built(content, kind, seed=0, **settings):
    seed_everything(seed)
    model = DomainModel(name="own", kind=kind, width=4, **settings)
    return adapted(content.read[0], model, content.described.shape[1]).eval()


def test_the_unadapted_layer_ends_in_the_encoders_own_embeddings(content, encoder):
    rows = torch.arange(len(content.texts))
    with torch.no_grad():
        found = embed(content.read[0].eval(), content, 0, rows)
    torch.testing.assert_close(found, encoder.encode(content.texts), atol=1e-5, rtol=0)


def test_texts_are_numbered_by_domain_intent_and_split(content):
    assert content.train.shape == (3, 2, 4)
    assert content.test.shape == (3, 2, 3)
    # Domains in the order given, intents by name: book_flight before weather.
    assert content.texts[content.train[1, 0, 2]] == "book me a flight to milk"
    assert content.texts[content.test[0, 1, 0]] == "cook soup for dinner"
    assert content.about[1] == "travel: book flight, weather"
    every = torch.cat([content.train.flatten(), content.test.flatten()])
    assert every.sort().values.tolist() == [*range(len(content.texts))]


def test_a_bottleneck_by_hand():
    part = Bottleneck(2, 1)
    part.down.weight.data, part.up.weight.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [0.0]])
    part.up.bias.data = torch.tensor([0.0, 0.5])
    # x = (3, 1): down 2, gelu(2) = 2 * 0.97725 = 1.9545, up (3.909, 0.5): x + up.
    found = part(torch.tensor([[[3.0, 1.0]]]))
    torch.testing.assert_close(found, torch.tensor([[[6.909, 1.5]]]), atol=1e-4, rtol=0)


def test_zero_adapters_leave_the_layer_as_it_is(content):
    rows = torch.arange(6)
    plain = embed(built(content, "frozen"), content, 0, rows)
    for kind in ("bottleneck", "lora"):
        net = built(content, kind)
        net.generator.head.weight.data.zero_()
        torch.testing.assert_close(embed(net, content, 0, rows), plain, atol=1e-6, rtol=0)


def test_generated_factors_are_added_to_the_query_and_value_maps(content):
    net, rows = built(content, "lora"), torch.arange(6)
    found = embed(net, content, 0, rows)
    plain = built(content, "frozen")
    weights = net.weights(torch.zeros(1, dtype=torch.long))
    for name in ("query", "value"):
        slot = f"layer.attention.self.{name}"
        product = weights.tensors[f"{slot}.down"][0] @ weights.tensors[f"{slot}.up"][0]
        getattr(plain.layer.attention.self, name).weight.data += product.T.detach()
    torch.testing.assert_close(found, embed(plain, content, 0, rows), atol=1e-5, rtol=0)


def test_only_a_generated_adapter_reads_which_domain_it_is_in(content):
    rows = torch.arange(6)
    for settings, differs in ((("frozen", {}), False), (("bottleneck", {"of": "all"}), False),
                              (("bottleneck", {"of": "text"}), True)):  # fmt: skip
        net = built(content, settings[0], **settings[1])
        with torch.no_grad():
            one, two = embed(net, content, 0, rows), embed(net, content, 1, rows)
        assert torch.allclose(one, two, atol=1e-6) != differs


def test_accuracy_is_that_of_the_nearest_mean(content):
    net = built(content, "frozen")
    texts = functional.normalize(content.encoder.encode(content.texts), dim=-1)
    right = 0
    for intent in range(2):
        for row in content.test[2, intent]:
            means = [functional.normalize(texts[own].mean(0), dim=0) for own in content.train[2]]
            right += int(torch.stack([texts[row] @ mean for mean in means]).argmax()) == intent
    assert accuracy(net, content, 2) == pytest.approx(right / 6)


def test_training_moves_the_adapters_and_nothing_else(recipe, content, tmp_path):
    for of in ("domain", "text"):
        net = built(content, "bottleneck", of=of)
        before = {name: one.detach().clone() for name, one in net.named_parameters()}
        model = DomainModel(name="own", kind="bottleneck", of=of)
        (tmp_path / of).mkdir()
        train(net, recipe, content, model, [0, 1], 0, tmp_path / of)
        for name, one in net.named_parameters():
            assert torch.equal(one, before[name]) == name.startswith("target."), name
    assert isinstance(net, Conditioned)


@pytest.fixture(scope="module")
def outcomes(recipe, content, tmp_path_factory):
    return outcome_of_each(measure, recipe, content, tmp_path_factory.mktemp)


def test_a_few_steps_lower_the_loss(content, recipe, tmp_path):
    long, found = recipe.model_copy(update={"steps": 10}), {}
    for rate in (3e-4, 1e-12):
        seed_everything(0)
        model = DomainModel(name="own", kind="full", learning_rate=rate)
        (tmp_path / str(rate)).mkdir()
        history = train(built(content, "full"), long, content, model, [0, 1], 0, tmp_path / str(rate))
        found[rate] = sum(one["loss"] for one in history[5:])  # of the same texts at both rates
    assert found[3e-4] < found[1e-12] / 2


def test_rows_count_what_a_domain_has_of_its_own(content, outcomes):
    full = sum(one.numel() for one in content.read[0].parameters())
    assert outcomes["full"].values["share_of_full"] == 1
    assert outcomes["full"].values["swap_bytes"] == 4 * full
    assert outcomes["shared"].values["swap_bytes"] == 0
    # Rank 4 on two maps of 384 x 384: 2 maps x 2 factors x 384 x 4 numbers.
    lora = costs(built(content, "lora"), DomainModel(name="own", kind="lora", width=4), full)
    assert lora["share_of_full"] == pytest.approx(2 * 2 * 384 * 4 / full)
    # Width 4 after both halves of the layer: two of 384 x 4 + 4 and 4 x 384 + 384.
    model = DomainModel(name="own", kind="bottleneck", width=4)
    assert costs(built(content, "bottleneck"), model, full)["swap_bytes"] == 4 * 2 * (2 * 384 * 4 + 4 + 384)
    generated = outcomes["generated"].values
    assert generated["swap_bytes"] == 4 * 384
    assert generated["swap_operations"] > generated["share_of_full"] == 0
    assert outcomes["generated"].about["health"]["verdict"] == "sound"


@pytest.mark.parametrize("kind", ["full", "bottleneck", "lora"])
def test_a_swap_brings_a_domains_own_numbers_back(content, kind):
    net, rows = built(content, kind), torch.arange(6)
    model = DomainModel(name="own", kind=kind, width=4)
    with torch.no_grad():
        before, action = embed(net, content, 0, rows), swap(net, content, model)
        for one in net.parameters() if kind == "full" else net.generator.parameters():
            one.mul_(1.5).add_(0.01)
        assert not torch.allclose(embed(net, content, 0, rows), before, atol=1e-3)
        action()
        assert torch.equal(embed(net, content, 0, rows), before)


def test_a_swap_is_timed_by_its_median_after_the_warm_up_and_costs_nothing_where_nothing_changes(
    content, outcomes, monkeypatch
):
    seconds = {name: found.about["swap_seconds"] for name, found in outcomes.items()}
    assert seconds["frozen"] == seconds["shared"] == 0
    assert all(0 < seconds[name] < 1 for name in ("full", "bottleneck", "lora", "generated"))
    assert "swap_seconds" not in outcomes["full"].values
    # Five slow changes, then 25 of one second and 25 of three: the median is two.
    took = iter([9.0] * domains.WARM + [1.0, 3.0] * (domains.SWAPS // 2))
    ticks = iter([tick for one in took for tick in (0.0, one)])
    monkeypatch.setattr(domains.time, "perf_counter", lambda: next(ticks))
    model = DomainModel(name="own", kind="lora", width=4)
    assert domains.swap_seconds(built(content, "lora"), content, model) == 2


def test_cards_say_how_the_texts_of_the_last_domain_lie(outcomes, content):
    for found in outcomes.values():
        lie = found.about["geometry"]
        assert lie["rows"] == content.test[0].numel()
        assert lie["positives"] == len(content.test[0])  # two texts of each intent
        assert 0 < lie["alignment"] < 4
        assert -8 < lie["uniformity"] < 0


def test_only_what_can_serve_a_new_domain_is_measured_there(outcomes):
    there = {name for name, found in outcomes.items() if "accuracy_new" in found.values}
    assert there == {"frozen", "shared", "generated"}


def test_the_same_seed_gives_the_same_numbers(recipe, content, outcomes, tmp_path):
    model = next(model for model in recipe.models if model.name == "generated")
    seed_everything(0)
    assert measure(recipe, content, model, 0, tmp_path).values == outcomes["generated"].values


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "full", "of": "all"}, "kind full is not shared or generated"),
        ({"kind": "bottleneck", "of": "image"}, "models.0.of"),
        ({"kind": "lora", "width": 0}, "models.0.width"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("family_domains", {"models": [{"name": "wrong", **change}], "reference": "wrong"})


def test_the_prepared_set_is_read(prepared):
    prepared("clinc150")
    recipe = load_recipe("family_domains")
    names = len(recipe.domains) + len(recipe.new)
    loaded = load_data(recipe)
    assert loaded.content.train.shape == (names, 15, recipe.examples)
    assert loaded.content.test.shape == (names, 15, recipe.questions)

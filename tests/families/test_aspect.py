"""The demonstration family: which aspect is asked decides what is the same."""

import pytest
import torch

from workbench.families.aspect import (
    ATTRIBUTES,
    CLASSES,
    EXAMPLES,
    HELD_OUT,
    NOISE,
    QUESTIONS,
    VALUES,
    WIDTH,
    AspectModel,
    AspectNet,
    ReadExamples,
    episodes,
    load_data,
    measure,
    prototypes,
)
from workbench.papers import load_recipe

SMALL = {"steps": 40, "test_episodes": 20}


@pytest.fixture(scope="module")
def content():
    return load_data(load_recipe("family_aspect")).content


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def values_of(inputs, content):
    """Turn inputs back and name the nearest value of every attribute."""
    values, rotation = content
    parts = (inputs @ rotation.T).unflatten(-1, (ATTRIBUTES, WIDTH))
    return torch.stack(
        [torch.cdist(parts[..., one, :], values[one]).argmin(-1) for one in range(ATTRIBUTES)], -1
    )


@pytest.mark.parametrize("held_out", [True, False])
def test_a_class_shares_the_asked_attribute_and_no_other(content, held_out):
    examples, questions, of = episodes(content, 50, draw(), held_out=held_out)
    found = values_of(torch.cat([
        examples.unflatten(1, (CLASSES, EXAMPLES)), questions.unflatten(1, (CLASSES, QUESTIONS))
    ], 2), content)  # fmt: skip
    asked = torch.gather(found, 3, of[:, None, None, None].expand(-1, CLASSES, EXAMPLES + QUESTIONS, 1))[
        ..., 0
    ]
    # Values are some 3.5 apart and the noise of a part is 0.3 sqrt(6) = 0.7: few are read wrongly.
    mode = asked.mode(2, keepdim=True).values
    assert (asked == mode).float().mean() > 0.98
    assert ((mode >= VALUES - HELD_OUT) == held_out).float().mean() > 0.98
    others = found[torch.arange(50), :, :, (of + 1) % ATTRIBUTES]
    assert (others == others[:, :, :1]).float().mean() < 0.25


def test_noise_is_as_large_as_it_says(content):
    values, rotation = content
    examples, _, _ = episodes(content, 200, draw(), held_out=False)
    nearest = values_of(examples, content)
    clean = values[torch.arange(ATTRIBUTES), nearest].flatten(2)
    # Choosing the nearest value shrinks it a little.
    assert (examples @ rotation.T - clean).std().item() == pytest.approx(NOISE, rel=0.1)


def test_the_order_of_examples_within_a_class_changes_no_condition(content):
    torch.manual_seed(0)
    reader = ReadExamples()
    examples, _, _ = episodes(content, 3, draw(), held_out=False)
    turned = examples.unflatten(1, (CLASSES, EXAMPLES)).flip(2).flip(1).flatten(1, 2)
    torch.testing.assert_close(reader(examples), reader(turned))


def test_prototypes_are_class_means():
    embedded = torch.arange(CLASSES * EXAMPLES).float()[None, :, None]
    # Three examples 0, 1, 2 of the first class have mean 1, of the second 3, 4, 5 mean 4.
    assert prototypes(embedded)[0, :2, 0].tolist() == [1.0, 4.0]


@pytest.mark.parametrize(
    ("settings", "generated"),
    [
        ({"kind": "shift"}, ["0.bias"]),
        ({"kind": "matrix"}, ["0.weight"]),
        ({"kind": "matrix", "rank": 4}, ["0"]),
        ({"kind": "matrix", "reads": "name"}, ["0.weight"]),
    ],
)
def test_a_row_generates_what_it_says_and_another_condition_other_weights(content, settings, generated):
    torch.manual_seed(0)
    net = AspectNet(AspectModel(name="x", **settings))
    assert [slot.name for slot in net.embed.spec.slots] == generated
    examples, questions, of = episodes(content, 8, draw(), held_out=False)
    of = torch.arange(8) % ATTRIBUTES
    weights = net.embed.weights(net.conditions(examples, of))
    assert weights.distances(generated[0])[0, 1] > 0
    net(examples, questions, of).sum().backward()
    assert net.embed.generator.head.weight.grad.abs().sum() > 0


def test_the_network_that_reads_both_is_told_the_condition_and_has_as_many_parameters(content):
    torch.manual_seed(0)
    both, full = (AspectNet(AspectModel(name="x", kind=kind)) for kind in ("concat", "matrix"))
    counts = [sum(one.numel() for one in net.parameters()) for net in (both, full)]
    assert counts[0] == pytest.approx(counts[1], rel=0.1)
    examples, questions, of = episodes(content, 4, draw(), held_out=False)
    torch.manual_seed(0)
    named = AspectNet(AspectModel(name="x", kind="concat", reads="name"))
    assert not torch.equal(named(examples, questions, of), named(examples, questions, (of + 1) % ATTRIBUTES))


def test_nothing_generated_is_told_nothing(content):
    net = AspectNet(AspectModel(name="none", kind="none"))
    examples, questions, of = episodes(content, 4, draw(), held_out=False)
    assert torch.equal(net(examples, questions, of), net(examples, questions, (of + 1) % ATTRIBUTES))


def test_training_learns_repeats_by_its_seed_and_reports_what_it_is(content, tmp_path):
    recipe = load_recipe("family_aspect", SMALL)
    model = next(one for one in recipe.models if one.name == "full_from_name")
    outcomes = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(seed)
        outcomes.append(measure(recipe, content, model, seed, tmp_path / str(number)))
    first, again, other = (one.values["accuracy"] for one in outcomes)
    assert first == again
    assert first != other
    assert first > 0.35  # chance is 0.25; 640 questions, so a standard error of 0.02
    assert outcomes[0].count == 20 * CLASSES * QUESTIONS
    assert outcomes[0].about["health"]["verdict"] == "sound"

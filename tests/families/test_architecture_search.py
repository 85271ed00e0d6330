"""One-shot architecture search: the network of every architecture by hand, rankings and their regret."""

import json

import pytest
import torch
from scipy.stats import spearmanr

from tests.families.histories import mean_loss
from workbench.errors import RecipeError
from workbench.families import architecture_search as search
from workbench.families import architectures as space
from workbench.families.architecture_search import Scored, SearchModel
from workbench.families.architectures import EveryArchitecture, architectures
from workbench.papers import load_recipe

TINY = {
    "name": "tiny", "paper": "architecture_search", "title": "tiny", "seeds": [0], "data": {"name": "digits"},
    "metric": "spearman", "reference": "hyper", "candidates": 6, "steps": 20, "alone_steps": 20,
    "alone_rate": 0.02, "short_steps": 3,
    "training": {"epochs": 1, "batch_size": 4, "learning_rate": 3e-3},
    "models": [{"name": "hyper", "kind": "generated"}],
}  # fmt: skip


def recipe(**changes):
    return search.RECIPE.model_validate_json(json.dumps({**TINY, **changes}))


def code_of(*layers):
    """Lay out layers of (width, activation, skip); activations are 0 ReLU, 1 tanh, 2 none."""
    bits = torch.zeros(1, space.LAYERS, space.PER_LAYER)
    for number, (width, activation, skip) in enumerate(layers):
        bits[0, number, space.WIDTHS.index(width)] = 1
        bits[0, number, 4 + activation] = 1
        bits[0, number, 7] = skip
    return bits.flatten(1)


def run(kind, folder, settings=None):
    settings = settings or recipe()
    torch.manual_seed(0)
    model = SearchModel(name="one", kind=kind)
    return search.measure(settings, search.load_data(settings).content, model, 0, folder)


def test_the_bits_of_an_architecture_say_which_units_activation_and_skip_act():
    torch.manual_seed(0)
    net, images = EveryArchitecture(), torch.randn(3, 64)
    code = code_of((8, 1, 0), (2, 2, 1), (32, 0, 0), (4, 1, 1))
    found = net(space.beside(images, code))[0]
    one, two, three, four = net.layers
    hidden = torch.tanh(one(images)) * (torch.arange(32) < 8)
    hidden = two(hidden) * (torch.arange(32) < 2) + hidden
    hidden = torch.relu(three(hidden))
    hidden = torch.tanh(four(hidden)) * (torch.arange(32) < 4) + hidden
    assert torch.allclose(found, net.head(hidden), atol=1e-6)


def test_every_drawn_architecture_has_one_width_and_one_activation_and_no_first_skip():
    codes = architectures(50, torch.Generator().manual_seed(1)).unflatten(1, (4, 8))
    assert (codes[..., :4].sum(-1) == 1).all()
    assert (codes[..., 4:7].sum(-1) == 1).all()
    assert (codes[:, 0, 7] == 0).all()
    assert codes[:, 1:, 7].unique().tolist() == [0, 1]


def test_weights_are_counted_as_a_narrow_network_without_skips_has_them():
    code = code_of((8, 0, 0), (2, 0, 0), (4, 0, 0), (32, 0, 0))
    # 64 x 8 + 8, 8 x 2 + 2, 2 x 4 + 4, 4 x 32 + 32, 32 x 10 + 10
    assert space.weights_of(code).tolist() == [520 + 18 + 12 + 160 + 330]
    # a skip around the second layer keeps 8 units alive: its successor reads 8 in place of 2
    skip = code_of((8, 0, 0), (2, 0, 1), (4, 0, 0), (32, 0, 0))
    assert space.weights_of(skip).tolist() == [520 + 18 + 36 + 160 + 330]


def test_regret_is_what_the_first_five_lose_to_the_best_five():
    scores = torch.tensor([6.0, 5, 4, 3, 2, 1])
    truth = torch.tensor([0.5, 0.9, 0.5, 0.5, 0.6, 1.0])
    found = search.chosen(scores, truth)
    # the five have mean 3 / 5 and best 0.9; the best five have mean 3.5 / 5 and best 1; all six 4 / 6
    assert found["regret"] == pytest.approx(0.1)
    assert found["best_of_five_regret"] == pytest.approx(0.1)
    assert found["regret_of_chance"] == pytest.approx(0.7 - 4 / 6)
    assert search.chosen(truth, truth)["regret"] == 0


def test_the_correlation_agrees_with_scipy(tmp_path):
    found = run("short", tmp_path)
    scores, truth = found.curves["score_against_truth"]
    assert found.values["spearman"] == pytest.approx(spearmanr(scores, truth).statistic)


def test_the_generator_never_sees_a_candidate(tmp_path, monkeypatch):
    settings = recipe()
    digits, seen = search.load_data(settings).content, []
    own = Scored.forward

    def spy(self, images, codes):
        seen.append(codes)
        return own(self, images, codes)

    monkeypatch.setattr(Scored, "forward", spy)
    # candidates are what the first steps would draw
    drawn = architectures(4, torch.Generator().manual_seed(0))
    digits = digits._replace(candidates=torch.cat([drawn, digits.candidates[:2]]))
    search.train(settings, digits, SearchModel(name="one", kind="generated"), 0, tmp_path)
    known = {tuple(code) for code in digits.candidates.tolist()}
    assert len(seen) == 20
    assert not known & {tuple(code) for codes in seen for code in codes.tolist()}


@pytest.mark.parametrize("kind", ["generated", "sharing", "retrain"])
def test_the_loss_falls_and_the_same_seed_gives_the_same_numbers(kind, tmp_path):
    settings, found = recipe(), []
    for name in ("a", "b"):
        torch.manual_seed(0)
        data = search.load_data(settings).content
        found.append(search.train(settings, data, SearchModel(name="one", kind=kind), 0, tmp_path / name))
    (one, first), (two, second) = found
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    torch.manual_seed(0)
    longer = recipe(steps=60, alone_steps=60)
    _, after = search.train(longer, data, SearchModel(name="one", kind=kind), 0, tmp_path / "c")
    assert mean_loss(after) < mean_loss(first)  # alone counted once per candidate


def test_candidates_trained_alone_share_nothing():
    net, codes = Scored("retrain", 3), architectures(3, torch.Generator().manual_seed(0))
    net(torch.randn(2, 64), codes)[1].sum().backward()
    rows = net.network.generator.head.weight.grad.abs().sum(1)
    assert (rows > 0).tolist() == [False, True, False]


def test_the_gradient_reaches_the_generator_and_another_architecture_gives_other_weights():
    net, codes = Scored("generated", 3), architectures(3, torch.Generator().manual_seed(0))
    net(torch.randn(2, 64), codes).sum().backward()
    assert net.network.generator.head.weight.grad.abs().sum() > 0
    assert (net.network.weights(codes).distances("head.weight").fill_diagonal_(1) > 0).all()


def test_the_card_reports_the_generator_and_size_trains_nothing(tmp_path):
    about = run("generated", tmp_path / "a").about
    assert about["cost"]["generated_parameters"] == 64 * 32 + 32 + 3 * (32 * 32 + 32) + 32 * 10 + 10
    assert about["health"]["verdict"] == "sound"
    assert run("size", tmp_path / "b").about == {"parameters": 0}


def test_fewer_candidates_than_are_trusted_are_refused():
    with pytest.raises(RecipeError, match="candidates"):
        load_recipe("family_architecture_search", {"candidates": 5})

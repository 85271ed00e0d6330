"""Losses for matching pairs: their equations, which pairs are negatives, closed forms, and the rows."""

import math

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity
from torch.nn import functional

from tests.families.histories import mean_loss
from workbench.datasets.digits import load_digits
from workbench.errors import RecipeError
from workbench.families import objectives
from workbench.families.objectives import (
    STRENGTH,
    ObjectiveModel,
    Towers,
    closed_form,
    load_data,
    loss_of,
    measure,
    recall,
    triplets,
)
from workbench.families.views import DIGITS, Views
from workbench.papers import load_recipe
from workbench.training import seed_everything

CHANGES = {"training": {"epochs": 2, "batch_size": 32, "learning_rate": 3e-2}, "short": 1}
LOSSES = ("softmax", "sigmoid", "margin", "ratio")


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_objectives", CHANGES)


@pytest.fixture(scope="module")
def views(recipe):
    return load_data(recipe).content


def model_of(kind: str, **settings) -> ObjectiveModel:
    return ObjectiveModel(name="own", kind=kind, **settings)


def units(count: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, 16, generator=draw), dim=-1)


def test_the_two_views_are_even_and_odd_columns_and_no_digit_is_in_two_splits(recipe, views):
    content = [load_data(load_recipe("family_objectives", {"split": split})) for split in ("valid", "test")]
    assert [one.counts for one in content] == [
        {"train": {"digits": DIGITS}, "valid": {"digits": 273}},
        {"train": {"digits": DIGITS}, "test": {"digits": 500}},
    ]
    parts = [views.train, content[0].content.asked, views.asked]
    # Columns 0, 1, 2, ... again.
    whole = torch.cat([torch.stack((even[:, 0], odd), -1).flatten(1) for even, odd in parts])
    digits = load_digits().inputs
    assert torch.equal(whole, torch.cat([digits["train"], digits["test"]]))


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_follows_its_equation(kind, views):
    net, x, y = Towers(views, 16, -3.0), units(5, 0), units(5, 1)
    with torch.no_grad():
        net.log_scale.fill_(math.log(4.0))
    cosine = (x.double() @ y.double().T).numpy()
    far = [np.linalg.norm(a.double()[:, None] - b.double()[None], axis=-1) for a, b in ((x, y), (y, x))]
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        if kind == "softmax":
            for line in (cosine[i], cosine[:, i]):
                total -= math.log(math.exp(4 * line[i]) / sum(math.exp(4 * one) for one in line)) / 2
        elif kind == "sigmoid":
            for j in range(5):
                odds = 4 * cosine[i, j] - 3
                total += math.log1p(math.exp(-odds if i == j else odds))
        else:
            for one in far:
                hinge = [max(0, one[i, i] ** 2 - one[i, j] ** 2 + 0.5) for j in others]
                share = [1 / (1 + math.exp(4 * (one[i, j] - one[i, i]))) ** 2 for j in others]
                total += np.mean(hinge if kind == "margin" else share) / 2
    # Single precision; the distance of the ratio adds 1e-6 to every difference.
    assert loss_of(kind, net, x, y).item() == pytest.approx(total / 5, rel=1e-4)


@pytest.mark.parametrize(("count", "negatives"), [(2, 1), (32, 31), (40, 31)])
def test_negatives_are_the_next_rows_around_the_end_never_the_own_and_never_twice(count, negatives):
    own, other = triplets(count)
    pairs = set(zip(own.tolist(), other.tolist(), strict=True))
    expected = {(row, (row + step) % count) for row in range(count) for step in range(1, negatives + 1)}
    assert pairs == expected
    assert len(own) == count * negatives
    assert all(row != column for row, column in pairs)


def test_recall_by_hand_counts_both_ways_and_lengths_play_no_part():
    # Cosines of rows and columns: x_0 is nearest to y_0, x_1 to y_0; y_0 is nearest to x_0, y_1 to x_1.
    x, y = torch.tensor([[9.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.5], [0.0, 1.0]])
    assert recall(x[:, None], y) == pytest.approx((1 / 2 + 2 / 2) / 2)
    assert recall(3 * x[:, None], y / 7) == recall(y[:, None], x) == recall(x[:, None], y)
    assert recall(torch.ones(4, 1, 3), torch.ones(4, 3)) == 0  # a tie counts as wrong
    # Each of the first thing's captions is asked for its picture; to a picture one of its captions is enough.
    both = torch.stack([x, torch.tensor([[0.1, 1.0], [0.0, 1.0]])], 1)
    assert recall(both, y) == pytest.approx(((1 / 2 + 1 / 2) / 2 + 2 / 2) / 2)


def share_right(x: np.ndarray, y: np.ndarray) -> float:
    found, own = cosine_similarity(x, y), np.arange(len(x))
    return float(((found.argmax(1) == own).mean() + (found.argmax(0) == own).mean()) / 2)


def test_least_squares_is_scikit_learns_ridge_regression(views):
    even, odd = (side.double().numpy() for side in views.pairs())
    centre = odd.mean(0)
    load = STRENGTH * even.var(0).mean() * len(even)
    found = Ridge(load).fit(even, odd - centre).predict(views.asked[0][:, 0].double().numpy())
    along = centre / np.linalg.norm(centre)
    found -= np.outer(found @ along, along)  # what a text has along the mean image is left out
    assert closed_form("least_squares", views, 16) == pytest.approx(
        share_right(found, views.asked[1].numpy()), abs=0.01
    )


def test_without_load_canonical_correlation_finds_as_many_pairs_as_scikit_learns(monkeypatch):
    monkeypatch.setattr(objectives, "STRENGTH", 1e-9)
    # Content of 6 numbers in two noisy views of 12.
    draw = torch.Generator().manual_seed(0)
    content = torch.randn(700, 6, generator=draw)
    sides = [
        content @ torch.randn(6, 12, generator=draw) + 0.6 * torch.randn(700, 12, generator=draw)
        for _ in range(2)
    ]
    views = Views(*((sides[0][part, None], sides[1][part]) for part in (slice(500), slice(500, None))))
    known = CCA(12, max_iter=5000).fit(*(side[:500].numpy() for side in sides))
    seen = known.transform(*(side[:500].numpy() for side in sides))
    correlation = [np.corrcoef(x, y)[0, 1] for x, y in zip(seen[0].T, seen[1].T, strict=True)]
    x, y = (
        part / own.std(0)
        for part, own in zip(known.transform(*(side[500:].numpy() for side in sides)), seen, strict=True)
    )
    expected = share_right(x * correlation, y)
    assert expected > 0.3
    # Scikit-learn's iterates; two of 400 answers may differ.
    assert closed_form("canonical", views, 16) == pytest.approx(expected, abs=0.005)


def test_chance_is_one_in_as_many_as_there_are_and_untrained_towers_are_not_far_from_it(
    recipe, views, tmp_path
):
    assert measure(recipe, views, model_of("chance"), 0, tmp_path).values == {"recall_at_1": 1 / 500}
    assert measure(recipe, views, model_of("untrained"), 0, tmp_path).values["recall_at_1"] < 0.02


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_falls_and_the_same_seed_gives_the_same_numbers(kind, recipe, views, tmp_path):
    model = model_of(kind, **({"bias": -10.0} if kind == "sigmoid" else {}))
    first, again = (measure(recipe, views, model, 3, tmp_path / name) for name in ("a", "b"))
    assert first.values == again.values
    assert {*first.values} == {"recall_at_1", "recall_at_1_short"}
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 6})})
    further = measure(longer, views, model, 3, tmp_path / "c")
    assert mean_loss(further.about["history"]) < mean_loss(first.about["history"])
    assert further.values["recall_at_1"] > 5 / 500


@pytest.mark.parametrize(("kind", "learned"), [("softmax", 1), ("sigmoid", 2), ("margin", 0), ("ratio", 1)])
def test_rows_count_the_towers_and_what_their_loss_learns_beside_them(kind, learned, recipe, views, tmp_path):
    about = measure(recipe, views, model_of(kind), 0, tmp_path).about
    assert about["parameters"] == 2 * (32 * 16 + 16) + learned


def test_both_lengths_start_alike_and_see_batches_of_their_size(recipe, views, tmp_path, monkeypatch):
    seen = []

    def fit(net, loss, count, training, folder, *, seed):
        seen.append((net.first.weight.detach().clone(), net.bias.item(), training.epochs, training.batch_size,
                     training.learning_rate))  # fmt: skip
        return []

    monkeypatch.setattr(objectives, "fit", fit)
    model = model_of("sigmoid", batch_size=256, learning_rate=0.2, short_rate=0.4)
    measure(recipe, views, model, 0, tmp_path)
    assert torch.equal(seen[0][0], seen[1][0])
    # The bias starts at the log odds of one match in 256.
    assert seen[0][1] == seen[1][1] == pytest.approx(-math.log(255))
    assert [one[2:] for one in seen] == [(2, 256, 0.2), (1, 256, 0.4)]


def test_the_gradient_reaches_both_towers(views):
    for kind in LOSSES:
        seed_everything(0)
        net = Towers(views, 16, -3.0)
        loss_of(kind, net, *net(*views.drawn(torch.arange(8)))).backward()
        assert all(tower.weight.grad.abs().sum() > 0 for tower in (net.first, net.second))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"kind": "hinge"}, "models.0.kind"), ({"kind": "softmax", "bias": 0.0}, "bias belongs to kind sigmoid"),
     ({"kind": "softmax", "batch_size": 1}, "batch_size")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("family_objectives", {"models": [{"name": "wrong", **change}], "reference": "wrong"})

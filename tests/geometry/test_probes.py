"""Probes on planted attributes, on labels that mean nothing, and on rows that can be learned by heart."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from workbench.errors import DataError
from workbench.geometry.probes import Probe, control_labels, probe, probe_conditions

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=30, deadline=None, database=None)


def drawn(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def planted(values: np.ndarray, width: int, size: float, seed: int) -> torch.Tensor:
    """Noise with one direction per value of an attribute added."""
    return drawn(len(values), width, seed) + size * drawn(int(values.max()) + 1, width, seed + 1)[values]


def test_selectivity_by_hand():
    assert Probe(0.9, 0.01, 0.6, 0.5, 100).selectivity == pytest.approx(0.3)


def test_a_planted_attribute_is_found_and_shuffled_labels_are_at_chance():
    labels = np.random.default_rng(0).integers(4, size=2000)
    found = probe(planted(labels, 16, 2.0, 0), [str(one) for one in labels])
    assert found.accuracy >= 0.95
    # One draw of 2,000 guesses of one in four deviates by 1 point; 2 points are the bar.
    assert found.control == pytest.approx(0.25, abs=0.02)
    assert found.selectivity >= 0.7
    assert found.chance == pytest.approx(0.25, abs=0.03)
    assert found.count == 2000


def test_the_accuracy_is_the_mean_over_folds_of_an_ordinary_regression():
    labels = np.random.default_rng(1).integers(2, size=120)
    rows = planted(labels, 5, 0.5, 3)
    scores = []
    for train, test in StratifiedKFold(3, shuffle=True, random_state=7).split(rows, labels):
        mean, deviation = rows[train].double().mean(0), rows[train].double().std(0, correction=0)
        scaled = ((rows.double() - mean) / deviation).numpy()
        scores.append(
            LogisticRegression(C=0.1).fit(scaled[train], labels[train]).score(scaled[test], labels[test])
        )
    found = probe(rows, labels.tolist(), folds=3, strength=0.1, seed=7)
    assert found.accuracy == pytest.approx(np.mean(scores))
    assert found.deviation == pytest.approx(np.std(scores))


def test_rows_that_come_again_can_be_learned_by_heart_and_the_control_task_says_so():
    # 40 entities, each on 10 rows that hardly differ: the label of an entity can be remembered.
    entity = np.repeat(np.arange(40), 10)
    rows = 3 * drawn(40, 64)[entity] + 0.1 * drawn(400, 64, 1)
    labels = (entity % 2).tolist()
    by_heart = probe(rows, labels, types=entity.tolist())
    assert by_heart.accuracy > 0.95
    assert by_heart.control > 0.95
    assert by_heart.selectivity < 0.05
    assert probe(rows, labels).control < 0.6  # shuffled row by row, the same rows teach nothing


@quick
@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(0, 1000))
def test_control_labels_without_types_are_the_labels_in_another_order(labels, seed):
    dealt = control_labels(labels, range(len(labels)), np.random.default_rng(seed))
    assert sorted(dealt) == sorted(labels)


@quick
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc")), min_size=1, max_size=40))
def test_control_labels_are_the_same_within_a_type(rows):
    types, labels = zip(*rows, strict=True)
    dealt = control_labels(labels, types, np.random.default_rng(0))
    assert len(set(zip(types, dealt, strict=True))) == len(set(types))
    assert set(dealt) <= set(labels)


def test_under_its_condition_an_attribute_goes_up_and_the_others_go_down():
    rng = np.random.default_rng(0)
    colour, size = rng.integers(3, size=400), rng.integers(2, size=400)

    def embedded(loud: float, quiet: float) -> torch.Tensor:
        return drawn(400, 12, 9) + loud * drawn(3, 12, 1)[colour] + quiet * drawn(2, 12, 2)[size]

    table = probe_conditions(
        embedded(0.7, 0.7),
        {"the colour": embedded(2.0, 0.1)},
        {"colour": colour.tolist(), "size": size.tolist()},
    )
    assert table.columns == [
        *("condition", "attribute", "accuracy", "deviation", "control", "chance", "count"),
        *("selectivity", "change"),
    ]
    change = {(row["condition"], row["attribute"]): row["change"] for row in table.to_dicts()}
    assert change[None, "colour"] == change[None, "size"] == 0
    assert change["the colour", "colour"] > 0.05
    assert change["the colour", "size"] < -0.05


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["a"] * 10, "of 1 kinds"),
        (["a"] * 8 + ["b"] * 2, "the rarest 2 times"),
        (["a", "b"] * 3, "got 6 of 2"),
    ],
)
def test_labels_that_cannot_be_probed_are_refused(labels, reason):
    with pytest.raises(DataError, match=reason):
        probe(drawn(10, 3), labels)

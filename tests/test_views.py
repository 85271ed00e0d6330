from pathlib import Path

import panel as pn
import pytest
import torch

from tests.test_figures_zoo import frame, row, score
from workbench.conditions import normalise_condition
from workbench.model import HyperCL
from workbench.runs import Run
from workbench.session import Session
from workbench.view_state import ZooState
from workbench.views.similarity import SimilarityView
from workbench.views.zoo import ZooView

TEXTS = {"a": "Red foxes.", "b": "Red kites.", "c": "Blue foxes."}


class EchoModel(HyperCL):
    """Stands for a trained model: the similarity it returns is its two arguments."""

    def __init__(self):
        pass

    def similarity(self, first, second, condition, strength=1.0):
        return torch.full((len(first), len(second)), strength * len(normalise_condition(condition)) / 100)


def values(view):
    return [round(trace.z[0][0], 6) for trace in view.figure().object.data]  # single precision


def test_changing_the_condition_or_the_strength_changes_the_right_matrix_only():
    view = SimilarityView(EchoModel(), TEXTS, condition="colour", strength=0.5)
    assert values(view) == [0.0, 0.03]
    view.condition = "the kind of animal"
    assert values(view) == [0.0, 0.09]
    view.strength = 1.0
    assert values(view) == [0.0, 0.18]


def test_an_empty_condition_shows_its_error_as_plain_text():
    view = SimilarityView(EchoModel(), TEXTS, condition=" ")
    shown = view.figure()
    assert isinstance(shown, pn.pane.Str)
    assert "empty" in shown.object


def test_markup_in_a_condition_is_shown_and_not_read():
    view = SimilarityView(EchoModel(), TEXTS, condition="<a href='x'>$\\alpha$</a>")
    titles = [note.text for note in view.figure().object.layout.annotations]
    assert titles[1] == "&lt;a href=&#x27;x&#x27;&gt;&#36;\\alpha&#36;&lt;/a&gt;"


class Zoo(Run):
    """Stands for a finished run of a zoo: two ways, two pairs and a control."""

    recipe = {
        "name": "zoo",
        "paper": "hyper_align",
        "reference": "grid",
        "models": [{"name": "grid", "kind": "ape"}, {"name": "made", "kind": "hyper_align"}],
    }
    provenance = {"commit": "c" * 40, "data_sha256": "d" * 64, "device": "CPU", "seeds": [0, 1]}
    scores = frame(
        [
            score(model, image, value + 0.2 * seed, seed=seed, split=split, control=image == "copy")
            for model, values in {"grid": (0.1, 0.3, 0.7), "made": (0.4, 0.2, 0.5)}.items()
            for image, value in zip(("a", "b", "copy"), values, strict=True)
            for split in ("valid", "test")
            for seed in (0, 1)
        ]
    )
    metrics = frame([row(model, "recall_at_10", 0.3) for model in ("grid", "made")])


class OneZoo(Session):
    """Stands for a session with one zoo."""

    def __init__(self):
        self._zoo = Zoo(Path("zoo-0"))

    def runs(self, *papers):
        return {"zoo": self._zoo}

    def run(self, recipe, *papers):
        return self._zoo


def test_every_pair_of_a_zoo_stands_in_a_table_beside_the_way_it_is_compared_with():
    numbers = ZooView(OneZoo(), ZooState(model="made", against="grid")).numbers()
    # Means over the two seeds: 0.1 above the first; the control is last although it is best.
    assert numbers.drop("text").rows() == [
        ("a", False, pytest.approx(0.5), pytest.approx(0.2), pytest.approx(0.3)),
        ("b", False, pytest.approx(0.3), pytest.approx(0.4), pytest.approx(-0.1)),
        ("copy", True, pytest.approx(0.6), pytest.approx(0.8), pytest.approx(-0.2)),
    ]


def test_the_table_of_a_zoo_says_where_its_numbers_come_from_and_follows_the_controls():
    view = ZooView(OneZoo(), ZooState(model="made", against="grid"))
    assert {*ZooView.param.recipe.objects, *ZooView.param.model.objects} <= {None}  # shared by all browsers
    (table,) = view.content().select(pn.widgets.Tabulator)
    assert table.header_tooltips["value"].endswith("test split; model made, seeds 0, 1; run zoo-0")
    view.model = "grid"
    (table,) = view.content().select(pn.widgets.Tabulator)
    assert table.value["difference"].tolist() == [0, 0, 0]

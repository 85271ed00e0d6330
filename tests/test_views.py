from pathlib import Path

import panel as pn
import pytest
import torch
from param.parameterized import Event

from tests.test_figures_zoo import frame, row, score
from workbench.conditions import normalise_condition
from workbench.model import HyperCL
from workbench.runs import Run
from workbench.session import Session
from workbench.view_state import ZooState, pack, unpack
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
    assert view._table.table.header_tooltips["value"].endswith(
        "test split; model made, seeds 0, 1; run zoo-0"
    )
    view.model = "grid"
    assert view._table.table.value["difference"].tolist() == [0, 0, 0]


def frames(view):
    """Return which cells of the maps are framed with dots, as column and row."""
    shapes = [one for one in view._map.figure.layout.shapes if one.line.dash == "dot"]
    return [((one.x0 + one.x1) / 2, (one.y0 + one.y1) / 2) for one in shapes]


def click(view, **point):
    view._click(Event(**dict.fromkeys(Event._fields) | {"new": {"points": [point]}}))


def test_a_clicked_pair_is_marked_in_map_table_and_link_and_stands_by_every_way():
    view = ZooView(OneZoo(), ZooState(model="made", against="grid"))
    assert "Best pair: words and a" in view._told.object
    assert frames(view) == []
    click(view, x=0, y=2)  # the gap above the controls
    assert view.pair == ("", "")
    click(view, x=0, y=0)  # the reference's best stands on top
    assert view.pair == ("words", "b")
    assert "Chosen pair: words and b" in view._told.object
    assert frames(view) == [(0, 0), (0, 0)]  # in the map of values and in that of differences
    assert view._table.table.value["image"].iloc[view._table.table.selection[0]] == "b"
    ways = view._ways.table.value
    assert ways["model"].tolist() == ["grid", "made"]
    # Seeds 0 and 1 are 0.2 apart: 0.3 and 0.5, 0.2 and 0.4.
    assert ways[["value", "low", "high"]].to_numpy().round(6).tolist() == [[0.4, 0.3, 0.5], [0.3, 0.2, 0.4]]
    assert ways["seeds"].tolist() == [2, 2]
    again = ZooView(OneZoo(), unpack(pack(view.state()), ZooState))
    assert (again.pair, frames(again)) == (("words", "b"), frames(view))


def test_a_row_chosen_in_the_table_of_pairs_is_the_pair_and_the_other_figures_stay():
    view = ZooView(OneZoo(), ZooState(model="made", against="grid"))
    drawn = [place.figure for place in view._others]
    view._pick(2)
    assert view.pair == ("words", "copy")
    assert frames(view) == [(0, 3), (0, 3)]
    assert all(place.figure is one for place, one in zip(view._others, drawn, strict=True))
    view.model = "grid"
    assert view.pair == ("words", "copy")
    assert not any(place.figure is one for place, one in zip(view._others, drawn, strict=True))


def test_a_pair_is_chosen_by_its_name_too():
    view = ZooView(OneZoo(), ZooState(model="made", against="grid"))
    [named] = [part for part in view.__panel__().select(pn.widgets.Select) if part.name == "Pair"]
    assert list(named.options) == ["the best", "words and a", "words and b", "words and copy"]
    named.value = named.options["words and b"]
    assert view.state().image == "b"
    assert frames(view) == [(0, 0), (0, 0)]
    named.value = named.options["the best"]
    assert "Best pair: words and a" in view._told.object
    assert ZooView.param.pair.objects == [("", "")]  # shared by all browsers


def test_a_pair_that_the_run_does_not_have_is_none():
    view = ZooView(OneZoo(), ZooState(model="made", text="words", image="<b>of another run</b>"))
    assert view.pair == ("", "")
    assert "Best pair" in view._told.object

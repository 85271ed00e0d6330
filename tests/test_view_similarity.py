"""The view of pairs: what is asked for is what is drawn, links bring it back, errors stand as text."""

from pathlib import Path

import numpy as np
import pytest
import torch
from param.parameterized import Event

from tests.test_pair_changes import Letters
from workbench.errors import DataError
from workbench.figures_pairs import words_figure
from workbench.geometry.attribution import Attribution
from workbench.geometry.text_attribution import Words
from workbench.pair_changes import bundled_pairs, compare
from workbench.pair_comparison import MOST_SENTENCES
from workbench.runs import Run
from workbench.session import Session
from workbench.view_state import SimilarityState, pack, unpack
from workbench.views.similarity import PairsView

OWN = "aaa\tbbb\nabc|cba\nxyz|<b>$x$</b>"


class Finished(Run):
    """Stands for a finished run."""

    recipe = {"name": "letters", "paper": "hyper_cl", "data": {"source": "bundled"},
              "models": [{"name": "model", "kind": "hyper"}]}  # fmt: skip
    provenance = {"commit": "c" * 40, "data_sha256": "d" * 64, "device": "CPU", "seeds": [0]}

    def models(self):
        return ["model"]


class OneRun(Session):
    """Stands for a session with one model."""

    def __init__(self):
        self._one, self._run = Letters(), Finished(Path("letters-0"))

    def runs(self, *papers):
        return {self._run.recipe["name"]: self._run}

    def run(self, recipe, *papers):
        return self._run

    def model(self, run, name, load=None):
        return self._one


def view(**state):
    return PairsView(OneRun(), SimilarityState(**{"pairs": "own", "own": OWN, **state}))


def click(one, row):
    one._click(Event(**(dict.fromkeys(Event._fields) | {"new": {"points": [{"customdata": row}]}})))


def test_strength_zero_moves_no_pair():
    found = view(strength=0.0).compared()
    np.testing.assert_allclose(found.pairs["change"], 0, atol=1e-6)


def test_a_typed_condition_changes_slopes_matrices_and_table():
    one = view(condition="abc")
    before = one._table.table.value["conditioned"].tolist(), one._matrices[1].figure.data[0].z
    one.condition = "xyz"
    after = one._table.table.value["conditioned"].tolist(), one._matrices[1].figure.data[0].z
    assert before[0] != after[0]
    assert not np.allclose(before[1], after[1])
    assert "xyz" in one._slopes.figure.layout.xaxis.ticktext


def test_a_click_on_any_figure_chooses_the_pair_everywhere():
    one = view()
    assert not one._parted.visible
    click(one, 1)
    assert one.chosen == one.state().chosen == 1
    assert one._parted.visible
    assert "abc" in one._told.object
    assert [trace.name for trace in one._slopes.figure.data][-1] == "chosen"
    assert one._table.table.value["row"].iloc[one._table.table.selection[0]] == 1
    assert len(one._matrices[2].figure.layout.shapes) == 2  # the cell and its mirror image
    click(one, -1)  # a cell that belongs to no pair
    assert one.chosen == 1


def test_before_and_after_share_their_colours_and_the_change_is_about_zero():
    before, after, change = (pane.figure.data[0] for pane in view()._matrices)
    assert (before.zmin, before.zmax) == (after.zmin, after.zmax) == (-1, 1)
    assert change.zmin == -change.zmax
    np.testing.assert_allclose(np.array(after.z) - np.array(before.z), np.array(change.z), atol=1e-9)


def test_numbers_say_how_they_are_computed_and_over_what():
    one = view(condition="<b>abc</b>", strength=0.5)
    for table in (one._table.table, one._flips.table):
        for column, values in table.value.items():
            if values.dtype.kind in "iuf":
                said = table.header_tooltips[column]
                assert said.startswith(f"{column}: ")
                assert said.endswith("3 pairs; model model, seed 0; run letters-0")
    assert "&lt;b&gt;abc&lt;/b&gt;&#x27; at strength 0.5" in one._table.table.header_tooltips["conditioned"]


def followed(asked):
    """Stand for an attribution: words add their length, the last one takes two away."""
    nothing = torch.zeros(0, 4)
    words = Words(asked.split(), torch.zeros(0, dtype=torch.long), nothing, nothing)
    values = torch.tensor([float(len(word)) for word in words.words])
    values[-1] = -2.0
    return words, Attribution(values, score=0.5, reference=0.25)


class Counting:
    """Stands for the attribution of words; says what it was asked."""

    def __init__(self):
        self.asked = []

    def of_condition(self, first, second, condition, steps, told):
        self.asked.append(("condition", first, second, condition))
        told(0)
        return followed(condition)

    def of_sentence(self, first, second, condition, steps, told):
        self.asked.append(("sentence", first, second, condition))
        told(0)
        return followed(first)


class Attributing(OneRun):
    """A session whose model can be followed to words."""

    def __init__(self):
        super().__init__()
        self.words = Counting()

    def model(self, run, name, load=None):
        return self._one if load is None else self.words


def test_the_chosen_pairs_score_is_followed_to_words_when_asked_and_not_before():
    session = Attributing()
    one = PairsView(session, SimilarityState(pairs="own", own="aaa b\tccc d", condition="abc de"))
    assert {*PairsView.param.recipe.objects, *PairsView.param.model.objects} <= {
        None
    }  # shared by all browsers
    assert not one._words._button.visible
    one.chosen = 0
    assert one._words._button.visible
    assert session.words.asked == []
    one._words._button.clicks += 1
    assert session.words.asked == [
        ("condition", "aaa b", "ccc d", "abc de"), ("sentence", "aaa b", "ccc d", "abc de"),
        ("sentence", "ccc d", "aaa b", "abc de"),
    ]  # fmt: skip
    table = one._words.table()
    assert table["word"].to_list() == ["abc", "de", "aaa", "b", "ccc", "d"]
    assert table["value"].to_list() == [3, -2, 3, -2, 3, -2]
    figure = one._words.panes[0].figure
    # (3 - 2) - (0.5 - 0.25) = 0.75 is missed of 0.25: three times as much.
    assert "completeness error 300.00%" in figure.layout.title.text
    assert list(figure.layout.yaxis.ticktext) == ["abc", "de"]
    assert len({tuple(pane.figure.layout.xaxis.range) for pane in one._words.panes}) == 1


def test_words_of_another_pair_or_condition_are_not_left_standing():
    one = PairsView(Attributing(), SimilarityState(pairs="own", own="aaa\tbbb\nccc\tddd", chosen=0))
    one._words._button.clicks += 1
    assert one._words.found
    one.condition = "xyz"
    assert not one._words.found
    assert not any(pane.visible for pane in one._words.panes)
    with pytest.raises(DataError, match="no score was followed yet"):
        one._words.table()
    one.chosen = None
    assert not one._words._button.visible


def test_words_are_escaped_where_they_are_drawn():
    figure = words_figure(["<i>x</i>", "$y$"], [0.1, -0.1], "<b>", "<u>", 0.1)
    drawn = figure.to_json().encode().decode("unicode_escape")
    assert not [tag for tag in ("<i>", "<b>", "<u>", "$y$") if tag in drawn]


def test_page_and_notebook_agree_number_for_number():
    one = view(condition="abc xyz", strength=0.7)
    pairs = compare(Letters(), one.compared().pairs.select("sentence1", "sentence2"), "abc xyz", 0.7)[0]
    np.testing.assert_allclose(one.compared().pairs["conditioned"], pairs["conditioned"])


def test_the_code_shown_makes_the_same_state():
    one = view(condition="007", strength=0.5, chosen=2)
    line = next(line for line in one.code() if line.startswith("view ="))
    held = eval(
        line.removeprefix("view = PairsView(Session(), ").removesuffix(")"),
        {"SimilarityState": SimilarityState},
    )
    assert held == one.state() == unpack(pack(one.state()), SimilarityState)


def test_markup_is_escaped_in_figures_and_plain_in_tables():
    one = view(condition="<i>$y$</i>")
    assert any("&lt;i&gt;&#36;y&#36;" in text for text in one._slopes.figure.layout.xaxis.ticktext)
    drawn = str(one._slopes.figure.to_json()) + str(one._matrices[0].figure.to_json())
    assert "<b>" not in drawn
    assert "<b>$x$</b>" in set(one._table.table.value["sentence2"])
    assert one._table.table.formatters["sentence2"] == {"type": "plaintext"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"own": "one text"}, "line 1"), ({"own": "a|b" * 1500}, "bytes"), ({"condition": " "}, "empty")],
)
def test_what_cannot_be_used_is_said_and_what_was_shown_stays(change, complaint):
    one = view()
    before = one._slopes.figure
    one.param.update(**change)
    assert complaint in one.live.said
    assert one._slopes.figure is before


def test_bundled_pairs_are_scored_against_the_attribute_that_the_condition_asks_for():
    one = view(pairs="bundled", condition="The diet.")
    assert one.compared().pairs.height == bundled_pairs("food").height
    assert "Spearman with the gold score" in one._said.object
    assert np.shape(one._matrices[0].figure.data[0].z) == (MOST_SENTENCES, MOST_SENTENCES)
    one.condition = "Joy"
    assert "no gold score" in one._said.object


def test_a_run_on_somebodys_files_is_shown_by_row_numbers_alone(tiny_run, monkeypatch):
    run = Run(tiny_run.folder)
    run.__dict__["recipe"] = {**tiny_run.recipe, "data": {**tiny_run.recipe["data"], "source": "files"}}
    session = OneRun()
    session._run = run
    one = PairsView(session, SimilarityState(pairs="run", model="hadamard", chosen=0))
    assert "are not shown" in one._told.object
    assert not {"sentence1", "sentence2", "condition"} & set(one._table.table.value.columns)
    assert not one._parted.visible
    assert not any(pane.visible for pane in one._matrices)

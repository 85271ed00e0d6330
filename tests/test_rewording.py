"""A class set in other words: typed names, templates and strength against what the run says of them."""

import numpy as np
import polars as pl
import pytest
import torch

from workbench.datasets.class_sets import ClassSet
from workbench.datasets.scenes import ATTRIBUTES, SYNONYMS
from workbench.errors import RunError, WorkbenchError
from workbench.group_sides import ALL_SETS, Side, compare_groups
from workbench.rewording import blends, compare_wordings, strength_said, wording_of
from workbench.runs import Run
from workbench.session import Session
from workbench.view_state import FairnessState, pack, unpack
from workbench.views.fairness import FairnessView

# Bokeh calls pandas 3.1 in a way that pandas is about to drop; tables work.
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")


@pytest.fixture(scope="module")
def image_session(tiny_image_run):
    return Session(tiny_image_run.folder.parent.parent)


def asked(**changes) -> FairnessState:
    about = {"about": "wording", "model": "hyperclip_residual", "column": "background", "asked": "colour"}
    return FairnessState(**about | changes)


def test_typed_synonyms_get_the_answers_that_the_run_gave_to_them(image_session, tiny_image_run):
    names = ", ".join(f"{SYNONYMS[colour]} things" for colour in ATTRIBUTES["colour"])
    found = compare_wordings(image_session, asked(names=names), resamples=50)
    told = tiny_image_run.scores.filter(set="colour, by synonyms", split="test", model="hyperclip_residual")
    expected = told.group_by("background").agg((pl.col("rank") == 1).mean().alias("value"))
    typed = found.sides.rows.filter(side="B").select(pl.col("group").alias("background"), "value")
    assert typed.sort("background").equals(expected.sort("background"))
    assert found.typed.names[0] == "crimson things"
    assert "crimson things for red things" in found.said()[0]
    # Every picture that changes sides moves the mean over all by one part of their number.
    overall = found.sides.totals["overall"].to_list()
    assert found.gained - found.lost == pytest.approx((overall[1] - overall[0]) * told.height)


def test_the_same_words_change_nothing_and_are_the_runs_own_answers(image_session, tiny_image_run):
    found = compare_wordings(image_session, asked(), resamples=50)
    assert (found.gained, found.lost, found.strayed) == (0, 0, 0)
    for name in ("to_other", "to_other_low", "to_other_high"):
        assert set(found.sides.rows[name]) == {0.0}
    said = " ".join(found.said())
    assert "Nothing is changed yet" in said
    assert "A: as the run asks, 100 images, 1 seed. Overall" in said
    assert "B: worst judged group" in said
    run = compare_groups([Side(tiny_image_run, "hyperclip_residual")], "background", "colour", resamples=50)
    assert found.sides.rows.filter(side="A")["value"].to_list() == run.rows["value"].to_list()


def test_templates_and_strength_are_asked_too(image_session, tiny_image_run):
    plain = compare_wordings(image_session, asked(templates="{}"), resamples=50)
    assert plain.typed.templates == ("{}",)
    assert "B asks with: {}" in plain.said()
    neutral = compare_wordings(image_session, asked(strength=0.0), resamples=50)
    told = tiny_image_run.metrics.filter(
        pl.col("seed").is_null(), group="side=neutral, one attribute", metric="top1", split="test"
    )
    sets = [asked(asked=name, strength=0.0) for name in ATTRIBUTES]
    values = [compare_wordings(image_session, one, resamples=50).sides.totals["overall"][1] for one in sets]
    assert np.mean(values) == pytest.approx(told["value"][0])  # as many pictures in each of the five
    assert "B has strength 0" in " ".join(neutral.said())


ONE = ClassSet("kinds", ["a, b", "c"], ("a {}.",), torch.arange(0), torch.arange(0))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("", ["a, b", "c"]),
        ("x\ny", ["x", "y"]),
        ("x, y", ["x", "y"]),
        ("x, or z\n\n 007 ", ["x, or z", "007"]),
    ],
)
def test_names_stand_for_the_classes_in_their_order(names, expected):
    assert wording_of(ONE, names, "").names == expected
    assert wording_of(ONE, names, " {} \n\nsee {}").templates == ("{}", "see {}")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"names": "red, blue"},
            "2 names for the 8 classes of 'colour': give one for each, in the order red",
        ),
        ({"names": "x, " * 8}, "class named twice: x"),
        ({"templates": "no braces"}, "needs one {}"),
        ({"asked": ALL_SETS}, "no class set 'all class sets' .* there are: colour"),
        ({"model": "siglip"}, "kept no model 'siglip'"),
    ],
)
def test_a_wording_that_cannot_be_asked_is_refused_in_one_sentence(image_session, changes, complaint):
    with pytest.raises(WorkbenchError, match=complaint):
        compare_wordings(image_session, asked(**changes), resamples=50)


def test_pictures_that_are_not_the_runs_own_are_refused(image_session, tiny_image_run, monkeypatch):
    own = Run(tiny_image_run.folder)
    own.__dict__["recipe"] = {**tiny_image_run.recipe, "data": {"source": "files", "name": "mine"}}
    monkeypatch.setattr(image_session, "run", lambda *_: own)
    with pytest.raises(RunError, match="asked pictures which it does not keep"):
        compare_wordings(image_session, asked())
    own.__dict__["recipe"] = tiny_image_run.recipe
    own.__dict__["scores"] = tiny_image_run.scores.with_columns(label=0)
    with pytest.raises(RunError, match="are not those that run"):
        compare_wordings(image_session, asked())


def test_the_page_starts_from_the_sets_own_words_and_keeps_others_in_its_link(image_session):
    one = FairnessView(image_session, asked())
    assert one.names.splitlines()[0] == "red things"
    assert one.templates.splitlines()[1] == "{}"
    assert (one.state().names, one.state().templates) == ("", "")
    one.names = one.names.replace("red", "crimson")
    found = unpack(pack(one.state()), FairnessState)
    assert found.names.startswith("crimson things\n")
    assert FairnessView(image_session, found).state() == one.state()
    figures = one.figures(one.measured())
    assert "the wording of the run" in figures[1].layout.title.text
    assert [trace.name for trace in figures[1].data] == ["B: as typed"]
    one.names = "red"
    assert "1 names for the 8 classes" in one.live.said
    one.asked = "shape"  # another set starts from its own words
    assert one.names.splitlines()[0] == "circles"
    assert one.state().names == ""
    one.about = "images"
    assert one.param.model.objects != ["hyperclip_residual"]
    assert "Best minus worst" in one._said.object


def test_what_strength_can_do_is_said_of_each_model(tiny_image_run):
    own = Run(tiny_image_run.folder)
    models = {name: {"name": name} for name in ("plain", "whole", "added", "trained")}
    models["plain"] |= {"kind": "siglip"}
    models["whole"] |= {"kind": "hyper", "mode": "replace"}
    models["added"] |= {"kind": "hyper", "mode": "residual", "neutral": 0.0}
    models["trained"] |= {"kind": "hyper", "mode": "residual", "neutral": 0.2}
    own.__dict__["recipe"] = {"models": list(models.values())}
    assert [blends(own, name) for name in models] == [False, False, True, True]
    told = [" ".join(strength_said(own, name)) for name in models]
    for part, said in zip(("no condition", "stays 1", "No step of this run", ""), told, strict=True):
        assert part in said
    assert told[3] == ""

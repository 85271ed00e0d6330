"""The fairness page without a browser: groups against hand counts, words against a planted bias."""

import zlib

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn.functional import normalize

from workbench.datasets import stimuli
from workbench.datasets.stimuli import BUNDLED, ROLES, Stimuli, bundled_stimuli, read_stimuli
from workbench.errors import DataError, RunError
from workbench.figures_fairness import group_accuracy_figure
from workbench.group_sides import TO_OTHER, Side, compare_groups
from workbench.groups import group_rows
from workbench.model import HyperCL
from workbench.runs import Run
from workbench.session import Session
from workbench.text_bias import Associations, association_rows, change_said, preference_rows
from workbench.view_state import FairnessState, pack, unpack
from workbench.views.fairness import NO_OTHER, FairnessView

# Bokeh calls pandas 3.1 in a way that pandas is about to drop; tables work.
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")

GROUPS = ["north"] * 40 + ["south"] * 32 + ["east"] * 4
RIGHT = {  # images of each group that are answered right, by model and seed
    ("ours", 0): {"north": 30, "south": 16, "east": 0}, ("ours", 1): {"north": 10, "south": 16, "east": 4},
    ("plain", 0): {"north": 20, "south": 24, "east": 2}, ("plain", 1): {"north": 20, "south": 24, "east": 2},
}  # fmt: skip


def made_run(folder, name: str = "one", sha: str = "d" * 64) -> Run:
    """A run whose answers are written down above: one class set, two models, two seeds."""
    rows = []
    for (model, seed), right in RIGHT.items():
        left = dict(right)
        for image, group in enumerate(GROUPS):
            left[group] -= 1
            about = {
                "split": "test",
                "set": "kind",
                "image": image,
                "region": group,
                "label": 0,
                "predicted": 0,
            }
            rows.append({**about, "model": model, "seed": seed, "rank": 1 if left[group] >= 0 else 2})
    run = Run(folder / name)
    recipe = {
        "name": name, "paper": "hyper_clip", "reference": "plain", "smallest_group": 30, "seeds": [0, 1],
        "data": {"source": "files"},
        "models": [{"name": "plain", "kind": "siglip"}, {"name": "ours", "kind": "hyper"}],
    }  # fmt: skip
    made = {"commit": "c" * 40, "data_sha256": sha, "device": "CPU", "seeds": [0, 1]}
    metrics = pl.DataFrame({"split": ["test"]})
    run.__dict__.update(recipe=recipe, provenance=made, scores=pl.DataFrame(rows), metrics=metrics)
    return run


STEREOTYPES = [test for test in bundled_stimuli().tests if test.kind != "nothing expected"]


class Planted(HyperCL):
    """An encoder that, under a condition, knows nothing but which set a bundled text belongs to."""

    def __init__(self):
        self._sign = {}
        for test in STEREOTYPES:  # the other test has some of their sentences in other roles
            for (role, _), text in zip(test.words(), test.texts(), strict=True):
                self._sign[text] = 1.0 if role in ("target1", "attribute1") else -1.0

    def encode(self, texts, condition, strength=1.0):
        if not condition.strip():
            raise DataError("the condition is empty")
        seeds = [zlib.crc32(text.encode()) for text in texts]
        noise = torch.stack(
            [torch.randn(24, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        noise[:, 0] += strength * 6 * torch.tensor([self._sign.get(text, 0.0) for text in texts])
        return normalize(noise, dim=1)


class Both(Session):
    """Stands for a session with two image runs and one model of sentences."""

    def __init__(self, folder, other_sha: str = "d" * 64, texts: bool = True):
        self._by_name = {"one": made_run(folder), "two": made_run(folder, "two", other_sha)}
        self._reads = Run(folder / "words")
        recipe = {"name": "words", "paper": "hyper_cl", "models": [{"name": "m", "kind": "hyper"}]}
        made = {"commit": "c" * 40, "data_sha256": "f" * 64, "device": "CPU", "seeds": [0]}
        self._reads.__dict__.update(recipe=recipe, provenance=made)
        kept = self._reads.folder / "models" / "m"
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "head.json").touch()
        self._has = texts

    def runs(self, *papers):
        found = dict(self._by_name) if "hyper_clip" in papers else {}
        return {**found, **({"words": self._reads} if "hyper_cl" in papers and self._has else {})}

    def run(self, recipe, *papers):
        found = self.runs(*papers)
        if recipe and recipe not in found:
            raise RunError(f"no finished run of {recipe!r} here")
        return found[recipe or next(iter(found))]

    def model(self, run, name, *_):
        return Planted()


@pytest.fixture
def session(tmp_path):
    return Both(tmp_path)


def view(session, **state) -> FairnessView:
    return FairnessView(session, FairnessState(**state))


# --- groups of images ---------------------------------------------------------------------------------------


def test_values_by_group_are_means_over_seeds_of_hand_counts(session):
    run = session.run("one", "hyper_clip")
    found = compare_groups([Side(run, "ours"), Side(run, "plain")], "region")
    rows = {(row["side"], row["group"]): row for row in found.rows.to_dicts()}
    # north: (30 + 10) / 2 of 40; south: 16 of 32; east: (0 + 4) / 2 of 4, too few to judge.
    assert [rows["A", group]["value"] for group in ("north", "south", "east")] == [0.5, 0.5, 0.5]
    assert [rows["B", group]["value"] for group in ("north", "south", "east")] == [0.5, 0.75, 0.5]
    assert [rows["A", group]["count"] for group in ("north", "south", "east")] == [40, 32, 4]
    assert [rows["A", group]["judged"] for group in ("north", "south", "east")] == [True, True, False]
    # Overall of plain: (20 + 24 + 2) / 76.
    assert rows["B", "south"]["to_overall"] == pytest.approx(0.75 - 46 / 76)
    assert rows["B", "north"]["to_best"] == pytest.approx(-0.25)
    assert rows["B", "south"]["to_best"] is None
    assert rows["A", "south"]["to_other"] == pytest.approx(-0.25)
    assert rows["A", "south"]["to_other"] == -rows["B", "south"]["to_other"]
    totals = found.totals.to_dicts()
    assert [row["worst"] for row in totals] == ["north", "north"]
    # The gap is taken within each seed: |0.75 - 0.5| and |0.25 - 0.5|, though the means are equal.
    assert totals[0]["gap"] == pytest.approx(0.25)
    assert totals[1]["gap"] == pytest.approx(0.25)
    assert totals[0]["worst_value"] == pytest.approx((0.5 + 0.25) / 2)


def test_page_notebook_and_report_agree_number_for_number(tiny_image_run):
    models = [model["name"] for model in tiny_image_run.recipe["models"] if model["kind"] != "chance"]
    for column in ("background", "rendering"):
        told = group_rows(tiny_image_run, column)
        for model in models:
            found = compare_groups([Side(tiny_image_run, model)], column, resamples=100).rows
            expected = told.filter(model=model)
            assert found["group"].to_list() == expected["group"].to_list()
            for name in ("count", "judged"):
                assert found[name].to_list() == expected[name].to_list()
            for name in ("value", "low", "high"):
                np.testing.assert_allclose(found[name], expected[name], atol=1e-12)


def test_differences_are_taken_only_between_answers_to_the_same_questions(tmp_path):
    session = Both(tmp_path, other_sha="e" * 64)
    one = view(session, recipe="one", model="ours", other_recipe="two", other_model="ours")
    found = one.measured()
    assert not found.paired
    assert found.rows["to_other"].null_count() == found.rows.height
    assert "no difference between them is taken" in one._said.object
    assert compare_groups([Side(session.run("one", "hyper_clip"), "ours")] * 2, "region").paired


def test_small_groups_are_marked_and_never_hidden(session):
    one = view(session, recipe="one", model="ours")
    figure = group_accuracy_figure(one.measured().rows, "region", 30)
    labels = " ".join(figure.layout.yaxis.ticktext).replace("<br>", " ")
    assert "east (4, fewer than 30)" in labels
    symbols = dict(zip(figure.data[0].text, figure.data[0].marker.symbol, strict=True))
    assert symbols == {"east": "circle-open", "north": "circle", "south": "circle"}
    assert "not judged: east" in one._said.object


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [({"model": "none"}, "no model 'none'"), ({"column": "age"}, "no group column 'age'")],
)
def test_what_a_run_does_not_have_is_said_with_what_there_is(session, changed, complaint):
    asked = {"model": "ours", "column": "region"} | changed
    with pytest.raises(DataError, match=complaint):
        compare_groups([Side(session.run("one", "hyper_clip"), asked["model"])], asked["column"])


# --- words under a condition --------------------------------------------------------------------------------


def test_a_bias_that_only_the_condition_has_is_found_as_added():
    rows = association_rows(Planted(), STEREOTYPES, "The kind.", resamples=200)
    for row in rows.filter(side="under the condition").to_dicts():
        assert row["effect"] > 1.5
        assert row["p"] < 0.01
        assert row["difference_low"] > 0
    assert all(": more (" in line or ": turned round (" in line for line in change_said(rows))


def test_at_strength_zero_nothing_changes():
    rows = association_rows(Planted(), bundled_stimuli().tests[:2], "The kind.", 0.0, resamples=50)
    assert rows["difference"].drop_nulls().to_list() == [0.0, 0.0]
    assert all("no certain change" in line for line in change_said(rows))
    pairs = preference_rows(Planted(), bundled_stimuli().pairs, "The kind.", 0.0, resamples=50)
    assert set(pairs["difference"].drop_nulls()) == {0.0}


def test_bundled_lists_are_balanced_and_each_sentence_holds_its_word():
    found = bundled_stimuli()
    for test in found.tests:
        sizes = {role: len(test.sentences[role]) for role in ROLES}
        assert sizes["target1"] == sizes["target2"]
        assert all(word in text for (_, word), text in zip(test.words(), test.texts(), strict=True))
        assert len(set(test.texts())) == len(test.texts())
    for kind in found.pairs["kind"].unique():
        own = found.pairs.filter(kind=kind)
        first = own["stereotypical"].str.split(" ").list.get(1 if "age" in kind else 0)
        assert first.value_counts()["count"].n_unique() == 1, f"{kind}: each group stereotypical as often"
        assert first.n_unique() == 2


OWN_TESTS = "test,role,text,word\n" + "\n".join(
    f"mine,{role},{role} {word} {copy},{word}" for role in ("targ1", "targ2", "attr1", "attr2")
    for word in ("007", "true") for copy in (1, 2)
)  # fmt: skip


def test_a_table_of_ones_own_keeps_its_words_as_text():
    [test] = read_stimuli(OWN_TESTS.encode(), "mine.csv").tests
    assert list(test.sentences["target1"]) == ["007", "true"]
    assert test.sentences["attribute2"]["007"] == ["attr2 007 1", "attr2 007 2"]
    pairs = read_stimuli(b"context,stereotypical,antistereotypical\na,b,c\n", "pairs.csv").pairs
    assert pairs.row(0) == ("own", "a", "b", "c")


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"a,b\n1,2\n", "association tests need test, role and text"),
        (b"test,role,text\nx,middle,y\n", "unknown role 'middle'"),
        (
            OWN_TESTS.replace("targ2,targ2 true", "targ1,targ2 more").encode(),
            "at least two words|equal numbers",
        ),
        (b"context,stereotypical,antistereotypical\na,,c\n", "stereotypical, row 0"),
        (b"\xff\xfe\x00broken", "mine.csv"),
        (b"x" * 1_000_001, "at most 1,000,000"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_with_what_is_wrong(raw, complaint):
    with pytest.raises(DataError, match=complaint):
        read_stimuli(raw, "mine.csv")


# --- the view -----------------------------------------------------------------------------------------------


def test_first_seen_beside_the_plain_baseline(session):
    one = view(session)
    assert (one.model, one.other_model, one.column) == ("ours", "plain", "region")
    assert "Worst" not in one.live.said
    assert one.figures(one.measured())[1].layout.title.text.startswith("Difference to its own overall")


def test_another_run_model_or_difference_changes_figures_and_link(session):
    one = view(session)
    one.difference = TO_OTHER
    found = unpack(pack(one.state()), FairnessState)
    assert found.difference == TO_OTHER
    again = FairnessView(session, found)
    assert again.state() == one.state()
    before = list(one.figures(one.measured())[0].data[0].x)
    one.model = "plain"
    assert list(one.figures(one.measured())[0].data[0].x) != before
    one.other_recipe = NO_OTHER
    assert len(one.measured().totals) == 1
    assert "no other model" in one._said.object


def test_a_typed_condition_moves_the_effects_and_stays_text(session):
    one = view(session, about="texts", condition="007", strength=0.0)
    before = one.measured().tests["effect"].to_list()
    one.strength = 1.0
    assert one.measured().tests["effect"].to_list() != before
    assert unpack(pack(one.state()), FairnessState).condition == "007"
    assert isinstance(one.measured(), Associations)
    assert "Does '007' at strength 1 add bias?" in one._said.object
    assert "CrowS-Pairs" in one._limits.object
    one.condition = "  "
    assert "empty" in one.live.said


def test_other_bias_tests_can_be_chosen_and_are_in_the_link(session, monkeypatch):
    few = Stimuli(twins=pl.DataFrame({"kind": ["age"], "more": ["An old fox."], "less": ["A young fox."]}))
    monkeypatch.setattr(stimuli, "stimuli_names", lambda: [BUNDLED, "CrowS-Pairs"])
    monkeypatch.setattr(
        stimuli, "named_stimuli", lambda name: few if name == "CrowS-Pairs" else bundled_stimuli()
    )
    one = view(session, about="texts")
    assert one.state().tests == BUNDLED
    one.tests = "CrowS-Pairs"
    found = unpack(pack(one.state()), FairnessState)
    assert found.tests == "CrowS-Pairs"
    assert FairnessView(session, found).state() == one.state()
    assert one.measured().pairs["pairs"].to_list() == [1, 1]
    [figure] = one.figures(one.measured())
    assert "differ in the group" in figure.layout.title.text


def test_an_uploaded_table_replaces_the_bundled_words_until_it_is_taken_away(session):
    one = view(session, about="texts")
    one.upload({"mine.csv": OWN_TESTS.encode()})
    assert one.measured().tests["test"].unique().to_list() == ["mine"]
    assert one.measured().pairs.is_empty()
    one.upload({"bad.csv": b"a,b\n"})
    assert "bad.csv" in one.live.said
    one.upload({})
    assert one.measured().tests["test"].n_unique() == len(bundled_stimuli().tests)


def test_a_page_with_only_one_kind_of_run_shows_that_kind(tmp_path):
    assert view(Both(tmp_path, texts=False), about="texts").about == "images"


def test_the_code_shown_makes_the_same_state(session):
    one = view(session, about="texts", condition='say "hi"')
    line = next(line for line in one.code() if line.startswith("view ="))
    held = eval(
        line.removeprefix("view = FairnessView(Session(), ").removesuffix(")"),
        {"FairnessState": FairnessState},
    )
    assert held == one.state()

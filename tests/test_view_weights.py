"""The view of weights: kinds of runs, what is typed, links, numbers to download."""

import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from workbench.classifier import HyperCLIPModel
from workbench.connector_zoo import ConnectorZoo
from workbench.datasets.bundled import sentences
from workbench.errors import DataError, ManifestError, RunError
from workbench.generated import (
    Inspected,
    class_sets_of,
    inspect,
    inspectable,
    predictor_of_relations,
    typed_classes,
)
from workbench.geometry.closed_form import LinearMap
from workbench.geometry.matrices import singular_values, subspace_overlap
from workbench.model import HyperCL
from workbench.pair_changes import known_conditions
from workbench.papers.hyper_cl import ConditionedHead
from workbench.papers.hyper_cl_settings import ModelSettings
from workbench.runs import Run
from workbench.session import Session
from workbench.view_state import WeightsState, pack, unpack
from workbench.views.tables import downloads
from workbench.views.weights import WeightsView

KNOWN = known_conditions()["condition"].to_list()


class Kept(Run):
    """Stands for a finished run of any paper with one kept model."""

    provenance = {"commit": "c" * 40, "data_sha256": "d" * 64, "device": "CPU", "seeds": [0]}
    scores = pl.DataFrame(schema={"image": pl.String, "control": pl.Boolean})

    def __init__(self, paper, **settings):
        super().__init__(Path(f"{paper}-0"))
        one = {"name": "one", "kind": "hyper", "pooling": "sentence", "condition": "text", **settings}
        self.__dict__["recipe"] = {
            "name": paper, "paper": paper, "models": [one], "data": {"source": "bundled"}
        }  # fmt: skip

    def models(self):
        return ["one"]


class Some(Session):
    """Stands for a session with some runs and their models."""

    def __init__(self, **models):
        self._kept, self._held = {name: Kept(name) for name in models}, models

    def runs(self, *papers):
        return self._kept

    def run(self, recipe, *papers):
        return self._kept[recipe]

    def model(self, run, name, load=None):
        return self._held[run.recipe["name"]]


class SmallHyperCL(HyperCL):
    """An untrained head on vectors of words: no encoder is opened."""

    def __init__(self, store, **settings):
        torch.manual_seed(0)
        about = {"name": "one", "kind": "hyper", "rank": 2, "dropout": 0.0, **settings}
        self.head = ConditionedHead(ModelSettings(**about), 384, 384).eval()
        self.store, self.unit = store, True
        store.tokens = False


@pytest.fixture(autouse=True)
def few_sentences(monkeypatch):
    """Look at few of the bundled sentences: what is tested does not hang on their number."""
    monkeypatch.setattr("workbench.generated.sentences", lambda: sentences().gather_every(8))


@pytest.fixture(scope="module")
def hyper_cl(word_store):
    return SmallHyperCL(word_store)


@pytest.fixture(scope="module")
def zoo():
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(24, 8, generator=draw)
    maps = {"a": base, "a, turned": -2 * base, "b": torch.randn(24, 6, generator=draw)}
    return ConnectorZoo(
        {("text", name): LinearMap(one, torch.zeros(len(one.T))) for name, one in maps.items()}, "one"
    )


def view(**models):
    return WeightsView(Some(**models), WeightsState())


def test_a_typed_condition_stands_first_and_changes_matrix_spectrum_and_table(hyper_cl):
    one = view(hyper_cl=hyper_cl)
    before = one._panes["matrix"].figure.data[0].z, one._table.table.value
    one.condition = "how wet it is"
    assert one._found.names == ["how wet it is", *KNOWN]
    assert one._found.typed == 1
    assert not np.allclose(before[0], one._panes["matrix"].figure.data[0].z)
    assert one._table.table.value["name"][0] == "how wet it is"
    assert "how wet it is" in one._panes["spectrum"].figure.data[0].name


def test_what_is_drawn_is_what_the_model_generates(hyper_cl):
    found = inspect(
        Some(hyper_cl=hyper_cl), WeightsState(recipe="hyper_cl", model="one", condition="The age.")
    )
    weights = hyper_cl.weights(["The age.", "The size."])
    torch.testing.assert_close(found.matrix, weights.matrix("projection", 0))
    assert (found.spectra["The age."] > 1e-4 * found.spectra["The age."].max()).sum() == 2  # rank 2
    assert found.names == ["The age.", *(name for name in KNOWN if name != "The age.")]
    table = found.tables["conditions"]
    known = weights.matrix("projection", 1)
    difference = weights.matrix("projection", 0) - known
    size = table.filter(name="The size.").to_dicts()[0]
    assert size["distance"] == pytest.approx(float(torch.linalg.matrix_norm(difference)), rel=1e-4)
    assert size["norm"] == pytest.approx(
        float(torch.linalg.matrix_norm(weights.matrix("projection", 1))), rel=1e-4
    )
    assert found.nearest()["distance"].is_sorted()
    assert found.tables["directions"].height == 2
    assert set(found.tables["attributes"].columns) == {"attribute", "before", "after", "floor", "count"}


def test_the_mean_of_the_known_conditions_can_be_taken_away(hyper_cl):
    state = WeightsState(recipe="hyper_cl", model="one", condition="how wet it is")
    own, less = (
        inspect(Some(hyper_cl=hyper_cl), state.model_copy(update={"minus_mean": one}))
        for one in (False, True)
    )
    weights = hyper_cl.weights(KNOWN)
    mean = torch.stack([weights.matrix("projection", row) for row in range(len(KNOWN))]).mean(0)
    torch.testing.assert_close(less.matrix, own.matrix - mean, rtol=1e-4, atol=1e-4)


def test_a_query_alone_has_no_singular_values(word_store):
    model = SmallHyperCL(word_store, kind="shared", rank=None, pooling="condition")
    model.encode = lambda texts, condition, strength=1.0: model.store.embed(texts)
    run = Some(hyper_cl=model)
    run._kept["hyper_cl"] = Kept("hyper_cl", kind="shared", pooling="condition")
    one = WeightsView(run, WeightsState())
    assert {*WeightsView.param.recipe.objects, *WeightsView.param.model.objects} <= {
        None
    }  # shared by all browsers
    assert one._found.spectra == {}
    assert one._panes["matrix"].figure.data[0].z.shape[0] == 1
    assert not one._panes["spectrum"].visible


def test_class_names_generate_norms_beside_the_class_sets_of_the_scenes(image_text_model):
    model: HyperCLIPModel = image_text_model()
    one = view(hyper_clip=model)
    assert one.condition == "cat, dog, bird"
    assert one._panes["layers"].visible
    assert not one._panes["matrix"].visible
    one.other = "ship, car"
    assert one._found.names[:2] == ["cat, dog, bird", "ship, car"]
    assert one._found.typed == 2
    layers = one._found.tables["layers"]
    assert layers["set"].n_unique() == len(one._found.names)
    one.condition = "cat"
    assert "at least two classes" in one.live.said
    assert isinstance(one._found, Inspected)


def test_known_class_sets_are_those_of_the_runs_data(monkeypatch):
    run = Kept("hyper_clip")
    assert class_sets_of(run)[0].name == "colour of scenes"
    run.recipe["data"] = {"source": "photos", "name": "photos", "path": None, "size": 32}
    asked = {"pets": (["cat", "dog"], ("a {}.",))}
    monkeypatch.setattr("workbench.generated.asked_classes", lambda data: asked if data.size == 32 else {})
    [pets] = class_sets_of(run)
    assert (pets.name, pets.prompts()) == ("pets", ["a cat.", "a dog."])
    # A tower trained on shards is asked what one trained on photos is.
    run.recipe["data"] = {"source": "shards", "name": "web", "size": 32, "limit": None, "asked": 200}
    assert [one.name for one in class_sets_of(run)] == ["pets"]

    def missing(_):
        raise ManifestError("not on this machine")

    monkeypatch.setattr("workbench.generated.asked_classes", missing)
    assert class_sets_of(run)[0].name == "colour of scenes"


@pytest.mark.parametrize(
    ("text", "names"), [("a, b", ["a", "b"]), (" a\nb ,, c", ["a", "b", "c"]), ("007,true", ["007", "true"])]
)
def test_class_names_are_read_by_commas_and_lines(text, names):
    assert typed_classes(text) == names


def test_class_names_that_cannot_be_used_are_refused():
    with pytest.raises(DataError, match="twice"):
        typed_classes("a, b, a")


def test_connectors_that_read_the_same_directions_lie_at_zero(zoo):
    one = view(hyper_align=zoo)
    found = one._found
    assert found.names == ["a", "a, turned", "b"]
    assert found.distances[0, 1] == pytest.approx(0, abs=1e-3)  # the square root of rounding
    a, b = (zoo.connector("text", name).weight for name in ("a", "b"))
    overlap = subspace_overlap(a, b, 6)
    assert found.distances[0, 2] == pytest.approx((1 - overlap) ** 0.5, rel=1e-6)
    assert found.tables["image encoders"]["overlap"][2] == pytest.approx(overlap, rel=1e-6)
    np.testing.assert_allclose(found.spectra["a"], singular_values(a))
    one.shown = "b"
    assert one._found.matrix.shape == (24, 6)


def test_controls_stand_behind_the_encoders(zoo, monkeypatch):
    maps = zoo.maps
    turned = ConnectorZoo({("text", "b"): maps["text", "b"], **maps}, "one")
    assert view(hyper_align=turned)._found.names == ["b", "a", "a, turned"]
    monkeypatch.setattr(Kept, "scores", pl.DataFrame({"image": ["a", "b"], "control": [False, True]}))
    found = view(hyper_align=turned)._found
    assert found.names == ["a", "a, turned", "b"]
    assert found.shown == "a"
    np.testing.assert_array_equal(found.matrix, maps["text", "a"].weight)


def test_another_kind_of_run_starts_from_its_own_example(hyper_cl, zoo):
    one = view(hyper_cl=hyper_cl, hyper_align=zoo)
    one.recipe = "hyper_align"
    assert one.condition == ""
    assert one._found.names == ["a", "a, turned", "b"]
    one.recipe = "hyper_cl"
    assert one.condition == "The colour."


def test_another_measure_changes_distances_figures_and_what_is_said_of_them(hyper_cl):
    one = view(hyper_cl=hyper_cl)
    frobenius = one._found.distances
    assert list(one.param.measure.objects.values()) == ["", "cosine", "angles"]
    one.measure = "cosine"
    weights = hyper_cl.weights(one._found.names)
    flat = torch.stack([weights.matrix("projection", row) for row in range(len(weights))]).flatten(1)
    expected = 1 - torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)
    assert one._found.distances[0, 1] == pytest.approx(float(expected), abs=1e-4)
    assert "1 - cosine" in one._panes["distances"].figure.layout.title.text
    assert "nothing in common" in one._about.object
    assert one.state().measure == "cosine"
    one.measure = "angles"
    assert one._found.distances.max() <= 1
    assert not np.allclose(one._found.distances, frobenius)


def test_a_measure_that_a_run_does_not_have_gives_way_to_its_first(hyper_cl, zoo):
    one = WeightsView(Some(hyper_cl=hyper_cl, hyper_align=zoo), WeightsState(measure="cosine"))
    assert one._found.measure == "cosine"
    one.recipe = "hyper_align"
    assert one._found.measure == "angles"
    assert one.measure == one.state().measure == ""


def test_names_stand_once_beside_the_matrix_of_distances(hyper_cl):
    figure = view(hyper_cl=hyper_cl)._panes["distances"].figure
    assert figure.layout.xaxis.showticklabels is False
    assert len(figure.layout.yaxis.ticktext) == len(KNOWN)


def test_numbers_say_how_they_are_computed_and_by_whom(hyper_cl):
    one = view(hyper_cl=hyper_cl)
    for name, table in one._found.tables.items():
        one.numbers = name
        numbers = [column for column, kind in table.schema.items() if kind.is_numeric()]
        for column in numbers:
            told = one._table.table.header_tooltips[column]
            assert told.startswith(f"{column}: "), (name, column)
            assert told.endswith("model one, seed 0; run hyper_cl-0")


def test_links_and_code_bring_the_state_back(hyper_cl):
    one = view(hyper_cl=hyper_cl)
    one.param.update(condition="007", other="true", shown="The size.", measure="angles")
    assert unpack(pack(one.state()), WeightsState) == one.state()
    line = next(line for line in one.code() if line.startswith("view ="))
    held = eval(
        line.removeprefix("view = WeightsView(Session(), ").removesuffix(")"), {"WeightsState": WeightsState}
    )
    assert held == one.state()
    assert one._found.shown == "The size."


def test_markup_is_escaped_in_every_figure(hyper_cl):
    one = view(hyper_cl=hyper_cl)
    one.condition = "<u>$x$</u>"
    for name, figure in one.figures(one._found).items():
        assert "<u>" not in figure.to_json().encode().decode("unicode_escape"), name


def test_shown_numbers_are_downloaded_with_all_their_digits(hyper_cl):
    one = view(hyper_cl=hyper_cl)
    one.numbers = "singular values"
    assert one._table.table.value.shape[0] == one._found.tables["singular values"].height
    frame = one._found.tables["conditions"]
    csv, parquet = (button.callback() for button in downloads("weights", lambda: frame))
    assert pl.read_parquet(io.BytesIO(parquet.getvalue())).equals(frame)
    np.testing.assert_allclose(pl.read_csv(csv)["norm"], frame["norm"], rtol=1e-12)


def test_only_models_that_generate_from_text_are_offered(hyper_cl):
    some = Some(hyper_cl=hyper_cl)
    for settings in ({"kind": "hadamard"}, {"condition": "one_hot"}):
        some._kept["hyper_cl"] = Kept("hyper_cl", **settings)
        assert inspectable(some) == {}
    with pytest.raises(RunError, match="kept no model 'one'"):
        inspect(some, WeightsState(recipe="hyper_cl", model="one"))


def test_a_graph_head_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match="no usable graph head"):
        predictor_of_relations(Run(tmp_path), "hyper_full")

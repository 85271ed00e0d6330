"""Models and dashboards on another device than the CPU: all that a view computes, none of it left behind."""

import copy
import json

import numpy as np
import panel as pn
import plotly.graph_objects as go
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from tests.figures import plain
from tests.pretended_device import DEVICE, Pretended
from workbench import export as export_module
from workbench.background import Background
from workbench.cli import app
from workbench.datasets.graphs import SPLITS, Graph
from workbench.errors import DataError, RunError
from workbench.geometry.pointing import class_maps, draw_fours
from workbench.geometry.text_attribution import WordAttribution
from workbench.link_prediction import LinkPredictor
from workbench.moved import ConditionedTexts
from workbench.papers.hyper_cl_kg import GraphHead
from workbench.papers.hyper_cl_kg_settings import GraphModelSettings
from workbench.runs import check_device
from workbench.search import ConditionedIndex
from workbench.session import Session, shared_session
from workbench.view_state import (
    ClassifyState,
    ConditionsState,
    FairnessState,
    SimilarityState,
    WeightsState,
)
from workbench.views import page
from workbench.views.classify import ClassifyView
from workbench.views.conditions import ConditionsView
from workbench.views.fairness import FairnessView
from workbench.views.index import open_index
from workbench.views.similarity import PairsView
from workbench.views.weights import WeightsView

TEXTS = ["A red car.", "A blue bicycle by the sea.", "Three small cats.", "A red fox."]
VIEWS = {
    "conditions": (
        ConditionsView,
        ConditionsState(condition="The colour.", other="The size.", blend=0.3, query="red"),
    ),
    "similarity": (PairsView, SimilarityState(pairs="bundled", condition="The colour.")),
    "weights": (WeightsView, WeightsState(recipe="hyper_cl_bundled_tiny", condition="The age.")),
    "weights of images": (WeightsView, WeightsState(recipe="hyper_clip_scenes_tiny")),
    "classify": (ClassifyView, ClassifyState(names="circles, squares, stars")),
    "fairness": (FairnessView, FairnessState(about="wording", asked="shape", templates="a {} here")),
    "fairness of texts": (FairnessView, FairnessState(about="texts")),
}


@pytest.fixture(scope="module")
def out(tiny_run, tiny_image_run, tiny_zoo_run, tmp_path_factory):
    """One folder that holds a run of sentences, one of images and one of a zoo."""
    folder = tmp_path_factory.mktemp("devices") / "reports"
    for run in (tiny_run, tiny_image_run, tiny_zoo_run):
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        (folder / "runs" / run.folder.name).symlink_to(run.folder)
    return folder


@pytest.fixture(autouse=True)
def entered():
    with Pretended():
        yield


def test_what_is_not_moved_fails_on_the_pretended_device_as_it_would_on_a_gpu():
    there = torch.ones(2, 3).to(DEVICE)
    assert torch.nn.Linear(3, 2).to(DEVICE)(there).device.type == DEVICE
    with pytest.raises(RuntimeError, match="mixes devices"):
        there @ torch.ones(3, 2)
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    assert not torch.accelerator.is_available() or torch.cuda.is_available()


# --- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["concat", "hadamard", "hyper_k16", "hyper_query_k16"])
def test_texts_go_in_and_embeddings_come_out_on_the_cpu(tiny_run, name):
    here, there = tiny_run.model(name), tiny_run.model(name).to(DEVICE)
    assert there.device.type == there.encoder.model.device.type == DEVICE
    for strength in (0.0, 1.3):
        found = there.encode(TEXTS, {"The colour.": 0.5, "The size.": 0.5}, strength)
        expected = here.encode(TEXTS, {"The colour.": 0.5, "The size.": 0.5}, strength)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    asked = ["The colour.", "The size.", "The colour.", "The age."]
    found, expected = (one.encode_conditioned(TEXTS, asked) for one in (there, here))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    frame = pl.DataFrame({"text": TEXTS})
    found, expected = (ConditionedTexts(one, frame).move("The colour.") for one in (there, here))
    torch.testing.assert_close(found.after, expected.after, atol=1e-5, rtol=0)


def test_generated_weights_come_back_to_be_looked_at(tiny_run):
    here, there = tiny_run.model("hyper_k16"), tiny_run.model("hyper_k16").to(DEVICE)
    for name, tensor in there.weights(["The colour."]).tensors.items():
        torch.testing.assert_close(tensor, here.weights(["The colour."]).tensors[name], atol=1e-5, rtol=1e-5)


def test_search_and_attribution_compute_where_the_model_does(tiny_run):
    here, there = tiny_run.model("hyper_k16"), tiny_run.model("hyper_k16").to(DEVICE)
    found, expected = (
        ConditionedIndex(one, TEXTS).search(["A red thing."], "The colour.", k=3) for one in (there, here)
    )
    assert found.rows.tolist() == expected.rows.tolist()
    asked = TEXTS[0], TEXTS[3], "The colour."
    found, expected = (WordAttribution(one).of_sentence(*asked, steps=2)[1] for one in (there, here))
    torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=0)


def test_vectors_made_before_are_read_where_the_model_computes(tiny_run):
    here, there = tiny_run.model("hyper_k16"), tiny_run.model("hyper_k16").to(DEVICE)
    vectors = here.store.embed(TEXTS)
    found, expected = (one.encode(one.prepared_vectors(vectors), "The colour.") for one in (there, here))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_was_made_before_a_move_says_that_it_has_to_be_made_again(tiny_run, image_text_model):
    model = tiny_run.model("hyper_k16")
    index, prepared = ConditionedIndex(model, TEXTS), model.prepare(TEXTS)
    model.to(DEVICE)
    with pytest.raises(DataError, match="index was made before its model moved"):
        index.search(TEXTS[:1], "The colour.", k=1)
    with pytest.raises(DataError, match="prepare them again"):
        model.encode(prepared, "The colour.")
    assert ConditionedIndex(model, TEXTS).device.type == DEVICE
    images = image_text_model()
    classifier = images.adapt(["cat", "dog"])
    images.to(DEVICE)
    with pytest.raises(DataError, match="adapt again"):
        classifier.scores(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_model_as_a_sentence_transformer_stays_where_it_is(tiny_run):
    model = tiny_run.model("hyper_k16").to(DEVICE)
    assert model.sentence_transformer().device.type == DEVICE
    assert model.device.type == model.encoder.model.device.type == DEVICE


def test_a_graph_model_ranks_on_the_device(encoder, tmp_path):
    graph = Graph(
        ["red fox", "fox", "cat"], ["is a kind of", "inverse is a kind of"],
        dict.fromkeys(SPLITS, torch.tensor([[0, 0, 1]])),
    )  # fmt: skip
    torch.manual_seed(0)
    head = GraphHead(GraphModelSettings(name="own", kind="hyper", rank=4), 384, 384)
    here, there = (LinkPredictor(copy.deepcopy(head), graph, encoder, tmp_path) for _ in range(2))
    there.to(DEVICE)
    try:
        for asked in ("red fox", "a small dog"):
            found, expected = (one.predict(asked, "is a kind of", k=3) for one in (there, here))
            assert found["tail"].to_list() == expected["tail"].to_list()
            np.testing.assert_allclose(found["score"], expected["score"], atol=1e-4)
        for name, tensor in there.weights(["is a kind of"]).tensors.items():
            expected = here.weights(["is a kind of"]).tensors[name]
            torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-5)
    finally:
        encoder.model.to("cpu")


@pytest.mark.parametrize("kind", ["hyper", "siglip"])
def test_pictures_go_in_and_answers_come_out_on_the_cpu(image_text_model, kind):
    here, there = image_text_model(kind), image_text_model(kind).to(DEVICE)
    assert there.device.type == DEVICE
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    found, expected = (one.adapt(["cat", "dog", "fox"]) for one in (there, here))
    torch.testing.assert_close(found.scores(pixels), expected.scores(pixels), atol=1e-4, rtol=1e-4)
    label = torch.tensor([0, 1, 2, 0, 1])
    assert found.ranks(pixels, label).tolist() == expected.ranks(pixels, label).tolist()
    assert found.classify(pixels)["class"].to_list() == expected.classify(pixels)["class"].to_list()
    if kind == "hyper":
        torch.testing.assert_close(found.vector(), expected.vector(), atol=1e-5, rtol=0)
        tasks = [[one.adapt(names) for names in (["cat", "dog"], ["fox", "owl"])] for one in (there, here)]
        rows = torch.tensor([0, 1, 1, 0, 1])
        found, expected = (
            one.embed_tasks(pixels, own, rows).cpu() for one, own in zip((there, here), tasks, strict=True)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_classifier_is_exported_from_the_device(image_text_model, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_latency", lambda *_: {})
    found = export_module.export(image_text_model().to(DEVICE).adapt(["cat", "dog"]), tmp_path / "kept")
    assert found.card["static"]["largest_difference"] <= 1e-4


def test_heat_maps_are_made_where_the_model_computes(image_text_model):
    here, there = image_text_model(side=64), image_text_model(side=64).to(DEVICE)
    found, expected = (class_maps(one.adapt(["red", "blue"]), draw_fours(2).pixels) for one in (there, here))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# --- dashboards ---------------------------------------------------------------------------------------------


def _figures(name, out, device, monkeypatch):
    """Run a view's notebook code over models on a device; return the numbers of its figures."""
    view, state = VIEWS[name]
    session = Session(out, device)
    monkeypatch.setattr("workbench.session.Session", lambda: session)
    opened, load = [], session.model

    def model(*asked):
        opened.append(load(*asked))
        return opened[-1]

    monkeypatch.setattr(session, "model", model)
    figures: list = []
    monkeypatch.setattr(go.Figure, "show", lambda figure: figures.append(figure))
    *lines, last = view(session, state).code()
    if last.startswith("view."):
        last = f"({last}).show()"
    exec("\n".join([*lines, last]), {})
    computing = [one for one in opened if hasattr(one, "device")]
    assert computing
    assert {one.device.type for one in computing} == {device}
    drawn = [json.loads(one.to_json()) for one in figures]
    return [plain({"data": one["data"], "told": one["layout"].get("annotations", [])}) for one in drawn]


def _content(part):
    """Return the numbers and the texts of a figure's parts, in their order; pictures are left out."""
    if isinstance(part, dict | list):
        inner = [one for _, one in sorted(part.items())] if isinstance(part, dict) else part
        found = [_content(one) for one in inner]
        return [one for numbers, _ in found for one in numbers], [one for _, texts in found for one in texts]
    if isinstance(part, str):
        return [], [part] * (not part.startswith("data:"))
    return [] if part is None else [float(part)], []


@pytest.mark.parametrize("name", VIEWS)
def test_every_dashboard_computes_on_the_device_and_shows_the_same(name, out, monkeypatch):
    found, expected = (_content(_figures(name, out, device, monkeypatch)) for device in (DEVICE, "cpu"))
    assert len(found[0]) + len(found[1]) > 20
    np.testing.assert_allclose(found[0], expected[0], atol=2e-4)
    assert found[1] == expected[1]


def test_a_session_refuses_a_device_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="device 'cuda:99' cannot be used here"):
        Session(tmp_path, "cuda:99")
    told = CliRunner().invoke(app, ["serve", "--out", str(tmp_path), "--device", "meta"])
    assert isinstance(told.exception, RunError)
    assert "device 'meta'" in str(told.exception)
    check_device("cpu")


def test_a_page_says_which_device_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_OUT", str(tmp_path))
    monkeypatch.setenv("WORKBENCH_DEVICE", "cuda:99")
    framed = []
    monkeypatch.setattr(page, "framed", lambda body, *_: framed.append(body) or pn.Column())
    for opening in (open_index, lambda: page.open_view("Conditions", ConditionsView, ConditionsState)):
        opening()
        assert "WORKBENCH_DEVICE: device 'cuda:99' cannot be used here" in framed[-1].object
    assert len(framed) == 2


def test_a_server_hands_its_device_on(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_OUT", str(tmp_path))
    monkeypatch.setenv("WORKBENCH_DEVICE", DEVICE)
    session = shared_session()
    assert (session.out, session.device) == (tmp_path, DEVICE)
    assert shared_session() is session
    command = Background(session.out, session.device).command()
    assert command[command.index("--device") + 1] == DEVICE

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn.functional import normalize

from workbench.errors import DataError, RunError
from workbench.model import HyperCL
from workbench.papers.hyper_cl import ConditionedHead
from workbench.papers.hyper_cl_settings import ModelSettings
from workbench.runs import Run
from workbench.session import ConditionedTexts, Session

FRAME = pl.DataFrame(
    {"sentence": [f"text {row}" for row in range(24)], "id": range(24),
     "kind": ["a", "b"] * 12, "size": ["s", "m", "l", None] * 6}
)  # fmt: skip


class TwoAxes(HyperCL):
    """Plain vectors tell sizes apart, vectors under any condition tell kinds apart."""

    def __init__(self):
        self.asked = []

    def apart(self):
        return self

    def prepare(self, texts, told=None):
        return texts

    def encode(self, texts, condition, strength=1.0):
        self.asked.append((condition, strength))
        rows = torch.tensor([int(text.split()[1]) for text in texts])
        jitter = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))[rows] * 0.01
        plain, other = torch.eye(5)[rows % 4] + jitter, torch.eye(5)[rows % 2 + 3] + jitter
        return normalize((1 - strength) * plain + strength * other, dim=1)


@pytest.fixture
def moved():
    return ConditionedTexts(TwoAxes(), FRAME).move("the kind")


def test_attributes_are_columns_of_few_values():
    assert ConditionedTexts(TwoAxes(), FRAME).attributes == ["kind", "size"]


def test_purity_rises_for_what_the_condition_asks_for(moved):
    before, after = moved.purity("size").to_dicts()
    assert (before["side"], before["count"]) == ("before", 18)  # six of 24 have no size
    # Before, the five others of the same size are nearest; ten neighbours are asked, of 17.
    assert before["value"] == pytest.approx(0.5, abs=0.01)
    assert before["floor"] == pytest.approx(3 * (1 / 3) ** 2)
    before, after = moved.purity("kind").to_dicts()
    assert after["value"] == pytest.approx(1.0)
    assert before["value"] < 1
    assert all(row["low"] <= row["value"] <= row["high"] for row in (before, after))
    assert after["floor"] == pytest.approx(0.5)


def test_neighbours_are_the_largest_cosines_without_the_sentence_itself(moved):
    found = moved.neighbours(3, count=4)
    for side, embedded in (("before", moved.before), ("after", moved.after)):
        rows = found.filter(side=side)
        cosines = (embedded @ embedded[3]).numpy()
        cosines[3] = -2
        order = np.argsort(-cosines)[:4]
        assert rows["text"].to_list() == [f"text {row}" for row in order]
        np.testing.assert_allclose(rows["cosine"], cosines[order], rtol=1e-6)


def test_neither_slider_turns_the_map():
    texts = ConditionedTexts(TwoAxes(), FRAME)
    one, two = texts.move("the kind", strength=0.2), texts.move("the kind", strength=1.0)
    np.testing.assert_allclose(one.frame.select("x0", "y0"), two.frame.select("x0", "y0"), atol=1e-6)
    still = texts.move("the kind", strength=0.0).frame
    np.testing.assert_allclose(still.select("x0", "y0"), still.select("x1", "y1"), atol=1e-6)


def test_two_conditions_are_blended_by_their_weights():
    model = TwoAxes()
    ConditionedTexts(model, FRAME).move("the kind", "the size", blend=0.25, strength=1.5)
    assert ({"the kind": 0.75, "the size": 0.25}, 1.5) in model.asked


def test_an_empty_condition_is_refused():
    with pytest.raises(DataError, match="empty"):
        ConditionedTexts(TwoAxes(), FRAME).move("  ")


def test_nothing_trained_says_how_to_start(tmp_path):
    with pytest.raises(RunError, match="workbench reproduce"):
        Session(tmp_path).run("", "hyper_cl")


def test_clusters_find_the_kinds_under_the_condition(moved):
    before, after = moved.clusters("kind").to_dicts()
    assert after["value"] == 1.0  # two clusters, one for each kind
    # Plain vectors tell four sizes apart: each of the two clusters holds whole sizes, 6 sentences each, and a
    # size is of one kind. Two sizes of one kind together give 1, two of both kinds 1/2.
    assert before["value"] in (0.5, 0.75, 1.0)
    # Of 24 sentences in two clusters the commonest value of each is at least half.
    assert 0.5 <= after["floor"] < 0.75


@pytest.fixture(scope="module")
def models(encoder, tmp_path_factory):
    """A head that pools tokens and one on sentence vectors, untrained, over the real encoder."""
    torch.manual_seed(0)
    cache = tmp_path_factory.mktemp("store")
    asked = {"pooled": {"pooling": "condition", "identity": True}, "whole": {"identity": False}}
    return {
        name: HyperCL(
            ConditionedHead(ModelSettings(name=name, kind="hyper", rank=4, **more), 384, 384), encoder, cache
        )
        for name, more in asked.items()
    }


TEXTS = ["A red fox.", "Two small kites flew over the whole of the old city.", "Newts.", "Red, red, red."]


@pytest.mark.parametrize("name", ["pooled", "whole"])
def test_prepared_texts_are_embedded_as_a_plain_list_is(models, name):
    model, counted = models[name], []
    prepared = model.prepare(TEXTS, counted.append)
    assert counted == [4]
    mixed = {"The colour.": 0.5, "The size.": 0.5}
    for condition, strength in (("The colour.", 1.0), (mixed, 1.5), ("x", 0.0)):
        listed = model.encode(TEXTS, condition, strength)
        torch.testing.assert_close(model.encode(prepared, condition, strength), listed, atol=1e-6, rtol=1e-5)


def test_texts_given_to_a_model_apart_leave_no_trace(models):
    model = models["pooled"]
    model.encode(TEXTS, "The colour.")
    files, known = sorted(model.store.folder.iterdir()), len(model.store._place)
    other = model.apart()
    texts = ["A private sentence.", *TEXTS]
    found = other.encode(texts, "A private condition.")
    assert sorted(model.store.folder.iterdir()) == files
    assert len(model.store._place) == known
    torch.testing.assert_close(found[1:], model.encode(TEXTS, "A private condition."), atol=1e-5, rtol=1e-4)


def test_what_is_typed_on_a_page_is_not_written_to_disk(tiny_run, tiny_image_run, tmp_path):
    for run in (tiny_run, tiny_image_run):
        shutil.copytree(run.folder, tmp_path / "runs" / run.folder.name)
    session = Session(tmp_path)
    texts = session.texts_of("", "hyper_query_k16")
    folders = [tiny_run.model("hyper_query_k16").store.folder, tiny_run.model("hyper_k16").store.folder]
    before = [sorted(folder.iterdir()) for folder in folders]
    assert all(before)  # bundled sentences and conditions, from training
    texts.move("A condition that nobody typed before.")
    session.model(tiny_run, "hyper_k16").encode(["Nobody typed this."], "Nor this.")
    images = session.run(tiny_image_run.recipe["name"], "hyper_clip")
    session.model(images, "hyperclip_residual").adapt(["a thing nobody typed", "another"])
    assert [sorted(folder.iterdir()) for folder in folders] == before
    one, two = (session.model(tiny_run, name).store for name in ("hyper_query_k16", "hyper_k16"))
    assert one is not two  # one keeps tokens
    assert session.model(images, "hyperclip_residual").store is two


def test_vectors_stand_for_texts_only_where_the_model_reads_vectors(models):
    whole, frame = models["whole"], pl.DataFrame({"text": TEXTS, "kind": ["a", "b", "a", "b"]})
    vectors = whole.store.embed(TEXTS)
    brought = frame.hstack(pl.DataFrame({f"v{n}": vectors[:, n].numpy() * 3 for n in range(384)}))
    with_vectors = ConditionedTexts(whole, brought)
    assert with_vectors.frame.columns == ["text", "kind"]
    after = ConditionedTexts(whole, frame).move("The colour.").after
    torch.testing.assert_close(with_vectors.move("The colour.").after, after, atol=1e-6, rtol=1e-5)
    with pytest.raises(DataError, match="pools the tokens"):
        ConditionedTexts(models["pooled"], brought)
    with pytest.raises(DataError, match="have 383 numbers, model whole reads 384"):
        ConditionedTexts(whole, brought.drop("v383"))


def test_many_threads_that_bring_texts_get_their_own_embeddings(models):
    model = models["whole"].apart()
    texts = [f"Sentence number {number}." for number in range(24)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: model.store.embed(texts[start::4]), range(4)))
    again = models["whole"].apart().store
    for start, embedded in enumerate(found):
        torch.testing.assert_close(embedded, again.embed(texts[start::4]), atol=1e-5, rtol=1e-4)


def test_two_that_ask_for_a_model_load_it_once_and_nobody_else_waits(tmp_path):
    session, go, begun, loaded = Session(tmp_path), threading.Event(), threading.Event(), []

    def slowly(run, name):
        loaded.append(name)
        begun.set()
        assert go.wait(30)
        return name.upper()

    run = Run(Path("run"))
    with ThreadPoolExecutor(2) as people:
        both = [people.submit(session.model, run, "one", slowly) for _ in range(2)]
        assert begun.wait(30)
        # Under the lock of that model alone: what is known is told, and another model is opened.
        assert session.runs() == {}
        assert session.model(run, "two", lambda run, name: name) == "two"
        go.set()
        assert [one.result() for one in both] == ["ONE", "ONE"]
    assert loaded == ["one"]

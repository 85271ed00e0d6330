"""The classify page without a browser: names become answers, names tell the truth, bad files are named."""

import io
import json
import zipfile

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score

from workbench import predictions
from workbench.datasets.samples import (
    MOST_FILES,
    OWN,
    SCENES,
    attribute_values,
    scene_sample,
    uploaded_sample,
    values_of,
)
from workbench.errors import DataError, RunError
from workbench.export import Export
from workbench.predictions import accuracies, adapt_both, adaptable, confusion, names_in, warnings_of
from workbench.runs import Run
from workbench.session import Session
from workbench.view_state import ClassifyState, pack, unpack
from workbench.views.classify import ClassifyView

# Bokeh calls pandas 3.1 in a way that pandas is about to drop; tables work.
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")

RECIPE = {
    "name": "by_hand", "paper": "hyper_clip", "reference": "siglip", "seeds": [0],
    "data": {"source": "scenes"},
    "models": [{"name": "siglip", "kind": "siglip"}, {"name": "ours", "kind": "hyper", "against": "token"},
               {"name": "token", "kind": "token_control"}],
}  # fmt: skip
PROVENANCE = {
    "commit": "c" * 40, "data_sha256": "d" * 64, "device": "CPU", "seeds": [0], "workbench": "1",
    "encoder_sha256": "e",
}  # fmt: skip


def difference(other: str, group: str, value: float, low: float, high: float) -> dict:
    return {"split": "test", "model": "ours", "group": group, "metric": f"top1_minus_{other}", "value": value,
            "low": low, "high": high, "count": 10, "seed": None}  # fmt: skip


class OneRun(Session):
    """Stands for a session over one run whose models are small and untrained."""

    def __init__(self, folder, models):
        self._run_by_hand, self._by_name = Run(folder / "by_hand-1"), models
        for name in models:
            kept = self._run_by_hand.folder / "models" / name
            kept.mkdir(parents=True)
            (kept / "head.json").touch()
        rows = [difference("siglip", "all", 0.05, 0.01, 0.09), difference("token", "all", 0.05, 0.01, 0.09)]
        held = {"recipe": RECIPE, "provenance": PROVENANCE, "metrics": pl.DataFrame(rows)}
        self._run_by_hand.__dict__.update(held)

    def runs(self, *papers):
        return {"by_hand": self._run_by_hand}

    def run(self, recipe, *papers):
        return self._run_by_hand

    def model(self, run, name, *_):
        return self._by_name[name]


@pytest.fixture(scope="module")
def models(image_text_model):
    found = {"ours": image_text_model(), "siglip": image_text_model("siglip")}
    found["ours"].model.calibration = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    return found


@pytest.fixture
def session(tmp_path, models):
    return OneRun(tmp_path, models)


def encoded(mode: str = "RGB", kind: str = "PNG", side: int = 40) -> bytes:
    raw = io.BytesIO()
    Image.new(mode, (side, side), 128 if mode == "L" else (10, 200, 30, 128)[: len(mode)]).save(raw, kind)
    return raw.getvalue()


# --- class names and their truth ----------------------------------------------------------------------------


def test_names_stand_on_lines_or_between_commas_and_stay_text():
    assert names_in("red, blue\n007\n\n, true ,") == ["red", "blue", "007", "true"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("red", {"colour": "red"}),
        ("Crimson things", {"colour": "red"}),
        ("crosses", {"shape": "cross"}),
        ("two striped blue rings", {"count": "two", "texture": "striped", "colour": "blue", "shape": "ring"}),
        ("things in the upper left corner", {"place": "top left"}),
        ("a red fox", None),
        ("red and blue", None),
        ("things", None),
        ("007", None),
    ],
)
def test_a_name_is_read_as_values_of_a_scenes_attributes(name, values):
    assert attribute_values(name) == values


def test_the_truth_is_known_only_if_all_names_speak_of_the_same_attributes():
    assert values_of(["red", "blue"]) == [{"colour": "red"}, {"colour": "blue"}]
    assert values_of(["red", "circle"]) is None
    assert values_of(["red", "crimson"]) is None  # one class under two names


def test_scenes_show_the_class_that_is_their_truth_and_are_the_same_again():
    names = ["one red star", "two blue rings"]
    found, again = scene_sample(names, 32, 30), scene_sample(names, 32, 30)
    assert found.labelled
    assert set(found.truth) == {0, 1}
    for place, about in zip(found.truth, found.about, strict=True):
        assert attribute_values(about).items() >= attribute_values(names[place]).items()
    assert torch.equal(found.pixels, again.pixels)
    assert not torch.equal(found.pixels, scene_sample(names, 32, 30, seed=1).pixels)
    assert not scene_sample(["a fox", "a wolf"], 32, 5).labelled


# --- two classifiers ----------------------------------------------------------------------------------------


def test_unadapted_is_the_runs_baseline_if_it_was_kept(session):
    pair = adapt_both(session, session.run(""), "ours", ["red", "blue"])
    assert pair.unadapted.source is session.model(None, "siglip")
    assert "siglip" in pair.what


def test_without_a_kept_baseline_unadapted_is_the_same_model_under_other_weights(tmp_path, models):
    session = OneRun(tmp_path, {"ours": models["ours"]})
    pair = adapt_both(session, session.run(""), "ours", ["red", "blue"])
    assert pair.unadapted.source is pair.adapted.source
    assert torch.equal(pair.unadapted.directions, pair.adapted.directions)
    assert not torch.equal(pair.unadapted.vector(), pair.adapted.vector())
    assert "kept no baseline" in pair.what


def test_a_run_without_an_adaptable_model_says_so(tmp_path, models):
    with pytest.raises(RunError, match="kept no model that adapts"):
        adaptable(OneRun(tmp_path, {"siglip": models["siglip"]}).run(""))


ANSWERS = pl.DataFrame(
    {"truth": ["a", "a", "b", "b"], "adapted": ["a", "a", "b", "a"], "unadapted": ["b", "a", "b", "a"]}
)


def test_accuracies_and_confusion_of_a_hand_case():
    rows = accuracies(ANSWERS).to_dicts()
    # Adapted is right three times of four, unadapted twice.
    assert [row["value"] for row in rows] == [0.75, 0.5, 0.25]
    assert rows[0]["value"] == accuracy_score(ANSWERS["truth"], ANSWERS["adapted"])
    assert all(row["low"] <= row["value"] <= row["high"] and row["count"] == 4 for row in rows)
    counts = confusion(ANSWERS, "adapted", ["a", "b", "c"])["count"].to_list()
    assert counts == [2, 0, 0, 1, 1, 0, 0, 0, 0]  # rows a, b, c


def test_a_generated_encoder_that_does_not_help_is_warned_of(session):
    run = session.run("")
    assert warnings_of(run, "ours") == []
    run.__dict__["metrics"] = pl.DataFrame([
        difference("siglip", "all", -0.03, -0.05, -0.01), difference("token", "all", 0.01, -0.02, 0.04),
        difference("siglip", "family=held out", 0.04, 0.01, 0.06),
    ])  # fmt: skip
    worse, unclear = warnings_of(run, "ours")
    assert "worse than siglip over all class sets: -0.030 (-0.050 to -0.010)" in worse
    assert "no better for certain than token" in unclear


def test_the_archive_holds_the_export_and_a_card_that_says_where_it_comes_from(
    session, monkeypatch, tmp_path
):
    def export(classifier, folder):  # the real one is tested where it lives, and takes its time
        folder.mkdir()
        for name in ("static.onnx", "card.json"):
            (folder / name).write_text("{}")
        return Export(folder, {"model": "ours", "classes": 2})

    monkeypatch.setattr(predictions, "export", export)
    monkeypatch.setattr(predictions.tempfile, "tempdir", str(tmp_path))
    run = session.run("")
    raw = predictions.archive(adapt_both(session, run, "ours", ["007", "blue"]), run)
    with zipfile.ZipFile(io.BytesIO(raw)) as files:
        assert sorted(files.namelist()) == ["card.json", "static.onnx"]
        card = json.loads(files.read("card.json"))
    assert card["class_names"] == ["007", "blue"]
    assert (card["commit"], card["run"], card["seed"]) == ("c" * 40, "by_hand-1", 0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]


# --- uploads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("RGB", "JPEG")])
def test_pictures_of_every_mode_become_rgb_squares(mode, kind):
    found = uploaded_sample({"one": encoded(mode, kind)}, 32)
    assert found.pixels.shape == (1, 3, 32, 32)
    assert not found.labelled


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "no picture yet"),
        ({"notes.png": b"hello"}, "notes.png: not a PNG or JPEG"),
        ({"cut.png": encoded()[:60]}, "cut.png: cut short or damaged"),
        ({"fine.png": encoded(), "bad.gif": b"GIF89a"}, "bad.gif"),
        ({f"{row}.png": b"" for row in range(MOST_FILES + 1)}, "at most 24"),
        ({"large.png": b"\x89PNG" + bytes(5_000_000)}, "at most 5 MB"),
    ],
)
def test_a_bad_upload_gives_one_clear_message(files, complaint):
    with pytest.raises(DataError, match=complaint):
        uploaded_sample(files, 32)


# --- the view -----------------------------------------------------------------------------------------------


def view(session, **state) -> ClassifyView:
    return ClassifyView(session, ClassifyState(**state))


def test_typed_names_change_answers_table_and_link(session):
    one = view(session, names="red, blue")
    before = one._shown.answers
    assert set(before["adapted"]) <= {"red", "blue"}
    one.names = "circles\nsquares\n007"
    assert set(one._shown.answers["adapted"]) <= {"circles", "squares", "007"}
    assert unpack(pack(one.state()), ClassifyState).names == "circles\nsquares\n007"
    assert not one._table.visible  # 007 is no shape: no truth, so no accuracy
    one.names = "circles, squares"
    assert one._table.visible
    assert len(one.matrices(one._shown)) == 2


def test_names_that_make_no_classifier_are_said_and_what_was_shown_stays(session):
    one = view(session, names="red, blue")
    shown = one._shown
    one.names = "red"
    assert "at least two classes" in one.live.said
    assert one._shown is shown


def test_pictures_that_the_two_disagree_on_come_first(session):
    answered = view(session, names="red, blue, green").answered()
    differ = (answered.answers["adapted"] != answered.answers["unadapted"]).to_list()
    shown = [differ[row] for row in answered.first()]
    assert shown == sorted(shown, reverse=True)
    assert sum(shown) == min(sum(differ), 12)


def test_uploads_are_asked_and_named_and_stand_in_no_link(session):
    one = view(session, names="red, blue", pictures=OWN)
    assert "no picture yet" in one.live.said
    one.upload({"<b>mine</b>.png": encoded()})
    assert one._shown.answers["about"].to_list() == ["<b>mine</b>.png"]
    assert "mine" not in json.dumps(one.state().model_dump())
    one.upload({"bad.png": b"x"})
    assert "bad.png" in one.live.said


def test_markup_in_names_is_shown_and_not_read(session):
    figure = (one := view(session, names="<img src=x>, $y$")).figure(one._shown)
    text = " ".join(note.text for note in figure.layout.annotations)
    assert "<img" not in text
    assert "$" not in text


def test_the_code_shown_makes_the_same_state(session):
    one = view(session, names='007, say "hi"')
    line = next(line for line in one.code() if line.startswith("view ="))
    held = eval(
        line.removeprefix("view = ClassifyView(Session(), ").removesuffix(")"),
        {"ClassifyState": ClassifyState},
    )
    assert held == one.state()


def test_a_saved_page_holds_our_pictures_and_no_pictures_of_others(session):
    one = view(session, names="red, blue", pictures=SCENES)
    assert (
        sum("pictures of others" in str(getattr(part, "object", "")).lower() for part in one.content()) == 0
    )
    foreign = type(one._shown.sample)(
        one._shown.sample.pixels, one._shown.sample.truth, one._shown.sample.about, own=False
    )
    object.__setattr__(one._shown, "sample", foreign)
    assert (
        sum("pictures of others" in str(getattr(part, "object", "")).lower() for part in one.content()) == 1
    )


def test_every_classifier_of_a_model_leaves_it_as_it_was(session):
    source = session.model(None, "ours")
    pixels = torch.from_numpy(np.full((2, 3, 32, 32), 99, dtype=np.uint8))
    before = source.adapt(["red", "blue"]).scores(pixels)
    view(session, names="circles, squares")
    assert torch.equal(before, source.adapt(["red", "blue"]).scores(pixels))

"""Runs: found again if nothing changed, never half visible, and silent about the machine and the texts."""

import errno
import getpass
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager

import numpy as np
import polars as pl
import pytest
import torch

import workbench
from workbench import encoders, runs
from workbench.connector_zoo import ConnectorZoo
from workbench.errors import RunError
from workbench.runs import Run, find_run, finished_runs, run_recipe, runs_folder

MINI = """
paper: hyper_cl
title: Three models on a few invented pairs
seeds: [0]
data: {source: files, name: kites, path: %s}
training: {epochs: 1, batch_size: 16, learning_rate: 1e-3}
resamples: 100
reference: concat
models:
  - {name: condition_only, kind: condition_only}
  - {name: cosine, kind: cosine}
  - {name: concat, kind: concat}
  - {name: hyper, kind: hyper, rank: 2}
"""


def pairs(word="kite"):
    rows = []
    for n in range(24):
        asked = ("The shape.", "The sound.") if n % 3 else ("The sound.", "The shape.")
        for label, condition in enumerate(asked):
            rows.append([f"A red {word}, number {n}.", f"A drum, number {n}.", condition, float(label)])
    return pl.DataFrame(rows, schema=["sentence1", "sentence2", "condition", "label"], orient="row")


pytestmark = pytest.mark.usefixtures("one_encoder")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of a second's work, on a file of its own."""
    folder = tmp_path_factory.mktemp("recipe")
    pairs().write_csv(folder / "kites.csv")
    (folder / "mini.yaml").write_text(MINI % (folder / "kites.csv"))
    return str(folder / "mini.yaml")


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory):
    """One finished run of it; tests must not change it."""
    return run_recipe(recipe, out=tmp_path_factory.mktemp("out"))


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the finished run that a test may spoil, with its output folder."""
    folder = tmp_path / "out" / "runs" / made.folder.name
    folder.parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", made.folder, folder], check=True)
    return Run(folder), tmp_path / "out"


def out_of(run):
    return run.folder.parent.parent


# --- found again, or not ------------------------------------------------------------------------------------


def test_a_finished_run_is_reused_without_touching_a_file(recipe, made):
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    again = run_recipe(recipe, out=out_of(made))
    assert again.folder == made.folder
    assert {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")} == before


def test_a_run_asked_for_afresh_is_computed_again_with_the_same_numbers(recipe, copied):
    run, out = copied
    finished, metrics, scores = run.provenance["finished"], run.metrics, run.scores
    again = run_recipe(recipe, out=out, fresh=True)
    assert again.folder == run.folder
    assert again.provenance["finished"] > finished
    assert again.metrics.equals(metrics)
    assert again.scores.equals(scores)


def test_helpers_of_a_run_asked_for_afresh_are_asked_for_it_afresh(recipe, copied, monkeypatch):
    asked = []

    @contextmanager
    def alone(size, request):
        asked.append((size, request["fresh"]))
        yield

    monkeypatch.setattr("workbench.sharing.shared", alone)
    run_recipe(recipe, out=copied[1], fresh=True, workers=2)
    assert asked == [(2, True)]


def test_another_seed_makes_another_run(recipe, made, copied):
    other = run_recipe(recipe, out=copied[1], changes={"seeds": [1]})
    assert other.folder.name != made.folder.name
    assert set(other.metrics["seed"].drop_nulls()) == {1}
    assert not other.scores.filter(model="concat")["score"].equals(
        made.scores.filter(model="concat")["score"]
    )
    assert len(finished_runs(copied[1])) == 2


def test_other_data_under_the_same_path_makes_another_run(tmp_path, made, copied):
    (tmp_path / "mini.yaml").write_text(MINI % (tmp_path / "kites.csv"))
    pairs("kite with a tail").write_csv(tmp_path / "kites.csv")
    one = run_recipe(str(tmp_path / "mini.yaml"), out=copied[1])
    pairs("kite of paper").write_csv(tmp_path / "kites.csv")
    other = run_recipe(str(tmp_path / "mini.yaml"), out=copied[1])
    assert len({one.folder, other.folder, copied[0].folder}) == 3
    assert one.provenance["recipe_sha256"] == other.provenance["recipe_sha256"]
    assert one.provenance["data_sha256"] != other.provenance["data_sha256"]


def test_another_version_of_the_workbench_makes_another_run(recipe, copied, monkeypatch):
    monkeypatch.setattr(workbench, "__version__", "99.0.0")
    other = run_recipe(recipe, out=copied[1])
    assert other.folder != copied[0].folder
    assert other.provenance["workbench"] == "99.0.0"
    assert other.metrics.equals(copied[0].metrics)


def test_the_newest_run_of_a_recipe_is_found(recipe, copied):
    newest = run_recipe(recipe, out=copied[1], changes={"seeds": [2]})
    assert find_run("mini", copied[1]).folder == newest.folder
    assert [run.folder for run in finished_runs(copied[1])] == [copied[0].folder, newest.folder]


def test_a_recipe_that_was_never_run_says_how_to_run_it(tmp_path):
    with pytest.raises(
        RunError, match=f"no finished run of mini under .*workbench run mini --out {tmp_path}"
    ):
        find_run("mini", tmp_path)


# --- whole or not there -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["metrics.parquet", "scores.parquet", "cards.json", "provenance.json", "models/concat/head.safetensors"],
)
def test_a_changed_or_missing_file_is_noticed(copied, name, caplog):
    run, out = copied
    path = run.folder / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    for spoil in (lambda: path.write_bytes(raw), path.unlink):
        spoil()
        with pytest.raises(RunError, match=f"{name} is missing or was changed since; run again with --fresh"):
            Run.open(run.folder)
    assert finished_runs(out) == []
    assert "left out" in caplog.text


def test_a_changed_run_is_not_trusted_but_computed_again_on_request(recipe, copied):
    run, out = copied
    (run.folder / "cards.json").write_text("[]")
    with pytest.raises(RunError, match="--fresh"):
        run_recipe(recipe, out=out)
    assert run_recipe(recipe, out=out, fresh=True).cards


def test_what_is_not_finished_is_not_listed(copied):
    run, out = copied
    (runs_folder(out) / ".mini-0123456789.partial").mkdir()
    subprocess.run(["cp", "-r", run.folder, runs_folder(out) / "mini-abcdef"], check=True)
    (runs_folder(out) / "mini-abcdef" / "done.json").unlink()
    assert [found.folder for found in finished_runs(out)] == [run.folder]
    with pytest.raises(RunError, match="holds no finished run; start it with: workbench run"):
        Run.open(runs_folder(out) / "mini-abcdef")


def test_a_finished_run_leaves_no_private_folder(made):
    assert [path.name for path in made.folder.parent.iterdir() if path.is_dir()] == [made.folder.name]


def test_a_disk_that_fills_up_at_any_write_loses_nothing(recipe, made, tmp_path, monkeypatch):
    real, left = os.replace, [0]

    def until_full(*names):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        real(*names)

    monkeypatch.setattr(os, "replace", until_full)
    refused = []
    for room in range(30):
        left[0] = room
        try:
            run = run_recipe(recipe, out=tmp_path)
        except RunError as problem:
            refused.append(str(problem))
            assert finished_runs(tmp_path) == []
        else:
            break
    # At least: the test for a writable folder, three files of one model, three of another, metrics, marker.
    assert len(refused) >= 6
    assert all("the disk is full. Free some space" in message for message in refused)
    assert run.metrics.equals(made.metrics)  # what was kept over all these attempts is right


@pytest.mark.usefixtures("made")  # all modules are imported before a class is replaced
def test_a_read_only_folder_is_refused_before_anything_is_computed(recipe, tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    def computing(*_, **__):
        raise AssertionError("an encoder was opened")

    monkeypatch.setattr(encoders, "TextEncoder", computing)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", read_only)
        with pytest.raises(
            RunError, match="read-only file system. Choose a folder you can write to with --out"
        ):
            run_recipe(recipe, out=tmp_path)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", "/proc/workbench"):
        with pytest.raises(RunError, match="Choose a folder you can write to with --out"):
            run_recipe(recipe, out=out)
    assert (tmp_path / "file").read_text() == "mine"


def test_of_two_processes_one_works_and_the_other_is_told(recipe, made, copied):
    lock = runs_folder(copied[1]) / f".{made.folder.name}.lock"
    script = "import sys, filelock; held = filelock.FileLock(sys.argv[1]); held.acquire(); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-uc", script, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        with pytest.raises(RunError, match=f"{made.folder.name} is being computed by another process; wait"):
            run_recipe(recipe, out=copied[1], fresh=True)
        other.communicate("\n")
    assert run_recipe(recipe, out=copied[1]).folder == copied[0].folder


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "", "meta", "cpu "])
def test_a_device_that_cannot_compute_is_refused(recipe, tmp_path, device):
    with pytest.raises(RunError, match=f"device '{device}' cannot be used here .*; use --device cpu"):
        run_recipe(recipe, out=tmp_path, device=device)
    assert list(tmp_path.iterdir()) == []


# --- what a run says ----------------------------------------------------------------------------------------


def test_a_run_says_nothing_of_the_machine_or_the_person(recipe, tmp_path, monkeypatch):
    marker = "marker7f3a"
    monkeypatch.setattr(platform, "node", lambda: marker)
    monkeypatch.setattr(socket, "gethostname", lambda: marker)
    monkeypatch.setattr(getpass, "getuser", lambda: marker)
    for name in ("USER", "LOGNAME", "HOSTNAME"):
        monkeypatch.setenv(name, marker)
    run = run_recipe(recipe, out=tmp_path)
    texts = {path.name: path.read_text() for path in run.folder.rglob("*.json")}
    assert {"recipe.json", "provenance.json", "cards.json", "done.json", "head.json"} <= set(texts)
    for name, text in texts.items():
        assert marker not in text, name
        assert not re.search(r'"(/|[A-Z]:\\|~)', text), name
        assert str(tmp_path) not in text, name
    assert run.recipe["data"]["path"] == "kites.csv"


def test_a_run_says_what_made_it(made):
    about = made.provenance
    assert about["workbench"] == workbench.__version__
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(-changed)?", about["commit"])
    assert about["device"] == "CPU"
    assert about["started"] <= about["finished"]
    assert all(len(about[f"{name}_sha256"]) == 64 for name in ("recipe", "data", "encoder"))
    assert {"torch", "sentence-transformers", "polars"} <= set(about["packages"])
    # 24 pairs of two rows, 70 : 10 : 20, by rank * 10 // 24: 0 to 6, 7, 8 to 9.
    assert {split: about["data"][split]["pairs"] for split in about["data"]} == {
        "train": 17,
        "valid": 3,
        "test": 4,
    }


def test_a_run_keeps_no_text_of_the_data(made):
    numbers = {"row", "pair", "label", "seed", "score"}
    assert set(made.scores.columns) == numbers | {"condition_kind", "split", "model"}
    words = set()
    for frame in (made.scores, made.metrics):
        for name, kind in frame.schema.items():
            if kind == pl.String:
                words |= set(frame[name].drop_nulls())
    written = words | {path.read_text() for path in made.folder.rglob("*.json")}
    assert not [text for text in written if "number 3" in text or "The sound." in text]


def test_every_row_is_scored_by_every_model(made):
    counts = made.scores.group_by("model", "split").len()
    rows = {split: about["rows"] for split, about in made.provenance["data"].items()}
    assert counts.height == 8  # four models on two splits
    assert all(row["len"] == rows[row["split"]] for row in counts.to_dicts())


def test_an_unknown_model_of_a_run_lists_those_it_kept(made):
    assert made.models() == ["concat", "hyper"]
    with pytest.raises(RunError, match="kept no model 'hadamard'; it has: concat, hyper"):
        made.model("hadamard")


def test_the_marker_lists_every_file(made):
    listed = set(json.loads((made.folder / "done.json").read_text())["files"])
    there = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()}
    assert listed == there - {"done.json"}


def test_a_run_that_fails_while_it_is_published_does_not_train_again(recipe, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_publish", full)
        with pytest.raises(RunError, match="the disk is full"):
            run_recipe(recipe, out=tmp_path)
    assert finished_runs(tmp_path) == []

    def training(*_, **__):
        raise AssertionError("a finished model was trained again")

    monkeypatch.setattr("workbench.papers.hyper_cl_comparison.fit", training)
    run = run_recipe(recipe, out=tmp_path)
    assert run.models()
    assert not (run.folder / "training").exists()


# --- runs of a zoo ------------------------------------------------------------------------------------------

ZOO = """
paper: hyper_align
title: Two pairs of arrays
seeds: [0]
data: {source: features, name: own, path: %s}
training: {epochs: 1, batch_size: 50, learning_rate: 1e-2}
resamples: 100
models:
  - {name: ape, kind: ape, keep_weights: true}
  - {name: ridge, kind: ridge}
"""


@pytest.fixture(scope="module")
def zoo_run(tmp_path_factory):
    """A finished run over features that were computed elsewhere, with the folder they lie in."""
    folder, draw = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)
    for name, width in (("texts/words", 6), ("images/small", 5), ("images/large", 8)):
        (folder / name).parent.mkdir(exist_ok=True)
        np.save(folder / f"{name}.npy", draw.normal(size=(60, width)).astype(np.float32))
    split = ["train"] * 40 + ["valid"] * 10 + ["test"] * 10
    pl.DataFrame({"image": range(60), "split": split}).write_csv(folder / "pairs.csv")
    (folder / "zoo.yaml").write_text(ZOO % folder)
    return run_recipe(str(folder / "zoo.yaml"), out=tmp_path_factory.mktemp("zoo-out")), folder


def test_a_run_over_features_is_found_again_until_an_array_changes(zoo_run):
    run, folder = zoo_run
    recipe = str(folder / "zoo.yaml")
    assert run_recipe(recipe, out=out_of(run)).folder == run.folder
    array = np.load(folder / "images/small.npy")
    np.save(folder / "images/small.npy", array[::-1])
    other = run_recipe(recipe, out=out_of(run))
    np.save(folder / "images/small.npy", array)
    assert other.folder != run.folder
    assert run_recipe(recipe, out=out_of(run)).folder == run.folder


def test_connectors_of_a_run_are_opened_by_their_way(zoo_run):
    run, folder = zoo_run
    assert run.models() == ["ape"]
    opened = run.model("ape")
    assert isinstance(opened, ConnectorZoo)
    assert opened.pairs() == [("words", "large"), ("words", "small")]
    texts, images = (
        torch.from_numpy(np.load(folder / name)) for name in ("texts/words.npy", "images/small.npy")
    )
    scores = opened.similarity(texts[50:], images[50:], "words", "small")  # the test split
    ranks = (scores >= scores.diagonal()[:, None] - 1e-6).sum(1)
    kept = run.scores.filter(model="ape", split="test", image="small").to_dicts()[0]
    # Features are kept as they are, here in 32 bits.
    assert kept["t2i_recall_at_5"] == pytest.approx((ranks <= 5).float().mean().item())
    with pytest.raises(RunError, match="kept no model 'ridge'; it has: ape"):
        run.model("ridge")


def test_a_run_over_features_keeps_none_of_them_and_no_path(zoo_run):
    run, folder = zoo_run
    files = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert files == {"recipe.json", "provenance.json", "cards.json", "metrics.parquet", "scores.parquet",
                     "done.json", "models/ape/head.json", "models/ape/head.safetensors"}  # fmt: skip
    assert not [path for path in run.folder.rglob("*.json") if str(folder) in path.read_text()]
    assert run.recipe["data"]["path"] == folder.name
    assert run.provenance["data"]["train"] == {"images": 40}

"""Trainings shared by several processes: each is done once, by whoever comes first, and none is lost."""

import json
import os
import threading
from contextvars import copy_context

import pytest
import torch
from filelock import FileLock
from tqdm import tqdm

from workbench import sharing
from workbench.papers.comparison import finished_or, finished_results, training_folder
from workbench.report import footer_of
from workbench.runs import run_recipe
from workbench.sharing import Enough, Taken, claimed, help_with, in_turn, shared

RECIPE = "hyper_cl_bundled_tiny"


@pytest.fixture
def team(monkeypatch):
    """A team of two whose second process is never started."""
    monkeypatch.setattr(sharing, "START_AFTER", 1e6)
    with shared(2, {}):
        yield sharing._TEAM.get()


@pytest.fixture
def helper(team, monkeypatch):
    """The second process of such a team, while the first one lives."""
    monkeypatch.setattr(team, "helps", True)
    monkeypatch.setattr(sharing, "parent_process", lambda: type("First", (), {"is_alive": lambda _: True})())
    return team


def test_a_single_process_takes_no_lock(tmp_path):
    with claimed(tmp_path / "one"):
        assert list(tmp_path.iterdir()) == []


def test_what_another_process_is_at_is_done_last(team, tmp_path):
    """B's lock is held at first, and given back once C is done."""
    held, done = threading.Event(), threading.Event()

    def other():
        with FileLock(tmp_path / "B.lock"):
            held.set()
            done.wait(20)

    threading.Thread(target=other, daemon=True).start()
    held.wait(20)

    def do(name):
        with claimed(tmp_path / name):
            if name == "C":
                done.set()
            return name

    assert list(in_turn(["A", "B", "C"], do)) == [(0, "A"), (2, "C"), (1, "B")]


def test_a_helper_leaves_what_is_taken_and_says_that_it_had_enough(helper, tmp_path):
    done = []

    def do(name):
        with claimed(tmp_path / name):
            done.append(name)

    with FileLock(tmp_path / "B.lock"), pytest.raises(Enough):
        list(in_turn(["A", "B", "C"], do))
    assert done == ["A", "C"]


def test_a_helper_whose_first_process_is_gone_takes_nothing_more(helper, monkeypatch):
    monkeypatch.setattr(sharing, "parent_process", lambda: type("Gone", (), {"is_alive": lambda _: False})())
    with pytest.raises(Enough):
        list(in_turn(["A"], pytest.fail))


def test_an_error_gives_the_training_back(team, tmp_path):
    with pytest.raises(RuntimeError, match="diverged"), claimed(tmp_path / "A"):
        raise RuntimeError("diverged")
    with claimed(tmp_path / "A"):
        pass


def test_each_process_of_a_team_computes_on_its_part_of_the_cores(team, monkeypatch):
    monkeypatch.setattr(sharing, "cores", lambda: 6)
    before = torch.get_num_threads()
    seen = list(in_turn([0], lambda _: torch.get_num_threads()))
    assert (seen, torch.get_num_threads()) == ([(0, 3)], before)


def test_a_training_that_builds_on_another_waits_for_it(tmp_path):
    """The student stands before its teacher: it is done after it, alone or in a team."""
    results = {"train": torch.ones(2)}

    def do(name):
        folder = training_folder(tmp_path, name, 0)

        def compute(_):
            if name == "student":
                return finished_results(tmp_path, "teacher", 0), {}
            return results, {}

        return finished_or(folder, compute)[0]["train"].tolist()

    assert list(in_turn(["student", "teacher"], do)) == [(1, [1, 1]), (0, [1, 1])]
    with pytest.raises(Taken, match="nobody-seed0"):
        finished_results(tmp_path, "nobody", 0)


def test_what_a_helper_trained_is_what_the_first_process_would_have(tmp_path, monkeypatch):
    """A helper does all trainings; the first process only reads them and writes the same run."""
    monkeypatch.setattr(sharing, "parent_process", lambda: type("First", (), {"is_alive": lambda _: True})())
    alone = run_recipe(RECIPE, out=tmp_path / "alone", changes={"seeds": [0]})
    request = {"name": RECIPE, "out": tmp_path / "shared", "changes": {"seeds": [0]}}
    second = threading.Thread(
        target=help_with, args=(request, 2)
    )  # what it is told holds in its thread alone
    second.start()
    second.join()
    [private] = (tmp_path / "shared" / "runs").glob(".*.partial")
    assert not (private / "metrics.parquet").exists()
    monkeypatch.setattr("workbench.papers.hyper_cl_comparison.fit", pytest.fail)
    both = run_recipe(RECIPE, out=tmp_path / "shared", changes={"seeds": [0]}, workers=2)
    assert both.metrics.equals(alone.metrics)
    assert both.scores.equals(alone.scores)
    assert both.metrics.height > 0


def test_a_team_that_is_started_at_once_gives_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "START_AFTER", 0.0)
    alone = run_recipe(RECIPE, out=tmp_path / "alone", changes={"seeds": [0]})
    both = run_recipe(RECIPE, out=tmp_path / "both", changes={"seeds": [0]}, workers=2)
    assert both.metrics.equals(alone.metrics)
    made = json.loads((both.folder / "provenance.json").read_text())
    assert (made["workers"], made["threads"]) == (2, max(1, sharing.cores() // 2))
    assert "in each of 2 processes that share the trainings" in " ".join(footer_of(both))
    assert not (both.folder / "training").exists()
    assert not [name for name in os.listdir(both.folder.parent) if name.endswith(".partial")]


def test_an_accelerator_is_not_shared():
    with shared(4, {"device": "cuda"}):
        assert sharing._TEAM.get().size == 1


def test_a_helper_makes_no_lock_that_outlives_it(monkeypatch):
    locks = []
    monkeypatch.setattr(tqdm, "set_lock", locks.append)
    monkeypatch.setattr("workbench.runs.run_recipe", lambda **_: None)
    copy_context().run(help_with, {}, 2)
    assert [type(lock) for lock in locks] == [type(threading.RLock())]  # of threads, not of processes

"""Benchmarks: both ways give the same, and the table, the JSON file and the ratios say what was measured."""

import json
import re

import pytest
import torch

from workbench.bench import (
    families,
    hyper_align,
    hyper_align_memory,
    hyper_cl,
    hyper_cl_evaluation,
    hyper_clip,
    peers,
    ranking,
    run_bench,
)
from workbench.bench.hyper_cl_evaluation import texts_like_csts
from workbench.bench.timing import laid_out, median_seconds, medians_in_turn, once, peak_mib, threads
from workbench.errors import WorkbenchError

COLUMNS = {"name", "ours_s", "reference_s", "ratio", "ours_mib", "reference_mib"}
SMALL = {
    hyper_cl: {"CASES": [(96, 4, 512), (96, None, 32)]},
    # At least 64 conditions and sentences: so many are in the part whose memory is measured.
    hyper_cl_evaluation: {"ROWS": 20, "SENTENCES": 70, "CONDITIONS": 64, "REFERENCE_ROWS": 6, "BATCH": 8},
    ranking: {"QUERIES": 60, "ENTITIES": 200, "RELATIONS": 4, "KNOWN": 2000, "WIDTH": 16,
              "SORTED_QUERIES": 40, "PYKEEN_BATCH": 16},
    # Layer norms and batch norms; the second tower serves the batch of many tasks, too.
    hyper_clip: {"TOWERS": (("test_convnext", 32, 2), ("test_efficientnet", 32, 2)), "TASKS": 3, "IMAGES": 7,
                 "WIDTH": 12, "TEXTS": 4, "D": 8, "ROUNDS": 1},
    hyper_align: {"X": 16, "WIDTHS": (8, 12), "BATCH": 20, "EACH": 2, "HIDDEN": (8, 8), "LOSS_BATCH": 64,
                  "LOSS_WIDTH": 16},
    families: {"ROWS": 8, "WIDTH": 12, "RANK": 2, "CODE": 6, "UNIQUE": 2, "PIXELS": 8, "REPEATS": 2},
    hyper_align_memory: {"X": 16, "Z": 24, "CONNECTORS": 3, "BATCH": 64},
}  # fmt: skip
ZOO = """
extends: hyper_align_scenes
title: Four pairs
data: {train: 100, test: 50, size: 32}
zoo: {images: [colour_histogram, frequencies], texts: [lsa_words, hashed_words], controls: []}
training: {epochs: 1, batch_size: 50}
models:
  - {name: ape, kind: ape}
  - {name: ape_large, kind: ape, texts: [lsa_words]}
  - {name: search, kind: search, rounds: [1]}
"""


@pytest.fixture
def small(monkeypatch, encoder, tmp_path):
    """All benchmarks at a size of seconds, on the encoder that is open already."""
    for module, sizes in SMALL.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(hyper_cl_evaluation, "TextEncoder", lambda device: encoder)
    (tmp_path / "zoo.yaml").write_text(ZOO)
    monkeypatch.setattr(hyper_align, "RECIPES", (str(tmp_path / "zoo.yaml"),) * 2)
    monkeypatch.setenv("PYSTOW_HOME", str(tmp_path))  # pykeen makes folders when it is imported


# --- the whole ----------------------------------------------------------------------------------------------


def rows_of(name, tmp_path):
    """Run a benchmark and hold its table against the file it writes."""
    table = run_bench(name, tmp_path)
    rows = json.loads((tmp_path / f"{name}.json").read_text())
    assert all(set(row) == COLUMNS for row in rows)
    assert all(row["ratio"] == pytest.approx(row["reference_s"] / row["ours_s"]) for row in rows)
    assert all(row[name] > 0 for row in rows for name in COLUMNS - {"name"})
    head, *lines = table.splitlines()
    assert head.split()[-9:] == ["ours", "s", "reference", "s", "ratio", "ours", "MiB", "reference", "MiB"]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        assert line.startswith(row["name"])
        assert line.split()[-3] == f"{row['ratio']:.2f}"
    return rows


@pytest.mark.usefixtures("small")
def test_a_benchmark_writes_its_rows_and_prints_the_same_table(tmp_path):
    pytest.importorskip("pykeen", reason="pykeen, whose evaluator is one of the ways, is not installed")
    rows = rows_of("hyper_cl", tmp_path)
    assert [row["name"] for row in rows] == [
        # 512 / 1.53 and 32 / 1.07 rows a condition.
        "projection, forward and backward, D=96 K=4, 512 rows, 335 conditions",
        "projection, forward and backward, D=96 full, 32 rows, 30 conditions",
        "evaluation, 20 rows from text, beside encoding its unique texts",
        "evaluation, 20 rows from text, published way, batch 2",
        "evaluation, 20 rows from text, published way, batch 8",
        "ranking, 60 questions x 200 entities, beside the bare matrix product",
        "ranking, 60 questions x 200 entities, full sort (scaled from 40)",
        "ranking, 60 questions x 200 entities, pykeen's evaluator",
    ]
    # Memory is counted from allocations, so it repeats: weights per row and per sentence must cost more.
    assert all(row["ours_mib"] < row["reference_mib"] for row in rows[:2])


@pytest.mark.usefixtures("small")
def test_image_towers_are_timed_in_training_adapted_and_over_many_tasks(tmp_path):
    rows = rows_of("hyper_clip", tmp_path)
    towers = ("test_convnext", "test_efficientnet")
    expected = []
    for tower in towers:
        expected.append(f"training step, {tower} 32 px, 2 images, 4 texts; reference: SigLIP")
        expected.append(
            f"embedding under generated norms, {tower} 32 px, 2 images; reference: functional_call"
        )
    own = "7 images of 3 tasks in one batch, test_efficientnet 32 px"
    assert [row["name"] for row in rows] == [
        *expected, f"{own}; reference: one task", f"{own}; reference: task by task"
    ]  # fmt: skip


@pytest.mark.usefixtures("small")
def test_ways_to_connect_a_zoo_are_timed_step_by_step_and_whole(tmp_path):
    rows = rows_of("hyper_align", tmp_path)
    names = [row["name"] for row in rows]
    assert names[:3] == [
        "step of all 4 connectors, batch 20; reference: a loop of linear layers",
        "step of 2 connectors, batch 20; reference: hypernetwork of 0 M parameters",
        "loss in tiles of 16 MiB, batch 64, width 16; reference: whole logits",
    ]
    search = r"search, 4 pairs, \d+\.\d\d Tflop; "
    assert re.fullmatch(search + r"ape, 4 pairs, \d+\.\d\d Tflop; regret 0\.\d{3}", names[3])
    # The large grid is of one text encoder; a pair of the other cannot be held against it.
    regret = r"regret (-?0\.\d{3}|not in it)"
    assert re.fullmatch(search + r"ape_large, 2 pairs, \d+\.\d\d Tflop; " + regret, names[4])
    # A hypernetwork of this size is larger than what it generates; four connectors are trained, search fewer.
    assert rows[1]["reference_mib"] > rows[1]["ours_mib"]
    assert rows[3]["reference_mib"] > rows[3]["ours_mib"]


@pytest.mark.usefixtures("small")
def test_the_memory_of_a_large_step_is_measured(tmp_path):
    rows = rows_of("hyper_align_memory", tmp_path)
    assert [row["name"] for row in rows] == [
        "step of 3 connectors 24 x 16, batch 64; reference: 3 one by one"
    ]


@pytest.mark.usefixtures("small")
def test_generated_weights_are_held_against_plain_ways_with_a_bar_and_against_other_libraries(
    tmp_path, monkeypatch
):
    compared, same = [], families._same
    monkeypatch.setattr(families, "_same", lambda *ways: compared.append(same(*ways)))
    before = torch.get_num_threads()
    table = run_bench("families", tmp_path)
    rows = json.loads((tmp_path / "families.json").read_text())
    found = {(job, reference): (row["bar"], row["verdict"]) for row in rows
             for job, _, reference in [row["name"].partition("; reference: ")]}  # fmt: skip
    jobs = {
        "8 rows, one condition each, 12 x 12, rank 2": ("form A B", ">= 20"),
        "generate and apply, 8 rows of 2 conditions, 12 x 12": ("per row", ">= 4"),
        "one condition for 8 images of 8 pixels, applied": ("the plain module", ">= 1/1.2"),
        "2 conditions, 4 images of 8 pixels each, applied together": ("plain modules in turn", ""),
        "2 conditions, 4 images of 8 pixels each, applied one by one": ("plain modules in turn", ""),
    }
    beside = set()
    for place, (job, (plain, bar)) in enumerate(jobs.items()):
        own = found.pop((job, plain))
        assert own in {(bar, "met"), (bar, "missed")} if bar else own == ("", "")
        beside |= {(job, one.name) for one in peers.peers() if place < 2 or one.name == "hyperlight"}
    assert found == dict.fromkeys(beside, ("", ""))
    assert len(compared) == len(rows)  # each was asserted to give the same
    assert all(set(row) == COLUMNS | {"bar", "verdict", "threads"} for row in rows)
    assert {row["threads"] for row in rows} == {1}
    assert torch.get_num_threads() == before
    head, *lines = table.splitlines()
    assert ", 1 thread, " in head
    assert head.split()[-2:] == ["bar", "verdict"]
    for row, line in zip(rows, lines, strict=False):
        cells = f"{row['reference_mib']:.1f} {row['bar'] or '-'} {row['verdict'] or '-'}"
        assert " ".join(line.split()).endswith(f" {cells}")
    assert lines[len(rows) :] == families.notes()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("ratio", "verdicts"), [(0.5, "missed"), (30.0, "met")])
def test_a_verdict_follows_the_ratio(ratio, verdicts, monkeypatch):
    timed = laid_out("a job", 1.0, ratio, 1.0, 1.0)
    monkeypatch.setattr(families, "row", lambda *_: timed)
    assert {row["verdict"] for row in families.rows() if row["bar"]} == {verdicts}


def test_a_library_that_is_not_installed_is_named_with_what_it_needs(monkeypatch):
    absent = {"hyperlight", "matplotlib"}
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name in absent else object())
    said = families.notes()[-2:]
    assert said == [
        "hyperlight is not timed: pip install hyperlight",
        "hypnettorch is not timed: pip install matplotlib",
    ]
    assert peers.peers() == []


def test_an_unknown_benchmark_is_named_with_those_there_are():
    with pytest.raises(WorkbenchError, match="no benchmark named 'speed'; there are: hyper_cl, hyper_clip"):
        run_bench("speed", None)


# --- both ways must agree -----------------------------------------------------------------------------------


def test_a_projection_that_differs_is_no_benchmark(monkeypatch):
    monkeypatch.setattr(hyper_cl, "_ours", lambda *inputs: hyper_cl._reference(*inputs) + 1)
    with pytest.raises(AssertionError):
        hyper_cl._case(24, 4, 32, "cpu")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", ["_ours", "_reference"])
def test_an_evaluation_that_differs_is_no_benchmark(way, monkeypatch):
    # 0.02 off: more than padding and another order of sums can make.
    whole = getattr(hyper_cl_evaluation, way)
    monkeypatch.setattr(hyper_cl_evaluation, way, lambda *inputs: whole(*inputs) + 0.02)
    with pytest.raises(AssertionError):
        hyper_cl_evaluation.rows()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", ["_sorted_ranks", "_pykeen_ranks", "count_ranks"])
def test_a_ranking_that_differs_is_no_benchmark(way, monkeypatch):
    if way == "_pykeen_ranks":
        pytest.importorskip("pykeen", reason="pykeen, whose evaluator is one of the ways, is not installed")
    whole = getattr(ranking, way)

    def one_off(*inputs):
        if way == "count_ranks":
            return whole(*inputs[:3])  # answers that are known stay in
        return whole(*inputs) + 1

    monkeypatch.setattr(ranking, way, one_off)
    with pytest.raises(AssertionError):
        ranking.rows()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", ["_loop", "_tiles"])
def test_connectors_that_lose_otherwise_are_no_benchmark(way, monkeypatch):
    whole = hyper_align.paired_contrastive
    monkeypatch.setattr(hyper_align, "paired_contrastive", lambda *given, **more: 1.1 * whole(*given, **more))
    with pytest.raises(AssertionError):
        getattr(hyper_align, way)("cpu")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", ["_swap", "_tasks"])
def test_generated_norms_that_act_otherwise_are_no_benchmark(way, monkeypatch):
    whole = hyper_clip.HyperCLIP.use

    def other(self, weights, rows=None):
        # Our way embeds neutrally: always, or where a batch has several tasks.
        return whole(self, None if way == "_swap" or rows is not None else weights)

    monkeypatch.setattr(hyper_clip.HyperCLIP, "use", other)
    with pytest.raises(AssertionError, match="not close"):
        getattr(hyper_clip, way)("test_efficientnet", 32, *((2,) if way == "_swap" else ()), "cpu")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", ["project", "_one_by_one"])
def test_generated_weights_applied_otherwise_are_no_benchmark(way, monkeypatch):
    assert peers.peers()  # the extra dev brings hyperlight
    whole = getattr(families, way)
    monkeypatch.setattr(families, way, lambda *given: whole(*given) + 1)
    with pytest.raises(AssertionError, match="not close"):
        families.rows()


# --- what is measured ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "sentences", "conditions"), [(50, 300, 40), (7, 5, 200)])
def test_texts_like_csts_have_the_counts_asked_for(rows, sentences, conditions):
    texts, asked, table = texts_like_csts(rows, sentences, conditions)
    assert (len(set(texts)), len(texts)) == (sentences, sentences)
    assert (len(set(asked)), len(asked)) == (conditions, conditions)
    assert table.shape == (rows, 3)
    assert (table >= 0).all()
    assert (table < torch.tensor([sentences, sentences, conditions])).all()
    again = texts_like_csts(rows, sentences, conditions)
    assert again[:2] == (texts, asked)
    assert torch.equal(again[2], table)


def test_texts_like_csts_are_as_long_as_those_of_csts():
    texts, asked, _ = texts_like_csts(1, 2000, 1000)
    words = [len(text.split()) for text in texts]
    # 14.8 and 4.0 words on average; a mean of so many lengths wanders by about 0.1.
    assert sum(words) / 2000 == pytest.approx(14.8, abs=0.5)
    assert sum(len(text.split()) for text in asked) / 1000 == pytest.approx(4.0, abs=0.3)
    assert (min(words), max(words)) >= (5, 27)


def test_a_row_says_how_much_longer_the_reference_takes():
    row = laid_out("a way", 0.25, 2.0, 1.5, 6.0)
    assert row == {"name": "a way", "ours_s": 0.25, "reference_s": 2.0, "ratio": 8.0, "ours_mib": 1.5,
                   "reference_mib": 6.0}  # fmt: skip


def test_the_median_of_durations_leaves_the_warm_up_out(monkeypatch):
    ticks = iter([0.0, 50.0, 100.0, 103.0, 200.0, 201.0, 300.0, 302.0])  # 50, then 3, 1 and 2 seconds
    monkeypatch.setattr("workbench.bench.timing.time.perf_counter", lambda: next(ticks))
    assert median_seconds(lambda: None, "cpu") == 2.0


def test_ways_are_timed_in_turn(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr("workbench.bench.timing.time.perf_counter", lambda: clock[0])

    def way(name, *seconds):
        left = iter(seconds)

        def act():
            order.append(name)
            clock[0] += next(left)

        return act

    # The first of each warms up; the rest are 3, 1, 2 and 30, 10, 20 seconds.
    assert medians_in_turn((way("one", 50, 3, 1, 2), way("other", 7, 30, 10, 20)), "cpu") == [2.0, 20.0]
    assert order == ["one", "other"] * 4


def test_threads_are_given_back_whatever_happens():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with pytest.raises(RuntimeError), threads(before + 1):
        torch.zeros(2) + torch.zeros(3)
    assert torch.get_num_threads() == before


def test_what_takes_minutes_is_timed_and_weighed_in_one_go(monkeypatch):
    ticks, done = iter([1.0, 4.0]), []
    monkeypatch.setattr("workbench.bench.timing.time.perf_counter", lambda: next(ticks))
    assert once(lambda: done.append(torch.ones(2**18)), "cpu") == (3.0, pytest.approx(1, abs=0.01))
    assert len(done) == 1


def test_peak_memory_is_what_is_held_at_once():
    def one_after_another() -> None:
        for _ in range(5):
            torch.ones(2**18)  # 1 MiB of single precision, given back at once

    kept = []
    assert peak_mib(one_after_another, "cpu") == pytest.approx(1, abs=0.01)
    assert peak_mib(lambda: kept.extend(torch.ones(2**18) for _ in range(5)), "cpu") == pytest.approx(
        5, abs=0.01
    )

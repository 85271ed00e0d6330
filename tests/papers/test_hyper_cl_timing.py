"""Hyper-CL's Tables 3 and 4: hits and bytes by hand and as published, seconds by arithmetic, a whole run."""

import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch

from workbench import cli
from workbench.errors import DataError, RecipeError
from workbench.figures import METRIC_TITLES
from workbench.papers import hyper_cl_timing, load_recipe
from workbench.papers.hyper_cl_timing import TimingModel, cache_of, load_data
from workbench.runs import Run
from workbench.tables import TIMED

#            sentence, sentence, condition - or head, tail, relation
ROWS = [("a", "b", "x"), ("a", "b", "y"), ("b", "c", "x"), ("c", "a", "x")]
MODELS = {
    "bi_encoder": TimingModel(name="bi_encoder", kind="bi_encoder"),
    "hadamard": TimingModel(name="hadamard", kind="hadamard"),
    "concat": TimingModel(name="concat", kind="concat"),
    "full": TimingModel(name="full", kind="hyper"),
    "low_rank": TimingModel(name="low_rank", kind="hyper", low_rank=True),
}
RECIPE = """
paper: hyper_cl_timing
title: Time and cache on a few invented pairs
task: pairs
data: {source: files, name: own}
seeds: [0]
batch: 4
sample: 8
models:
  - {name: bi_encoder, kind: bi_encoder}
  - {name: hadamard, kind: hadamard}
  - {name: concat, kind: concat}
  - {name: low_rank, kind: hyper, low_rank: true}
"""


# --- counted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "model", "lookups", "misses", "kept"),
    [
        # Width 24: a vector takes 4 x 24 + 48 = 144 bytes.
        # Two lookups a row; a, b and c under x, a and b under y: 5 x 144.
        ("pairs", "bi_encoder", 8, 5, 720),
        # The heads a, b and c with x, a with y, and the tails b, c and a alone: 7 x 144.
        ("triples", "bi_encoder", 8, 7, 1008),
        # Three lookups a row; a, b, c, x and y: 5 x 144.
        ("pairs", "hadamard", 12, 5, 720),
        ("triples", "hadamard", 12, 5, 720),
        ("pairs", "concat", 12, 5, 720),
        # Three vectors, and two matrices of 4 x 24 x 24 + 48 = 2352: 432 + 4704.
        ("pairs", "full", 12, 5, 5136),
        ("triples", "full", 12, 5, 5136),
        # Rank 24 / 12 = 2: a factor takes 4 x 24 x 2 + 48 = 240, two conditions have two each: 432 + 960.
        ("pairs", "low_rank", 12, 5, 1392),
        ("triples", "low_rank", 12, 5, 1392),
    ],
)
def test_lookups_misses_and_bytes_of_four_rows(task, model, lookups, misses, kept):
    assert cache_of(MODELS[model], task, ROWS, 24) == (lookups, misses, kept)
    # Rows asked again are hits and cost no byte.
    assert cache_of(MODELS[model], task, ROWS * 3, 24) == (3 * lookups, misses, kept)


def test_a_rank_grows_with_the_width():
    assert [MODELS["low_rank"].rank_at(width) for width in (384, 768, 1024)] == [32, 64, 85]
    assert MODELS["full"].rank_at(768) is None


def test_the_published_table_of_wn18rr_follows_from_counting(prepared):
    prepared("wn18rr")
    loaded = load_data(load_recipe("hyper_cl_timing_wn18rr"))
    assert loaded.counts["all"] == {"rows": 93003, "conditions": 11}
    found = {
        (name, width): cache_of(MODELS[name], "triples", loaded.content, width)
        for name in ("bi_encoder", "hadamard", "full")
        for width in (768, 1024)
    }
    # Table 4 prints four and two places.
    for name, hit_rate in (("bi_encoder", 0.4665), ("hadamard", 0.8532), ("full", 0.8532)):
        lookups, misses, _ = found[name, 768]
        assert 1 - misses / lookups == pytest.approx(hit_rate, abs=5.1e-5)
    expected = {
        ("bi_encoder", 768): 295.29,
        ("bi_encoder", 1024): 392.2,
        ("hadamard", 768): 121.86,
        ("hadamard", 1024): 161.85,
        ("full", 768): 146.57,
        ("full", 1024): 205.81,
    }
    assert {key: kept / 2**20 for key, (_, _, kept) in found.items()} == pytest.approx(expected, abs=5.1e-3)


# --- timed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "seconds", "texts"),
    [
        # Every duration is one second. 5 misses / 4 texts + 4 rows / batch 2.
        ("bi_encoder", 1.25 + 2, ["x a", "y a", "x b", "x c"]),
        # Of the 5 misses 2 are conditions: so many of 4 texts, round(1.6).
        ("hadamard", 1.25 + 2, ["b", "c", "x", "y"]),
        # And 2 conditions / batch 2.
        ("full", 1.25 + 1 + 2, ["b", "c", "x", "y"]),
        ("low_rank", 1.25 + 1 + 2, ["b", "c", "x", "y"]),
    ],
)
def test_seconds_add_up_over_misses_conditions_and_rows(model, seconds, texts, monkeypatch):
    read = []
    encoder = SimpleNamespace(
        model=SimpleNamespace(device=torch.device("cpu")),
        width=24,
        encode=lambda part, batch: read.append((part, batch)),
    )
    monkeypatch.setattr(hyper_cl_timing, "_timed", lambda action: (action(), 1.0)[1])
    recipe = load_recipe("hyper_cl_timing_wn18rr")  # samples 256 rows, more than there are
    found = hyper_cl_timing._seconds(recipe, MODELS[model], ROWS, encoder, 2, 5)
    assert found == pytest.approx(seconds)
    assert read == [(texts[:2], 2), (texts[2:], 2)]


def test_the_shortest_of_a_few_durations_counts_and_the_first_call_does_not(monkeypatch):
    ticks = iter([0.0, 0.1, 1.0, 6.0, 10.0, 13.0, 20.0, 24.0])  # 0.1, then 5, 3 and 4 seconds
    monkeypatch.setattr(hyper_cl_timing.time, "perf_counter", lambda: next(ticks))
    calls = []
    assert hyper_cl_timing._timed(lambda: calls.append(1)) == 3.0
    assert len(calls) == 4


# --- a whole run --------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line in this process; return its exit code, output and errors."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["workbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def recipe(tmp_path) -> Path:
    (tmp_path / "own.yaml").write_text(RECIPE)
    return tmp_path / "own.yaml"


def write(folder: Path, **tables: list[tuple]) -> Path:
    folder.mkdir()
    for name, rows in tables.items():
        columns = ["sentence1", "sentence2", "condition", "label"]
        pl.DataFrame(rows, schema=columns, orient="row").write_csv(folder / f"own_{name}.csv")
    return folder


@pytest.mark.usefixtures("one_encoder")
def test_own_pairs_run_from_a_folder_to_a_report(call, recipe, tmp_path):
    rows = [(f"A kite, number {n % 4}.", "A drum.", "The shape." if n % 2 else "The sound.", n % 6)
            for n in range(10)]  # fmt: skip
    hidden = [("A kite, number 9.", "A bell.", "The price.", -1)]
    data = write(tmp_path / "pairs", train=rows[:6], validation=rows[6:], test=hidden)
    code, out, err = call("run", recipe, "--data", data, "--out", tmp_path / "out")
    assert code == 0, err
    run = Run.open(Path(out.splitlines()[-1].removeprefix("run: ")))
    # The withheld split counts: 11 rows, its condition among three.
    assert run.provenance["data"] == {"all": {"rows": 11, "conditions": 3}}
    metrics = run.metrics
    assert metrics.select("split", "group", "count", "seed").unique().rows() == [("all", "all", 11, None)]
    assert (metrics["low"] == metrics["value"]).all()
    assert (metrics["high"] == metrics["value"]).all()
    value = {row["model"]: {} for row in metrics.to_dicts()}
    for row in metrics.to_dicts():
        value[row["model"]][row["metric"]] = row["value"]
    assert set(value) == {"bi_encoder", "hadamard", "concat", "low_rank"}
    # Texts: kites 0 to 3 and 9, drum and bell, and 3 conditions are 10 misses of 33 lookups. Jointly read:
    # each kite and the drum under what they were asked: 0 and 2 by sound, 1 and 3 by shape, the drum by both,
    # kite 9 and the bell by price: 8 of 22.
    assert value["concat"]["hit_rate"] == pytest.approx(1 - 10 / 33)
    assert value["bi_encoder"]["hit_rate"] == pytest.approx(1 - 8 / 22)
    # 10 vectors of 4 x 768 + 48 bytes.
    assert value["hadamard"]["cache_mib_768"] == pytest.approx(10 * 3120 / 2**20)
    assert value["hadamard"]["cache_mib"] == pytest.approx(10 * (4 * 384 + 48) / 2**20)
    for found in value.values():
        assert found["seconds_batch_1"] > 0
        assert found["seconds_batch_4"] > 0
    page = tmp_path / "out" / "html" / f"{run.folder.name}.html"
    text = page.read_text()
    for word in ("hit_rate", "cache_mib_1024", "low_rank", "Time and cache on a few invented pairs"):
        assert word in text


def test_every_number_of_the_tables_has_a_title_in_figures():
    assert set(TIMED) <= set(METRIC_TITLES)


def test_missing_data_ends_with_code_2_and_one_line(call, tmp_path):
    code, out, err = call("run", "hyper_cl_timing_csts", "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("workbench: csts is not shipped with the workbench; give it with --data PATH")
    assert not (tmp_path / "out").exists()


def test_a_graph_of_ones_own_without_its_folder_is_refused(recipe):
    for task in ("pairs", "triples"):
        with pytest.raises(DataError, match="own is not shipped with the workbench; give it with --data"):
            load_data(load_recipe(str(recipe), {"task": task}))


PAIR = ("a", "b", "x", 0)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"train": [PAIR]}, "needs a .csv or .parquet file for train and one for validation"),
        ({"train": [PAIR], "validation": [("a", "b", None, 0)]}, "column condition is empty in 1 rows"),
        ({"train": [], "validation": []}, "no rows in any of its files; give at least one pair"),
    ],
)
def test_tables_that_cannot_be_counted_end_with_code_2_and_one_line(call, recipe, tmp_path, tables, message):
    data = write(tmp_path / "pairs", **tables)
    code, out, err = call("run", recipe, "--data", data, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_a_missing_column_is_named(call, recipe, tmp_path):
    data = write(tmp_path / "pairs", train=[PAIR], validation=[PAIR])
    (data / "own_validation.csv").write_text("sentence1,sentence2\na,b\n")
    code, _, err = call("run", recipe, "--data", data, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1), err
    assert "own_validation.csv: missing column condition" in err


def test_a_reference_that_is_no_model_or_two_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"reference or against: 'absent' is not one of the models"):
        load_recipe(str(recipe), {"reference": "absent"})
    twice = [{"name": "concat", "kind": "concat"}] * 2
    with pytest.raises(RecipeError, match="models: every name once"):
        load_recipe(str(recipe), {"reference": "concat", "models": twice})

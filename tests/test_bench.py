import json

import pytest

from workbench.bench import hyper_cl, run_bench
from workbench.errors import WorkbenchError


def test_a_benchmark_writes_its_rows_and_prints_the_same_table(tmp_path, monkeypatch):
    monkeypatch.setattr(hyper_cl, "CASES", [(96, 4, 512), (96, None, 32)])
    table = run_bench("hyper_cl", tmp_path)
    rows = json.loads((tmp_path / "hyper_cl.json").read_text())
    assert [set(row) for row in rows] == [
        {"name", "ours_s", "reference_s", "ratio", "ours_mib", "reference_mib"}
    ] * 2
    assert all(row["ratio"] == pytest.approx(row["reference_s"] / row["ours_s"]) for row in rows)
    # Memory is counted from allocations, so it repeats: weights per row and per sentence must cost more.
    assert all(0 < row["ours_mib"] < row["reference_mib"] for row in rows)
    assert all(row["name"] in table for row in rows)


def test_both_ways_of_a_benchmark_must_agree(monkeypatch):
    monkeypatch.setattr(hyper_cl, "_ours", lambda *inputs: hyper_cl._reference(*inputs) + 1)
    with pytest.raises(AssertionError):
        hyper_cl._case(24, 4, 32, "cpu")


def test_an_unknown_benchmark_is_named_with_those_there_are():
    with pytest.raises(WorkbenchError, match="no benchmark named 'speed'; there are: hyper_cl"):
        run_bench("speed", None)

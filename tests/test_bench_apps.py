"""The benchmark of the dashboards, at its smallest: every row is there and says what was measured."""

import math
import shutil

import pytest

from tests.browsing import CHROMIUM
from workbench.bench import apps, apps_browser


@pytest.fixture
def small(monkeypatch, tiny_run):
    out = tiny_run.folder.parent.parent
    monkeypatch.setattr(apps, "run_recipe", lambda name, out: tiny_run)
    session = apps.Session(out)
    monkeypatch.setattr(apps, "Session", lambda *_: session)
    monkeypatch.setattr(apps, "_soak", lambda _, device: SOAK(out, device))
    monkeypatch.setenv("WORKBENCH_OUT", "")  # put back afterwards
    monkeypatch.setenv("WORKBENCH_DEVICE", "")
    together = ((20, 0.0), (20, 0.01))
    for name, value in {"SIZES": {330: 0.3}, "TOGETHER": together, "CHANGES": 2, "PEOPLE": 2}.items():
        monkeypatch.setattr(apps, name, value)
    for name, value in {"EACH": 1, "PAGES": 3, "WARM": 0, "PAGE_SECONDS": 0.0}.items():
        monkeypatch.setattr(apps, name, value)


SOAK = apps._soak


def test_every_row_says_its_size_and_its_bar(small):
    alone, together, reading, pages = apps.rows("cpu")
    assert alone["name"].startswith("changed condition, 330 sentences")
    assert alone["reference_s"] == 0.3
    assert alone["ratio"] == pytest.approx(0.3 / alone["ours_s"])
    assert together["name"].startswith("2 people without a pause, 20 sentences")
    assert together["ours_s"] > 0
    assert reading["name"].startswith("2 people who read for 0.01 s, 20 sentences")
    assert pages["name"].startswith("3 pages opened and left")
    assert pages["reference_mib"] == pytest.approx(50 / 1024)


def test_the_95th_percentile_is_nearly_the_slowest_of_twenty():
    # Sorted 1 to 21, the 95th of 100 lies 95 % of the way from the first to the last: 1 + 0.95 * 20 = 20.
    assert apps.p95([float(value) for value in range(21, 0, -1)]) == pytest.approx(20.0)


@pytest.mark.app
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_changed_condition_is_timed_until_it_is_on_screen(monkeypatch, tiny_run):
    monkeypatch.setenv("WORKBENCH_OUT", "")  # put back afterwards
    monkeypatch.setenv("WORKBENCH_DEVICE", "")
    monkeypatch.setattr(apps_browser, "run_recipe", lambda name, out: shutil.copytree(
        tiny_run.folder, out / "runs" / tiny_run.folder.name
    ))  # fmt: skip
    for name, value in {"SIZES": {330: 0.3}, "CHANGES": 3, "WARM": 1, "READING": 500}.items():
        monkeypatch.setattr(apps_browser, name, value)
    [row] = apps_browser.rows("cpu")
    assert row["name"].startswith("on screen in Chromium, 330 sentences")
    assert row["reference_s"] == 0.3
    assert 0.01 < row["ours_s"] < 60


def test_without_a_browser_a_row_says_that_nothing_was_measured_on_screen(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    [row] = apps_browser.rows("cpu")
    assert "not measured" in row["name"]
    assert math.isnan(row["ours_s"])

"""Training started from a dashboard: once, whoever asks, with its progress, and it can be stopped."""

import sys
import time

import pytest

from workbench.background import Background, first_recipes
from workbench.config import recipe_names


class Speaks(Background):
    """Runs a script of ours instead of training."""

    script = "print('done')"

    def command(self):
        return [sys.executable, "-u", "-S", "-c", self.script]


def wait(work):
    for _ in range(600):
        if not work.running and work.exit_code is not None and work.said():
            return
        time.sleep(0.05)
    raise AssertionError(f"still at work: {work.said()}")


def test_the_command_trains_the_recipes_without_notebooks(tmp_path):
    work = Background(tmp_path)
    work.recipes = ["one", "two"]
    assert work.command()[1:5] == ["-m", "workbench", "reproduce", "one"]
    assert work.command()[5:] == ["two", "--out", str(tmp_path), "--device", "cpu", "--no-notebooks"]


def test_what_is_offered_exists():
    offered = first_recipes()
    assert offered["small"]
    assert {name for names in offered.values() for name in names} <= set(recipe_names())


def test_a_progress_bar_keeps_one_line_and_colours_are_dropped(tmp_path):
    work = Speaks(tmp_path)
    lines = ("start\n", "bar:  10%\r", "\x1b[31mbar:\x1b[0m  90%\r", "end\n")
    work.script = ";".join(f"print({line!r}, end='')" for line in lines)
    assert work.start([])
    wait(work)
    assert work.said() == ["start", "bar:  90%", "end"]
    assert work.exit_code == 0


def test_a_second_start_while_one_runs_does_nothing_and_cancel_ends_it(tmp_path):
    work = Speaks(tmp_path)
    work.script = "import time; print('at work'); time.sleep(60)"
    try:
        assert work.start(["a"])
        assert not work.start(["b"])
        assert work.recipes == ["a"]
    finally:
        work.cancel()
    assert work._process.wait(20) == -15
    assert not work.running


@pytest.mark.parametrize("code", [0, 2])
def test_how_it_ended_is_known(tmp_path, code):
    work = Speaks(tmp_path)
    assert work.exit_code is None
    work.script = f"print('said'); raise SystemExit({code})"
    work.start([])
    wait(work)
    assert work.exit_code == code

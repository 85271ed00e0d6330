"""Dashboards: what is typed changes what is shown, links bring it back, and errors are shown as text."""

import socket
import time
from pathlib import Path

import panel as pn
import pytest
from bokeh.client import pull_session
from param.parameterized import Event

from tests.test_session import FRAME, TwoAxes
from workbench.errors import RunError
from workbench.runs import Run
from workbench.session import ConditionedTexts, Session
from workbench.view_state import ConditionsState, pack, unpack
from workbench.views.conditions import ConditionsView
from workbench.views.page import shown
from workbench.views.serving import APPS, app_paths, serve_apps


class Finished(Run):
    """Stands for a finished run."""

    recipe = {"name": "hyper_cl_bundled"}
    provenance = {"commit": "c" * 40, "data_sha256": "d" * 64, "device": "CPU", "seeds": [0]}


class OneRun(Session):
    """Stands for a session with one model."""

    def __init__(self):
        pass

    def run(self, recipe, *papers):
        return Finished(Path("hyper_cl_bundled-0"))

    def texts_of(self, recipe, model):
        return ConditionedTexts(TwoAxes(), FRAME)


def view(**state):
    return ConditionsView(OneRun(), ConditionsState(**state))


def test_strength_zero_leaves_every_sentence_where_it_was():
    lines, *groups = view(condition="the kind", strength=0.0).figure(view(strength=0.0).moved()).data
    assert lines.x[0] == pytest.approx(lines.x[1], abs=1e-6)
    assert sum(len(group.x) for group in groups) == 24


def test_changing_the_strength_moves_the_sentences_and_the_link():
    shown_now = view(condition="the kind", strength=0.0)
    before = shown_now.figure(shown_now.moved()).data[1].x
    shown_now.strength = 1.0
    assert shown_now.figure(shown_now.moved()).data[1].x != before
    assert unpack(pack(shown_now.state()), ConditionsState).strength == 1.0


def test_a_clicked_point_is_the_sentence_whose_neighbours_are_listed():
    one = view(condition="the kind")
    event = dict.fromkeys(Event._fields) | {"new": {"points": [{"customdata": 7}]}}
    one._click(Event(**event))
    assert one.clicked == 7
    text = "\n".join(pane.object for pane in one.content().select(pn.pane.Str))
    assert "Nearest to: text 7" in text


def test_an_unusable_condition_is_said_in_a_banner():
    found = view(condition="  ").content()
    assert isinstance(found, pn.pane.Str)
    assert "empty" in found.object


def test_markup_is_shown_and_not_read():
    one = view(condition="<b>$x$</b>")
    assert one.figure(one.moved()).layout.title.text == "&lt;b&gt;&#36;x&#36;&lt;/b&gt;"


def test_the_code_shown_makes_the_same_state():
    one = view(condition="007", other='say "hi"', strength=0.5)
    line = next(line for line in one.code() if line.startswith("view ="))
    held = eval(
        line.removeprefix("view = ConditionsView(Session(), ").removesuffix(")"),
        {"ConditionsState": ConditionsState},
    )
    assert held == one.state()


def test_what_cannot_be_drawn_becomes_its_message():
    def fail():
        raise RunError("nothing trained yet")

    assert shown(fail).object == "nothing trained yet"


def test_every_app_is_listed_by_its_name():
    assert list(app_paths()) == sorted(path.stem for path in APPS.glob("*.py"))
    assert not (APPS / "__init__.py").exists()


@pytest.mark.parametrize("address", ["0.0.0.0", "192.168.1.2", "example.org", ""])
def test_an_address_that_others_can_reach_is_refused(address, tmp_path):
    with pytest.raises(RunError, match="no login"):
        serve_apps(tmp_path, 0, address)


def test_apps_without_runs_say_how_to_start(tmp_path, monkeypatch):
    """A page whose script fails still answers, and an empty one does too: what stands on it is asked for."""
    monkeypatch.setenv("WORKBENCH_OUT", str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = pn.serve(app_paths(), port=port, threaded=True, show=False)
    try:
        for _ in range(300):  # the thread needs a moment to listen
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        for name in app_paths():
            session = pull_session(url=f"http://localhost:{port}/{name}")
            assert session.document.roots
            assert "workbench reproduce" in str(session.document.to_json())
            session.close()
    finally:
        server.stop()

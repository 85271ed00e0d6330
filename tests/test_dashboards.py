"""Dashboards without a browser: what is typed changes what is shown, links bring it back, errors are text."""

import html
import socket
import time
from pathlib import Path

import panel as pn
import polars as pl
import pytest
from bokeh.client import pull_session
from param.parameterized import Event

from tests.test_session import FRAME, TwoAxes
from workbench.errors import RunError
from workbench.own_texts import pasted_texts
from workbench.runs import Run
from workbench.session import ConditionedTexts, Session
from workbench.view_state import LONGEST_TEXT, ConditionsState, pack, unpack
from workbench.views.conditions import ConditionsView
from workbench.views.index import IndexView
from workbench.views.page import footer
from workbench.views.saved import saved_page
from workbench.views.serving import APPS, app_about, app_paths, login_options, serve_apps
from workbench.views.tables import TablePlace


class Finished(Run):
    """Stands for a finished run."""

    recipe = {"name": "hyper_cl_bundled", "paper": "hyper_cl"}
    provenance = {"commit": "c" * 40, "data_sha256": "d" * 64, "device": "CPU", "seeds": [0]}


class OneRun(Session):
    """Stands for a session with one model."""

    model, device = TwoAxes, "cpu"

    def __init__(self):
        self.out = Path("reports")
        self._known = ConditionedTexts(self.model(), FRAME)

    def finished(self):
        return [Finished(Path("hyper_cl_bundled-0"))]

    def text_models(self, recipe):
        return ["two_axes"]

    def texts_of(self, recipe, model):
        return self._known


def view(**state):
    one = ConditionsView(OneRun(), ConditionsState(**state))
    one.refresh()
    return one


def texts_in(viewable):
    return "\n".join(str(pane.object) for pane in viewable.select(pn.pane.Str))


def test_strength_zero_leaves_every_sentence_where_it_was():
    one = view(condition="the kind", strength=0.0)
    lines, *groups = one.figure().data
    assert lines.x[0] == pytest.approx(lines.x[1], abs=1e-6)
    assert sum(len(group.x) for group in groups) == 24


def test_the_attribute_that_the_condition_names_colours_the_map_until_another_is_chosen():
    one = view(condition="the size")
    assert (one.attribute, one._shown.attribute) == ("size", "size")
    assert one.param.attribute.objects == ["kind", "size"]
    one.condition = "the kind"
    assert one.attribute == "kind"
    one.attribute = "size"
    one.condition = "the kind of it"
    assert (one.attribute, one.state().attribute) == ("size", "size")  # a person's choice stays


def test_changing_the_strength_moves_map_and_table_and_link():
    one = view(condition="the kind", strength=0.0)
    before, table = list(one._map.figure.data[1].x), one.table.table.value
    assert set(table["moved"]) == {0.0}
    one.strength = 1.0
    assert list(one._map.figure.data[1].x) != before
    assert min(one.table.table.value["moved"]) > 0.5
    assert unpack(pack(one.state()), ConditionsState).strength == 1.0


def test_a_clicked_point_is_marked_in_map_and_table_and_its_neighbours_are_listed():
    one = view(condition="the kind")
    event = dict.fromkeys(Event._fields) | {"new": {"points": [{"customdata": 11}]}}
    one._click(Event(**event))
    assert one.clicked == 11
    assert "Nearest to: text 11" in texts_in(one.results())
    assert (one.table.table.selection, one.table.table.page) == ([11], 2)  # ten rows a page
    marked = one._map.figure.data[-1]
    assert (marked.name, marked.x[0]) == ("chosen", one._shown.moved.frame["x1"][11])


def test_a_row_chosen_in_the_table_is_marked_in_the_map():
    one = view(condition="the kind")
    one._pick(5)
    assert one.clicked == 5
    assert one._map.figure.data[-1].x[0] == one._shown.moved.frame["x1"][5]


def test_a_typed_row_is_chosen_and_one_that_is_not_there_chooses_none():
    one = view(condition="the kind")
    [typed] = [part for part in one._controls().select(pn.widgets.IntInput) if part.name == "Chosen row"]
    typed.value = 5
    assert one.clicked == 5
    assert "Nearest to: text 5" in texts_in(one.results())
    typed.value = 24
    assert (one.clicked, typed.value) == (None, None)
    assert "Nearest to" not in texts_in(one.results())


def test_an_unusable_condition_is_said_and_the_map_stays():
    one = view(condition="the kind")
    drawn = one._map.figure
    one.condition = "  "
    assert "empty" in one.live.said
    assert one._map.figure is drawn


def test_markup_is_shown_and_not_read():
    one = view(condition="<b>$x$</b>")
    assert one.figure().layout.title.text == "&lt;b&gt;&#36;x&#36;&lt;/b&gt;"


def test_conditions_are_remembered_pinned_and_swapped():
    one = view(condition="the kind")
    one.condition = "the size"
    assert one.param.earlier.objects == ["the size", "the kind"]
    one.pin()
    one.earlier = "the kind"
    assert (one.condition, one.other) == ("the kind", "the size")
    one.swap()
    assert (one.condition, one.other) == ("the size", "the kind")


def test_what_one_view_offers_never_reaches_another():
    first = view(condition="abc")
    second = view(condition="a secret of mine")
    assert "a secret of mine" not in first.param.earlier.objects
    assert "a secret of mine" in second.param.earlier.objects
    assert {*ConditionsView.param.earlier.objects, *ConditionsView.param.model.objects} <= {
        None
    }  # shared by all


def test_a_search_lists_the_nearest_plain_beside_conditioned():
    one = view(condition="the kind", query="text 3")
    said = texts_in(one._found)
    # Plain, sizes are alike: 3, 7, 11, ...; under the condition, kinds: every odd number.
    plain, conditioned = said.split("After")
    assert plain.count("text ") == conditioned.count("text ") == 10
    assert all(int(word) % 4 == 3 for word in numbers_in(plain)[:6])
    assert all(int(word) % 2 == 1 for word in numbers_in(conditioned))


def numbers_in(text):
    return [line.rsplit(" ", 1)[1] for line in text.splitlines() if "text " in line]


def test_own_texts_are_shown_and_stay_out_of_the_link():
    one = view(condition="the kind", clicked=20)
    one.bring(pasted_texts("text 1\ntext 2\ntext 3\ntext 4"))
    assert one.table.table.value["text"].to_list() == ["text 1", "text 2", "text 3", "text 4"]
    assert one.clicked is None
    state = unpack(pack(one.state()), ConditionsState)
    assert state.own == 4
    assert "text 2" not in state.model_dump_json()
    again = ConditionsView(OneRun(), state)
    assert "4 texts of somebody's own" in again._problem
    one.bring(None)
    assert len(one.table.table.value) == 24


def test_a_bad_file_is_said_and_nothing_changes():
    one = view(condition="the kind")
    one._upload.param.update(filename="<img src=x>.csv", value=b"sentence\na\n")
    assert "<img src=x>.csv has no column named text" in texts_in(one._said)
    assert len(one.table.table.value) == 24


def test_texts_without_attributes_are_one_colour_and_have_no_agreement():
    one = view(condition="the kind")
    one.bring(pasted_texts("text 1\ntext 2\ntext 3"))
    assert [trace.name for trace in one._map.figure.data[1:]] == ["sentences"]
    assert not one._purity.visible


def test_the_code_shown_makes_the_same_state():
    one = view(condition="007", other='say "hi"', strength=0.5)
    line = next(line for line in one.code() if line.startswith("view ="))
    held = eval(
        line.removeprefix("view = ConditionsView(Session(), ").removesuffix(")"),
        {"ConditionsState": ConditionsState},
    )
    assert held == one.state()


def test_dashboard_notebook_code_and_saved_report_agree_number_for_number(tmp_path):
    one = view(condition="the kind", strength=0.7, clicked=3)
    names = {"Session": OneRun, "ConditionsView": ConditionsView, "ConditionsState": ConditionsState}
    *_, make, draw = one.code()
    exec(make, names)  # what a person pastes into a notebook, over the same run
    pasted = eval(draw, names)
    assert pasted.to_json() == one._map.figure.to_json()
    report = saved_page("conditions", one._saved()).getvalue()
    for figure in (one._map.figure, one._purity.figure, one._grouped.figure):
        data = figure.to_html(full_html=False, include_plotlyjs=False, div_id="same")
        assert data[data.index("[{") : data.rindex("}]")] in report
    moved = one._shown.moved
    near = moved.neighbours(3)
    assert all(f"{row['cosine']:+.3f}  {row['text']}" in report for row in near.to_dicts())
    assert f"<td>{round(float(moved.distance[3]), 3):.4f}" in report
    assert "run hyper_cl_bundled-0" in report


def test_what_agrees_is_not_saved_beside_another_condition(monkeypatch):
    one = view(condition="the kind")
    assert saved_page("conditions", one._saved()).getvalue().count("share of the ten nearest") == 1
    monkeypatch.setattr(one._more, "ask", lambda shown: None)  # its turn has not come
    one.condition = "the size"
    saved = saved_page("conditions", one._saved()).getvalue()
    assert "the size" in saved
    assert "share of the ten nearest" not in saved


def test_a_saved_report_escapes_text_and_cuts_long_tables_aloud():
    values = pl.DataFrame({"text": ["<script>alert(1)</script>"] * 2001, "value": [0.12346] * 2001})
    table = TablePlace()
    table.show(values)
    page = saved_page("a & b", pn.Column(pn.pane.Str("<b>"), table)).getvalue()
    assert "<script>alert(1)" not in page
    assert page.count("&lt;script&gt;alert(1)") == 2000
    assert "1 more rows" in page
    assert "0.1235<" in page
    assert "<title>a &amp; b</title>" in page
    assert "&lt;b&gt;" in page


def test_the_footer_of_a_recipe_at_its_smallest_says_that_its_numbers_mean_nothing(monkeypatch):
    assert "mean nothing" not in footer(Finished(Path("hyper_cl_bundled-0"))).object
    monkeypatch.setattr(Finished, "recipe", Finished.recipe | {"sets": ["tiny"]})
    assert "mean nothing" in footer(Finished(Path("hyper_cl_bundled-0"))).object


# --- serving ------------------------------------------------------------------------------------------------


def test_every_app_is_listed_by_its_name_and_says_what_it_is():
    assert list(app_paths()) == sorted(path.stem for path in APPS.glob("*.py"))
    assert not (APPS / "__init__.py").exists()
    for name in app_paths():
        label, line = app_about(name)
        assert label[0].isupper()
        assert len(line) > 20


@pytest.mark.parametrize("address", ["0.0.0.0", "192.168.1.2", "example.org", "", "::"])
def test_an_address_that_others_can_reach_is_refused_without_login_and_origins(address, tmp_path):
    with pytest.raises(RunError, match="--password-file FILE and --origin"):
        serve_apps(tmp_path, 0, address)
    secret = password_file(tmp_path, "correct horse battery")
    with pytest.raises(RunError, match="--origin"):
        serve_apps(tmp_path, 0, address, [], secret)
    with pytest.raises(RunError, match="--password-file"):
        serve_apps(tmp_path, 0, address, ["lab.example.org:80"])


def password_file(folder, content, mode=0o600):
    path = folder / "secret"
    path.write_text(content, encoding="utf-8")
    path.chmod(mode)
    return path


@pytest.mark.parametrize("origin", ["*", "*:80", "*.lab.org:80", "http://lab:80", "lab", "lab:80/x", "a b:1"])
def test_an_origin_that_is_not_exact_is_refused_even_on_this_machine(origin):
    with pytest.raises(RunError, match="not exact"):
        login_options("127.0.0.1", 5006, [origin], None)


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [
        ("short", 0o600, "at least 12"),
        ("", 0o600, "at least 12"),
        ("correct horse battery", 0o644, "chmod 600"),
    ],
)
def test_a_weak_or_open_password_file_is_refused(content, mode, complaint, tmp_path):
    with pytest.raises(RunError, match=complaint):
        login_options("0.0.0.0", 5006, ["lab:5006"], password_file(tmp_path, content, mode))
    with pytest.raises(RunError, match="cannot be read"):
        login_options("0.0.0.0", 5006, ["lab:5006"], tmp_path / "none")


def test_login_and_exact_origins_open_an_address(tmp_path):
    options = login_options("0.0.0.0", 5006, ["lab:5006"], password_file(tmp_path, "correct horse battery\n"))
    assert options["websocket_origin"] == ["lab:5006"]
    assert options["basic_auth"] == {"workbench": "correct horse battery"}
    assert len(options["cookie_secret"]) >= 32
    local = login_options("127.0.0.1", 5006, [], None)
    assert local == {"websocket_origin": ["localhost:5006", "127.0.0.1:5006"]}


def test_the_first_page_offers_training_only_where_it_is_missing(tmp_path, monkeypatch):
    labels = [button.label for button in IndexView(Session(tmp_path))._start.select(pn.widgets.Button)]
    assert labels == ["Train the small models", "Train the embedded set"]
    some = IndexView(OneRun())
    labels = [button.label for button in some._start.select(pn.widgets.Button)]
    assert labels == ["Train the embedded set"]  # small models would only stand beside real ones
    cards = [pane.object for pane in some._cards.select(pn.pane.HTML)]
    assert any("1 run: hyper_cl_bundled" in card for card in cards)


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
            assert "cdn.holoviz" not in str(session.document.to_json())
            start = "Train the small models" if name == "index" else "workbench reproduce"
            assert start in str(session.document.to_json())
            linked = 'href="index">first page' in html.unescape(str(session.document.to_json()))
            assert linked == (name != "index")
            session.close()
    finally:
        server.stop()


def test_no_box_takes_more_letters_than_a_link_holds():
    found = view()._controls().select(pn.widgets.TextInput)
    assert {box.max_length for box in found if box.name in ("Condition", "Pinned: B", "Search")} == {
        LONGEST_TEXT
    }

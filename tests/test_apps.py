"""The dashboards as a person sees them: real Chromium, one server, a small real model, no network."""

from pathlib import Path

import polars as pl
import pytest
import torch

from tests.browsing import IN_A_BROWSER, WAIT, free_port, served, wait_for_other_text
from tests.test_dashboards import OneRun
from workbench.model import HyperCL
from workbench.papers.hyper_cl import ConditionedHead
from workbench.papers.hyper_cl_settings import ModelSettings
from workbench.session import ConditionedTexts
from workbench.view_state import ConditionsState, pack
from workbench.views import conditions, index, page, serving

pytestmark = IN_A_BROWSER

# What has the focus: its value and its outline; parts of a page hide behind shadow roots.
FOCUSED = """() => {
  let part = document.activeElement
  while (part.shadowRoot && part.shadowRoot.activeElement) part = part.shadowRoot.activeElement
  return [part.value, getComputedStyle(part).outlineStyle]
}"""
COLOURS, ANIMALS = ("red", "blue", "green"), ("fox", "kite", "newt")
SENTENCES = pl.DataFrame(
    [
        {"text": f"The {colour} {animal} number {number}.", "colour": colour, "animal": animal}
        for colour in COLOURS
        for animal in ANIMALS
        for number in range(4)
    ]
)


class Small(HyperCL):
    """An untrained head over vectors of words: other conditions give other weights, without an encoder."""

    def __init__(self, store):
        torch.manual_seed(0)
        settings = ModelSettings(name="small", kind="hyper", rank=16, identity=False)
        self.head, self.unit, self.store = ConditionedHead(settings, 384, 384).eval(), True, store
        store.tokens = False

    def apart(self):
        return self


class SmallRun(OneRun):
    """Stands for a session over that model."""

    store = None

    def __init__(self):
        self.out = Path("reports")
        self._known = ConditionedTexts(Small(self.store), SENTENCES)


@pytest.fixture(scope="module")
def address(word_store):
    SmallRun.store = word_store
    session = SmallRun()
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "shared_session", lambda: session)
        patch.setattr(index, "first_recipes", lambda: {"small": [], "all": ["hyper_cl_bundled", "other"]})
        options = serving.login_options("127.0.0.1", port, [], None)
        with served(serving.pages(), port, address="127.0.0.1", **options):
            yield f"http://127.0.0.1:{port}"


class Visitor:
    """A person with a browser of their own."""

    def __init__(self, browser, address, **options):
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
        self.page, self.address, self.said, self.asked = self.context.new_page(), address, [], []
        self.page.set_default_timeout(WAIT)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda line: self.said.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))

    def open(self, path):
        self.page.goto(f"{self.address}/{path}", wait_until="load")
        return self

    def map(self):
        """Return the title of the map and where its points are."""
        self.page.wait_for_selector(".js-plotly-plot .point")
        plot = self.page.locator(".js-plotly-plot").first
        points = "plot => plot._fullData.flatMap(one => one.mode == 'markers' ? Array.from(one.x) : [])"
        return plot.evaluate("plot => plot.layout.title.text"), plot.evaluate(points)

    def wait_for_title(self, title):
        for _ in range(300):
            self.page.wait_for_timeout(100)  # not time.sleep: the page must get its events
            if self.page.locator(".js-plotly-plot").count() and self.map()[0] == title:
                self.page.wait_for_timeout(600)  # the animation's end
                return self.map()
        raise AssertionError(f"the map never said {title!r} but {self.map()[0]!r}")

    def box(self, label):
        return self.page.get_by_label(label, exact=True).first

    def type(self, label, text):
        self.box(label).fill(text)
        self.box(label).press("Enter")


@pytest.fixture
def visitor(browser, address):
    here = []

    def make(**options):
        here.append(Visitor(browser, address, **options))
        return here[-1]

    yield make
    for one in here:
        one.context.close()


def link(**state):
    return f"conditions?view={pack(ConditionsState(**state))}"


# Counts how often a figure is drawn again for its size alone, and how often the page is laid out.
COUNTED = """figure => {
  window.resized = window.laid = 0
  figure.on("plotly_relayout", change => { window.resized += "width" in change })
  let view = Bokeh.Models.get("Column").prototype.default_view.prototype
  while (!Object.hasOwn(view, "compute_layout")) view = Object.getPrototypeOf(view)
  const compute = view.compute_layout
  view.compute_layout = function () { window.laid += 1; return compute.call(this) }
  return figure._fullLayout.width
}"""


def test_a_page_is_laid_out_once_an_answer_and_figures_are_drawn_again_when_their_size_changes(visitor):
    one = visitor().open(link(condition="the colour"))
    one.wait_for_title("the colour")
    one.page.locator(".tabulator-row").first.wait_for()
    one.page.wait_for_timeout(1000)
    figure = one.page.locator(".js-plotly-plot").first
    wide = figure.evaluate(COUNTED)
    one.box("Condition").fill("the animal")
    one.box("Condition").press("Enter")
    one.wait_for_title("the animal")
    one.page.wait_for_timeout(1000)
    assert one.page.evaluate("() => resized") == 0
    # That it works, the map, the rest, what agrees with the attribute: each at most once, and what they say.
    assert 1 <= one.page.evaluate("() => laid") <= 8
    one.page.set_viewport_size({"width": 1000, "height": 800})
    one.page.wait_for_function("() => resized > 0")
    assert figure.evaluate("figure => figure._fullLayout.width") == pytest.approx(wide - 280, abs=60)
    assert one.said == []


def test_a_row_that_is_typed_is_chosen(visitor):
    one = visitor().open(link(condition="the colour"))
    one.wait_for_title("the colour")
    one.type("Chosen row", "5")
    one.page.get_by_text(f"Nearest to: {SENTENCES['text'][5]}").wait_for()
    one.box("Chosen row").press("ArrowUp")  # the next
    one.page.get_by_text(f"Nearest to: {SENTENCES['text'][6]}").wait_for()
    assert one.said == []


def test_every_page_opens_with_content_no_console_error_and_no_foreign_address(visitor, address):
    one = visitor()
    for name in ("", "index"):
        one.open(name).page.get_by_text("1 run: hyper_cl_bundled").first.wait_for()
        assert one.page.locator("#bar nav a").count() == len(serving.app_paths())
    one.page.get_by_role("link", name="Conditions", exact=True).first.click()
    one.map()
    assert one.said == []
    assert [url for url in one.asked if not url.startswith((address, "data:", "blob:"))] == []


def test_a_typed_condition_changes_map_and_table_and_address(visitor):
    one = visitor().open(link(condition="colour"))
    before = one.wait_for_title("colour")
    row, url = one.page.locator(".tabulator-row").first, one.page.evaluate("location.href")
    told = row.inner_text()
    one.type("Condition", "animal")
    after = one.wait_for_title("animal")
    assert len(after[1]) == len(before[1]) == SENTENCES.height
    assert after[1] != before[1]
    wait_for_other_text(row, told)
    assert one.page.evaluate("location.href") != url
    assert pack(ConditionsState(model="two_axes", condition="animal")) in one.page.evaluate("location.href")
    assert one.said == []


@pytest.mark.parametrize("text", ["007", "true", "<img src=x onerror=alert(1)>"])
def test_a_link_brings_back_its_state_and_text_stays_text(visitor, text):
    one = visitor().open(link(condition=text, other="null", strength=0.5, query="1e5"))
    title = one.wait_for_title(f"{text}  |  null".replace("<", "&lt;").replace(">", "&gt;"))[0]
    assert "<" not in title
    assert one.box("Condition").input_value() == text
    assert one.box("Pinned: B").input_value() == "null"
    assert one.box("Search").input_value() == "1e5"
    assert one.said == []


def test_a_row_chosen_in_the_table_is_marked_in_the_map_and_the_link(visitor):
    one = visitor().open(link(condition="colour"))
    one.wait_for_title("colour")
    one.page.locator(".tabulator-row").nth(2).click()
    one.page.get_by_text("Nearest to: The red fox number 2.").wait_for()
    plot = one.page.locator(".js-plotly-plot").first
    chosen = plot.evaluate("plot => plot.data.filter(one => one.name == 'chosen').length")
    assert chosen == 1
    again = visitor().open(one.page.evaluate("location.pathname + location.search").lstrip("/"))
    again.page.get_by_text("Nearest to: The red fox number 2.").wait_for()


def test_two_browsers_stay_apart(visitor, tmp_path):
    one, two = visitor().open(link(condition="colour")), visitor().open(link(condition="colour"))
    one.wait_for_title("colour")
    two.wait_for_title("colour")
    one.type("Condition", "only mine")
    one.wait_for_title("only mine")
    upload(one, tmp_path, "own.csv", "text\n" + "\n".join(f"secret text {row}" for row in range(5)))
    one.page.get_by_text("5 texts of your own").wait_for()
    one.page.get_by_text("secret text 3").first.wait_for()
    two.page.wait_for_timeout(500)
    assert two.map()[0] == "colour"
    assert two.page.get_by_text("secret").count() == 0
    three = visitor().open("conditions")
    three.map()
    assert three.page.get_by_text("secret").count() == 0
    assert three.page.get_by_text("only mine").count() == 0
    assert "secret" not in one.page.evaluate("location.href")


def upload(visitor, folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    visitor.page.get_by_text("Your own sentences").click()
    visitor.page.locator("input[type=file]").set_input_files(str(path))


def test_a_bad_file_is_refused_in_one_sentence_and_the_map_stays(visitor, tmp_path):
    one = visitor().open(link(condition="colour"))
    points = one.wait_for_title("colour")[1]
    upload(one, tmp_path, "own.csv", "sentence\n<img src=x onerror=alert(1)>\nb\nc\n")
    one.page.get_by_text("own.csv has no column named text; its columns are: sentence").wait_for()
    assert one.map()[1] == points
    assert one.said == []


def test_a_saved_report_opens_from_disk_without_a_network_and_shows_its_figures(visitor, tmp_path):
    one = visitor().open(link(condition="colour", clicked=4))
    points = one.wait_for_title("colour")[1]
    with one.page.expect_download() as told:
        one.page.get_by_text("Save as HTML").click()
        if one.page.get_by_text("Download").count():
            one.page.get_by_text("Download").first.click()
    path = tmp_path / "saved.html"
    told.value.save_as(path)
    reader = visitor(offline=True)
    reader.page.goto(path.as_uri(), wait_until="load")
    title, saved = reader.map()
    assert title == "colour"
    assert saved == points
    assert reader.page.locator(".js-plotly-plot").count() == 3
    assert "Nearest to: The red kite number 0." in reader.page.inner_text("body")
    assert [url for url in reader.asked if not url.startswith(("file://", "data:", "blob:"))] == []
    assert reader.said == []


def test_light_and_dark_are_chosen_by_a_button_and_remembered(visitor):
    one = visitor(color_scheme="light").open("conditions")
    one.map()
    paper = "getComputedStyle(document.body).backgroundColor"
    light = one.page.evaluate(paper)
    one.page.locator("#theme").press("Enter")
    dark = one.page.evaluate(paper)
    assert light != dark
    one.open("index")
    assert one.page.evaluate(paper) == dark


def test_a_phone_needs_no_sideways_scrolling(browser, address):
    one = Visitor(browser, address)
    one.page.set_viewport_size({"width": 390, "height": 844})
    for name, there in (("index", "1 run: hyper_cl_bundled"), ("conditions", "Ready in")):
        one.open(name).page.get_by_text(there).first.wait_for()
        one.page.wait_for_timeout(500)
        assert one.page.evaluate("document.documentElement.scrollWidth") <= 390
    one.context.close()


def test_the_keyboard_reaches_the_condition_and_shows_where_it_is(visitor):
    one = visitor().open(link(condition="colour"))
    one.wait_for_title("colour")
    for _ in range(30):
        one.page.keyboard.press("Tab")
        value, outline = one.page.evaluate(FOCUSED)
        if value == "colour":
            break
    assert (value, outline) == ("colour", "solid")


def test_a_message_larger_than_the_cap_is_named_in_the_server_options():
    assert serving.UPLOAD_MIB * 2**20 > 4 / 3 * conditions.MOST_BYTES  # base64 of the largest allowed file

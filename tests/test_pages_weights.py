"""The pages of pairs and of weights in a real browser, over models that stand in for trained ones."""

import pytest
from bokeh.client import pull_session

from tests.browsing import IN_A_BROWSER, free_port, served, wait_for_other_text
from tests.test_view_similarity import Counting, OneRun
from tests.test_view_weights import Kept, SmallHyperCL
from workbench.datasets.bundled import sentences
from workbench.view_state import SimilarityState, WeightsState, pack, unpack
from workbench.views.serving import app_paths

pytestmark = IN_A_BROWSER
HOSTILE = "<img src=x onerror=alert(1)>"
PATIENCE = 60_000  # milliseconds; a busy machine is slow to start a browser


class Both(OneRun):
    """One run for both pages: letters are compared, a small head generates."""

    def __init__(self, store):
        super().__init__()
        self._run = Kept("hyper_cl")
        self._generating, self.wanted = SmallHyperCL(store), "similarity"

    def model(self, run, name, load=None):
        if load is not None:
            return Counting()
        return self._one if self.wanted == "similarity" else self._generating


@pytest.fixture(scope="module")
def address(word_store):
    session = Both(word_store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workbench.views.page.shared_session", lambda: session)
        patch.setattr("workbench.generated.sentences", lambda: sentences().gather_every(8))
        paths = {name: app_paths()[name] for name in ("similarity", "weights")}
        with served(paths, port := free_port()):
            yield f"http://localhost:{port}", session


@pytest.fixture
def visit(address, browser):
    """Open a page in a state; return it and what went wrong on it: errors, dialogs, foreign addresses."""
    pages = []

    def open_page(name, state, width=1280):
        root, session = address
        session.wanted = name
        page = browser.new_page(viewport={"width": width, "height": 800})
        pages.append(page)
        wrong = []
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        local = (root, root.replace("http", "ws"), "data:", "blob:")
        page.on("request", lambda one: None if one.url.startswith(local) else wrong.append(one.url))
        page.goto(f"{root}/{name}?view={pack(state)}")
        page.wait_for_selector(".js-plotly-plot .main-svg", state="attached", timeout=PATIENCE)
        page.wait_for_selector(".tabulator-row", timeout=PATIENCE)
        return page, wrong

    yield open_page
    for page in pages:
        page.close()


def figures(page):
    """Return what all figures of a page show, as one text."""
    return "".join(page.locator(".js-plotly-plot .main-svg").all_text_contents())


def type_condition(page, text):
    box = page.get_by_label("Condition", exact=True)
    box.fill(text)
    box.press("Enter")


@pytest.mark.parametrize("name", ["similarity", "weights"])
def test_a_page_has_roots(address, name):
    root, session = address
    session.wanted = name
    pulled = pull_session(url=f"{root}/{name}")
    assert pulled.document.roots
    pulled.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_typing_a_condition_changes_the_pairs_figures_and_their_table(visit, width):
    own = f"aaa xyz\tbbb xyz\nabc\t{HOSTILE}"
    page, wrong = visit("similarity", SimilarityState(pairs="own", own=own, condition="abc"), width)
    row = page.locator(".tabulator-row").first
    before = row.inner_text()
    type_condition(page, "xyz only")
    page.get_by_text("xyz only").locator("visible=true").first.wait_for(timeout=PATIENCE)
    page.wait_for_function("location.search.length > 0")
    wait_for_other_text(row, before)
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert wrong == []


@pytest.mark.parametrize("width", [1280, 390])
def test_typing_a_condition_changes_the_weights_and_their_table(visit, width):
    page, wrong = visit("weights", WeightsState(condition="The age."), width)
    assert "The age." in page.locator(".tabulator-row").first.inner_text()
    type_condition(page, HOSTILE)
    page.locator(".tabulator-row", has_text="<img").first.wait_for(timeout=PATIENCE)
    assert HOSTILE in figures(page)
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert wrong == []


def test_a_number_says_on_hover_where_it_comes_from_and_reads_no_markup(visit):
    page, wrong = visit("similarity", SimilarityState(pairs="own", own="abc|xyz", condition=HOSTILE))
    number = page.locator(".tabulator-cell[tabulator-field=conditioned] span").first
    assert number.get_attribute("title") == (
        f"row 0, conditioned: cosine under {HOSTILE!r} at strength 1, -1 to 1; 1 pairs; model one, seed 0; "
        "run hyper_cl-0"
    )
    assert float(number.inner_text()) <= 1
    page.locator(".tabulator-col[tabulator-field=conditioned]").first.hover()
    page.locator(".tabulator-tooltip", has_text=HOSTILE).wait_for(timeout=PATIENCE)
    assert page.locator("img[src=x]").count() == 0
    assert wrong == []


def test_the_words_that_moved_a_pair_are_drawn_when_asked(visit):
    own = f"aaa xyz|bbb xyz\nabc|{HOSTILE}"
    page, wrong = visit("similarity", SimilarityState(pairs="own", own=own, condition="abc", chosen=1), 390)
    page.get_by_role("button", name="Which words moved it?").click(timeout=PATIENCE)
    page.get_by_text("Words of the second sentence").wait_for(timeout=PATIENCE, state="attached")
    assert "completeness error" in figures(page)
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert wrong == []


def test_another_measure_of_distance_is_in_the_link_and_on_the_figure(visit):
    page, wrong = visit("weights", WeightsState(condition="The age."))
    page.get_by_label("Measure").select_option(label="what is read (principal angles)")
    page.get_by_text("principal angles (0 to 1").first.wait_for(timeout=PATIENCE, state="attached")
    page.wait_for_function("location.search.length > 0")
    link = page.evaluate("new URLSearchParams(location.search).get('view')")
    assert unpack(link, WeightsState).measure == "angles"
    assert wrong == []


def test_what_cannot_be_used_is_shown_as_text(visit):
    page, wrong = visit("similarity", SimilarityState(pairs="own", own="abc|cba", condition="abc"))
    page.get_by_role("textbox", name="Own").fill(HOSTILE)
    page.get_by_label("Condition", exact=True).click()
    page.get_by_text("line 1 of your pairs holds 1 text").wait_for(timeout=PATIENCE)
    assert wrong == []

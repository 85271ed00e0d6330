"""The pages Classify and Fairness in a browser, over one tiny run: typed names, uploads, nothing foreign."""

import io

import pytest
from PIL import Image

from tests.browsing import IN_A_BROWSER, WAIT, free_port, served
from workbench.datasets.samples import OWN
from workbench.view_state import ClassifyState, FairnessState, pack
from workbench.views.serving import UPLOAD_MIB, app_paths

pytestmark = [
    *IN_A_BROWSER,
    # Bokeh calls pandas 3.1 in a way that pandas is about to drop; tables work.
    pytest.mark.filterwarnings("ignore:The inplace keyword"),
]


@pytest.fixture(scope="module")
def address(tiny_image_run):
    """A server over the folder of a tiny run."""
    paths = {name: path for name, path in app_paths().items() if name in ("classify", "fairness")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_OUT", str(tiny_image_run.folder.parent.parent))
        with served(paths, port := free_port(), websocket_max_message_size=UPLOAD_MIB * 2**20):
            yield f"http://localhost:{port}"


@pytest.fixture
def visit(browser, address):
    """Open a page; return it, the foreign addresses it asked for, and what its console and dialogs said."""
    pages = []

    def open_page(path, text, width=1280):
        page = browser.new_page(viewport={"width": width, "height": 800})
        pages.append(page)
        foreign, said = [], []
        ours = (address, address.replace("http", "ws"), "data:", "blob:")
        page.on("request", lambda one: None if one.url.startswith(ours) else foreign.append(one.url))
        page.on("console", lambda line: said.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.goto(f"{address}/{path}", wait_until="commit", timeout=WAIT)
        page.get_by_text(text).first.wait_for(timeout=WAIT)
        return page, foreign, said

    yield open_page
    for page in pages:
        page.close()


def type_names(page, names):
    box = page.locator("textarea").first
    box.fill(names)
    box.press("Tab")


def test_typed_class_names_change_answers_table_and_address(visit):
    page, foreign, said = visit("classify", "Unadapted is")
    page.get_by_text("is circles").first.wait_for(timeout=WAIT)
    type_names(page, "red, blue, <img src=x onerror=alert(1)>")
    page.get_by_text("The truth is not known").first.wait_for(timeout=WAIT)
    type_names(page, "red, blue")
    page.get_by_text("240 pictures").first.wait_for(timeout=WAIT)
    page.get_by_text("is red").first.wait_for(timeout=WAIT)
    page.locator(".tabulator-row").nth(2).wait_for(timeout=WAIT)
    assert page.locator(".tabulator-row").count() == 3
    assert foreign == []
    assert said == []


def picture(side=50):
    raw = io.BytesIO()
    Image.new("CMYK", (side, side), (0, 200, 200, 0)).save(raw, "JPEG")
    return raw.getvalue()


def test_a_good_and_a_bad_upload(visit):
    state = pack(ClassifyState(names="red, blue, 007", pictures=OWN))
    page, _, said = visit(f"classify?view={state}", "no picture yet")
    files = page.locator("input[type=file]").first
    files.set_input_files([{"name": "mine.jpg", "mimeType": "image/jpeg", "buffer": picture()}])
    page.get_by_text("mine.jpg").first.wait_for(timeout=WAIT)
    page.get_by_text("1 pictures").first.wait_for(timeout=WAIT)
    files.set_input_files([{"name": "bad.png", "mimeType": "image/png", "buffer": b"no picture"}])
    page.get_by_text("bad.png: not a PNG or JPEG").first.wait_for(timeout=WAIT)
    assert said == []


@pytest.mark.parametrize("width", [1280, 390])
def test_groups_stand_with_their_counts_and_nothing_is_wider_than_the_page(visit, width):
    page, foreign, said = visit(
        f"fairness?view={pack(FairnessState(column='rendering'))}", "Best minus", width
    )
    page.locator(".main-svg").first.wait_for(state="attached", timeout=WAIT)
    assert page.locator("text.legendtext, .legendtext").count() >= 2
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert foreign == []
    assert said == []


def test_a_link_that_was_cut_is_said_in_words(visit):
    page, _, _ = visit("classify?view=abc", "cannot be read")
    assert "default view" in page.locator("body").inner_text() or page.get_by_text("default view").count()

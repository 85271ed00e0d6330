"""What leaves the pages, in a browser: reports that open from disk, notebook code, classifiers that run."""

import io
import json
import shutil
import zipfile

import nbformat
import numpy as np
import onnxruntime
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests.browsing import IN_A_BROWSER, WAIT, free_port, served, wait_until_ready
from tests.figures import plain
from workbench import export
from workbench.datasets.samples import OWN
from workbench.view_state import (
    ClassifyState,
    ConditionsState,
    FairnessState,
    SimilarityState,
    WeightsState,
    ZooState,
    pack,
    unpack,
)
from workbench.views.serving import UPLOAD_MIB, app_paths

pytestmark = [
    *IN_A_BROWSER,
    # Bokeh calls pandas 3.1 in a way that pandas is about to drop; tables work.
    pytest.mark.filterwarnings("ignore:The inplace keyword"),
]
HOSTILE = "<img src=x onerror=alert(1)>"
LOCAL = ("file:", "data:", "blob:")
STATES = {
    "conditions": ConditionsState(
        recipe="hyper_cl_bundled_tiny",
        condition="The colour.",
        other="The size.",
        blend=0.25,
        strength=0.7,
        clicked=3,
        query="a red thing",
    ),
    "fairness": FairnessState(about="wording", asked="shape", column="rendering", templates="a {} here"),
    "classify": ClassifyState(names=f"circles, squares, stars, {HOSTILE}"),
    "similarity": SimilarityState(pairs="own", own=f"A red fox.\tA red car.\n{HOSTILE}\tA blue car."),
    # Named: which run is the oldest depends on which test made its run first.
    "weights": WeightsState(recipe="hyper_cl_bundled_tiny", condition=HOSTILE),
    "zoo": ZooState(),
}


@pytest.fixture(scope="module")
def out(tiny_run, tiny_image_run, tiny_zoo_run, tmp_path_factory):
    """One folder that holds a run of sentences, one of images and one of a zoo."""
    folder = tmp_path_factory.mktemp("both") / "reports"
    for run in (tiny_run, tiny_image_run, tiny_zoo_run):
        shutil.copytree(run.folder, folder / "runs" / run.folder.name)
    return folder


@pytest.fixture(scope="module")
def address(out):
    """A server over the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_OUT", str(out))
        paths = {name: app_paths()[name] for name in STATES}
        with served(paths, port := free_port(), websocket_max_message_size=UPLOAD_MIB * 2**20):
            yield f"http://localhost:{port}"


@pytest.fixture
def brief(monkeypatch):
    """A few rounds of timing instead of 200."""
    whole = export._latency
    monkeypatch.setattr(export, "_latency", lambda sessions, image: whole(sessions, image, 5))


@pytest.fixture
def listen(browser):
    """Open pages that write down what goes wrong: errors, dialogs."""
    contexts = []

    def open_page(**options):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        page, wrong = contexts[-1].new_page(), []
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        return page, wrong

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def visit(listen, address):
    """Open a page in a state and wait until it has its controls."""

    def open_page(name, state):
        page, wrong = listen()
        page.goto(f"{address}/{name}?view={pack(state)}", wait_until="commit", timeout=WAIT)
        page.get_by_text("Save as HTML").wait_for(timeout=WAIT)
        return page, wrong

    return open_page


@pytest.fixture
def open_saved(listen):
    """Open a file where nothing but files can be reached; return the page and what went wrong."""

    def open_file(path):
        page, wrong = listen(offline=True)
        context = page.context

        def only_files(route):
            if route.request.url.startswith(LOCAL):
                return route.continue_()
            wrong.append(f"asked for {route.request.url}")
            return route.abort()

        context.route("**/*", only_files)
        page.goto(path.as_uri(), wait_until="load", timeout=WAIT)
        return page, wrong

    return open_file


def downloaded(page, label, folder):
    """Press a download button; return where the file lies."""
    with page.expect_download(timeout=WAIT) as found:
        page.get_by_text(label).click()
    path = folder / found.value.suggested_filename
    found.value.save_as(path)
    return path


def as_number(cell):
    """Read a cell as the page or the report prints it: 1,000 is 1000.0, and a text stays one."""
    try:
        return round(float(cell.replace(",", "")), 4)
    except ValueError:
        return cell.strip().casefold()


def rows_of(page, row, cell):
    """Return the cells of every row of every table, without empty ones."""
    cells = [one.locator(cell).all_inner_texts() for one in page.locator(row).all()]
    return [[as_number(text) for text in own if text.strip()] for own in cells]


DRAWN = """all => {  // the data of figures, as the browser has them
  const plain = one => ArrayBuffer.isView(one) ? Array.from(one) : Array.isArray(one) ? one.map(plain)
    : one && typeof one == "object" ? Object.fromEntries(Object.entries(one).map(([k, v]) => [k, plain(v)]))
    : Number.isNaN(one) ? null : one
  return all.map(one => plain(one.data))
}"""


def drawn(page):
    """Return the data of every visible figure of a page."""
    figures = page.locator(".js-plotly-plot").locator("visible=true")
    return [plain(one) for one in figures.evaluate_all(DRAWN)]


def noted(code, folder):
    """Run code as a notebook's cell in a kernel of its own; return the data of the figures it shows."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=WAIT / 1000, resources={"metadata": {"path": str(folder)}}).execute()
    kind = "application/vnd.plotly.v1+json"
    outputs = [one.get("data", {}) for one in notebook.cells[0].outputs]
    return [plain(one[kind]["data"]) for one in outputs if kind in one]


def areas(page):
    """Return the size of every visible figure, in square pixels of what is drawn in it."""
    figures = page.locator(".js-plotly-plot").locator("visible=true")
    return figures.evaluate_all(
        """all => all.map(one => Math.max(0, ...[...one.querySelectorAll("svg.main-svg, canvas")].map(
            drawn => { const box = drawn.getBoundingClientRect(); return box.width * box.height })))"""
    )


def wait_for_all(name, page, wrong):
    """Wait until a page shows all that it computes."""
    if name != "zoo":  # it reads what is finished and computes nothing
        wait_until_ready(page, wrong)
    if name == "conditions":  # what agrees with the attribute comes after the map
        page.get_by_text("Ready in").nth(1).wait_for(timeout=WAIT)


@pytest.mark.parametrize("name", STATES)
def test_a_saved_page_opens_from_disk_with_its_figures_and_numbers(name, visit, open_saved, tmp_path, caplog):
    page, wrong = visit(name, STATES[name])
    wait_for_all(name, page, wrong)
    drawn = "img[alt^=picture]" if name == "classify" else ".js-plotly-plot .main-svg"
    page.locator(drawn).first.wait_for(state="attached", timeout=WAIT)
    if name != "classify":  # there the truth of one of the names is not known
        page.locator(".tabulator-row").first.wait_for(timeout=WAIT)
    page.wait_for_timeout(500)
    figures, rows = len(areas(page)), rows_of(page, ".tabulator-row", ".tabulator-cell:visible")
    saved, problems = open_saved(downloaded(page, "Save as HTML", tmp_path))
    saved.locator(".js-plotly-plot .main-svg").first.wait_for(state="attached", timeout=WAIT)
    found = areas(saved)
    # Pictures stand in the report as one figure; on the page each is an image of its own.
    assert len(found) == figures + (name == "classify")
    assert min(found) > 10_000
    told = rows_of(saved, "tbody tr", "td")
    assert rows or name == "classify"
    assert [row for row in rows if row not in told] == []
    assert saved.get_by_text("run hyper_").count() >= 1
    assert saved.locator("img[src=x]").count() == 0
    assert wrong == problems == []
    assert "work failed" not in caplog.text  # the server says so of what it did not foresee


@pytest.mark.parametrize("name", STATES)
def test_page_saved_page_and_notebook_code_draw_the_same_numbers(name, visit, open_saved, out, tmp_path):
    page, wrong = visit(name, STATES[name])
    wait_for_all(name, page, wrong)
    page.get_by_text("Notebook code").click()
    code = page.get_by_text("from workbench.session import Session").inner_text()
    page.wait_for_timeout(500)
    shown = drawn(page)
    saved, problems = open_saved(downloaded(page, "Save as HTML", tmp_path))
    saved.locator(".js-plotly-plot .main-svg").first.wait_for(state="attached", timeout=WAIT)
    held, made = drawn(saved), noted(code, out.parent)
    assert [one for one in shown if one not in held] == []
    assert made
    assert [one for one in made if one not in held] == []
    assert wrong == problems == []


def test_no_header_of_a_table_is_cut_in_either_theme(visit):
    page, wrong = visit("fairness", STATES["fairness"])
    wait_until_ready(page, wrong)
    page.locator(".tabulator-row").first.wait_for(timeout=WAIT)
    cut = "all => all.filter(one => one.scrollWidth > one.clientWidth).map(one => one.textContent.trim())"
    for _ in ("as it opens", "the other", "the first again"):
        page.wait_for_timeout(1000)
        titles = page.locator(".tabulator-col-title")
        assert titles.count() > 5
        assert [text for text in titles.evaluate_all(cut) if text] == []
        page.locator("#theme").click()
    assert wrong == []


def test_an_exported_classifier_answers_as_the_page_does(visit, brief, tmp_path):
    page, wrong = visit("classify", ClassifyState(names="red, blue, 007", pictures=OWN))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)  # the model's own size
    raw = io.BytesIO()
    Image.fromarray(pixels).save(raw, "PNG")
    page.locator("input[type=file]").set_input_files(
        [{"name": "mine.png", "mimeType": "image/png", "buffer": raw.getvalue()}]
    )
    said = page.get_by_text("adapted: ").first
    said.wait_for(timeout=WAIT)
    answer = said.inner_text().split("\nadapted: ")[1].split(" (")[0]
    page.get_by_text("Export as ONNX").click()
    page.get_by_text("Download the zip").wait_for(timeout=WAIT)
    with zipfile.ZipFile(downloaded(page, "Download the zip", tmp_path)) as files:
        assert files.testzip() is None
        files.extractall(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text("utf-8"))
    assert card["class_names"] == json.loads((tmp_path / "classes.json").read_text("utf-8"))
    assert card["class_names"] == ["red", "blue", "007"]
    assert card["model"] == "hyperclip_residual"
    session = onnxruntime.InferenceSession(tmp_path / "static.onnx", providers=["CPUExecutionProvider"])
    image = pixels.transpose(2, 0, 1)[None].astype(np.float32)
    [logits] = session.run(None, {"images": image})
    assert card["class_names"][int(logits.argmax())] == answer
    assert wrong == []


def test_a_pair_of_a_zoo_leads_to_its_connector(visit):
    page, wrong = visit("zoo", ZooState(model="ape"))
    page.get_by_text("Best pair: ").first.wait_for(timeout=WAIT)
    page.locator(".tabulator-row").last.click()
    page.get_by_text("Chosen pair: ").first.wait_for(timeout=WAIT)
    page.wait_for_function("location.search.length > 0")
    page.get_by_role("link", name="Look at this connector").click()
    wait_until_ready(page, wrong)
    chosen = unpack(page.url.split("view=")[1], WeightsState)
    assert (chosen.model, chosen.recipe) == ("search", "hyper_align_scenes_tiny")  # ape's are not kept
    # The figure is drawn by the browser, a moment after the page is ready.
    title = page.locator(".js-plotly-plot .main-svg").filter(has_text=f"{chosen.shown} ({chosen.slot})")
    title.first.wait_for(state="attached", timeout=WAIT)
    assert wrong == []

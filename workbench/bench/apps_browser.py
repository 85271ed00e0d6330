"""A changed condition on screen: from the Enter key in Chromium to the picture that begins to show it.

"Reference" is the bar. Browser and server share the machine. The sentences are the bundled ones repeated,
uploaded as one's own; the model pools tokens, the slowest kind. What is timed ends when the browser has drawn
the frame in which the map knows its new places; with few sentences these then move there for 0.4 s. Without
Chromium and Playwright nothing is measured, and a row says so.
"""

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import Any

import polars as pl

from workbench.bench.apps import MODEL, RECIPE, SIZES, p95, serving
from workbench.bench.timing import laid_out
from workbench.datasets.bundled import sentences
from workbench.runs import run_recipe
from workbench.view_state import ConditionsState, pack

CHANGES, WARM = 23, 3  # conditions typed one after another; not counted at the start
READING = 2_000  # milliseconds between them: what follows the map is over by then
LATEST = 120_000  # milliseconds that anything may take
ASKED = """condition => {
  const find = root => root.querySelector(".js-plotly-plot") ||
    [...root.querySelectorAll("*")].map(part => part.shadowRoot && find(part.shadowRoot)).find(Boolean)
  const figure = find(document)
  let asked = 0
  document.addEventListener("keydown", () => { asked = performance.now() }, {capture: true, once: true})
  window.onScreen = new Promise(done => {
    const drawn = () => requestAnimationFrame(() => setTimeout(() => done(performance.now() - asked), 0))
    const look = () => figure.layout.title.text.includes(condition) ? drawn() : setTimeout(look, 2)
    look()
  })
}"""


def rows(device: str) -> list[dict[str, Any]]:
    """Measure each size, with models that compute on a device."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return [laid_out("on screen: not measured, needs Chromium and Playwright", nan, nan, 0.0, 0.0)]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run_recipe(RECIPE, out=Path(folder))
        os.environ.update(WORKBENCH_OUT=folder, WORKBENCH_DEVICE=device)
        options = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        try:
            with serving() as address:
                return [_row(browser, address, size, bar) for size, bar in SIZES.items()]
        finally:
            browser.close()


def _row(browser: Any, address: str, size: int, bar: float) -> dict[str, Any]:
    with _page(browser, address, size) as page:
        seconds = [_change(page, f"The colour of thing number {number}.") for number in range(CHANGES)][WARM:]
    median = statistics.median(seconds)
    name = f"on screen in Chromium, {size:,} sentences, 95th percentile (median {median:.3f} s)"
    return laid_out(name, p95(seconds), bar, 0.0, 0.0)


@contextmanager
def _page(browser: Any, address: str, size: int) -> Iterator[Any]:
    """Open Conditions over sentences of one's own, and wait until they are shown."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(LATEST)
    state = ConditionsState(recipe=RECIPE, model=MODEL, condition="The size.", attribute="colour")
    page.goto(f"{address}/conditions?view={pack(state)}")
    page.get_by_text("Ready in").first.wait_for()
    bundled = sentences().rename({"sentence": "text"}, strict=False)
    table = pl.concat([bundled] * -(-size // bundled.height)).head(size)
    page.get_by_text("Your own sentences").click()
    file = {"name": "own.csv", "mimeType": "text/csv", "buffer": table.write_csv().encode()}
    page.locator("input[type=file]").set_input_files([file])
    page.get_by_text(f"{size:,} texts of your own").wait_for()
    page.get_by_text("Moving the sentences").wait_for(state="hidden")
    page.wait_for_timeout(READING)
    yield page
    page.close()


def _change(page: Any, condition: str) -> float:
    """Type a condition; return the seconds from Enter until the map shows it."""
    box = page.get_by_label("Condition", exact=True).first
    box.fill(condition)
    page.evaluate(ASKED, condition)
    box.press("Enter")
    seconds = page.evaluate("() => window.onScreen") / 1000
    page.wait_for_timeout(READING)
    return seconds

"""The HTML report as a browser sees it, from disk and without a network."""

import pytest

from tests.browsing import IN_A_BROWSER
from workbench.report import write_index, write_run_report
from workbench.runs import Run

pytestmark = IN_A_BROWSER


@pytest.fixture
def visit(browser):
    """Open a file; return the page, the addresses it asked for, and what its console and dialogs said."""
    pages = []

    def open_file(path):
        page = browser.new_page()
        pages.append(page)
        asked, said = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda line: said.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri(), wait_until="load")
        return page, asked, said

    yield open_file
    for page in pages:
        page.close()


def test_the_report_of_a_run_draws_its_figures_without_a_network(tiny_run, visit):
    page, asked, said = visit(write_run_report(tiny_run))
    page.wait_for_selector(".main-svg", state="attached", timeout=30_000)
    figures = page.locator(".js-plotly-plot")
    assert figures.count() >= 4
    assert page.locator(".main-svg").count() >= figures.count()
    assert "hadamard" in page.locator(".js-plotly-plot").first.inner_text()
    assert page.locator("tbody tr").count() >= len(tiny_run.recipe["models"])
    assert [address for address in asked if not address.startswith(("file://", "data:", "blob:"))] == []
    assert said == []


def test_the_index_leads_to_the_report_of_every_run(tiny_run, visit):
    page, asked, said = visit(write_index(tiny_run.folder.parent.parent))
    page.get_by_role("link", name=tiny_run.recipe["name"], exact=True).click()
    page.wait_for_selector(".main-svg", state="attached", timeout=30_000)
    assert page.title() == tiny_run.recipe["title"]
    assert all(address.startswith(("file://", "data:", "blob:")) for address in asked)
    assert said == []


def test_markup_in_texts_of_a_run_does_nothing(tiny_run, visit, tmp_path):
    hostile = "</script><script>alert(1)</script><img src=http://example.invalid/x onerror=alert(2)>"
    folder = tmp_path / "runs" / tiny_run.folder.name
    run = Run(folder)
    run.__dict__["recipe"] = {**tiny_run.recipe, "title": hostile}
    run.__dict__["provenance"] = tiny_run.provenance
    run.__dict__["cards"] = tiny_run.cards
    run.__dict__["metrics"] = tiny_run.metrics.with_columns(
        tiny_run.metrics["group"].str.replace("domain=animals", f"domain={hostile}", literal=True)
    )
    page, asked, said = visit(write_run_report(run))
    page.wait_for_selector(".main-svg", state="attached", timeout=30_000)
    assert page.title() == hostile
    assert page.locator("body img").count() == 0
    assert all(address.startswith(("file://", "data:", "blob:")) for address in asked)
    assert said == []

"""Save the README's picture: the first figure of a run's report, as Chromium draws it.

Usage: python tests/make_pictures.py reports/html/RUN.html reports/hyper_cl_bundled.png
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main(page_path: str, picture: str) -> None:
    """Open a report from disk and photograph its first figure."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": 1180, "height": 800})
        page.goto(Path(page_path).resolve().as_uri())
        page.wait_for_selector(".main-svg")
        page.locator(".plotly-graph-div").first.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])

"""Save a picture of every dashboard.

Usage: python -m tests.make_screenshots [--all] OUT FOLDER [NAME ...], where OUT holds finished runs. Writes
FOLDER/apps_NAME.png, the README's pictures; with --all instead the whole pages at a desk's and a phone's
width, light and dark: NAME_1280.png, NAME_1280_dark.png, NAME_390.png and NAME_390_dark.png.
"""

import argparse
import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from workbench.view_state import SimilarityState, WeightsState, pack
from workbench.views.serving import app_paths

SIZES = {1280: 800, 390: 844}
PICTURE = {"width": 1280, "height": 1120}
HEAVIEST = 150_000  # bytes of one of the README's pictures
PAIRS = """A red car stands in the yard.\tA red bicycle leans on the wall.
A small blue bird sings.\tA large red bird sings.
Two cheap rooms by the sea.\tTen expensive rooms by the sea.
A green frog sat on a leaf.\tA brown frog sat on a leaf.
The old train is yellow.\tThe new bus is yellow."""
STATES = {  # what the README's pictures show, where it is not the page as it opens
    "similarity": SimilarityState(pairs="own", own=PAIRS, condition="The colour.", chosen=1),
    "weights": WeightsState(condition="The number of animals.", measure="cosine"),
}
LONGEST = 300  # seconds that a page may take
# A page is ready when nothing is busy in it for a second and it shows something.
BUSY = """() => {
  const inside = part => part.shadowRoot ? deep(part.shadowRoot) : []
  const deep = root => [...root.querySelectorAll('*')].flatMap(part => [part, ...inside(part)])
  const all = deep(document)
  const drawn = part => part.getRootNode() !== document && part.matches('a, button') && part.checkVisibility()
  return !all.some(drawn) || all.some(part => part.classList.contains('busy'))
}"""


@contextmanager
def served(out: Path) -> Iterator[str]:
    """Serve an output folder on a free port while the block runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "workbench", "serve", "--out", str(out), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(LONGEST):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/favicon.ico", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def settle(page: Page) -> None:
    """Wait until a page has been quiet for three seconds."""
    quiet = 0
    for _ in range(LONGEST):
        page.wait_for_timeout(1000)
        quiet = 0 if page.evaluate(BUSY) else quiet + 1
        if quiet == 3:
            return
    raise SystemExit(f"{page.url} was still busy after {LONGEST} s")


def picture(browser: Browser, address: str, name: str) -> bytes:
    """Return the README's picture of a dashboard, with few enough colours to be light."""
    page = browser.new_page(viewport=PICTURE, color_scheme="light")
    view = f"?view={pack(STATES[name])}" if name in STATES else ""
    for _ in range(2):  # the second time models are open, as they are for whoever works with the page
        page.goto(f"{address}/{name}{view}", timeout=LONGEST * 1000)
        settle(page)
    if name == "similarity":
        page.get_by_role("button", name="Which words moved it?").click()
        page.get_by_text("Words of the second sentence").wait_for(timeout=LONGEST * 1000, state="attached")
        settle(page)
    full = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    page.close()
    for colours in (256, 128, 64, 32):
        file = io.BytesIO()
        full.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() < HEAVIEST:
            return file.getvalue()
    raise SystemExit(f"the picture of {name} takes {file.tell():,} bytes with 32 colours")


def faces(browser: Browser, address: str, name: str, folder: Path) -> None:
    """Save the whole page of a dashboard at both widths, light and dark."""
    for width, height in SIZES.items():
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        page.goto(f"{address}/{name}", timeout=LONGEST * 1000)
        settle(page)
        page.screenshot(path=folder / f"{name}_{width}.png", full_page=True)
        page.locator("#theme").click()
        page.wait_for_timeout(500)
        page.screenshot(path=folder / f"{name}_{width}_dark.png", full_page=True)
        page.close()


def main() -> None:
    """Photograph every dashboard, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--all", action="store_true", help="whole pages, two widths, light and dark")
    parser.add_argument("out", type=Path, help="output folder with finished runs")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("names", nargs="*", help="of dashboards; all if none is named")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    with served(asked.out) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-background-networking"]
        )
        for name in asked.names or app_paths():
            if asked.all:
                faces(browser, address, name, asked.folder)
            else:
                (asked.folder / f"apps_{name}.png").write_bytes(picture(browser, address, name))
        browser.close()


if __name__ == "__main__":
    main()

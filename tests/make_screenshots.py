"""Save a picture of every dashboard, at a desk's and a phone's width, light and dark.

Usage: python -m tests.make_screenshots OUT FOLDER [NAME ...], where OUT holds finished runs. Writes
FOLDER/NAME_1280.png, NAME_1280_dark.png, NAME_390.png and NAME_390_dark.png.
"""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from workbench.views.serving import app_paths

SIZES = {1280: 800, 390: 844}
LONGEST = 300  # seconds that a page may take
# A page is ready when nothing is busy in it for a second and it shows something.
BUSY = """() => {
  const inside = part => part.shadowRoot ? deep(part.shadowRoot) : []
  const deep = root => [...root.querySelectorAll('*')].flatMap(part => [part, ...inside(part)])
  const all = deep(document)
  const drawn = part => part.getRootNode() !== document && part.matches('pre, p, button')
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


def main(out: str, folder: str, *names: str) -> None:
    """Photograph every dashboard, or those that are named."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with served(Path(out)) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-background-networking"]
        )
        for name in names or app_paths():
            for width, height in SIZES.items():
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme="light"
                )
                page = context.new_page()
                page.goto(f"{address}/{name}", timeout=LONGEST * 1000)
                settle(page)
                page.screenshot(path=f"{folder}/{name}_{width}.png", full_page=True)
                page.locator("#theme").click()
                page.wait_for_timeout(500)
                page.screenshot(path=f"{folder}/{name}_{width}_dark.png", full_page=True)
                context.close()
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

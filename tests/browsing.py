"""What all page tests share: the marks, a browser, a server on a free port."""

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import panel as pn
import pytest

CHROMIUM = shutil.which("chromium")
WAIT = 120_000  # milliseconds at most: a slow machine reads what a page needs from a cold disk first
_SAID = """() => {  // all texts of a page, those of shadow roots too
  const unread = ["STYLE", "SCRIPT"]
  const one = part => part.nodeType == 3 ? part.textContent.trim()
    : unread.includes(part.tagName) ? "" : said(part.shadowRoot || part)
  const said = root => [...root.childNodes].map(one).filter(Boolean).join(" | ")
  return said(document.body).slice(0, 3000)
}"""
IN_A_BROWSER = [
    pytest.mark.app,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@contextmanager
def chromium() -> Iterator:
    """Start the system's Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-background-networking"]
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield started
        started.close()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until_ready(page, wrong: list[str]) -> None:
    """Wait until a page says that it shows its numbers; if it never does, fail with all that it says."""
    from playwright.sync_api import TimeoutError as Late

    try:
        page.get_by_text("Ready in").first.wait_for(timeout=WAIT)
    except Late:
        pytest.fail(f"never ready; the page says {page.evaluate(_SAID)!r}, the browser {wrong}")


def wait_for_other_text(part, before: str) -> None:
    """Wait until a part of a page says something else than before."""
    from playwright.sync_api import expect

    expect(part).not_to_have_text(before, use_inner_text=True, timeout=WAIT)


@contextmanager
def served(pages: dict, port: int, **options) -> Iterator[None]:
    """Serve pages from a thread until the tests are done."""
    server = pn.serve(pages, port=port, threaded=True, show=False, **options)
    for _ in range(300):  # the thread needs a moment to listen
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    try:
        yield
    finally:
        server.stop()

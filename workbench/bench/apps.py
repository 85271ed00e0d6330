"""The dashboards: how soon a changed condition is ready, many people at once, and memory after they leave.

"Reference" is the bar: seconds that may pass in the 95th percentile, and memory that a closed page may keep.
What is timed is the server's part, from a new condition to a figure and a table ready to be sent, with a
model that pools tokens, the slowest kind; how far neighbours and clusters agree with an attribute is worked
out afterwards, as on the page, beside what others ask. Sentences are the bundled ones repeated: each is
encoded once, and every copy is moved. :mod:`workbench.bench.apps_browser` times the same on screen.
"""

import gc
import os
import socket
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from workbench.bench.timing import laid_out
from workbench.datasets.bundled import sentences
from workbench.moved import ConditionedTexts
from workbench.runs import run_recipe
from workbench.session import Session
from workbench.view_state import ConditionsState
from workbench.views.conditions import ConditionsView, Shown
from workbench.views.live import POOL, TURNS, Job, one_blas_thread

RECIPE, MODEL = "hyper_cl_bundled_tiny", "hyper_query_k16"
SIZES = {2_000: 0.3, 20_000: 1.0}  # sentences -> bar in seconds
CHANGES, WARMING = 40, 3  # conditions typed one after another; not counted at the start
PEOPLE, PEOPLE_BAR = 20, 2.0
READING = 5.0  # seconds that a person looks at what has changed before typing again
TOGETHER = ((320, 0.0), (2_000, 0.0), (2_000, READING))  # sentences, of the page at first and many; pause
EACH = 5  # conditions that each of them types
PAGES, WARM, PAGE_BAR = 200, 40, 50.0  # opened and closed; not counted at the start; kB a page
PAGE_SECONDS = 1.0  # a page is opened this often, so that what is kept shows and not what waits to be cleared


def rows(device: str) -> list[dict[str, Any]]:
    """Measure latency and memory, with models that compute on a device."""
    one_blas_thread()  # as every page does
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        run_recipe(RECIPE, out=out)
        session, typed = Session(out, device), (f"The colour of thing number {number}." for number in count())
        found = [
            *(_alone(session, size, bar, typed) for size, bar in SIZES.items()),
            *(_together(session, size, pause, typed) for size, pause in TOGETHER),
            _soak(out, device),
        ]
        gc.collect()
        return found


def _view(session: Session, size: int) -> ConditionsView:
    """Open the view over bundled sentences, repeated up to a number."""
    bundled = sentences()
    repeated = pl.concat([bundled] * -(-size // bundled.height)).head(size)
    view = ConditionsView(session, ConditionsState(model=MODEL, attribute="colour"))
    model = session.texts_of("", MODEL).model
    view.look_at(ConditionedTexts(model, repeated))
    return view


def _change(view: ConditionsView, condition: str) -> Shown:
    """Do what follows a typed condition until map and table are ready to be sent."""
    shown = view.compute(view.state().model_copy(update={"condition": condition}))
    view.figure(shown).to_json()
    view.table.show(view.rows(shown))
    return shown


def _timed(view: ConditionsView, condition: str) -> tuple[float, Shown]:
    """Type a condition; return the seconds until it is ready, and what is shown."""
    began = time.perf_counter()
    shown = TURNS.submit(partial(_change, view, condition)).result()
    return time.perf_counter() - began, shown


def _agreement(view: ConditionsView, shown: Shown, job: Job) -> None:
    """Do what follows once the map is there, unless nobody waits for it any more."""
    if not job.stopped:
        view.agreement(shown, job)


def p95(seconds: list[float]) -> float:
    """Return the 95th percentile."""
    return statistics.quantiles(seconds, n=20, method="inclusive")[-1]


def _alone(session: Session, size: int, bar: float, typed: Iterator[str]) -> dict[str, Any]:
    """Time one person's changes."""
    view, seconds = _view(session, size), []
    for condition in islice(typed, WARMING + CHANGES):
        taken, shown = _timed(view, condition)
        seconds.append(taken)
        POOL.submit(view.agreement, shown).result()
    seconds = seconds[WARMING:]
    median = statistics.median(seconds)
    name = f"changed condition, {size:,} sentences, 95th percentile (median {median:.3f} s)"
    return laid_out(name, p95(seconds), bar, 0.0, 0.0)


def _together(session: Session, size: int, pause: float, typed: Iterator[str]) -> dict[str, Any]:
    """Time people who type at once, each the next condition a while after the last is there.

    People who pause begin one after the other within the first pause.
    """
    views = [_view(session, size) for _ in range(PEOPLE)]
    asked = {view: [next(typed) for _ in range(EACH)] for view in views}
    seconds: list[float] = []

    def person(number: int, view: ConditionsView) -> None:
        time.sleep(pause * number / PEOPLE)
        last = Job(str)
        for condition in asked[view]:
            taken, shown = _timed(view, condition)
            seconds.append(taken)
            last.stop()  # as a page drops what follows an older condition
            last = Job(str)
            TURNS.submit(partial(_agreement, view, shown, last), patient=True)
            time.sleep(pause)

    people = [threading.Thread(target=person, args=one) for one in enumerate(views)]
    for one in people:
        one.start()
    for one in people:
        one.join()
    how = f"who read for {pause:g} s" if pause else "without a pause"
    name = f"{PEOPLE} people {how}, {size:,} sentences each, 95th percentile"
    return laid_out(name, p95(seconds), PEOPLE_BAR, 0.0, 0.0)


@contextmanager
def serving(**options: int) -> Iterator[str]:
    """Serve the dashboards from a thread; give their address."""
    import panel as pn

    from workbench.views.serving import UPLOAD_MIB, app_paths

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = pn.serve(
        app_paths(), port=port, address="127.0.0.1", threaded=True, show=False,
        websocket_max_message_size=UPLOAD_MIB * 2**20, **options,
    )  # fmt: skip
    try:
        _open(f"http://127.0.0.1:{port}/index")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()


def _soak(out: Path, device: str) -> dict[str, Any]:
    """Open and leave pages of a real server; return the slope of its memory."""
    import psutil

    os.environ.update(WORKBENCH_OUT=str(out), WORKBENCH_DEVICE=device)
    process, memory = psutil.Process(), []
    brief = {"unused_session_lifetime_milliseconds": 500, "check_unused_sessions_milliseconds": 250}
    with serving(**brief) as address:
        began = time.perf_counter()
        for page in range(PAGES):
            due = began + page * PAGE_SECONDS
            _open(f"{address}/conditions")
            gc.collect()
            memory.append(process.memory_info().rss / 1000)
            time.sleep(max(0.0, due + PAGE_SECONDS - time.perf_counter()))
    slope = float(np.polyfit(np.arange(PAGES - WARM), memory[WARM:], 1)[0])
    taken = (time.perf_counter() - began) / PAGES
    name = f"{PAGES} pages opened and left: {slope:+.1f} kB a page (bar {PAGE_BAR:.0f})"
    return {
        **laid_out(name, taken, taken, slope / 1024, PAGE_BAR / 1024),
        "ratio": PAGE_BAR / max(slope, 1e-9),
    }


def _open(url: str) -> None:
    """Ask for a page until the server listens."""
    for _ in range(300):
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                answer.read()
            return
        except ConnectionError:
            time.sleep(0.1)
        except urllib.error.URLError as problem:
            if not isinstance(problem.reason, ConnectionError):
                raise
            time.sleep(0.1)

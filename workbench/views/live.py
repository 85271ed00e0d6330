"""Work off the event loop: the newest request wins, stale results are dropped, long work can be cancelled.

A view uses it in five lines:

1. ``self.live = Live(self._work, self._draw)`` in ``__init__``, one for each part that changes by itself.
2. ``_work(request, job)`` runs in a thread: it computes from the request alone, touches no widget, and
   between steps of long work asks ``job.stopped`` and says ``job.say("300 of 2,000 sentences")``.
3. ``_draw(result)`` runs back under the page's lock and sets panes. It may return a function that sets those
   that people look at later.
4. ``self.live.ask(self.state())`` in a method with ``@param.depends(..., watch=True)``, and at the start.
5. ``self.live`` stands in the layout: it shows that work goes on, a button that cancels it, and errors.

Without a server (a notebook, a test) ``ask`` works and draws before it returns. Threads are shared by all
sessions, since the machine is; requests, jobs and results belong to the view that asked.
"""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import import_module
from threading import Event, Lock
from typing import Any

import panel as pn
import torch
from threadpoolctl import threadpool_limits
from tornado.ioloop import IOLoop

from workbench.errors import WorkbenchError
from workbench.views.text import Text
from workbench.views.unsent import sent_together

_log = logging.getLogger(__name__)


# One thread a request: requests that share cores would wait for each other's threads, and waiting ones spin.
POOL = ThreadPoolExecutor(
    max(2, os.cpu_count() or 1), "dashboard", initializer=torch.set_num_threads, initargs=(1,)
)


_ON_ITS_WAY = 0.03  # seconds until the first part of a result has been sent


class Turns:
    """Whose turn it is in the pool: patient work lets all other requests go first."""

    def __init__(self) -> None:
        """Begin with nobody waiting."""
        self._waiting, self._lock = 0, Lock()

    def submit(self, work: Callable[[], Any], *, patient: bool = False) -> Any:
        """Have work done in a thread, in the order of submission unless it is patient; return its future."""
        if patient:
            return POOL.submit(self._patient, work)
        with self._lock:
            self._waiting += 1
        return POOL.submit(self._first, work)

    def _first(self, work: Callable[[], Any]) -> Any:
        with self._lock:
            self._waiting -= 1
        return work()

    def _patient(self, work: Callable[[], Any]) -> None:
        if self._waiting:
            POOL.submit(self._patient, work)  # behind those that wait
        else:
            work()


TURNS = Turns()


@cache
def one_blas_thread() -> None:
    """Have NumPy compute on one thread a request, too, in this process from now on: a server only answers.

    Called before any request's thread runs: it walks the loaded libraries, which may wait for ever for a
    thread that loads one.
    """
    import_module("scipy.linalg")  # it brings a BLAS of its own, which is limited only once it is there
    threadpool_limits(1, "blas")


class Stopped(WorkbenchError):
    """Work that nobody waits for any more."""


class Job:
    """One request on its way."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """Start as neither stopped nor done.

        Args:
            tell: shows how far the work is.
        """
        self._stop, self._tell = Event(), tell

    @property
    def stopped(self) -> bool:
        """Whether a newer request, a person or a closed page has made this one useless."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Ask the work to end; its result is dropped in any case."""
        self._stop.set()

    def told(self, total: int) -> Callable[[int], None]:
        """Return what a long loop calls with its count: it shows it, and ends a loop that nobody waits for.

        Args:
            total: of what is counted.
        """

        def count(done: int) -> None:
            if self.stopped:
                raise Stopped("cancelled")
            self.say(f"{done:,} of {total:,}")

        return count

    def say(self, text: str) -> None:
        """Show how far the work is."""
        if not self.stopped:
            self._tell(text)


class Live(pn.viewable.Viewer):
    """A line that says what goes on, and the work behind it."""

    def __init__(
        self,
        work: Callable[[Any, Job], Any],
        draw: Callable[[Any], Callable[[], None] | None],
        doing: str = "Working",
        *,
        patient: bool = False,
    ) -> None:
        """Build the line.

        Args:
            work: from a request to a result, in a thread.
            draw: shows a result; returns nothing, or what shows the rest once this part is on its way.
            doing: what is said meanwhile.
            patient: whether the work lets all other requests go first.
        """
        super().__init__()
        self._work, self._draw, self._doing, self._patient = work, draw, doing, patient
        self._job = Job(self._tell)
        self._document: Any = None
        self._loop: Any = None
        self._gone = False  # whether the page was closed
        self._line = Text("", css_classes=["live"], sizing_mode="stretch_width")
        self._cancel = pn.widgets.Button(label="Cancel", variant="outline", width=80, visible=False)
        self._cancel.on_click(lambda _: self.cancel())

    def ask(self, request: Any) -> "Live":
        """Start work on a request; what was asked before is dropped."""
        self._job.stop()
        self._job = job = Job(self._tell)
        document = pn.state.curdoc
        if document is None or document.session_context is None:
            self._finish(job, *_outcome(self._work, request, job))
            return self
        if self._document is not document:  # a page that closes stops its work
            self._document, self._loop = document, IOLoop.current()
            document.on_session_destroyed(self._closed)
        self._say(f"{self._doing} …", busy=True)
        TURNS.submit(partial(self._run, request, job, document), patient=self._patient)
        return self

    def cancel(self) -> None:
        """Drop what is under way; what was shown before stays."""
        self._job.stop()
        self._say("Cancelled; what is shown is from before.")

    def clear(self) -> None:
        """Drop what is under way and say nothing: what it was about is shown no more."""
        self._job.stop()
        self._say("")

    def _closed(self, _: Any) -> None:
        self._gone = True
        self._job.stop()

    def _run(self, request: Any, job: Job, document: Any) -> None:
        """Work in a thread, unless the request is stale already."""
        if not job.stopped:
            try:
                outcome = _outcome(self._work, request, job)
            except Exception as problem:  # else the page would wait for ever
                outcome = None, _unforeseen(problem), 0.0
            self._later(job, document, partial(self._finish, job, *outcome))

    def _finish(self, job: Job, result: Any, problem: str, seconds: float) -> None:
        """Show a result or its error, if nothing newer was asked meanwhile."""
        if job is not self._job or job.stopped:
            return
        rest = None
        with sent_together(self._document):
            if not problem:
                rest, problem = _drawn(partial(self._draw, result))
            if rest is None:
                self._say_outcome(problem, seconds)
        if rest is not None and self._document is None:
            self._complete(job, rest, seconds)
        elif rest is not None:
            document, show = self._document, partial(self._complete, job, rest, seconds)

            def add() -> None:
                if not self._gone:
                    document.add_next_tick_callback(show)

            self._loop.call_later(_ON_ITS_WAY, add)

    def _complete(self, job: Job, rest: Callable[[], Any], seconds: float) -> None:
        """Show the rest of a result, whatever is asked meanwhile: parts of two results would not fit."""
        with sent_together(self._document):
            _, problem = _drawn(rest)
            if job is self._job and not job.stopped:
                self._say_outcome(problem, seconds)

    def _say_outcome(self, problem: str, seconds: float) -> None:
        self._say(problem or f"Ready in {seconds:.2f} s.", bad=bool(problem))

    def _later(self, job: Job, document: Any, callback: Callable[[], None]) -> None:
        """Have the page's own thread do something next, from any thread.

        The document is touched by the loop alone: what another thread adds while Panel holds back a page's
        changes is lost every now and then, and with it the answer.
        """

        def add() -> None:
            if not job.stopped:
                document.add_next_tick_callback(callback)

        self._loop.add_callback(add)

    def _tell(self, text: str) -> None:
        if self._document is not None:
            say = partial(self._say, f"{self._doing}: {text}", busy=True)
            self._later(self._job, self._document, say)

    def _say(self, text: str, *, busy: bool = False, bad: bool = False) -> None:
        self._line.param.update(object=text, css_classes=["live", *["busy"] * busy, *["bad"] * bad])
        self._cancel.visible = busy

    @property
    def said(self) -> str:
        """What the line says."""
        return self._line.object

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out the line with its button; its height is kept, so that nothing below jumps."""
        return pn.Row(self._line, self._cancel, sizing_mode="stretch_width", min_height=40)


def _unforeseen(problem: Exception) -> str:
    """Log a failure that is ours, from where it is caught, and say it in a sentence."""
    _log.exception("a dashboard's work failed")
    return f"This failed with {type(problem).__name__}; the server's log says more."


def _drawn(draw: Callable[[], Any]) -> tuple[Any, str]:
    """Draw; return what is to be drawn afterwards, and what is wrong in one sentence."""
    try:
        return draw(), ""
    except WorkbenchError as found:
        return None, str(found)
    except Exception as found:  # else the page would say for ever that it works
        return None, _unforeseen(found)


def _outcome(work: Callable[[Any, Job], Any], request: Any, job: Job) -> tuple[Any, str, float]:
    """Return a result, or what is wrong in one sentence, and the seconds it took."""
    began = time.perf_counter()
    try:
        return work(request, job), "", time.perf_counter() - began
    except WorkbenchError as problem:
        return None, str(problem), time.perf_counter() - began

"""Work off the event loop: the newest request wins, and what nobody waits for is dropped."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch
from bokeh.document import Document
from tornado.ioloop import IOLoop

from workbench.errors import DataError
from workbench.views import live
from workbench.views.live import Job, Live, Stopped, Turns


class Page(Document):
    """Stands for the document of an open page: what is due next waits until it is asked for."""

    session_context = SimpleNamespace(request=SimpleNamespace(arguments={}))

    def __init__(self):
        super().__init__()
        self.due, self.closed = [], []

    def add_next_tick_callback(self, callback):
        self.due.append(callback)

    def on_session_destroyed(self, callback):
        self.closed.append(callback)

    def tick(self):
        due, self.due = self.due, []
        for callback in due:
            callback()


class Pool:
    """Stands for the threads: work waits until it is told to run."""

    def __init__(self):
        self.waiting = []

    def submit(self, function, *given):
        self.waiting.append((function, given))

    def work(self, place=0):
        function, given = self.waiting.pop(place)
        function(*given)


class AtOnce:
    """Stands for the server's loop: it does what it is told."""

    @staticmethod
    def current():
        return AtOnce()

    def add_callback(self, callback):
        callback()

    def call_later(self, seconds, callback):
        callback()


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """A server that another test ran in this process may have left its page behind."""
    monkeypatch.setattr(type(live.pn.state), "curdoc", None)
    monkeypatch.setattr(live, "IOLoop", AtOnce)


@pytest.fixture
def page(monkeypatch, no_page):
    page = Page()
    monkeypatch.setattr(type(live.pn.state), "curdoc", page)
    return page


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(live, "POOL", Pool())
    monkeypatch.setattr(live, "TURNS", Turns())  # what waits for this pool is nobody else's
    return live.POOL


def test_without_a_page_a_request_is_answered_at_once():
    drawn = []
    Live(lambda request, job: request * 2, drawn.append).ask(21)
    assert drawn == [42]


def test_an_error_is_said_and_what_was_shown_stays():
    def work(request, job):
        raise DataError(f"{request} is no condition")

    drawn = []
    line = Live(work, drawn.append).ask("<b>")
    assert line.said == "<b> is no condition"
    assert drawn == []


def test_a_stale_request_is_not_even_started(page, pool):
    worked, drawn = [], []
    line = Live(lambda request, job: worked.append(request) or request, drawn.append)
    line.ask("old")
    line.ask("new")
    pool.work()
    pool.work()
    page.tick()
    assert worked == drawn == ["new"]


def test_a_result_that_comes_late_is_dropped(page, pool):
    drawn = []
    line = Live(lambda request, job: request, drawn.append)
    line.ask("old")
    pool.work()  # the old result is ready, but not drawn yet
    line.ask("new")
    page.tick()
    assert drawn == []
    pool.work()
    page.tick()
    assert drawn == ["new"]


def test_patient_work_lets_all_that_wait_go_first(page, pool):
    done = []
    views = [
        Live(lambda request, _: done.append(request), lambda _: None, patient=patient)
        for patient in (False, True, False)
    ]
    for name, one in zip(("first", "patient", "second"), views, strict=True):
        one.ask(name)
    pool.work()
    assert done == ["first"]
    pool.work()  # its turn comes, and another waits
    assert done == ["first"]
    pool.work()
    pool.work()
    assert done == ["first", "second", "patient"]
    assert pool.waiting == []


def test_the_rest_of_a_result_comes_next_and_even_if_something_newer_is_asked(page, pool):
    done = []
    one = Live(
        lambda request, _: request, lambda result: done.append(result) or (lambda: done.append("rest"))
    )
    one.ask("a")
    pool.work()
    page.tick()
    assert (done, one.said) == (["a"], "Working …")
    one.ask("b")
    page.tick()
    assert (done, one.said) == (["a", "rest"], "Working …")  # b is under way
    pool.work()
    page.tick()
    page.tick()
    assert done == ["a", "rest", "b", "rest"]
    assert one.said.startswith("Ready in")


def test_a_rest_that_fails_is_said(page, pool):
    def fail():
        raise DataError("no table")

    one = Live(lambda request, _: request, lambda result: fail)
    one.ask("a")
    pool.work()
    page.tick()
    page.tick()
    assert one.said == "no table"


def test_cancelled_work_learns_of_it_and_draws_nothing(page, pool):
    seen, drawn = [], []

    def work(request, job):
        line.cancel()
        seen.append(job.stopped)
        return request

    line = Live(work, drawn.append)
    line.ask(1)
    pool.work()
    page.tick()
    assert (seen, drawn) == ([True], [])
    assert "Cancelled" in line.said


def test_a_page_that_closes_stops_its_work(page, pool):
    worked = []
    Live(lambda request, job: worked.append(request), print).ask(1)
    for callback in page.closed:
        callback(None)
    pool.work()
    assert worked == []


def test_long_work_says_how_far_it_is_and_ends_when_nobody_waits(page, pool):
    said, job = [], None

    def work(request, own):
        nonlocal job
        job = own
        own.told(2000)(640)

    line = Live(work, print, "Encoding")
    line.ask(None)
    pool.work()
    page.due[0]()
    said.append(line.said)
    assert said == ["Encoding: 640 of 2,000"]
    job.stop()
    with pytest.raises(Stopped):
        job.told(2000)(704)


def test_real_threads_answer_the_newest_request_last():
    """Fifty requests over the shared threads: whatever order they end in, the last one stays."""
    ready = threading.Event()

    def work(request, job):
        ready.wait(5)
        return request

    page, drawn = Page(), []
    line = Live(work, drawn.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(live.pn.state), "curdoc", page)
        for request in range(50):
            line.ask(request)
        ready.set()
        live.POOL.submit(int).result()
        while not drawn:
            page.tick()
    assert drawn == [49]


def test_only_the_servers_own_thread_touches_a_page(page, monkeypatch):
    """What a second thread adds while Panel holds a page's changes back can get lost."""
    monkeypatch.setattr(live, "IOLoop", IOLoop)
    working, adding, drawn = [], [], []

    def work(request, job):
        working.append(threading.get_ident())
        job.say("half of it")
        return request

    def add(callback):
        adding.append(threading.get_ident())
        page.due.append(callback)

    async def visit():
        page.add_next_tick_callback = add
        Live(work, drawn.append).ask("new")
        while not drawn:
            await asyncio.sleep(0.01)
            page.tick()

    asyncio.run(asyncio.wait_for(visit(), 30))
    assert drawn == ["new"]
    assert adding == [threading.get_ident()] * 2
    assert working != adding[:1]


def test_a_job_is_not_stopped_by_another_ones_stop():
    one, two = Job(print), Job(print)
    one.stop()
    assert (one.stopped, two.stopped) == (True, False)


def test_requests_compute_on_one_thread_each(monkeypatch):
    assert {live.POOL.submit(torch.get_num_threads).result() for _ in range(4)} == {1}
    limits = []
    monkeypatch.setattr(live, "threadpool_limits", lambda *asked: limits.append(asked))
    live.one_blas_thread.cache_clear()
    live.one_blas_thread()
    live.one_blas_thread()
    assert limits == [(1, "blas")]

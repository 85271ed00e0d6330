"""What changes while a slow browser draws, or Panel writes to it, is sent; both faults, and both mends."""

import asyncio
from types import SimpleNamespace

import pytest
from bokeh.document import Document
from bokeh.models import Div
from panel.io import document as writing

from workbench.views.unsent import drop_nothing, send_what_waits

OWN = getattr(writing._dispatch_msgs, "__wrapped__", writing._dispatch_msgs)  # a page may have mended it


class Connection:
    """To a browser that takes nothing until it is told to."""

    def __init__(self):
        self._socket, self.protocol = object(), self
        self.written, self.open = [], []

    @staticmethod
    def create(kind, events):
        return events[0]

    def write(self, msg):
        self.written.append(msg)
        self.open.append(asyncio.get_running_loop().create_future())
        return self.open[-1:]


@pytest.fixture
def slow(monkeypatch):
    """A connection whose writes stay open, with Panel's own way to write."""
    monkeypatch.setattr(writing, "_dispatch_msgs", OWN)
    monkeypatch.setattr(writing, "dispatch_django", Connection.write)  # for sockets it does not know
    return Connection()


async def two_changes(connection):
    """Change a page, and once more in the turn of the loop in which the first write ends."""
    document = Document()
    writing.schedule_write_events(document, [connection], ["first"])
    while not connection.open:
        await asyncio.sleep(0)
    connection.open.pop().set_result(None)
    writing.schedule_write_events(document, [connection], ["second"])
    for _ in range(20):
        await asyncio.sleep(0)
        if connection.open:
            connection.open.pop().set_result(None)
    return document


def test_panel_itself_leaves_a_change_unsent(slow):
    asyncio.run(two_changes(slow))
    assert slow.written == ["first"], "Panel sends both now: remove workbench/views/unsent.py and this file"


def test_a_change_that_comes_while_another_is_written_is_sent_too(slow):
    send_what_waits()
    mended = writing._dispatch_msgs
    send_what_waits()
    assert writing._dispatch_msgs is mended  # once is enough
    document = asyncio.run(two_changes(slow))
    assert slow.written == ["first", "second"]
    assert document not in writing._WRITE_MSGS
    assert document not in writing._WRITE_BLOCK


@pytest.mark.parametrize("connected", [False, True])
def test_changes_before_a_browser_has_drawn_the_page_are_dropped_unless_it_is_connected(connected):
    document, model, sent = Document(), Div(text="before"), []
    document.add_root(model)
    session = SimpleNamespace(_subscribed_connections={object()} if connected else set())
    document._session_context = lambda: SimpleNamespace(session=session)
    document.on_change(sent.append)
    drop_nothing(document)
    with writing.hold(document):
        model.text = "after"
    assert bool(sent) == connected  # nothing at all if not: the fault of Panel

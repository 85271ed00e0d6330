"""Mends two faults of Panel 1.9: changes of a page that never reached a slow browser.

Until a browser says that it has drawn a page, Panel drops what changes in a ``hold``, its layouts' own
included, as if the page were still to be sent whole (``panel/io/document.py``, ``hold``). A slow browser
has the page by then, and waits for ever: :func:`drop_nothing`.

Panel also marks a document while it writes to a slow browser, and what changes meanwhile waits in a queue.
When the write ends, it takes its mark away without looking into the queue again (``panel/io/document.py``,
``_dispatch_msgs``); the task that was to send the queue finds no mark and gives up. A page that draws much
at once then stays at "Working" for ever: :func:`send_what_waits`. ``tests/test_unsent.py`` shows both
faults in the installed Panel, and fails when they are gone; then this file can go.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps

from bokeh.document import Document
from panel.io import document as writing
from panel.io import hold, state


def drop_nothing(document: Document | None) -> None:
    """Have what changes on a page sent from now on, if a browser is connected; else it gets the whole."""
    session = getattr(getattr(document, "session_context", None), "session", None)
    if session is not None and session._subscribed_connections:
        state._connected[document] = True


@contextmanager
def sent_together(document: Document | None) -> Iterator[None]:
    """Collect what changes on a page and send it at once, dropping nothing."""
    drop_nothing(document)
    with hold():
        yield


def send_what_waits() -> None:
    """Have Panel look into its queue again after each write, in this process; once is enough."""
    own = writing._dispatch_msgs
    if hasattr(own, "looks_again"):
        return

    @wraps(own)
    async def dispatch(document: Document) -> None:
        await own(document)
        if document in writing._WRITE_MSGS and document not in writing._WRITE_BLOCK:
            writing._WRITE_BLOCK[document] = True
            writing._dispatch_write_task(document, dispatch, document)

    dispatch.looks_again = True
    writing._dispatch_msgs = dispatch

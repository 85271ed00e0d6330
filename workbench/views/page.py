"""What every dashboard has: an error banner, a link to its state, a saved page, its code, and a footer."""

import io
import os
from collections.abc import Callable
from typing import Any

import panel as pn

from workbench.config import Settings
from workbench.errors import WorkbenchError
from workbench.runs import Run
from workbench.session import Session
from workbench.view_state import pack, unpack

_STYLE = {"color": "#8a2b00", "border-left": "4px solid #D55E00", "padding": "6px 10px"}


def banner(text: str) -> pn.pane.Str:
    """Show an error as plain text: it quotes what people typed, and text is shown, never run."""
    return pn.pane.Str(text, styles=_STYLE, sizing_mode="stretch_width")


def shown(draw: Callable[[], Any]) -> Any:
    """Return what a function draws, or a banner that says what is wrong."""
    try:
        return draw()
    except WorkbenchError as problem:
        return banner(str(problem))


def state_of_link(kind: type[Settings]) -> tuple[Settings, str]:
    """Read the view's state from the page's address.

    Returns:
        The state, and what is wrong with the link: empty if nothing is.
    """
    given = (pn.state.session_args or {}).get("view", [b""])[0].decode("ascii", "replace")
    try:
        return unpack(given, kind), ""
    except WorkbenchError as problem:
        return kind(), str(problem)


def beside(left: pn.viewable.Viewable, right: pn.viewable.Viewable) -> pn.FlexBox:
    """Put controls beside what they control; on a narrow screen above it."""
    left.styles, right.styles = {"flex": "0 1 330px"}, {"flex": "1 1 560px", "min-width": "300px"}
    return pn.FlexBox(left, right, flex_wrap="wrap", align_items="flex-start", sizing_mode="stretch_width")


def keep_link(state: Settings) -> None:
    """Write the state into the page's address."""
    if pn.state.location is not None:
        pn.state.location.search = f"?view={pack(state)}"


def copy_button() -> pn.widgets.Button:
    """A button that copies the page's address."""
    button = pn.widgets.Button(label="Copy link", variant="outline", width=120)
    button.js_on_click(code="navigator.clipboard.writeText(window.location.href)")
    return button


def save_button(name: str, content: Callable[[], pn.viewable.Viewable]) -> pn.widgets.FileDownload:
    """A button that saves what is shown as one HTML file that opens offline."""

    def written() -> io.StringIO:
        from bokeh.resources import INLINE

        page = io.StringIO()
        content().save(page, resources=INLINE, embed=False, title=name)
        page.seek(0)
        return page

    return pn.widgets.FileDownload(
        callback=written, filename=f"{name}.html", label="Save as HTML", variant="outline", width=150
    )


def code_of(lines: list[str]) -> pn.Accordion:
    """Show the notebook code that makes the same figure."""
    return pn.Accordion(("Notebook code", pn.pane.Str("\n".join(lines), styles={"font-family": "monospace"})))


def footer(run: Run) -> pn.pane.Str:
    """Say where the numbers come from."""
    made = run.provenance
    parts = (
        f"run {run.folder.name}", f"recipe {run.recipe['name']}", f"commit {made['commit'][:12]}",
        f"data {made['data_sha256'][:12]}", f"device {made['device']}", f"seeds {made['seeds']}",
    )  # fmt: skip
    return pn.pane.Str(" · ".join(parts), styles={"color": "#666", "font-size": "12px"})


def open_view(
    title: str, view: Callable[[Session, Any, str], pn.viewable.Viewer], kind: type[Settings]
) -> None:
    """Make a page of a view, in the state of its link, over the runs of the served folder.

    Args:
        title: of the page.
        view: its class.
        kind: of its state.
    """
    pn.extension("plotly", throttled=True)
    state, problem = state_of_link(kind)
    session = Session(os.environ.get("WORKBENCH_OUT", "reports"))
    body = shown(lambda: view(session, state, problem))
    pn.Column(f"# {title}", body, sizing_mode="stretch_width", margin=(0, 20)).servable(title=title)

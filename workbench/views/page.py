"""What every dashboard has: header, error banner, link to its state, saved page, code and footer."""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import panel as pn
from panel.io.resources import LOCAL_DIST

from workbench.config import Settings
from workbench.errors import WorkbenchError
from workbench.runs import Run
from workbench.session import Session, shared_session
from workbench.view_state import pack, unpack
from workbench.views.live import Live, one_blas_thread
from workbench.views.saved import saved_page
from workbench.views.serving import app_about, app_paths
from workbench.views.text import Text
from workbench.views.unsent import drop_nothing, send_what_waits

MARGIN = (5, 25, 5, 5)  # of what folds, so that it stands below the controls, which are 300 wide: pixels
_BAD = {
    "color": "var(--bad, #8a2b00)",
    "background": "var(--bad-paper, #fdf1ea)",
    "border-left": "4px solid #D55E00",
    "padding": "6px 10px",
}
_MUTED = {"color": "var(--muted, #566270)", "font-size": "13px"}
_START = '<p>The <a href="index">first page</a> trains models and lists what there is.</p>'
_COPY = """
const link = window.location.href
if (navigator.clipboard) {
  navigator.clipboard.writeText(link).then(() => {
    button.label = "Copied"
    setTimeout(() => { button.label = "Copy link" }, 1500)
  })
} else {
  window.prompt("This page's link", link)
}
"""


def banner(text: str) -> Text:
    """Show an error as plain text: it quotes what people typed, and text is shown, never run."""
    return Text(text, styles=_BAD, sizing_mode="stretch_width")


def note(text: str) -> Text:
    """Show a remark as plain text: an empty state, a count, a hint."""
    return Text(text, styles=_MUTED, sizing_mode="stretch_width")


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
    left.styles = {"flex": "0 1 330px", "min-width": "min(330px, 100%)"}
    right.styles = {"flex": "1 1 560px", "min-width": "min(300px, 100%)"}
    return pn.FlexBox(left, right, flex_wrap="wrap", align_items="flex-start", sizing_mode="stretch_width")


def keep_link(state: Settings) -> None:
    """Write the state into the page's address."""
    if pn.state.location is not None:
        pn.state.location.search = f"?view={pack(state)}"


def copy_button() -> pn.widgets.Button:
    """A button that copies the page's address."""
    button = pn.widgets.Button(label="Copy link", variant="outline", width=110)
    button.js_on_click(code=_COPY, args={"button": button})
    return button


def save_button(name: str, content: Callable[[], pn.viewable.Viewable]) -> pn.widgets.FileDownload:
    """A button that saves what is shown as one HTML report that opens offline.

    Args:
        name: of the file and the report's title.
        content: figures, texts and tables to save, in their order.
    """
    return pn.widgets.FileDownload(
        callback=lambda: saved_page(name, content()),
        filename=f"{name}.html", label="Save as HTML", variant="outline", width=150,
    )  # fmt: skip


def code_of(lines: list[str]) -> pn.Accordion:
    """Show the notebook code that makes the same figure."""
    styles = {"font-family": "monospace", "font-size": "12px"}
    code = Text("\n".join(lines), styles=styles, sizing_mode="stretch_width")
    return pn.Accordion(("Notebook code", code), sizing_mode="stretch_width", margin=MARGIN)


def show_code(code: pn.Accordion, lines: list[str]) -> None:
    """Show other code in what :func:`code_of` made.

    The part stays: parts that are replaced while a slow browser still draws the page can get lost in it.
    """
    code[0].object = "\n".join(lines)


def footer(run: Run) -> Text:
    """Say where the numbers come from."""
    made = run.provenance
    parts = (
        f"run {run.folder.name}", f"recipe {run.recipe['name']}", f"commit {made['commit'][:12]}",
        f"data {made['data_sha256'][:12]}", f"device {made['device']}", f"seeds {made['seeds']}",
        *["a recipe at its smallest: its numbers mean nothing"] * ("tiny" in run.recipe.get("sets", ())),
    )  # fmt: skip
    return note(" · ".join(parts))


def origin(run: Run, model: str = "", rows: str = "", *, kept: bool = False) -> str:
    """Say in a line where the numbers of a table come from, for :func:`workbench.views.tables.fill`.

    Args:
        run: that made or holds them.
        model: whose numbers they are; empty if the table names several.
        rows: what they are taken over: a split, pairs, groups.
        kept: whether the model that the run kept gave them now, which is the first seed's.
    """
    seeds = run.provenance["seeds"]
    trained = f"seed {seeds[0]}" if kept else f"seeds {', '.join(map(str, seeds))}"
    named = [f"model {model}, {trained}" if model else trained]
    return "; ".join([*[rows] * bool(rows), *named, f"run {run.folder.name}"])


def framed(body: pn.viewable.Viewable, title: str, here: str, lead: str = "") -> pn.Template:
    """Put a page's body under the header that all pages share.

    Args:
        body: of the page.
        title: its heading.
        here: name of its script; marked in the header.
        lead: a sentence below the heading.
    """
    text = files("workbench").joinpath("templates/dashboard.html.j2").read_text("utf-8")
    page = pn.Template(text, location=True)  # without it, the address would not follow the state
    links = [(name, app_about(name)[0]) for name in app_paths() if name != "index"]
    for name, value in {"heading": title, "here": here, "lead": lead, "links": links}.items():
        page.add_variable(name, value)
    page.add_panel("main", body)
    return page


def start_page() -> None:
    """Load what pages need, once per page: no icon font and no address but the server's own."""
    style = files("workbench").joinpath("templates/dashboard_parts.css").read_text("utf-8")
    pn.extension("plotly", "tabulator", throttled=True, raw_css=[style])
    send_what_waits()
    one_blas_thread()
    if pn.state.curdoc is not None:
        # Panel sets this only when it writes the page; a browser that comes back to a session that has ended
        # gets a new one without that step, and would be sent to another machine for every style.
        base = f"{pn.state.rel_path}/" if pn.state.rel_path else ""
        pn.state.curdoc.template_variables["dist_url"] = base + LOCAL_DIST


def session_of_page(title: str, here: str) -> Session | None:
    """Return the server's session; if there can be none, make a page that says why and return nothing."""
    try:
        return shared_session()
    except WorkbenchError as problem:  # plain ``panel serve`` has not looked at WORKBENCH_DEVICE before
        told = banner(f"WORKBENCH_DEVICE: {problem}")
        framed(told, title, here, app_about(here)[1]).servable(title=title)
        return None


def open_view(
    title: str, view: Callable[[Session, Any, str], pn.viewable.Viewer], kind: type[Settings]
) -> None:
    """Make a page of a view, in the state of its link, over the runs of the served folder.

    Args:
        title: of the page.
        view: its class. A static method ``prepare(session, state)``, if it has one, runs off the event loop
            before the view is built: the place to load a model.
        kind: of its state.
    """
    start_page()
    here = kind.model_fields["app"].default
    session = session_of_page(title, here)
    if session is None:
        return
    state, problem = state_of_link(kind)
    body = pn.Column(sizing_mode="stretch_width")

    def build(_: object = None) -> None:
        drop_nothing(pn.state.curdoc)
        try:
            body[:] = [view(session, state, problem)]
        except WorkbenchError as unusable:
            body[:] = [banner(str(unusable)), pn.pane.HTML(_START)]

    prepare = getattr(view, "prepare", None)
    if prepare is None or not session.runs():
        build()
    else:
        document = pn.state.curdoc
        # In the next tick: the line that is replaced has to be done with by then.

        def then(_: object) -> None:
            document.add_next_tick_callback(build)

        loading = Live(lambda _, stopped: prepare(session, state), then, "Loading the model")
        body[:] = [loading.ask(None)]
    framed(body, title, here, app_about(here)[1]).servable(title=title)

"""The first page: every dashboard, whether there is something to show in it, and a start if there is not."""

from pathlib import Path

import panel as pn
from markupsafe import Markup

from workbench.background import background, first_recipes
from workbench.errors import WorkbenchError
from workbench.session import Session
from workbench.views.page import banner, framed, note, session_of_page, start_page
from workbench.views.serving import app_about, app_paths
from workbench.views.text import Text

# Whose runs a dashboard shows; one that is not named here shows any.
PAPERS = {
    "conditions": ("hyper_cl",),
    "similarity": ("hyper_cl",),
    "weights": ("hyper_cl", "hyper_cl_kg", "hyper_clip", "hyper_align"),
    "classify": ("hyper_clip",),
    "fairness": ("hyper_cl", "hyper_clip"),
    "zoo": ("hyper_align",),
}
NAMED = 4  # newest runs that are named
_CARD = Markup('<p style="margin:0 0 2px"><a href="{}"><b>{}</b></a></p><p style="margin:0 0 2px">{}</p>'
               '<p style="margin:0;color:var(--muted,#566270);font-size:13px">{}</p>')  # fmt: skip


class IndexView(pn.viewable.Viewer):
    """Links to the dashboards, and training for who has none."""

    def __init__(self, session: Session) -> None:
        """Build the page.

        Args:
            session: finished runs.
        """
        super().__init__()
        self._session, self._background = session, background(session.out, session.device)
        self._cards = pn.FlexBox(sizing_mode="stretch_width", gap="14px")
        self._start = pn.Column(sizing_mode="stretch_width")
        self._said = Text("", sizing_mode="stretch_width", styles={"font-family": "monospace"})
        self._bar = pn.indicators.Progress(value=0, max=1, sizing_mode="stretch_width")
        self._cancel = pn.widgets.Button(label="Cancel training", variant="outline", width=150)
        self._cancel.on_click(lambda _: self._background.cancel())
        self._shown: object = None
        self.refresh()

    def _offer(self) -> list[pn.viewable.Viewable]:
        """Offer to train what is not there yet."""
        names, done = first_recipes(), set(self._session.runs())
        said = {
            "small": (
                "Train the small models",
                "A minute; to try every control. Numbers mean nothing.",
            ),
            "all": (
                "Train the embedded set",
                "Ten to twenty minutes on two cores; the embedded part of the report.",
            ),
        }
        offered: list[pn.viewable.Viewable] = []
        for key, (label, about) in said.items():
            missing = [name for name in names[key] if name not in done]
            # Small models are for who has nothing; they would only stand beside real ones.
            if missing and not (key == "small" and done):
                color = "primary" if key == "small" else "default"
                button = pn.widgets.Button(label=label, color=color, width=220)
                button.on_click(lambda _, missing=missing: self._train(missing))
                offered += [button, note(about)]
        return offered

    def _train(self, recipes: list[str]) -> None:
        self._background.start(recipes)  # another browser may have started it: then its progress is shown
        self.refresh()

    def refresh(self) -> None:
        """Show what is there now and how far training is."""
        work, done = self._background, set(self._session.runs())
        state = (work.running, work.exit_code, sorted(done))
        if state != self._shown:
            self._shown = state
            self._cards[:] = [self._card(name) for name in app_paths() if name != "index"]
            self._start[:] = self._training(work.running, work.exit_code)
        if work.running:
            self._said.object = "\n".join(work.said()) or "starting …"
            self._bar.param.update(value=len(done & set(work.recipes)), max=len(work.recipes))

    def _training(self, running: bool, exit_code: int | None) -> list[pn.viewable.Viewable]:
        if running:
            head = note(f"Training {', '.join(self._background.recipes)}. Pages fill as recipes are done.")
            return [head, self._bar, self._said, self._cancel]
        ended = []
        if exit_code in (-15, 143):
            ended = [note("Training was cancelled; the same button goes on from there.")]
        elif exit_code:
            ended = [banner("Training stopped: " + " ".join(self._background.said()[-2:]))]
        nothing = [] if self._session.runs() else [note("Nothing is trained yet.")]
        try:
            return [*ended, *nothing, *self._offer()]
        except WorkbenchError as problem:  # a recipe that cannot be read hides no page
            return [*ended, *nothing, banner(str(problem))]

    def _card(self, name: str) -> pn.viewable.Viewable:
        """Link to a dashboard and say which runs it shows."""
        runs = list(self._session.runs(*PAPERS.get(name, ())))
        there = (
            f"{len(runs)} run{'s' * (len(runs) > 1)}: {', '.join(runs[-NAMED:])}" if runs else "no run yet"
        )
        there += f" and {len(runs) - NAMED} older" if len(runs) > NAMED else ""
        label, line = app_about(name)
        styles = {"border": "1px solid var(--line, #d5dbe1)", "border-radius": "6px", "padding": "10px 14px",
                  "flex": "1 1 300px"}  # fmt: skip
        return pn.pane.HTML(str(_CARD.format(name, label, line, there)), styles=styles)

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out the start above the links."""
        return pn.Column(self._start, self._cards, sizing_mode="stretch_width")


def open_index() -> None:
    """Make the first page over the runs of the served folder; it follows training while it is open."""
    start_page()
    session = session_of_page("Workbench", "index")
    if session is None:
        return
    view = IndexView(session)
    lead = "Conditions become weights, and weights change what counts as alike. " + (
        f"Runs are read from {Path(session.out).name}; models compute on {session.device}."
    )
    pn.state.add_periodic_callback(view.refresh, 1000)
    framed(pn.panel(view), "Workbench", "index", lead).servable(title="Workbench")

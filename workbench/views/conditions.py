"""Type a condition and watch sentences move: map, table, neighbours, search, agreement with an attribute."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import panel as pn
import param
import plotly.graph_objects as go
import polars as pl

from workbench.errors import DataError, WorkbenchError
from workbench.figures_texts import PURITY_HEIGHT, moved_figure, purity_figure
from workbench.moved import ConditionedTexts, Moved
from workbench.own_texts import MOST_BYTES, MOST_ROWS, pasted_texts, read_texts
from workbench.session import Session
from workbench.view_state import LONGEST_TEXT, ConditionsState
from workbench.views.figure import FigurePlace
from workbench.views.live import Job, Live
from workbench.views.page import (
    MARGIN,
    banner,
    beside,
    code_of,
    copy_button,
    footer,
    keep_link,
    note,
    origin,
    save_button,
    show_code,
)
from workbench.views.tables import TablePlace
from workbench.views.text import Text

NO_ATTRIBUTE = "none"
MOVED = "moved"  # column of the table: 1 minus the cosine of a sentence's two embeddings
_HISTORY = 20  # conditions that are offered again
_SIDES = {"before": "Before: plain encoder", "after": "After: under the condition"}
_CLUSTERS = "share that have their cluster's commonest value"


@dataclass(frozen=True)
class Shown:
    """What one request led to."""

    state: ConditionsState
    texts: ConditionedTexts
    moved: Moved
    attribute: str
    found: pl.DataFrame | None


def _asked_for(condition: str, attributes: list[str]) -> str:
    """Return the attribute that a condition names, else the first."""
    named = (name for name in attributes if name.lower() in condition.lower())
    return next(named, next(iter(attributes), NO_ATTRIBUTE))


class ConditionsView(pn.viewable.Viewer):
    """Sentences under a trained model, moved by what a person types."""

    model = param.Selector(default=None, objects=[None], doc="Models of the run that read text.")
    condition = param.String(default="The colour.", doc="What to look at; press Enter.")
    earlier = param.Selector(default=None, objects=[None], doc="Conditions typed before; choose one again.")
    other = param.String(default="", label="Pinned: B", doc="A second condition, B; empty for none.")
    blend = param.Number(
        default=0.0, bounds=(0, 1), step=0.05, label="From A to B", doc="0: the condition, 1: B."
    )
    strength = param.Number(default=1.0, bounds=(0, 2), step=0.05, doc="0: plain encoder, 1: the model.")
    attribute = param.Selector(
        default=None, objects=[None], doc="Colours the map and is what clusters are held against."
    )
    query = param.String(default="", label="Search", doc="Finds the sentences most alike; press Enter.")
    clicked = param.Integer(
        default=None, bounds=(0, None), allow_None=True, label="Chosen row",
        doc="Of a sentence; click one or type its row.",
    )  # fmt: skip

    def __init__(
        self, session: Session, state: ConditionsState, problem: str = "", own: pl.DataFrame | None = None
    ) -> None:
        """Build the view.

        Args:
            session: finished runs and models.
            state: what to show.
            problem: with the link, said in the banner.
            own: texts of one's own instead of the bundled ones, as :mod:`workbench.own_texts` reads them.

        Raises:
            RunError: no finished run with a model.
        """
        super().__init__()  # first: until then, what is offered here would be offered by every page's view
        self._session, self._run = session, session.run(state.recipe, "hyper_cl")
        self._state, self._shown, self._agreed = state, None, None
        self._follows = not state.attribute  # the one that the condition names, until a person chooses
        # Texts of one's own, and what models made of them: one value, since work in a thread reads both.
        self._brought: tuple[pl.DataFrame | None, dict[str, ConditionedTexts]] = own, {}
        missing = f"This link was made over {state.own:,} texts of somebody's own, which no link holds"
        self._problem = problem or (missing if state.own and own is None else "")
        self.param.model.objects = models = session.text_models(state.recipe)
        self.param.earlier.objects = [state.condition]
        self.param.attribute.objects = [state.attribute or NO_ATTRIBUTE]
        with param.parameterized.discard_events(self):
            self.param.update(
                model=state.model if state.model in models else session.first_model(models),
                condition=state.condition, earlier=state.condition, other=state.other, blend=state.blend,
                strength=state.strength, attribute=state.attribute or NO_ATTRIBUTE, query=state.query,
                clicked=state.clicked,
            )  # fmt: skip
        self._build()
        self.live = Live(self.compute, self._draw, "Moving the sentences")
        self._more = Live(self.agreement, self._draw_agreement, "Comparing with the attribute", patient=True)

    def _build(self) -> None:
        """Make the parts that are filled when results arrive."""
        wide = {"sizing_mode": "stretch_width"}
        self._map, self._purity, self._grouped = FigurePlace(self._click), FigurePlace(), FigurePlace()
        self._told, self._near, self._found = note(""), _two_lists(), _two_lists()
        self.table = TablePlace(
            self._pick, hidden_columns=["row"], layout="fit_columns", widths={"text": "54%"}
        )
        self._code = code_of([])
        self._upload = pn.widgets.FileInput(accept=".csv,.parquet", **wide)
        self._upload.param.watch(self._uploaded, "value")
        self._pasted = pn.widgets.TextAreaInput(placeholder="One text per line", rows=4, **wide)
        self._said = pn.Column(**wide)

    # --- what is asked and what comes back ------------------------------------------------------------------

    def state(self) -> ConditionsState:
        """Return what is shown as a value for a link."""
        names = ("model", "condition", "other", "blend", "strength", "query", "clicked")
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        values["attribute"] = "" if self._follows or self.attribute == NO_ATTRIBUTE else self.attribute
        values["own"] = 0 if self._brought[0] is None else self._brought[0].height
        return self._state.model_copy(update=values)

    def _texts(self, state: ConditionsState, job: Job | None = None) -> ConditionedTexts:
        """Return the sentences that are looked at, encoded once."""
        bundled = self._session.texts_of(state.recipe, state.model)
        frame, made = self._brought
        if frame is None:
            return bundled
        if state.model not in made:
            told = job.told(frame.height) if job else lambda _: None
            made[state.model] = ConditionedTexts(bundled.model.apart(), frame, told)
        return made[state.model]

    def compute(self, state: ConditionsState, job: Job | None = None) -> Shown:
        """Compute everything that follows from a state."""
        texts = self._texts(state, job)
        moved = texts.move(state.condition, state.other, state.blend, state.strength)
        known = texts.attributes
        attribute = state.attribute if state.attribute in known else _asked_for(state.condition, known)
        found = texts.search(moved, state.query) if state.query.strip() else None
        return Shown(state, texts, moved, attribute, found)

    @param.depends("model", "condition", "other", "blend", "strength", "query", watch=True)
    def refresh(self) -> None:
        """Ask for everything again; what was asked before is dropped."""
        self.live.ask(self.state())

    @param.depends("attribute", watch=True)
    def _recolour(self) -> None:
        if self._shown is not None and self.attribute != self._wanted:
            self._follows, self._wanted = False, self.attribute
            self.live.ask(self.state())

    # --- drawing --------------------------------------------------------------------------------------------

    def figure(self, shown: Shown | None = None) -> go.Figure:
        """Draw the map.

        Args:
            shown: a result; computed from what is asked for if not given.

        Raises:
            DataError: a condition that cannot be used.
        """
        shown = shown or self.compute(self.state())
        state, moved = shown.state, shown.moved
        title = f"{state.condition}  |  {state.other}" if state.other.strip() else state.condition
        shortened = title if len(title) < 90 else f"{title[:87]}..."
        attribute = "" if shown.attribute == NO_ATTRIBUTE else shown.attribute
        return moved_figure(moved.frame, attribute, (shortened, f"both hold {moved.shown:.0%}"), self.clicked)

    def _draw(self, shown: Shown) -> Callable[[], None]:
        """Show the map of a result, then everything else."""
        self._shown, self._wanted = shown, shown.attribute
        if self.clicked is not None and self.clicked >= shown.moved.frame.height:
            self.clicked = None
        self._map.show(self.figure(shown))
        return partial(self._draw_rest, shown)

    def _draw_rest(self, shown: Shown) -> None:
        known = shown.texts.attributes or [NO_ATTRIBUTE]
        if (self.param.attribute.objects, self.attribute) != (known, shown.attribute):
            # Both, one after the other: a value that is not offered would be replaced by the first that is.
            self.param.attribute.objects = list(dict.fromkeys([*known, self.attribute]))
            self.attribute = shown.attribute
            self.param.attribute.objects = known
        if shown.state.condition not in self.param.earlier.objects:
            self.param.earlier.objects = [shown.state.condition, *self.param.earlier.objects][:_HISTORY]
        self.earlier = shown.state.condition
        told = f"1 minus the cosine of before and after, 0 to 2, at strength {shown.state.strength:g}"
        made = origin(self._run, shown.state.model, kept=True)
        self.table.show(self.rows(shown), self.clicked, meanings={MOVED: told}, origin=made)
        _list(self._found, shown.found)
        self._mark()
        if shown.attribute == NO_ATTRIBUTE:
            self._more.clear()
            self._purity.show(None)
            self._grouped.show(None)
        else:
            for place in (self._purity, self._grouped):
                place.expect(PURITY_HEIGHT)
            self._more.ask(shown)

    @staticmethod
    def agreement(shown: Shown, _: Job | None = None) -> tuple[Shown, go.Figure, go.Figure]:
        """Draw how far neighbours, and how far clusters, of what is shown agree in the attribute."""
        moved, attribute = shown.moved, shown.attribute
        near, grouped = moved.purity(attribute), moved.clusters(attribute)
        return shown, purity_figure(near, attribute), purity_figure(grouped, attribute, _CLUSTERS)

    def _draw_agreement(self, found: tuple[Shown, go.Figure, go.Figure]) -> None:
        self._agreed, near, grouped = found
        self._purity.show(near)
        self._grouped.show(grouped)

    def rows(self, shown: Shown) -> pl.DataFrame:
        """Return the table's rows: text, attribute, how far each moved."""
        columns = [shown.moved.frame["text"]]
        if shown.attribute != NO_ATTRIBUTE:
            columns.append(shown.moved.frame[shown.attribute].cast(pl.String).fill_null(""))
        moved = pl.Series(MOVED, shown.moved.distance.numpy()).round(3)
        return pl.DataFrame([*columns, moved]).with_row_index("row")

    def _mark(self) -> None:
        """Show the chosen sentence in map, table and lists, and in the link."""
        keep_link(self.state())
        show_code(self._code, self.code())
        if self.clicked is None or self._shown is None:
            self._told.object = "Click a sentence, in map or table, or type its row, to see its neighbours."
            _list(self._near, None)
            return
        self.table.choose(self.clicked)
        text = self._shown.moved.frame["text"][self.clicked]
        self._told.object = f"Nearest to: {text}"
        _list(self._near, self._shown.moved.neighbours(self.clicked))

    @param.depends("clicked", watch=True)
    def _choose(self) -> None:
        shown = self._shown
        if shown is not None and self.clicked is not None and self.clicked >= shown.moved.frame.height:
            self.clicked = None  # there is no such row; this comes back here
        elif shown is not None:
            self._map.show(self.figure(shown))
            self._mark()

    def _click(self, event: param.parameterized.Event) -> None:
        points = (event.new or {}).get("points") or [{}]
        row = points[0].get("customdata")
        if isinstance(row, int):
            self.clicked = row

    def _pick(self, row: int) -> None:
        self.clicked = row

    @param.depends("earlier", watch=True)
    def _again(self) -> None:
        self.condition = self.earlier

    def pin(self, *_: Any) -> None:
        """Keep the condition as B."""
        self.other = self.condition

    def swap(self, *_: Any) -> None:
        """Let A and B change places."""
        if self.other.strip():
            self.param.update(condition=self.other, other=self.condition)

    # --- texts of one's own ---------------------------------------------------------------------------------

    def bring(self, frame: pl.DataFrame | None) -> None:
        """Look at texts of one's own, or at the bundled ones again."""
        self._brought, self._shown = (frame, {}), None
        self._follows = True
        self.param.update(clicked=None)
        self.param.attribute.objects = [NO_ATTRIBUTE]
        self.attribute = NO_ATTRIBUTE
        self.refresh()

    def look_at(self, texts: ConditionedTexts) -> None:
        """Look at texts that are encoded already."""
        self._brought, self._shown = (texts.frame, {self.model: texts}), None

    def _bring(self, read: Callable[[], pl.DataFrame]) -> None:
        try:
            frame = read()
        except WorkbenchError as problem:
            self._said[:] = [banner(str(problem))]
            return
        self._said[:] = [note(f"{frame.height:,} texts of your own; they stay in this page and in no link.")]
        self.bring(frame)

    def _uploaded(self, event: param.parameterized.Event) -> None:
        if event.new:
            name, raw = self._upload.filename or "the file", event.new
            self._bring(lambda: read_texts(name, raw))

    def _paste(self, *_: Any) -> None:
        self._bring(lambda: pasted_texts(self._pasted.value or ""))

    def _bundled(self, *_: Any) -> None:
        self._said[:] = []
        self.bring(None)

    # --- the page -------------------------------------------------------------------------------------------

    def code(self) -> list[str]:
        """Return notebook code that makes the same figure."""
        state = self.state().model_dump(mode="json", exclude={"version", "app", "own"})
        own = self._brought[0] is not None
        return [
            *["from pathlib import Path", "from workbench.own_texts import read_texts"] * own,
            "from workbench.session import Session",
            "from workbench.view_state import ConditionsState",
            "from workbench.views.conditions import ConditionsView",
            *['own = read_texts("texts.csv", Path("texts.csv").read_bytes())  # your file'] * own,
            f"view = ConditionsView(Session(), ConditionsState(**{state!r}){', own=own' * own})",
            "view.figure()",
        ]

    def results(self) -> pn.Column:
        """Return what is shown, without controls."""
        said = note("The table: how far each sentence moved, 1 minus the cosine of before and after, 0 to 2.")
        lists = [self._told, self._near, self._found]
        parts = [self._map, *lists, self._purity, self._grouped, said, self.table]
        return pn.Column(*parts, sizing_mode="stretch_width")

    def _saved(self) -> pn.Column:
        if self._shown is None:
            raise DataError("nothing is shown yet; wait for the map")
        stale = [] if self._agreed is self._shown else [self._purity, self._grouped]
        return pn.Column(*(part for part in self.results() if part not in stale), footer(self._run))

    def _controls(self) -> pn.Column:
        """Lay out what a person changes."""
        wide = {"sizing_mode": "stretch_width"}
        asked = [
            "condition", "earlier", "other", "blend", "strength", "attribute", "query", "clicked", "model",
        ]  # fmt: skip
        typed = {name: {"max_length": LONGEST_TEXT} for name in ("condition", "other", "query")}
        controls = pn.Param(self, parameters=asked, widgets=typed, show_name=False, margin=0, **wide)
        pin, swap = _button("Pin as B", self.pin), _button("Swap A and B", self.swap)
        use, back = _button("Use these lines", self._paste), _button("Bundled sentences", self._bundled)
        rule = (
            f"CSV or Parquet with a column text; other columns of few values become attributes. At most "
            f"{MOST_BYTES // 2**20} MiB and {MOST_ROWS:,} rows. Vectors made before: columns v0, v1, ..."
        )
        own = pn.Column(note(rule), self._upload, self._pasted, pn.Row(use, back), **wide)
        folded = pn.Accordion(("Your own sentences", own), margin=MARGIN, **wide)
        saved = save_button("conditions", self._saved)
        return pn.Column(
            controls, pn.Row(pin, swap), self._said, folded, self._code, pn.Row(copy_button(), saved), **wide
        )

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out controls, results and footer; narrow screens stack them."""
        self.refresh()
        top = [banner(f"{self._problem}. The default view is shown.")] if self._problem else []
        right = pn.Column(self.live, self.results(), self._more, sizing_mode="stretch_width")
        page = beside(self._controls(), right)
        return pn.Column(*top, page, footer(self._run), sizing_mode="stretch_width")


def _button(label: str, action: Callable[..., None]) -> pn.widgets.Button:
    button = pn.widgets.Button(label=label, variant="outline")
    button.on_click(action)
    return button


def _two_lists() -> pn.FlexBox:
    """Make two empty lists beside each other that :func:`_list` fills."""
    texts = [Text("", sizing_mode="stretch_width", styles={"flex": "1 1 280px"}) for _ in _SIDES]
    return pn.FlexBox(*texts, flex_wrap="wrap", sizing_mode="stretch_width", visible=False)


def _list(lists: pn.FlexBox, found: pl.DataFrame | None) -> None:
    """List sentences before and after as plain text; the parts stay, as those of the notebook code do."""
    lists.visible = found is not None
    for text, (side, title) in zip(lists, _SIDES.items(), strict=True):
        rows = [] if found is None else found.filter(side=side).to_dicts()
        lines = [f"{row['rank']}. {row['cosine']:+.3f}  {row['text']}" for row in rows]
        text.object = "\n".join([title, *lines])

"""Type a condition and see a similarity matrix change, or pairs of sentences move."""

from typing import Any

import numpy as np
import panel as pn
import param
import plotly.graph_objects as go
import polars as pl

from workbench.datasets import bundled
from workbench.errors import DataError, WorkbenchError
from workbench.figures import similarity_change_figure
from workbench.figures_pairs import cosines_figure, quadrants_figure, separations_figure, slopes_figure
from workbench.model import HyperCL
from workbench.pair_changes import check_length, shows_texts
from workbench.pair_comparison import HIDDEN, Compared, Comparer
from workbench.session import Session
from workbench.view_state import LONGEST_OWN, LONGEST_TEXT, SimilarityState, ViewError
from workbench.views.attribution import Question, WordsView
from workbench.views.figure import FigurePlace
from workbench.views.live import Job, Live
from workbench.views.page import (
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
from workbench.views.tables import TablePlace, downloads
from workbench.views.text import Text

SOURCES = {
    "bundled sentences, all pairs of a domain": "bundled",
    "pairs of your own": "own",
    "the run's own pairs, as it scored them": "run",
}
_EXAMPLE = (
    "The car in the yard is red.\tA red bicycle leans on the wall.\n"
    "A cheap hotel by the sea.\tAn expensive hotel by the sea."
)
_COLUMNS = (
    "row", "sentence1", "sentence2", "condition", "condition_kind", "plain", "conditioned", "change", "gold",
    "rank_plain", "rank_conditioned", "rank_move", "quadrant",
)  # fmt: skip
_MEANINGS = {  # of the columns, for the hover
    "plain": "cosine of the two sentences by the plain encoder, -1 to 1",
    "change": "conditioned minus plain, -2 to 2",
    "gold": "how alike the two are by the data, 0 to 1",
    "rank_plain": "place by the plain cosine, 1 is most alike",
    "rank_conditioned": "place by the conditioned cosine, 1 is most alike",
    "rank_move": "places climbed towards most alike",
}
_FLIPPED = {
    "above": "row that was more alike",
    "below": "row that is more alike under the condition",
    "plain": "difference of their plain cosines, above 0",
    "conditioned": "difference of their conditioned cosines, below 0",
    "size": "the smaller of the two differences without its sign",
}
_HINT = "Click a line, a dot, a cell or a table's row: what parts that pair most is then shown."


class SimilarityView(pn.viewable.Viewer):
    """Pairwise similarity of some sentences: the plain encoder beside the model under a typed condition."""

    condition = param.String(default="The colour.", doc="Text the weights are generated from; press Enter.")
    strength = param.Number(default=1.0, bounds=(0, 2), step=0.1, doc="0: plain encoder, 1: the model.")

    def __init__(self, model: HyperCL, texts: dict[str, str], **params: object) -> None:
        """Build the view.

        Args:
            model: a trained model.
            texts: sentences by the short names that label them.
            params: starting condition and strength.
        """
        super().__init__(**params)
        self._model, self._texts = model, texts

    @param.depends("condition", "strength")
    def figure(self) -> pn.viewable.Viewable:
        """Draw plain and conditioned similarity, or say what is wrong with the condition."""
        names, texts = list(self._texts), list(self._texts.values())
        try:
            after = self._model.similarity(texts, texts, self.condition, self.strength).tolist()
            before = self._model.similarity(texts, texts, self.condition, strength=0).tolist()
        except WorkbenchError as problem:
            # Str, not Markdown or HTML: the message quotes what was typed, and text is shown, never run.
            return Text(str(problem), styles={"color": "#a03000"})
        title = self.condition if len(self.condition) < 60 else f"{self.condition[:57]}..."
        figure = similarity_change_figure(names, before, {title: after})
        return pn.pane.Plotly(figure, sizing_mode="stretch_width")

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out the controls above the figure."""
        asked = ["condition", "strength"]
        controls = pn.Param(self, parameters=asked, show_name=False, default_layout=pn.Row)
        return pn.Column(controls, self.figure, sizing_mode="stretch_width")


class PairsView(pn.viewable.Viewer):
    """Pairs of sentences, plain and under what a person types."""

    recipe = param.Selector(default=None, objects=[None], doc="Finished runs.")
    model = param.Selector(default=None, objects=[None], doc="Whose cosines are the conditioned ones.")
    pairs = param.Selector(default="bundled", objects=SOURCES, doc="Which pairs are compared.")
    own = param.String(default=_EXAMPLE, doc="One pair per line, a tab or | between its two texts.")
    condition = param.String(default="The colour.", doc="What to look at; press Enter.")
    strength = param.Number(default=1.0, bounds=(0, 2), step=0.05, doc="0: plain encoder, 1: the model.")
    attribute = param.Selector(
        default="", objects={"as the condition asks": ""}, doc="What the gold score of a bundled pair is of."
    )
    chosen = param.Integer(
        default=None, bounds=(0, None), allow_None=True, doc="Row of the chosen pair; click one or type it."
    )

    def __init__(self, session: Session, state: SimilarityState, problem: str = "") -> None:
        """Build the view.

        Args:
            session: finished runs and models.
            state: what to show.
            problem: with the link, said in the banner.

        Raises:
            RunError: no finished run of Hyper-CL, none of the link's recipe, or one that kept no model.
        """
        super().__init__()  # first: until then, what is offered here would be offered by every page's view
        self._session, self._problem, self._comparer = session, problem, Comparer(session)
        self._run = session.run(state.recipe, "hyper_cl")
        names = list(bundled.attributes())
        self.param.attribute.objects = {"as the condition asks": "", **dict(zip(names, names, strict=True))}
        self.param.recipe.objects = list(session.runs("hyper_cl"))
        offered = self._comparer.models(self._run, state.pairs)
        self.param.model.objects = offered
        with param.parameterized.discard_events(self):
            self.param.update(
                recipe=self._run.recipe["name"], pairs=state.pairs, own=state.own or _EXAMPLE,
                model=state.model if state.model in offered else offered[0], condition=state.condition,
                strength=state.strength, chosen=state.chosen,
                attribute=state.attribute if state.attribute in names else "",
            )  # fmt: skip
        self._make_panes()
        self._asked: SimilarityState | DataError | None = None
        self.live = Live(self._work, self._draw, "Comparing")
        self._ask()

    @staticmethod
    def prepare(session: Session, state: SimilarityState) -> None:
        """Load the model of a state."""
        if state.pairs != "run":
            run = session.run(state.recipe, "hyper_cl")
            offered = Comparer.models(run, state.pairs)
            session.model(run, state.model if state.model in offered else offered[0])

    # --- what is asked --------------------------------------------------------------------------------------

    @param.depends("recipe", "pairs", watch=True)
    def _offer(self) -> None:
        """Offer the models that the chosen run and pairs allow."""
        self._run = self._session.run(self.recipe, "hyper_cl")
        offered = self._comparer.models(self._run, self.pairs)
        self.param.model.objects = offered
        # One update, so that one request is made and not one for every control.
        self.param.update(model=self.model if self.model in offered else offered[0], chosen=None)
        self._ask()

    def state(self) -> SimilarityState:
        """Return what is shown as a value for a link.

        Raises:
            DataError: pairs of one's own that are too long for a link.
        """
        own = self.own if self.pairs == "own" else ""
        check_length(own)
        names = ("recipe", "model", "pairs", "condition", "strength", "attribute", "chosen")
        return SimilarityState(**{name: getattr(self, name) for name in names}, own=own)

    @param.depends("model", "own", "condition", "strength", "attribute", "chosen", watch=True)
    def _ask(self) -> None:
        try:
            request = self.state()
        except DataError as problem:  # said where other errors are
            request = problem
        if request != self._asked:  # several controls may have changed for one question
            self._asked = request
            self.live.ask(request)

    def compared(self) -> Compared:
        """Compute what is asked for now, for notebooks.

        Raises:
            WorkbenchError: a condition, pairs or a run that cannot be used.
        """
        return self._comparer.compared(self.state())

    def _work(self, state: SimilarityState | DataError, job: Job) -> Compared:
        if isinstance(state, DataError):
            raise state

        def said(text: str) -> None:
            if job.stopped:
                raise ViewError("cancelled")
            job.say(text)

        return self._comparer.compared(state, said)

    # --- drawing --------------------------------------------------------------------------------------------

    def _make_panes(self) -> None:
        def place(least: int = 330) -> FigurePlace:
            return FigurePlace(self._click, flex=f"1 1 {least}px", min_width="min(270px, 100%)")

        self._slopes, self._quadrants, self._parted = place(), place(), place()
        self._matrices = [place(275) for _ in range(3)]
        self._words, self._compared = WordsView(self._session), None
        self._said, self._told, self._sentences = note(""), note(""), note("")
        self._table, self._flips = TablePlace(self._pick), TablePlace(self._pick, "above")
        self._code = code_of([])

    def _pick(self, row: int) -> None:
        self.chosen = row

    def _click(self, event: param.parameterized.Event) -> None:
        points = (event.new or {}).get("points") or [{}]
        row = points[0].get("customdata")
        if isinstance(row, int) and row >= 0:
            self.chosen = row

    def figure(self, compared: Compared) -> go.Figure:
        """Draw the pairs that move most as slopes, the chosen one among them."""
        return slopes_figure(compared.drawn(), compared.condition, compared.state.chosen)

    def matrices(self, compared: Compared) -> list[go.Figure]:
        """Draw some sentences with each other: before, after and change; empty where texts are not shown."""
        if not compared.texts:
            return []
        places = compared.few()
        at = {place: number for number, place in enumerate(places)}
        cells = {
            (min(at[one], at[two]), max(at[one], at[two])): row
            for one, two, row in compared.pairs.select("first", "second", "row").iter_rows()
            if one in at and two in at
        }
        framed = next((cell for cell, row in cells.items() if row == compared.state.chosen), None)
        before, after = (values[np.ix_(places, places)] for values in (compared.before, compared.after))
        texts = [compared.texts[place] for place in places]
        sides = [("plain encoder", before), (compared.condition, after), ("change", after - before)]
        return [
            cosines_figure(texts, values.tolist(), title, cells, change=place == 2, chosen=framed)
            for place, (title, values) in enumerate(sides)
        ]

    def _draw(self, compared: Compared) -> None:
        self._compared = compared
        keep_link(self.state())
        pairs, chosen, parted = compared.pairs, compared.state.chosen, compared.parted
        figures = [
            self.figure(compared),
            quadrants_figure(pairs, compared.condition, chosen),
            None if parted is None else separations_figure(parted, compared.state.condition),
            *(self.matrices(compared) or [None] * 3),
        ]
        panes = (self._slopes, self._quadrants, self._parted, *self._matrices)
        for pane, figure in zip(panes, figures, strict=True):
            pane.show(figure)
        numbered = (
            [f"{number}. {compared.texts[place]}" for number, place in enumerate(compared.few(), 1)]
            if compared.texts
            else []
        )
        self._sentences.param.update(object="\n".join(numbered), visible=bool(numbered))
        self._said.object, self._told.object = compared.summary(), self._next(compared)
        self._words.ask_about(self._question(compared))
        columns = [name for name in _COLUMNS if name in pairs.columns]
        told = {
            "meanings": {**_MEANINGS, "conditioned": compared.said()},
            "origin": origin(
                self._run, self.model, f"{pairs.height:,} pairs", kept=compared.state.pairs != "run"
            ),
        }
        movers = pairs.select(columns).sort(pl.col("change").abs(), descending=True)
        self._table.show(movers, chosen, **told)
        self._flips.show(compared.turned(), chosen, **told | {"meanings": _FLIPPED})
        show_code(self._code, self.code())

    def _question(self, compared: Compared) -> Question | None:
        """Return whose score can be followed to its words: the chosen pair's, if a model can be asked."""
        if compared.parted is None:
            return None
        row, state = compared.chosen.to_dicts()[0], compared.state
        condition = row["condition"] if state.pairs == "run" else state.condition
        return Question(self._run, state.model, row["sentence1"], row["sentence2"], condition)

    def _next(self, compared: Compared) -> str:
        """Say what to do next, or why something is not there."""
        if "sentence1" not in compared.pairs.columns:
            return "" if shows_texts(self._run) else HIDDEN
        if compared.chosen.is_empty():
            return _HINT
        row = compared.chosen.to_dicts()[0]
        lost = (
            ""
            if compared.parted is not None
            else "\nThe run kept no such model, so no other condition is asked."
        )
        return f"Chosen, row {row['row']}: {row['sentence1']}  |  {row['sentence2']}{lost}"

    def code(self) -> list[str]:
        """Return notebook code that makes the same figure."""
        state = self.state().model_dump(mode="json", exclude={"version", "app"})
        return [
            "from workbench.session import Session",
            "from workbench.view_state import SimilarityState",
            "from workbench.views.similarity import PairsView",
            f"view = PairsView(Session(), SimilarityState(**{state!r}))",
            "view.figure(view.compared())",
        ]

    def _content(self) -> list[pn.viewable.Viewable | pn.viewable.Viewer]:
        """Return texts, figures and tables in their order."""
        return [
            self._said,
            pn.FlexBox(self._slopes, self._quadrants, sizing_mode="stretch_width"),
            self._told,
            self._words,
            self._parted,
            pn.FlexBox(*self._matrices, sizing_mode="stretch_width"),
            self._sentences,
            note("All pairs, those that move most first; cosines from -1 to 1, rank 1 is most alike."),
            self._table,
            note("Rank flips: couples of pairs whose order turns round most clearly; above was more alike."),
            self._flips,
        ]

    def _shown_for(self, *sources: str) -> Any:
        return pn.bind(lambda source: source in sources, self.param.pairs)

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out controls, figures, tables and footer; narrow screens stack them."""
        made, typed = pn.widgets, self._shown_for("bundled", "own")
        controls = pn.Column(
            *(made.Select.from_param(self.param[name], width=300) for name in ("recipe", "model", "pairs")),
            made.TextAreaInput.from_param(
                self.param.own, max_length=LONGEST_OWN, width=300, rows=5, visible=self._shown_for("own")
            ),
            made.TextInput.from_param(
                self.param.condition, max_length=LONGEST_TEXT, width=300, visible=typed
            ),
            made.FloatSlider.from_param(self.param.strength, width=300, visible=typed),
            made.Select.from_param(self.param.attribute, width=300, visible=self._shown_for("bundled")),
            made.IntInput.from_param(self.param.chosen, width=300),
        )
        saved = save_button("similarity", lambda: pn.Column(*self._content(), footer(self._run)))
        numbers = downloads("pairs", lambda: self._compared and self._compared.pairs)
        left = pn.Column(controls, pn.Row(copy_button(), saved), numbers, self._code)
        top = [banner(f"{self._problem}. The default view is shown.")] if self._problem else []
        right = pn.Column(self.live, *self._content(), sizing_mode="stretch_width")
        last = pn.bind(lambda _: footer(self._run), self.param.recipe)
        return pn.Column(*top, beside(left, right), last, sizing_mode="stretch_width")

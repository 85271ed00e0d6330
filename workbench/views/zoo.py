"""A zoo's pairs: who fits whom by which way, at which cost, and how far the ways agree."""

import panel as pn
import param
import plotly.graph_objects as go
import polars as pl
from markupsafe import Markup

from workbench.errors import WorkbenchError
from workbench.figures_zoo import agreement_figure, cost_figure, pair_matrix_figure, scale_figure
from workbench.generated import generating
from workbench.session import Session
from workbench.view_state import WeightsState, ZooState, pack
from workbench.views.figure import FigurePlace
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
from workbench.views.unsent import sent_together
from workbench.zoo_scores import pair_axes, pair_by_ways, pair_means

_MEANINGS = {
    "value": "test recall at 10, mean of both directions and over seeds, 0 to 1",
    "difference": "value minus against",
}
_WAYS = {
    "value": _MEANINGS["value"],
    "low": "of the lowest seed",
    "high": "of the highest seed",
    "text_to_image": "test recall at 10 of images for a caption, mean over seeds",
    "image_to_text": "test recall at 10 of captions for an image, mean over seeds",
}
_BEST = ("", "")  # in place of a chosen pair
_EVERY = "Every pair, the best first; controls are no candidates. Click a pair here or in the map."
_CONNECTOR = Markup('<a href="weights?view={}">Look at this connector</a> in Weights, as {} made it.')


class ZooView(pn.viewable.Viewer):
    """A finished run of a zoo, one way at a time beside another, and one pair of it by every way."""

    recipe = param.Selector(default=None, objects=[None], doc="Finished runs.")
    model = param.Selector(default=None, objects=[None], doc="The way whose pairs are shown.")
    against = param.Selector(default=None, objects=[None], doc="The way that differences are taken to.")
    pair = param.Selector(default=_BEST, objects={"the best": _BEST}, doc="Of a text and an image encoder.")

    def __init__(self, session: Session, state: ZooState, problem: str = "") -> None:
        """Build the view.

        Args:
            session: finished runs.
            state: what to show.
            problem: with the link, said in the banner.

        Raises:
            RunError: no finished run of a zoo, or none of the link's recipe.
        """
        super().__init__()  # first: until then, what is offered here would be offered by every page's view
        self._session, self._problem = session, problem
        self._run = session.run(state.recipe, "hyper_align")
        self._drawn: ZooState | None = None
        self.param.recipe.objects = list(session.runs("hyper_align"))
        self._offer()
        ways = self.param.model.objects
        with param.parameterized.discard_events(self):
            self.param.update(
                recipe=self._run.recipe["name"],
                model=state.model if state.model in ways else ("search" if "search" in ways else ways[0]),
                against=state.against if state.against in ways else self._run.recipe["reference"],
                pair=self._known(state.text, state.image),
            )
        self._make_parts()
        self._draw()

    def _offer(self) -> None:
        """Offer the ways and the pairs of the shown run."""
        names = [model["name"] for model in self._run.recipe["models"] if model["kind"] != "chance"]
        self.param.model.objects = self.param.against.objects = names
        pairs = self._run.scores.select("text", "image").unique(maintain_order=True).rows()
        self.param.pair.objects = {"the best": _BEST, **{" and ".join(pair): pair for pair in pairs}}

    def _known(self, text: str, image: str) -> tuple[str, str]:
        """Return a pair if the run has it, else none."""
        there = (pl.col("text") == text) & (pl.col("image") == image)
        return (text, image) if self._run.scores.filter(there).height else _BEST

    @param.depends("recipe", watch=True)
    def _other_run(self) -> None:
        self._run = self._session.run(self.recipe, "hyper_align")
        self._offer()
        ways, reference = self.param.model.objects, self._run.recipe["reference"]
        self.param.update(
            model=self.model if self.model in ways else ways[0],
            against=self.against if self.against in ways else reference,
            pair=self._known(*self.pair),
        )
        self._draw()

    def state(self) -> ZooState:
        """Return what is shown as a value for a link."""
        text, image = self.pair
        return ZooState(recipe=self.recipe, model=self.model, against=self.against, text=text, image=image)

    # --- drawing --------------------------------------------------------------------------------------------

    def _make_parts(self) -> None:
        self._map, self._others = FigurePlace(self._click), [FigurePlace() for _ in range(3)]
        self._told, self._ways, self._connector = note(""), TablePlace(), pn.pane.HTML("", visible=False)
        self._table = TablePlace(self._pick, hidden_columns=["row"])
        self._wrong, self._code = pn.Column(sizing_mode="stretch_width"), code_of([])

    def _click(self, event: param.parameterized.Event) -> None:
        """Choose the pair of a cell of the map; the gap above the controls is none."""
        points = (event.new or {}).get("points") or [{}]
        texts, images, controls = pair_axes(self._run.scores, self.against)
        rows = [*images, "", *controls]
        column, row = points[0].get("x"), points[0].get("y")
        if isinstance(row, int) and isinstance(column, int) and row < len(rows) and rows[row]:
            self.pair = texts[column], rows[row]

    def _pick(self, row: int) -> None:
        self.pair = tuple(self.numbers().row(row, named=False)[:2])

    def figures(self) -> list[go.Figure]:
        """Draw the map of all pairs, quality against cost, quality by size, and how far the ways agree."""
        run, models = self._run, self._run.recipe["models"]
        chosen = self.pair if all(self.pair) else None
        return [
            pair_matrix_figure(run.scores, self.model, self.against, chosen),
            cost_figure(run.metrics, models),
            scale_figure(run.scores, models),
            agreement_figure(run.scores, run.metrics, models, run.recipe["reference"]),
        ]

    @param.depends("model", "against", "pair", watch=True)
    def _draw(self) -> None:
        """Draw everything that follows from the controls, once for one state."""
        state = self.state()
        if state == self._drawn:
            return
        with sent_together(pn.state.curdoc):
            try:
                self._draw_pairs(state)
                self._wrong[:] = []
            except WorkbenchError as problem:
                self._wrong[:] = [banner(str(problem))]
        self._drawn = state

    def _draw_pairs(self, state: ZooState) -> None:
        keep_link(state)
        pairs, *others = self.figures()
        self._map.show(pairs)
        only_pair = self._drawn is not None and (
            self._drawn.model_copy(update={"text": state.text, "image": state.image}) == state
        )
        if not only_pair:  # the others do not mark a pair
            for place, figure in zip(self._others, others, strict=True):
                place.show(figure)
        numbers = self.numbers().with_row_index("row")
        self._draw_pair(*(self.pair if all(self.pair) else numbers.select("text", "image").row(0)))
        here = numbers.filter(text=self.pair[0], image=self.pair[1])["row"].to_list()
        made = origin(self._run, self.model, "test split")
        told = {**_MEANINGS, "against": f"the same by {self.against}"}
        self._table.show(numbers, here[0] if here else None, meanings=told, origin=made)
        show_code(self._code, self.code())

    def _draw_pair(self, text: str, image: str) -> None:
        """Show a pair, chosen or the best, by every way, and the way to its connector."""
        what = "Chosen pair" if all(self.pair) else "Best pair"
        self._told.object = f"{what}: {text} and {image}, by every way. Click a cell of the map for another."
        found = pair_by_ways(self._run.scores, text, image)
        self._ways.show(found, meanings=_WAYS, origin=origin(self._run, rows="test split"))
        kept = generating(self._run)
        if kept and pn.state.location is not None:  # else there is no other page to go to
            way = self.model if self.model in kept else kept[0]
            there = pack(WeightsState(recipe=self.recipe, model=way, slot=text, shown=image))
            self._connector.param.update(object=str(_CONNECTOR.format(there, way)), visible=True)

    def numbers(self) -> pl.DataFrame:
        """Return every pair by the shown way and by the other, the best first, controls last."""
        means = pair_means(self._run.scores)
        own, other = (
            means.filter(model=name).select("text", "image", "control", "value")
            for name in (self.model, self.against)
        )
        other = other.select("text", "image", against="value")
        found = own.join(other, on=["text", "image"], how="left", maintain_order="left")
        found = found.with_columns(difference=pl.col("value") - pl.col("against"))
        return found.sort("control", "value", descending=[False, True], maintain_order=True)

    def code(self) -> list[str]:
        """Return notebook code that makes the same figures."""
        state = self.state().model_dump(mode="json", exclude={"version", "app"})
        return [
            "from workbench.session import Session",
            "from workbench.view_state import ZooState",
            "from workbench.views.zoo import ZooView",
            f"view = ZooView(Session(), ZooState(**{state!r}))",
            "for figure in view.figures():",
            "    figure.show()",
        ]

    def content(self) -> list[pn.viewable.Viewable]:
        """Return figures, texts and tables in their order."""
        every = note(_EVERY)
        return [self._map, self._told, self._ways, *self._others, every, self._table]

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out controls, figures and footer; narrow screens stack them."""
        names = ["recipe", "model", "against", "pair"]
        controls = pn.Column(*(pn.widgets.Select.from_param(self.param[one], width=300) for one in names))
        saved = save_button("zoo", lambda: pn.Column(*self.content(), footer(self._run)))
        left = pn.Column(controls, pn.Row(copy_button(), saved), downloads("pairs", self.numbers), self._code)
        top = [banner(f"{self._problem}. The default view is shown.")] if self._problem else []
        drawn, told, ways, *rest = self.content()
        right = pn.Column(self._wrong, drawn, told, self._connector, ways, *rest, sizing_mode="stretch_width")
        last = pn.bind(lambda _: footer(self._run), self.param.recipe)
        return pn.Column(*top, beside(left, right), last, sizing_mode="stretch_width")

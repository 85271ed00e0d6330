"""A zoo's pairs: who fits whom by which way, at which cost, and how far the ways agree."""

import panel as pn
import param
import polars as pl

from workbench.figures_zoo import agreement_figure, cost_figure, pair_matrix_figure, scale_figure
from workbench.session import Session
from workbench.view_state import ZooState
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
    shown,
)
from workbench.views.tables import TablePlace, downloads
from workbench.zoo_scores import pair_means

_MEANINGS = {
    "value": "test recall at 10, mean of both directions and over seeds, 0 to 1",
    "against": "the same by the way that is compared with",
    "difference": "value minus against",
}


class ZooView(pn.viewable.Viewer):
    """A finished run of a zoo, one way at a time beside another."""

    recipe = param.Selector(default=None, objects=[None], doc="Finished runs.")
    model = param.Selector(default=None, objects=[None], doc="The way whose pairs are shown.")
    against = param.Selector(default=None, objects=[None], doc="The way that differences are taken to.")

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
        self.param.recipe.objects = list(session.runs("hyper_align"))
        self._offer()
        ways = self.param.model.objects
        with param.parameterized.discard_events(self):
            self.param.update(
                recipe=self._run.recipe["name"],
                model=state.model if state.model in ways else ("search" if "search" in ways else ways[0]),
                against=state.against if state.against in ways else self._run.recipe["reference"],
            )

    def _offer(self) -> None:
        """Offer the ways of the shown run."""
        names = [model["name"] for model in self._run.recipe["models"] if model["kind"] != "chance"]
        self.param.model.objects = self.param.against.objects = names

    @param.depends("recipe", watch=True)
    def _other_run(self) -> None:
        self._run = self._session.run(self.recipe, "hyper_align")
        self._offer()
        ways = self.param.model.objects
        self.model = self.model if self.model in ways else ways[0]
        self.against = self.against if self.against in ways else self._run.recipe["reference"]

    def state(self) -> ZooState:
        """Return what is shown as a value for a link."""
        return ZooState(recipe=self.recipe, model=self.model, against=self.against)

    @param.depends("recipe", "model", "against")
    def content(self) -> pn.viewable.Viewable:
        """Draw everything that follows from the controls."""
        return shown(self._content)

    def _content(self) -> pn.viewable.Viewable:
        keep_link(self.state())
        run, models = self._run, self._run.recipe["models"]
        figures = [
            pair_matrix_figure(run.scores, self.model, self.against),
            cost_figure(run.metrics, models),
            scale_figure(run.scores, models),
            agreement_figure(run.scores, run.metrics, models, run.recipe["reference"]),
        ]
        panes = [pn.pane.Plotly(figure, sizing_mode="stretch_width") for figure in figures]
        table = TablePlace()
        table.show(self.numbers(), meanings=_MEANINGS, origin=origin(run, self.model, "test split"))
        told = note("Every pair, the best first; controls are no candidates.")
        return pn.Column(*panes, told, table, sizing_mode="stretch_width")

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

    @param.depends("recipe", "model", "against")
    def _code(self) -> pn.viewable.Viewable:
        return code_of(
            [
                "from workbench import find_run",
                "from workbench.figures_zoo import pair_matrix_figure",
                f"run = find_run({self.recipe!r})",
                f"pair_matrix_figure(run.scores, {self.model!r}, {self.against!r})",
            ]
        )

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out controls, figures and footer; narrow screens stack them."""
        controls = pn.Param(self, parameters=["recipe", "model", "against"], show_name=False, width=300)
        saved = save_button("zoo", lambda: pn.Column(self._content(), footer(self._run)))
        left = pn.Column(controls, pn.Row(copy_button(), saved), downloads("pairs", self.numbers), self._code)
        top = [banner(f"{self._problem}. The default view is shown.")] if self._problem else []
        right = pn.Column(self.content, sizing_mode="stretch_width")
        return pn.Column(*top, beside(left, right), footer(self._run), sizing_mode="stretch_width")

"""Look at what a hypernetwork generated from what a person types, and at the connectors of a zoo."""

import panel as pn
import param
import plotly.graph_objects as go

from workbench.errors import RunError
from workbench.figures_images import layer_changes_figure, scale_changes_figure
from workbench.figures_weights import (
    attributes_figure,
    directions_figure,
    distances_figure,
    nearest_figure,
    spectrum_figure,
    tree_figure,
    weight_figure,
)
from workbench.generated import EXAMPLES, PAPERS, Inspected, generating, inspect, inspectable
from workbench.runs import Run
from workbench.session import FIRST, Session
from workbench.view_state import LONGEST_TEXT, WeightsState
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
from workbench.weight_distances import MEASURES

_FIGURES = (
    "matrix", "spectrum", "layers", "scales", "distances", "tree", "nearest", "directions", "attributes",
)  # fmt: skip
_FIRST = {"slot": "the first", "shown": "what is typed, or the first"}  # said of an empty choice
_ASKED = {  # what a kind of run is asked by: label of the first box, of the second, of the slot
    "hyper_cl": ("Condition", "Second condition", "Generated tensor"),
    "hyper_cl_kg": ("Relation", "Second relation", "Generated tensor"),
    "hyper_clip": ("Class names, with commas", "Second set of class names", ""),
    "hyper_align": ("", "", "Text encoder"),
}
_NOTES = {
    "hyper_cl": "A typed condition beside the data's own; directions and attributes are those of the bundled "
    "sentences, and models that pool tokens anew are shown on the plain embeddings.",
    "hyper_cl_kg": "A typed relation beside the graph's own; entities are not loaded.",
    "hyper_clip": "Typed classes beside the class sets of the run's data; numbers before statistics "
    "are fitted to the task.",
    "hyper_align": "Connectors as the run kept them, from one text encoder to every image encoder.",
}
_MEANINGS = {  # of the columns of each table, for the hover
    "": {
        "norm": "Frobenius norm of the generated weight, an added identity left out; 0 or more",
        "distance": "to the one that is shown, by the chosen measure",
        "effective_rank": "exp of the entropy of the singular values' shares, of the matrix as it acts",
        "width": "numbers of an image's features",
        "overlap": "share of the main directions read that both read, 0 to 1",
    },
    "directions": {
        "direction": "number by singular value, from the largest",
        "singular_value": "of the matrix as it acts",
        "before": "share of the bundled sentences' variance along it, 0 to 1",
        "after": "the same after the matrix, 0 to 1",
    },
    "attributes": {
        "before": "share of the variance between the attribute's values, plain encoder, 0 to 1",
        "after": "the same under the condition, 0 to 1",
        "floor": "the same for groups dealt at random",
        "count": "bundled sentences that have the attribute",
    },
    "layers": {
        "mean_absolute": "mean size of the generated changes of the layer's channels, 0 or more",
        "mean": "their mean with sign",
    },
    "distances": {"distance": "between the two, by the chosen measure"},
    "singular values": {"number": "from the largest", "value": "singular value of the matrix as it acts"},
    "matrix": {"row": "direction read", "column": "direction written", "value": "entry as it is drawn"},
}  # fmt: skip


class WeightsView(pn.viewable.Viewer):
    """The weights of one model of a finished run."""

    recipe = param.Selector(default=None, objects=[None], doc="Finished runs that kept weights.")
    model = param.Selector(default=None, objects=[None], doc="Kept models that generate weights.")
    condition = param.String(default="", doc="What the weights are generated from; press Enter.")
    other = param.String(default="", doc="Something to hold beside it; empty for nothing.")
    slot = param.Selector(default="", objects=[""], doc="What is looked at.")
    shown = param.Selector(default="", objects=[""], doc="Whose matrix is drawn, and what is nearest to it.")
    minus_mean = param.Boolean(default=False, doc="Draw what differs from the mean of the known ones.")
    measure = param.Selector(default="", objects=[""], doc="What is meant by distance; said at the top.")
    numbers = param.Selector(default="", objects=[""], doc="Which numbers the table shows.")

    def __init__(self, session: Session, state: WeightsState, problem: str = "") -> None:
        """Build the view.

        Args:
            session: finished runs and models.
            state: what to show.
            problem: with the link, said in the banner.

        Raises:
            RunError: no finished run that kept weights, or not the link's.
        """
        super().__init__()  # first: until then, what is offered here would be offered by every page's view
        self._session, self._problem = session, problem
        self._found: Inspected | None = None
        self._asked: WeightsState | None = None
        self._run = _run_of(session, state.recipe)
        self.param.recipe.objects = list(inspectable(session))
        offered = generating(self._run)
        self.param.model.objects = offered
        for name in (*_FIRST, "measure"):  # what can be chosen is known once the weights are there
            self.param[name].objects = [*dict.fromkeys(["", getattr(state, name)])]
        example = EXAMPLES.get(self._paper, "")
        with param.parameterized.discard_events(self):
            self.param.update(
                recipe=self._run.recipe["name"], model=state.model if state.model in offered else offered[0],
                condition=example if state.condition is None else state.condition, other=state.other,
                slot=state.slot, shown=state.shown, minus_mean=state.minus_mean, measure=state.measure,
            )  # fmt: skip
        self._make_panes()
        self.live = Live(self._work, self._draw, "Generating")
        self._ask()

    @staticmethod
    def prepare(session: Session, state: WeightsState) -> None:
        """Load the model of a state."""
        run = _run_of(session, state.recipe)
        offered = generating(run)
        model = state.model if state.model in offered else offered[0]
        inspect(session, WeightsState(recipe=run.recipe["name"], model=model))

    @property
    def _paper(self) -> str:
        return self._run.recipe["paper"]

    # --- what is asked --------------------------------------------------------------------------------------

    @param.depends("recipe", watch=True)
    def _other_run(self) -> None:
        """Offer the models of the chosen run; a kind of run of its own starts from its example."""
        before, self._run = self._paper, _run_of(self._session, self.recipe)
        offered = generating(self._run)
        self.param.model.objects = offered
        changes = {"model": offered[0], "slot": "", "shown": ""}
        if before != self._paper:
            changes |= {"condition": EXAMPLES.get(self._paper, ""), "other": "", "minus_mean": False}
        self.param.update(**changes)
        self._ask()

    def state(self) -> WeightsState:
        """Return what is shown as a value for a link."""
        names = ("recipe", "model", "condition", "other", "slot", "shown", "minus_mean", "measure")
        return WeightsState(**{name: getattr(self, name) for name in names})

    @param.depends("model", "condition", "other", "slot", "shown", "minus_mean", "measure", watch=True)
    def _ask(self) -> None:
        state = self.state()
        if state != self._asked:  # several controls may have changed for one question
            self._asked = state
            self.live.ask(state)

    def inspected(self) -> Inspected:
        """Generate and measure what is asked for now, for notebooks.

        Raises:
            WorkbenchError: a condition, class names or a run that cannot be used.
        """
        return inspect(self._session, self.state())

    def _work(self, state: WeightsState, _: Job) -> Inspected:
        return inspect(self._session, state)

    # --- drawing --------------------------------------------------------------------------------------------

    def _make_panes(self) -> None:
        self._panes = {name: FigurePlace(flex="1 1 400px", min_width="min(300px, 100%)") for name in _FIGURES}
        self._table = TablePlace()
        self._code = code_of([])
        self._about = note("")

    @staticmethod
    def figures(found: Inspected) -> dict[str, go.Figure]:
        """Draw what there is to draw of some weights, by name."""
        drawn, tables = {}, found.tables
        if found.matrix is not None:
            drawn["matrix"] = weight_figure(found.matrix, f"{found.shown} ({found.slot})")
        if found.spectra:
            drawn["spectrum"] = spectrum_figure(found.spectra)
        if "layers" in tables:
            typed = tables["layers"].filter(set=found.names[0])
            both = tables["layers"].filter(tables["layers"]["set"].is_in(found.names[: max(found.typed, 2)]))
            drawn["layers"] = layer_changes_figure(both if both.height else typed)
            drawn["scales"] = scale_changes_figure(tables["layers"])
        if len(found.names) > 1:
            drawn["distances"] = distances_figure(found.names, found.distances, found.distance)
            drawn["tree"] = tree_figure(found.names, found.distances, found.typed, found.distance)
            drawn["nearest"] = nearest_figure(found.nearest(), found.shown)
        if "directions" in tables:
            drawn["directions"] = directions_figure(tables["directions"], found.shown)
        if "attributes" in tables:
            drawn["attributes"] = attributes_figure(tables["attributes"], found.shown)
        return drawn

    def _draw(self, found: Inspected) -> None:
        self._found = found
        for name, values in (("slot", found.slots), ("shown", found.names)):
            self.param[name].objects = {_FIRST[name]: "", **{value: value for value in values}}
            if getattr(self, name) not in values:
                setattr(self, name, "")
        # The first is what an empty choice means.
        labels = zip(["", *found.measures[1:]], found.measures, strict=True)
        self.param.measure.objects = {MEASURES[name].label: value for value, name in labels}
        if self.measure not in found.measures[1:]:
            self.measure = ""
        self.param.numbers.objects = list(found.tables)
        self.numbers = self.numbers if self.numbers in found.tables else next(iter(found.tables))
        self._fill()
        keep_link(self.state())
        figures = self.figures(found)
        for name, pane in self._panes.items():
            pane.show(figures.get(name))
        self._about.object = f"{_NOTES[self._paper]}\n{MEASURES[found.measure].answers}"
        show_code(self._code, self.code())

    @param.depends("numbers", watch=True)
    def _fill(self) -> None:
        if self._found is not None and self.numbers in self._found.tables:
            meanings = {**_MEANINGS[""], **_MEANINGS.get(self.numbers, {})}
            made = origin(self._run, self.model, kept=True)
            self._table.show(self._found.tables[self.numbers], meanings=meanings, origin=made)

    def code(self) -> list[str]:
        """Return notebook code that makes the same figures."""
        state = self.state().model_dump(mode="json", exclude={"version", "app"})
        return [
            "from workbench.session import Session",
            "from workbench.view_state import WeightsState",
            "from workbench.views.weights import WeightsView",
            f"view = WeightsView(Session(), WeightsState(**{state!r}))",
            "for figure in view.figures(view.inspected()).values():",
            "    figure.show()",
        ]

    def _content(self) -> list[pn.viewable.Viewable]:
        """Return texts, figures and tables in their order."""
        return [self._about, pn.FlexBox(*self._panes.values(), sizing_mode="stretch_width"), self._table]

    def _controls(self, _: str) -> pn.Column:
        """Return the controls that the kind of run asks for."""
        first, second, slot = _ASKED[self._paper]
        made, one = pn.widgets, self.param
        parts = [made.Select.from_param(one.recipe, width=300), made.Select.from_param(one.model, width=300)]
        if first:
            parts += [
                made.TextInput.from_param(one.condition, label=first, max_length=LONGEST_TEXT, width=300),
                made.TextInput.from_param(one.other, label=second, max_length=LONGEST_TEXT, width=300),
            ]
        if slot:
            parts.append(made.Select.from_param(one.slot, label=slot, width=300))
        parts += [made.Select.from_param(self.param[name], width=300) for name in ("shown", "measure")]
        if self._paper in ("hyper_cl", "hyper_cl_kg"):
            parts.append(made.Checkbox.from_param(one.minus_mean, label="minus the mean of the known"))
        return pn.Column(*parts)

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out controls, figures, table and footer; narrow screens stack them."""
        saved = save_button("weights", lambda: pn.Column(*self._content(), footer(self._run)))
        numbers = downloads("weights", lambda: self._found and self._found.tables[self.numbers])
        left = pn.Column(
            pn.bind(self._controls, self.param.recipe), pn.Row(copy_button(), saved), self._code,
            pn.widgets.Select.from_param(self.param.numbers, width=300), numbers,
        )  # fmt: skip
        top = [banner(f"{self._problem}. The default view is shown.")] if self._problem else []
        right = pn.Column(self.live, *self._content(), sizing_mode="stretch_width")
        last = pn.bind(lambda _: footer(self._run), self.param.recipe)
        return pn.Column(*top, beside(left, right), last, sizing_mode="stretch_width")


def _run_of(session: Session, recipe: str) -> Run:
    """Return a run whose weights can be looked at.

    Raises:
        RunError: there is none, or not of that recipe.
    """
    found = inspectable(session)
    if not recipe and found:
        recipe = next((name for name in FIRST if name in found), next(iter(found)))
    if recipe and found and recipe not in found:
        raise RunError(
            f"no finished run of {recipe!r} here that kept weights to look at; there are: {', '.join(found)}"
        )
    return found[recipe] if found else session.run(recipe, *PAPERS)

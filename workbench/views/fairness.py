"""Differences between groups: accuracy on images by group, and associations of words under a condition."""

import panel as pn
import param
import plotly.graph_objects as go
import polars as pl

from workbench.datasets import stimuli
from workbench.errors import DataError, RunError, WorkbenchError
from workbench.figures_fairness import (
    association_figure,
    distance_figure,
    group_accuracy_figure,
    group_difference_figure,
    preference_figure,
)
from workbench.group_sides import (
    ALL_SETS,
    DIFFERENCES,
    TO_BEST,
    TO_OTHER,
    TO_OVERALL,
    Side,
    Sides,
    compare_groups,
    model_names,
    set_names,
)
from workbench.groups import fair_columns
from workbench.rewording import Reworded, blends, compare_wordings, pictures_of, rewordable
from workbench.runs import Run
from workbench.session import FIRST_MODELS, Session, reads_text
from workbench.tables import last_split
from workbench.text_bias import Associations, associations
from workbench.view_state import LONGEST_TEXT, FairnessState
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
from workbench.views.tables import TablePlace, compact, downloads

ABOUT = {"models": "images", "class names": "wording", "sentences": "texts"}
NO_OTHER = "no other model"
_COLUMNS = {TO_OVERALL: "to_overall", TO_BEST: "to_best", TO_OTHER: "to_other"}


Found = Sides | Reworded | Associations


class FairnessView(pn.viewable.Viewer):
    """Two models, or two wordings, by group of images; or a sentence encoder plain and under a condition."""

    about = param.Selector(default="images", objects=ABOUT, doc="What is compared: by what changes.")
    recipe = param.Selector(default=None, objects=[None], doc="A: a finished run.")
    model = param.Selector(default=None, objects=[None], doc="A: one of its models.")
    other_recipe = param.Selector(default=NO_OTHER, objects=[NO_OTHER], doc="B: a run, the same or another.")
    other_model = param.Selector(default=None, objects=[None], doc="B: one of its models.")
    column = param.Selector(default=None, objects=[None], doc="What the images are grouped by.")
    asked = param.Selector(default=ALL_SETS, objects=[ALL_SETS], doc="The class set that was asked.")
    difference = param.Selector(default=TO_OVERALL, objects=list(DIFFERENCES), doc="What it is taken to.")
    names = param.String(default="", doc="The set's classes in its order; one per line, or with commas.")
    templates = param.String(default="", doc="Words around a name, one per line; {} stands for it.")
    text_recipe = param.Selector(default=None, objects=[None], doc="A finished run of conditioned sentences.")
    text_model = param.Selector(default=None, objects=[None], doc="Its model.")
    tests = param.Selector(default=None, objects=[None], doc="Words and sentences that are asked.")
    condition = param.String(default="The profession.", doc="What to look at; press Enter.")
    strength = param.Number(default=1.0, bounds=(0, 2), step=0.05, doc="0: plain encoder, 1: the model.")

    def __init__(self, session: Session, state: FairnessState, problem: str = "") -> None:
        """Build the view.

        Args:
            session: finished runs and models.
            state: what to show.
            problem: with the link, said in the banner.

        Raises:
            RunError: no finished run of either kind, or none of the link's recipe.
        """
        super().__init__()  # first: until then, what is offered here would be offered by every page's view
        self._session, self._problem = session, problem
        self._stimuli: stimuli.Stimuli | None = None  # of a table of one's own
        self._own = ""
        self._start = {"names": "", "templates": ""}  # the class set's own words, once they are known
        self._asked: FairnessState | None = None
        self._images, self._texts = session.runs("hyper_clip"), session.runs("hyper_cl")
        about = state.about if (self._texts if state.about == "texts" else self._images) else ""
        about = about or ("images" if self._images else "texts")
        values = {name: getattr(state, name) for name in ("names", "templates", "condition", "strength")}
        if self._images or not self._texts:
            asked = state.model_copy(update={"about": about})
            values |= self._of_images(asked, session.run(state.recipe, "hyper_clip"))
        if self._texts:
            values |= self._of_texts(state)
        with param.parameterized.discard_events(self):
            self.param.update(about=about, **values)
        self._offered = self._choices()
        self._make_panes()
        self.live = Live(self._work, self._draw, "Measuring")
        self._ask()

    @staticmethod
    def prepare(session: Session, state: FairnessState) -> None:
        """Load what a state needs: the model of one about texts, the pictures of one about wording."""
        if state.about == "wording":
            run = session.run(state.recipe, "hyper_clip")
            session.model(run, last_split(run.metrics), pictures_of)
        if state.about == "texts":
            run = session.run(state.text_recipe, "hyper_cl")
            names = [name for name in run.models() if reads_text(run, name)]
            session.model(run, _chosen(state.text_model, names, *FIRST_MODELS))

    def _of_images(self, state: FairnessState, run: Run) -> dict[str, str]:
        """Offer what image runs hold, and choose from it."""
        self.param.recipe.objects = list(self._images)
        self.param.other_recipe.objects = [NO_OTHER, *self._images]
        other = self._images.get(state.other_recipe)
        if other is None and not state.recipe:  # first seen beside the plain baseline
            other = run
        words = state.about == "wording"  # of a model whose weights are there, and of one class set at a time
        models, others = model_names(run), model_names(other) if other else [None]
        models = (run.models() if words else models) or [None]
        columns, sets = self._shared(run, None if words else other)
        column, sets = _chosen(state.column, columns), [ALL_SETS, *sets]
        sets = (rewordable(run, column) if words else sets) or [ALL_SETS]
        hyper = [model["name"] for model in run.recipe["models"] if model["kind"] == "hyper"]
        self.param.model.objects, self.param.other_model.objects = models, others
        self.param.column.objects, self.param.asked.objects = columns, sets
        return {
            "recipe": run.recipe["name"], "model": _chosen(state.model, models, *hyper),
            "other_recipe": other.recipe["name"] if other else NO_OTHER,
            "other_model": _chosen(state.other_model, others, run.recipe["reference"]),
            "column": column, "asked": _chosen(state.asked, sets),
            "difference": _chosen(state.difference, list(DIFFERENCES)),
        }  # fmt: skip

    @staticmethod
    def _shared(run: Run, other: Run | None) -> tuple[list[str], list[str]]:
        """Return the group columns and class sets that both runs have.

        Raises:
            RunError: they share no group column.
        """
        columns, sets = fair_columns(run), set_names(run)
        if other is not None:
            columns = [name for name in columns if name in fair_columns(other)]
            sets = [name for name in sets if name in set_names(other)]
        if not columns:
            runs = [run] if other is None else [run, other]
            told = [f"{one.folder.name} ({', '.join(fair_columns(one)) or 'none'})" for one in runs]
            raise RunError(f"no group column to compare by in {' and '.join(told)}; choose another run")
        return columns, sets

    def _of_texts(self, state: FairnessState) -> dict[str, str]:
        """Offer the models that read a condition, and choose one."""
        run = self._session.run(state.text_recipe, "hyper_cl")
        self.param.text_recipe.objects = list(self._texts)
        models = [name for name in run.models() if reads_text(run, name)]
        self.param.text_model.objects = models
        self.param.tests.objects = offered = stimuli.stimuli_names()
        return {
            "tests": _chosen(state.tests, offered),
            "text_recipe": run.recipe["name"],
            "text_model": _chosen(state.text_model, models, *FIRST_MODELS),
        }

    def _choices(self) -> tuple[str | None, ...]:
        """Return what decides on what else can be chosen."""
        return self.about, self.recipe, self.other_recipe, self.column, self.text_recipe

    @param.depends("about", "recipe", "other_recipe", "column", "text_recipe", watch=True)
    def _offer(self) -> None:
        """Offer what the chosen runs have; one update, so that one request is made."""
        if self._choices() == self._offered:
            return
        state, values = self.state(), {}
        try:
            if self.recipe:
                values |= self._of_images(state, self._session.run(self.recipe, "hyper_clip"))
            if self.text_recipe:
                values |= self._of_texts(state)
        except WorkbenchError as problem:
            self._offered = self._asked = None  # whatever is chosen next is asked anew
            self.live.ask(problem)
            return
        with param.parameterized.discard_events(self):
            self.param.update(**values)
        self._offered = self._choices()
        self.param.trigger(*values)

    def state(self) -> FairnessState:
        """Return what is shown as a value for a link; a class set's own words are no part of it."""
        names = [name for name in FairnessState.model_fields if name not in ("version", "app", "strength")]
        values = {name: getattr(self, name) or "" for name in names}
        values |= {name: "" for name, own in self._start.items() if values[name] == own}
        return FairnessState(**values, strength=self.strength)

    @param.depends(
        "about", "model", "other_model", "column", "asked", "difference", "names", "templates", "text_model",
        "tests", "condition", "strength", watch=True,
    )  # fmt: skip
    def _ask(self) -> None:
        before, state = self._asked, self.state()
        if before is not None and before.asked != state.asked:  # another class set starts from its own words
            state = state.model_copy(update={"names": "", "templates": ""})
            self._asked = state
            self.param.update(names="", templates="")
        if before != state:  # several controls may have changed for one question
            self._asked = state
            self.live.ask(state)

    def upload(self, files: dict[str, bytes | str]) -> None:
        """Take a table of bias tests of a person's own; none brings the chosen ones back."""
        for name, raw in files.items():
            try:
                content = raw.encode() if isinstance(raw, str) else raw
                self._stimuli, self._own = stimuli.read_stimuli(content, name[:80]), name[:80]
            except DataError as problem:
                self.live.ask(problem)
                return
        if not files:
            self._stimuli, self._own = None, ""
        self.live.ask(self.state())

    def measured(self) -> Found:
        """Compute what is asked for now, for notebooks.

        Raises:
            WorkbenchError: a run, model, class set or condition that cannot be used.
        """
        return self._work(self.state(), Job(lambda _: None))

    def _work(self, state: FairnessState | WorkbenchError, job: Job) -> Found:
        if isinstance(state, WorkbenchError):
            raise state
        if state.about == "images":
            return compare_groups(self._sides(state), state.column, state.asked or ALL_SETS)
        if state.about == "wording":
            return compare_wordings(self._session, state)
        run = self._session.run(state.text_recipe, "hyper_cl")
        model, name = self._session.model(run, state.text_model), self._own or state.tests
        asked = self._stimuli or stimuli.named_stimuli(state.tests)
        told = job.told(len(asked.tests))
        return associations(model, asked, name, state.condition, state.strength, told)

    def _sides(self, state: FairnessState) -> list[Side]:
        """Return the one or two models of a state."""
        chosen = [(state.recipe, state.model), (state.other_recipe, state.other_model)]
        return [
            Side(self._session.run(recipe, "hyper_clip"), model)
            for recipe, model in chosen
            if recipe in self._images
        ]

    def _make_panes(self) -> None:
        self._panes = [FigurePlace(flex="1 1 420px", min_width="min(300px, 100%)") for _ in range(2)]
        self._said, self._limits, self._measured = note(""), note(""), None
        self._tables, self._code = [TablePlace(), TablePlace()], code_of([])
        self._footer = pn.Column(sizing_mode="stretch_width")

    def figures(self, measured: Found) -> list[go.Figure]:
        """Draw what was measured: accuracies and differences, or effect sizes and preferences."""
        if isinstance(measured, Associations):
            tests = [association_figure(measured.tests)] if measured.tests.height else []
            draw = distance_figure if measured.asked.twins.height else preference_figure
            return tests + ([draw(measured.pairs)] if measured.pairs.height else [])
        sides, name, to = measured, _COLUMNS[self.difference], self.difference
        if reworded := isinstance(measured, Reworded):
            sides, name, to = measured.sides, _COLUMNS[TO_OTHER], "the wording of the run"
        found = [group_accuracy_figure(sides.rows, self.column, sides.smallest)]
        rows = sides.rows.filter(side="B") if reworded else sides.rows
        if rows[name].drop_nulls().len():
            found.append(group_difference_figure(rows, name, to, sides.smallest))
        return found

    def _draw(self, measured: Found) -> None:
        self._measured = measured
        if isinstance(measured, Reworded):  # the set's own words are where a person starts from
            plain = measured.plain
            self._start = {"names": "\n".join(plain.names), "templates": "\n".join(plain.templates)}
            missing = {name: own for name, own in self._start.items() if not getattr(self, name).strip()}
            self.param.update(**missing)
        keep_link(self.state())
        figures = self.figures(measured)
        for place, pane in enumerate(self._panes):
            pane.show(figures[place] if place < len(figures) else None)
        lines = measured.said()
        if isinstance(measured, Sides) and self.difference == TO_OTHER and measured.totals.height < 2:
            lines.append("There is no other model to take differences to; choose a run for B.")
        self._said.object, self._limits.object = "\n".join(lines), measured.limits
        texts = isinstance(measured, Associations)
        run = self._session.run(self.text_recipe, "hyper_cl") if texts else self._images[self.recipe]
        model = self.text_model if texts else self.model if isinstance(measured, Reworded) else ""
        made = origin(run, model, kept=bool(model))
        if isinstance(measured, Sides):
            made = "; ".join(origin(one.run, one.model) for one in self._sides(self.state()))
        # Of the differences, the one that is asked for; downloads hold all.
        apart = tuple(name for to, name in _COLUMNS.items() if to != self.difference)
        for table, whole in zip(self._tables, measured.tables, strict=True):
            frame = whole.select(~pl.selectors.starts_with(*apart)) if isinstance(measured, Sides) else whole
            table.show(compact(frame), meanings=measured.meanings, origin=made)
            table.visible = not frame.is_empty()
        self._footer[:] = [footer(run)]
        two = self.about == "images" and self.other_recipe in self._images
        if two and self.other_recipe != self.recipe:
            self._footer.append(footer(self._images[self.other_recipe]))
        show_code(self._code, self.code())

    def code(self) -> list[str]:
        """Return notebook code that makes the same figures."""
        state = self.state().model_dump(mode="json", exclude={"version", "app"})
        return [
            "from workbench.session import Session",
            "from workbench.view_state import FairnessState",
            "from workbench.views.fairness import FairnessView",
            f"view = FairnessView(Session(), FairnessState(**{state!r}))",
            *(["# view.upload({name: bytes}): a table of your own is in no link"] if self._own else []),
            "for figure in view.figures(view.measured()):",
            "    figure.show()",
        ]

    def content(self) -> list[pn.viewable.Viewable]:
        """Return texts, figures and tables in their order."""
        both = pn.FlexBox(*self._panes, sizing_mode="stretch_width", align_items="flex-start")
        return [self._said, both, self._limits, *self._tables, self._footer]

    def _numbers(self) -> pl.DataFrame | None:
        """Return all numbers of the first table shown, those of other differences included."""
        return self._measured and next(table for table in self._measured.tables if not table.is_empty())

    def _controls(self) -> pn.Column:
        made, texts = pn.widgets, self.param

        def only(*abouts: str) -> object:
            return pn.bind(lambda one: one in abouts, self.param.about)

        def select(name: str, label: str, *abouts: str) -> pn.widgets.Select:
            return made.Select.from_param(texts[name], label=label, width=300, visible=only(*abouts))

        def words(name: str, label: str, rows: int) -> pn.widgets.TextAreaInput:
            told = {"label": label, "rows": rows, "max_length": LONGEST_TEXT, "width": 300}
            return made.TextAreaInput.from_param(texts[name], visible=only("wording"), **told)

        files = made.FileInput(accept=".csv", width=300)
        files.param.watch(
            lambda event: self.upload({files.filename: event.new} if event.new else {}), "value"
        )
        told = (
            "Your own tests: a CSV with test, role, text, or with context, stereotypical, antistereotypical."
        )
        scaled = pn.bind(
            lambda about, model: about == "texts" or (about == "wording" and self._blends(model)),
            self.param.about, self.param.model,
        )  # fmt: skip
        both = ("images", "wording")
        return pn.Column(
            made.RadioButtonGroup.from_param(self.param.about, width=300),
            select("recipe", "Run", *both), select("model", "Model", *both),
            select("other_recipe", "B: run", "images"), select("other_model", "B: model", "images"),
            select("column", "Groups by", *both), select("asked", "Class set", *both),
            select("difference", "Difference to", "images"),
            words("names", "Class names, in the set's order", 6), words("templates", "Templates", 3),
            select("text_recipe", "Run", "texts"), select("text_model", "Model", "texts"),
            select("tests", "Bias tests", "texts"),
            made.TextInput.from_param(
                self.param.condition, max_length=LONGEST_TEXT, width=300, visible=only("texts")
            ),
            made.FloatSlider.from_param(self.param.strength, width=300, visible=scaled),
            pn.Column(note(told), files, visible=only("texts")),
        )  # fmt: skip

    def _blends(self, model: str | None) -> bool:
        return self.recipe in self._images and blends(self._images[self.recipe], model or "")

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out controls, figures and footer; narrow screens stack them."""
        saved = save_button("fairness", lambda: pn.Column(*self.content()))
        numbers = downloads("fairness", self._numbers)
        left = pn.Column(self._controls(), pn.Row(copy_button(), saved), numbers, self._code)
        top = [banner(f"{self._problem}. The default view is shown.")] if self._problem else []
        right = pn.Column(self.live, *self.content(), sizing_mode="stretch_width")
        return pn.Column(*top, beside(left, right), sizing_mode="stretch_width")


def _chosen(wanted: str, offered: list, *first: str) -> str | None:
    """Return what is wanted if it is offered, else the first choice that is."""
    return next((one for one in (wanted, *first) if one in offered), offered[0])

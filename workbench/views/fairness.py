"""Differences between groups: accuracy on images by group, and associations of words under a condition."""

from dataclasses import dataclass

import panel as pn
import param
import plotly.graph_objects as go
import polars as pl

from workbench.datasets import stimuli
from workbench.errors import DataError, RunError, WorkbenchError
from workbench.figures_fairness import (
    association_figure,
    group_accuracy_figure,
    group_difference_figure,
    preference_figure,
)
from workbench.group_sides import (
    ALL_SETS,
    DIFFERENCES,
    LIMITS,
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
from workbench.runs import Run
from workbench.session import FIRST_MODELS, Session, reads_text
from workbench.text_bias import CANNOT, association_rows, change_said, preference_rows
from workbench.view_state import FairnessState
from workbench.views.live import Job, Live
from workbench.views.page import banner, beside, code_of, copy_button, footer, keep_link, note, save_button
from workbench.views.tables import downloads, fill, table_of

ABOUT = {"images by group": "images", "texts under a condition": "texts"}
NO_OTHER = "no other model"
_COLUMNS = {TO_OVERALL: "to_overall", TO_BEST: "to_best", TO_OTHER: "to_other"}


@dataclass(frozen=True)
class Associations:
    """Both bias tests of an encoder; a table of one's own may hold only one of them."""

    tests: pl.DataFrame
    pairs: pl.DataFrame


class FairnessView(pn.viewable.Viewer):
    """Two models by group of images, or a sentence encoder plain and under a condition."""

    about = param.Selector(default="images", objects=ABOUT, doc="What differences are looked for.")
    recipe = param.Selector(default=None, objects=[None], doc="A: a finished run.")
    model = param.Selector(default=None, objects=[None], doc="A: one of its models.")
    other_recipe = param.Selector(default=NO_OTHER, objects=[NO_OTHER], doc="B: a run, the same or another.")
    other_model = param.Selector(default=None, objects=[None], doc="B: one of its models.")
    column = param.Selector(default=None, objects=[None], doc="What the images are grouped by.")
    asked = param.Selector(default=ALL_SETS, objects=[ALL_SETS], doc="The class set that was asked.")
    difference = param.Selector(default=TO_OVERALL, objects=list(DIFFERENCES), doc="What it is taken to.")
    text_recipe = param.Selector(default=None, objects=[None], doc="A finished run of conditioned sentences.")
    text_model = param.Selector(default=None, objects=[None], doc="Its model.")
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
        self._session, self._problem = session, problem
        self._stimuli, self._own = stimuli.bundled_stimuli(), ""
        self._images, self._texts = session.runs("hyper_clip"), session.runs("hyper_cl")
        about = state.about if (self._images if state.about == "images" else self._texts) else ""
        about = about or ("images" if self._images else "texts")
        values = {"about": about, "condition": state.condition, "strength": state.strength}
        if self._images or not self._texts:
            values |= self._of_images(state, session.run(state.recipe, "hyper_clip"))
        if self._texts:
            values |= self._of_texts(state)
        super().__init__(**values)
        self._make_panes()
        self._live = Live(self._work, self._draw, "Measuring").ask(self.state())

    @staticmethod
    def prepare(session: Session, state: FairnessState) -> None:
        """Load the model of a state that is about texts."""
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
        models, others = model_names(run), model_names(other) if other else [None]
        columns, sets = self._shared(run, other)
        hyper = [model["name"] for model in run.recipe["models"] if model["kind"] == "hyper"]
        self.param.model.objects, self.param.other_model.objects = models, others
        self.param.column.objects, self.param.asked.objects = columns, [ALL_SETS, *sets]
        return {
            "recipe": run.recipe["name"], "model": _chosen(state.model, models, *hyper),
            "other_recipe": other.recipe["name"] if other else NO_OTHER,
            "other_model": _chosen(state.other_model, others, run.recipe["reference"]),
            "column": _chosen(state.column, columns), "asked": _chosen(state.asked, [ALL_SETS, *sets]),
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
            raise RunError(f"{run.folder.name} has no group column to compare by; choose another run")
        return columns, sets

    def _of_texts(self, state: FairnessState) -> dict[str, str]:
        """Offer the models that read a condition, and choose one."""
        run = self._session.run(state.text_recipe, "hyper_cl")
        self.param.text_recipe.objects = list(self._texts)
        models = [name for name in run.models() if reads_text(run, name)]
        self.param.text_model.objects = models
        return {
            "text_recipe": run.recipe["name"],
            "text_model": _chosen(state.text_model, models, *FIRST_MODELS),
        }

    @param.depends("recipe", "other_recipe", "text_recipe", watch=True)
    def _offer(self) -> None:
        """Offer what the chosen runs have; one update, so that one request is made."""
        state, values = self.state(), {}
        try:
            if self.recipe:
                values |= self._of_images(state, self._session.run(self.recipe, "hyper_clip"))
            if self.text_recipe:
                values |= self._of_texts(state)
        except WorkbenchError as problem:
            self._live.ask(problem)
            return
        with param.parameterized.discard_events(self):
            self.param.update(**values)
        self.param.trigger("model", "other_model", "column", "asked", "text_model")

    def state(self) -> FairnessState:
        """Return what is shown as a value for a link."""
        names = [name for name in FairnessState.model_fields if name not in ("version", "app")]
        return FairnessState(**{name: getattr(self, name) or "" for name in names if name != "strength"},
                             strength=self.strength)  # fmt: skip

    @param.depends(
        "about", "model", "other_model", "column", "asked", "difference", "text_model", "condition",
        "strength", watch=True,
    )  # fmt: skip
    def _ask(self) -> None:
        self._live.ask(self.state())

    def upload(self, files: dict[str, bytes | str]) -> None:
        """Take a table of bias tests of a person's own; none brings the bundled ones back."""
        for name, raw in files.items():
            try:
                content = raw.encode() if isinstance(raw, str) else raw
                self._stimuli, self._own = stimuli.read_stimuli(content, name[:80]), name[:80]
            except DataError as problem:
                self._live.ask(problem)
                return
        if not files:
            self._stimuli, self._own = stimuli.bundled_stimuli(), ""
        self._ask()

    def measured(self) -> Sides | Associations:
        """Compute what is asked for now, for notebooks.

        Raises:
            WorkbenchError: a run, model, class set or condition that cannot be used.
        """
        return self._work(self.state(), Job(lambda _: None))

    def _work(self, state: FairnessState | WorkbenchError, job: Job) -> Sides | Associations:
        if isinstance(state, WorkbenchError):
            raise state
        if state.about == "images":
            return compare_groups(self._sides(state), state.column, state.asked or ALL_SETS)
        run = self._session.run(state.text_recipe, "hyper_cl")
        model, asked = self._session.model(run, state.text_model), self._stimuli
        tests = association_rows(model, asked.tests, state.condition, state.strength)
        if job.stopped or asked.pairs.is_empty():
            return Associations(tests, pl.DataFrame())
        return Associations(tests, preference_rows(model, asked.pairs, state.condition, state.strength))

    def _sides(self, state: FairnessState) -> list[Side]:
        """Return the one or two models of a state."""
        chosen = [(state.recipe, state.model), (state.other_recipe, state.other_model)]
        return [
            Side(self._session.run(recipe, "hyper_clip"), model)
            for recipe, model in chosen
            if recipe in self._images
        ]

    def _make_panes(self) -> None:
        flex = {"flex": "1 1 420px", "min-width": "min(300px, 100%)"}
        self._panes = [
            pn.pane.Plotly(sizing_mode="stretch_width", visible=False, styles=flex) for _ in range(2)
        ]
        self._said, self._limits = note(""), note("")
        self._tables = [table_of(), table_of()]
        for table in self._tables:  # wide ones scroll by themselves on a phone
            table.layout = "fit_data_stretch"
        self._code = pn.Column(sizing_mode="stretch_width")
        self._footer = pn.Column(sizing_mode="stretch_width")

    def figures(self, measured: Sides | Associations) -> list[go.Figure]:
        """Draw what was measured: accuracies and differences, or effect sizes and preferences."""
        if isinstance(measured, Associations):
            tests = [association_figure(measured.tests)] if measured.tests.height else []
            return tests + ([preference_figure(measured.pairs)] if measured.pairs.height else [])
        found = [group_accuracy_figure(measured.rows, self.column, measured.smallest)]
        name = _COLUMNS[self.difference]
        if measured.rows[name].drop_nulls().len():
            found.append(group_difference_figure(measured.rows, name, self.difference, measured.smallest))
        return found

    def _draw(self, measured: Sides | Associations) -> None:
        keep_link(self.state())
        figures = self.figures(measured)
        for place, pane in enumerate(self._panes):
            if place < len(figures):
                pane.object = figures[place]
            pane.visible = place < len(figures)
        texts = isinstance(measured, Associations)
        tables = (measured.tests, measured.pairs) if texts else (measured.rows, measured.totals)
        self._said.object = self._about_texts(measured) if texts else self._about_images(measured)
        self._limits.object = (
            f"{stimuli.LIMITS if not self._own else ''} {CANNOT}".strip() if texts else LIMITS
        )
        for table, frame in zip(self._tables, tables, strict=True):
            fill(table, _compact(frame))
            table.visible = not frame.is_empty()
        run = self._session.run(self.text_recipe, "hyper_cl") if texts else self._images[self.recipe]
        self._footer[:] = [footer(run)]
        if not texts and self.other_recipe in self._images and self.other_recipe != self.recipe:
            self._footer.append(footer(self._images[self.other_recipe]))
        self._code[:] = [code_of(self.code())]

    def _about_images(self, found: Sides) -> str:
        """Say what the numbers say, without making one of them."""
        lines = []
        for row in found.totals.to_dicts():
            if row["gap"] is None:
                lines.append(
                    f"{row['side']}: fewer than two groups have {found.smallest} images, so none is worst."
                )
                continue
            chance = "more than" if row["gap"] > row["random_high"] else "no more than"
            lines += [
                f"{row['side']}: {row['name']}, {row['images']:,} images, {row['seeds']} seeds. Overall "
                f"{row['overall']:.3f} ({row['low']:.3f} to {row['high']:.3f}).",
                f"{row['side']}: worst judged group {row['worst']}, {row['worst_value']:.3f}. Best minus "
                f"worst: {row['gap']:.3f}, {chance} groups drawn at random have (mean "
                f"{row['random_gap']:.3f}, 95 % below {row['random_high']:.3f}).",
            ]
        few = found.rows.filter(~pl.col("judged"))["group"].unique(maintain_order=True).to_list()
        if few:
            lines.append(
                f"Fewer than {found.smallest} images, drawn hollow and not judged: {', '.join(few)}."
            )
        if found.totals.height > 1 and not found.paired:
            lines.append(
                "The two runs were asked different questions or images: no difference between them is taken."
            )
        elif self.difference == TO_OTHER and found.totals.height < 2:
            lines.append("There is no other model to take differences to; choose a run for B.")
        return "\n".join(lines)

    def _about_texts(self, found: Associations) -> str:
        """Say for every test whether the condition adds bias."""
        name = f"the table {self._own}" if self._own else "the bundled words"
        lines = [
            f"Does {self.condition!r} at strength {self.strength:g} add bias? Effect sizes of {name}, "
            "plain to conditioned:"
        ]
        says = {test.name: test for test in self._stimuli.tests}
        if found.tests.height:
            for test, line in zip(
                found.tests["test"].unique(maintain_order=True), change_said(found.tests), strict=True
            ):
                lines.append(f"· {line}. {says[test].kind.capitalize()}: {says[test].says}")
            lines.append(
                "A condition that loses the sanity check too has removed no bias: it tells no words apart."
            )
        if found.pairs.height:
            lines.append(
                "Share of pairs whose stereotypical sentence is nearer to the context, 0.5: no preference:"
            )
            lines += [f"· {line}." for line in change_said(found.pairs, "share", 0.5)]
        return "\n".join(lines)

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

    def _numbers(self) -> pl.DataFrame:
        """Return what the first table shows, with all its digits."""
        found = self.measured()
        return found.rows if isinstance(found, Sides) else found.tests if found.tests.height else found.pairs

    def _controls(self) -> pn.Column:
        made = pn.widgets

        def only(about: str) -> object:
            return pn.bind(lambda one: one == about, self.param.about)

        def select(name: str, label: str) -> pn.widgets.Select:
            about = "texts" if name.startswith("text_") else "images"
            return made.Select.from_param(self.param[name], label=label, width=300, visible=only(about))

        files = made.FileInput(accept=".csv", width=300)
        files.param.watch(
            lambda event: self.upload({files.filename: event.new} if event.new else {}), "value"
        )
        told = (
            "Your own tests: a CSV with test, role, text, or with context, stereotypical, antistereotypical."
        )
        images = {
            "recipe": "A: run", "model": "A: model", "other_recipe": "B: run", "other_model": "B: model",
            "column": "Groups by", "asked": "Class set", "difference": "Difference to",
        }  # fmt: skip
        return pn.Column(
            made.RadioButtonGroup.from_param(self.param.about, width=300),
            *(select(name, label) for name, label in images.items()),
            select("text_recipe", "Run"), select("text_model", "Model"),
            made.TextInput.from_param(self.param.condition, width=300, visible=only("texts")),
            made.FloatSlider.from_param(self.param.strength, width=300, visible=only("texts")),
            pn.Column(note(told), files, visible=only("texts")),
        )  # fmt: skip

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out controls, figures and footer; narrow screens stack them."""
        saved = save_button("fairness", lambda: pn.Column(*self.content()))
        numbers = downloads("fairness", self._numbers)
        left = pn.Column(self._controls(), pn.Row(copy_button(), saved), numbers, self._code)
        top = [banner(f"{self._problem}. The default view is shown.")] if self._problem else []
        right = pn.Column(self._live, *self.content(), sizing_mode="stretch_width")
        return pn.Column(*top, beside(left, right), sizing_mode="stretch_width")


def _compact(frame: pl.DataFrame) -> pl.DataFrame:
    """Write every value and its interval into one cell, so that a table fits a page."""
    intervals = {"low": ("value", "effect", "share", "overall")}
    intervals |= {name: (name.removesuffix("_low"),) for name in frame.columns if name.endswith("_low")}
    for low, values in intervals.items():
        for value in (one for one in values if one in frame.columns and low in frame.columns):
            ends = [pl.col(one).round(3) for one in (value, low, low.replace("low", "high"))]
            frame = frame.with_columns(pl.format("{} ({} to {})", *ends).fill_null("").alias(value))
    frame = frame.select(
        ~(pl.selectors.ends_with("_low", "_high") | pl.selectors.by_name("low", "high", require_all=False))
    )
    hidden = ("name", "exact", "seeds")
    return frame.select(pl.exclude(hidden)).rename(lambda name: name.replace("_", " "))


def _chosen(wanted: str, offered: list, *first: str) -> str | None:
    """Return what is wanted if it is offered, else the first choice that is."""
    return next((one for one in (wanted, *first) if one in offered), offered[0])

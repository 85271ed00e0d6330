"""Type class names and get a classifier: its answers beside an unadapted one's, and an export."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import panel as pn
import param
import plotly.graph_objects as go
import polars as pl
from PIL import Image, ImageOps

from workbench.datasets.samples import (
    MOST_BYTES,
    MOST_FILES,
    OWN,
    SCENES,
    Sample,
    prepared_sample,
    scene_sample,
    sources,
    uploaded_sample,
)
from workbench.errors import DataError
from workbench.figures_images import RIGHT, WRONG, counts_figure, picture_grid
from workbench.predictions import (
    Pair,
    accuracies,
    adapt_both,
    adaptable,
    answers_of,
    archive,
    confusion,
    names_in,
    warnings_of,
)
from workbench.session import Session
from workbench.view_state import LONGEST_TEXT, ClassifyState
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
from workbench.views.tables import TablePlace
from workbench.views.text import Text

SHOWN = 12  # pictures on the page
MOST_DRAWN = 12  # classes of a confusion matrix that still can be read
_FOREIGN = "Pictures of others are not written into a saved page; this data set is not our own."


@dataclass(frozen=True)
class Answered:
    """Two classifiers, pictures, and what they say."""

    state: ClassifyState
    pair: Pair
    sample: Sample
    answers: pl.DataFrame

    def first(self) -> list[int]:
        """Return the pictures to show: those that the two answer differently before the others."""
        differ = (self.answers["adapted"] != self.answers["unadapted"]).to_numpy()
        return np.argsort(~differ, kind="stable")[:SHOWN].tolist()

    def caption(self, row: int) -> str:
        """Say what a picture is and what both classifiers say of it."""
        one = self.answers.row(row, named=True)
        lines = [one["about"]] if one["truth"] in (None, one["about"]) else [f"is {one['truth']}"]
        for side in ("adapted", "unadapted"):
            mark = "" if one["truth"] is None else "✓ " if one[side] == one["truth"] else "✗ "
            lines.append(f"{mark}{side}: {one[side]} ({one[f'{side}_share']:.2f})")
        return "\n".join(lines)

    def summary(self) -> str:
        """Say how long it took, what is compared, and where the pictures come from."""
        lines = [
            f"Classifier for {len(self.pair.adapted.classes)} classes: {self.pair.seconds:.2f} s.",
            f"Unadapted is {self.pair.what}.",
        ]
        differ = (self.answers["adapted"] != self.answers["unadapted"]).sum()
        lines.append(
            f"{len(self.answers)} pictures; the two disagree on {differ}. "
            f"Shown are {min(SHOWN, len(self.answers))}, those they disagree on first; in "
            "brackets the share of the softmax over the classes, 0 to 1."
        )
        if self.sample.left_out:
            lines.append(f"{self.sample.left_out} pictures of other classes were left out.")
        if not self.sample.labelled:
            lines.append(
                "The truth is not known for these names and pictures, so nothing is called right or wrong. "
                "Scenes know colour, shape, texture, count and place: type values of one, or of the same two."
            )
        return "\n".join(lines)


class ClassifyView(pn.viewable.Viewer):
    """A classifier generated from typed class names beside an unadapted one."""

    names = param.String(default="circles, squares", doc="Class names, one per line or with commas between.")
    recipe = param.Selector(default=None, objects=[None], doc="Finished runs of image-text models.")
    model = param.Selector(default=None, objects=[None], doc="The model that generates the classifier.")
    pictures = param.Selector(default=SCENES, objects=[SCENES], doc="What the classifiers are tried on.")
    drawing = param.Integer(default=0, bounds=(0, 9999), doc="Seed of the scenes; another one draws others.")

    def __init__(self, session: Session, state: ClassifyState, problem: str = "") -> None:
        """Build the view.

        Args:
            session: finished runs and models.
            state: what to show.
            problem: with the link, said in the banner.

        Raises:
            RunError: no finished run of image-text models, or one that kept none.
        """
        super().__init__()  # first: until then, what is offered here would be offered by every page's view
        self._session, self._problem, self._files = session, problem, {}
        self._sources = sources()
        self.param.recipe.objects = list(session.runs("hyper_clip"))
        self._run = session.run(state.recipe, "hyper_clip")
        self.param.pictures.objects = list(self._sources)
        offered = self.param.model.objects = adaptable(self._run)
        with param.parameterized.discard_events(self):
            self.param.update(
                names=state.names, recipe=self._run.recipe["name"], drawing=state.drawing,
                model=state.model if state.model in offered else offered[0],
                pictures=state.pictures if state.pictures in self._sources else SCENES,
            )  # fmt: skip
        self._make_panes()
        self._export = Live(self._write, self._offer_archive, "Writing ONNX and checking it against PyTorch")
        self.live = Live(self._work, self._draw, "Generating the classifier").ask(self.state())

    @staticmethod
    def prepare(session: Session, state: ClassifyState) -> None:
        """Load the models of a state."""
        run = session.run(state.recipe, "hyper_clip")
        offered = adaptable(run)
        adapt_both(
            session, run, state.model if state.model in offered else offered[0], ["one thing", "two things"]
        )

    # --- what is asked --------------------------------------------------------------------------------------

    def state(self) -> ClassifyState:
        """Return what is shown as a value for a link."""
        return ClassifyState(
            **{name: getattr(self, name) for name in ("names", "recipe", "model", "pictures", "drawing")}
        )

    @param.depends("recipe", watch=True)
    def _other_run(self) -> None:
        self._run = self._session.run(self.recipe, "hyper_clip")
        offered = self.param.model.objects = adaptable(self._run)
        if self.model in offered:
            self._ask()
        else:
            self.model = offered[0]

    @param.depends("names", "model", "pictures", "drawing", watch=True)
    def _ask(self) -> None:
        self._saved[:] = []
        self._export.clear()
        self.live.ask(self.state())

    def upload(self, files: dict[str, bytes]) -> None:
        """Take pictures of a person's own; they stay in this view and are never written."""
        self._files = dict(files)
        if self.pictures == OWN:
            self._ask()

    def answered(self) -> Answered:
        """Compute what is asked for now, for notebooks.

        Raises:
            WorkbenchError: class names, pictures or a run that cannot be used.
        """
        return self._work(self.state(), Job(lambda _: None))

    def _work(self, state: ClassifyState, job: Job) -> Answered:
        run = self._session.run(state.recipe, "hyper_clip")
        pair = adapt_both(self._session, run, state.model, names_in(state.names))
        sample = self._sample(state, pair)
        return Answered(state, pair, sample, answers_of(pair, sample))

    def _sample(self, state: ClassifyState, pair: Pair) -> Sample:
        """Get the pictures of a state."""
        classes, size = pair.adapted.classes, pair.adapted.source.size
        source = self._sources.get(state.pictures)
        if source == SCENES:
            return scene_sample(classes, size, seed=state.drawing)
        if source == OWN:
            return uploaded_sample(self._files, size)
        if source is None:
            raise DataError(f"no pictures {state.pictures!r} here; there are: {', '.join(self._sources)}")
        return prepared_sample(source, classes, size)

    def _write(self, state: ClassifyState, job: Job) -> tuple[str, bytes]:
        run = self._session.run(state.recipe, "hyper_clip")
        name = f"classifier-{run.recipe['name']}-{state.model}.zip"
        return name, archive(adapt_both(self._session, run, state.model, names_in(state.names)), run)

    # --- drawing --------------------------------------------------------------------------------------------

    def _make_panes(self) -> None:
        self._said, self._warned, self._grid = note(""), pn.Column(), pn.FlexBox(sizing_mode="stretch_width")
        self._table, self._code = TablePlace(), code_of([])
        self._matrices = [FigurePlace(flex="1 1 300px", min_width="min(280px, 100%)") for _ in range(2)]
        self._counted, self._saved = note(""), pn.Column()
        self._shown: Answered | None = None

    def matrices(self, answered: Answered) -> list[go.Figure]:
        """Draw both confusion matrices; empty where the truth is not known or there are too many classes."""
        classes = answered.pair.adapted.classes
        if not answered.sample.labelled or len(classes) > MOST_DRAWN:
            return []
        return [
            counts_figure(
                confusion(answered.answers, side, classes), "truth", "said", f"{side}: pictures by answer"
            )
            for side in ("adapted", "unadapted")
        ]

    def figure(self, answered: Answered) -> go.Figure:
        """Draw the shown pictures with both answers; frames say whether the adapted one is right."""
        rows = answered.first()
        right = (answered.answers["adapted"] == answered.answers["truth"])[rows].to_list()
        return picture_grid(
            answered.sample.pixels[rows], [answered.caption(row) for row in rows], columns=4,
            right=right if answered.sample.labelled else None, title="Adapted and unadapted",
        )  # fmt: skip

    def _draw(self, answered: Answered) -> None:
        keep_link(self.state())
        self._shown = answered
        self._said.object = answered.summary()
        self._warned[:] = [banner(text) for text in self._warnings(answered)]
        self._grid[:] = [_card(answered, row) for row in answered.first()]
        self._table.visible = False
        if answered.sample.labelled:
            made = origin(self._run, self.model, f"{len(answered.answers)} pictures of this page", kept=True)
            told = {"value": "top-1 accuracy on these pictures, 0 to 1, higher is better"}
            self._table.show(accuracies(answered.answers), meanings=told, origin=made)
        figures = self.matrices(answered)
        for pane, figure in zip(self._matrices, figures or [None, None], strict=True):
            pane.show(figure)
        self._counted.object = self._about_accuracy(answered, bool(figures))
        show_code(self._code, self.code())

    def _about_accuracy(self, answered: Answered, drawn: bool) -> str:
        """Say what the table and the matrices show, or why they are not there."""
        if not answered.sample.labelled:
            return ""
        told = (
            "Accuracy on these pictures, 0 to 1, with a 95 % bootstrap over pictures. One model, one seed "
            "and pictures of this page: the run's report has the test."
        )
        return told if drawn else f"{told} More than {MOST_DRAWN} classes: no confusion matrix is drawn."

    def _warnings(self, answered: Answered) -> list[str]:
        """Say where the generated encoder has not helped, and where it was trained on other pictures."""
        said = warnings_of(self._run, answered.state.model)
        scenes, of_scenes = self._run.recipe["data"]["source"] == "scenes", answered.state.pictures == SCENES
        if scenes != of_scenes:
            trained = "scenes drawn by rule" if scenes else "photos"
            said.append(
                f"This model was trained on {trained} only; on other pictures its answers are guesses."
            )
        return said

    def _offer_archive(self, written: tuple[str, bytes]) -> None:
        name, raw = written
        button = pn.widgets.FileDownload(
            callback=lambda: io.BytesIO(raw), filename=name,
            label=f"Download the zip ({len(raw) / 1e6:.1f} MB)", color="primary", width=300,
        )  # fmt: skip
        self._saved[:] = [
            button,
            note("static.onnx, pack.onnx, classes.json and card.json with its numbers."),
        ]

    def code(self) -> list[str]:
        """Return notebook code that makes the same figure."""
        state = self.state().model_dump(mode="json", exclude={"version", "app"})
        return [
            "from workbench.session import Session",
            "from workbench.view_state import ClassifyState",
            "from workbench.views.classify import ClassifyView",
            f"view = ClassifyView(Session(), ClassifyState(**{state!r}))",
            *(
                ["# view.upload({name: bytes}): uploaded pictures are in no link"]
                if self.pictures == OWN
                else []
            ),
            "view.figure(view.answered())",
        ]

    def content(self) -> list[pn.viewable.Viewable]:
        """Return what a saved page holds."""
        answered, parts = self._shown, [self._warned, self._said]
        if answered is not None:
            own = answered.sample.own
            parts.append(pn.pane.Plotly(self.figure(answered)) if own else note(_FOREIGN))
        return [*parts, self._counted, self._table, *self._matrices, footer(self._run)]

    def _controls(self) -> pn.Column:
        made, drawn = pn.widgets, pn.bind(lambda one: one == SCENES, self.param.pictures)
        files = made.FileInput(accept=".png,.jpg,.jpeg", multiple=True, width=300)
        files.param.watch(
            lambda event: self.upload(dict(zip(files.filename or [], event.new or [], strict=True))), "value"
        )
        told = note(
            f"PNG or JPEG, up to {MOST_FILES}, {MOST_BYTES // 10**6} MB together. Kept in memory only."
        )
        shown = pn.bind(lambda one: one == OWN, self.param.pictures)
        write = made.Button(label="Export as ONNX", variant="outline", width=150)
        write.on_click(lambda _: self._export.ask(self.state()))
        return pn.Column(
            made.TextAreaInput.from_param(
                self.param.names, label="Class names", width=300, rows=5, max_length=LONGEST_TEXT
            ),
            *(made.Select.from_param(self.param[one], width=300) for one in ("recipe", "model", "pictures")),
            made.IntInput.from_param(self.param.drawing, width=300, visible=drawn),
            pn.Column(files, told, visible=shown),
            write, self._export, self._saved,
        )  # fmt: skip

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out controls, answers and footer; narrow screens stack them."""
        saved = save_button("classify", lambda: pn.Column(*self.content()))
        left = pn.Column(self._controls(), pn.Row(copy_button(), saved), self._code)
        top = [banner(f"{self._problem}. The default view is shown.")] if self._problem else []
        both = pn.FlexBox(*self._matrices, sizing_mode="stretch_width")
        right = pn.Column(
            self.live, self._warned, self._said, self._grid, self._counted, self._table, both,
            sizing_mode="stretch_width",
        )  # fmt: skip
        last = pn.bind(lambda _: footer(self._run), self.param.recipe)
        return pn.Column(*top, beside(left, right), last, sizing_mode="stretch_width")


def _card(answered: Answered, row: int) -> pn.Column:
    """Show one picture with what both classifiers say of it, as plain text."""
    one = answered.answers.row(row, named=True)
    picture: Any = Image.fromarray(answered.sample.pixels[row].permute(1, 2, 0).contiguous().numpy())
    scale = max(112 // picture.width, 1)
    # Small pictures keep their pixels: what the model sees is what is shown.
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    if one["truth"] is not None:  # a mark in the caption says the same without colour
        picture = ImageOps.expand(
            picture, picture.width // 28, RIGHT if one["adapted"] == one["truth"] else WRONG
        )
    shown = pn.pane.Image(picture, width=112, height=112, alt_text=f"picture {row}")
    text = Text(answered.caption(row), width=158, styles={"font-size": "12px"})
    return pn.Column(shown, text, width=165, margin=(4, 6))

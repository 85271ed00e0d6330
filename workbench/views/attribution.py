"""Which words moved a pair's score: of either sentence and of the condition, followed when a person asks."""

from collections.abc import Sequence
from dataclasses import dataclass

import panel as pn
import plotly.graph_objects as go
import polars as pl

from workbench.errors import DataError
from workbench.figures_pairs import words_figure
from workbench.geometry.attribution import Attribution
from workbench.geometry.text_attribution import WordAttribution
from workbench.runs import Run
from workbench.session import Session
from workbench.views.figure import FigurePlace
from workbench.views.live import Job, Live
from workbench.views.page import note
from workbench.views.tables import downloads

STEPS = 64  # of the integrals
_ABOUT = (
    f"Integrated gradients through encoder, pooling and generated weights, {STEPS} steps, of the model at "
    "strength 1. What the bars of a text add up to is the cosine minus the cosine with that text's words "
    "blanked out; the completeness error is what they miss of it."
)


@dataclass(frozen=True)
class Question:
    """A pair under a condition.

    Attributes:
        run: that kept the model.
        model: its name.
        first: a sentence.
        second: the one it is compared with.
        condition: under which.
    """

    run: Run
    model: str
    first: str
    second: str
    condition: str


Followed = dict[str, tuple[list[str], Attribution]]  # words and what they add, by the text they stand in


class WordsView(pn.viewable.Viewer):
    """A button, and under it the words of a pair and of its condition with what each adds to the cosine."""

    def __init__(self, session: Session) -> None:
        """Build the parts; nothing is shown before a pair is given.

        Args:
            session: holds the models.
        """
        super().__init__()
        self._session, self._asked = session, None
        self.found: Followed = {}
        self._button = pn.widgets.Button(
            label="Which words moved it?", variant="outline", width=190, visible=False
        )
        self._button.on_click(lambda _: self.live.ask(self._asked))
        self.live = Live(self._work, self._draw, "Following the score to its words, step")
        self.panes = [FigurePlace(flex="1 1 250px", min_width="min(240px, 100%)") for _ in range(3)]
        self._about, self._numbers = note(_ABOUT), downloads("words", self.table)
        self._show([None] * len(self.panes))

    def _show(self, figures: Sequence[go.Figure | None]) -> None:
        for place, figure in zip(self.panes, figures, strict=True):
            place.show(figure)
        for part in (self._about, *self._numbers):
            part.visible = figures[0] is not None

    def ask_about(self, question: Question | None) -> None:
        """Offer to follow another pair's score; what was shown of the one before goes.

        Args:
            question: which pair; None for none.
        """
        if question != self._asked:
            self._asked, self.found = question, {}
            self.live.clear()
            self._show([None] * len(self.panes))
        self._button.visible = question is not None

    def _work(self, asked: Question, job: Job) -> Followed:
        def words_of(run: Run, name: str) -> WordAttribution:
            return WordAttribution(self._session.model(run, name))

        model = self._session.model(asked.run, asked.model, words_of)
        told, turned = job.told(3 * STEPS), (asked.second, asked.first, asked.condition)
        followed = {
            "condition": model.of_condition(asked.first, asked.second, asked.condition, STEPS, told),
            "first sentence": model.of_sentence(
                asked.first, asked.second, asked.condition, STEPS, lambda done: told(STEPS + done)
            ),
            "second sentence": model.of_sentence(*turned, STEPS, lambda done: told(2 * STEPS + done)),
        }
        return {name: (words.words, added) for name, (words, added) in followed.items()}

    def _draw(self, found: Followed) -> None:
        self.found = found
        limit = max(float(added.values.abs().max()) for _, added in found.values())
        figures = []
        for name, (words, added) in found.items():
            told = f"sum {added.score - added.reference:+.3f}, completeness error {added.incompleteness:.2%}"
            figures.append(words_figure(words, added.values.tolist(), f"Words of the {name}", told, limit))
        self._show(figures)

    def table(self) -> pl.DataFrame:
        """Return every word with what it adds: text, place, word, value.

        Raises:
            DataError: nothing was followed yet.
        """
        if not self.found:
            raise DataError("no score was followed yet; choose a pair and press the button")
        parts = [
            pl.DataFrame({"text": [name] * len(words), "place": range(1, len(words) + 1), "word": words,
                          "value": added.values.double().tolist()})
            for name, (words, added) in self.found.items()
        ]  # fmt: skip
        return pl.concat(parts)

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out the button above what it leads to."""
        figures = pn.FlexBox(*self.panes, sizing_mode="stretch_width")
        parts = (self._button, self.live, self._about, figures, self._numbers)
        return pn.Column(*parts, sizing_mode="stretch_width")

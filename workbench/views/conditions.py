"""Type a condition and watch sentences move: map, neighbours, agreement with an attribute."""

from typing import Any

import panel as pn
import param
import plotly.graph_objects as go

from workbench.figures_texts import moved_figure, purity_figure
from workbench.session import Moved, Session
from workbench.view_state import ConditionsState
from workbench.views.page import banner, beside, code_of, copy_button, footer, keep_link, save_button, shown


def _asked_for(condition: str, attributes: list[str]) -> str:
    """Return the attribute that a condition names, else the first."""
    return next((name for name in attributes if name in condition.lower()), attributes[0])


class ConditionsView(pn.viewable.Viewer):
    """The bundled sentences under a trained model, moved by what a person types."""

    condition = param.String(default="The colour.", doc="What to look at; press Enter.")
    other = param.String(default="", doc="A second condition, B; empty for none.")
    blend = param.Number(default=0.0, bounds=(0, 1), step=0.05, doc="From the condition, 0, to B, 1.")
    strength = param.Number(default=1.0, bounds=(0, 2), step=0.05, doc="0: plain encoder, 1: the model.")
    attribute = param.Selector(
        default=None, objects=[None], doc="Colours the map and is what clusters are held against."
    )
    clicked = param.Integer(
        default=None, bounds=(0, None), allow_None=True, doc="Row of the chosen sentence."
    )

    def __init__(self, session: Session, state: ConditionsState, problem: str = "") -> None:
        """Build the view.

        Args:
            session: finished runs and models.
            state: what to show.
            problem: with the link, said in the banner.

        Raises:
            RunError: no finished run with a model.
        """
        self._texts = session.texts_of(state.recipe, state.model)
        self._run, self._state, self._problem = session.run(state.recipe, "hyper_cl"), state, problem
        names = self._texts.attributes
        self.param.attribute.objects = names
        chosen = state.attribute if state.attribute in names else _asked_for(state.condition, names)
        clicked = (
            state.clicked if state.clicked is not None and state.clicked < self._texts.frame.height else None
        )
        super().__init__(
            condition=state.condition, other=state.other, blend=state.blend, strength=state.strength,
            attribute=chosen, clicked=clicked,
        )  # fmt: skip
        self._map = pn.pane.Plotly(sizing_mode="stretch_width", link_figure=False)
        self._map.param.watch(self._click, "click_data")

    def state(self) -> ConditionsState:
        """Return what is shown as a value for a link."""
        values = {
            name: getattr(self, name)
            for name in ("condition", "other", "blend", "strength", "attribute", "clicked")
        }
        return self._state.model_copy(update=values)

    def moved(self) -> Moved:
        """Return the sentences before and after.

        Raises:
            DataError: a condition that cannot be used.
        """
        return self._texts.move(self.condition, self.other, self.blend, self.strength)

    def _click(self, event: param.parameterized.Event) -> None:
        points = (event.new or {}).get("points") or [{}]
        row = points[0].get("customdata")
        if isinstance(row, int):
            self.clicked = row

    def figure(self, moved: Moved) -> go.Figure:
        """Draw the map."""
        title = f"{self.condition}  |  {self.other}" if self.other.strip() else self.condition
        shortened = title if len(title) < 90 else f"{title[:87]}..."
        return moved_figure(
            moved.frame, self.attribute, (shortened, f"both hold {moved.shown:.0%}"), self.clicked
        )

    @param.depends("condition", "other", "blend", "strength", "attribute", "clicked")
    def content(self) -> pn.viewable.Viewable:
        """Draw everything that follows from the controls."""
        return shown(self._content)

    def _content(self) -> pn.viewable.Viewable:
        moved = self.moved()
        keep_link(self.state())
        self._map.object = self.figure(moved)
        purity = moved.purity(self.attribute)
        parts: list[Any] = [
            self._map,
            pn.pane.Plotly(purity_figure(purity, self.attribute), height=220, sizing_mode="stretch_width"),
        ]
        if self.clicked is None:
            parts.append(pn.pane.Str("Click a sentence to see its neighbours before and after."))
        else:
            parts += [
                pn.pane.Str(f"Nearest to: {moved.frame['text'][self.clicked]}"),
                self._neighbours(moved),
            ]
        return pn.Column(*parts, sizing_mode="stretch_width")

    def _neighbours(self, moved: Moved) -> pn.Row:
        """List the neighbours of the chosen sentence side by side, as plain text."""
        found = moved.neighbours(self.clicked)
        sides = []
        for side in ("before", "after"):
            rows = found.filter(side=side).to_dicts()
            lines = [f"{row['rank']}. {row['cosine']:+.3f}  {row['text']}" for row in rows]
            sides.append(
                pn.Column(f"### {side}", pn.pane.Str("\n".join(lines), styles={"white-space": "pre-wrap"}))
            )
        return pn.Row(*sides, sizing_mode="stretch_width")

    def code(self) -> list[str]:
        """Return notebook code that makes the same figure."""
        state = self.state().model_dump(mode="json", exclude={"version", "app"})
        return [
            "from workbench.session import Session",
            "from workbench.view_state import ConditionsState",
            "from workbench.views.conditions import ConditionsView",
            f"view = ConditionsView(Session(), ConditionsState(**{state!r}))",
            "view.figure(view.moved())",
        ]

    @param.depends("condition", "other", "blend", "strength", "attribute", "clicked")
    def _code(self) -> pn.viewable.Viewable:
        return code_of(self.code())

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out controls, figures and footer; narrow screens stack them."""
        asked = ["condition", "other", "blend", "strength", "attribute"]
        controls = pn.Param(self, parameters=asked, show_name=False, width=300)
        saved = save_button("conditions", lambda: pn.Column(self._content(), footer(self._run)))
        left = pn.Column(controls, pn.Row(copy_button(), saved), self._code)
        top = [banner(f"{self._problem}. The default view is shown.")] if self._problem else []
        return pn.Column(
            *top, beside(left, pn.Column(self.content)), footer(self._run), sizing_mode="stretch_width"
        )

"""A place on a page for a figure: empty until there is one."""

from collections.abc import Callable
from typing import Any

import panel as pn
import plotly.graph_objects as go


class FigurePlace(pn.Column):
    """Holds a figure once there is one.

    An empty figure costs a browser as much as a full one, even where it is not seen. One that was shown is
    hidden and stays: Plotly throws when a figure that it still draws is taken away.
    """

    def __init__(self, clicked: Callable[[Any], None] | None = None, **styles: str) -> None:
        """Make an empty place.

        Args:
            clicked: is told when a person clicks into the figure, as an event whose ``new`` has the points.
            styles: CSS of the place, with underscores for hyphens.
        """
        named = {name.replace("_", "-"): value for name, value in styles.items()}
        super().__init__(visible=False, sizing_mode="stretch_width", styles=named)
        self._clicked = clicked

    def expect(self, height: int) -> None:
        """Keep room for a first figure that is on its way, so that nothing below it jumps.

        Args:
            height: of the figure, in pixels.
        """
        if not len(self):
            self.param.update(min_height=height, visible=True)

    def show(self, figure: go.Figure | None) -> None:
        """Show another figure, or none."""
        if figure is not None and len(self):
            # Said to the pane as well: one that was hidden so far would keep another height.
            self[0].param.update(object=figure, height=figure.layout.height)
        elif figure is not None:
            self[:] = [self._pane(figure)]
        self.visible = figure is not None

    def _pane(self, figure: go.Figure) -> pn.pane.Plotly:
        pane = pn.pane.Plotly(
            figure, height=figure.layout.height, sizing_mode="stretch_width", link_figure=False
        )
        if self._clicked is not None:
            pane.param.watch(self._clicked, "click_data")
        return pane

    @property
    def figure(self) -> go.Figure | None:
        """What is shown; None for nothing."""
        return self[0].object if self.visible and len(self) else None

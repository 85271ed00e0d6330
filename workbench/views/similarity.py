"""Type a condition and see a similarity matrix change."""

import panel as pn
import param

from workbench.errors import WorkbenchError
from workbench.figures import similarity_change_figure
from workbench.model import HyperCL


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
            return pn.pane.Str(str(problem), styles={"color": "#a03000"})
        title = self.condition if len(self.condition) < 60 else f"{self.condition[:57]}..."
        figure = similarity_change_figure(names, before, {title: after})
        return pn.pane.Plotly(figure, sizing_mode="stretch_width")

    def __panel__(self) -> pn.viewable.Viewable:
        """Lay out the controls above the figure."""
        asked = ["condition", "strength"]
        controls = pn.Param(self, parameters=asked, show_name=False, default_layout=pn.Row)
        return pn.Column(controls, self.figure, sizing_mode="stretch_width")

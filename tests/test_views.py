import panel as pn
import torch

from workbench.conditions import normalise_condition
from workbench.model import HyperCL
from workbench.views.similarity import SimilarityView

TEXTS = {"a": "Red foxes.", "b": "Red kites.", "c": "Blue foxes."}


class EchoModel(HyperCL):
    """Stands for a trained model: the similarity it returns is its two arguments."""

    def __init__(self):
        pass

    def similarity(self, first, second, condition, strength=1.0):
        return torch.full((len(first), len(second)), strength * len(normalise_condition(condition)) / 100)


def values(view):
    return [round(trace.z[0][0], 6) for trace in view.figure().object.data]  # single precision


def test_changing_the_condition_or_the_strength_changes_the_right_matrix_only():
    view = SimilarityView(EchoModel(), TEXTS, condition="colour", strength=0.5)
    assert values(view) == [0.0, 0.03]
    view.condition = "the kind of animal"
    assert values(view) == [0.0, 0.09]
    view.strength = 1.0
    assert values(view) == [0.0, 0.18]


def test_an_empty_condition_shows_its_error_as_plain_text():
    view = SimilarityView(EchoModel(), TEXTS, condition=" ")
    shown = view.figure()
    assert isinstance(shown, pn.pane.Str)
    assert "empty" in shown.object


def test_markup_in_a_condition_is_shown_and_not_read():
    view = SimilarityView(EchoModel(), TEXTS, condition="<a href='x'>$\\alpha$</a>")
    titles = [note.text for note in view.figure().object.layout.annotations]
    assert titles[1] == "&lt;a href=&#x27;x&#x27;&gt;&#36;\\alpha&#36;&lt;/a&gt;"

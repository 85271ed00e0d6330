import numpy as np
import polars as pl
import pytest
import torch
from torch.nn.functional import normalize

from workbench.errors import DataError, RunError
from workbench.model import HyperCL
from workbench.session import ConditionedTexts, Session

FRAME = pl.DataFrame(
    {"sentence": [f"text {row}" for row in range(24)], "id": range(24),
     "kind": ["a", "b"] * 12, "size": ["s", "m", "l", None] * 6}
)  # fmt: skip


class TwoAxes(HyperCL):
    """Plain vectors tell sizes apart, vectors under any condition tell kinds apart."""

    def __init__(self):
        self.asked = []

    def encode(self, texts, condition, strength=1.0):
        self.asked.append((condition, strength))
        rows = torch.tensor([int(text.split()[1]) for text in texts])
        jitter = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))[rows] * 0.01
        plain, other = torch.eye(5)[rows % 4] + jitter, torch.eye(5)[rows % 2 + 3] + jitter
        return normalize((1 - strength) * plain + strength * other, dim=1)


@pytest.fixture
def moved():
    return ConditionedTexts(TwoAxes(), FRAME).move("the kind")


def test_attributes_are_columns_of_few_values():
    assert ConditionedTexts(TwoAxes(), FRAME).attributes == ["kind", "size"]


def test_purity_rises_for_what_the_condition_asks_for(moved):
    before, after = moved.purity("size").to_dicts()
    assert (before["side"], before["count"]) == ("before", 18)  # six of 24 have no size
    # Before, the five others of the same size are nearest; ten neighbours are asked, of 17.
    assert before["value"] == pytest.approx(0.5, abs=0.01)
    assert before["floor"] == pytest.approx(3 * (1 / 3) ** 2)
    before, after = moved.purity("kind").to_dicts()
    assert after["value"] == pytest.approx(1.0)
    assert before["value"] < 1
    assert all(row["low"] <= row["value"] <= row["high"] for row in (before, after))
    assert after["floor"] == pytest.approx(0.5)


def test_neighbours_are_the_largest_cosines_without_the_sentence_itself(moved):
    found = moved.neighbours(3, count=4)
    for side, embedded in (("before", moved.before), ("after", moved.after)):
        rows = found.filter(side=side)
        cosines = (embedded @ embedded[3]).numpy()
        cosines[3] = -2
        order = np.argsort(-cosines)[:4]
        assert rows["text"].to_list() == [f"text {row}" for row in order]
        np.testing.assert_allclose(rows["cosine"], cosines[order], rtol=1e-6)


def test_neither_slider_turns_the_map():
    texts = ConditionedTexts(TwoAxes(), FRAME)
    one, two = texts.move("the kind", strength=0.2), texts.move("the kind", strength=1.0)
    np.testing.assert_allclose(one.frame.select("x0", "y0"), two.frame.select("x0", "y0"), atol=1e-6)
    still = texts.move("the kind", strength=0.0).frame
    np.testing.assert_allclose(still.select("x0", "y0"), still.select("x1", "y1"), atol=1e-6)


def test_two_conditions_are_blended_by_their_weights():
    model = TwoAxes()
    ConditionedTexts(model, FRAME).move("the kind", "the size", blend=0.25, strength=1.5)
    assert ({"the kind": 0.75, "the size": 0.25}, 1.5) in model.asked


def test_an_empty_condition_is_refused():
    with pytest.raises(DataError, match="empty"):
        ConditionedTexts(TwoAxes(), FRAME).move("  ")


def test_nothing_trained_says_how_to_start(tmp_path):
    with pytest.raises(RunError, match="workbench reproduce"):
        Session(tmp_path).run("", "hyper_cl")

"""Published bias tests: found where their files are, asked as they are, and what their numbers mean."""

import numpy as np
import polars as pl
import pytest
import torch

from workbench.datasets import stimuli
from workbench.datasets.stimuli import BUNDLED, PUBLISHED, Stimuli, named_stimuli, stimuli_names
from workbench.errors import DataError, ManifestError
from workbench.manifests import locate
from workbench.model import HyperCL
from workbench.text_bias import CONDITIONED, PLAIN, associations, distance_rows

PREPARED = pytest.mark.skipif(
    locate("seat") is None or locate("crows-pairs") is None, reason="needs the sets"
)


class Turned(HyperCL):
    """Stands for a model: texts are angles in degrees; a condition halves them, with its strength."""

    def __init__(self):
        pass

    def encode(self, texts, condition, strength):
        angles = torch.tensor([float(text) for text in texts]).deg2rad() * (1 - strength / 2)
        return torch.stack([angles.cos(), angles.sin()], 1)


TWINS = pl.DataFrame(
    {"kind": ["age", "age", "race"], "more": ["0", "0", "10"], "less": ["60", "90", "10"]}
)  # fmt: skip


def test_distances_are_one_minus_cosine_by_kind_plain_and_under_the_condition():
    rows = distance_rows(Turned(), TWINS, "anything", 1.0)
    assert rows["side"].to_list() == [PLAIN, CONDITIONED] * 2
    # Plain: (1 - cos 60) = 0.5 and (1 - cos 90) = 1, mean 0.75. Halved: 1 - cos 30 and 1 - cos 45.
    halved = ((1 - np.cos(np.pi / 6)) + (1 - np.cos(np.pi / 4))) / 2
    assert rows["distance"].to_list() == pytest.approx([0.75, halved, 0, 0], abs=1e-6)
    assert rows["pairs"].to_list() == [2, 2, 1, 1]
    assert rows["difference"].to_list() == [
        None,
        pytest.approx(halved - 0.75),
        None,
        pytest.approx(0, abs=1e-9),
    ]
    # Resamples of two pairs: both of one, both of the other, or one of each.
    assert (rows["low"][0], rows["high"][0]) == (pytest.approx(0.5), pytest.approx(1.0))


def test_strength_zero_is_the_plain_encoder():
    rows = distance_rows(Turned(), TWINS, "anything", 0.0)
    assert rows.filter(side=CONDITIONED)["difference"].to_list() == [0, 0]


def test_an_answer_says_what_was_asked_and_what_it_cannot_show():
    found = associations(Turned(), Stimuli(twins=TWINS), "CrowS-Pairs", "anything", 1.0)
    said = "\n".join(found.said())
    assert "by CrowS-Pairs" in said
    assert "age: less (+0.75 to +0.21" in said
    assert "nothing about which one it prefers" in " ".join(found.limits.split())
    assert found.tests.is_empty()


def test_names_that_are_not_there_are_one_message(monkeypatch, tmp_path):
    with pytest.raises(DataError, match="no bias tests named 'IAT'; there are: words of our own, WEAT"):
        named_stimuli("IAT")
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    named_stimuli.cache_clear()
    assert stimuli_names() == [BUNDLED]
    with pytest.raises(ManifestError, match="crows-pairs is not on this machine"):
        named_stimuli("CrowS-Pairs")


@PREPARED
def test_every_published_test_belongs_to_one_name_and_can_be_asked():
    named_stimuli.cache_clear()
    names = [name for name, (data, _) in PUBLISHED.items() if data == "seat"]
    tests = [test for name in names for test in named_stimuli(name).tests]
    assert len(tests) == len({test.name for test in tests}) == 50
    for test in tests:
        sizes = [len(test.sentences[role]) for role in stimuli.ROLES]
        assert sizes[0] == sizes[1]
        assert min(sizes) >= 2
    twins = named_stimuli("CrowS-Pairs").twins
    assert twins.columns == ["kind", "more", "less"]
    assert (twins.height, twins["kind"].n_unique()) == (1508, 9)

"""Attribution of a conditioned score to words, on the real encoder and heads as they start."""

import numpy as np
import pytest
import torch

from workbench.errors import DataError
from workbench.geometry.text_attribution import WordAttribution
from workbench.model import HyperCL
from workbench.papers.hyper_cl import ConditionedHead
from workbench.papers.hyper_cl_settings import ModelSettings

FIRST, SECOND, CONDITION = "A small red bird sings.", "The bus is red and long.", "The colour."


@pytest.fixture(scope="module")
def attribution(encoder, tmp_path_factory):
    """Make an attribution for a head of some kind."""

    def make(**settings) -> WordAttribution:
        torch.manual_seed(0)
        head = ConditionedHead(ModelSettings(name="head", **settings), 384, 384)
        return WordAttribution(HyperCL(head, encoder, tmp_path_factory.mktemp("cache")))

    return make


@pytest.fixture(scope="module")
def hyper(attribution):
    """Attribute scores of a generated projection of low rank."""
    return attribution(kind="hyper", rank=8, identity=True)


def test_words_are_as_written_and_cover_all_tokens_but_the_special_ones(hyper):
    words = hyper.words("Unbelievably cold!")
    assert words.words == ["Unbelievably", "cold", "!"]
    pieces = torch.bincount(words.owner)
    assert pieces[-1] == 2  # the start and the end token
    assert pieces.sum() == len(words.parts) > 5  # "Unbelievably" is several pieces
    same = (words.parts == words.reference).all(1)
    assert torch.equal(same, words.owner == 3)


def test_values_of_a_words_tokens_are_summed_and_special_ones_left_out(hyper):
    words = hyper.words("Unbelievably cold!")
    values = torch.ones(len(words.parts))
    assert words.by_word(values).tolist() == torch.bincount(words.owner)[:-1].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "hyper", "rank": 8, "identity": True},
        {"kind": "hadamard"},
        {"kind": "hyper", "pooling": "condition"},
    ],
    ids=["low rank", "gate", "generated query"],
)
def test_the_path_from_words_gives_the_models_own_score(attribution, settings):
    found = attribution(**settings)
    score = found.score(found.words(FIRST), found.words(SECOND), found.words(CONDITION, condition=True))
    # The store keeps token states in half precision.
    tolerance = 2e-3 if "pooling" in settings else 1e-5
    expected = found.model.similarity([FIRST], [SECOND], CONDITION)
    assert score == pytest.approx(float(expected), abs=tolerance)


def test_the_conditions_words_account_for_what_the_condition_does_to_the_score(hyper):
    words, found = hyper.of_condition(FIRST, SECOND, CONDITION, steps=24)
    assert words.words == ["The", "colour", "."]
    assert found.values.shape == (3,)
    assert found.incompleteness < 1e-2
    assert abs(found.score - found.reference) > 1e-3
    silent = hyper.words(CONDITION, condition=True).silent
    assert found.reference == pytest.approx(
        hyper.score(hyper.words(FIRST), hyper.words(SECOND), silent), abs=1e-5
    )


def test_a_head_that_ignores_the_condition_attributes_nothing_to_it(attribution):
    _, found = attribution(kind="shared").of_condition(FIRST, SECOND, CONDITION, steps=2)
    assert found.values.abs().max() == 0
    assert found.score == found.reference


def test_the_sentences_words_account_for_the_score_less_that_of_no_words(hyper):
    words, found = hyper.of_sentence(FIRST, SECOND, CONDITION, steps=48)
    assert words.words == ["A", "small", "red", "bird", "sings", "."]
    assert found.incompleteness < 1e-2
    expected = hyper.score(
        hyper.words(FIRST).silent, hyper.words(SECOND), hyper.words(CONDITION, condition=True)
    )
    assert found.reference == pytest.approx(expected, abs=1e-5)


def test_pairs_of_words_sum_to_the_score_less_that_of_the_references(hyper):
    one, other, found = hyper.of_pair(FIRST, SECOND, CONDITION, steps=16)
    assert found.values.shape == (len(one.words), len(other.words)) == (6, 7)
    assert found.incompleteness < 1e-2
    asked = hyper.words(CONDITION, condition=True)
    silent = hyper.score(one, other.silent, asked) + hyper.score(one.silent, other, asked)
    assert found.reference == pytest.approx(silent - hyper.score(one.silent, other.silent, asked), abs=1e-5)


def test_a_text_with_a_word_cut_out_is_the_text_without_it(hyper):
    cut, second = hyper.words(FIRST).without([2]), hyper.words(SECOND)
    asked = hyper.words(CONDITION, condition=True)
    expected = hyper.score(hyper.words("A small bird sings."), second, asked)
    assert hyper.score(cut, second, asked) == pytest.approx(expected, abs=1e-6)


def test_deletion_cuts_the_words_of_the_strongest_pairs_and_as_many_drawn_ones(hyper, monkeypatch):
    one, other, found = hyper.of_pair(FIRST, SECOND, CONDITION, steps=4)
    asked = hyper.words(CONDITION, condition=True)
    ranked = sorted(np.ndindex(*found.values.shape), key=lambda place: -float(found.values[place]))[:3]
    strongest = [sorted({*places}) for places in zip(*ranked, strict=True)]
    cut, plain = [], type(one).without
    monkeypatch.setattr(
        type(one), "without", lambda self, words: cut.append((len(self.words), words)) or plain(self, words)
    )
    scores = hyper.deletion(FIRST, SECOND, CONDITION, pairs=3, draws=2, steps=4)

    def score(words: list[list[int]]) -> float:
        return hyper.score(plain(one, words[0]), plain(other, words[1]), asked)

    # Both sentences of two draws, then of the strongest pairs.
    assert [count for count, _ in cut] == [6, 7] * 3
    draws = [[words for _, words in cut[start : start + 2]] for start in (0, 2)]
    assert [sorted(words) for _, words in cut[4:]] == strongest
    assert [[len({*words}) for words in draw] for draw in draws] == [[*map(len, strongest)]] * 2
    expected = score([[], []]), score(strongest), (score(draws[0]) + score(draws[1])) / 2
    assert scores == pytest.approx(expected, abs=1e-6)


def test_a_text_that_shows_nothing_is_refused(hyper):
    with pytest.raises(DataError):
        hyper.of_condition(FIRST, SECOND, " ")

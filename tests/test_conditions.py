"""What a condition is: one form for equal texts, and an error for what no encoder can read."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.conditions import normalise_condition, normalise_text
from workbench.errors import DataError


def test_composed_and_decomposed_letters_become_one_text():
    assert normalise_condition("cafe\u0301") == normalise_condition("caf\u00e9") == "caf\u00e9"


def test_outer_white_space_is_removed_and_inner_is_kept():
    assert normalise_condition(" \n The  colour.\t") == "The  colour."


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u00a0", "\u200b", "\u2028\u2029", "\u200d\u2060\ufeff"])
def test_a_condition_that_shows_nothing_is_an_error_with_the_way_out(text):
    with pytest.raises(DataError, match=r"the condition is empty or only white space.*strength=0"):
        normalise_condition(text)


@pytest.mark.parametrize(
    ("text", "code", "position"),
    [("\x00", "0000", 0), ("col\x00our", "0000", 3), ("ab\ud800", "D800", 2), ("\udfffab", "DFFF", 0)],
)
def test_a_nul_or_a_lone_surrogate_is_refused_with_its_position(text, code, position):
    with pytest.raises(DataError, match=rf"character U\+{code} at position {position}, which no encoder"):
        normalise_condition(text)


@pytest.mark.parametrize("value", [None, 7, 1.5, True, b"colour", ["colour"]])
def test_only_text_is_a_condition(value):
    with pytest.raises(DataError, match=f"must be text, got {type(value).__name__}"):
        normalise_condition(value)


def test_a_message_about_a_huge_value_stays_short():
    with pytest.raises(DataError) as caught:
        normalise_text([1] * 10_000, "sentence1, row 7")
    assert str(caught.value).startswith("sentence1, row 7 must be text")
    assert len(str(caught.value)) <= 200


@pytest.mark.parametrize(
    "text",
    [
        "None",
        "nan",
        "true",
        "007",
        "1e5",
        "[1,2]",
        "<script>",
        "'; --",
        "👩‍👩‍👧",
        "שלום",
        "a\u0301\u0302\u0303",
    ],
)
def test_a_visible_text_is_kept_as_it_is(text):
    assert normalise_condition(text) == unicodedata.normalize("NFC", text)


@given(st.text())
def test_normalising_twice_is_normalising_once_and_forms_do_not_matter(text):
    try:
        once = normalise_text(text)
    except DataError:
        for form in ("NFC", "NFD"):
            with pytest.raises(DataError):
                normalise_text(unicodedata.normalize(form, text))
        return
    assert normalise_text(once) == once == once.strip()
    assert normalise_text(unicodedata.normalize("NFD", text)) == once

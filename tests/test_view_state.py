import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.view_state import LONGEST, ConditionsState, ViewError, ZooState, pack, unpack


@given(st.text(max_size=200), st.floats(0, 2), st.floats(0, 1))
def test_a_link_brings_back_what_was_shown(text, strength, blend):
    text = text.encode("utf-8", "ignore").decode()  # a lone surrogate is no text
    state = ConditionsState(condition=text, other=text[::-1], strength=strength, blend=blend, clicked=3)
    assert unpack(pack(state), ConditionsState) == state


@pytest.mark.parametrize(
    "text", ["007", "true", "None", "1e5", "[1,2]", '{"a":1}', "<b>", "a&view=b#c", "\u2028"]
)
def test_words_that_look_like_other_types_stay_text(text):
    assert unpack(pack(ConditionsState(condition=text)), ConditionsState).condition == text


def test_a_link_holds_only_letters_that_need_no_escape():
    value = pack(ConditionsState(condition="Grüße? & 100 % <b>" * 50))
    assert set(value) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def test_no_link_is_the_default_view():
    assert unpack("", ZooState) == ZooState()


def packed(**content):
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("%%%", "cannot be read"),
        ("bm90IGpzb24", "cannot be read"),
        (packed(version=2, app="conditions"), "version"),
        (packed(version=1, app="zoo"), "app"),
        (packed(version=1, app="conditions", strength=3), "strength"),
        (packed(version=1, app="conditions", colour="red"), "unknown key 'colour'"),
        (packed(version=1, app="conditions", condition=7), "condition"),
        (base64.urlsafe_b64encode(b"[1]").decode().rstrip("="), "no settings"),
        ("a" * (LONGEST + 1), "characters long"),
    ],
)
def test_a_link_that_cannot_be_read_is_an_error_and_no_default(value, complaint):
    with pytest.raises(ViewError, match=complaint):
        unpack(value, ConditionsState)

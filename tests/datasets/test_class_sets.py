"""Class sets: names are checked at the edge, prompts have a fixed order, equal statements one number."""

from inspect import unwrap
from unicodedata import normalize

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.datasets.class_sets import (
    MOST_CLASSES,
    PLAIN_TEMPLATES,
    Captioned,
    ClassSet,
    Questions,
    check_classes,
    meanings,
)
from workbench.errors import DataError

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=60, deadline=None, database=None)
NAMES = st.lists(
    st.text(st.characters(categories=("L", "N")), min_size=1, max_size=6), min_size=2, max_size=8
)


def class_set(classes: list[str], templates: tuple[str, ...] = PLAIN_TEMPLATES, **more) -> ClassSet:
    return ClassSet("own", classes, templates, torch.arange(2), torch.tensor([0, 1]), **more)


# --- class names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"at least two classes, got \[\]"),
        (["cat"], r"at least two classes, got \['cat'\]; add a class"),
        (["cat", ""], "class 1 is empty or only white space"),
        (["\u200b \n", "cat"], "class 0 is empty or only white space"),
        (["cat", "dog", "cat"], "class named twice: cat; give every class once"),
        (["cat", " cat\n"], "class named twice: cat"),
        (["caf\u00e9", "cafe\u0301"], "class named twice: caf\u00e9"),  # composed and decomposed
        (["b", "a", "b", "a"], "class named twice: a, b"),
        ([f"class {place}" for place in range(10_000)], "10,000 classes; at most 5,000"),
        (["cat", "d\x00g"], r"class 1 holds the character U\+0000 at position 1"),
    ],
)
def test_class_names_that_cannot_be_used_are_refused_by_name(names, message):
    with pytest.raises(DataError, match=message):
        check_classes(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat", "class names must be a list, got the text 'cat'"),  # not the classes c, a and t
        (["cat", 3], "class 1 must be text, got int: 3"),
        (["cat", None], "class 1 must be text, got NoneType"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(names, message):
    with pytest.raises(DataError, match=message):
        unwrap(check_classes)(names)  # without the tests' own check of types, which comes first


def test_as_many_classes_as_are_allowed_pass_and_one_more_does_not():
    most = [f"class {place}" for place in range(MOST_CLASSES)]
    assert check_classes(most) == most
    with pytest.raises(DataError, match="5,001 classes; at most 5,000"):
        check_classes([*most, "one more"])


def test_names_in_any_script_keep_their_order_and_letter_case():
    names = ["Дом", "猫", "قطة", "बिल्ली", "Cat", "cat", "🦊", "  plus sign "]
    assert check_classes(names) == ["Дом", "猫", "قطة", "बिल्ली", "Cat", "cat", "🦊", "plus sign"]


@quick
@given(NAMES)
def test_checked_names_are_distinct_and_stay_as_they_are(names):
    if len({normalize("NFC", name) for name in names}) < len(names):
        with pytest.raises(DataError, match="class named twice"):
            check_classes(names)
        return
    clean = check_classes(names)
    assert len(set(clean)) == len(clean) == len(names)
    assert check_classes(clean) == clean


# --- prompts ------------------------------------------------------------------------------------------------


def test_prompts_come_class_by_class_with_all_templates_of_each():
    prompts = class_set(["cat", "dog"], ("a {}.", "{}", "one {} here")).prompts()
    assert prompts == ["a cat.", "cat", "one cat here", "a dog.", "dog", "one dog here"]


def test_names_with_braces_stay_as_written():
    assert class_set(["{0}", "{x!r}"], ("a {}",)).prompts() == ["a {0}", "a {x!r}"]


@quick
@given(NAMES, st.integers(1, 4))
def test_a_class_has_as_many_prompts_as_there_are_templates(names, count):
    templates = tuple(f"{place}: {{}}" for place in range(count))
    prompts = class_set(names, templates).prompts()
    assert len(prompts) == len(names) * count
    for place, prompt in enumerate(prompts):
        assert prompt == f"{place % count}: {names[place // count]}"


# --- meanings, captions, questions --------------------------------------------------------------------------


def test_meanings_are_numbered_by_first_appearance():
    assert meanings(["red", "blue", "red", "two", "blue"]).tolist() == [0, 1, 0, 2, 1]
    assert meanings([]).tolist() == []


@quick
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_keys_are_equal_exactly_when_their_numbers_are(keys):
    found = meanings(keys).tolist()
    for one, first in zip(keys, found, strict=True):
        for other, second in zip(keys, found, strict=True):
            assert (one == other) == (first == second)
    assert set(found) == set(range(len(set(keys))))


def test_moving_captioned_images_keeps_texts_and_numbers():
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    data = Captioned(pixels, ["a", "b"], torch.tensor([[0], [1]]), torch.tensor([0]), torch.tensor([0, 1]))
    moved = data.to("cpu")
    assert len(moved) == 2
    assert moved.texts == ["a", "b"]
    for name in ("pixels", "choices", "kinds", "meaning"):
        assert torch.equal(getattr(moved, name), getattr(data, name))


def test_a_class_set_is_found_by_its_name_or_the_names_are_listed():
    one, two = class_set(["a", "b"]), ClassSet("two", ["c", "d"], ("{}",), *torch.zeros(2, 1).long())
    asked = Questions(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), pl.DataFrame({"x": [1, 2]}), (one, two))
    assert asked.named("two") is two
    with pytest.raises(KeyError, match="no class set 'three'; there are: own, two"):
        asked.named("three")

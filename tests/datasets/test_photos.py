"""Photos: classes held out of training stay held out, and labels, rows and groups are those of the files."""

import unicodedata
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch

from workbench.config import validated
from workbench.datasets import photos
from workbench.datasets.class_sets import PLAIN_TEMPLATES
from workbench.datasets.images import ImageData, ImageTable, read_images
from workbench.datasets.photos import CAPTIONS, DOMAINS, PhotoData, asked_classes, load_grouped, load_photos
from workbench.errors import RecipeError

NEEDED = ("tiny-imagenet", "flickr8k-128", "cifar10-jpeg", "pacs-96", "emoji-cldr-96")
SMALL = {"source": "photos", "size": 32, "tiny": 2000, "flickr": 40, "asked": 200}


@cache
def table(name: str, split: str | None, limit: int | None) -> ImageTable:
    """Pictures of a prepared set, read once for all tests."""
    return read_images(ImageData(source="manifest", name=name, size=32, limit=limit), split)


@cache
def loaded(seed: int = 0, flickr: int = 40):
    """What a recipe gets, small; every file is read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "read_images", lambda data, split: table(data.name, split, data.limit))
        return load_photos(PhotoData(**SMALL | {"seed": seed, "flickr": flickr}))


@pytest.fixture
def found(prepared):
    """Captioned pictures, and questions by split."""
    for name in NEEDED:
        prepared(name)
    return loaded()


def raw(pixels: torch.Tensor) -> list[bytes]:
    """Each picture's bytes."""
    return [picture.tobytes() for picture in pixels.numpy()]


@cache
def labels(name: str, split: str | None, limit: int | None = None, column: str = "label") -> dict:
    """From a picture's bytes to what its table calls it, as a set: a few pictures are there twice."""
    found: dict[bytes, set[str]] = {}
    pictures = table(name, split, limit)
    for one, label in zip(raw(pictures.pixels), pictures.about[column].to_list(), strict=True):
        found.setdefault(one, set()).add(label)
    return found


def asked_pixels(questions, one) -> list[bytes]:
    return raw(questions.pixels[one.rows])


# --- what is held out ---------------------------------------------------------------------------------------


def test_a_quarter_of_the_classes_is_held_out_of_training_and_validation(found):
    train, questions = found
    every = set(table("tiny-imagenet", "train", 2000).about["label"])
    held_out = set(questions["test"].named("tiny-imagenet, held-out classes").classes)
    trained = set(questions["valid"].sets[0].classes)
    assert len(every) == 200
    assert not held_out & trained
    told = {
        label for label in every if any(caption.format(label) in set(train.texts) for caption in CAPTIONS)
    }
    assert len(told) == 150
    assert not told & held_out
    assert trained <= told  # 200 pictures: a class or two may have none
    assert 40 <= len(held_out) <= 50


def test_no_picture_that_is_asked_was_trained_on(found):
    train, questions = found
    shown, fresh = set(raw(train.pixels)), labels("tiny-imagenet", "valid")
    for split in ("valid", "test"):
        for one in questions[split].sets:
            if one.name.startswith(("tiny", "ten")):
                asked = asked_pixels(questions[split], one)
                assert not shown & set(asked)
                assert set(asked) <= fresh.keys()


def test_another_seed_holds_out_other_classes_and_the_same_seed_the_same(found):
    name = "tiny-imagenet, held-out classes"
    loaded.cache_clear()
    again, other = (loaded(seed)[1]["test"].named(name).classes for seed in (0, 1))
    assert found[1]["test"].named(name).classes == again
    assert len(set(again) & set(other)) < 30  # of 50 about 12 by chance


# --- what is trained on -------------------------------------------------------------------------------------


def test_captions_are_the_pictures_own_and_of_one_meaning_per_class_or_picture(found):
    train, _ = found
    classes = labels("tiny-imagenet", "train", 2000)
    written = table("flickr8k-128", "train", 40)
    people = dict(zip(raw(written.pixels), written.about["captions"].to_list(), strict=True))
    meant: dict[str, set[int]] = {}
    count = Counter()
    for picture, row in zip(raw(train.pixels), train.choices, strict=True):
        texts = [train.texts[text] for text in row.tolist()]
        numbers = set(train.meaning[row].tolist())
        if picture in people:
            count["people"] += 1
            assert texts == people[picture]
            meant[f"picture {count['people']}"] = numbers
        else:
            count["class"] += 1
            (label,) = {one for one in classes[picture] if CAPTIONS[0].format(one) == texts[0]}
            assert texts == [caption.format(label) for caption in CAPTIONS]
            meant.setdefault(label, set()).update(numbers)
    assert count["people"] == 40
    assert len(train) == count["class"] + 40
    assert all(len(numbers) == 1 for numbers in meant.values())
    assert len(set.union(*meant.values())) == len(meant)
    assert train.kinds.tolist() == [0] * 5  # free text: one kind
    assert len(set(train.texts)) == len(train.texts) == len(train.meaning)


def test_the_first_pictures_are_of_many_classes(found):
    # Towers are centred and calibrated on them, and the files are sorted by class.
    train, _ = found
    assert len(set(train.meaning[train.choices[:256, 0]].tolist())) > 80


def test_no_flickr_leaves_class_captions_alone(found):
    train, _ = loaded(flickr=0)
    assert len(train) == len(found[0]) - 40
    assert len(train.texts) == 5 * 150


# --- what is asked ------------------------------------------------------------------------------------------


def test_rows_and_labels_are_those_of_the_files(found):
    questions = found[1]["test"]
    sources = {
        "tiny-imagenet, held-out classes": ("tiny-imagenet", "valid", None),
        "ten classes": ("tiny-imagenet", "valid", None),
        "ten classes, told of all": ("tiny-imagenet", "valid", None),
        "cifar10": ("cifar10-jpeg", "test", 200),
        "pacs": ("pacs-96", None, 200),
    }
    for name, source in sources.items():
        one, known = questions.named(name), labels(*source)
        pictures = asked_pixels(questions, one)
        for picture, label in zip(pictures, one.label.tolist(), strict=True):
            assert one.classes[label] in known[picture]
        assert one.classes == sorted(set(one.classes))
        assert set(one.label.tolist()) == set(range(len(one.classes)))
        assert one.templates == PLAIN_TEMPLATES
    assert len(questions.named("tiny-imagenet, held-out classes").rows) == 200
    for name, count, pictures in (("cifar10", 10, 200), ("pacs", 7, 200)):
        assert len(questions.named(name).classes) == count
        assert len(questions.named(name).rows) == pictures


def test_class_sets_ask_rows_of_their_own_and_all_pictures_are_asked(found):
    for split in ("valid", "test"):
        questions = found[1][split]
        assert questions.about.height == len(questions.pixels)
        rows = torch.cat([one.rows for one in questions.sets if one.name != "ten classes, told of all"])
        assert sorted(rows.tolist()) == list(range(len(questions.pixels)))
        for one in questions.sets:
            named = questions.about["picture"][one.rows.tolist()]
            assert set(named) == {one.name.removesuffix(", told of all")}


def test_distractors_are_all_other_classes_and_change_no_question(found):
    questions = found[1]["test"]
    plain, told = questions.named("ten classes"), questions.named("ten classes, told of all")
    every = set(table("tiny-imagenet", "train", 2000).about["label"])
    assert plain.distractors == ()
    assert set(told.distractors) == {f"a photo of a {name}." for name in every - set(told.classes)}
    assert len(told.distractors) == 190
    assert plain.classes == told.classes
    assert set(plain.classes) <= set(questions.named("tiny-imagenet, held-out classes").classes)
    assert torch.equal(plain.rows, told.rows)
    assert torch.equal(plain.label, told.label)
    assert {one.name for one in questions.sets if one.side} == {plain.name, told.name}
    assert {one.family for one in (plain, told)} == {"distractors"}
    assert len(plain.rows) == 500  # 50 new pictures of each class


def test_groups_are_given_where_they_apply_and_null_elsewhere(found):
    valid, test = found[1]["valid"], found[1]["test"]
    assert valid.fair == ()
    assert test.fair == ("domain", "style", "skin_tone", "gender")
    where = {
        "domain": ("pacs", set(DOMAINS)),
        "style": ("emoji of things", {"noto", "emojitwo"}),
        "skin_tone": ("emoji of people", {"light", "medium-light", "medium", "medium-dark", "dark"}),
        "gender": ("emoji of people", {"female", "male", "none"}),
    }
    for column, (picture, values) in where.items():
        own = test.about["picture"] == picture
        assert set(test.about.filter(own)[column]) == values
        assert test.about.filter(~own)[column].is_null().all()


def test_domains_of_pacs_are_those_of_the_files(found):
    questions, known = found[1]["test"], labels("pacs-96", None, 200, "domain")
    one = questions.named("pacs")
    domains = questions.about["domain"][one.rows.tolist()]
    for picture, domain in zip(asked_pixels(questions, one), domains, strict=True):
        assert domain in known[picture]


# --- emoji --------------------------------------------------------------------------------------------------


def test_emoji_classes_are_unique_words_without_skin_tone(found):
    for name in ("emoji of things", "emoji of people"):
        classes = found[1]["test"].named(name).classes
        assert len(set(classes)) == len(classes)
        for one in classes:
            assert "skin tone" not in one
            # An emoji in its own name says nothing to a text encoder: letters and marks alone.
            assert not {unicodedata.category(letter) for letter in one} & {"So", "Sk", "Cf", "Co", "Cn"}, one
    assert len(found[1]["test"].named("emoji of things").classes) == 100
    assert len(found[1]["test"].named("emoji of people").classes) == 60


def test_flags_are_named_by_their_land(found):
    flags = [one for one in found[1]["test"].named("emoji of things").classes if one.startswith("flag")]
    assert len(flags) > 5
    assert all(one.removeprefix("flag: ")[0].isupper() for one in flags)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("waving hand: medium-dark skin tone", "waving hand"),
        ("man: light skin tone, red hair", "man: red hair"),
        ("kiss: man, man, medium skin tone, dark skin tone", "kiss: man, man"),
        ("flag: Austria", "flag: Austria"),
        ("rainbow", "rainbow"),
    ],
)
def test_names_lose_the_skin_tone_and_nothing_else(name, expected):
    assert photos._without_tone(name) == expected


def test_emoji_are_asked_for_what_their_files_say(found):
    questions = found[1]["test"]
    about = table("emoji-cldr-96", None, None).about
    for name, column in (("emoji of things", "emoji"), ("emoji of people", "base")):
        one, known = questions.named(name), labels("emoji-cldr-96", None, None, column)
        spoken = {}
        for picture, label in zip(asked_pixels(questions, one), one.label.tolist(), strict=True):
            spoken.setdefault(label, []).append(known[picture])
        written = dict(about.group_by(column).agg("name").iter_rows())
        # All pictures of a class share one emoji, and each is the class of one emoji alone.
        shared = [set.intersection(*several) for several in spoken.values()]
        assert all(len(emoji) == 1 for emoji in shared)
        assert len(set.union(*shared)) == len(one.classes)
        for label, (emoji,) in zip(spoken, shared, strict=True):
            names = written[emoji]
            assert any(text.startswith(one.classes[label].split(":")[0]) for text in names)


def test_every_person_is_drawn_in_every_skin_tone(found):
    questions = found[1]["test"]
    one = questions.named("emoji of people")
    tones = questions.about["skin_tone"][one.rows.tolist()].to_list()
    counts = Counter(zip(one.label.tolist(), tones, strict=True))
    assert set(counts.values()) == {1}
    assert len(counts) == 60 * 5


def test_every_thing_is_drawn_in_both_styles(found):
    questions = found[1]["test"]
    one = questions.named("emoji of things")
    styles = questions.about["style"][one.rows.tolist()].to_list()
    seen = {(label, style) for label, style in zip(one.label.tolist(), styles, strict=True)}
    assert seen == {(label, style) for label in range(100) for style in ("noto", "emojitwo")}


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 31}, "'size' is '31'"),
        ({"size": 300}, "'size' is '300'"),
        ({"tiny": 99}, "'tiny' is '99'.*greater than or equal to 100"),
        ({"flickr": -1}, "'flickr' is '-1'"),
        ({"asked": 199}, "'asked' is '199'"),
        ({"seed": -1}, "'seed' is '-1'"),
        ({"classes": 10}, "unknown key 'classes'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        validated(PhotoData, SMALL | changes, "recipe own", RecipeError)


def test_the_fewest_rows_that_are_allowed_still_leave_classes_to_train_and_to_ask(prepared):
    for name in NEEDED:
        prepared(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "read_images", lambda data, split: table(data.name, split, data.limit))
        train, questions = load_photos(PhotoData(**SMALL | {"tiny": 100, "flickr": 0}))
    assert len(train) > 40
    assert len(questions["test"].named("ten classes").classes) == 10
    assert np.isin(questions["valid"].sets[0].classes, [*questions["test"].sets[0].classes]).sum() == 0


def test_class_sets_are_known_without_their_pictures(found):
    test = found[1]["test"]
    told = {one.name: (one.classes, one.templates) for one in test.sets if one.family != "distractors"}
    assert asked_classes(PhotoData(**SMALL)) == told


def test_pictures_that_have_groups_can_be_read_alone(found):
    test = found[1]["test"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "read_images", lambda data, split: table(data.name, split, data.limit))
        alone = load_grouped(PhotoData(**SMALL))
    assert alone.fair == test.fair
    for one in alone.sets:
        whole = test.named(one.name)
        assert (one.classes, one.templates) == (whole.classes, whole.templates)
        assert torch.equal(one.label, whole.label)
        assert torch.equal(alone.pixels[one.rows], test.pixels[whole.rows])
        groups = test.about.select(test.fair)[whole.rows.tolist()]
        assert alone.about.select(alone.fair)[one.rows.tolist()].equals(groups)

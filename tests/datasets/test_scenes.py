"""Scenes show what they say: every attribute is seen in the pixels, and captions and labels are true."""

import math
import re
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageColor
from scipy import ndimage

from workbench.config import validated
from workbench.datasets import scenes
from workbench.datasets.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    HELD_OUT_PAIRS,
    SHIFTED,
    SYNONYMS,
    TEST_TEMPLATES,
    TRAIN_TEMPLATES,
    TRAINED_PAIRS,
    Scene,
    SceneData,
    class_set,
    draw_scene,
    load_scenes,
    phrase,
)
from workbench.errors import RecipeError

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=60, deadline=None, database=None)
SIDE = 96  # large enough to count pixels
CENTRES = {"top left": (0.3, 0.3), "top right": (0.7, 0.3), "bottom left": (0.3, 0.7),
           "bottom right": (0.7, 0.7), "centre": (0.5, 0.5)}  # fmt: skip


def drawn(seed: int = 0, *, background: str = "light", shifted: bool = False, **values: str) -> np.ndarray:
    """One scene; what is not asked for is a single plain blue circle in the centre."""
    plain = {"colour": "blue", "shape": "circle", "texture": "plain", "count": "one", "place": "centre"}
    scene = Scene(plain | values, background, shifted)
    return draw_scene(scene, SIDE, np.random.default_rng(seed))


def differs(pixels: np.ndarray) -> np.ndarray:
    """Where a picture differs from its plain background by more than half of what its shapes do."""
    away = np.abs(pixels - np.median(pixels, (1, 2), keepdims=True)).sum(0)
    return away > away.max() / 2


# --- what is drawn ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", ATTRIBUTES["colour"])
def test_the_mean_colour_of_what_is_drawn_is_nearest_to_the_named_one(colour):
    for seed, shape in enumerate(ATTRIBUTES["shape"]):
        pixels = drawn(seed, colour=colour, shape=shape).astype(float)
        found = pixels[:, differs(pixels)].mean(1)
        distance = {name: np.linalg.norm(found - rgb) for name, rgb in scenes._RGB.items()}
        assert min(distance, key=distance.get) == colour, (shape, found)


def test_colours_are_nearest_to_those_that_css_calls_so():
    for colour, rgb in scenes._RGB.items():
        distance = {name: math.dist(rgb, ImageColor.getrgb(name)) for name in ATTRIBUTES["colour"]}
        assert min(distance, key=distance.get) == colour


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie in a shape of radius 1; rows count downwards."""
    if shape in ("circle", "ring"):
        return (x**2 + y**2 <= 1) & (x**2 + y**2 >= (0.25 if shape == "ring" else 0))
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.85
    if shape == "cross":
        return (np.minimum(np.abs(x), np.abs(y)) <= 0.3) & (np.maximum(np.abs(x), np.abs(y)) <= 1)
    if shape == "triangle":  # from the tip at (0, -1) to the base at y = 0.8
        return (y <= 0.8) & (np.abs(x) <= 0.95 * (y + 1) / 1.8)
    # The star's edge runs from (0, -1) to the inner corner at 36 degrees and radius 0.42.
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    inner = 0.42 * np.array([math.sin(math.pi / 5), math.cos(math.pi / 5)])
    radius = np.hypot(x, y)
    return radius * (np.cos(angle) * inner[0] + np.sin(angle) * (1 - inner[1])) <= inner[0]


def overlap(shape: str, mask: np.ndarray, radius: float, angle: float) -> float:
    """Share of pixels in both the mask and a shape about the same centre of mass, of those in either."""
    grid = np.linspace(-1.2, 1.2, 121)
    columns, rows = np.meshgrid(grid, grid)
    kind = inside(shape, columns, rows)
    centre = np.array([rows[kind].mean(), columns[kind].mean()])
    place = np.array(ndimage.center_of_mass(mask))
    y, x = (np.indices(mask.shape) - place[:, None, None]) / radius
    y, x = math.cos(angle) * y - math.sin(angle) * x, math.sin(angle) * y + math.cos(angle) * x
    expected = inside(shape, x + centre[1], y + centre[0])
    return (mask & expected).sum() / (mask | expected).sum()


@pytest.mark.parametrize("shape", ATTRIBUTES["shape"])
def test_what_is_drawn_overlaps_most_with_the_named_shape(shape):
    for seed in range(2):
        mask = differs(drawn(seed, shape=shape).astype(float))
        fits = {
            other: max(
                overlap(other, mask, radius * SIDE, angle)
                for radius, angle in product((0.18, 0.2, 0.22), (-0.25, -0.12, 0, 0.12, 0.25))
            )
            for other in ATTRIBUTES["shape"]
        }
        assert max(fits, key=fits.get) == shape, fits
        assert fits[shape] > 0.8


def test_a_ring_alone_has_a_hole():
    for shape in ATTRIBUTES["shape"]:
        empty = ndimage.label(~differs(drawn(shape=shape).astype(float)))[1]
        assert empty == (2 if shape == "ring" else 1)


def test_textures_are_even_change_by_rows_or_change_both_ways():
    for seed in range(5):
        # A square's half side is 0.85 x 0.9 x 0.2 x 96 = 14.7 pixels or more; its place and turn take 7.
        inner = {
            texture: drawn(seed, shape="square", texture=texture)[:, 41:55, 41:55].astype(float).sum(0)
            for texture in ATTRIBUTES["texture"]
        }
        assert inner["plain"].std() == 0
        assert inner["striped"].std(1).max() == 0
        assert inner["striped"].std(0).min() > 30  # a period is 16 pixels, half of it pale
        assert inner["dotted"].std(1).max() > 30
        assert inner["dotted"].std(0).max() > 30


@pytest.mark.parametrize("count", ATTRIBUTES["count"])
def test_plain_circles_are_as_many_as_named(count):
    for seed, place in product(range(4), ATTRIBUTES["place"]):
        found = ndimage.label(differs(drawn(seed, count=count, place=place).astype(float)))[1]
        assert found == 1 + ATTRIBUTES["count"].index(count), (seed, place)


@pytest.mark.parametrize("place", ATTRIBUTES["place"])
def test_the_centre_of_mass_is_nearest_to_the_named_place(place):
    for seed, (count, shape) in enumerate(product(ATTRIBUTES["count"], ATTRIBUTES["shape"])):
        mask = differs(drawn(seed, place=place, count=count, shape=shape).astype(float))
        y, x = np.array(ndimage.center_of_mass(mask)) / SIDE
        distance = {name: math.dist((x, y), at) for name, at in CENTRES.items()}
        assert min(distance, key=distance.get) == place, (count, shape)


def test_backgrounds_are_what_they_are_called():
    corner = {name: drawn(background=name)[:, :20].astype(float) for name in BACKGROUNDS}
    assert corner["light"].mean() > 180
    assert corner["dark"].mean() < 80
    assert corner["noisy"].std((1, 2)).min() > 30  # drawn with a deviation of 45
    rows = drawn(background="gradient").astype(float).mean(0)[:, 0]
    assert abs(np.diff(rows).sum()) > 150  # from 90 below the middle to 90 above, or the other way
    assert (np.diff(rows) >= 0).all() or (np.diff(rows) <= 0).all()


@pytest.mark.parametrize("shape", ATTRIBUTES["shape"])
def test_a_shifted_scene_is_an_outline_faded_inside(shape):
    plain, shifted = (drawn(shape=shape, shifted=one).astype(float) for one in (False, True))
    light = np.median(plain, (1, 2), keepdims=True)
    away = [np.abs(picture - light).sum(0) for picture in (plain, shifted)]
    mask = differs(plain)
    core = ndimage.binary_erosion(mask, iterations=5)
    edge = mask & ~ndimage.binary_erosion(mask, iterations=2)
    if core.any():
        assert away[1][core].mean() < 0.35 * away[0][core].mean()  # a quarter of the ink is left
        assert away[1][edge].mean() > 1.3 * away[1][core].mean()
    assert away[1].max() < 0.9 * away[0].max()


@quick
@given(
    st.fixed_dictionaries({key: st.sampled_from(words) for key, words in ATTRIBUTES.items()}),
    st.sampled_from(list(BACKGROUNDS)),
    st.booleans(),
    st.integers(32, 80),
    st.integers(0, 2**32),
)
def test_every_scene_can_be_drawn_at_every_size_and_again(values, background, shifted, size, seed):
    scene = Scene(values, background, shifted)
    first, again = (draw_scene(scene, size, np.random.default_rng(seed)) for _ in range(2))
    assert first.shape == (3, size, size)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert first.std((1, 2)).max() > 1  # something is there


# --- English ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"count": "one", "colour": "red", "shape": "star"}, "one red star"),
        ({"count": "two", "colour": "red", "shape": "star"}, "two red stars"),
        ({"count": "three", "shape": "cross"}, "three crosses"),
        ({"count": "two", "shape": "box"}, "two boxes"),
        ({"shape": "cross"}, "crosses"),
        ({"shape": "plus sign"}, "plus signs"),
        ({"count": "a single", "shape": "box"}, "a single box"),
        ({"count": "a trio of", "shape": "hoop"}, "a trio of hoops"),
        ({"place": "centre"}, "things in the centre"),
        ({"count": "one", "place": "top left"}, "one thing in the top left"),
        ({"texture": "striped", "colour": "blue"}, "striped blue things"),
        ({"colour": "blue", "texture": "striped"}, "striped blue things"),  # the order is that of English
        (
            {"colour": "pink", "shape": "ring", "texture": "dotted", "count": "two", "place": "bottom right"},
            "two dotted pink rings in the bottom right",
        ),
    ],
)
def test_phrases_are_english(values, expected):
    assert phrase(values) == expected


# --- what is trained on -------------------------------------------------------------------------------------

SMALL = {"source": "scenes", "train": 150, "test": 120, "size": 32}


@pytest.fixture(scope="module")
def loaded():
    """A small set, and what each of its scenes was drawn from, split by split."""
    seen: list[Scene] = []
    whole = scenes.draw_scene

    def watched(scene: Scene, *more):
        seen.append(scene)
        return whole(scene, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "draw_scene", watched)
        train, questions = load_scenes(SceneData(**SMALL))
    return train, questions, {"train": seen[:150], "valid": seen[150:270], "test": seen[270:]}


def attributes_said(text: str) -> dict[str, str]:
    """Find which attribute values a text names, by whole words, plurals too."""
    return {
        key: word
        for key, words in ATTRIBUTES.items()
        for word in words
        if re.search(rf"\b{word}(s|es)?\b", text)
    }


def statement(text: str) -> str:
    """Take the template off a training caption."""
    for template in TRAIN_TEMPLATES:
        before = template.removesuffix("{}")
        if text.startswith(before):
            return text.removeprefix(before)
    raise AssertionError(text)


def test_the_same_settings_give_the_same_pixels_and_other_seeds_others(loaded):
    train, questions, _ = loaded
    again, asked = load_scenes(SceneData(**SMALL))
    assert torch.equal(train.pixels, again.pixels)
    assert train.texts == again.texts
    assert torch.equal(train.choices, again.choices)
    for split in ("valid", "test"):
        assert torch.equal(questions[split].pixels, asked[split].pixels)
        assert questions[split].about.equals(asked[split].about)
    other, _ = load_scenes(SceneData(**SMALL, seed=1))
    assert not torch.equal(train.pixels, other.pixels)
    assert not torch.equal(questions["valid"].pixels, questions["test"].pixels)


def test_training_never_shows_held_out_combinations_and_tests_show_some(loaded):
    train, questions, seen = loaded
    index = {key: words.index for key, words in ATTRIBUTES.items()}
    # 12 of the 48 combinations: those whose places add up to a multiple of four.
    held_out = {
        (colour, shape)
        for colour, shape in product(ATTRIBUTES["colour"], ATTRIBUTES["shape"])
        if (index["colour"](colour) + index["shape"](shape)) % 4 == 0
    }
    assert len(held_out) == 12
    shown = {(scene.values["colour"], scene.values["shape"]) for scene in seen["train"]}
    assert not shown & held_out
    assert len(shown) > 30  # of the 36 that may be
    phrases = {phrase({"colour": colour, "shape": shape}) for colour, shape in held_out}
    assert not phrases & {statement(text) for text in train.texts}
    tested = [(scene.values["colour"], scene.values["shape"]) in held_out for scene in seen["test"]]
    assert questions["test"].about["combination"].to_list() == ["unseen" if one else "seen" for one in tested]
    assert 0.1 < np.mean(tested) < 0.45  # a quarter of 120; 3.6 deviations are 0.15


def test_training_never_asks_held_out_pairs_and_asks_every_other_kind(loaded):
    said = Counter(frozenset(attributes_said(text)) for text in loaded[0].texts)
    single = {frozenset([key]) for key in ATTRIBUTES}
    assert set(said) == single | {frozenset(pair) for pair in TRAINED_PAIRS}
    assert set(TRAINED_PAIRS) | set(HELD_OUT_PAIRS) == set(combinations(ATTRIBUTES, 2))
    assert not set(TRAINED_PAIRS) & set(HELD_OUT_PAIRS)
    # Each attribute is in two pairs of either kind, so that none is learned better than another.
    for pairs in (TRAINED_PAIRS, HELD_OUT_PAIRS):
        assert Counter(key for pair in pairs for key in pair) == dict.fromkeys(ATTRIBUTES, 2)


def test_training_renders_no_shifted_scene_and_tests_about_a_fifth(loaded):
    _, questions, seen = loaded
    assert not any(scene.shifted for scene in seen["train"])
    for split in ("valid", "test"):
        shifted = [scene.shifted for scene in seen[split]]
        expected = ["shifted" if one else "as trained" for one in shifted]
        assert questions[split].about["rendering"].to_list() == expected
        assert np.mean(shifted) == pytest.approx(SHIFTED, abs=0.14)  # 3.8 deviations of a mean of 120


def test_every_caption_is_true_of_its_scene_and_of_its_columns_kind(loaded):
    train, _, seen = loaded
    kinds = [frozenset([key]) for key in ATTRIBUTES] + [frozenset(pair) for pair in TRAINED_PAIRS]
    assert train.choices.shape == (150, 30)
    assert train.kinds.tolist() == [kind for kind in range(10) for _ in range(3)]
    for scene, row in zip(seen["train"], train.choices.tolist(), strict=True):
        for column, text in enumerate(row):
            said = attributes_said(train.texts[text])
            assert said.items() <= scene.values.items()
            assert frozenset(said) == kinds[column // 3]
            assert train.texts[text].startswith(TRAIN_TEMPLATES[column % 3].removesuffix("{}"))


def test_meaning_numbers_are_equal_exactly_when_statements_are(loaded):
    train = loaded[0]
    assert len(set(train.texts)) == len(train.texts)
    pairs = {(statement(text), int(number)) for text, number in zip(train.texts, train.meaning, strict=True)}
    assert len(pairs) == len({text for text, _ in pairs}) == len({number for _, number in pairs})
    assert len(pairs) * 3 == len(train.texts)  # three wordings of each


# --- what is asked ------------------------------------------------------------------------------------------


def test_every_attribute_every_pair_and_synonyms_are_asked(loaded):
    families = {one.name: one.family for one in loaded[1]["test"].sets}
    expected = dict.fromkeys(ATTRIBUTES, "one attribute")
    for pair in combinations(ATTRIBUTES, 2):
        expected[" and ".join(pair)] = "pair trained on" if pair in TRAINED_PAIRS else "held out"
    expected |= {f"{key}, by synonyms": "synonyms" for key in ATTRIBUTES}
    assert families == expected
    assert Counter(families.values()) == {
        "one attribute": 5, "pair trained on": 5, "held out": 5, "synonyms": 5
    }  # fmt: skip
    assert {one.name for one in loaded[1]["test"].sets if one.side} == {
        f"{key}, by synonyms" for key in ATTRIBUTES
    }


@pytest.mark.parametrize("split", ["valid", "test"])
def test_labels_are_what_the_scenes_show(loaded, split):
    _, questions, seen = loaded
    asked = questions[split]
    spoken = {word: key for key, word in SYNONYMS.items()}
    for one in asked.sets:
        assert one.rows.tolist() == list(range(120))
        assert len(set(one.classes)) == len(one.classes)
        keys = one.name.removesuffix(", by synonyms").split(" and ")
        assert len(one.classes) == math.prod(len(ATTRIBUTES[key]) for key in keys)
        for scene, label in zip(seen[split], one.label.tolist(), strict=True):
            values = {key: scene.values[key] for key in keys}
            name = one.classes[label]
            if one.side:
                assert phrase({key: SYNONYMS[word] for key, word in values.items()}) == name
                assert spoken[SYNONYMS[values[keys[0]]]] == values[keys[0]]
            else:
                assert attributes_said(name) == values
    assert asked.about.select(*ATTRIBUTES).rows(named=True) == [scene.values for scene in seen[split]]


def test_synonyms_and_test_wordings_never_appear_in_training_captions(loaded):
    train, questions, _ = loaded
    told = " | ".join(train.texts)
    assert len(set(SYNONYMS.values())) == len(SYNONYMS) == sum(map(len, ATTRIBUTES.values()))
    for word in SYNONYMS.values():
        assert not re.search(rf"\b{word}(s|es)?\b", told), word
    assert not set(TRAIN_TEMPLATES) & set(TEST_TEMPLATES)
    asked = {prompt for one in questions["test"].sets for prompt in one.prompts()}
    assert not asked & set(train.texts)


def test_groups_have_about_their_shares(loaded):
    found = scenes._scenes(2000, np.random.default_rng(3), train=False)
    shares = Counter(scene.background for scene in found)
    assert sum(BACKGROUNDS.values()) == pytest.approx(1)
    for name, share in BACKGROUNDS.items():
        # Four deviations of a share of 2,000.
        assert shares[name] / 2000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 2000))
    for key, words in ATTRIBUTES.items():
        counts = Counter(scene.values[key] for scene in found)
        assert min(counts.values()) > 0.75 * 2000 / len(words)
    questions = loaded[1]["test"]
    assert questions.fair == ("background", "rendering")
    assert set(questions.fair) <= set(questions.about.columns)


def test_a_class_set_can_be_asked_of_scenes_of_ones_own():
    same = {"texture": "plain", "place": "centre"}
    first = Scene({"colour": "blue", "shape": "star", "count": "two", **same}, "dark", False)
    second = Scene({"colour": "red", "shape": "ring", "count": "one", **same}, "dark", False)
    own = [first, second]
    found = class_set(("count", "place"), own)
    # 3 counts times 5 places, the place running fastest: two is the second count, centre the fifth place.
    assert found.label.tolist() == [1 * 5 + 4, 0 * 5 + 4]
    assert found.classes[9] == "two things in the centre"
    assert class_set(("colour",), own, synonyms=True).classes[5] == "azure things"


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 99}, "'train' is '99'.*greater than or equal to 100"),
        ({"test": 99}, "'test' is '99'.*greater than or equal to 100"),
        ({"size": 31}, "'size' is '31'.*greater than or equal to 32"),
        ({"size": 257}, "'size' is '257'.*less than or equal to 256"),
        ({"seed": -1}, "'seed' is '-1'"),
        ({"path": "scenes.csv"}, "'path'"),
        ({"sides": 48}, "unknown key 'sides'"),
        ({"train": "many"}, "'train' is 'many'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        validated(SceneData, SMALL | changes, "recipe own", RecipeError)

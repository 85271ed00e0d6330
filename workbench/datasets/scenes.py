"""Procedural captioned scenes: a few equal shapes on a background, with everything known about them.

A scene has five attributes: colour, shape, texture, count and place. A class set asks for one of them, or for
two at once, while the others vary, so a small encoder gains from being told what is asked. Half of the ten
pairs of attributes are asked in training, the other half is held out; so is a quarter of the combinations of
colour and shape. Backgrounds are groups of unequal size, and some test scenes are rendered in a way that
training never shows.
"""

import math
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

import numpy as np
import polars as pl
import torch
from PIL import Image, ImageDraw, ImageFilter
from pydantic import Field

from workbench.config import Settings
from workbench.datasets.class_sets import Captioned, ClassSet, Questions, meanings

ATTRIBUTES = {
    "colour": ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink"),
    "shape": ("circle", "square", "triangle", "star", "cross", "ring"),
    "texture": ("plain", "striped", "dotted"),
    "count": ("one", "two", "three"),
    "place": ("top left", "top right", "bottom left", "bottom right", "centre"),
}
# The five pairs along a ring of the attributes are trained on; the five across it are held out.
TRAINED_PAIRS = (
    ("colour", "shape"), ("shape", "texture"), ("texture", "count"), ("count", "place"), ("colour", "place"),
)  # fmt: skip
HELD_OUT_PAIRS = tuple(pair for pair in combinations(ATTRIBUTES, 2) if pair not in TRAINED_PAIRS)
SYNONYMS = {
    "red": "crimson", "orange": "tangerine", "yellow": "golden", "green": "emerald", "turquoise": "teal",
    "blue": "azure", "purple": "violet", "pink": "rosy",
    "circle": "disc", "square": "box", "triangle": "wedge", "star": "asterisk", "cross": "plus sign",
    "ring": "hoop",
    "plain": "uniform", "striped": "banded", "dotted": "spotted",
    "one": "a single", "two": "a pair of", "three": "a trio of",
    "top left": "upper left corner", "top right": "upper right corner", "bottom left": "lower left corner",
    "bottom right": "lower right corner", "centre": "middle",
}  # fmt: skip
TRAIN_TEMPLATES = ("a picture of {}", "here we see {}", "a drawing with {}")
TEST_TEMPLATES = ("an image of {}", "{}", "a scene with {}")
BACKGROUNDS = {"light": 0.6, "dark": 0.25, "noisy": 0.1, "gradient": 0.05}  # group -> share
SHIFTED = 0.2  # share of test scenes rendered as training never shows

_RGB = {
    "red": (215, 40, 40), "orange": (245, 140, 30), "yellow": (245, 220, 50), "green": (60, 165, 70),
    "turquoise": (50, 200, 200), "blue": (50, 80, 215), "purple": (135, 60, 175), "pink": (245, 140, 190),
}  # fmt: skip
_CENTRE = {
    "top left": (0.3, 0.3), "top right": (0.7, 0.3),
    "bottom left": (0.3, 0.7), "bottom right": (0.7, 0.7),
    "centre": (0.5, 0.5),
}  # fmt: skip
_SPOTS = (  # where one, two and three shapes stand around the middle, in radii
    [(0, 0)], [(-1, 0), (1, 0)], [(-1, 0.9), (1, 0.9), (0, -0.9)],
)  # fmt: skip
_POLYGONS = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1),
              (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    "star": [(math.sin(math.pi * k / 5) * (1, 0.42)[k % 2], -math.cos(math.pi * k / 5) * (1, 0.42)[k % 2])
             for k in range(10)],
}  # fmt: skip


class SceneData(Settings):
    """How many scenes, and of what size."""

    source: Literal["scenes"]
    name: str = "scenes"
    path: None = None
    train: int = Field(default=4000, ge=100)
    test: int = Field(default=1500, ge=100, description="scenes of the test split, and as many of the valid")
    size: int = Field(default=48, ge=32, le=256, description="side in pixels")
    seed: int = Field(default=0, ge=0, description="of the drawing, apart from the seeds of training")


@dataclass(frozen=True)
class Scene:
    """What a scene shows and how it is drawn."""

    values: dict[str, str]
    background: str
    shifted: bool


def phrase(values: dict[str, str]) -> str:
    """Say attributes in English, for example "two red stars in the top left"; others go unsaid."""
    one = values.get("count") in ("one", "a single")
    noun = values.get("shape", "thing")
    noun = noun if one else f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"
    words = [values[key] for key in ("count", "texture", "colour") if key in values]
    where = f" in the {values['place']}" if "place" in values else ""
    return " ".join([*words, noun]) + where


def draw_scene(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Render a scene.

    Args:
        scene: what to show.
        size: side S in pixels; shapes are drawn at twice that and averaged down.
        rng: jitter of place, size, angle, colours and noise.

    Returns:
        RGB, 0 to 255, ``[3, S, S]``.
    """
    counted = ATTRIBUTES["count"].index(scene.values["count"]) + 1
    middle = np.array(_CENTRE[scene.values["place"]]) + rng.uniform(-0.04, 0.04, 2)
    radius = rng.uniform(0.9, 1.1) * (0.2, 0.16, 0.14)[counted - 1]
    side = 2 * size
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    for spot in _SPOTS[counted - 1]:
        at = (middle + np.array(spot) * radius * rng.uniform(1.1, 1.2)) * side
        _shape(draw, scene.values["shape"], at, radius * side, rng.uniform(-0.25, 0.25))
    if scene.shifted:  # outlines, faded inside
        edge = mask.filter(ImageFilter.FIND_EDGES).filter(ImageFilter.MaxFilter(5))
        mask = Image.blend(mask.point(lambda value: value // 2), edge, 0.5)
    ink = np.clip(np.array(_RGB[scene.values["colour"]]) + rng.normal(0, 12, 3), 0, 255)
    share = np.asarray(mask.resize((size, size), Image.Resampling.BOX))[..., None] / 255
    fill = _texture(scene.values["texture"], ink, size, rng)
    pixels = share * fill + (1 - share) * _background(scene.background, size, rng)
    return pixels.astype(np.uint8).transpose(2, 0, 1)


def _background(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw an empty background of final size, noise included, ``[S, S, 3]``."""
    level = {"light": 225, "dark": 40, "noisy": 130, "gradient": 150}[kind] + rng.uniform(-15, 15)
    pixels = np.full((size, size, 3), level) + rng.normal(0, 6, 3)
    if kind == "noisy":
        grain = rng.normal(0, 45, ((size + 1) // 2, (size + 1) // 2, 3))
        pixels += np.repeat(np.repeat(grain, 2, 0), 2, 1)[:size, :size]
    if kind == "gradient":
        pixels += np.linspace(-90, 90, size)[:, None, None] * rng.choice([-1, 1])
    return pixels.clip(0, 255)


def _texture(kind: str, ink: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Fill a canvas with a texture of one colour and a paler one, ``[S, S, 3]``."""
    period, offset = size / 12, rng.uniform(0, size, 2)
    rows, columns = np.arange(size)[:, None] + offset[0], np.arange(size)[None] + offset[1]
    if kind == "dotted":
        apart = [(place % (1.6 * period) - 0.8 * period) ** 2 for place in (rows, columns)]
        pale = (apart[0] + apart[1] < 0.25 * period**2).astype(float)
    else:
        first = np.floor((rows + 0 * columns) / period) % 2
        pale = first if kind == "striped" else 0 * first
    return ink + 0.75 * pale[..., None] * (255 - ink)


def _shape(draw: ImageDraw.ImageDraw, kind: str, at: np.ndarray, radius: float, angle: float) -> None:
    """Draw one filled shape into a mask."""
    box = [*(at - radius), *(at + radius)]
    if kind == "circle":
        draw.ellipse(box, fill=255)
    elif kind == "ring":
        draw.ellipse(box, fill=255)
        inner = 0.5 * radius
        draw.ellipse([*(at - inner), *(at + inner)], fill=0)
    else:
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        points = np.array(_POLYGONS[kind]) @ turn.T * radius + at
        draw.polygon([tuple(point) for point in points], fill=255)


def _scenes(count: int, rng: np.random.Generator, train: bool) -> list[Scene]:
    """Draw what scenes show; a quarter of the combinations of colour and shape is kept from training."""
    found = []
    while len(found) < count:
        values = {key: str(rng.choice(words)) for key, words in ATTRIBUTES.items()}
        place = [ATTRIBUTES[key].index(values[key]) for key in ("colour", "shape")]
        if train and sum(place) % 4 == 0:
            continue
        background = str(rng.choice(list(BACKGROUNDS), p=list(BACKGROUNDS.values())))
        found.append(Scene(values, background, not train and bool(rng.random() < SHIFTED)))
    return found


def draw_distinct(count: int, rng: np.random.Generator) -> list[Scene]:
    """Draw what scenes show, no two with the same attributes and background; none is shifted."""
    found: dict[tuple[str, ...], Scene] = {}
    while len(found) < count:
        for scene in _scenes(count - len(found), rng, train=False):
            found.setdefault(
                (*scene.values.values(), scene.background), Scene(scene.values, scene.background, False)
            )
    return list(found.values())


def _pixels(scenes: list[Scene], size: int, rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(np.stack([draw_scene(scene, size, rng) for scene in scenes]))


def _asked() -> list[tuple[str, ...]]:
    """List what training asks for: every attribute alone, and five pairs."""
    return [(attribute,) for attribute in ATTRIBUTES] + list(TRAINED_PAIRS)


def _captioned(scenes: list[Scene], size: int, rng: np.random.Generator) -> Captioned:
    """Write every caption of every training scene: ten kinds in three wordings."""
    texts: dict[str, int] = {}
    keys, rows, kinds = [], [], []
    for scene in scenes:
        row = []
        for asked in _asked():
            said = phrase({key: scene.values[key] for key in asked})
            for template in TRAIN_TEMPLATES:
                text = template.format(said)
                if text not in texts:
                    texts[text] = len(texts)
                    keys.append(said)
                row.append(texts[text])
        rows.append(row)
    kinds = [kind for kind in range(len(_asked())) for _ in TRAIN_TEMPLATES]
    pixels = _pixels(scenes, size, rng)
    return Captioned(pixels, list(texts), torch.tensor(rows), torch.tensor(kinds), meanings(keys))


def class_set(asked: tuple[str, ...], scenes: list[Scene], synonyms: bool = False) -> ClassSet:
    """Ask scenes for one attribute or two.

    Args:
        asked: names of the attributes.
        scenes: all are asked.
        synonyms: name the classes by words that training never shows.
    """
    values = list(product(*(ATTRIBUTES[key] for key in asked)))
    place = {value: row for row, value in enumerate(values)}
    label = torch.tensor([place[tuple(scene.values[key] for key in asked)] for scene in scenes])
    name = " and ".join(asked)
    family = (
        "one attribute" if len(asked) == 1 else "held out" if asked in HELD_OUT_PAIRS else "pair trained on"
    )
    if synonyms:
        name, family = f"{name}, by synonyms", "synonyms"
        values = [tuple(SYNONYMS[word] for word in value) for value in values]
    classes = [phrase(dict(zip(asked, value, strict=True))) for value in values]
    rows = torch.arange(len(scenes))
    return ClassSet(name, classes, TEST_TEMPLATES, rows, label, family, side=synonyms)


def _questions(scenes: list[Scene], size: int, rng: np.random.Generator) -> Questions:
    """Ask every scene about each attribute and each of the ten pairs."""
    sets = [class_set((attribute,), scenes) for attribute in ATTRIBUTES]
    sets += [class_set(pair, scenes) for pair in combinations(ATTRIBUTES, 2)]
    sets += [class_set((attribute,), scenes, synonyms=True) for attribute in ATTRIBUTES]
    about = pl.DataFrame(
        [{**scene.values, "background": scene.background, "shifted": scene.shifted} for scene in scenes]
    )
    seen = [
        sum(ATTRIBUTES[key].index(scene.values[key]) for key in ("colour", "shape")) % 4 != 0
        for scene in scenes
    ]
    about = about.with_columns(
        rendering=pl.when("shifted").then(pl.lit("shifted")).otherwise(pl.lit("as trained")),
        combination=pl.Series(["seen" if one else "unseen" for one in seen]),
    )
    return Questions(
        _pixels(scenes, size, rng), about.drop("shifted"), tuple(sets), ("background", "rendering")
    )


def load_scenes(data: SceneData) -> tuple[Captioned, dict[str, Questions]]:
    """Draw the scenes of a recipe; the same settings give the same pixels.

    Returns:
        Captioned scenes to train on, and the questions of "valid" and "test".
    """
    rng = np.random.default_rng(data.seed)
    train = _captioned(_scenes(data.train, rng, train=True), data.size, rng)
    return train, {
        split: _questions(_scenes(data.test, rng, train=False), data.size, rng) for split in ("valid", "test")
    }

"""Does a heat map point at what a class name says? Scenes of four objects, one name asked at a time.

Shape letters: N scenes, C classes, D embedding width, S side in pixels, H and W sides of a map.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from workbench.classifier import Classifier
from workbench.datasets.scenes import ATTRIBUTES, Scene, draw_scene, phrase
from workbench.evaluation.ranking import resample
from workbench.evaluation.similarity import Measured
from workbench.geometry.heat_maps import embedded_places, pointed_at, similarity_map

COLOURS = ATTRIBUTES["colour"]
NAMES = [phrase({"colour": colour}) for colour in COLOURS]
_SIDE = 128  # four cells of a last map along a side, for towers that halve their maps five times
# Top, left, bottom, right of the quarters, row by row.
QUARTERS = torch.tensor(
    [[row, column, row + 0.5, column + 0.5] for row in (0.0, 0.5) for column in (0.0, 0.5)]
)


@dataclass(frozen=True)
class Fours:
    """Scenes put together in fours, each with an object of another colour.

    Attributes:
        pixels: RGB, 0 to 255.
        colours: of the objects in the quarters, as places in :data:`COLOURS`.
    """

    pixels: UInt8[Tensor, "N 3 S S"]
    colours: Int[Tensor, "N 4"]


def draw_fours(count: int, seed: int = 0) -> Fours:
    """Draw scenes of four plain objects that share nothing but their background; 128 pixels a side."""
    rng, pixels, colours = np.random.default_rng(seed), [], []
    for _ in range(count):
        chosen = rng.choice(len(COLOURS), 4, replace=False)
        quarters = []
        for place in chosen:
            shape = str(rng.choice(ATTRIBUTES["shape"]))
            values = {"colour": COLOURS[place], "shape": shape, "texture": "plain"}
            scene = Scene({**values, "count": "one", "place": "centre"}, "light", shifted=False)
            quarters.append(draw_scene(scene, _SIDE // 2, rng))
        pixels.append(np.block([[quarters[0], quarters[1]], [quarters[2], quarters[3]]]))
        colours.append(chosen)
    return Fours(torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(colours)))


@torch.inference_mode()
def class_maps(classifier: Classifier, pixels: UInt8[Tensor, "N 3 S S"]) -> Float[Tensor, "N C H W"]:
    """Split the cosine of each image with each class over positions, by the encoder made for these classes.

    Args:
        classifier: of a model whose image tower averages its last map.
        pixels: of any side that the tower takes; a map has a position for about 32 pixels.

    Raises:
        DataError: another tower.
    """
    source = classifier.source
    with source.lock:
        source.model.use(classifier.weights)
        images = pixels.to(source.device).float().div(127.5).sub(1)
        places = embedded_places(source.model.clip.visual, images)
        source.model.use(None)
    maps = [similarity_map(places, one.expand(len(pixels), -1)) for one in classifier.directions]
    return torch.stack(maps, 1).cpu()


def pointing(classifier: Classifier, fours: Fours, resamples: int = 500) -> dict[str, float]:
    """Measure the share of objects that the map of their colour points at; 0 to 1, ideal 1, chance 0.25.

    Args:
        classifier: for :data:`NAMES`.
        fours: scenes of four.
        resamples: of the bootstrap over scenes.

    Returns:
        value, low, high (95 % bootstrap) and scenes.

    Source: Zhang et al. (2018), Top-down neural attention, arXiv 1608.00507 (the pointing game); the scenes
    of four objects are ours.
    """
    maps = class_maps(classifier, fours.pixels)
    asked = maps[torch.arange(len(maps))[:, None], fours.colours]
    hits = pointed_at(asked.flatten(0, 1), QUARTERS.repeat(len(maps), 1)).double().numpy()
    drawn = resample(hits[None], np.arange(len(hits)) // fours.colours.shape[1], resamples)[0]
    low, high = Measured.interval(drawn)
    return {"value": float(hits.mean()), "low": low, "high": high, "scenes": len(maps)}

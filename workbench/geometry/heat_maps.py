"""Where in an image a similarity comes from: the cosine split over the positions of the last map.

A tower that averages its last map over positions and projects the mean linearly has a cosine that is a sum
over positions, exactly; one with a nonlinear step after the average has not and is refused.

Shape letters: B images, C channels, D embedding width, H and W sides of a map, G and V of another map.
"""

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn
from torch.nn import functional

from workbench.errors import DataError
from workbench.image_encoders import ImageEncoder
from workbench.papers.hyper_clip_towers import PretrainedTower


def similarity_map(places: Float[Tensor, "B D H W"], targets: Float[Tensor, "B D"]) -> Float[Tensor, "B H W"]:
    """Split the cosine of each image with its target over positions.

    h_p = <v_p, y> / (H W |v| |y|), v = mean over p of v_p; the map sums to cos(v, y), and a position against
    it is negative.

    Args:
        places: v_p, embeddings of positions, see :func:`embedded_places`.
        targets: y, for example text embeddings; any norm.

    Returns:
        h, in units of the cosine, each at most |v_p| / (H W |v|) to either side of 0; no value is ideal.

    Source: Stylianou, Souvenir and Pless (2019), Visualizing Deep Similarity Networks, arXiv 1901.00536;
    here for a target that has no map.
    """
    sizes = places.mean((2, 3)).norm(dim=1) * places[0, 0].numel()
    found = torch.einsum("bdhw,bd->bhw", places, functional.normalize(targets, dim=1))
    return found / sizes[:, None, None]


def pair_map(first: Float[Tensor, "D H W"], second: Float[Tensor, "D G V"]) -> Float[Tensor, "H W G V"]:
    """Split the cosine of two images over pairs of positions: h_pq = <v_p, w_q> / (H W G V |v| |w|).

    v and w are the means over positions; the map sums to cos(v, w), -1 to 1, and a pair against it is
    negative. Summed over one image's positions it is the other's :func:`similarity_map`.

    Source: Stylianou, Souvenir and Pless (2019), arXiv 1901.00536.
    """
    one, other = (
        places.flatten(1) / places.mean((1, 2)).norm() / places[0].numel() for places in (first, second)
    )
    return (one.T @ other).unflatten(1, second.shape[1:]).unflatten(0, first.shape[1:])


def pointed_at(heat: Float[Tensor, "B H W"], boxes: Float[Tensor, "B 4"]) -> Bool[Tensor, " B"]:
    """Tell of each map whether its highest position overlaps the object.

    Args:
        heat: one map per image.
        boxes: top, left, bottom, right of the object as shares of the image's side, 0 to 1.

    Returns:
        True for a hit, argmax_p h_p in the box; the share of hits is the accuracy, 0 to 1, ideal 1.

    Source: Zhang et al. (2018), Top-down neural attention, arXiv 1608.00507 (the pointing game). Deviation: a
    position stands for the cell it covers, not for a point.
    """
    high, wide = heat.shape[1:]
    row, column = torch.unravel_index(heat.flatten(1).argmax(1), (high, wide))
    top, left, bottom, right = boxes.T
    across = (column < right * wide) & (column + 1 > left * wide)
    return across & (row < bottom * high) & (row + 1 > top * high)


@torch.no_grad()
def embedded_places(tower: nn.Module, images: Num[Tensor, "B 3 S S"]) -> Float[Tensor, "B D H W"]:
    """Embed every position of the last map as the tower would embed an image that is that position all over.

    Args:
        tower: an encoder of the workbench, an image tower over one, or an open_clip tower over a timm model.
        images: as the tower takes them.

    Returns:
        Embeddings whose mean over positions is the tower's own output.

    Raises:
        DataError: the tower's output is no mean over positions, projected linearly.
    """
    maps, head = _before_pooling(tower, images)
    places = maps.movedim(1, -1)
    places = (places if head is None else head(places)).movedim(-1, 1)
    expected = tower(images)
    worst = (places.mean((2, 3)) - expected).abs().max() / expected.abs().max()
    if not worst < 1e-3:
        raise DataError(
            f"{type(tower).__name__} does more after pooling than project linearly (its output differs from "
            f"the mean over positions by {worst:.2g}), so its cosine is no sum over positions; use a tower "
            "with average pooling"
        )
    return places


def _before_pooling(tower: nn.Module, images: Tensor) -> tuple[Float[Tensor, "B C H W"], nn.Module | None]:
    """Return the last map, and what projects its mean."""
    if isinstance(tower, ImageEncoder):
        return tower.maps(images), None
    if isinstance(tower, PretrainedTower):
        return tower.encoder.maps((images + 1) * 127.5), tower.projection
    trunk = getattr(tower, "trunk", None)
    if trunk is None or not hasattr(trunk, "forward_features"):
        raise DataError(f"{type(tower).__name__} gives no last map; use an image encoder or a timm tower")
    maps = trunk.forward_features(images)
    if maps.ndim != 4:
        raise DataError(f"{type(trunk).__name__} gives tokens, not a map; use a convolutional tower")
    heads = nn.Sequential(trunk.get_classifier(), getattr(tower, "head", nn.Identity()))
    return maps, heads

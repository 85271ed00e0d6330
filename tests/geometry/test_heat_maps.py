"""Heat maps by hand, against the cosine they split, and on objects planted at known places."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cosine_similarity, normalize

from workbench.errors import DataError
from workbench.geometry.heat_maps import embedded_places, pair_map, pointed_at, similarity_map

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=30, deadline=None, database=None)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_a_map_by_hand():
    # Positions (3, 0) and (1, 4) have the mean (2, 2) of norm 2 sqrt 2; the target points along (1, 0).
    places = torch.tensor([[3.0, 1.0], [0.0, 4.0]]).reshape(1, 2, 1, 2)
    found = similarity_map(places, torch.tensor([[5.0, 0.0]]))
    size = 2 * 2 * 2**0.5  # positions times the norm of their mean
    torch.testing.assert_close(found, torch.tensor([[[3 / size, 1 / size]]]))
    assert float(found.sum()) == pytest.approx(0.5**0.5)  # the cosine of 45 degrees


@quick
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000))
def test_maps_sum_to_the_cosine(images, width, high, wide, seed):
    places, targets = drawn(images, width, high, wide, seed=seed), drawn(images, width, seed=seed + 1)
    expected = cosine_similarity(places.mean((2, 3)), targets)
    torch.testing.assert_close(similarity_map(places, targets).sum((1, 2)), expected, atol=1e-5, rtol=0)


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_maps_of_pairs_sum_to_the_cosine_and_to_each_images_own_map(width, high, wide, seed):
    one, other = drawn(width, high, wide, seed=seed), drawn(width, wide, high, seed=seed + 1)
    found = pair_map(one, other)
    assert found.shape == (high, wide, wide, high)
    means = one.mean((1, 2)), other.mean((1, 2))
    assert float(found.sum()) == pytest.approx(float(cosine_similarity(*means, dim=0)), abs=1e-5)
    torch.testing.assert_close(found.sum((2, 3)), similarity_map(one[None], means[1][None])[0])
    torch.testing.assert_close(found.sum((0, 1)), similarity_map(other[None], means[0][None])[0])


def test_pointing_by_hand():
    heat = torch.zeros(3, 2, 2)
    heat[0, 0, 0] = heat[1, 1, 1] = heat[2, 0, 1] = 1
    # The object fills the top left quarter, the bottom right, and a corner of the bottom left.
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9], [0.8, 0.0, 1.0, 0.2]])
    assert pointed_at(heat, boxes).tolist().count(True) == 2


class Tower(nn.Module):
    """A convolution, the mean over positions and a projection, as open_clip wraps a timm model."""

    def __init__(self, after: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.after = Trunk(), after or nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.trunk.forward_features(images).mean((2, 3))
        return self.trunk.fc(self.after(pooled))


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.convolution(images).relu()

    def get_classifier(self) -> nn.Module:
        return self.fc


def test_embedded_places_have_the_towers_output_as_their_mean_biases_included():
    tower, images = Tower(), torch.rand(2, 3, 16, 16)
    places = embedded_places(tower, images)
    assert places.shape == (2, 5, 4, 4)
    torch.testing.assert_close(places.mean((2, 3)), tower(images).detach())


def test_a_tower_that_is_not_linear_after_pooling_is_refused():
    with pytest.raises(DataError, match="more after pooling"):
        embedded_places(Tower(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), torch.rand(2, 3, 16, 16))
    with pytest.raises(DataError, match="gives no last map"):
        embedded_places(nn.Linear(3, 2), torch.rand(1, 3, 8, 8))


def scenes_with_one_object(count: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes that show one object, and the boxes that hold it."""
    from workbench.datasets.scenes import _CENTRE, ATTRIBUTES, Scene, draw_scene

    rng, pixels, boxes = np.random.default_rng(seed), [], []
    for _ in range(count):
        values = {key: str(rng.choice(words)) for key, words in ATTRIBUTES.items()} | {"count": "one"}
        pixels.append(draw_scene(Scene(values, "light", False), size, rng))
        # The middle moves by up to 0.04, the radius is at most 0.22.
        across, down = _CENTRE[values["place"]]
        boxes.append([down - 0.2, across - 0.2, down + 0.2, across + 0.2])
    return torch.from_numpy(np.stack(pixels)), torch.tensor(boxes)


def test_the_map_points_at_the_object_that_tells_two_scenes_apart(prepared):
    from workbench.image_encoders import open_image_encoder

    prepared("encoders-mobilenet-int8")
    encoder = open_image_encoder("mobilenet_v1_025")
    pixels, boxes = scenes_with_one_object(40, 128)
    empty = torch.full_like(pixels, 225)  # a light background without any object
    places = embedded_places(encoder, pixels)
    # What the object adds: the direction from the empty scene to this one.
    target = encoder(pixels) - encoder(empty)
    heat = similarity_map(places, target)
    found = cosine_similarity(encoder(pixels), target)
    torch.testing.assert_close(heat.sum((1, 2)), found, atol=1e-5, rtol=0)
    assert pointed_at(heat, boxes).double().mean() >= 0.8
    # Boxes of other scenes are met by chance only.
    assert pointed_at(heat, boxes.roll(1, 0)).double().mean() <= 0.6


def test_pairs_of_positions_of_a_real_encoder_sum_to_the_cosine_of_two_scenes(prepared):
    from workbench.image_encoders import open_image_encoder

    prepared("encoders-mobilenet-int8")
    encoder = open_image_encoder("mobilenet_v1_025")
    pixels, _ = scenes_with_one_object(2, 128)
    one, other = embedded_places(encoder, pixels)
    cosine = normalize(encoder(pixels), dim=1)
    assert float(pair_map(one, other).sum()) == pytest.approx(float(cosine[0] @ cosine[1]), abs=1e-5)

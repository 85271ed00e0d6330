"""Kept connectors: asked again they answer as they did, and what cannot be asked is one message."""

import json

import pytest
import torch
from torch.nn.functional import normalize

from workbench.connector_zoo import ConnectorZoo
from workbench.errors import DataError, RunError
from workbench.geometry.closed_form import LinearMap
from workbench.papers.comparison import keep_tensors
from workbench.papers.hyper_align import Connected
from workbench.papers.hyper_align_search import linear_maps

PAIRS = [("a text.v2", "timm:vit/16"), ("a text.v2", "hog, centred"), ("b", "timm:vit/16")]
WIDTHS = {"a text.v2": 4, "b": 5, "timm:vit/16": 6, "hog, centred": 3}


def map_of(text: str, image: str, seed: int = 0) -> LinearMap:
    draw = torch.Generator().manual_seed(seed)
    return LinearMap(
        torch.randn(WIDTHS[text], WIDTHS[image], generator=draw), torch.randn(WIDTHS[image], generator=draw)
    )


@pytest.fixture
def folder(tmp_path):
    """Three connectors as a run keeps them."""
    maps = {pair: map_of(*pair, seed) for seed, pair in enumerate(PAIRS)}
    about = {"model": "ape", "seed": 0, "settings": {"kind": "ape"}}
    ConnectorZoo(maps, "ape").keep(tmp_path / "ape", about)
    return tmp_path / "ape"


def rows_of(name: str, count: int = 3) -> torch.Tensor:
    return torch.randn(count, WIDTHS[name], generator=torch.Generator().manual_seed(7))


def test_kept_connectors_are_those_that_were_trained(folder):
    opened = ConnectorZoo.load(folder)
    assert opened.model == "ape"
    assert set(opened.pairs()) == set(PAIRS)
    for seed, pair in enumerate(PAIRS):
        found, expected = opened.connector(*pair), map_of(*pair, seed)
        assert torch.equal(found.weight, expected.weight)
        assert torch.equal(found.bias, expected.bias)


def test_similarity_is_the_cosine_of_mapped_texts_and_images(folder):
    opened, (text, image) = ConnectorZoo.load(folder), PAIRS[0]
    texts, images = rows_of(text), rows_of(image, 2)
    found = opened.similarity(texts, images, text, image)
    weight, bias = map_of(text, image).weight, map_of(text, image).bias
    for row, one in enumerate(texts):
        mapped = (one / one.norm()) @ weight + bias  # connectors were trained on unit texts
        for column, other in enumerate(images):
            expected = (mapped @ other) / (mapped.norm() * other.norm())
            assert found[row, column].item() == pytest.approx(expected.item(), abs=1e-6)
    assert found.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(opened.similarity(3 * texts, images / 2, text, image), found)


@pytest.mark.parametrize("pair", [("b", "hog, centred"), ("timm:vit/16", "b"), ("", "")])
def test_an_unknown_pair_lists_those_there_are(folder, pair):
    with pytest.raises(
        DataError, match=r"no connector .*; there are: a text.v2 -> hog, centred; a text.v2 -> "
    ):
        ConnectorZoo.load(folder).connector(*pair)
    with pytest.raises(DataError, match="no connector"):
        ConnectorZoo.load(folder).similarity(torch.ones(1, 4), torch.ones(1, 6), *pair)


@pytest.mark.parametrize(
    ("side", "spoil", "message"),
    [
        (0, lambda rows: rows[:, :2], "a text.v2 has width 4, got embeddings of width 2"),
        (1, lambda rows: rows[:, :2], "timm:vit/16 has width 6, got embeddings of width 2"),
        (0, lambda rows: rows * torch.tensor([[1.0], [0.0], [1.0]]), "a text.v2, row 1: the vector is zero"),
        (1, lambda rows: rows.where(rows != rows[2, 0], torch.nan), "vit/16, row 2: the vector is zero, NaN"),
    ],
)  # fmt: skip
def test_rows_that_have_no_cosine_or_another_width_are_named(folder, side, spoil, message):
    text, image = PAIRS[0]
    given = [rows_of(text), rows_of(image)]
    given[side] = spoil(given[side])
    with pytest.raises(DataError, match=message):
        ConnectorZoo.load(folder).similarity(*given, text, image)


@pytest.mark.parametrize(
    "damage", ["no head", "no weights", "cut", "no model", "no bias", "nan", "infinite", "no json", "a list"]
)
def test_files_that_are_missing_or_damaged_are_one_message(folder, damage):
    head, weights = folder / "head.json", folder / "head.safetensors"
    if damage in ("no bias", "nan", "infinite"):
        weight, bias = map_of(*PAIRS[0]).weight, map_of(*PAIRS[0]).bias
        weight[0, 0] = {"nan": torch.nan, "infinite": torch.inf}.get(damage, 1)
        tensors = {"a text.v2|timm:vit/16.weight": weight}
        tensors |= {} if damage == "no bias" else {"a text.v2|timm:vit/16.bias": bias}
        keep_tensors(folder, tensors, {"model": "ape"})
    match damage:
        case "no head":
            head.unlink()
        case "no weights":
            weights.unlink()
        case "cut":
            weights.write_bytes(weights.read_bytes()[:50])
        case "no model":
            head.write_text(json.dumps({"seed": 0}))
        case "no json":
            head.write_text("{")
        case "a list":
            head.write_text("[]")
    with pytest.raises(
        RunError, match=r"ape holds no usable connectors: .*\. Run the recipe again"
    ) as caught:
        ConnectorZoo.load(folder)
    assert "\n" not in str(caught.value)


def test_connectors_that_are_no_plain_maps_are_not_kept(tmp_path):
    plain, unit = map_of(*PAIRS[0]), lambda rows: normalize(rows, dim=1)
    pairs = {
        PAIRS[0]: Connected(plain),
        PAIRS[1]: Connected(map_of(*PAIRS[1]), unit),  # maps images, too
        PAIRS[2]: Connected(torch.nn.Linear(5, 6)),
    }
    ConnectorZoo(linear_maps(pairs), "mixed").keep(tmp_path, {"model": "mixed"})
    assert ConnectorZoo.load(tmp_path).pairs() == [PAIRS[0]]

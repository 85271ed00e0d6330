"""What a set of texts does to an image encoder: changes, distances and statistics against arithmetic."""

import polars as pl
import pytest
import torch

from workbench.classifier import HyperCLIPModel
from workbench.datasets.class_sets import ClassSet
from workbench.errors import DataError, RunError
from workbench.hypernetworks import GeneratedWeights
from workbench.hypernetworks.spec import ParamSpec, Slot
from workbench.inspection import generate_for, layer_changes, order_changes, set_distances, statistics_ratios
from workbench.papers.hyper_clip import HyperCLIP, build_clip
from workbench.papers.hyper_clip_settings import ClipModelSettings, ImageTower, TextTower

SPEC = ParamSpec((Slot("bn1.scale", (2,), "vector"), Slot("bn1.shift", (2,), "vector")))
WEIGHTS = GeneratedWeights(
    SPEC,
    {
        "bn1.scale": torch.tensor([[1.0, -3.0], [4.0, -3.0]]),
        "bn1.shift": torch.tensor([[0.0, 0.5], [0.0, 4.5]]),
    },
)


def model_of(kind: str, **more: object) -> HyperCLIPModel:
    """A small model whose text tower reads tokens, with a generator that has moved."""
    torch.manual_seed(0)
    image = ImageTower(timm_model_name="test_efficientnet", image_size=32)
    text = TextTower(kind="transformer", width=16, layers=1, heads=2, context=16)
    settings = ClipModelSettings(name=kind, kind=kind, width=16, bottleneck=4, **more)
    model = HyperCLIP(settings, build_clip(image, text, 8, 0.0, 384), 8).eval()
    if model.generator is not None:
        torch.nn.init.normal_(model.generator.head.weight, std=0.1)
    return HyperCLIPModel(model, 32, None, 16)


def class_set(*names: str) -> ClassSet:
    nothing = torch.zeros(0, dtype=torch.long)
    return ClassSet(" ".join(names), list(names), ("a {}", "one {}"), nothing, nothing)


@pytest.fixture(scope="module")
def model():
    return model_of("hyper", mode="residual")


def test_changes_are_means_over_a_layers_channels():
    rows = layer_changes(WEIGHTS, ["first", "second"]).to_dicts()
    # first: |1|, |-3| -> 2 and (1 - 3) / 2 -> -1; second: 3.5 and 0.5
    assert rows[0] == {"set": "first", "layer": "bn1", "part": "scale", "mean_absolute": 2.0, "mean": -1.0}
    assert rows[2] == {"set": "second", "layer": "bn1", "part": "scale", "mean_absolute": 3.5, "mean": 0.5}
    assert [row["part"] for row in rows] == ["scale", "shift"] * 2


def test_distances_run_over_all_generated_numbers():
    # differences are (3, 0) and (0, 4)
    assert set_distances(WEIGHTS).tolist() == [[0, pytest.approx(5)], [pytest.approx(5), 0]]


def test_each_class_set_gets_the_row_that_it_has_by_itself(model):
    sets = [class_set("cat", "dog"), class_set("red", "green", "blue")]
    both = generate_for(model, sets)
    assert len(both) == 2
    for place, one in enumerate(sets):
        alone = generate_for(model, [one])
        for slot, values in alone.tensors.items():
            torch.testing.assert_close(both.tensors[slot][place], values[0])
    assert float(set_distances(both)[0, 1]) > 0


def test_nothing_to_generate_is_refused(model):
    with pytest.raises(DataError, match="no class set"):
        generate_for(model, [])
    with pytest.raises(RunError, match="model siglip generates no weights"):
        generate_for(model_of("siglip"), [class_set("cat", "dog")])


def test_order_and_repetition_move_nothing(model):
    moved = order_changes(model, class_set("cat", "dog", "horse", "cow"))
    assert moved["largest number"] > 1e-3
    assert moved["new order"] < 1e-5  # rounding of single precision
    assert moved["set given twice"] < 1e-5


def test_statistics_of_a_task_stand_beside_the_running_ones():
    model = model_of("hyper", mode="residual")
    seed = torch.Generator().manual_seed(0)
    model.model.calibration = torch.randint(0, 256, (16, 3, 32, 32), generator=seed, dtype=torch.uint8)
    found = statistics_ratios(model.adapt(["cat", "dog"]))
    first = next(iter(model.model.target.norms))
    ratios = found.filter(pl.col("layer") == first)["ratio"]
    # Nothing is generated before the first norm: its input's deviation is the stem's, the running one is 1.
    with torch.no_grad():
        images = model.model.calibration.float() / 127.5 - 1
        stem = model.model.clip.visual.trunk.conv_stem(images)
    eps = model.model.target.norms[first].norm.eps
    expected = (stem.var((0, 2, 3)) + eps).sqrt() / (1 + eps) ** 0.5
    assert len(ratios) == len(expected)
    assert ratios.to_list() == pytest.approx(expected.tolist(), rel=1e-3)


def test_without_calibration_images_or_a_generator_there_are_no_ratios(model):
    assert statistics_ratios(model.adapt(["cat", "dog"])).height == 0
    assert statistics_ratios(model_of("siglip").adapt(["cat", "dog"])).height == 0

"""Class names in, a classifier out: scores by hand, tasks side by side, threads, and what is refused."""

import copy
import json
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench import classifier as classifier_module
from workbench.classifier import Classifier, HyperCLIPModel
from workbench.datasets.class_sets import PLAIN_TEMPLATES
from workbench.errors import DataError, RunError
from workbench.papers.comparison import keep_head

ANIMALS = ["a red fox", "a grey wolf", "a green frog"]
VEHICLES = ["tram", "ferry", "bicycle", "rocket"]


def pixels_of(count: int = 5, seed: int = 2, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def source(image_text_model) -> HyperCLIPModel:
    """A model that generates norms and is calibrated per task."""
    source = image_text_model()
    source.model.calibration = pixels_of(12, seed=9)
    return source


@pytest.fixture(scope="module")
def animals(source) -> Classifier:
    return source.adapt(ANIMALS)


# --- scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hyper", "siglip"])
def test_scores_are_scaled_products_with_the_mean_prompt_of_each_class(kind, image_text_model, word_store):
    source = image_text_model(kind)
    model, found = source.model, source.adapt(ANIMALS)
    with torch.no_grad():
        directions = []
        for name in ANIMALS:
            prompts = model.embed_texts(word_store.embed([text.format(name) for text in PLAIN_TEMPLATES]))
            mean = prompts.mean(0)
            directions.append(mean / mean.norm())
        directions = torch.stack(directions)
        model.use(model.generate(directions))
        images = model.embed_images(pixels_of())
    model.use(None)
    scores = found.scores(pixels_of())
    for image in range(5):
        for place in range(3):
            expected = 10.0 * float(images[image] @ directions[place]) - 4.0  # t and b at their start
            assert scores[image, place].item() == pytest.approx(expected, abs=1e-4)
    assert found.classes == ANIMALS


def test_ranks_count_the_classes_that_score_at_least_as_high(animals):
    label = torch.tensor([0, 1, 2, 0, 1])
    scores = animals.scores(pixels_of())
    own = scores.gather(1, label[:, None])
    assert animals.ranks(pixels_of(), label).tolist() == (scores >= own).sum(1).tolist()


def test_strength_goes_from_the_encoder_without_a_condition_to_the_model(image_text_model):
    source = image_text_model(mode="residual")
    whole = source.adapt(ANIMALS).vector()
    assert source.blends
    assert source.adapt(ANIMALS, strength=0.0).weights is None
    assert torch.equal(source.adapt(ANIMALS, strength=1.0).vector(), whole)
    # Without calibration images, what is added to the tower's own norms is scaled and nothing else.
    assert torch.equal(source.adapt(ANIMALS, strength=0.5).vector(), whole / 2)


@pytest.mark.parametrize("kind", ["hyper", "siglip"])
def test_a_model_without_an_unconditioned_encoder_has_strength_1_alone(kind, image_text_model):
    source = image_text_model(kind)
    assert not source.blends
    with pytest.raises(DataError, match=f"model {kind} has no encoder without its condition"):
        source.adapt(ANIMALS, strength=0.5)


def test_classify_names_the_best_class_and_its_share_of_the_softmax(animals):
    scores, found = animals.scores(pixels_of()), animals.classify(pixels_of())
    assert found["class"].to_list() == [ANIMALS[place] for place in scores.argmax(1)]
    exponentials = np.exp(scores.double().numpy())
    expected = exponentials.max(1) / exponentials.sum(1)
    assert found["share"].to_list() == pytest.approx(expected.tolist(), rel=1e-4)
    assert found["share"].is_between(1 / 3, 1).all()


def test_the_vector_is_all_generated_numbers_in_the_order_of_the_spec(animals):
    vector, spec = animals.vector(), animals.weights.spec
    assert vector.shape == (spec.numel,)
    again = spec.compose(vector[None])
    for slot in spec.slots:
        assert torch.equal(again.tensors[slot.name], animals.weights.tensors[slot.name])
    assert spec.slots[0].name == "trunk.bn1.scale"


def test_a_model_that_generates_nothing_has_no_vector(image_text_model):
    found = image_text_model("siglip").adapt(ANIMALS)
    assert found.weights is None
    with pytest.raises(RunError, match="model siglip generates no weights; there is no task vector"):
        found.vector()


def test_a_task_is_calibrated_when_it_is_made(source, animals):
    with torch.no_grad():
        plain = source.model.generate(animals.directions)
        expected = source.model.calibrate(plain)
    found = animals.weights.tensors
    assert all(torch.equal(found[name], expected.tensors[name]) for name in found)
    assert not all(torch.equal(found[name], plain.tensors[name]) for name in found)


def test_images_come_in_blocks_and_none_gives_none(animals, monkeypatch):
    whole = animals.scores(pixels_of(7))
    monkeypatch.setattr(classifier_module, "AT_ONCE", 3)
    torch.testing.assert_close(animals.scores(pixels_of(7)), whole, rtol=0, atol=1e-4)
    empty = pixels_of()[:0]
    assert animals.scores(empty).shape == (0, 3)
    assert animals.classify(empty).height == 0


def test_names_are_normalised_and_may_hold_braces(source):
    assert source.adapt(["  fox ", "cafe\u0301"]).classes == ["fox", "caf\u00e9"]
    assert source.adapt(["{}", "{name}"], ("one {}",)).classes == ["{}", "{name}"]


# --- several tasks ------------------------------------------------------------------------------------------


def test_images_of_several_tasks_in_one_pass_are_those_task_by_task(source, animals):
    tasks = [animals, source.adapt(VEHICLES), source.adapt(["day", "night"])]
    rows = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    found = source.embed_tasks(pixels_of(7), tasks, rows)
    for image, row in enumerate(rows.tolist()):
        expected = source.embed(pixels_of(7)[image : image + 1], tasks[row].weights)[0]
        # Scale and shift come after the known statistics in one product: single precision.
        torch.testing.assert_close(found[image], expected, rtol=0, atol=1e-4)
    one, other = (source.embed(pixels_of(), task.weights) for task in tasks[:2])
    assert not torch.allclose(one, other, atol=1e-2)


def test_tasks_of_a_model_that_generates_nothing_share_its_encoder(image_text_model):
    source = image_text_model("siglip")
    tasks = [source.adapt(ANIMALS), source.adapt(VEHICLES)]
    found = source.embed_tasks(pixels_of(), tasks, torch.tensor([0, 1, 1, 0, 1]))
    assert torch.equal(found, source.embed(pixels_of(), None))


def test_a_task_stays_what_it_was_when_others_are_made(source, animals):
    before = animals.scores(pixels_of())
    source.adapt(VEHICLES).scores(pixels_of(3))
    assert torch.equal(animals.scores(pixels_of()), before)


def in_threads(source: HyperCLIPModel, rounds: int = 6) -> list[list[torch.Tensor]]:
    """Two threads adapt and classify at once, in small steps, one task each."""
    tasks, start = (ANIMALS, VEHICLES), threading.Barrier(2)

    def work(place: int) -> list[torch.Tensor]:
        start.wait()
        return [source.adapt(tasks[place]).scores(pixels_of(6, seed=place)) for _ in range(rounds)]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(2)))


def both_tasks(source: HyperCLIPModel) -> list[torch.Tensor]:
    """The same, one after the other."""
    tasks = (ANIMALS, VEHICLES)
    return [source.adapt(names).scores(pixels_of(6, seed=place)) for place, names in enumerate(tasks)]


@pytest.fixture
def small_steps(monkeypatch):
    """Blocks of one image, and threads that give way often."""
    monkeypatch.setattr(classifier_module, "AT_ONCE", 1)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("small_steps")
def test_threads_do_not_mix(source):
    expected = both_tasks(source)
    for one, found in zip(expected, in_threads(source), strict=True):
        assert len(found) == 6
        assert all(torch.equal(one, again) for again in found)


@pytest.mark.usefixtures("small_steps")
def test_without_its_lock_threads_would_mix(image_text_model):
    """What the lock is for: else the test above could never fail."""
    free = image_text_model()
    expected = both_tasks(free)
    free.lock = nullcontext()
    for _ in range(20):
        try:
            found = in_threads(free)
        except RunError:  # the other thread took the tower back to its neutral state
            return
        if not all(
            torch.equal(one, again) for one, own in zip(expected, found, strict=True) for again in own
        ):
            return
    raise AssertionError("threads never met")


def test_the_store_is_asked_by_one_thread_at_a_time(source):
    inside, most = [0], [0]
    store = copy.copy(source.store)

    def embed(texts: list[str]) -> torch.Tensor:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)
        found = source.store.embed(texts)
        inside[0] -= 1
        return found

    store.embed = embed
    in_threads(HyperCLIPModel(source.model, 32, store), rounds=3)
    assert most == [1]


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fox", "wolf", "fox"], "class named twice: fox"),
        ([], "at least two classes"),
        (["fox"], "at least two classes"),
        (["fox", " "], "class 1 is empty"),
        ([f"class {place}" for place in range(10_000)], "10,000 classes; at most 5,000"),
    ],
)
def test_class_names_that_cannot_be_used_are_refused(names, message, source):
    with pytest.raises(DataError, match=message):
        source.adapt(names)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (("a photo of a {}", "a photo"), "template 'a photo' needs one {} where the class name goes"),
        (("{} and {}",), "needs one {}"),
        (("a {name}",), "needs one {}"),
        ((" ",), "template 0 is empty"),
        ((), r"templates must be a list of one or more texts, got \(\)"),
        ("a {}", "templates must be a list of one or more texts, got 'a {}'"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(templates, message, source):
    with pytest.raises(DataError, match=message):
        source.adapt(ANIMALS, templates)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pixels_of(size=40), r"torch.uint8 of shape \(5, 3, 40, 40\); give uint8 \(N, 3, 32, 32\)"),
        (pixels_of()[0], r"torch.uint8 of shape \(3, 32, 32\)"),
        (pixels_of()[:, :1], r"torch.uint8 of shape \(5, 1, 32, 32\)"),
        (pixels_of().float(), r"torch.float32 of shape \(5, 3, 32, 32\)"),
        (pixels_of().permute(0, 2, 3, 1), r"shape \(5, 32, 32, 3\)"),
    ],
)
def test_images_of_another_shape_or_type_are_refused(images, message, animals):
    with pytest.raises(DataError, match=message):
        animals.classify(images)


def test_an_array_is_refused_by_its_type_and_shape(animals):
    with pytest.raises(DataError, match=r"images are uint8 of shape \(5, 3, 32, 32\); give"):
        unwrap(Classifier.scores)(animals, pixels_of().numpy())


# --- kept models --------------------------------------------------------------------------------------------


def keep(source: HyperCLIPModel, folder: Path, **changes) -> Path:
    """Write a model as a run does."""
    about = {
        "settings": source.model.settings.model_dump(mode="json"),
        "text_width": 384,
        "calibration": len(source.model.calibration),
        "image": {"timm_model_name": "test_efficientnet", "image_size": 32},
        "text": {"kind": "sentences", "hidden": 24},
        "embed_dim": 16,
        "encoder": "all-MiniLM-L6-v2",
    }
    keep_head(folder, source.model, about | changes)
    return folder


@pytest.mark.parametrize("kind", ["hyper", "siglip", "adapter", "token_control"])
@pytest.mark.parametrize("images", [0, 6])
def test_a_kept_model_scores_as_it_did(kind, images, image_text_model, word_store, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier_module, "TextEncoder", lambda *_: None)
    monkeypatch.setattr(classifier_module, "EmbeddingStore", lambda *_: word_store)
    source = image_text_model(kind)
    source.model.calibration = pixels_of(images) if images else source.model.calibration
    loaded = HyperCLIPModel.load(keep(source, tmp_path))
    assert loaded.size == 32
    assert not loaded.model.training
    one, other = (model.adapt(ANIMALS).scores(pixels_of()) for model in (source, loaded))
    assert torch.equal(one, other)


def test_a_kept_model_that_reads_tokens_needs_no_encoder(tmp_path):
    from workbench.papers.hyper_clip import HyperCLIP, build_clip
    from workbench.papers.hyper_clip_settings import ClipModelSettings, ImageTower, TextTower

    text = {"kind": "transformer", "width": 16, "layers": 1, "heads": 2, "context": 12}
    image = ImageTower(timm_model_name="test_efficientnet", image_size=32)
    settings = ClipModelSettings(name="hyper", kind="hyper", width=16, bottleneck=4)
    model = HyperCLIP(settings, build_clip(image, TextTower(**text), 16, 0.0, 12), 16)
    source = HyperCLIPModel(model, 32, None, 12)
    loaded = HyperCLIPModel.load(keep(source, tmp_path, text=text, text_width=12))
    assert loaded.store is None
    long = [" ".join(["word"] * 50), "short"]  # is cut
    one, other = (model.adapt(long).scores(pixels_of()) for model in (source, loaded))
    assert torch.equal(one, other)


def refused(folder: Path) -> str:
    with pytest.raises(RunError, match="holds no usable image-text model: .*Train it again") as problem:
        HyperCLIPModel.load(folder)
    assert str(folder) in str(problem.value)
    return str(problem.value)


def test_a_missing_folder_or_file_is_refused(source, tmp_path):
    assert "head.json" in refused(tmp_path / "nowhere")
    keep(source, tmp_path)
    (tmp_path / "head.safetensors").unlink()
    assert "head.safetensors" in refused(tmp_path)


def test_weights_that_are_cut_short_are_refused(source, tmp_path):
    file = keep(source, tmp_path) / "head.safetensors"
    raw = file.read_bytes()
    for length in (0, 4, 200, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:length])
        refused(tmp_path)


class Trap:
    """A pickle that leaves a file behind if it is ever read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_under_the_name_of_weights_is_not_run(source, tmp_path):
    file = keep(source, tmp_path) / "head.safetensors"
    caught = tmp_path / "caught"
    for write in (
        lambda: file.write_bytes(pickle.dumps(Trap(caught))),
        lambda: torch.save({"weights": Trap(caught)}, file),
    ):
        write()
        refused(tmp_path)
        assert not caught.exists()
    pickle.loads(pickle.dumps(Trap(caught))).close()  # the trap does work
    assert caught.exists()


def test_weights_of_another_tower_or_width_are_refused(source, image_text_model, tmp_path):
    keep(image_text_model(tower="test_convnext"), tmp_path)
    assert "state_dict" in refused(tmp_path)
    keep(source, tmp_path, embed_dim=8)
    assert "size mismatch" in refused(tmp_path)
    keep(image_text_model("siglip"), tmp_path, settings=source.model.settings.model_dump(mode="json"))
    refused(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, source, tmp_path):
    file = keep(source, tmp_path) / "head.safetensors"
    tensors = load_file(file)
    tensors["clip.visual.trunk.conv_stem.weight"][0, 0, 0, 0] = value
    save_file(tensors, file)
    assert "NaN or infinity" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "'image'"),
        ("[1, 2]", ""),
        ("not json", "Expecting value"),
        ({"image": {"timm_model_name": "no_such_tower", "image_size": 32}}, "no_such_tower"),
        ({"image": {"timm_model_name": "test_efficientnet", "image_size": 32, "more": 1}}, "more"),
        ({"settings": {"name": "x", "kind": "unheard of"}}, "kind"),
        ({"calibration": -1}, ""),
        ({"calibration": "many"}, ""),
        ({"text": "sentences"}, ""),
    ],
)
def test_a_card_that_makes_no_sense_is_refused(content, message, source, tmp_path):
    file = keep(source, tmp_path) / "head.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_text(content)
    assert message in refused(tmp_path)

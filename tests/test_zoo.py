"""A zoo of encoders: one row order, features computed once, controls of a known rank, refusals by name."""

import io
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from timm.models import save_for_hf
from transformers import BertConfig, BertModel, BertTokenizer

from workbench import zoo as zoo_module
from workbench import zoo_encoders
from workbench.classical_encoders import fit_image_encoder, fit_text_encoder
from workbench.datasets.caption_pairs import PairData, Pictures, load_pairs
from workbench.datasets.images import Fitting
from workbench.encoders import TextEncoder
from workbench.errors import DataError, ManifestError
from workbench.evaluation.retrieval import recall_values, retrieval_ranks
from workbench.features import Features
from workbench.geometry.closed_form import LinearMap
from workbench.image_encoders import open_image_encoder
from workbench.papers.hyper_align import Task, closed_form
from workbench.papers.hyper_align_settings import AlignModelSettings
from workbench.store import EmbeddingStore
from workbench.training import Training
from workbench.zoo import Control, Zoo, ZooSettings, open_zoo

CONTROLS = (
    Control(kind="duplicate", of="colour_histogram"),
    Control(kind="random"),
    Control(kind="leaked", of="lsa_words"),
    Control(kind="noise", of="colour_histogram", noise=0.5),
    Control(kind="noise", of="colour_histogram", noise=2.0),
    Control(kind="centred", of="colour_histogram"),
)
NAMES = [
    "colour_histogram, duplicate", "random", "lsa_words, leaked", "colour_histogram + noise 0.5",
    "colour_histogram + noise 2", "colour_histogram, centred",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs():
    return load_pairs(PairData(source="scenes", name="scenes", size=32, train=400, test=100))


@pytest.fixture(scope="module")
def few():
    """Fewer of them, and no class sets."""
    return replace(
        load_pairs(PairData(source="scenes", name="scenes", size=32, train=100, test=50)), asked=()
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of one's own."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settings_of(*images, texts=("lsa_words",), controls=()):
    return ZooSettings(images=images, texts=texts, controls=controls)


@pytest.fixture(scope="module")
def zoo(pairs):
    return open_zoo(settings_of("colour_histogram", "frequencies", controls=CONTROLS), pairs)


class Made:
    """An image encoder whose features are the mean colours, and a one; counts what it is asked for."""

    side, parameters, fitting = 16, 7, Fitting()

    def __init__(self, fingerprint="made", spoil=None):
        self.fingerprint, self.spoil, self.seen = fingerprint, spoil, []

    def on(self, device):
        self.seen.append(device)

        def compute(pixels):
            assert pixels.shape[1:] == (3, 16, 16)
            self.seen.append(len(pixels))
            features = torch.cat([pixels.float().mean((2, 3)), torch.ones(len(pixels), 1)], 1)
            return features if self.spoil is None else self.spoil(features)

        return compute


@pytest.fixture
def made(monkeypatch):
    """Encoders "made:..." in place of pretrained ones."""
    known = {}

    def open_made(name):
        return known.setdefault(name, Made(name))

    open_made.cache_clear = lambda: None
    monkeypatch.setattr(zoo_module, "open_pretrained", open_made)
    return known


# --- features -----------------------------------------------------------------------------------------------


def test_every_encoder_has_a_row_for_every_image_or_caption_in_one_order(zoo, pairs):
    assert list(zoo.images) == ["colour_histogram", "frequencies", *NAMES]
    assert list(zoo.texts) == ["lsa_words"]
    assert {len(one) for one in zoo.images.values()} == {600}
    assert len(zoo.texts["lsa_words"]) == len(pairs.texts)
    assert len({one.order for one in zoo.images.values()}) == 1
    assert torch.equal(zoo.choices, pairs.choices)
    assert zoo.splits is pairs.splits
    assert zoo.controls == set(NAMES)
    assert zoo.pairs() == [("lsa_words", "colour_histogram"), ("lsa_words", "frequencies")]
    assert zoo.pairs(controls=True) == [("lsa_words", name) for name in zoo.images]
    assert {name: one.parameters for name, one in zoo.images.items()} == dict.fromkeys(zoo.images, 0)


def test_classical_encoders_are_fitted_on_the_training_rows_alone(zoo, pairs):
    pixels, train = pairs.pictures.pixels(slice(None), 48), pairs.splits["train"]
    expected = fit_image_encoder("frequencies", pixels[train])(pixels)
    # Features are kept in 16 bits: eleven binary digits.
    torch.testing.assert_close(
        torch.from_numpy(zoo.images["frequencies"].array[:].astype("float32")), expected, rtol=1e-3, atol=1e-3
    )
    learned = sorted({pairs.texts[row] for row in pairs.choices[train].flatten()})
    expected = fit_text_encoder("lsa_words", learned)(pairs.texts)
    torch.testing.assert_close(
        torch.from_numpy(zoo.texts["lsa_words"].array[:].astype("float32")), expected, rtol=1e-3, atol=1e-3
    )


def test_class_sets_are_seen_by_every_encoder_and_by_no_control(zoo, pairs):
    assert [one.name for one in zoo.asked] == ["colour", "shape", "texture", "count", "place"]
    asked = zoo.asked[0]
    assert set(asked.images) == {"colour_histogram", "frequencies"}
    assert asked.classes == 8
    assert len(asked.prompts["lsa_words"]) == 8 * 3  # all wordings of the first class come first
    assert torch.equal(asked.label, pairs.asked[0].classes.label)
    # The test scenes: features are those of the test rows.
    rows = zoo.splits["test"]
    for name in asked.images:
        everything = torch.arange(len(rows))
        assert torch.equal(asked.images[name].unit(everything), zoo.images[name].unit(rows))


def test_features_are_computed_once_and_found_again(pairs, cache, made):
    settings = settings_of("made:a", "made:b")
    first = open_zoo(settings, pairs)
    # Opened once; 600 images in blocks of 512, and five class sets of the same 100 test scenes, kept once.
    assert made["made:a"].seen == ["cpu", 512, 88, 100]
    again = open_zoo(settings, pairs)
    assert made["made:a"].seen == ["cpu", 512, 88, 100]
    for name in first.images:
        rows = torch.arange(600)
        assert torch.equal(first.images[name].unit(rows), again.images[name].unit(rows))
    assert first.images["made:a"].parameters == 7


@pytest.mark.parametrize("change", ["weights", "pictures", "version"])
def test_other_weights_pictures_or_another_version_are_computed_anew(few, cache, made, change, monkeypatch):
    settings = settings_of("made:a", "colour_histogram")
    open_zoo(settings, few)
    fitted = []
    monkeypatch.setattr(
        zoo_module, "fit_image_encoder",
        lambda name, pixels: (fitted.append(name), fit_image_encoder(name, pixels))[1],
    )  # fmt: skip
    if change == "weights":
        made["made:a"].fingerprint = "other"
    if change == "pictures":
        few = replace(few, pictures=Pictures(few.pictures.contents, few.pictures.names, "other"))
    if change == "version":
        monkeypatch.setattr("workbench.__version__", "99.0.0")
    made["made:a"].seen.clear()
    open_zoo(settings, few)
    assert bool(made["made:a"].seen) == (change != "version")
    assert bool(fitted) == (change != "weights")


def test_an_encoder_gets_pictures_as_it_wants_them(few, cache, made):
    made["made:a"] = Made("made:a")
    made["made:a"].fitting = Fitting(shorter=32)
    found = open_zoo(settings_of("made:a", "made:b"), few)
    for name, part in (("made:a", few.pictures.contents[:3, :, 8:24, 8:24]),
                       ("made:b", few.pictures.pixels(slice(0, 3), 16))):  # fmt: skip
        expected = torch.cat([part.float().mean((2, 3)), torch.ones(3, 1)], 1)
        expected = torch.nn.functional.normalize(expected, dim=1)
        # Kept in 16 bits.
        torch.testing.assert_close(found.images[name].unit(torch.arange(3)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda features: features * float("nan"), "made:a, row 0: the features are NaN"),
        (lambda features: features * 0, "made:a, row 0: the features are all zeros in 16 bits"),
        (lambda features: features * 1e6, "made:a, row 0: the features are NaN, infinite, or above 65,504"),
        (lambda features: features[1:], r"made:a: features of shape \(199, 4\) for rows 0 to 199"),
        (lambda features: features[:, 0], "made:a: features are float16 of shape"),
    ],
)  # fmt: skip
def test_an_encoder_that_gives_no_usable_features_is_named_with_the_row(few, cache, made, spoil, message):
    made["made:a"] = Made("made:a", spoil)
    with pytest.raises(DataError, match=message):
        open_zoo(settings_of("made:a", "made:b"), few)
    made["made:a"].spoil = None  # nothing wrong was kept
    assert len(open_zoo(settings_of("made:a", "made:b"), few).images["made:a"]) == 200


# --- prepared encoders are checked --------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch, made):
    """The prepared encoder cifar_resnet20 as a made one; lists what is checked, and refuses if told so."""
    seen = []

    def check(name):
        seen.append(name)
        if check.refuses:
            raise ManifestError(f"{name} has top-1 accuracy 0.1, its manifest says 0.9: BGR?")

    check.refuses = False
    monkeypatch.setattr(zoo_module, "check_encoder", check)
    return SimpleNamespace(seen=seen, check=check)


def test_a_wrongly_prepared_encoder_is_refused_before_anything_is_computed(few, cache, made, checked):
    settings = settings_of("cifar_resnet20", "made:a")
    checked.check.refuses = True
    with pytest.raises(ManifestError, match="cifar_resnet20 has top-1 accuracy 0.1, its manifest says 0.9"):
        open_zoo(settings, few)
    assert made["cifar_resnet20"].seen == []
    checked.check.refuses = False
    open_zoo(settings, few)
    assert made["cifar_resnet20"].seen == ["cpu", 200]


def test_an_encoder_is_checked_when_it_computes_and_not_when_its_features_are_there(
    few, cache, made, checked
):
    for _ in range(2):
        open_zoo(settings_of("cifar_resnet20", "made:a"), few)
        assert checked.seen == ["cifar_resnet20"]  # others have no manifest


def test_prepared_encoders_get_no_more_pixels_than_asked_for_and_others_what_they_were_made_for(
    few, cache, made, checked
):
    made["cifar_resnet20"] = Made()  # takes 16 pixels and nothing else
    made["cifar_resnet20"].side = 224
    open_zoo(settings_of("cifar_resnet20", "made:a"), few, largest=16)
    assert made["cifar_resnet20"].seen == ["cpu", 200]
    open_zoo(settings_of("made:a", "made:c"), few, largest=8)
    assert made["made:c"].seen == ["cpu", 200]


def test_a_real_prepared_encoder_that_is_fed_wrongly_is_refused(prepared, few, cache, monkeypatch):
    for name in ("encoders-cifar-resnet", "cifar10-jpeg"):
        prepared(name)
    real, encoder = zoo_module.check_encoder, open_image_encoder("cifar_resnet20")
    upside_down = lambda pixels: encoder.classify(255 - pixels)  # noqa: E731
    monkeypatch.setattr(zoo_module, "check_encoder", lambda name: real(name, upside_down))
    with pytest.raises(ManifestError, match=r"cifar_resnet20 has top-1 accuracy .* prepared wrongly"):
        open_zoo(settings_of("cifar_resnet20", "colour_histogram"), few)


def test_features_of_a_prepared_encoder_depend_on_how_its_pixels_are_prepared(prepared, monkeypatch):
    prepared("encoders-cifar-resnet")
    plain = zoo_encoders._prepared_encoder("cifar_resnet20").fingerprint
    assert zoo_encoders._prepared_encoder("cifar_resnet20").fingerprint == plain

    def other(name):
        encoder = open_image_encoder(name)
        encoder.blue_first = True
        return encoder

    monkeypatch.setattr(zoo_encoders, "open_image_encoder", other)
    assert zoo_encoders._prepared_encoder("cifar_resnet20").fingerprint != plain


# --- encoders of other libraries ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A text and an image encoder with random weights, saved as their libraries save them."""
    folder = tmp_path_factory.mktemp("saved")
    words = ["two", "red", "stars", "blue", "dotted", "circle", "left", "right", "top"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *"abcdefghijklmnopqrstuvwxyz,"]
    tokenizer = BertTokenizer(vocab={token: row for row, token in enumerate(vocabulary)}, model_max_length=32)
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=34, **shape))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(24, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "text"))
    save_for_hf(timm.create_model("test_vit", num_classes=3), str(folder / "image"), safe_serialization=True)
    return folder


def test_encoders_of_other_libraries_join_from_their_folders(few, folders, cache, monkeypatch):
    text, image = str(folders / "text"), f"timm:local-dir:{folders / 'image'}"
    settings = settings_of(image, "colour_histogram", texts=(text, "lsa_words"))
    found = open_zoo(settings, few)
    assert {name: one.width for name, one in found.images.items()} == {image: 64, "colour_histogram": 320}
    assert found.texts[text].width == 24
    encoder, rows = TextEncoder(text), torch.arange(5)
    expected = encoder.encode(few.texts[:5])
    torch.testing.assert_close(found.texts[text].unit(rows), expected, rtol=0, atol=1e-3)  # 16 bits
    assert found.texts[text].parameters == sum(one.numel() for one in encoder.model.parameters()) > 0
    assert found.images[image].parameters > 0

    def opened_again(*_):
        raise AssertionError("an encoder was opened that is open already")

    monkeypatch.setattr(zoo_module, "TextEncoder", opened_again)
    again = open_zoo(settings, few, EmbeddingStore(encoder, cache))
    assert torch.equal(again.texts[text].unit(rows), found.texts[text].unit(rows))


@pytest.mark.parametrize("name", ["no_such_encoder", "../x", ""])
def test_an_unknown_image_encoder_lists_those_there_are(few, cache, name):
    with pytest.raises(DataError, match=f"no image encoder {re.escape(repr(name))}; there are: .*timm:NAME"):
        open_zoo(settings_of(name, "colour_histogram"), few)


def test_an_unknown_text_encoder_says_what_can_be_given(few, cache):
    with pytest.raises(ManifestError, match="cannot open the text encoder '/absent/folder'.*local sentence"):
        open_zoo(settings_of("colour_histogram", "frequencies", texts=("/absent/folder",)), few)


def test_a_damaged_picture_is_named(cache, tmp_path):
    raw = io.BytesIO()
    Image.new("RGB", (40, 40)).save(raw, "png")
    rows = [f"{row}.png" for row in range(30)]
    for row, name in enumerate(rows):
        (tmp_path / name).write_bytes(raw.getvalue() if row != 17 else b"\x89PNG")
    split = ["train"] * 10 + ["valid"] * 10 + ["test"] * 10
    lines = ["image,caption,split", *(f"{name},{name},{split[row]}" for row, name in enumerate(rows))]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    own = load_pairs(PairData(source="table", name="own", path=str(tmp_path / "own.csv")))
    with pytest.raises(DataError, match="own, row 17: not an image, or damaged"):
        open_zoo(settings_of("colour_histogram", "frequencies"), own)


# --- controls -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recall(zoo, tmp_path_factory):
    """Test R@10 of every image encoder with its closed-form connector."""
    model = AlignModelSettings(name="ridge", kind="ridge")
    training = Training(epochs=1, batch_size=32, learning_rate=1e-3)
    task = Task(zoo, model, training, 0, tmp_path_factory.mktemp("ridge"))
    rows = zoo.splits["test"]
    found = {}
    for (text, image), connected in closed_form(task, "ridge").pairs.items():
        assert isinstance(connected.of_text, LinearMap)
        mapped = connected.of_text(zoo.texts[text].unit(zoo.choices[rows, 0]))
        mapped = torch.nn.functional.normalize(mapped, dim=1)[:, None]
        ranks = retrieval_ranks(mapped, zoo.images[image].unit(rows))
        found[image] = recall_values(*(one.numpy() for one in ranks))["recall_at_10"].mean()
    return found


def test_a_duplicate_has_the_same_features_and_ties(zoo, recall):
    rows = torch.arange(600)
    one, two = (zoo.images[name].unit(rows) for name in ("colour_histogram", "colour_histogram, duplicate"))
    assert torch.equal(one, two)
    assert recall["colour_histogram, duplicate"] == recall["colour_histogram"]


def test_a_random_encoder_is_near_chance(recall):
    # Ten of a hundred; 200 answers stray by 0.02.
    assert recall["random"] == pytest.approx(0.1, abs=0.08)


def test_noise_takes_away_step_by_step(recall):
    names = ("colour_histogram", "colour_histogram + noise 0.5", "colour_histogram + noise 2")
    whole, some, much = (recall[name] for name in names)
    assert whole > some > much


def test_noise_has_the_norm_that_its_setting_says(zoo):
    rows = torch.arange(600)
    plain = zoo.images["colour_histogram"].unit(rows)
    for name, expected in (("colour_histogram + noise 0.5", 0.5), ("colour_histogram + noise 2", 2.0)):
        kept = torch.from_numpy(zoo.images[name].array.astype("float32"))
        # The norm of 320 normal numbers strays by 1 / sqrt(640), their mean over 600 rows hardly at all.
        assert (kept - plain).norm(dim=1).mean().item() == pytest.approx(expected, rel=0.01)


def test_an_encoder_that_read_the_captions_is_best(recall):
    assert max(recall, key=recall.get) == "lsa_words, leaked"
    assert recall["lsa_words, leaked"] > 0.9


def test_a_centred_copy_has_no_mean_over_the_training_rows_and_the_same_differences(zoo):
    train = zoo.splits["train"]
    kept = torch.from_numpy(zoo.images["colour_histogram, centred"].array.astype("float32"))
    plain = zoo.images["colour_histogram"].unit(torch.arange(600))
    # Sums of 400 numbers that were rounded to 16 bits.
    assert kept[train].mean(0).norm() < 1e-4
    torch.testing.assert_close(kept - kept[0], plain - plain[0], rtol=0, atol=1e-3)


def test_controls_are_the_same_each_time(pairs, zoo):
    again = open_zoo(settings_of("colour_histogram", "frequencies", controls=CONTROLS), pairs)
    for name in NAMES:
        assert (again.images[name].array == zoo.images[name].array).all()


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (Control(kind="duplicate", of="hog"), "control 'hog, duplicate': no encoder 'hog'; there"),
        (Control(kind="noise"), "control 'None \\+ noise 1': no encoder None; there are: colour_histogram"),
        (Control(kind="leaked", of="colour_histogram"), "'colour_histogram'; there are: lsa_words"),
        (Control(kind="centred", of="random"), "no encoder 'random'"),
    ],
)  # fmt: skip
def test_a_control_of_nothing_is_refused_before_anything_is_computed(pairs, control, message, monkeypatch):
    monkeypatch.setattr(zoo_module, "FeatureStore", None)  # not even opened
    settings = settings_of("colour_histogram", "frequencies", controls=(Control(kind="random"), control))
    with pytest.raises(DataError, match=message):
        open_zoo(settings, pairs)


# --- what is no zoo -----------------------------------------------------------------------------------------


def features_of(name, rows=30):
    draw = torch.Generator().manual_seed(0)
    return Features(name, torch.randn(rows, 4, generator=draw).numpy().astype("float16"), "order")


def test_one_pair_is_nothing_to_choose_from():
    splits = {split: torch.arange(30) for split in ("train", "valid", "test")}
    choices = torch.arange(30)[:, None]
    images, texts = {"a": features_of("a")}, {"t": features_of("t")}
    with pytest.raises(DataError, match=r"one pair only \(t with a\); a zoo needs two or more image or text"):
        Zoo(images, texts, choices, splits)
    random = {"a": features_of("a"), "random": features_of("random")}
    with pytest.raises(DataError, match="one pair only"):
        Zoo(random, texts, choices, splits, controls=frozenset({"random"}))
    assert len(Zoo(random, texts, choices, splits).pairs()) == 2
    assert len(Zoo(images, {"t": features_of("t"), "u": features_of("u")}, choices, splits).pairs()) == 2


def test_one_encoder_with_controls_is_no_zoo(few):
    settings = settings_of("colour_histogram", controls=(Control(kind="random"),))
    with pytest.raises(DataError, match=r"one pair only \(lsa_words with colour_histogram, random\)"):
        open_zoo(settings, few)


@pytest.mark.parametrize(
    "zoo",
    [
        {"images": ("hog", "hog")},
        {"texts": ("a", "a")},
        {"images": ("hog",), "controls": (Control(kind="random"), Control(kind="random"))},
    ],
)
def test_an_encoder_that_is_named_twice_is_refused(zoo):
    with pytest.raises(ValidationError, match="every encoder and control once, got "):
        ZooSettings(**zoo)


@pytest.mark.parametrize("values", [{"kind": "noise", "noise": 0.0}, {"kind": "shuffled"}])
def test_a_control_that_makes_no_sense_is_refused(values):
    with pytest.raises(ValidationError):
        Control(**values)

"""An encoder fed otherwise than it was trained is refused, by name, with its score and the right one."""

import hashlib
import io
import logging

import polars as pl
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from workbench import encoder_checks, manifests
from workbench.cli import app
from workbench.encoder_checks import check_encoder, check_of, measure_accuracy
from workbench.errors import DataError, ManifestError
from workbench.image_encoders import _ENCODERS, image_encoder_names, open_image_encoder
from workbench.manifests import manifest_names, read_manifest

CHECK = {"data": "kites", "file": "test.parquet", "classes": "cifar10", "every": 3, "size": 32}
CHECK |= {"metric": "top1", "value": 0.7, "tolerance": 0.05}


def asked(name, prepared):
    """A check whose pictures, class names and encoder are here."""
    for data_set in (check_of(name).data, "encoders-mobilenet-int8", _ENCODERS[name][0].data_set):
        prepared(data_set)
    return check_of(name)


def png(level):
    raw = io.BytesIO()
    Image.new("RGB", (40, 32), (level, 0, 0)).save(raw, "png")
    return raw.getvalue()


@pytest.fixture
def kites(tmp_path, monkeypatch):
    """Write a manifest that checks cifar_resnet20 on made-up pictures: row n is of class n % 10, red 20 n."""
    for name in ("data/kites", "data/encoders-kites", "manifests"):
        (tmp_path / name).mkdir(parents=True)
    rows = [{"image": png(20 * (n % 10)), "label": f"class {n % 10}"} for n in range(30)]
    pl.DataFrame(rows).write_parquet(tmp_path / "data/kites/test.parquet")
    (tmp_path / "data/encoders-kites/weights.npz").write_bytes(b"weights")
    monkeypatch.setattr(manifests, "manifest_folder", lambda: tmp_path / "manifests")
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path / "data"))
    words = ("title", "description", "licence", "citation", "intended_use", "prepared_by")

    def write(checks, name="encoders-kites", file="weights.npz", **held):
        raw = (tmp_path / "data" / name / file).read_bytes()
        about = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw), **held}
        card = {word: word for word in words} | {"name": name, "redistribute": True, "checks": checks}
        (tmp_path / f"manifests/{name}.yaml").write_text(yaml.safe_dump({**card, "files": {file: about}}))

    write({}, "kites", "test.parquet", rows=30, columns=["image", "label"])
    write({"cifar_resnet20": CHECK})
    return write


def by_red(pixels):
    """Know a class by its red, and take classes 0 to 2 for the one after them, itself second."""
    true = (pixels[:, 0, 0, 0].long() + 10) // 20
    logits = torch.nn.functional.one_hot(true, 10).double()
    return logits + 2 * torch.nn.functional.one_hot((true + 1) % 10, 10) * (true < 3)[:, None]


# Made-up pictures


def test_accuracy_is_the_share_of_the_chosen_rows_that_are_recognised(kites):
    # Rows 0, 3, .. 27 show classes 0 3 6 9 2 5 8 1 4 7, each once; 0, 1 and 2 are mistaken: 7 of 10.
    assert measure_accuracy(check_of("cifar_resnet20"), by_red) == (0.7, 10)
    assert check_encoder("cifar_resnet20", by_red) == 0.7
    # Every eighth row: 0 8 6 4, of which class 0 is mistaken: 3 of 4. The second guess is always right.
    kites({"cifar_resnet20": {**CHECK, "every": 8, "value": 0.75}})
    assert measure_accuracy(check_of("cifar_resnet20"), by_red) == (0.75, 4)
    kites({"cifar_resnet20": {**CHECK, "metric": "top5", "value": 1}})
    assert check_encoder("cifar_resnet20", by_red) == 1.0


def test_a_refusal_says_what_was_found_what_was_expected_and_what_to_look_at(kites):
    with pytest.raises(ManifestError) as caught:  # without red all look like class 0, taken for 1: 1 of 10
        check_encoder("cifar_resnet20", lambda pixels: by_red(pixels.flip(1)))
    assert str(caught.value) == (
        "cifar_resnet20 has top-1 accuracy 0.1 on 10 pictures of kites, its manifest says 0.7 +- 0.05: its "
        "input is probably prepared wrongly (order of the colours RGB/BGR, range, mean and spread, or size)"
    )
    kites({"cifar_resnet20": {**CHECK, "value": 0.6}})  # better than it ever was: not the same check either
    with pytest.raises(ManifestError, match=r"accuracy 0.7 .* says 0.6 \+- 0.05"):
        check_encoder("cifar_resnet20", by_red)


def test_logits_of_other_classes_are_refused(kites):
    with pytest.raises(DataError, match="9 logits per picture; cifar10 has 10 classes"):
        check_encoder("cifar_resnet20", lambda pixels: by_red(pixels)[:, :9])


def test_nothing_is_opened_and_none_returned_without_pictures_or_without_a_check(kites, caplog, tmp_path):
    with caplog.at_level(logging.INFO):
        assert check_encoder("mobilenet_v1_100") is None
        (tmp_path / "data/kites").rename(tmp_path / "data/elsewhere")
        assert check_encoder("cifar_resnet20") is None
    assert caplog.messages == [
        "mobilenet_v1_100: its manifest holds no accuracy check",
        "cifar_resnet20: accuracy not checked, not on this machine: kites",
    ]


def test_changed_pictures_are_refused_before_they_are_read(kites, tmp_path):
    (tmp_path / "data/kites/test.parquet").write_bytes(b"PAR1")
    with pytest.raises(ManifestError, match="kites does not match its manifest"):
        check_encoder("cifar_resnet20", by_red)


def test_an_unknown_encoder_is_refused():
    with pytest.raises(DataError, match="'resnet50'; there are: mobilenet_v1_025, .*cifar_resnet56"):
        check_encoder("resnet50")


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"value": 70.0}, "value"),
        ({"value": -0.1}, "value"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"metric": "top3"}, "metric"),
        ({"classes": "birds"}, "classes"),
        ({"every": 0}, "every"),
        ({"size": 31}, "size"),
        ({"split": "test"}, "split"),
    ],
)
def test_a_manifest_whose_check_has_a_wrong_key_or_value_is_refused(kites, wrong, key):
    kites({"cifar_resnet20": {**CHECK, **wrong}})
    with pytest.raises(ManifestError, match=f"encoders-kites.yaml: .*'checks.cifar_resnet20.{key}'"):
        read_manifest("encoders-kites")


def test_data_verify_runs_the_checks_of_a_set_whose_files_match(kites, monkeypatch, tmp_path):
    class Encoder:
        classify = staticmethod(by_red)

    def verify():
        result = CliRunner().invoke(app, ["data", "verify", "encoders-kites"])
        return result.exit_code, result.output.splitlines()

    monkeypatch.setattr(encoder_checks, "open_image_encoder", lambda name: Encoder)
    line = "  cifar_resnet20: top-1 accuracy 0.7, its manifest says 0.7 +- 0.05"
    assert verify() == (0, ["encoders-kites: ok", line])
    monkeypatch.setattr(Encoder, "classify", lambda pixels: by_red(pixels.flip(1)))
    code, (first, second) = verify()
    assert (code, first) == (3, "encoders-kites: ok")
    assert second.startswith(
        "  cifar_resnet20: refused; cifar_resnet20 has top-1 accuracy 0.1 on 10 pictures"
    )
    (tmp_path / "data/kites").rename(tmp_path / "data/elsewhere")
    line = "  cifar_resnet20: not checked, not on this machine: kites"
    assert verify() == (0, ["encoders-kites: ok", line])
    (tmp_path / "data/encoders-kites/weights.npz").write_bytes(b"weighty")
    code, lines = verify()
    assert (code, lines[0], len(lines)) == (3, "encoders-kites: differs", 2)  # and nothing is computed


# The shipped manifests


def test_every_check_stands_in_the_manifest_of_its_encoder_and_reads_a_table_there_is():
    held = {name: manifest for manifest in manifest_names() for name in read_manifest(manifest).checks}
    assert held == {name: _ENCODERS[name][0].data_set for name in held}
    unchecked = {"mobilenet_v1_100", "mobilenet_v2_birds", "mobilenet_v2_insects"}
    assert set(held) == set(image_encoder_names()) - unchecked
    for name in held:
        check = check_of(name)
        assert {"image", "label"} <= set(read_manifest(check.data).files[check.file].columns)
        assert check.tolerance <= 0.05  # swapped colours cost 0.09 and more


def test_without_the_class_names_the_imagenet_encoders_are_not_checked(tmp_path, monkeypatch, caplog):
    (tmp_path / "tiny-imagenet").mkdir()
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert check_encoder("squeezenet_11") is None
    assert caplog.messages == [
        "squeezenet_11: accuracy not checked, not on this machine: encoders-mobilenet-int8"
    ]


def test_classes_of_the_pictures_stand_in_the_order_of_the_classifiers(prepared):
    check = asked("squeezenet_11", prepared)
    pixels, truth, places = encoder_checks._sample(check)
    assert (pixels.shape, truth.shape, places.shape) == ((100, 3, 128, 128), (100,), (200,))
    # Both are sorted by WordNet id, so places rise; the crane of the pictures is a machine.
    assert (places.diff() > 0).all()
    assert 518 in places
    assert 135 not in places
    labels = (manifests.locate("encoders-mobilenet-int8") / "imagenet_labels.txt").read_text().splitlines()
    assert labels[135] == labels[518] == "crane"
    table = pl.read_parquet(manifests.locate("tiny-imagenet") / "val.parquet")
    assert [labels[places[one]] for one in truth] == table["synset_words"][::100].to_list()


@pytest.mark.parametrize("name", ["squeezenet_11", "cifar_resnet44"])
def test_swapped_colours_are_refused_and_the_right_order_passes(name, prepared):
    check = asked(name, prepared)
    classify = open_image_encoder(name).classify
    assert abs(check_encoder(name) - check.value) <= check.tolerance
    with pytest.raises(ManifestError, match=f"^{name} has .*order of the colours RGB/BGR"):
        check_encoder(name, lambda pixels: classify(pixels.flip(1)))


@pytest.mark.parametrize("name", ["mobilenet_v1_025", "squeezenet_11", "cifar_resnet20"])
def test_a_wrong_range_is_refused(name, prepared):
    asked(name, prepared)
    classify = open_image_encoder(name).classify
    with pytest.raises(ManifestError, match=f"^{name} has .* range"):
        check_encoder(name, lambda pixels: classify(pixels / 255))


def test_a_wrong_mean_and_spread_are_refused(prepared):
    asked("mobilenet_v1_025", prepared)
    encoder = open_image_encoder("mobilenet_v1_025")
    encoder.centre = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)  # those of the CIFAR ResNets
    encoder.spread = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    with pytest.raises(ManifestError, match=r"^mobilenet_v1_025 has .* mean and spread"):
        check_encoder("mobilenet_v1_025", encoder.classify)

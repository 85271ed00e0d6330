"""Accuracy checks: an image encoder whose input is prepared wrongly still computes, but recognises less.

Hashes prove that the weights are the published ones, not that they are fed what they were trained on. The
manifest of an encoder set therefore says what each encoder scores on a few pictures, and tolerates less than
swapped colours cost.

Shape letters: N images, S side in pixels, K the classifier's classes, C classes that the pictures show.
"""

import logging
from collections.abc import Callable, Iterator, Mapping

import polars as pl
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from workbench.datasets.images import images_in
from workbench.errors import DataError, ManifestError
from workbench.image_encoders import image_encoder_names, open_image_encoder
from workbench.manifests import EncoderCheck, locate, manifest_names, read_manifest, verified_folder

_log = logging.getLogger(__name__)
Pixels = UInt8[Tensor, "N 3 S S"]
Classify = Callable[[Pixels], Float[Tensor, "N K"]]
_LABELS = "encoders-mobilenet-int8", "imagenet_labels.txt"  # 1001 lines, background first
_WIDTHS = {"cifar10": (10,), "imagenet": (1000, 1001)}  # 1000: without the background
_CRANE = 518  # the machine; the bird has the same words, which no other two classes share


def check_of(name: str) -> EncoderCheck | None:
    """Return the check that a manifest holds for an encoder, None if none does.

    Raises:
        DataError: no such encoder.
    """
    known = image_encoder_names()
    if name not in known:
        raise DataError(f"no image encoder named {name[:80]!r}; there are: {', '.join(known)}")
    found = (read_manifest(one).checks.get(name) for one in manifest_names())
    return next((check for check in found if check is not None), None)


def check_encoder(name: str, classify: Classify | None = None) -> float | None:
    """Measure an encoder's accuracy and hold it against its manifest.

    Args:
        name: an image encoder.
        classify: turns RGB pictures, 0 to 255, into logits; the encoder's own classifier if None.

    Returns:
        The accuracy (0 to 1, higher is better); None if the encoder has no check, or if the pictures are not
        on this machine.

    Raises:
        DataError: no such encoder, or logits of other classes.
        ManifestError: the accuracy is not the manifest's, or files are missing or changed.
    """
    check = check_of(name)
    if check is None:
        _log.info("%s: its manifest holds no accuracy check", name)
        return None
    missing = _missing(check)
    if missing:
        _log.info("%s: accuracy not checked, not on this machine: %s", name, missing)
        return None
    accuracy, count = measure_accuracy(check, classify or open_image_encoder(name).classify)
    if abs(accuracy - check.value) > check.tolerance:
        raise ManifestError(
            f"{name} has {_words(check)} {accuracy:.3g} on {count} pictures of {check.data}, its manifest "
            f"says {_bounds(check)}: its input is probably prepared wrongly (order of the colours RGB/BGR, "
            "range, mean and spread, or size)"
        )
    return accuracy


def verify_encoders(checks: Mapping[str, EncoderCheck]) -> Iterator[tuple[bool, str]]:
    """Run the checks of a manifest; yield for each whether it is fine, and a line on what was found."""
    for name, check in checks.items():
        try:
            accuracy = check_encoder(name)
        except ManifestError as problem:
            yield False, f"{name}: refused; {problem}"
            continue
        if accuracy is None:
            yield True, f"{name}: not checked, not on this machine: {_missing(check)}"
        else:
            yield True, f"{name}: {_words(check)} {accuracy:.3g}, its manifest says {_bounds(check)}"


def measure_accuracy(check: EncoderCheck, classify: Classify) -> tuple[float, int]:
    """Return the share of a check's pictures that are recognised, 0 to 1, and how many pictures there are.

    Only classes that the pictures' table shows compete: all ten of CIFAR-10, 200 of ImageNet's thousand.

    Raises:
        DataError: logits of other classes.
        ManifestError: the pictures are missing or changed.
    """
    pixels, truth, places = _sample(check)
    with torch.inference_mode():
        logits = torch.cat([classify(block) for block in pixels.split(50)])
    widths = _WIDTHS[check.classes]
    if logits.shape[1] not in widths:
        raise DataError(f"{logits.shape[1]} logits per picture; {check.classes} has {widths[0]} classes")
    shown = logits[:, places - (max(widths) - logits.shape[1])]
    best = shown.topk(int(check.metric.removeprefix("top"))).indices
    return (best == truth[:, None]).any(1).double().mean().item(), len(truth)


def _missing(check: EncoderCheck) -> str:
    """List the data sets that a check reads and that are not on this machine."""
    needed = {check.data, _LABELS[0]} if check.classes == "imagenet" else {check.data}
    return ", ".join(sorted(name for name in needed if locate(name) is None))


def _sample(check: EncoderCheck) -> tuple[Pixels, Int[Tensor, " N"], Int[Tensor, " C"]]:
    """Return pictures, the class of each, and each class's row among the classifier's classes."""
    table = pl.read_parquet(verified_folder(check.data) / check.file)
    key = "wnid" if check.classes == "imagenet" else "label"  # in the order of either, both as published
    classes = table.unique(key).sort(key)
    rows = table.with_row_index("row").gather_every(check.every)
    names = [f"{check.data}, {check.file}, row {row}" for row in rows["row"]]
    pixels = images_in(rows["image"].to_list(), check.size, names)
    order = classes[key].to_list()
    truth = torch.tensor([order.index(one) for one in rows[key]])
    places = _imagenet_rows(classes["synset_words"].to_list()) if key == "wnid" else list(range(len(order)))
    return pixels, truth, torch.tensor(places)


def _imagenet_rows(words: list[str]) -> list[int]:
    """Find classes, given by their words in the order of WordNet ids, among the 1001 of ImageNet."""
    labels = (verified_folder(_LABELS[0]) / _LABELS[1]).read_text(encoding="utf-8").splitlines()
    return [_CRANE if text == "crane" else labels.index(text) for text in words]


def _words(check: EncoderCheck) -> str:
    """Name the metric."""
    return f"top-{check.metric.removeprefix('top')} accuracy"


def _bounds(check: EncoderCheck) -> str:
    """Print the expected value with its tolerance."""
    return f"{check.value:.3g} +- {check.tolerance:.3g}"

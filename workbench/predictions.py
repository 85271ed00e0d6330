"""An adapted classifier beside an unadapted one: answers, confusion, what the run's test says, an archive.

Unadapted is the run's plain baseline (the same towers without a hypernetwork) of the same seed, if its
weights were kept; else the same model under the weights of another class set.

Shape letters: N pictures, C classes, R resamples.
"""

import io
import json
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from sklearn.metrics import confusion_matrix

from workbench.classifier import Classifier, HyperCLIPModel
from workbench.datasets.samples import Sample
from workbench.datasets.scenes import ATTRIBUTES
from workbench.errors import RunError
from workbench.evaluation.ranking import resample
from workbench.evaluation.similarity import Measured
from workbench.export import export
from workbench.runs import Run
from workbench.session import Session
from workbench.tables import last_split, with_interval

RESAMPLES = 1000
_OTHER_SETS = (
    [f"{word} things" for word in ATTRIBUTES["colour"]],
    [f"{word}s" for word in ATTRIBUTES["shape"]],
)


@dataclass(frozen=True)
class Pair:
    """The same classes by two classifiers.

    Attributes:
        adapted: generated for the classes.
        unadapted: what it is held against.
        what: says what the unadapted one is.
        seconds: that the adapted one took to generate, text encoder included.
    """

    adapted: Classifier
    unadapted: Classifier
    what: str
    seconds: float


def names_in(text: str) -> list[str]:
    """Return the class names of a text: one per line, or with commas between; "007" stays as it is."""
    return [name.strip() for name in text.replace("\n", ",").split(",") if name.strip()]


def adaptable(run: Run) -> list[str]:
    """Return the kept models that generate weights from class names, those of the paper's kind first.

    Raises:
        RunError: the run kept none.
    """
    kinds = {model["name"]: model["kind"] for model in run.recipe["models"]}
    found = [name for name in run.models() if kinds[name] == "hyper"]
    if not found:
        raise RunError(f"run {run.folder.name} kept no model that adapts to class names; choose another run")
    return sorted(found, key=lambda name: (not name.startswith("hyperclip"), name))


def adapt_both(session: Session, run: Run, model: str, names: Sequence[str]) -> Pair:
    """Generate a classifier for class names and put an unadapted one beside it.

    Args:
        session: loads models once.
        run: a finished run of an image-text recipe.
        model: one of :func:`adaptable`.
        names: of the classes.

    Raises:
        DataError: class names that cannot be used.
        RunError: no such model.
    """
    source: HyperCLIPModel = session.model(run, model)
    began = time.perf_counter()
    adapted = source.adapt(list(names))
    seconds = time.perf_counter() - began
    plain = next((one["name"] for one in run.recipe["models"] if one["kind"] == "siglip"), None)
    if plain in run.models():
        unadapted, what = (
            session.model(run, plain).adapt(list(names)),
            f"{plain}, same run and seed, no hypernetwork",
        )
    else:
        other = next(one for one in _OTHER_SETS if set(one) != set(names))
        unadapted = Classifier(source, adapted.classes, adapted.directions, source.adapt(list(other)).weights)
        what = f"{model} with the weights of other classes ({other[0]}, ...); the run kept no baseline"
    return Pair(adapted, unadapted, what, seconds)


def answers_of(pair: Pair, sample: Sample) -> pl.DataFrame:
    """Ask both classifiers about pictures.

    Returns:
        One row per picture: about, truth (class name, null if unknown), and for each of adapted and unadapted
        the class said and its share of the softmax over the classes, 0 to 1.
    """
    found = {"about": sample.about}
    names = pair.adapted.classes
    frame = pl.DataFrame(found).with_columns(
        truth=pl.Series([None if one is None else names[one] for one in sample.truth], dtype=pl.String)
    )
    for side in ("adapted", "unadapted"):
        said = getattr(pair, side).classify(sample.pixels)
        frame = frame.with_columns(said["class"].alias(side), said["share"].alias(f"{side}_share"))
    return frame


def confusion(answers: pl.DataFrame, side: str, classes: Sequence[str]) -> pl.DataFrame:
    """Count what a classifier says for each true class.

    Args:
        answers: as :func:`answers_of` gives them, truth known.
        side: "adapted" or "unadapted".
        classes: all names, in their order.

    Returns:
        One row per true class and answer: truth, said, count.
    """
    place = {name: row for row, name in enumerate(classes)}
    counts = confusion_matrix(
        [place[name] for name in answers["truth"]], [place[name] for name in answers[side]],
        labels=range(len(classes)),
    )  # fmt: skip
    rows = [
        {"truth": truth, "said": said, "count": int(counts[row, column])}
        for row, truth in enumerate(classes)
        for column, said in enumerate(classes)
    ]
    return pl.DataFrame(rows)


def accuracies(answers: pl.DataFrame, resamples: int = RESAMPLES) -> pl.DataFrame:
    """Measure both classifiers on pictures with a known truth.

    Returns:
        Three rows: side ("adapted", "unadapted", "adapted minus unadapted"), value, low, high (95 % bootstrap
        over pictures, the same for both), count.
    """
    right = np.stack(
        [(answers[side] == answers["truth"]).to_numpy().astype(float) for side in ("adapted", "unadapted")]
    )
    drawn = resample(right, np.arange(right.shape[1]), resamples)
    values = [*right.mean(1), right[0].mean() - right[1].mean()]
    sides = zip(
        ("adapted", "unadapted", "adapted minus unadapted"),
        values,
        [*drawn, drawn[0] - drawn[1]],
        strict=True,
    )
    rows = []
    for side, value, spread in sides:
        low, high = Measured.interval(spread)
        rows.append({"side": side, "value": float(value), "low": low, "high": high, "count": right.shape[1]})
    return pl.DataFrame(rows)


def warnings_of(run: Run, model: str) -> list[str]:
    """Say where the generated encoder did not help in the run's own test.

    A difference to the baseline (no hypernetwork) and to the control that is fed with no texts must both lie
    above zero; where the interval of one does not, conditioning has not been shown to help.

    Returns:
        One sentence per shortfall, over all class sets and over those held out from training.
    """
    matched = next(one.get("against") for one in run.recipe["models"] if one["name"] == model)
    part = run.metrics.filter(pl.col("seed").is_null(), model=model, split=last_split(run.metrics))
    said = []
    for group, where in (("all", "over all class sets"), ("family=held out", "on class sets held out")):
        for other in dict.fromkeys((run.recipe["reference"], matched)):
            for row in part.filter(group=group, metric=f"top1_minus_{other}").to_dicts():
                if row["low"] <= 0:
                    verdict = "answers worse than" if row["high"] < 0 else "is no better for certain than"
                    said.append(
                        f"In this run's test, {model} {verdict} {other} {where}: "
                        f"{with_interval(row['value'], row['low'], row['high'], '+')}."
                    )
    return said


def archive(pair: Pair, run: Run) -> bytes:
    """Write the adapted classifier as ONNX with its card into a zip archive; nothing stays on the disk.

    Args:
        pair: whose adapted classifier is written.
        run: it comes from.

    Raises:
        RunError: the exported graph does not compute what PyTorch does.
    """
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as private:
        found = export(pair.adapted, Path(private) / "classifier")
        made = {key: run.provenance[key] for key in ("workbench", "commit", "data_sha256", "encoder_sha256")}
        card = {
            **found.card, "class_names": pair.adapted.classes, "recipe": run.recipe["name"],
            "run": run.folder.name, "seed": run.recipe["seeds"][0], **made,
            "warnings": warnings_of(run, found.card["model"]),
        }  # fmt: skip
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as files:
            for path in sorted(found.folder.iterdir()):
                if path.name != "card.json":
                    files.write(path, path.name)
            files.writestr("card.json", json.dumps(card, indent=1, ensure_ascii=False))
    return packed.getvalue()

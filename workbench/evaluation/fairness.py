"""Accuracy by group: counts and intervals beside every value, the worst group, the gap.

Nothing here is a single fairness score. A gap can come from the group, from what its pictures show, or from
how few there are; groups below the smallest size stay in every table, marked, and are judged by nobody.

Shape letters: N images, S models and seeds, R resamples, G groups.
"""

from dataclasses import dataclass

import numpy as np
from fairlearn.metrics import MetricFrame
from jaxtyping import Float

from workbench.errors import DataError
from workbench.evaluation.ranking import resample
from workbench.evaluation.similarity import Measured


@dataclass(frozen=True)
class Grouped:
    """One sensitive feature's figures.

    Attributes:
        groups: names, sorted.
        counts: images of each.
        judged: which are large enough.
        measured: per group the accuracy of every model, and its resamples.
        worst: accuracy of the worst judged group; 0 to 1, higher is better.
        gap: best minus worst judged group; 0 to 1, lower is better, ideal 0.
    """

    groups: list[str]
    counts: list[int]
    judged: list[bool]
    measured: list[Measured]
    worst: Measured | None
    gap: Measured | None


def _mean(_: np.ndarray, correct: np.ndarray) -> float:
    return float(np.mean(correct))


def by_group(
    correct: Float[np.ndarray, "S N"],
    group: list[str | None],
    image: np.ndarray,
    smallest: int,
    resamples: int,
) -> Grouped:
    """Break accuracy down by a sensitive feature.

    Args:
        correct: what each question adds to the accuracy of each model, 0 to 1.
        group: of each question; None leaves a question out.
        image: of each question; whole images are resampled, and counted.
        smallest: images a group needs to be judged.
        resamples: of the bootstrap.

    Raises:
        DataError: no question has a group.

    Source: values by fairlearn's MetricFrame; worst group as DataComp's fairness evaluation defines it.
    """
    known = np.array([one is not None for one in group])
    if not known.any():
        raise DataError("no image has a value in the group column; choose another, or leave it out")
    names = np.array([str(one) for one in group])[known]
    image, correct = image[known], correct[:, known]
    groups = sorted(set(names))
    frames = [
        MetricFrame(metrics=_mean, y_true=row, y_pred=row, sensitive_features=names).by_group
        for row in correct
    ]
    images = [len(set(image[names == name])) for name in groups]
    measured = [
        Measured(
            np.array([float(frame[name]) for frame in frames]),
            # A seed each: with one for all, groups of equal size would be drawn alike, their gap too still.
            resample(correct[:, names == name], image[names == name], resamples, seed=place),
        )
        for place, name in enumerate(groups)
    ]
    judged = [size >= smallest for size in images]
    chosen = [one for one, fine in zip(measured, judged, strict=True) if fine]
    worst = gap = None
    if len(chosen) > 1:
        values, drawn = np.stack([one.value for one in chosen]), np.stack([one.resampled for one in chosen])
        worst = Measured(values.min(0), drawn.min(0))
        gap = Measured(values.max(0) - values.min(0), drawn.max(0) - drawn.min(0))
    return Grouped(groups, images, judged, measured, worst, gap)

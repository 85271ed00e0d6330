"""Two models, of one run or of two, side by side over the groups of their images.

Every value stands with its count and interval. Differences say to what: the model's own overall accuracy, its
best judged group, or the other model on the same images. A group below the smallest size stays, marked, and
is neither best nor worst.

Shape letters: S seeds, N questions, R resamples, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import polars as pl

from workbench.datasets.scenes import ATTRIBUTES, Scene, class_set
from workbench.errors import DataError
from workbench.evaluation.fairness import Grouped, by_group
from workbench.evaluation.similarity import Measured
from workbench.groups import drawn_gaps, fair_columns
from workbench.runs import Run
from workbench.tables import last_split, with_interval

ALL_SETS = "all class sets"
TO_OVERALL, TO_BEST, TO_OTHER = "its own overall accuracy", "its best judged group", "the other model"
DIFFERENCES = (TO_OVERALL, TO_BEST, TO_OTHER)
LIMITS = (
    "Groups that differ may be harder, rarer in training, or show other things: these numbers do not "
    "say why. They speak only for the groups named here; a background is not a person. Equal accuracy "
    "can go with unequal harm, and a wide interval is no evidence of equality. Best and worst are "
    "chosen on the images they are measured on, so a gap comes out too large; the gap of groups drawn "
    "at random says how large chance alone makes it."
)

MEANINGS = {  # of the columns of the tables
    "count": "images of the group",
    "judged": "whether the group has enough images to be best or worst",
    "value": "accuracy, 0 to 1, with its 95 % bootstrap interval over images",
    "to other": "value minus that of the other side on the same images",
    "to overall": "value minus the side's accuracy over all groups",
    "to best": "value minus that of the side's best judged group",
    "gap": "best minus worst judged group, 0 to 1",
    "random gap": "mean gap of groups of the same sizes drawn at random",
    "random high": "95 % of such gaps lie below",
}


@dataclass(frozen=True)
class Side:
    """One model of a finished run."""

    run: Run
    model: str

    @property
    def name(self) -> str:
        """Recipe and model."""
        return f"{self.run.recipe['name']}: {self.model}"


@dataclass(frozen=True)
class Sides:
    """What :func:`compare_groups` found.

    Attributes:
        rows: one per side and group: side, name, group, count (images), judged, value, low, high, and
            the differences to_overall, to_best and to_other with ``_low`` and ``_high``, or null.
            Values are means over seeds, 0 to 1; intervals 95 % bootstrap.
        totals: one per side: side, name, images, seeds, overall, low, high, worst (group), worst_value, gap,
            gap_low, gap_high, random_gap, random_high; null where fewer than two groups are judged.
        paired: whether both sides answered the same questions on the same images.
        smallest: images that a group needs to be judged.
    """

    rows: pl.DataFrame
    totals: pl.DataFrame
    paired: bool
    smallest: int
    limits: ClassVar[str] = LIMITS
    meanings: ClassVar[dict[str, str]] = MEANINGS

    @property
    def tables(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """All numbers."""
        return self.rows, self.totals

    def said(self) -> list[str]:
        """Say what the numbers say, without making one of them: overall, worst, gap, groups too small."""
        lines = []
        for row in self.totals.to_dicts():
            if row["gap"] is None:
                lines.append(
                    f"{row['side']}: fewer than two groups have {self.smallest} images, so none is worst."
                )
                continue
            chance = "more than" if row["gap"] > row["random_high"] else "no more than"
            seeds = f"{row['seeds']} seed{'s' * (row['seeds'] != 1)}"
            lines += [
                f"{row['side']}: {row['name']}, {row['images']:,} images, {seeds}. Overall "
                f"{with_interval(row['overall'], row['low'], row['high'])}.",
                f"{row['side']}: worst judged group {row['worst']}, {row['worst_value']:.3f}. Best minus "
                f"worst: {row['gap']:.3f}, {chance} groups drawn at random have (mean "
                f"{row['random_gap']:.3f}, 95 % below {row['random_high']:.3f}).",
            ]
        few = self.rows.filter(~pl.col("judged"))["group"].unique(maintain_order=True).to_list()
        if few:
            lines.append(f"Fewer than {self.smallest} images, drawn hollow and not judged: {', '.join(few)}.")
        if self.totals.height > 1 and not self.paired:
            lines.append(
                "The two runs were asked different questions or images: no difference between them is taken."
            )
        return lines


def set_names(run: Run) -> list[str]:
    """Return the class sets that a run's groups are taken over, in its order; reworded ones are left out."""
    some = [Scene({key: words[0] for key, words in ATTRIBUTES.items()}, "light", False)]
    reworded = {class_set((attribute,), some, synonyms=True).name for attribute in ATTRIBUTES}
    asked = run.scores.filter(split=last_split(run.metrics))["set"].unique(maintain_order=True).to_list()
    return [name for name in asked if name not in reworded or run.recipe["data"]["source"] != "scenes"]


def model_names(run: Run) -> list[str]:
    """Return a run's trained models, in its order."""
    return [model["name"] for model in run.recipe["models"] if model["kind"] != "chance"]


def _answers(side: Side, column: str, asked: str) -> pl.DataFrame:
    """Return a side's answers to one class set, or to all of them, of images that have a group.

    Raises:
        DataError: no such model, class set or column, or no image of that set has a group.
    """
    run, sets = side.run, set_names(side.run)
    for what, wanted, there in (
        ("model", side.model, model_names(run)),
        ("class set", asked, [ALL_SETS, *sets]),
        ("group column", column, fair_columns(run)),
    ):
        if wanted not in there:
            names = ", ".join(there) or "none"
            raise DataError(f"run {run.folder.name} has no {what} {wanted!r}; there are: {names}")
    found = run.scores.filter(
        pl.col("set").is_in(sets if asked == ALL_SETS else [asked]), pl.col(column).is_not_null(),
        split=last_split(run.metrics), model=side.model,
    )  # fmt: skip
    if found.is_empty():
        raise DataError(f"no image of {asked!r} has a {column!r}; choose another class set or column")
    return found


def compare_groups(sides: Sequence[Side], column: str, asked: str = ALL_SETS, resamples: int = 1000) -> Sides:
    """Break the accuracy of one or two models down by groups.

    Args:
        sides: one or two; two of the same data and class set are compared image by image.
        column: one of the runs' group columns.
        asked: a class set that all runs have, or :data:`ALL_SETS`.
        resamples: R, of the bootstrap over images within groups.

    Raises:
        DataError: a run has no such model, class set or group column.
    """
    smallest = max(side.run.recipe["smallest_group"] for side in sides)
    answers = [_answers(side, column, asked) for side in sides]
    same = len({side.run.provenance["data_sha256"] for side in sides}) == 1
    named = [(side.name, part) for side, part in zip(sides, answers, strict=True)]
    return compare_answers(named, column, smallest, resamples, same_data=same)


def compare_answers(
    named: Sequence[tuple[str, pl.DataFrame]],
    column: str,
    smallest: int,
    resamples: int = 1000,
    *,
    same_data: bool = True,
) -> Sides:
    """Do what :func:`compare_groups` says for answers that are at hand.

    Args:
        named: one or two sides by name, with answers as a run holds them: set, image, label, model, seed,
            rank and ``column``, which is not null.
        column: of the groups.
        smallest: images a group needs to be judged.
        resamples: R, of the bootstrap over images within groups.
        same_data: image numbers mean the same pictures on both sides.
    """
    answers, keys = [part for _, part in named], ("set", "image", "label", column)
    same = _questions(answers[0], keys).equals(_questions(answers[-1], keys))
    paired = len(named) > 1 and same_data and same
    found = [_grouped(part, column, smallest, resamples) for part in answers]
    rows, totals = [], []
    for place, ((name, part), groups) in enumerate(zip(named, found, strict=True)):
        other = found[1 - place] if paired else None
        about = {"side": "AB"[place], "name": name}
        weights = _shares(part, column, groups)
        rows += [{**about, **row} for row in _group_rows(groups, weights, other)]
        totals.append({**about, **_total(part, groups, weights), **_gap(part, column, groups, smallest)})
    told, summed = (
        pl.DataFrame(part, infer_schema_length=None).with_columns(
            pl.selectors.by_dtype(pl.Null).cast(pl.Float64)
        )
        for part in (rows, totals)
    )
    return Sides(told, summed, paired, smallest)


def _questions(answers: pl.DataFrame, keys: tuple[str, ...]) -> pl.DataFrame:
    """Return the questions of one seed, in their order."""
    return answers.filter(pl.col("seed") == answers["seed"][0]).select(keys)


def _grouped(answers: pl.DataFrame, column: str, smallest: int, resamples: int) -> Grouped:
    """Break every seed's answers down; equal questions are resampled alike."""
    # A run lists its answers set by set and seed by seed within each: seeds are pulled apart first.
    seeds = answers.partition_by("seed", maintain_order=True)
    one, right = seeds[0], np.stack([(part["rank"] == 1).to_numpy().astype(float) for part in seeds])
    return by_group(
        right, one[column].to_list(), one["image"].to_numpy().astype(np.int64), smallest, resamples
    )


def _shares(answers: pl.DataFrame, column: str, groups: Grouped) -> np.ndarray:
    """Return each group's share of the questions."""
    counts = dict(answers[column].cast(pl.String).value_counts().iter_rows())
    found = np.array([counts[name] for name in groups.groups], dtype=float)
    return found / found.sum()


def _mean(measured: Measured) -> tuple[float, np.ndarray]:
    """Average over seeds."""
    return float(measured.value.mean()), measured.resampled.mean(0)


def _overall(groups: Grouped, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the accuracy over all groups; images are drawn within each, so that sizes stay as they are."""
    means = [_mean(one) for one in groups.measured]
    value = sum(share * mean for share, (mean, _) in zip(weights, means, strict=True))
    return float(value), sum(share * drawn for share, (_, drawn) in zip(weights, means, strict=True))


def _group_rows(groups: Grouped, weights: np.ndarray, other: Grouped | None) -> list[dict]:
    """List one side's groups with their differences."""
    overall = _overall(groups, weights)
    means = [_mean(one) for one in groups.measured]
    judged = [place for place, fine in enumerate(groups.judged) if fine]
    best = max(judged, key=lambda place: means[place][0]) if len(judged) > 1 else None
    rows = []
    for place, (value, drawn) in enumerate(means):
        low, high = Measured.interval(drawn)
        row = {"group": groups.groups[place], "count": groups.counts[place], "judged": groups.judged[place],
               "value": value, "low": low, "high": high}  # fmt: skip
        row |= _difference(
            "to_other", (value, drawn), None if other is None else _mean(other.measured[place])
        )
        row |= _difference("to_overall", (value, drawn), overall)
        row |= _difference("to_best", (value, drawn), None if best in (None, place) else means[best])
        rows.append(row)
    return rows


def _difference(name: str, one: tuple[float, np.ndarray], to: tuple[float, np.ndarray] | None) -> dict:
    """Write a difference with its interval; nulls if there is nothing to take it to."""
    if to is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    low, high = Measured.interval(one[1] - to[1])
    return {name: one[0] - to[0], f"{name}_low": low, f"{name}_high": high}


def _total(answers: pl.DataFrame, groups: Grouped, weights: np.ndarray) -> dict:
    """Say how a side does over all groups."""
    value, drawn = _overall(groups, weights)
    low, high = Measured.interval(drawn)
    return {"images": sum(groups.counts), "seeds": answers["seed"].n_unique(), "overall": value, "low": low,
            "high": high}  # fmt: skip


def _gap(answers: pl.DataFrame, column: str, groups: Grouped, smallest: int) -> dict:
    """Say which judged group is worst, how far the best lies above it, and how far chance alone would."""
    names = ("worst", "worst_value", "gap", "gap_low", "gap_high", "random_gap", "random_high")
    if groups.gap is None:
        return dict.fromkeys(names)
    judged = [place for place, fine in enumerate(groups.judged) if fine]
    worst = min(judged, key=lambda place: _mean(groups.measured[place])[0])
    value, drawn = _mean(groups.gap)
    chance = drawn_gaps(answers, column, smallest).row(0, named=True)
    low, high = Measured.interval(drawn)
    return dict(
        zip(
            names,
            (
                groups.groups[worst],
                _mean(groups.worst)[0],
                value,
                low,
                high,
                chance["random"],
                chance["random_high"],
            ),
            strict=True,
        )
    )

"""A run's class set under other words: the same pictures and classes, by other names, templates or strength.

Classes are reworded, never exchanged: the n-th name stands for the n-th class, so the truth of every picture
stays what it was, and the difference between the two wordings is paired picture by picture.

Shape letters: N pictures.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import polars as pl

from workbench.datasets.class_sets import ClassSet, Questions, check_classes
from workbench.datasets.photos import load_grouped
from workbench.datasets.scenes import SceneData, load_scenes
from workbench.datasets.shards import asked_of
from workbench.errors import DataError, RunError
from workbench.group_sides import LIMITS, MEANINGS, Sides, compare_answers, set_names
from workbench.predictions import names_in
from workbench.runs import Run
from workbench.session import Session
from workbench.tables import last_split
from workbench.view_state import FairnessState

AS_RUN, AS_TYPED = "as the run asks", "as typed"
AGAIN = ("scenes", "photos", "shards")  # pictures that are drawn or read again; others are somebody's own
MOST_SAID = 12  # reworded names
_CONDITIONED = ("hyper", "token_control")
_LIMITS = (
    "Another word is not the same question in other clothes: crimson is a part of red, and a model may know "
    "one word and not the other. A group that moves says that this wording reads its pictures differently, "
    "not which wording is right. One seed: the run keeps the weights of no other."
)


@dataclass(frozen=True)
class Wording:
    """How a class set is asked: names in the set's order, words around them, and how far weights go."""

    names: list[str]
    templates: tuple[str, ...]
    strength: float = 1.0


@dataclass(frozen=True)
class Reworded:
    """A class set asked in two ways, side by side.

    Attributes:
        sides: A as the run asks, B as typed.
        plain: the wording of A.
        typed: the wording of B.
        gained: pictures that only B answers rightly.
        lost: pictures that only A answers rightly.
        strayed: pictures that A answers otherwise than the run did: 0 unless made on another kind of device.
        notes: what there is to know of the model's strength.
    """

    sides: Sides
    plain: Wording
    typed: Wording
    gained: int
    lost: int
    strayed: int
    notes: list[str]
    limits: ClassVar[str] = f"{_LIMITS} {LIMITS}"
    meanings: ClassVar[dict[str, str]] = MEANINGS

    @property
    def tables(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """All numbers."""
        return self.sides.tables

    def said(self) -> list[str]:
        """Say what was changed, how many answers moved, and how both wordings do by group."""
        pairs = zip(self.plain.names, self.typed.names, strict=True)
        changed = [f"{after} for {before}" for before, after in pairs if before != after]
        more = [f"{len(changed) - MOST_SAID} more"] * (len(changed) > MOST_SAID)
        named = "; ".join(changed[:MOST_SAID] + more) or "none"
        lines = [f"B names {len(changed)} of {len(self.plain.names)} classes anew: {named}."]
        if self.typed == self.plain:
            lines = ["Nothing is changed yet, so both sides are one: type other names or templates."]
        if self.typed.templates != self.plain.templates:
            lines.append(f"B asks with: {' | '.join(self.typed.templates)}")
        if self.typed.strength != self.plain.strength:
            lines.append(f"B has strength {self.typed.strength:g}; 0 is the encoder without a condition.")
        images = self.sides.totals["images"][0]
        lines.append(f"Of {images:,} pictures, {self.gained} are right only in B, {self.lost} only in A.")
        if self.strayed:
            lines.append(
                f"{self.strayed} answers of A are not the run's own: another device rounds otherwise."
            )
        return [*lines, *self.notes, *self.sides.said()]


def rewordable(run: Run, column: str) -> list[str]:
    """Return the class sets that can be asked in other words: the run's own data, with such groups."""
    if run.recipe["data"]["source"] not in AGAIN:
        return []
    told = run.scores.filter(pl.col(column).is_not_null())["set"].unique().to_list()
    return [name for name in set_names(run) if name in told]


def blends(run: Run, model: str) -> bool:
    """Tell from the recipe whether a model's strength can be changed."""
    about = _settings(run, model)
    return about.get("kind") in _CONDITIONED and about.get("mode") == "residual"


def strength_said(run: Run, model: str) -> list[str]:
    """Say why strength cannot be changed, or why low ones are poor."""
    about = _settings(run, model)
    if about.get("kind") not in _CONDITIONED:
        return ["This model has no condition: only names and templates reach it, as directions of classes."]
    if not blends(run, model):
        return ["Strength stays 1: this model has no encoder without its condition."]
    if not about.get("neutral"):
        return [
            "No step of this run trained the encoder without a condition: low strengths are poor for that."
        ]
    return []


def _settings(run: Run, model: str) -> dict[str, Any]:
    return next((one for one in run.recipe["models"] if one["name"] == model), {})


def pictures_of(run: Run, split: str) -> Questions:
    """Draw or read again what a run was asked, as far as it has groups; scenes come out as they were."""
    data = {name: value for name, value in run.recipe["data"].items() if value is not None}
    if data["source"] == "scenes":
        return load_scenes(SceneData(**data))[1][split]
    return load_grouped(asked_of(data))


def wording_of(one: ClassSet, names: str, templates: str, strength: float = 1.0) -> Wording:
    """Read what a person typed for a class set; where nothing was typed, its own words stay.

    Args:
        one: the class set.
        names: in its order, one per line, or with commas between.
        templates: one per line; each holds one pair of braces.
        strength: of the generated weights.

    Raises:
        DataError: another number of names, or names that are no class names.
    """
    lines = [line.strip() for line in names.splitlines() if line.strip()]
    # As many lines as classes are names as they stand, since a name may hold a comma.
    typed = lines if len(lines) == len(one.classes) else names_in(names)
    if typed and len(typed) != len(one.classes):
        raise DataError(
            f"{len(typed)} names for the {len(one.classes)} classes of {one.name!r}: give one for each, in "
            f"the order {', '.join(one.classes[:8])}{', ...' * (len(one.classes) > 8)}"
        )
    around = tuple(line.strip() for line in templates.splitlines() if line.strip())
    return Wording(check_classes(typed or one.classes), around or one.templates, strength)


def compare_wordings(session: Session, state: FairnessState, resamples: int = 1000) -> Reworded:
    """Ask a class set as the run does and as a state words it, and break both down by groups.

    Args:
        session: loads the model and the pictures once.
        state: names a recipe, a model that its run kept, a column, a class set of :func:`rewordable` and the
            wording; its strength counts only for a model that :func:`blends`.
        resamples: of the bootstrap over pictures within groups.

    Raises:
        DataError: a wording that cannot be used, or no such class set.
        RunError: no such run or model, or pictures that are not at hand or not those of the run.
    """
    run, column = session.run(state.recipe, "hyper_clip"), state.column
    if run.recipe["data"]["source"] not in AGAIN:
        raise RunError(
            f"run {run.folder.name} asked pictures which it does not keep and cannot read again; choose "
            "another run"
        )
    if state.asked not in (there := rewordable(run, column)):
        raise DataError(
            f"no class set {state.asked!r} with a {column!r} to reword; "
            f"there are: {', '.join(there) or 'none'}"
        )
    split, source = last_split(run.metrics), session.model(run, state.model)
    questions: Questions = session.model(run, split, pictures_of)
    one = questions.named(state.asked)
    typed = wording_of(one, state.names, state.templates, state.strength if blends(run, state.model) else 1.0)
    plain = Wording(one.classes, one.templates)
    kept = run.scores.filter(set=one.name, split=split, model=state.model, seed=run.recipe["seeds"][0])
    if kept["label"].to_list() != one.label.tolist():
        raise RunError(
            f"the pictures of {one.name!r} are not those that run {run.folder.name} was asked about"
        )
    sides = []
    for name, way in ((AS_RUN, plain), (AS_TYPED, typed)):
        classifier = source.adapt(way.names, way.templates, way.strength)
        ranks = classifier.ranks(questions.pixels[one.rows], one.label)
        answers = kept.with_columns(model=pl.lit(name), rank=pl.Series(ranks.tolist()))
        sides.append((name, answers.drop_nulls(column)))
    before, (plainly, newly) = kept.drop_nulls(column)["rank"] == 1, (part["rank"] == 1 for _, part in sides)
    return Reworded(
        compare_answers(sides, column, run.recipe["smallest_group"], resamples), plain, typed,
        gained=int((newly & ~plainly).sum()), lost=int((plainly & ~newly).sum()),
        strayed=int((plainly != before).sum()), notes=strength_said(run, state.model),
    )  # fmt: skip

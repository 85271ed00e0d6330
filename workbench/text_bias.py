"""What a condition does to the associations of a sentence encoder: bias tests plain and under a condition.

Strength 0 is the plain encoder, so every number under a condition stands beside what was there without it.

Shape letters: N sentences, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import polars as pl

from workbench.datasets.stimuli import (
    BUNDLED,
    LIMITS,
    PAIR_COLUMNS,
    ROLES,
    TWIN_COLUMNS,
    AssociationStimuli,
    Stimuli,
)
from workbench.evaluation.bias_tests import (
    Association,
    association_test,
    context_differences,
    context_preference,
    share_resamples,
    word_vectors,
)
from workbench.evaluation.similarity import Measured
from workbench.model import Condition, HyperCL

PLAIN, CONDITIONED = "plain encoder", "under the condition"
CANNOT = (
    "An effect size says how far two sets of words lie apart along one contrast, in units of the spread "
    "of the words asked; not how strong a harm is, and not what a model that uses the vectors will do. "
    "A condition also changes the spread that d is divided by. The pairs ask which sentence lies nearer "
    "to one that names nobody. That is not the score of CrowS-Pairs, which needs the word probabilities "
    "of a masked language model: a sentence encoder has none, the packaged MiniLM neither. With its own "
    "pairs, how far apart the two sentences lie is shown instead: 0 if the encoder does not see the group, "
    "and nothing about which one it prefers; as the condition moves all distances, compare kinds with each "
    "other."
)
MEANINGS = {  # of the columns of the tables
    "effect": "how far two sets of words lie apart along one contrast, in standard deviations, -2 to 2",
    "p": "of an effect at least as large if targets were dealt at random; of pairs, two-sided sign test",
    "share": "of pairs whose stereotypical sentence is nearer to the context, 0.5: no preference",
    "distance": "1 minus the cosine of two sentences that only differ in the group, 0 to 2, mean over pairs",
    "difference": "under the condition minus plain encoder",
}


def _association(
    model: HyperCL, test: AssociationStimuli, condition: Condition, strength: float, resamples: int
) -> Association:
    """Run one test on a model under a condition."""
    embedded = model.encode(test.texts(), condition, strength).numpy().astype(np.float64)
    about = test.words()
    sets = []
    for role in ROLES:
        rows = [row for row, (one, _) in enumerate(about) if one == role]
        sets.append(word_vectors(embedded[rows], [about[row][1] for row in rows]))
    return association_test(*sets, resamples=resamples)


def association_rows(
    model: HyperCL,
    tests: Sequence[AssociationStimuli],
    condition: Condition,
    strength: float = 1.0,
    resamples: int = 1000,
    told: Callable[[int], None] = lambda _: None,
) -> pl.DataFrame:
    """Measure association tests on the plain encoder and under a condition.

    Args:
        model: encodes texts under a condition.
        tests: which words and sentences.
        condition: what to look at.
        strength: 0 is the plain encoder, 1 the model.
        resamples: of the bootstrap over words, paired between the two sides.
        told: called with the number of tests done; what it raises ends the work.

    Returns:
        Two rows per test: test, kind, side, words (targets and attributes), effect (d, -2 to 2), low, high, p
        (one-sided) and exact; on the second row also difference, difference_low and difference_high, of d
        under the condition minus d of the plain encoder.

    Raises:
        DataError: a condition or a test that cannot be used.
    """
    rows = []
    for done, test in enumerate(tests):
        told(done)
        plain = _association(model, test, condition, 0.0, resamples)
        for side, found in (
            (PLAIN, plain),
            (CONDITIONED, _association(model, test, condition, strength, resamples)),
        ):
            low, high = Measured.interval(found.resampled)
            row = {"test": test.name, "kind": test.kind, "side": side, "words": _counts(found)}
            row |= {"effect": found.effect, "low": low, "high": high, "p": found.p, "exact": found.exact}
            rows.append(row | _versus(found.effect - plain.effect, found.resampled - plain.resampled, side))
    return pl.DataFrame(rows, infer_schema_length=None)


def _counts(found: Association) -> str:
    return f"{found.words[0]} + {found.words[1]}, {found.words[2]} + {found.words[3]}"


def _versus(value: float, resampled: np.ndarray, side: str) -> dict[str, float | None]:
    """Write a difference to the plain encoder with its interval; nothing for the plain encoder itself."""
    low, high = Measured.interval(resampled)
    found = {"difference": value, "difference_low": low, "difference_high": high}
    return dict.fromkeys(found) if side == PLAIN else found


def preference_rows(
    model: HyperCL, pairs: pl.DataFrame, condition: Condition, strength: float = 1.0, resamples: int = 1000
) -> pl.DataFrame:
    """Measure which sentence of each pair lies nearer to its context, plain and under a condition.

    Args:
        model: encodes texts under a condition.
        pairs: kind, context, stereotypical and antistereotypical.
        condition: what to look at.
        strength: 0 is the plain encoder, 1 the model.
        resamples: of the bootstrap of the difference, over pairs.

    Returns:
        Two rows per kind: kind, side, share (of pairs whose stereotypical sentence is nearer; 0.5 without a
        preference), low, high (Wilson), p (two-sided sign test), pairs, ties; on the second row also
        difference, difference_low and difference_high.

    Raises:
        DataError: a condition or a pair that cannot be used.
    """
    differences = {}
    texts = [text for column in PAIR_COLUMNS for text in pairs[column]]
    for side, much in ((PLAIN, 0.0), (CONDITIONED, strength)):
        embedded = model.encode(texts, condition, much).numpy().astype(np.float64)
        differences[side] = context_differences(*np.split(embedded, 3))
    rows = []
    for kind in pairs["kind"].unique(maintain_order=True):
        own = (pairs["kind"] == kind).to_numpy()
        plain = context_preference(differences[PLAIN][own])
        for side, values in differences.items():
            found = context_preference(values[own])
            drawn = share_resamples(values[own], resamples) - share_resamples(
                differences[PLAIN][own], resamples
            )
            row = {"kind": kind, "side": side, **vars(found)}
            rows.append(row | _versus(found.share - plain.share, drawn, side))
    return pl.DataFrame(rows, infer_schema_length=None)


def distance_rows(
    model: HyperCL, twins: pl.DataFrame, condition: Condition, strength: float = 1.0, resamples: int = 1000
) -> pl.DataFrame:
    """Measure how far apart sentences lie that only differ in the group they speak of.

    Args:
        model: encodes texts under a condition.
        twins: kind, more and less.
        condition: what to look at.
        strength: 0 is the plain encoder, 1 the model.
        resamples: of the bootstrap over pairs, paired between the two sides.

    Returns:
        Two rows per kind: kind, side, distance (mean of 1 - cosine, 0 to 2, 0: the group is not seen), low,
        high, pairs; on the second row also difference, difference_low and difference_high.

    Raises:
        DataError: a condition or a sentence that cannot be used.
    """
    texts = [text for column in TWIN_COLUMNS for text in twins[column]]
    apart = {}
    for side, much in ((PLAIN, 0.0), (CONDITIONED, strength)):
        embedded = model.encode(texts, condition, much).numpy().astype(np.float64)
        more, less = np.split(embedded / np.linalg.norm(embedded, axis=1, keepdims=True), 2)
        apart[side] = 1 - (more * less).sum(1)
    rows = []
    for kind in twins["kind"].unique(maintain_order=True):
        own = np.flatnonzero((twins["kind"] == kind).to_numpy())
        drawn = np.random.default_rng(0).choice(own, (resamples, len(own)))
        plain = apart[PLAIN]
        for side, values in apart.items():
            low, high = Measured.interval(values[drawn].mean(1))
            mean = values[own].mean()
            row = {"kind": kind, "side": side, "distance": mean, "low": low, "high": high, "pairs": len(own)}
            rows.append(row | _versus(mean - plain[own].mean(), (values - plain)[drawn].mean(1), side))
    return pl.DataFrame(rows, infer_schema_length=None)


def associations(
    model: HyperCL,
    asked: Stimuli,
    source: str,
    condition: Condition,
    strength: float,
    told: Callable[[int], None] = lambda _: None,
) -> "Associations":
    """Ask a model everything there is, plain and under a condition.

    Args:
        model: encodes texts under a condition.
        asked: words, sentences and pairs.
        source: of these, for the page.
        condition: what to look at.
        strength: of the generated weights.
        told: as :func:`association_rows` takes it.

    Raises:
        DataError: a condition or a text that cannot be used.
    """
    tests = association_rows(model, asked.tests, condition, strength, told=told)
    told(len(asked.tests))
    pairs = pl.DataFrame()
    if asked.pairs.height:
        pairs = preference_rows(model, asked.pairs, condition, strength)
    if asked.twins.height:
        pairs = distance_rows(model, asked.twins, condition, strength)
    return Associations(tests, pairs, asked, source, str(condition), strength)


def change_said(rows: pl.DataFrame, value: str = "effect", nothing: float = 0.0) -> list[str]:
    """Say for each test whether the condition adds bias, takes some away, or does neither for certain.

    Args:
        rows: as :func:`association_rows` or :func:`preference_rows` gives them.
        value: name of the column that is judged.
        nothing: its value without a bias.

    Returns:
        One sentence per test or kind. "For certain" means that the interval of the difference leaves out 0.
    """
    name, said, sign = rows.columns[0], [], "" if nothing else "+"
    for one in rows[name].unique(maintain_order=True):
        plain, under = rows.filter(pl.col(name) == one).to_dicts()
        clear = under["difference_low"] > 0 or under["difference_high"] < 0
        before, after = plain[value] - nothing, under[value] - nothing
        if not clear:
            what = "no certain change"
        elif before * after < 0:
            what = "turned round"
        else:
            what = "more" if abs(after) > abs(before) else "less"
        said.append(
            f"{one}: {what} ({plain[value]:{sign}.2f} to {under[value]:{sign}.2f}; difference "
            f"{under['difference']:+.2f}, "
            f"{under['difference_low']:+.2f} to {under['difference_high']:+.2f})"
        )
    return said


@dataclass(frozen=True)
class Associations:
    """Both bias tests of an encoder; a table of one's own may hold only one of them.

    Attributes:
        tests: as :func:`association_rows` gives them, or empty.
        pairs: as :func:`preference_rows` or :func:`distance_rows` gives them, or empty.
        asked: words, sentences and pairs.
        source: of these: a name of :func:`workbench.datasets.stimuli.stimuli_names`, or a table's.
        condition: what was looked at.
        strength: of the generated weights.
    """

    tests: pl.DataFrame
    pairs: pl.DataFrame
    asked: Stimuli
    source: str
    condition: str
    strength: float
    meanings: ClassVar[dict[str, str]] = MEANINGS

    @property
    def tables(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """All numbers."""
        return self.tests, self.pairs

    @property
    def limits(self) -> str:
        """What the tests cannot show."""
        looks = self.tests.height
        chance = [
            f"{looks} effects are tested: {looks * 0.05:.2g} with p below 0.05 are expected by chance alone."
        ]
        return " ".join([*[LIMITS] * (self.source == BUNDLED), CANNOT, *chance * (looks > 0)])

    def said(self) -> list[str]:
        """Say for every test and kind of pair whether the condition adds bias, and what it looks for."""
        lines = [
            f"Does {self.condition!r} at strength {self.strength:g} add bias? Plain to conditioned, by "
            f"{self.source}:"
        ]
        about = {test.name: test for test in self.asked.tests}
        if self.tests.height:
            names = self.tests["test"].unique(maintain_order=True)
            for one, said in zip(names, change_said(self.tests), strict=True):
                lines.append(f"· {said}. {about[one].kind.capitalize()}: {about[one].says}")
            if "sanity check" in {test.kind for test in self.asked.tests}:
                lines.append("A condition that loses the sanity check too has removed no bias: it is blind.")
        if "distance" in self.pairs.columns:
            lines.append("Distance between two sentences that only differ in the group, 0: not seen:")
            lines += [f"· {line}." for line in change_said(self.pairs, "distance")]
        elif self.pairs.height:
            lines.append(
                "Share of pairs whose stereotypical sentence is nearer to the context, 0.5: no preference:"
            )
            lines += [f"· {line}." for line in change_said(self.pairs, "share", 0.5)]
        return lines

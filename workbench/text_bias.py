"""What a condition does to the associations of a sentence encoder: bias tests plain and under a condition.

Strength 0 is the plain encoder, so every number under a condition stands beside what was there without it.

Shape letters: N sentences, D width.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.datasets.stimuli import PAIR_COLUMNS, ROLES, AssociationStimuli
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
    "With five tests, one p below 0.05 in four looks comes by chance alone. A condition also changes "
    "the spread that d is divided by. The pairs ask which sentence lies nearer to one that names "
    "nobody. That is not the score of CrowS-Pairs, which needs the word probabilities of a masked "
    "language model: a sentence encoder has none, the packaged MiniLM neither."
)


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
) -> pl.DataFrame:
    """Measure association tests on the plain encoder and under a condition.

    Args:
        model: encodes texts under a condition.
        tests: which words and sentences.
        condition: what to look at.
        strength: 0 is the plain encoder, 1 the model.
        resamples: of the bootstrap over words, paired between the two sides.

    Returns:
        Two rows per test: test, kind, side, words (targets and attributes), effect (d, -2 to 2), low, high, p
        (one-sided) and exact; on the second row also difference, difference_low and difference_high, of d
        under the condition minus d of the plain encoder.

    Raises:
        DataError: a condition or a test that cannot be used.
    """
    rows = []
    for test in tests:
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

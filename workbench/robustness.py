"""How much a model's scores move when its condition is written differently, wrongly, or about something else.

A good model hardly moves under a paraphrase or a typing error and moves a lot under a negated or an off-topic
condition. A model that does not move at all does not read its condition, and is flagged.
"""

import random
import re
from collections.abc import Callable

import numpy as np
import polars as pl
import torch
from scipy.stats import spearmanr

from workbench.errors import DataError
from workbench.evaluation.similarity import pair_order, within_pairs
from workbench.model import HyperCL

# Written for this project: about nothing that any data set here asks for.
OFF_TOPIC = (
    "The key in which an unheard song is sung.",
    "The number of the bus that did not come.",
    "Whether the reader has slept well.",
    "The rules of a game nobody plays any more.",
)
STILL = 0.01  # mean change of a cosine below which a condition is said to change nothing
LOST = 0.1  # of the pair order, from which on another wording is said not to be understood


def _bare(condition: str) -> str:
    """Return a condition without its full stop, first letter small unless the word is all capitals."""
    text = condition.rstrip(". ")
    whole = text[:2].isupper() and text[1:2] != " "  # "DNA", but not "A number"
    return text if whole else text[:1].lower() + text[1:]


def misspelt(condition: str, seed: int = 0) -> str:
    """Swap two neighbouring inner letters of every word of four letters or more."""
    draw = random.Random(f"{seed} {condition}")

    def swap(found: re.Match[str]) -> str:
        word = found.group()
        place = draw.randrange(1, len(word) - 2)
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]

    return re.sub(r"[^\W\d_]{4,}", swap, condition)


VARIANTS: dict[str, Callable[[str, int], str]] = {
    "paraphrased": lambda condition, _: f"In terms of {_bare(condition)}.",
    "asked": lambda condition, _: f"Are they alike as to {_bare(condition)}?",
    "capitals": lambda condition, _: condition.upper(),
    "misspelt": lambda condition, row: misspelt(condition, row),
    "negated": lambda condition, _: f"Anything but {_bare(condition)}.",
    "off-topic": lambda _, row: OFF_TOPIC[row % len(OFF_TOPIC)],
    "empty": lambda *_: " ",
}
SHOULD_MOVE = ("negated", "off-topic")


def measure_robustness(model: HyperCL, table: pl.DataFrame, limit: int = 1000) -> pl.DataFrame:
    """Score pairs under their own conditions and under changed ones.

    Args:
        model: a trained model.
        table: pairs with the columns sentence1, sentence2, condition, label and pair, as
            :func:`workbench.datasets.pairs.load_pairs` returns them.
        limit: use the first so many rows (pairs are whole).

    Returns:
        One row per variant: variant, example, rows, moved (mean absolute change of the cosine, 0 to 2),
        rank_kept (Spearman of the scores before and after), pair_order (share of a pair's two conditions
        ranked right, 0.5 is chance; null if no pair has two labels), and verdict. Point estimates on these
        rows: a verdict that a wording is not understood means that pair_order falls by more than 0.1.

    Raises:
        DataError: the table has no rows.
    """
    if table.height == 0:
        raise DataError("no pairs to measure on; give a table with at least one row")
    table = table.filter(pl.col("pair").is_in(table.head(limit)["pair"].unique().implode()))
    label, pair = table["label"].to_numpy(), table["pair"].to_numpy()
    pairs, once = within_pairs(label, pair), np.ones((1, table.height))
    before = _scores(model, table, table["condition"].to_list())
    own = float(pair_order(before, label, once, pairs)[0])
    rows = [_row("as written", table["condition"][0], before, before, own, "")]
    known = {text: place for place, text in enumerate(table["condition"].unique(maintain_order=True))}
    for name, change in VARIANTS.items():
        changed = {text: change(text, place) for text, place in known.items()}
        example = next(iter(changed.values()))
        try:
            after = _scores(model, table, [changed[text] for text in table["condition"]])
        except DataError as refused:
            told = {"variant": name, "example": example, "verdict": f"refused: {refused}"}
            rows.append({**dict.fromkeys(rows[0]), **told})
            continue
        kept = float(pair_order(after, label, once, pairs)[0])
        paraphrased = rows[1]["moved"] if len(rows) > 1 else 0.0
        moved = float(np.abs(after - before).mean())
        rows.append(_row(name, example, before, after, kept, _verdict(name, moved, paraphrased, own - kept)))
    return pl.DataFrame(rows, infer_schema_length=None)


@torch.inference_mode()
def _scores(model: HyperCL, table: pl.DataFrame, conditions: list[str]) -> np.ndarray:
    """Cosine of every row's sentences under the conditions given."""
    first, second = (
        model.encode_conditioned(table[name].to_list(), conditions) for name in ("sentence1", "sentence2")
    )
    return (first * second).sum(1).double().numpy()


def _verdict(name: str, moved: float, paraphrased: float, lost: float) -> str:
    """Say whether a variant did what it should; another meaning should move more than a paraphrase does."""
    if name not in SHOULD_MOVE:
        if lost > LOST:
            return f"NOT UNDERSTOOD: pair order falls by {lost:.2f}"
        return "hardly moves, as it should" if moved < STILL else "moves"
    if moved < STILL:
        return "CHANGES NOTHING: the model hardly reads its condition"
    if moved <= 1.5 * paraphrased:
        return "MOVES LIKE A PARAPHRASE: what is different about it is not read"
    return "moves, as it should"


def _row(
    name: str, example: str, before: np.ndarray, after: np.ndarray, order: float, verdict: str
) -> dict[str, object]:
    """Lay out one variant's measurements."""
    same = np.ptp(before) == 0 or np.ptp(after) == 0
    return {
        "variant": name,
        "example": example,
        "rows": len(before),
        "moved": float(np.abs(after - before).mean()),
        "rank_kept": None if same else float(spearmanr(before, after).statistic),
        "pair_order": None if np.isnan(order) else order,
        "verdict": verdict,
    }

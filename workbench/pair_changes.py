"""What a condition does to pairs of sentences: which move, which change order, what parts one.

Cosines lie between -1 and 1. A gold score lies between 0 and 1, as labels do after they are read.

Shape letters: N pairs, U conditions, S unique sentences.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import polars as pl
from jaxtyping import Float

from workbench.conditions import normalise_condition, normalise_text
from workbench.config import validated
from workbench.datasets import bundled
from workbench.datasets.pairs import PairData, load_pairs
from workbench.errors import DataError, RunError
from workbench.evaluation.similarity import Measured, measure
from workbench.model import Condition, HyperCL
from workbench.runs import Run
from workbench.tables import last_split

MOST_OWN = 60  # pairs that a person pastes
LONGEST_OWN = 3000  # bytes of all of them: they travel in the link
_AT_ONCE = 256  # rows that are compared with all others together

# --- pairs --------------------------------------------------------------------------------------------------


def check_length(text: str) -> None:
    """Refuse pairs that do not fit into a link.

    Raises:
        DataError: says how long they are and may be.
    """
    size = len(text.encode("utf-8", "replace"))
    if size > LONGEST_OWN:
        raise DataError(
            f"your pairs take {size:,} bytes, at most {LONGEST_OWN:,} fit into a link; paste fewer or "
            "shorter ones"
        )


def parse_pairs(text: str) -> pl.DataFrame:
    """Read pairs that a person wrote: one per line, two texts with a tab or ``|`` between.

    Returns:
        sentence1 and sentence2; blank lines are left out.

    Raises:
        DataError: no pair, too many or too long, or a line that holds no two texts; names the line.
    """
    check_length(text)
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        parts = line.split("\t" if "\t" in line else "|")
        if len(parts) != 2:
            raise DataError(
                f"line {number} of your pairs holds {len(parts)} text{'s' * (len(parts) > 1)}; write two, "
                "with a tab or | between them"
            )
        one, other = (normalise_text(part, f"line {number} of your pairs") for part in parts)
        rows.append({"sentence1": one, "sentence2": other})
    if not rows:
        raise DataError("no pairs yet; write one per line, two texts with a tab or | between them")
    if len(rows) > MOST_OWN:
        raise DataError(f"{len(rows)} pairs, at most {MOST_OWN} can be pasted; leave some out")
    return pl.DataFrame(rows)


def bundled_pairs(attribute: str, split: str = "test") -> pl.DataFrame:
    """Pair all bundled sentences of a domain with each other.

    Args:
        attribute: whose agreement is the gold score; only domains that have it are paired. Empty for all
            domains without a gold score.
        split: whose sentences.

    Returns:
        sentence1, sentence2, domain and, with an attribute, its two values and gold: how alike they are, 0
        to 1.

    Raises:
        DataError: no such attribute.
    """
    if attribute and attribute not in bundled.attributes():
        raise DataError(
            f"no attribute {attribute!r} in the bundled sentences; there are: "
            f"{', '.join(bundled.attributes())}"
        )
    told = bundled.sentences().filter(split=split)
    told = told.filter(pl.col(attribute).is_not_null()) if attribute else told
    rows = []
    for domain in told["domain"].unique(maintain_order=True):
        for one, other in combinations(told.filter(domain=domain).to_dicts(), 2):
            row = {"sentence1": one["sentence"], "sentence2": other["sentence"], "domain": domain}
            if attribute:
                values = one[attribute], other[attribute]
                row |= {"value1": values[0], "value2": values[1], "gold": bundled.label(attribute, *values)}
            rows.append(row)
    return pl.DataFrame(rows)


def shows_texts(run: Run) -> bool:
    """Tell whether a run's pairs may be shown: the bundled ones and public sets, no files of others."""
    return run.recipe["data"]["source"] in ("bundled", "manifest")


def scored_pairs(run: Run, model: str, split: str = "") -> pl.DataFrame:
    """Return the pairs a finished run has scored, each under the condition of its row.

    Args:
        run: of Hyper-CL.
        model: whose scores are the conditioned ones, the mean over its seeds.
        split: the last one with labels if empty.

    Returns:
        row, pair, condition_kind, gold, plain (the run's plain cosine), conditioned, and where the texts may
        be shown (:func:`shows_texts`) sentence1, sentence2 and condition.

    Raises:
        RunError: the run has no plain cosine or no scores of that model, or its data are not what they were.
    """
    split = split or last_split(run.metrics)
    plain = next((one["name"] for one in run.recipe["models"] if one["kind"] == "cosine"), None)
    known = run.scores["model"].unique().sort().to_list()
    if plain is None or model not in known:
        missing = "no plain cosine" if plain is None else f"no scores of {model!r}"
        raise RunError(f"run {run.folder.name} holds {missing}; it has scores of: {', '.join(known)}")
    scores = run.scores.filter(pl.col("model").is_in([plain, model]), split=split)
    means = scores.group_by("row", "model").agg(pl.col("score").cast(pl.Float64).mean())
    about = scores.filter(model=plain).select("row", "pair", "condition_kind", gold="label").unique("row")
    found = about.sort("row")
    for name, column in ((plain, "plain"), (model, "conditioned")):
        own = means.filter(model=name).select("row", pl.col("score").alias(column))
        found = found.join(own, on="row", how="left", maintain_order="left")
    if not shows_texts(run):
        return found
    table = load_pairs(validated(PairData, run.recipe["data"], "the recipe's data", RunError))[split]
    if table.height != found.height or not np.allclose(table["label"], found["gold"]):
        raise RunError(
            f"the pairs of {run.recipe['data']['name']} are not those run {run.folder.name} has scored; "
            "run the recipe again"
        )
    return found.with_columns(table[name] for name in ("sentence1", "sentence2", "condition"))


# --- what moves ---------------------------------------------------------------------------------------------


def compare(
    model: HyperCL, pairs: pl.DataFrame, condition: Condition, strength: float = 1.0
) -> tuple[pl.DataFrame, Float[np.ndarray, "S S"], Float[np.ndarray, "S S"]]:
    """Compare the sentences of pairs plain and under a condition; each distinct one is embedded once.

    Args:
        model: a trained one.
        pairs: sentence1 and sentence2.
        condition: what to look at.
        strength: 0 is the plain encoder, 1 the model, up to 2 beyond it.

    Returns:
        The pairs with the numbers of their sentences (first, second), plain and conditioned; and the cosine
        of every sentence with every other, plain and conditioned.

    Raises:
        DataError: a condition that cannot be used, or a strength out of range.
    """
    condition = normalise_condition(condition) if isinstance(condition, str) else condition
    texts = list(dict.fromkeys([*pairs["sentence1"], *pairs["sentence2"]]))
    place = {text: row for row, text in enumerate(texts)}
    first, second = ([place[text] for text in pairs[name]] for name in ("sentence1", "sentence2"))
    before, after = (
        (embedded @ embedded.T).double().clamp(-1, 1).numpy()
        for embedded in (model.encode(texts, condition, one) for one in (0.0, strength))
    )
    columns = {"first": first, "second": second, "plain": before[first, second]}
    return (
        pairs.with_columns(
            *(pl.Series(name, values) for name, values in columns.items()),
            pl.Series("conditioned", after[first, second]),
        ),
        before,
        after,
    )


def with_changes(pairs: pl.DataFrame) -> pl.DataFrame:
    """Add what changed to pairs with the columns plain and conditioned.

    Returns:
        The pairs with change (conditioned minus plain, -2 to 2, 0: nothing moved), rank_plain and
        rank_conditioned (1: most alike, ties share the mean rank), rank_move (places climbed towards most
        alike) and quadrant: on which side of the two medians the pair lies.
    """
    high = [pl.col(name) >= pl.col(name).median() for name in ("plain", "conditioned")]
    ranks = [
        pl.col(name).rank("average", descending=True).alias(f"rank_{name}")
        for name in ("plain", "conditioned")
    ]
    return pairs.with_columns(
        (pl.col("conditioned") - pl.col("plain")).alias("change"),
        *ranks,
        pl.when(high[0] & high[1])
        .then(pl.lit("stays alike"))
        .when(high[1])
        .then(pl.lit("brought together"))
        .when(high[0])
        .then(pl.lit("parted"))
        .otherwise(pl.lit("stays apart"))
        .alias("quadrant"),
    ).with_columns(rank_move=pl.col("rank_plain") - pl.col("rank_conditioned"))


def movers(changed: pl.DataFrame, most: int = 15) -> pl.DataFrame:
    """Return the pairs that move most, up to ``most`` each way, largest fall first; ties keep their order."""
    rows = changed if "row" in changed.columns else changed.with_row_index("row")
    down = rows.filter(pl.col("change") < 0).sort("change", "row").head(most)
    up = rows.filter(pl.col("change") > 0).sort("change", "row", descending=[True, False]).head(most)
    return pl.concat([down, up.reverse()])


def flipped_share(before: Float[np.ndarray, " N"], after: Float[np.ndarray, " N"]) -> float:
    """Share of all couples of pairs whose order turns round; 0 (same order) to 1 (reversed).

    A couple that ties on either side has no order there and is not flipped. Without ties it is (1 - tau) / 2.
    NaN for fewer than two pairs.

    Source: Kendall (1938), a new measure of rank correlation.
    """
    count = len(before)
    if count < 2:
        return float("nan")
    flipped = 0
    for start in range(0, count, _AT_ONCE):
        flipped += int((_signs(before, start) * _signs(after, start) < 0).sum())
    return flipped / (count * (count - 1))


def _signs(values: Float[np.ndarray, " N"], start: int) -> Float[np.ndarray, "M N"]:
    return np.sign(values[start : start + _AT_ONCE, None] - values[None])


def flips(before: Float[np.ndarray, " N"], after: Float[np.ndarray, " N"], most: int = 10) -> pl.DataFrame:
    """Return the couples of pairs whose order turns round most clearly.

    Returns:
        above and below (rows, by the plain order), plain (their difference before, above 0), conditioned
        (after, below 0) and size: the smaller of the two without its sign. Largest size first.
    """
    found = []
    for start in range(0, len(before), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        gaps = before[rows, None] - before[None], after[rows, None] - after[None]
        size = np.minimum(gaps[0], -gaps[1])
        for place in np.argsort(-size, axis=None, kind="stable")[:most]:
            row, other = np.unravel_index(place, size.shape)
            if size[row, other] > 0:
                found.append((start + int(row), int(other), *(float(gap[row, other]) for gap in gaps)))
    schema = {"above": pl.Int64, "below": pl.Int64, "plain": pl.Float64, "conditioned": pl.Float64}
    table = pl.DataFrame(found, schema=schema, orient="row")
    size = pl.min_horizontal("plain", -pl.col("conditioned")).alias("size")
    return table.with_columns(size).sort("size", "above", "below", descending=[True, False, False]).head(most)


def agreement(changed: pl.DataFrame, resamples: int = 300) -> pl.DataFrame | None:
    """Return Spearman's correlation with the gold score, plain and conditioned, -1 to 1, ideal 1, chance 0.

    Returns:
        side, value, low, high (95 % bootstrap over pairs) and count; None if fewer than three pairs have a
        gold score or all have the same.
    """
    if "gold" not in changed.columns:
        return None
    told = changed.drop_nulls("gold")
    if told.height < 3 or told["gold"].n_unique() < 2:
        return None
    pair = told["pair"].to_numpy() if "pair" in told.columns else np.arange(told.height)
    scores = told.select("plain", "conditioned").to_numpy().T
    found = measure(scores, told["gold"].to_numpy().astype(float), pair, resamples=resamples)["spearman"]
    rows = []
    for place, side in enumerate(("plain", "conditioned")):
        low, high = Measured.interval(found.resampled[place])
        value = float(found.value[place])
        rows.append({"side": side, "value": value, "low": low, "high": high, "count": told.height})
    return pl.DataFrame(rows)


# --- which condition parts a pair ---------------------------------------------------------------------------


def known_conditions() -> pl.DataFrame:
    """Return one condition for every attribute of the bundled sentences, the first phrasing of each."""
    rows = [
        {"attribute": name, "condition": about["phrasings"][0]}
        for name, about in bundled.attributes().items()
    ]
    return pl.DataFrame(rows)


def attribute_of(condition: str) -> str:
    """Return the attribute of the bundled sentences that a condition asks for; empty if it names none."""
    asked = condition.strip().rstrip(".").casefold()
    for name, about in bundled.attributes().items():
        if asked in (phrasing.rstrip(".").casefold() for phrasing in about["phrasings"]):
            return name
    return next((name for name in bundled.attributes() if name in asked), "")


def cosines_by_condition(
    model: HyperCL, pairs: pl.DataFrame, strength: float = 1.0, said: Callable[[str], None] | None = None
) -> pl.DataFrame:
    """Compare pairs under every known condition.

    Args:
        model: a trained one.
        pairs: sentence1 and sentence2.
        strength: as :func:`compare` takes it.
        said: is told before each condition how far the work is.

    Returns:
        One row per pair and one column per condition, named by it: cosines.
    """
    columns, conditions = {}, known_conditions()["condition"]
    for place, condition in enumerate(conditions):
        if said is not None:
            said(f"condition {place + 1} of {len(conditions)}")
        columns[condition] = compare(model, pairs, condition, strength)[0]["conditioned"]
    return pl.DataFrame(columns)


def separations(plain: float, cosines: pl.DataFrame, row: int) -> pl.DataFrame:
    """Rank the known conditions by how far they part one pair.

    A condition can bring all sentences together or apart, so beside the cosine stands the share of other
    pairs that are less alike under the same condition.

    Args:
        plain: the pair's plain cosine.
        cosines: as :func:`cosines_by_condition` gives them.
        row: of the pair.

    Returns:
        attribute, condition, plain, cosine, change (cosine minus plain, -2 to 2) and less_alike (0: no other
        pair is less alike, the condition parts it most, to 1; NaN without other pairs), the condition that
        parts the pair most first.
    """
    rows = []
    for about in known_conditions().to_dicts():
        column = cosines[about["condition"]].to_numpy()
        own = float(column[row])
        below = float((column < own).sum()) / (len(column) - 1) if len(column) > 1 else float("nan")
        rows.append({**about, "plain": plain, "cosine": own, "change": own - plain, "less_alike": below})
    return pl.DataFrame(rows).sort("change", "condition")

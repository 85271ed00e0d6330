"""The bundled set: 320 sentences written by hand for this project, and the pairs that follow by rule.

Each sentence describes one animal, dish, vehicle or place and gives seven attributes of it. Two sentences of
one domain are compared under a condition that asks for one attribute: label 1 if the values agree, 0 if not,
and in between for ordered attributes such as size. Every pair of sentences stands in two rows, one under a
condition with a high label and one under a condition with a low one, and each attribute is high as often as
low, so that neither a score that ignores the condition nor one that ignores the sentences can order the two.
"""

import csv
import random
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import polars as pl

from workbench.config import read_yaml
from workbench.errors import DataError

FOLDER = Path(__file__).parent / "bundled"
DOMAINS = ("animals", "dishes", "vehicles", "places")
# The values were dealt to the ids at random, so consecutive ids are a random split. Entities are never
# shared.
SPLITS = {"train": range(48), "valid": range(48, 60), "test": range(60, 80)}
MINIMUM_GAP = 0.5  # between the two labels of a pair, so that which is higher is beyond doubt


@lru_cache(maxsize=1)
def attributes() -> dict[str, dict[str, Any]]:
    """Return the attributes with their values and phrasings."""
    return read_yaml(FOLDER / "attributes.yaml", DataError)


def sentences() -> pl.DataFrame:
    """Return all sentences with domain, entity, split and, as columns, their attributes (null where none)."""
    rows = []
    for domain in DOMAINS:
        with open(FOLDER / f"{domain}.csv", encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file)):
                split = next(name for name, numbers in SPLITS.items() if number in numbers)
                rows.append({"domain": domain, "split": split, **row})
    return pl.DataFrame(rows, infer_schema_length=None)


def label(attribute: str, first: str, second: str) -> float:
    """Return how alike two values of an attribute are, 0 (different) to 1 (the same)."""
    about = attributes()[attribute]
    if not about.get("ordinal"):
        return float(first == second)
    values = about["values"]
    return 1 - abs(values.index(first) - values.index(second)) / (len(values) - 1)


def pairs() -> dict[str, pl.DataFrame]:
    """Build the pairs of all splits, the same at every call.

    Returns:
        For train, valid and test a table with sentence1, sentence2, condition, label, domain and
        condition_kind: "seen", "rephrased" (the attribute is trained on, this phrasing is not) or "unseen"
        (neither is).
    """
    rng = random.Random(2024)
    table = sentences()
    return {split: pl.DataFrame(_pairs_of(table.filter(split=split), split, rng)) for split in SPLITS}


def _pairs_of(table: pl.DataFrame, split: str, rng: random.Random) -> list[dict[str, Any]]:
    """Build one split's rows, domain by domain."""
    rows = []
    for domain in DOMAINS:
        entities = table.filter(domain=domain).to_dicts()
        asked = [name for name in attributes() if entities[0][name] is not None]
        trained = [name for name in asked if attributes()[name].get("trained", True)]
        groups = [trained] if split != "test" else [trained, [name for name in asked if name not in trained]]
        couples = [couple if rng.random() < 0.5 else couple[::-1] for couple in combinations(entities, 2)]
        for names in groups:
            rng.shuffle(couples)
            rows += _balanced(couples, names, domain, split, rng)
            # Sides change place, so that a couple asked about again is a pair of its own.
            couples = [couple[::-1] for couple in couples]
    return rows


def _balanced(
    couples: list[tuple[dict[str, Any], dict[str, Any]]],
    names: list[str],
    domain: str,
    split: str,
    rng: random.Random,
) -> list[dict[str, Any]]:
    """Choose for each couple a high and a low attribute so that every attribute is high as often as low."""
    surplus = dict.fromkeys(names, 0)  # times high minus times low
    chosen = []
    for one, other in couples:
        labels = {name: label(name, one[name], other[name]) for name in names}
        options = [
            (high, low) for high in names for low in names if labels[high] - labels[low] >= MINIMUM_GAP
        ]
        # The best option takes a high that was too often low and a low that was too often high.
        rng.shuffle(options)
        best = min(options, key=lambda option: surplus[option[0]] - surplus[option[1]], default=None)
        if best is None or surplus[best[0]] - surplus[best[1]] > 1:
            continue
        surplus[best[0]] += 1
        surplus[best[1]] -= 1
        # The test split asks half of its pairs with the phrasing that is never trained on.
        held_out = split == "test" and rng.random() < 0.5
        rows = [
            {
                "sentence1": one["sentence"],
                "sentence2": other["sentence"],
                **_asked(name, held_out, rng),
                "label": labels[name],
            }
            for name in best
        ]
        rng.shuffle(rows)
        chosen += [{**row, "domain": domain} for row in rows]
    return chosen


def _asked(name: str, held_out: bool, rng: random.Random) -> dict[str, str]:
    """Phrase the condition that asks for an attribute, and say how new it is to a trained model."""
    about = attributes()[name]
    phrasing = about["phrasings"][-1] if held_out else rng.choice(about["phrasings"][:-1])
    kind = "unseen" if not about.get("trained", True) else "rephrased" if held_out else "seen"
    return {"condition": phrasing, "attribute": name, "condition_kind": kind}

"""Words and sentences that bias tests ask an encoder about: our own, published ones, and the user's tables.

The bundled ones were written for this project. They are few, English and ours; the file itself says what they
cannot show. Published ones (WEAT, SEAT, CrowS-Pairs) can be asked where their prepared files are.

Shape letters: none.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import polars as pl

from workbench.conditions import normalise_text
from workbench.config import read_yaml
from workbench.datasets.bundled import FOLDER
from workbench.errors import DataError
from workbench.manifests import locate, verified_folder

ROLES = ("target1", "target2", "attribute1", "attribute2")
PAIR_COLUMNS = ("context", "stereotypical", "antistereotypical")
TWIN_COLUMNS = ("more", "less")
BUNDLED = "words of our own"
# Published ones: name -> data set, and what the names of its tests begin with.
PUBLISHED = {
    "WEAT, words": ("seat", ("weat",)),
    "SEAT, WEAT's words in sentences": ("seat", ("sent-weat",)),
    "SEAT, angry Black woman": ("seat", ("angry", "sent-angry")),
    "SEAT, double binds": ("seat", ("heilman", "sent-heilman")),
    "SEAT, religion": ("seat", ("sent-religion",)),
    "CrowS-Pairs": ("crows-pairs", ()),
}
MOST_ROWS, MOST_BYTES = 2000, 1_000_000
LIMITS = (
    "A handful of English words and sentences of our own. They show familiar associations where there are "
    "any; they say nothing of groups they do not name, and finding nothing is no proof of nothing."
)
# Names that published files give the four roles.
_ROLE_NAMES = {"targ1": "target1", "targ2": "target2", "attr1": "attribute1", "attr2": "attribute2"}


@dataclass(frozen=True)
class AssociationStimuli:
    """The words of one WEAT or SEAT test, each with its sentences.

    Attributes:
        name: of the test.
        says: how to read a positive effect.
        kind: "sanity check", "nothing expected", "stereotype", "published" or "own".
        labels: what each of the four sets is called, by role.
        sentences: by role, the sentences of every word.
    """

    name: str
    says: str
    kind: str
    labels: Mapping[str, str]
    sentences: Mapping[str, Mapping[str, list[str]]]

    def texts(self) -> list[str]:
        """Return all sentences, role by role and word by word."""
        return [text for role in ROLES for said in self.sentences[role].values() for text in said]

    def words(self) -> list[tuple[str, str]]:
        """Return role and word of every sentence, in the order of :meth:`texts`."""
        return [(role, word) for role in ROLES for word, said in self.sentences[role].items() for _ in said]


@dataclass(frozen=True)
class Stimuli:
    """Everything an encoder is asked.

    Attributes:
        tests: association tests.
        pairs: kind, context, stereotypical, antistereotypical; may be empty.
        twins: kind, more, less: sentences that only differ in the group they speak of; may be empty.
    """

    tests: tuple[AssociationStimuli, ...] = ()
    pairs: pl.DataFrame = field(default_factory=pl.DataFrame)
    twins: pl.DataFrame = field(default_factory=pl.DataFrame)


def stimuli_names() -> list[str]:
    """Return what :func:`named_stimuli` takes: our own, and the published ones that are on this machine."""
    return [BUNDLED, *(name for name, (data, _) in PUBLISHED.items() if locate(data) is not None)]


@lru_cache(maxsize=len(PUBLISHED) + 1)
def named_stimuli(name: str) -> Stimuli:
    """Return the stimuli of a name.

    Raises:
        DataError: no such name.
        ManifestError: the published set is not on this machine, or damaged.
    """
    if name == BUNDLED:
        return bundled_stimuli()
    if name not in PUBLISHED:
        raise DataError(f"no bias tests named {name[:80]!r}; there are: {', '.join((BUNDLED, *PUBLISHED))}")
    data, starts = PUBLISHED[name]
    if data == "crows-pairs":
        table = pl.read_parquet(verified_folder(data) / "test.parquet")
        return Stimuli(twins=table.select(kind="bias_type", more="sent_more", less="sent_less"))
    table = pl.read_parquet(verified_folder(data) / "tests.parquet")
    chosen = pl.any_horizontal(pl.col("test").str.starts_with(start) for start in starts)
    return Stimuli(_tests(table.filter(chosen), data, "published"))


@lru_cache(maxsize=1)
def bundled_stimuli() -> Stimuli:
    """Return the tests and pairs that come with the workbench."""
    tests = []
    for name, about in read_yaml(FOLDER / "association_tests.yaml", DataError).items():
        labels, sentences = {}, {}
        for part in ("target", "attribute"):
            for place, (label, words) in enumerate(about[f"{part}s"].items(), 1):
                role = f"{part}{place}"
                labels[role] = label
                sentences[role] = {
                    word: [template.format(word) for template in about[f"{part}_templates"]] for word in words
                }
        tests.append(AssociationStimuli(name, about["says"], about["kind"], labels, sentences))
    return Stimuli(tuple(tests), pl.read_csv(FOLDER / "context_pairs.csv", infer_schema=False))


def read_stimuli(raw: bytes, name: str) -> Stimuli:
    """Read a table of one's own: association tests, or pairs; its columns say which.

    Tests have the columns test, role and text, one sentence a row; role is target1, target2, attribute1 or
    attribute2 (targ1, attr1 and so on of published files too). A column category names the sets; rows with
    the same value in a column word are sentences of one word and count once. Pairs have the columns context,
    stereotypical, antistereotypical and, if wanted, kind.

    Args:
        raw: a CSV file in UTF-8.
        name: how messages call it.

    Raises:
        DataError: too large, not such a table, or an empty or unusable cell; says which row.
    """
    if len(raw) > MOST_BYTES:
        raise DataError(f"{name}: {len(raw):,} bytes, at most {MOST_BYTES:,} are read; leave rows out")
    try:
        # All text: "007" and "true" are words too.
        table = pl.read_csv(io.BytesIO(raw), infer_schema=False, encoding="utf8")
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as problem:
        raise DataError(f"{name} is no CSV table: {' '.join(str(problem).split())[:150]}") from None
    if table.height > MOST_ROWS:
        raise DataError(f"{name}: {table.height:,} rows, at most {MOST_ROWS:,} are read; leave rows out")
    if set(PAIR_COLUMNS) <= set(table.columns):
        return Stimuli(pairs=_pairs(table, name))
    if {"test", "role", "text"} <= set(table.columns):
        return Stimuli(_tests(table, name, "own"))
    raise DataError(
        f"{name} has the columns {', '.join(table.columns)[:200]}; association tests need test, role and "
        f"text, pairs need {', '.join(PAIR_COLUMNS)}"
    )


def _clean(table: pl.DataFrame, columns: tuple[str, ...], name: str) -> pl.DataFrame:
    """Bring the columns' texts to their one form; no cell may be empty."""
    if table.height == 0:
        raise DataError(f"{name}: no rows; add at least one")
    clean = {
        column: [
            normalise_text(text or "", f"{name}, {column}, row {row}")
            for row, text in enumerate(table[column])
        ]
        for column in columns
    }
    return table.with_columns(pl.Series(column, values) for column, values in clean.items())


def _pairs(table: pl.DataFrame, name: str) -> pl.DataFrame:
    table = _clean(table, PAIR_COLUMNS, name)
    kind = pl.col("kind").fill_null("own") if "kind" in table.columns else pl.lit("own")
    return table.select(kind.alias("kind"), *PAIR_COLUMNS)


def _tests(table: pl.DataFrame, name: str, kind: str) -> tuple[AssociationStimuli, ...]:
    table = _clean(table, ("test", "role", "text"), name).with_columns(pl.col("role").replace(_ROLE_NAMES))
    unknown = sorted(set(table["role"]) - set(ROLES))
    if unknown:
        raise DataError(f"{name}: unknown role {unknown[0]!r}; a role is one of {', '.join(ROLES)}")
    own = pl.col("word").fill_null(pl.col("text")) if "word" in table.columns else pl.col("text")
    label = pl.col("category").fill_null(pl.col("role")) if "category" in table.columns else pl.col("role")
    table = table.with_columns(word=own, category=label)
    found = []
    for (test,), part in table.group_by("test", maintain_order=True):
        sentences: dict[str, dict[str, list[str]]] = {role: {} for role in ROLES}
        labels = {}
        for row in part.to_dicts():
            labels.setdefault(row["role"], row["category"])
            sentences[row["role"]].setdefault(row["word"], []).append(row["text"])
        missing = [role for role in ROLES if len(sentences[role]) < 2]
        if missing:
            raise DataError(f"{name}, test {test!r}: {missing[0]} needs at least two words; add rows")
        sizes = [len(sentences[role]) for role in ROLES[:2]]
        if sizes[0] != sizes[1]:
            raise DataError(
                f"{name}, test {test!r}: {sizes[0]} and {sizes[1]} target words; the test needs equal numbers"
            )
        says = f"Positive means that {labels['target1']} goes with {labels['attribute1']}."
        found.append(AssociationStimuli(test, says, kind, labels, sentences))
    return tuple(found)

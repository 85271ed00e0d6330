"""What the dashboard of pairs shows of a finished run: from a view's state to numbers. No Panel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from workbench.errors import RunError
from workbench.pair_changes import (
    agreement,
    attribute_of,
    bundled_pairs,
    compare,
    cosines_by_condition,
    flipped_share,
    flips,
    movers,
    parse_pairs,
    scored_pairs,
    separations,
    with_changes,
)
from workbench.runs import Run
from workbench.session import FIRST_MODELS, Session, reads_text
from workbench.view_state import SimilarityState

MOST_SENTENCES = 14  # in a matrix
MOST_OTHERS = 200  # pairs that the chosen one is held against, where a run has thousands
HIDDEN = (
    "The texts of this run's data are not shown: they were read from files of somebody's own and are no part "
    "of a run. Rows stand by their number, and no other condition can be asked."
)


@dataclass(frozen=True)
class Compared:
    """Pairs before and after.

    Attributes:
        state: what was asked for.
        pairs: as :func:`workbench.pair_changes.with_changes` gives them, each with its number as row.
        texts: the distinct sentences; empty where there is no matrix.
        before: plain cosines of all sentences with each other.
        after: conditioned ones.
        agreement: with the gold score; None without one.
        parted: the known conditions, ranked by how far they part the chosen pair; None if none is chosen.
    """

    state: SimilarityState
    pairs: pl.DataFrame
    texts: list[str]
    before: np.ndarray
    after: np.ndarray
    agreement: pl.DataFrame | None
    parted: pl.DataFrame | None = None

    @property
    def condition(self) -> str:
        """What the conditioned side stands under, for titles."""
        return "conditioned" if self.state.pairs == "run" else self.state.condition

    def said(self) -> str:
        """Say what a conditioned cosine is."""
        if self.state.pairs == "run":
            return "cosine under the row's own condition as the run scored it, mean over seeds, -1 to 1"
        return f"cosine under {self.state.condition!r} at strength {self.state.strength:g}, -1 to 1"

    @property
    def chosen(self) -> pl.DataFrame:
        """The chosen pair as a table of one row, or of none."""
        return self.pairs.filter(pl.col("row").eq_missing(self.state.chosen))

    def drawn(self) -> pl.DataFrame:
        """Return the pairs that move most, and the chosen one."""
        rows = movers(self.pairs)
        return pl.concat([rows, self.chosen.filter(~pl.col("row").is_in(rows["row"].implode()))])

    def turned(self) -> pl.DataFrame:
        """Return the couples of pairs that turn round most clearly, named by their rows."""
        found = flips(self.pairs["plain"].to_numpy(), self.pairs["conditioned"].to_numpy())
        rows = self.pairs["row"].cast(pl.Int64)
        return found.with_columns(rows[found[name]].alias(name) for name in ("above", "below"))

    def few(self) -> list[int]:
        """Return the numbers of some sentences for a matrix: those of the chosen pair and of the movers."""
        if not self.texts:
            return []
        rows = pl.concat([self.chosen, self.drawn().sort(pl.col("change").abs(), "row", descending=True)])
        order = [place for pair in rows.select("first", "second").iter_rows() for place in pair]
        return sorted(list(dict.fromkeys(order))[:MOST_SENTENCES])

    def summary(self) -> str:
        """Say in a line how far the order changes and how well both orders agree with the gold score."""
        share = flipped_share(self.pairs["plain"].to_numpy(), self.pairs["conditioned"].to_numpy())
        turned = "" if np.isnan(share) else f"; {share:.0%} of all couples of pairs change their order"
        if self.agreement is None:
            return f"{self.pairs.height:,} pairs{turned}; no gold score for these pairs."
        one, two = self.agreement.to_dicts()
        return (
            f"{self.pairs.height:,} pairs{turned}; Spearman with the gold score {one['value']:.3f} plain and "
            f"{two['value']:.3f} conditioned (95 % bootstrap {two['low']:.3f} to {two['high']:.3f}; "
            f"{two['count']:,} pairs)."
        )


class Comparer:
    """Compares what a view asks for; what the last two requests share is computed once."""

    def __init__(self, session: Session) -> None:
        """Ask the models of a session."""
        self._session = session
        self._kept: tuple[Any, Any] = (None, None)
        self._known: tuple[Any, Any] = (None, None)

    @staticmethod
    def models(run: Run, pairs: str) -> list[str]:
        """Name the models that can be asked: those kept that read text, or all that the run has scored.

        Raises:
            RunError: there is none.
        """
        found = [name for name in run.models() if reads_text(run, name)]
        if pairs == "run":
            kinds = {one["name"]: one["kind"] for one in run.recipe["models"]}
            found = [name for name, kind in kinds.items() if kind not in ("cosine", "condition_only")]
        if not found:
            raise RunError(
                f"run {run.folder.name} kept no model that reads conditions as text; choose another"
            )
        return list(dict.fromkeys([*(name for name in FIRST_MODELS if name in found), *found]))

    def compared(self, state: SimilarityState, said: Callable[[str], None] | None = None) -> Compared:
        """Compute what a state shows.

        Args:
            state: names a recipe and a model.
            said: is told how far the work is.

        Raises:
            WorkbenchError: a condition, pairs or a run that cannot be used.
        """
        run = self._session.run(state.recipe, "hyper_cl")
        key = state.model_copy(update={"chosen": None})
        kept = self._kept  # looked at once: another request may replace it meanwhile
        if kept[0] != key:
            self._kept = kept = (key, self._pairs_of(run, state))
        found = kept[1]
        chosen = state.chosen if state.chosen in found[0]["row"] else None
        parted = None if chosen is None else self._parted(run, state, found[0], said)
        return Compared(state.model_copy(update={"chosen": chosen}), *found, parted)

    def _pairs_of(self, run: Run, state: SimilarityState) -> tuple:
        """Return the pairs, their sentences, both matrices and the agreement with the gold score."""
        if state.pairs == "run":
            changed = with_changes(scored_pairs(run, state.model))
            return changed, [], np.empty(0), np.empty(0), agreement(changed)
        attribute = state.attribute or attribute_of(state.condition)
        asked = parse_pairs(state.own) if state.pairs == "own" else bundled_pairs(attribute)
        model = self._session.model(run, state.model)
        found, before, after = compare(model, asked.with_row_index("row"), state.condition, state.strength)
        changed = with_changes(found)
        texts = list(dict.fromkeys([*asked["sentence1"], *asked["sentence2"]]))
        return changed, texts, before, after, agreement(changed)

    def _parted(
        self, run: Run, state: SimilarityState, changed: pl.DataFrame, said: Callable[[str], None] | None
    ) -> pl.DataFrame | None:
        """Rank the known conditions for the chosen pair; None where its texts or the model are not there."""
        if "sentence1" not in changed.columns or state.model not in run.models():
            return None
        if not reads_text(run, state.model):
            return None
        held = changed
        if state.pairs == "run":
            others = changed.head(MOST_OTHERS)
            held = pl.concat([others.filter(pl.col("row") != state.chosen), changed.filter(row=state.chosen)])
        row = held["row"].to_list().index(state.chosen)
        key = (run.folder, state.model, state.strength, held.select("row", "sentence1", "sentence2").rows())
        known = self._known
        if known[0] != key:
            model = self._session.model(run, state.model)
            self._known = known = (key, cosines_by_condition(model, held, state.strength, said))
        return separations(held["plain"][row], known[1], row)

"""Sentences before and after a condition: places on a map, neighbours, agreement with attributes, search.

Shape letters: N sentences, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from scipy.sparse.linalg import ArpackError, eigsh
from sklearn.cluster import KMeans
from sklearn.utils.extmath import svd_flip
from threadpoolctl import ThreadpoolController
from torch import Tensor

from workbench.conditions import normalise_condition, normalise_text
from workbench.evaluation.similarity import Measured
from workbench.model import Condition, HyperCL, Prepared
from workbench.own_texts import vectors_of, without_vectors

NEIGHBOURS = 10
RESAMPLES = 500
SHUFFLES = 20  # of the attribute, for what clusters would agree by chance
SAMPLE = 2000  # sentences that agreement is measured on, at most; evenly spaced
AXES_SAMPLE = 1000  # sentences that the map's axes are fitted on, at most
_THREADS = ThreadpoolController()  # made before any request: it walks the libraries that are loaded
_KEPT = 200_000_000  # bytes of embeddings under recent conditions


def two_axes(
    covariance: Float[np.ndarray, "D D"],
) -> tuple[Float[np.ndarray, " 2"], Float[np.ndarray, "D 2"]]:
    """Return the two largest eigenvalues of a covariance, the larger one last, and their unit vectors."""
    try:
        start = np.ones(len(covariance))  # else it would draw one, and no map would come out twice the same
        variances, axes = eigsh(covariance.astype(np.float64), k=2, which="LA", v0=start)
    except ArpackError:  # nothing varies
        variances, axes = np.linalg.eigh(covariance)
    order = variances.argsort()[-2:]
    return variances[order].astype(covariance.dtype), axes[:, order].astype(covariance.dtype)


@dataclass(frozen=True)
class Moved:
    """Sentences before and after a condition.

    Attributes:
        frame: text, the attributes, and the places x0, y0 (plain) and x1, y1 (conditioned).
        before: unit embeddings of the plain encoder.
        after: unit embeddings under the condition.
        shown: share of the variance of both that the two axes of the map hold, 0 to 1.
        asked: the condition, or two with their weights.
        strength: that was asked for.
        kept: agreement of the plain side, which no condition changes, by measure and attribute.
    """

    frame: pl.DataFrame
    before: Float[Tensor, "N D"]
    after: Float[Tensor, "N D"]
    shown: float
    asked: Condition = ""
    strength: float = 1.0
    kept: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    @cached_property
    def distance(self) -> Float[Tensor, " N"]:
        """How far each sentence moved: 1 minus the cosine of its two embeddings, 0 to 2."""
        return 1 - (self.before * self.after).sum(1)

    def neighbours(self, row: int, count: int = 5) -> pl.DataFrame:
        """Return the sentences nearest to one, before and after, with their cosines."""
        found = []
        for side, embedded in (("before", self.before), ("after", self.after)):
            cosines = embedded @ embedded[row]
            cosines[row] = -2.0
            found += self._best(side, cosines, count)
        return pl.DataFrame(found)

    def _best(self, side: str, cosines: Float[Tensor, " N"], count: int) -> list[dict[str, object]]:
        best, texts = cosines.topk(min(count, len(cosines))).indices.tolist(), self.frame["text"]
        return [
            {"side": side, "rank": rank, "row": row, "text": texts[row], "cosine": cosines[row].item()}
            for rank, row in enumerate(best, 1)
        ]

    def search(self, query: tuple[Float[Tensor, " D"], Float[Tensor, " D"]], count: int = 10) -> pl.DataFrame:
        """Return the sentences nearest to a query, before and after.

        Args:
            query: its unit embeddings by the plain encoder and under the condition.
            count: sentences for each side.
        """
        sides = zip(("before", "after"), (self.before, self.after), query, strict=True)
        return pl.DataFrame(
            [row for side, all_of, one in sides for row in self._best(side, all_of @ one, count)]
        )

    def _sides(self, attribute: str) -> tuple[np.ndarray, list[tuple[str, Float[Tensor, "M D"]]]]:
        """Return an attribute's values where there are any, and those sentences' embeddings on both sides."""
        known = np.flatnonzero(~self.frame[attribute].is_null().to_numpy())
        if len(known) > SAMPLE:
            known = known[np.linspace(0, len(known) - 1, SAMPLE).astype(int)]
        values = np.unique(self.frame[attribute].to_numpy()[known].astype(str), return_inverse=True)[1]
        rows = torch.from_numpy(known)
        return values, [("before", self.before[rows]), ("after", self.after[rows])]

    def purity(self, attribute: str) -> pl.DataFrame:
        """Return which share of each sentence's ten nearest agrees with it in an attribute.

        Sentences without the attribute are left out, as neighbours too; of more than 2,000, as many evenly
        spaced ones are used. 0 to 1, higher is better; the floor is what neighbours drawn at random would
        agree.

        Returns:
            One row for before and one for after: side, value, low, high (95 % bootstrap over sentences),
            count and floor.
        """
        values, sides = self._sides(attribute)
        floor = float(((np.bincount(values) / len(values)) ** 2).sum())

        def agreement(part: Float[Tensor, "M D"]) -> dict[str, float]:
            # By NumPy: it computes half of the products of its own transpose, and lets other threads go on.
            rows = part.numpy()
            cosines = torch.from_numpy(rows @ rows.T).fill_diagonal_(-2.0)
            near = cosines.topk(min(NEIGHBOURS, len(part) - 1)).indices.numpy()
            return {**_measured((values[near] == values[:, None]).mean(1)), "floor": floor}

        return self._both("purity", attribute, sides, agreement)

    def _both(
        self,
        what: str,
        attribute: str,
        sides: list[tuple[str, Float[Tensor, "M D"]]],
        measure: Callable[[Float[Tensor, "M D"]], dict[str, float]],
    ) -> pl.DataFrame:
        """Measure both sides, the plain one once for all conditions."""
        (before, plain), (after, conditioned) = sides
        if (what, attribute) not in self.kept:
            self.kept[what, attribute] = measure(plain)
        rows = [{"side": before, **self.kept[what, attribute]}, {"side": after, **measure(conditioned)}]
        return pl.DataFrame(rows)

    def clusters(self, attribute: str) -> pl.DataFrame:
        """Return the purity of clusters: the share of sentences that have their cluster's commonest value.

        k-means with as many clusters as the attribute has values, on the sentences of :meth:`purity`. 0 to 1,
        higher is better; the floor is the mean over shufflings of the attribute, since small clusters agree
        by chance.

        Returns:
            As :meth:`purity`.
        """
        values, sides = self._sides(attribute)
        kinds, draw = int(values.max()) + 1, np.random.default_rng(0)
        shuffled = [draw.permutation(values) for _ in range(SHUFFLES)]

        def agreement(part: Float[Tensor, "M D"]) -> dict[str, float]:
            with _THREADS.limit(limits=1):
                cluster = KMeans(kinds, n_init=3, random_state=0).fit_predict(part.numpy())
            floor = float(np.mean([_common(cluster, one).mean() for one in shuffled]))
            return {**_measured(_common(cluster, values)), "floor": floor}

        return self._both("clusters", attribute, sides, agreement)


def _common(cluster: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Tell which sentences have the commonest value of their cluster; ties go to the first value."""
    counts = np.zeros((cluster.max() + 1, values.max() + 1), int)
    np.add.at(counts, (cluster, values), 1)
    return (values == counts.argmax(1)[cluster]).astype(float)


@lru_cache(maxsize=4)  # 4 MB each at most: drawing takes longer than averaging
def _drawn(count: int) -> Float[np.ndarray, "R M"]:
    """Return how often each bootstrap resample holds each of some sentences, as a share of them all."""
    draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    held = [np.bincount(one, minlength=count) for one in draws]
    return np.stack(held).astype(np.float32) / count


def _measured(agree: np.ndarray) -> dict[str, float]:
    """Return a mean over sentences with its 95 % bootstrap interval."""
    low, high = Measured.interval(_drawn(len(agree)) @ agree.astype(np.float32))
    return {"value": float(agree.mean()), "low": low, "high": high, "count": len(agree)}


class ConditionedTexts:
    """Sentences with attributes, and a model to move them; safe to share by threads."""

    def __init__(
        self, model: HyperCL, frame: pl.DataFrame, told: Callable[[int], None] = lambda _: None
    ) -> None:
        """Encode sentences.

        Args:
            model: a trained model.
            frame: a column text, all others are attributes.
            told: called with the number of sentences done, now and then; what it raises ends the work.

        Raises:
            DataError: an unusable text, or vectors that the model cannot read.
        """
        self.model, vectors = model, vectors_of(frame)
        self.frame = without_vectors(frame.rename({"sentence": "text"}, strict=False))
        if vectors is None:
            self.prepared: Prepared = model.prepare(self.frame["text"].to_list(), told)
        else:
            self.prepared = model.prepared_vectors(vectors)
        kept = max(3, _KEPT // max(1, self.frame.height * 1536))
        self._encode = lru_cache(maxsize=min(16, kept))(self._encode_now)
        self._axes = lru_cache(maxsize=16)(self._axes_now)
        self._kept: dict[tuple[str, str], dict[str, float]] = {}

    @cached_property
    def attributes(self) -> list[str]:
        """Columns that take few values."""
        columns = [name for name in self.frame.columns if name not in ("text", "id", "split", "entity")]
        return [name for name in columns if 1 < self.frame[name].drop_nulls().n_unique() <= 20]

    @cached_property
    def _plain(self) -> Float[Tensor, "N D"]:
        """Unit embeddings of the plain encoder: at strength 0 no condition is read."""
        return self.model.encode(self.prepared, "any", 0.0)

    def _encode_now(self, asked: tuple[tuple[str, float], ...], strength: float) -> Float[Tensor, "N D"]:
        return self.model.encode(self.prepared, _condition(asked), strength)

    def _axes_now(
        self, asked: tuple[str, ...]
    ) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D 2"], float]:
        """Fit the map's axes on the plain sentences and on those under each condition at strength 1.

        Returns:
            The middle, the two principal axes, and the share of the variance that they hold.
        """
        sides = [self._plain, *(self._encode(((text, 1.0),), 1.0) for text in asked)]
        some = np.linspace(0, len(sides[0]) - 1, min(AXES_SAMPLE, len(sides[0]))).astype(int)
        # A condition moves all sentences alike as well; each side is drawn about its own middle.
        rows = torch.cat([(side - side.mean(0))[some] for side in sides])
        covariance = torch.cov(rows.T).numpy()
        variances, axes = two_axes(covariance)
        signed = svd_flip(None, axes[:, ::-1].T, u_based_decision=False)[1].T
        return rows.mean(0).numpy(), signed, float(variances.sum() / covariance.trace())

    def move(self, condition: str, other: str = "", blend: float = 0.0, strength: float = 1.0) -> Moved:
        """Embed all sentences plain and under a condition, or between two.

        The map's axes are fitted on the plain sentences and on those under either condition at strength 1,
        each about its own mean, so that neither slider turns the map; of more than 1,000 sentences, on as
        many evenly spaced ones.

        Args:
            condition: what to look at.
            other: a second condition, or empty.
            blend: 0 is the first, 1 the second.
            strength: 0 is the plain encoder, 1 the model.

        Raises:
            DataError: a condition that cannot be used.
        """
        asked = [normalise_condition(condition), *([normalise_condition(other)] if other.strip() else [])]
        mixed: tuple[tuple[str, float], ...] = ((asked[0], 1.0),)
        if len(asked) == 2 and blend and asked[0] != asked[1]:
            mixed = ((asked[0], 1 - blend), (asked[1], blend))
        before, after = self._plain, self._encode(mixed, strength)
        middle, axes, shown = self._axes(tuple(asked))
        sides = [one.numpy() for one in (before, after)]
        places = np.hstack([one @ axes - (one.mean(0) + middle) @ axes for one in sides])
        names = ("x0", "y0", "x1", "y1")
        columns = [pl.Series(name, column) for name, column in zip(names, places.T, strict=True)]
        frame = self.frame.with_columns(columns)
        return Moved(frame, before, after, shown, _condition(mixed), strength, self._kept)

    def search(self, moved: Moved, query: str, count: int = 10) -> pl.DataFrame:
        """Find the sentences most alike to a query, plain and under the condition of a move.

        Returns:
            side, rank, row, text and cosine, best first, before and after.

        Raises:
            DataError: an unusable query.
        """
        text = normalise_text(query, "the query")
        sides = [self.model.encode([text], moved.asked, strength)[0] for strength in (0.0, moved.strength)]
        return moved.search((sides[0], sides[1]), count)


def _condition(asked: tuple[tuple[str, float], ...]) -> Condition:
    """Return a condition as a model takes it."""
    return asked[0][0] if len(asked) == 1 else dict(asked)

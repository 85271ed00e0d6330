"""Linear probes: what can be read off embeddings by a linear map, beside what the probe could learn by heart.

Shape letters: N rows, D embedding width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import polars as pl
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from workbench.errors import DataError

Labels = Sequence[str] | Sequence[int]


@dataclass(frozen=True)
class Probe:
    """What a probe reached on rows it was not trained on.

    Attributes:
        accuracy: mean over folds; 0 to 1, ideal 1 if the attribute should be there.
        deviation: standard deviation of the folds' accuracies.
        control: accuracy of the same probe on the control task: what it can learn by heart.
        chance: share of the most frequent label.
        count: rows N.
    """

    accuracy: float
    deviation: float
    control: float
    chance: float
    count: int

    @property
    def selectivity(self) -> float:
        """Accuracy less that of the control task; -1 to 1, high if embeddings and not memory give it."""
        return self.accuracy - self.control

    def to_dict(self) -> dict[str, float | int]:
        """Return the numbers as JSON types."""
        return {**asdict(self), "selectivity": self.selectivity}


def control_labels(labels: Labels, types: Labels, rng: np.random.Generator) -> list[str] | list[int]:
    """Deal labels to types at random: a task that nothing but memory of the types solves.

    Args:
        labels: of the rows.
        types: rows of one type get one label, for example all texts about one entity. With a type per row
            the labels are shuffled.
        rng: of the draw.

    Source: Hewitt and Liang (2019), arXiv 1909.03368 (control tasks). Deviation: the types' own labels are
    dealt anew, not drawn, so that each occurs as often as before.
    """
    own: dict[str | int, str | int] = {}
    for kind, label in zip(types, labels, strict=True):
        own.setdefault(kind, label)
    dealt = dict(zip(own, (list(own.values())[place] for place in rng.permutation(len(own))), strict=True))
    return [dealt[kind] for kind in types]


def probe(
    embeddings: Float[Tensor, "N D"],
    labels: Labels,
    *,
    types: Labels | None = None,
    folds: int = 5,
    strength: float = 1.0,
    seed: int = 0,
) -> Probe:
    """Train and test a linear probe by cross-validation, and the same probe on a control task.

    A logistic regression on standardised features: p(k | x) = softmax_k(w_k . (x - m) / s + b_k), with mean m
    and deviation s of the training folds.

    Args:
        embeddings: one row per item.
        labels: two or more different ones, each on at least as many rows as there are folds.
        types: see :func:`control_labels`; every row by itself if not given. Rows of one type fall into
            different folds, so that what is learned by heart counts.
        folds: at least 2.
        strength: inverse of the penalty on the probe's weights, above 0; lower leaves less to memory.
        seed: of folds and control labels.

    Raises:
        DataError: not one label per row, one label only, or a label on fewer rows than folds.

    Source: Conneau and Kiela (2018), SentEval, arXiv 1803.05449; Hewitt and Liang (2019), arXiv
    1909.03368 (selectivity).
    """
    kinds, counts = np.unique(np.asarray(labels), return_counts=True)
    rarest = min(counts, default=0)
    if len(labels) != len(embeddings) or len(kinds) < 2 or rarest < folds:
        raise DataError(
            f"a probe in {folds} folds needs {len(embeddings)} labels of two or more kinds, each at least "
            f"{folds} times; got {len(labels)} of {len(kinds)} kinds, the rarest {rarest} times"
        )
    probing = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    rows = embeddings.double().numpy()
    own = StratifiedKFold(folds, shuffle=True, random_state=seed)
    scores = cross_val_score(probing, rows, np.asarray(labels), cv=own)
    dealt = control_labels(
        labels, range(len(labels)) if types is None else types, np.random.default_rng(seed)
    )
    if len(set(dealt)) < 2:
        raise DataError("the control task has one label only, since the first row of each type has the same")
    # Not stratified: a label that is dealt to one small type may stand on fewer rows than folds.
    free = KFold(folds, shuffle=True, random_state=seed)
    control = cross_val_score(probing, rows, np.asarray(dealt), cv=free)
    return Probe(
        float(scores.mean()),
        float(scores.std()),
        float(control.mean()),
        float(counts.max() / len(labels)),
        len(labels),
    )


def probe_conditions(
    plain: Float[Tensor, "N D"],
    conditioned: Mapping[str, Float[Tensor, "N D"]],
    attributes: Mapping[str, Labels],
    *,
    folds: int = 5,
    seed: int = 0,
) -> pl.DataFrame:
    """Probe embeddings under each condition for each attribute.

    Conditioning does what it says if the attribute that the condition names goes up against the plain
    embeddings and the others go down.

    Args:
        plain: of N items, without a condition.
        conditioned: the same items' embeddings under each condition.
        attributes: the items' labels, by attribute.
        folds: of every probe.
        seed: of folds and control labels, the same for all probes.

    Returns:
        One row per condition (null for plain) and attribute: condition, attribute, the fields of
        :class:`Probe`, selectivity, and change (accuracy less that of the plain embeddings, -1 to 1).
    """
    found = []
    for attribute, labels in attributes.items():
        base = probe(plain, labels, folds=folds, seed=seed)
        found.append({"condition": None, "attribute": attribute, **base.to_dict(), "change": 0.0})
        for condition, embeddings in conditioned.items():
            own = probe(embeddings, labels, folds=folds, seed=seed)
            change = own.accuracy - base.accuracy
            found.append({"condition": condition, "attribute": attribute, **own.to_dict(), "change": change})
    return pl.DataFrame(found, schema_overrides={"condition": pl.String})

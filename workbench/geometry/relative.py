"""Relative representations: a row as its cosines to anchors that every space knows.

Two encoders trained apart place the same items differently, but keep angles: what is said in angles to shared
items can be read by a head that was trained on another encoder. It is the answer to connecting N encoders
with M others that needs no training.

Shape letters: N rows, A anchors, D and E widths, S spaces.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from workbench.encoders import check_finite
from workbench.errors import DataError
from workbench.geometry.closed_form import ridge
from workbench.geometry.whitening import moments_of


def relative(rows: Float[Tensor, "N D"], anchors: Float[Tensor, "A D"]) -> Float[Tensor, "N A"]:
    """Return each row's cosines to anchors, both about the anchors' mean; -1 to 1.

    Turning, shifting and stretching a space as a whole change nothing.

    Args:
        rows: in any space.
        anchors: embeddings in that space of items that are the same for all spaces; well over a hundred.

    Raises:
        DataError: fewer than two anchors, anchors that are all equal, or NaN or infinity in a row or anchor.

    Source: Moschella et al. (2023), arXiv 2209.15430. Deviation: about the mean of the anchors, without
    which what all rows share decides the cosines.
    """
    for given, what in ((rows, "embedding"), (anchors, "anchor")):
        check_finite(given, what, zeros=True)
    centre = anchors.mean(0)
    if len(anchors) < 2 or not (anchors - centre).any():
        raise DataError(f"{len(anchors)} anchors show no direction; give at least 2 that differ")
    return functional.normalize(rows - centre, dim=1) @ functional.normalize(anchors - centre, dim=1).T


def mapped(
    rows: Float[Tensor, "N D"], anchors: Float[Tensor, "A D"], targets: Float[Tensor, "A E"]
) -> Float[Tensor, "N E"]:
    """Bring rows to another space by the ridge regression of anchors there on anchors here.

    Args:
        rows: in the space of ``anchors``.
        anchors: embeddings of items that both spaces know.
        targets: the same items in the other space.

    Returns:
        Where the rows lie in the other space, not normalised; ideal what its own encoder gives of them.

    Raises:
        DataError: a row, an anchor or a target holds NaN or infinity.

    Source: Moayeri et al. (2023), Text-to-concept (and back) via cross-model alignment, arXiv 2305.06386.
    Deviation: a ridge and not plain least squares.
    """
    check_finite(rows, "embedding", zeros=True)
    here, there = moments_of(anchors), moments_of(targets)
    cross = (anchors.double() - here.mean).T @ (targets.double() - there.mean) / len(anchors)
    # About a mean of zero: a map for rankings leaves the mean's direction out, a head may read it.
    centred = replace(there, mean=torch.zeros_like(there.mean))
    return ridge(here, centred, cross)(rows.float()) + there.mean.float()


@dataclass(frozen=True)
class Space:
    """One encoder's embeddings of the same items as all others'.

    Attributes:
        train: of the labelled items that heads are trained on.
        test: of the items that they are tried on.
    """

    train: Float[Tensor, "N D"]
    test: Float[Tensor, "M D"]


def stitching(
    spaces: Mapping[str, Space],
    labels: tuple[Int[np.ndarray, " N"], Int[np.ndarray, " M"]],
    anchors: Int[Tensor, " A"],
) -> pl.DataFrame:
    """Try each space's head on every space: as it is, by relative representations, and through a linear map.

    Heads are logistic regressions, trained after the encoders. A head that sees
    absolute features of another space is the control: it needs equal widths. The map is least squares from
    the other space's anchors to the head's own (text-to-concept), one for each pair of spaces.

    Args:
        spaces: by name.
        labels: of the train and of the test items.
        anchors: which train items are anchors; without their labels.

    Returns:
        One row per kind ("absolute", "relative" or "mapped"), head's space and encoder's space: kind, head,
        encoder, accuracy (0 to 1, ideal 1; null where absolute widths differ).

    Source: Moschella et al. (2023), arXiv 2209.15430; Moayeri et al. (2023), Text-to-concept (and back) via
    cross-model alignment (the map).
    """
    found = []
    views = {
        "absolute": spaces,
        "relative": {
            name: Space(*(relative(rows, space.train[anchors]) for rows in (space.train, space.test)))
            for name, space in spaces.items()
        },
    }
    for kind, view in views.items():
        for head, own in view.items():
            # Not standardised: small cosines scaled up are where spaces differ.
            trained = LogisticRegression(max_iter=5000).fit(own.train.numpy(), labels[0])
            for name, other in view.items():
                seen = {kind: other.test}
                if kind == "absolute":
                    seen["mapped"] = mapped(other.test, other.train[anchors], own.train[anchors])
                for way, rows in seen.items():
                    fits = rows.shape[1] == own.train.shape[1]
                    accuracy = float(trained.score(rows.numpy(), labels[1])) if fits else None
                    found.append({"kind": way, "head": head, "encoder": name, "accuracy": accuracy})
    return pl.DataFrame(found, schema_overrides={"accuracy": pl.Float64})

"""What the dashboards ask for: finished runs, sentences under a condition, numbers with intervals. No Panel.

A session belongs to one server process and holds only what nobody changes: finished runs and trained models.
What a person types lives in the view that asked.

Shape letters: N sentences, D width, A attributes.
"""

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor

from workbench.conditions import normalise_condition
from workbench.datasets.bundled import sentences
from workbench.errors import RunError
from workbench.evaluation.similarity import Measured
from workbench.model import Condition, HyperCL
from workbench.runs import Run, finished_runs

NEIGHBOURS = 10
RESAMPLES = 500
FIRST_MODELS = ("hyper_query_k32", "hyper_query", "hyper_k64")
FIRST = ("hyper_cl_bundled", "hyper_clip_scenes", "hyper_align_scenes")  # shown unless a run is asked for


class Session:
    """Finished runs of an output folder, and the models they kept, each loaded once."""

    def __init__(self, out: Path | str = "reports") -> None:
        """Look for runs.

        Args:
            out: output folder of the runs.
        """
        self.out = Path(out)
        self._lock = threading.Lock()
        self._models: dict[tuple[Path, str], HyperCL] = {}

    def runs(self, *papers: str) -> dict[str, Run]:
        """Return the newest finished run of every recipe of some papers, by recipe name."""
        return {run.recipe["name"]: run for run in finished_runs(self.out) if run.recipe["paper"] in papers}

    def run(self, recipe: str, *papers: str) -> Run:
        """Return the newest finished run of a recipe; a first choice if the name is empty.

        Raises:
            RunError: there is none; the message says how to make one.
        """
        found = self.runs(*papers)
        if not found:
            raise RunError(
                f"nothing trained yet under {self.out}; start with: workbench reproduce --out {self.out}"
            )
        if recipe and recipe not in found:
            raise RunError(f"no finished run of {recipe!r} here; there are: {', '.join(found)}")
        return found[recipe or next((name for name in FIRST if name in found), next(reversed(found)))]

    def texts_of(self, recipe: str, model: str) -> "ConditionedTexts":
        """Return the bundled sentences under a trained model of a run.

        Raises:
            RunError: no such run, or it kept no model of that name.
        """
        run = self.run(recipe, "hyper_cl")
        names = [name for name in run.models() if _reads_text(run, name)]
        chosen = model or next((name for name in FIRST_MODELS if name in names), next(iter(names), ""))
        with self._lock:  # two browsers that ask at once load a model once
            key = (run.folder, chosen)
            if key not in self._models:
                self._models[key] = run.model(chosen)
        return ConditionedTexts(self._models[key], sentences())


def _reads_text(run: Run, model: str) -> bool:
    """Tell whether a model knows conditions by text and not by number."""
    settings = next(one for one in run.recipe["models"] if one["name"] == model)
    return settings.get("condition", "text") == "text"


@dataclass(frozen=True)
class Moved:
    """Sentences before and after a condition.

    Attributes:
        frame: text, the attributes, and the places x0, y0 (plain) and x1, y1 (conditioned).
        before: unit embeddings of the plain encoder.
        after: unit embeddings under the condition.
        shown: share of the variance of both that the two axes of the map hold, 0 to 1.
    """

    frame: pl.DataFrame
    before: Float[Tensor, "N D"]
    after: Float[Tensor, "N D"]
    shown: float

    def neighbours(self, row: int, count: int = 5) -> pl.DataFrame:
        """Return the sentences nearest to one, before and after, with their cosines."""
        found = []
        for side, embedded in (("before", self.before), ("after", self.after)):
            cosines = embedded @ embedded[row]
            cosines[row] = -2.0
            for rank, other in enumerate(cosines.topk(count).indices.tolist(), 1):
                text = self.frame["text"][other]
                found.append({"side": side, "rank": rank, "text": text, "cosine": float(cosines[other])})
        return pl.DataFrame(found)

    def purity(self, attribute: str) -> pl.DataFrame:
        """Return which share of each sentence's ten nearest agrees with it in an attribute.

        Sentences without the attribute are left out, as neighbours too. 0 to 1, higher is better; the floor
        is what neighbours drawn at random would agree.

        Returns:
            One row for before and one for after: side, value, low, high (95 % bootstrap over sentences),
            count and floor.
        """
        values = self.frame[attribute].to_numpy()
        known = np.flatnonzero(~self.frame[attribute].is_null().to_numpy())
        shares = np.unique(values[known].astype(str), return_counts=True)[1] / len(known)
        rows = []
        for side, embedded in (("before", self.before), ("after", self.after)):
            part = embedded[torch.from_numpy(known)]
            cosines = (part @ part.T).fill_diagonal_(-2.0)
            near = cosines.topk(min(NEIGHBOURS, len(known) - 1)).indices.numpy()
            agree = (values[known][near] == values[known][:, None]).mean(1)
            drawn = np.random.default_rng(0).choice(agree, (RESAMPLES, len(agree))).mean(1)
            low, high = Measured.interval(drawn)
            rows.append({"side": side, "value": float(agree.mean()), "low": low, "high": high,
                         "count": len(known), "floor": float((shares**2).sum())})  # fmt: skip
        return pl.DataFrame(rows)


class ConditionedTexts:
    """Sentences with attributes, and a model to move them."""

    def __init__(self, model: HyperCL, frame: pl.DataFrame) -> None:
        """Join a trained model and sentences.

        Args:
            model: a trained model.
            frame: a column text, all others are attributes.
        """
        self.model, self.frame = model, frame.rename({"sentence": "text"}, strict=False)

    @cached_property
    def attributes(self) -> list[str]:
        """Columns that take few values."""
        columns = [name for name in self.frame.columns if name not in ("text", "id", "split", "entity")]
        return [name for name in columns if 1 < self.frame[name].drop_nulls().n_unique() <= 20]

    def move(self, condition: str, other: str = "", blend: float = 0.0, strength: float = 1.0) -> Moved:
        """Embed all sentences plain and under a condition, or between two.

        The map's axes are fitted on the plain sentences and on those under either condition at strength 1,
        each about its own mean, so that neither slider turns the map.

        Args:
            condition: what to look at.
            other: a second condition, or empty.
            blend: 0 is the first, 1 the second.
            strength: 0 is the plain encoder, 1 the model.

        Raises:
            DataError: a condition that cannot be used.
        """
        texts = self.frame["text"].to_list()
        asked = [normalise_condition(condition), *([normalise_condition(other)] if other.strip() else [])]
        mixed: Condition = asked[0]
        if len(asked) == 2 and blend:
            mixed = {asked[0]: 1 - blend, asked[1]: blend} if asked[0] != asked[1] else asked[0]
        before = self.model.encode(texts, asked[0], 0.0)
        after = self.model.encode(texts, mixed, strength)
        # A condition moves all sentences alike as well; each side is drawn about its own middle.
        sides = [before, *(self.model.encode(texts, one) for one in asked)]
        axes = PCA(2, random_state=0).fit(torch.cat([one - one.mean(0) for one in sides]).numpy())
        places = np.hstack([axes.transform((one - one.mean(0)).numpy()) for one in (before, after)])
        columns = [
            pl.Series(name, column) for name, column in zip(("x0", "y0", "x1", "y1"), places.T, strict=True)
        ]
        return Moved(
            self.frame.with_columns(columns), before, after, float(axes.explained_variance_ratio_.sum())
        )

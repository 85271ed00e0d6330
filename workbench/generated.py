"""What the models of a finished run generated, for looking at: matrices, spectra, distances, what is kept.

Three kinds of runs generate, or keep, weights: Hyper-CL from a condition's text (on graphs, a relation's),
HyperCLIP from class names, Hyper-Align a connector for every pair of encoders. What a person types stands
beside what is known: the conditions of the bundled or public data, a graph's relations, the class sets of
its data, the encoders of a zoo.

Shape letters: G things compared, A width in, B width out, R directions.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.conditions import normalise_condition
from workbench.datasets.bundled import attributes, sentences
from workbench.datasets.class_sets import PLAIN_TEMPLATES, ClassSet, check_classes
from workbench.datasets.graphs import SPLITS, Graph
from workbench.datasets.photos import asked_classes
from workbench.datasets.scenes import ATTRIBUTES
from workbench.datasets.shards import asked_of
from workbench.errors import ManifestError, RunError
from workbench.geometry.matrices import (
    between_share,
    kept_directions,
    leading,
    singular_values,
    subspace_distances,
)
from workbench.geometry.rank import spectrum_rank
from workbench.hypernetworks import GeneratedWeights
from workbench.inspection import generate_for, layer_changes
from workbench.link_prediction import LinkPredictor
from workbench.manifests import verified_folder
from workbench.model import HyperCL
from workbench.pair_changes import known_conditions
from workbench.runs import Run
from workbench.session import FIRST_MODELS, Session, reads_text
from workbench.view_state import WeightsState
from workbench.weight_distances import MAIN_DIRECTIONS, distances_of, measures_of, scale_of_angles

PAPERS = ("hyper_cl", "hyper_cl_kg", "hyper_clip", "hyper_align")
EXAMPLES = {"hyper_cl": "The colour.", "hyper_cl_kg": "is a kind of", "hyper_clip": "cat, dog, bird"}
MOST_KNOWN = 40  # conditions of a public set, or relations


@dataclass(frozen=True)
class Inspected:
    """What a run's model generated, ready to be drawn.

    Attributes:
        names: of what the weights belong to; what a person typed stands first.
        typed: how many of the names were typed.
        slots: what can be asked for: the generated tensors, or a zoo's text encoders.
        slot: what was asked for.
        shown: whose matrix it is.
        matrix: as it acts, or what it differs in from the mean of the known ones; None for class sets.
        spectra: singular values by name, of matrices as they act; empty for vectors and class sets.
        distances: between all names, 0 on the diagonal.
        distance: what they are, with the range.
        measures: that can be asked for, see :mod:`workbench.weight_distances`.
        measure: that was.
        tables: all numbers, by what they are; those shown in figures and more.
    """

    names: list[str]
    typed: int
    slots: list[str]
    slot: str
    shown: str
    matrix: Float[Tensor, "A B"] | None
    spectra: dict[str, Float[np.ndarray, " R"]]
    distances: Float[np.ndarray, "G G"]
    distance: str
    measures: list[str]
    measure: str
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)

    def nearest(self) -> pl.DataFrame:
        """Return all names by their distance to the shown one, the nearest first: name, known, distance."""
        row = self.names.index(self.shown)
        known = [place >= self.typed for place in range(len(self.names))]
        table = pl.DataFrame({"name": self.names, "known": known, "distance": self.distances[row].tolist()})
        return table.filter(pl.col("name") != self.shown).sort("distance", "name")


def inspectable(session: Session) -> dict[str, Run]:
    """Return the newest finished runs that kept a model whose weights can be looked at, by recipe."""
    return {name: run for name, run in session.runs(*PAPERS).items() if generating(run)}


def generating(run: Run) -> list[str]:
    """Name the kept models whose weights can be looked at, the ones to show first in front."""
    about = {one["name"]: one for one in run.recipe["models"]}
    found = [name for name in run.models() if _generates(run, about[name])]
    first = [name for name in (*FIRST_MODELS, "search", "hyperclip_replace") if name in found]
    return list(dict.fromkeys([*first, *found]))


def _generates(run: Run, one: dict[str, Any]) -> bool:
    """Tell whether a model's settings say that it generates weights from text, or keeps connectors."""
    paper = run.recipe["paper"]
    if paper == "hyper_align":
        return True
    if paper == "hyper_clip":
        return one["kind"] in ("hyper", "token_control")
    return (one["kind"] == "hyper" or one.get("pooling") == "condition") and reads_text(run, one["name"])


def inspect(session: Session, state: WeightsState) -> Inspected:
    """Generate what a state asks for, and measure it.

    Args:
        session: finished runs and models.
        state: names a recipe and a model of :func:`generating`.

    Raises:
        WorkbenchError: a condition, class names or a run that cannot be used.
    """
    run = session.run(state.recipe, *PAPERS)
    paper = run.recipe["paper"]
    if state.model not in generating(run):
        raise RunError(
            f"run {run.folder.name} kept no model {state.model!r} that generates weights from text; it has: "
            f"{', '.join(generating(run)) or 'none'}"
        )
    if paper == "hyper_align":
        controls = run.scores.filter("control")["image"].unique().to_list()
        return _connectors(session.model(run, state.model).maps, state, controls)
    if paper == "hyper_clip":
        return _class_sets(session.model(run, state.model), class_sets_of(run), state)
    if paper == "hyper_cl_kg":
        model = session.model(run, state.model, predictor_of_relations)
        return _conditions(model, model.graph.relations[:MOST_KNOWN], state, EXAMPLES[paper])
    return _conditions(session.model(run, state.model), conditions_of(run), state, EXAMPLES[paper])


# --- conditions ---------------------------------------------------------------------------------------------


def conditions_of(run: Run) -> list[str]:
    """Return conditions to hold a typed one against: a public set's own, else those of the bundled set."""
    data = run.recipe["data"]
    if data["source"] != "manifest":
        return known_conditions()["condition"].to_list()
    table = pl.read_parquet(verified_folder(data["name"]) / "train.parquet", columns=["condition"])
    return table["condition"].unique().sort().to_list()[:MOST_KNOWN]


def predictor_of_relations(run: Run, name: str) -> LinkPredictor:
    """Open a graph model without its graph: weights follow from relations, so no entity is embedded.

    Raises:
        RunError: the run kept no such model.
    """
    folder = run.folder / "models" / name
    try:
        relations = json.loads((folder / "head.json").read_text("utf-8"))["relations"]
    except (OSError, ValueError, KeyError) as problem:
        raise RunError(f"{folder} holds no usable graph head: {problem}. Train it again") from problem
    none = torch.empty(0, 3, dtype=torch.long)
    return LinkPredictor.load(folder, Graph(["an entity"], relations, dict.fromkeys(SPLITS, none)))


def _conditions(
    model: HyperCL | LinkPredictor, known: list[str], state: WeightsState, example: str
) -> Inspected:
    """Inspect the weights of a typed condition, perhaps a second one, and the known ones."""
    typed = [normalise_condition(example if state.condition is None else state.condition)]
    typed += [normalise_condition(state.other)] if state.other.strip() else []
    names = list(dict.fromkeys([*typed, *known]))
    typed = list(dict.fromkeys(typed))
    weights = model.weights(names)
    slots = [slot.name for slot in weights.spec.slots]
    # The slot with the most numbers says most; a query or a gate of one number comes after it.
    slots.sort(key=lambda name: -np.prod(weights.slot(name).shape))
    slot = state.slot if state.slot in slots else slots[0]
    shown = state.shown if state.shown in names else typed[0]
    matrix = weights.matrix(slot, names.index(shown))
    spectra = {}
    if weights.slot(slot).mode != "vector":
        spectra = {
            name: singular_values(weights.matrix(slot, names.index(name)))
            for name in dict.fromkeys([shown, *typed])
        }
    measures, measure, distances, told = _compared(weights, [slot], state)
    tables = {"conditions": _by_name(names, typed, weights.norms(slot).numpy(), distances, shown, spectra)}
    if isinstance(model, HyperCL):
        texts = sentences()
        if spectra:
            rows = model.scaled(model.store.embed(texts["sentence"].to_list()))
            tables["directions"] = kept_directions(rows, matrix)
        tables["attributes"] = attribute_shares(model, texts, shown)
    if state.minus_mean:
        places = [names.index(name) for name in known]
        matrix = matrix - sum(weights.matrix(slot, place) for place in places) / len(places)
    tables |= _numbers(names, distances, matrix, spectra)
    return Inspected(
        names, len(typed), slots, slot, shown, matrix, spectra, distances, told, measures, measure, tables
    )


def _compared(
    weights: GeneratedWeights, slots: list[str], state: WeightsState
) -> tuple[list[str], str, Float[np.ndarray, "G G"], str]:
    """Return the measures of distance that there are, the one to use, and its values with what they are."""
    measures = measures_of(weights, slots)
    measure = state.measure if state.measure in measures else measures[0]
    distances, told = distances_of(weights, slots, measure)
    return measures, measure, distances.numpy(), told


def attribute_shares(model: HyperCL, texts: pl.DataFrame, condition: str) -> pl.DataFrame:
    """Say which attributes of sentences a condition keeps: their share of the variance, before and after.

    Each attribute is measured on the sentences that have it, see
    :func:`workbench.geometry.matrices.between_share`.

    Args:
        model: a trained one.
        texts: sentence, and columns named as attributes.
        condition: what to look at.

    Returns:
        attribute, before and after (0 to 1: how much of what sentences differ in is this attribute), floor
        (of groups dealt at random) and count; what gains most first.
    """
    every = texts["sentence"].to_list()
    before, after = (model.encode(every, condition, strength) for strength in (0.0, 1.0))
    rows: list[dict[str, Any]] = []
    for name in (name for name in attributes() if name in texts.columns):
        told = texts.with_row_index("row").drop_nulls(name)
        groups, places = told[name].to_list(), told["row"].to_list()
        if len(set(groups)) > 1:
            shares = [between_share(side[places], groups) for side in (before, after)]
            floor = (len(set(groups)) - 1) / (len(groups) - 1)
            rows.append({"attribute": name, "before": shares[0], "after": shares[1], "floor": floor,
                         "count": len(groups)})  # fmt: skip
    return pl.DataFrame(rows).sort(pl.col("after") - pl.col("before"), descending=True)


# --- class sets ---------------------------------------------------------------------------------------------


def typed_classes(text: str) -> list[str]:
    """Read class names that a person wrote, with commas or line ends between.

    Raises:
        DataError: fewer than two, one named twice, or a name that cannot be used.
    """
    names = [part.strip() for part in text.replace("\n", ",").split(",")]
    return check_classes([name for name in names if name])


def class_sets_of(run: Run) -> list[ClassSet]:
    """Return class sets to hold a typed one against: those that the run's data ask.

    Where these are not to be had (pictures of one's own, or a set that is not on this machine), the scenes'.
    """
    data = run.recipe["data"]
    known = {f"{name} of scenes": (list(values), PLAIN_TEMPLATES) for name, values in ATTRIBUTES.items()}
    if data["source"] in ("photos", "shards"):
        with suppress(ManifestError):
            known = asked_classes(asked_of(data))
    return [_unasked(name, *asked) for name, asked in known.items()]


def _unasked(name: str, names: list[str], templates: tuple[str, ...] = PLAIN_TEMPLATES) -> ClassSet:
    """Return a class set without pictures: weights follow from the words alone."""
    none = torch.empty(0, dtype=torch.long)
    return ClassSet(name, names, templates, none, none)


def _class_sets(model: Any, known: list[ClassSet], state: WeightsState) -> Inspected:
    """Inspect the weights of typed class names, perhaps a second set, and the known class sets."""
    asked = [EXAMPLES["hyper_clip"] if state.condition is None else state.condition]
    asked += [state.other] if state.other.strip() else []
    typed = {", ".join(names): names for names in map(typed_classes, asked)}
    sets = {name: _unasked(name, names) for name, names in typed.items()}
    sets |= {one.name: one for one in known if one.name not in typed}
    with model.lock:
        weights = generate_for(model, list(sets.values()))
    names, slots = list(sets), [slot.name for slot in weights.spec.slots]
    measures, measure, distances, told = _compared(weights, slots, state)
    norms = sum(weights.norms(slot).numpy() ** 2 for slot in slots) ** 0.5
    shown = state.shown if state.shown in names else names[0]
    tables = {"layers": layer_changes(weights, names),
              "class sets": _by_name(names, list(typed), norms, distances, shown, {}),
              **_numbers(names, distances, None, {})}  # fmt: skip
    every = "all norms"
    return Inspected(
        names, len(typed), [every], every, shown, None, {}, distances, told, measures, measure, tables
    )


# --- connectors ---------------------------------------------------------------------------------------------


def _connectors(maps: dict[tuple[str, str], Any], state: WeightsState, controls: list[str]) -> Inspected:
    """Inspect the connectors from one text encoder, and which image encoders read the same directions.

    Controls stand last: what is shown unless somebody chooses is the connector of a real encoder.
    """
    texts = list(dict.fromkeys(text for text, _ in maps))
    slot = state.slot if state.slot in texts else texts[0]
    weights = {image: one.weight for (text, image), one in maps.items() if text == slot}
    weights = dict(sorted(weights.items(), key=lambda one: one[0] in controls))
    names = list(weights)
    shown = state.shown if state.shown in names else names[0]
    kept = min(MAIN_DIRECTIONS, *(min(matrix.shape) for matrix in weights.values()))
    bases = torch.stack([leading(matrix, kept) for matrix in weights.values()])
    distances = subspace_distances(bases).numpy()
    every = {name: singular_values(matrix) for name, matrix in weights.items()}
    norms = np.array([np.sqrt((values**2).sum()) for values in every.values()])
    table = _by_name(names, [], norms, distances, shown, every).with_columns(
        width=pl.Series([matrix.shape[1] for matrix in weights.values()]),
        overlap=1 - pl.col("distance") ** 2,
    )
    spectra = {shown: every[shown]}
    tables = {"image encoders": table, **_numbers(names, distances, weights[shown], spectra)}
    told = scale_of_angles(*bases.shape[1:])
    return Inspected(
        names, 0, texts, slot, shown, weights[shown], spectra, distances, told, ["angles"], "angles", tables
    )


# --- tables -------------------------------------------------------------------------------------------------


def _by_name(
    names: list[str], typed: list[str], norms: np.ndarray, distances: np.ndarray, shown: str,
    spectra: dict[str, np.ndarray],
) -> pl.DataFrame:  # fmt: skip
    """Lay norms and distances to the shown one out as a table; effective ranks where spectra are known."""
    ranks = [spectrum_rank(spectra[name]) if name in spectra else None for name in names]
    return pl.DataFrame(
        {"name": names, "typed": [name in typed for name in names], "norm": norms.tolist(),
         "distance": distances[names.index(shown)].tolist(), "effective_rank": ranks},
        schema_overrides={"effective_rank": pl.Float64},
    )  # fmt: skip


def _numbers(
    names: list[str], distances: np.ndarray, matrix: Tensor | None, spectra: dict[str, np.ndarray]
) -> dict[str, pl.DataFrame]:
    """Lay distances, singular values and a matrix out in long form."""
    count = len(names)
    found = {
        "distances": pl.DataFrame(
            {"name": np.repeat(names, count).tolist(), "other": names * count, "distance": distances.ravel()}
        )
    }
    if spectra:
        found["singular values"] = pl.concat(
            pl.DataFrame({"name": [name] * len(values), "number": range(1, len(values) + 1), "value": values})
            for name, values in spectra.items()
        )
    if matrix is not None:
        tall, wide = matrix.shape
        found["matrix"] = pl.DataFrame(
            {"row": np.repeat(np.arange(tall), wide), "column": np.tile(np.arange(wide), tall),
             "value": matrix.flatten().numpy()}
        )  # fmt: skip
    return found

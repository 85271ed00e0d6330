"""What a set of texts does to an image encoder: which norms change and how much, and how far tasks lie apart.

Everything here looks at what the hypernetwork generates, before statistics are fitted to the task, unless it
says otherwise.

Shape letters: U class sets.
"""

from collections.abc import Sequence

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.classifier import Classifier, HyperCLIPModel
from workbench.datasets.class_sets import ClassSet
from workbench.errors import DataError, RunError
from workbench.hypernetworks import Affines, GeneratedWeights
from workbench.weight_distances import distances_of

_STILL = 1e-3  # scales closer to zero than this have no meaningful ratio


@torch.inference_mode()
def generate_for(model: HyperCLIPModel, sets: Sequence[ClassSet]) -> GeneratedWeights:
    """Generate the weights of some class sets, one row each, in their order, on the CPU.

    Args:
        model: one that generates weights.
        sets: one or more class sets; sizes may differ.

    Raises:
        DataError: no class set.
        RunError: the model generates no weights.
    """
    if not sets:
        raise DataError("no class set to generate weights for; give at least one")
    found = []
    for one in sets:
        prompts = model.text_inputs(one.prompts())
        found.append(model.model.generate(model.model.class_weights(prompts, len(one.classes))))
        if found[-1] is None:
            name = model.model.settings.name
            raise RunError(f"model {name} generates no weights; choose one of kind hyper")
    tensors = {name: torch.cat([own.tensors[name] for own in found]) for name in found[0].tensors}
    return GeneratedWeights(found[0].spec, tensors).to("cpu")


def layer_changes(weights: GeneratedWeights, names: Sequence[str]) -> pl.DataFrame:
    """Say by layer how far each class set moves scale and shift from the layer's own.

    Args:
        weights: of U class sets.
        names: theirs.

    Returns:
        One row per class set, layer and part: set, layer (its place in the tower), part ("scale" or "shift"),
        mean_absolute (0 or more; 0: nothing changes) and mean (signed) over the layer's channels.
    """
    rows = []
    for place, name in enumerate(names):
        for slot, values in weights.tensors.items():
            layer, _, part = slot.rpartition(".")
            own = values[place].double()
            rows.append(
                {"set": name, "layer": layer, "part": part,
                 "mean_absolute": float(own.abs().mean()), "mean": float(own.mean())}
            )  # fmt: skip
    return pl.DataFrame(rows)


def set_distances(weights: GeneratedWeights) -> Float[Tensor, "U U"]:
    """Euclidean distance between all generated numbers of each two class sets; 0 on the diagonal."""
    return distances_of(weights, [slot.name for slot in weights.spec.slots], "frobenius")[0]


def order_changes(model: HyperCLIPModel, one: ClassSet, seed: int = 0) -> dict[str, float]:
    """Say how far the weights move when nothing but the writing of a class set changes.

    Args:
        model: one that generates weights.
        one: a class set.
        seed: of the new order.

    Returns:
        Largest difference of any generated number, beside the largest of them: "new order", "set given
        twice" and "largest number". The first two should be rounding errors.
    """
    order = torch.randperm(len(one.classes), generator=torch.Generator().manual_seed(seed)).tolist()
    anything = {"templates": one.templates, "rows": one.rows[:0], "label": one.label[:0]}
    written = {
        "new order": [one.classes[place] for place in order],
        "set given twice": one.classes * 2,
    }
    base = generate_for(model, [one])
    found = {
        name: max(
            float((other.tensors[slot] - base.tensors[slot]).abs().max())
            for other in (generate_for(model, [ClassSet(name, classes, **anything)]),)
            for slot in base.tensors
        )
        for name, classes in written.items()
    }
    return {**found, "largest number": max(float(part.abs().max()) for part in base.tensors.values())}


@torch.inference_mode()
def statistics_ratios(classifier: Classifier) -> pl.DataFrame:
    """Say how the statistics of one task differ from BatchNorm's running ones.

    Read from what calibration did to the scales: it multiplies each by running over task deviation.

    Returns:
        One row per channel: layer, ratio (task's standard deviation over the running one; above 0, 1 where
        they agree). Empty for a tower without BatchNorm, and for a model without calibration images.
    """
    model, rows = classifier.source.model, []
    if classifier.weights is not None and isinstance(model.target, Affines):
        generated = model.generate(classifier.directions)
        for layer, norm in model.target.norms.items():
            before, after = (
                norm.scale + part.tensors[f"{layer}.scale"][0] for part in (generated, classifier.weights)
            )
            told = (before.abs() > _STILL) & (after.abs() > 0) & (before != after)
            ratios = (before[told] / after[told]).tolist()
            rows += [{"layer": layer, "ratio": ratio} for ratio in ratios]
    return pl.DataFrame(rows, schema={"layer": pl.String, "ratio": pl.Float64})

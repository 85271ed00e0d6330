"""What tests of several families do with trainings."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from workbench.families.comparison import FamilyRecipe, Outcome
from workbench.training import seed_everything


def mean_loss(history: list[dict[str, float]]) -> float:
    """Mean over the whole training, which a few steps cannot upset."""
    return fmean(one["loss"] for one in history)


def outcome_of_each(
    measure: Callable[..., Outcome], recipe: FamilyRecipe, content: Any, folder: Callable[[str], Path]
) -> dict[str, Outcome]:
    """Train and measure every model of a family under seed 0, each in a folder of its own."""
    found = {}
    for model in recipe.models:
        seed_everything(0)
        found[model.name] = measure(recipe, content, model, 0, folder(model.name))
    return found

"""One file per paper; a recipe names its paper, and the paper brings its settings and its comparison."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from workbench.config import Recipe, read_recipe, validated
from workbench.errors import RecipeError

FAMILIES = (
    "aspect",
    "film",
    "continual",
    "initialisation",
    "static",
    "implicit",
    "articulation",
    "gradient_origin",
    "random_hypernetwork",
    "architecture_search",
    "few_shot",
    "hyperlstm",
    "meta_learning",
    "approaches",
    "personal",
    "federated",
    "low_rank",
    "sentences",
    "domains",
    "matryoshka",
    "objectives",
)
# The families whose recipes' encoder is read; of the last one only where it has pictures with captions.
READS_TEXT = ("sentences", "domains", "matryoshka", "objectives")
# Each comparison module has RECIPE, load_data, needs_tokens and compare.
PAPERS = {
    "hyper_cl": "workbench.papers.hyper_cl_comparison",
    "hyper_cl_kg": "workbench.papers.hyper_cl_kg_comparison",
    "hyper_cl_timing": "workbench.papers.hyper_cl_timing",
    "hyper_clip": "workbench.papers.hyper_clip_comparison",
    "hyper_align": "workbench.papers.hyper_align_comparison",
    **{family: f"workbench.families.{family}" for family in FAMILIES},
}


def paper_of(name: str) -> ModuleType:
    """Return the module that runs a paper's recipes."""
    return import_module(PAPERS[name])


def encoder_is_read(recipe: dict[str, Any]) -> bool:
    """Return whether a family's recipe, as a run keeps it, reads texts with its encoder."""
    paper = recipe["paper"]
    return paper in READS_TEXT and (paper != "objectives" or recipe.get("pictures") is not None)


def load_recipe(name: str, changes: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe by name, or by the path of a YAML file.

    Args:
        name: for example "hyper_cl_bundled".
        changes: top-level keys to replace, as ``workbench run`` does for --seed and --data.

    Raises:
        RecipeError: no such recipe, or a key or value that is not allowed.
    """
    content = {**read_recipe(name), **(changes or {})}
    if content.get("paper") not in PAPERS:
        raise RecipeError(
            f"recipe {Path(name).stem}: key 'paper' is {content.get('paper')!r}; allowed: {(*PAPERS,)}"
        )
    return validated(paper_of(content["paper"]).RECIPE, content, f"recipe {content['name']}", RecipeError)

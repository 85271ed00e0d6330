"""One file per paper; a recipe names its paper, and the paper brings the recipe's model."""

from pathlib import Path
from typing import Any

from workbench.config import Recipe, read_recipe, validated
from workbench.errors import RecipeError

PAPERS = ("hyper_cl",)


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
            f"recipe {Path(name).stem}: key 'paper' is {content.get('paper')!r}; allowed: {PAPERS}"
        )
    from workbench.papers.hyper_cl import HyperCLRecipe

    return validated(HyperCLRecipe, content, f"recipe {content['name']}", RecipeError)

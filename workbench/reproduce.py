"""The main job: a set of recipes, their notebooks, and the report over both."""

import logging
import os
from pathlib import Path

from workbench.config import recipe_names
from workbench.errors import DataError, ManifestError, RecipeError
from workbench.notebooks import declared_parameters, notebook_folder, run_notebook
from workbench.papers import load_recipe
from workbench.report import write_index
from workbench.runs import run_recipe

_log = logging.getLogger(__name__)
SETS = ("embedded", "tiny", "benchmark", "paper")


def recipes_of(which: str) -> list[str]:
    """Return the recipes of a set, sorted.

    Raises:
        RecipeError: no such set.
    """
    if which not in SETS:
        raise RecipeError(f"no set named {which!r}; there are: {', '.join(SETS)}")
    return [name for name in recipe_names() if which in load_recipe(name).sets]


def reproduce_set(
    recipes: list[str], which: str = "embedded", *, out: Path, device: str = "cpu", notebooks: bool = True
) -> Path:
    """Run recipes and their notebooks and write the report; finished runs and notebooks are reused.

    Args:
        recipes: names; empty for all of the set.
        which: the set.
        out: output folder.
        device: as torch names devices.
        notebooks: also execute the recipes' notebooks.

    Returns:
        The path of the report.

    Raises:
        WorkbenchError: anything a person can mend, said in one message.
    """
    names, left_out = recipes or recipes_of(which), []
    for name in names:
        try:
            run = run_recipe(name, out=out, device=device)
        except (DataError, ManifestError) as problem:  # data that is not here must not stop the others
            left_out.append(f"{name} was not run: {problem}")
            continue
        for notebook in run.recipe["notebooks"] if notebooks else ():
            page = out / "notebooks" / f"{notebook}-{run.recipe['name']}.html"
            if not page.is_file() or page.stat().st_mtime < (run.folder / "done.json").stat().st_mtime:
                parameters = {"recipe": run.recipe["name"], "out": os.path.abspath(out), "live": False}
                declared = declared_parameters(notebook_folder() / f"{notebook}.ipynb")
                parameters = {key: value for key, value in parameters.items() if key in declared}
                run_notebook(notebook, parameters, out=out, label=run.recipe["name"])
    report = write_index(out)
    if left_out:
        raise DataError("; ".join([f"the report {report} lacks a recipe", *left_out]))
    return report

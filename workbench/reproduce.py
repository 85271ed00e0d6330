"""The main job: a set of recipes, their notebooks, and the report over both."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from workbench.config import read_recipe, recipe_names
from workbench.errors import DataError, ManifestError, RecipeError
from workbench.notebooks import declared_parameters, notebook_folder, run_notebook
from workbench.papers import load_recipe
from workbench.report import write_index
from workbench.runs import Run, run_recipe
from workbench.sharing import cores, threads_each

_log = logging.getLogger(__name__)
SETS = ("embedded", "families", "neighbours", "tiny", "benchmark", "paper")


def recipes_of(which: str) -> list[str]:
    """Return the recipes of a set, sorted.

    Raises:
        RecipeError: no such set.
    """
    if which not in SETS:
        raise RecipeError(f"no set named {which!r}; there are: {', '.join(SETS)}")
    return [name for name in recipe_names() if which in (read_recipe(name).get("sets") or ())]


def reproduce_set(
    recipes: list[str],
    which: str = "embedded",
    *,
    out: Path,
    device: str = "cpu",
    notebooks: bool = True,
    jobs: int = 1,
) -> Path:
    """Run recipes and their notebooks and write the report; finished runs and notebooks are reused.

    Args:
        recipes: names; empty for all of the set.
        which: the set.
        out: output folder.
        device: as torch names devices.
        notebooks: also execute the recipes' notebooks.
        jobs: recipes run at once, in processes that share the cores; one recipe alone shares its trainings
            among as many processes as there are cores.

    Returns:
        The path of the report.

    Raises:
        WorkbenchError: anything a person can mend, said in one message.
    """
    names, runs, left_out = recipes or recipes_of(which), [], []
    for name in names:
        load_recipe(name)  # a wrong one is said before hours of training
    for name, found in zip(names, _run_each(names, out, device, jobs), strict=True):
        if isinstance(found, Run):
            runs.append(found)
        else:  # data that is not here must not stop the others
            left_out.append(f"{name} was not run: {found}")
    for run in runs if notebooks else ():
        for notebook in run.recipe["notebooks"]:
            _execute(notebook, run, out)
    report = write_index(out)
    if left_out:
        raise DataError("; ".join([f"the report {report} lacks a recipe", *left_out]))
    return report


def _run_one(
    name: str, out: Path, device: str, workers: int = 1, threads: int | None = None
) -> Run | Exception:
    """Run a recipe; data that is missing is returned, every other problem raised."""
    if threads:
        import torch

        torch.set_num_threads(threads)
    try:
        return run_recipe(name, out=out, device=device, workers=workers)
    except (DataError, ManifestError) as problem:
        return problem


def _run_each(names: list[str], out: Path, device: str, jobs: int) -> Iterator[Run | Exception]:
    """Run recipes one after the other, or several at once; in the order of their names."""
    if jobs <= 1:
        yield from (_run_one(name, out, device, cores()) for name in names)
        return
    threads = threads_each(jobs)
    # Spawned, not forked: a forked process inherits torch's thread pools in a state it cannot use.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        several = [pool.submit(_run_one, name, out, device, 1, threads) for name in names]
        yield from (one.result() for one in several)


def _execute(notebook: str, run: Run, out: Path) -> None:
    """Execute a run's notebook unless its page is newer than the run."""
    page = out / "notebooks" / f"{notebook}-{run.recipe['name']}.html"
    if page.is_file() and page.stat().st_mtime >= (run.folder / "done.json").stat().st_mtime:
        return
    parameters = {"recipe": run.recipe["name"], "out": os.path.abspath(out), "live": False}
    declared = declared_parameters(notebook_folder() / f"{notebook}.ipynb")
    parameters = {key: value for key, value in parameters.items() if key in declared}
    run_notebook(notebook, parameters, out=out, label=run.recipe["name"])

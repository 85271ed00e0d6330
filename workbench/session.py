"""What the dashboards ask for: finished runs, sentences under a condition, numbers with intervals. No Panel.

A session belongs to one server process and holds only what nobody changes: finished runs and trained models.
What a person types lives in the view that asked.
"""

import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from workbench.datasets.bundled import sentences
from workbench.errors import RunError
from workbench.moved import ConditionedTexts, Moved
from workbench.runs import MARKER, Run, check_device, finished_runs, runs_folder
from workbench.store import EmbeddingStore

__all__ = ["ConditionedTexts", "Moved", "Session", "shared_session"]
FIRST_MODELS = ("hyper_query_k32", "hyper_query", "hyper_k64")
FIRST = ("hyper_cl_bundled", "hyper_clip_scenes", "hyper_align_scenes")  # shown unless a run is asked for


class Session:
    """Finished runs of an output folder, and the models they kept, each loaded once."""

    def __init__(self, out: Path | str = "reports", device: str = "cpu") -> None:
        """Look for runs.

        Args:
            out: output folder of the runs.
            device: where models compute, as torch names devices; results are on the CPU.

        Raises:
            RunError: there is no such device here.
        """
        if device != "cpu":
            check_device(device)
        self.out, self.device = Path(out), device
        self._lock = threading.RLock()  # of what is known, never held while something is loaded
        self._loading: dict[tuple[object, ...], threading.RLock] = {}
        self._models: dict[tuple[Path, str], Any] = {}
        self._stores: dict[Path, EmbeddingStore] = {}  # in memory, by the folder that each one began with
        self._texts: dict[tuple[Path, str], ConditionedTexts] = {}
        self._finished: tuple[object, list[Run]] = (None, [])

    def finished(self) -> list[Run]:
        """Return all finished runs, oldest first; their files are checked again only when a run was added."""
        with self._lock:
            found = sorted(runs_folder(self.out).glob(f"[a-z]*/{MARKER}"))
            marks = [(path, path.stat().st_mtime_ns) for path in found]
            if marks != self._finished[0]:
                self._finished = (marks, finished_runs(self.out))
            return self._finished[1]

    def runs(self, *papers: str) -> dict[str, Run]:
        """Return the newest finished run of every recipe of some papers, or of all, by its name."""
        return {
            run.recipe["name"]: run for run in self.finished() if run.recipe["paper"] in papers or not papers
        }

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

    def model(self, run: Run, name: str, load: Callable[[Run, str], Any] = Run.model) -> Any:
        """Return a model that a run kept, loaded once; what it encodes from now on stays in memory.

        Args:
            run: a finished run.
            name: of the model.
            load: opens it, if only a part of it is wanted; the run's own way if not given.

        Raises:
            RunError: the run kept no such model.
        """
        key = (run.folder, name if load is Run.model else f"{name} by {load.__name__}")

        def opened() -> Any:
            found = load(run, name)
            if self.device != "cpu" and hasattr(found, "to"):
                found.to(self.device)
            store = getattr(found, "store", None)
            if store is not None and store.folder is not None:
                # What people type is theirs: it leaves no trace on disk, and no page waits for one.
                with self._lock:
                    found.store = self._stores.setdefault(store.folder, store.apart())
            return found

        return self._once(self._models, key, opened)

    def texts_of(self, recipe: str, model: str) -> ConditionedTexts:
        """Return the bundled sentences under a trained model of a run, ready to be moved.

        Raises:
            RunError: no such run, or it kept no model of that name.
        """
        run = self.run(recipe, "hyper_cl")
        chosen = model or self.first_model(self.text_models(recipe))
        return self._once(
            self._texts, (run.folder, chosen), lambda: ConditionedTexts(self.model(run, chosen), sentences())
        )

    def _once(self, kept: dict[Any, Any], key: tuple[Path, str], make: Callable[[], Any]) -> Any:
        """Return what is kept, or make it; two that ask at once wait for one, and nobody else waits."""
        with self._lock:
            if key in kept:
                return kept[key]
            own = self._loading.setdefault((id(kept), *key), threading.RLock())
        with own:
            if key not in kept:
                kept[key] = make()
            return kept[key]

    def text_models(self, recipe: str) -> list[str]:
        """Return the models of a run that know conditions by text and not by number.

        Raises:
            RunError: no such run.
        """
        run = self.run(recipe, "hyper_cl")
        return [name for name in run.models() if reads_text(run, name)]

    @staticmethod
    def first_model(names: list[str]) -> str:
        """Return the model that is shown unless one is asked for; empty if there is none."""
        return next((name for name in FIRST_MODELS if name in names), next(iter(names), ""))


def shared_session() -> Session:
    """Return the one session of a server process: every model is loaded once.

    WORKBENCH_OUT names its output folder, "reports" if not set, and WORKBENCH_DEVICE where it computes.
    """
    return _session(os.environ.get("WORKBENCH_OUT") or "reports", os.environ.get("WORKBENCH_DEVICE") or "cpu")


_session = cache(Session)


def reads_text(run: Run, model: str) -> bool:
    """Tell whether a model knows conditions by text and not by number."""
    settings = next(one for one in run.recipe["models"] if one["name"] == model)
    return settings.get("condition", "text") == "text"

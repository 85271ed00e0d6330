"""Runs: the only module that knows run folders, their provenance and how they are published.

A run is computed in a private folder and renamed when complete, so a run that can be seen is whole. The
private folder's name follows from the settings, the data, the encoder and the version: the same command goes
on where a killed process stopped, and a finished run is found again instead of computed twice.
"""

import io
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
from filelock import FileLock, Timeout

import workbench
from workbench.config import Recipe
from workbench.errors import RunError
from workbench.files import canonical_json, check_writable, clear_disk_errors, digest, sha256_of, write_atomic
from workbench.papers import load_recipe, paper_of

MARKER = "done.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One finished run, read from its folder."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Open a finished run.

        Raises:
            RunError: no such run, one that did not finish, or a file that changed since.
        """
        marker = folder / MARKER
        if not marker.is_file():
            raise RunError(f"{folder} holds no finished run; start it with: workbench run RECIPE")
        for name, expected in json.loads(marker.read_text("utf-8"))["files"].items():
            if not (folder / name).is_file() or sha256_of(folder / name) != expected:
                raise RunError(f"{folder / name} is missing or was changed since; run again with --fresh")
        return cls(folder)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The settings the run was made with, as JSON types."""
        return self._json("recipe.json")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Commit, versions, device, hashes, seeds and times."""
        return self._json("provenance.json")

    @cached_property
    def cards(self) -> list[dict[str, Any]]:
        """One card per model and seed: settings, parameters, seconds, loss by epoch, health, cost."""
        return self._json("cards.json")

    @cached_property
    def metrics(self) -> pl.DataFrame:
        """All metrics in long form; seed is null for the mean over seeds."""
        return pl.read_parquet(self.folder / "metrics.parquet")

    @cached_property
    def scores(self) -> pl.DataFrame:
        """The score of every row by every model and seed."""
        return pl.read_parquet(self.folder / "scores.parquet")

    def models(self) -> list[str]:
        """Names of the models whose trained weights the run kept."""
        return sorted(path.parent.name for path in self.folder.glob("models/*/head.json"))

    def model(self, name: str) -> "HyperCL | HyperCLIPModel | LinkPredictor | ConnectorZoo":  # noqa: F821
        """Load a trained model with its encoder, for a graph recipe with its graph.

        Raises:
            RunError: the run kept no weights of that name.
            ManifestError: the prepared graph is not on this machine.
        """
        if name not in self.models():
            raise RunError(
                f"run {self.folder.name} kept no model {name!r}; it has: {', '.join(self.models())}"
            )
        folder = self.folder / "models" / name
        if self.recipe["paper"] == "hyper_cl_kg":
            from workbench.datasets.graphs import GraphData, load_graph
            from workbench.link_prediction import LinkPredictor

            return LinkPredictor.load(folder, load_graph(GraphData(**self.recipe["data"])))
        if self.recipe["paper"] == "hyper_clip":
            from workbench.classifier import HyperCLIPModel

            return HyperCLIPModel.load(folder)
        if self.recipe["paper"] == "hyper_align":
            from workbench.connector_zoo import ConnectorZoo

            return ConnectorZoo.load(folder)
        from workbench.model import HyperCL

        return HyperCL.load(folder)

    def _json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text("utf-8"))


def runs_folder(out: Path) -> Path:
    """Return where the runs of an output folder are."""
    return out / "runs"


def finished_runs(out: Path) -> list[Run]:
    """List the finished runs of an output folder, oldest first; unfinished and damaged ones are left out."""
    found = []
    for folder in runs_folder(out).glob("[a-z]*"):
        try:
            found.append(Run.open(folder))
        except RunError as problem:
            _log.warning("left out: %s", problem)
    return sorted(found, key=lambda run: run.provenance["finished"])


def find_run(recipe: str, out: Path | str = "reports") -> Run:
    """Return the newest finished run of a recipe.

    Raises:
        RunError: there is none.
    """
    found = [run for run in finished_runs(Path(out)) if run.recipe["name"] == recipe]
    if not found:
        raise RunError(
            f"no finished run of {recipe} under {out}; start it with: workbench run {recipe} --out {out}"
        )
    return found[-1]


def run_recipe(
    name: str,
    *,
    out: Path | str = "reports",
    device: str = "cpu",
    changes: dict[str, Any] | None = None,
    fresh: bool = False,
    workers: int = 1,
) -> Run | None:
    """Run a recipe, or return the finished run with the same settings, data, encoder and version.

    Args:
        name: of the recipe, or the path of a YAML file.
        out: output folder; the run goes to its folder ``runs``.
        device: as torch names devices, for example "cpu" or "cuda".
        changes: top-level recipe keys to replace.
        fresh: compute again even if there is a finished run.
        workers: processes that share the trainings, on "cpu" alone, see :mod:`workbench.sharing`.

    Returns:
        The run; None in the second to last of several processes, see :mod:`workbench.processes`.

    Raises:
        WorkbenchError: anything a person can mend, said in one message.
    """
    from workbench.encoders import TextEncoder
    from workbench.processes import leads, meet
    from workbench.sharing import helps, shared

    recipe = load_recipe(name, changes)
    check_device(device)
    data = paper_of(recipe.paper).load_data(recipe)
    check_writable(runs_folder(Path(out)))
    encoder = TextEncoder(recipe.encoder, device)
    versions = workbench.__version__, device.split(":")[0]
    identity = digest(recipe.hash, data.sha256, encoder.fingerprint, *versions)
    final = runs_folder(Path(out)) / f"{recipe.name}-{identity[:10]}"
    private = final.with_name(f".{final.name}.partial")
    if helps() or not leads():  # of several processes the first one writes
        if fresh or not (final / MARKER).is_file():
            meet()  # the first one may have something to remove
            private.mkdir(parents=True, exist_ok=True)
            _compared(recipe, data, encoder, private, device)
        return None
    try:
        with FileLock(final.with_name(f".{final.name}.lock"), timeout=0):
            if (final / MARKER).is_file() and not fresh:
                return Run.open(final)
            if fresh:
                shutil.rmtree(private, ignore_errors=True)
            meet()
            about = {"data_sha256": data.sha256, "encoder_sha256": encoder.fingerprint, "identity": identity}
            request = {"name": name, "out": out, "device": device, "changes": changes, "fresh": fresh}
            with clear_disk_errors(private), shared(workers, request):
                _compute(recipe, data, encoder, private, device, about)
                _publish(private, final)
    except Timeout:
        told = "is being computed by another process; wait for it, or choose another --out"
        raise RunError(f"{final} {told}") from None
    return Run.open(final)


def check_device(device: str) -> None:
    """Refuse a device that is not there, rather than falling back in silence.

    Raises:
        RunError: names it.
    """
    import torch

    try:
        torch.empty(1, device=device).tolist()  # read back: "meta" holds no numbers
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise RunError(f"device {device!r} cannot be used here ({reason}); use --device cpu") from None


def _compute(
    recipe: Recipe,
    data: Any,
    encoder: Any,
    private: Path,
    device: str,
    about: dict[str, Any],
) -> None:
    """Do the work in the private folder and write every file of the run."""
    private.mkdir(parents=True, exist_ok=True)
    began, clock = datetime.now(UTC), time.perf_counter()
    found = _compared(recipe, data, encoder, private, device)
    for name, frame in (("metrics", found.metrics), ("scores", found.scores)):
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        write_atomic(private / f"{name}.parquet", buffer.getvalue())
    write_atomic(private / "cards.json", json.dumps(found.cards, indent=1))
    settings = recipe.model_dump(mode="json")
    if recipe.data.path:
        settings["data"]["path"] = Path(recipe.data.path).name  # where it lay is nobody else's business
    write_atomic(private / "recipe.json", json.dumps(settings, indent=1, ensure_ascii=False))
    seconds = round(time.perf_counter() - clock, 1)
    write_atomic(
        private / "provenance.json",
        json.dumps({**_provenance(recipe, device, began, seconds), **about, "data": data.counts}, indent=1),
    )


def _compared(recipe: Recipe, data: Any, encoder: Any, private: Path, device: str) -> Any:
    """Train and measure all models of a recipe."""
    from workbench.manifests import cache_folder
    from workbench.store import EmbeddingStore

    paper = paper_of(recipe.paper)
    store = EmbeddingStore(encoder, cache_folder(), tokens=paper.needs_tokens(recipe))
    return paper.compare(recipe, data.content, store, private, device)


def _provenance(recipe: Recipe, device: str, began: datetime, seconds: float) -> dict[str, Any]:
    """Say what made the run: code, versions, machine, time. No path and no name of a person or host."""
    from importlib.metadata import version

    import torch

    from workbench.processes import world
    from workbench.sharing import threads_each, workers

    packages = ("torch", "sentence-transformers", "transformers", "polars", "scikit-learn", "numpy")
    return {
        "workbench": workbench.__version__,
        "commit": _commit(),
        "recipe_sha256": recipe.hash,
        "seeds": list(recipe.seeds),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "CPU",
        "workers": workers(),  # as long as a training takes beside others
        "threads": torch.get_num_threads() if workers() == 1 else threads_each(workers()),
        "processes": world(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: version(name) for name in packages},
        "started": began.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="microseconds"),
        "seconds_of_last_process": seconds,
        "peak_process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _commit() -> str:
    """Return the checkout's commit, marked when files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        run = {"cwd": here, "capture_output": True, "text": True, "check": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", "."], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}-changed" if changed else commit


def _publish(private: Path, final: Path) -> None:
    """Write the marker with the hash of every file, then rename; an older run of that name is replaced."""
    files = {
        str(path.relative_to(private)): sha256_of(path)
        for path in sorted(private.rglob("*"))
        if path.is_file() and path.name != MARKER and private / "training" not in path.parents
    }
    write_atomic(private / MARKER, canonical_json({"files": files}))
    old = final.with_name(f".{final.name}.old-{os.getpid()}")
    if final.exists():
        final.rename(old)
    private.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(final / "training", ignore_errors=True)  # only now: until here it saves training again

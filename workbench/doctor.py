"""What a machine has of what the workbench can use."""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from workbench.errors import WorkbenchError

_PACKAGES = ("torch", "torchvision", "open_clip_torch", "sentence-transformers", "polars", "plotly", "panel")
_NOTEBOOK = ("papermill", "jupyterlab", "pyviz_comms")


def checks() -> Iterator[tuple[str, bool, str]]:
    """Yield one line per check: its name, whether it is fine, and what was found or what to do."""
    yield "python", sys.version_info >= (3, 11), sys.version.split()[0]
    for name in (*_PACKAGES, *_NOTEBOOK):
        try:
            yield name, True, version(name)
        except PackageNotFoundError:
            yield name, False, "not installed; run: pip install -c constraints.txt -e ."
    yield from _devices()
    from workbench.encoders import PACKAGED, TextEncoder

    try:
        encoder = TextEncoder()
        yield PACKAGED, True, f"weights as published, width {encoder.width}, window {encoder.window} tokens"
    except (WorkbenchError, ImportError) as problem:
        yield PACKAGED, False, str(problem)
    from workbench.manifests import cache_folder, locate, manifest_names

    for name in manifest_names():
        where = locate(name)
        yield f"data: {name}", True, str(where) if where else "not here (optional); set WORKBENCH_DATA"
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    yield "browser", True, browser or "no Chromium (optional; page tests need it: apt-get install chromium)"
    folder = cache_folder()
    writable = os.access(next(path for path in (folder, *folder.parents) if path.exists()), os.W_OK)
    yield "cache", writable, f"{folder}{'' if writable else ' is not writable; set WORKBENCH_CACHE'}"


def _devices() -> Iterator[tuple[str, bool, str]]:
    """Yield what torch can compute on."""
    import torch

    yield "cpu", True, f"{torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield f"cuda:{index}", True, torch.cuda.get_device_name(index)
    else:
        yield "cuda", True, "none (optional; every embedded recipe runs on the CPU)"

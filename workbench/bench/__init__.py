"""Benchmarks: each times the workbench beside a plain reference of the published way, in one process."""

import json
import os
import platform
from importlib import import_module
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.files import write_atomic

BENCHES = {  # name -> modules with rows(device)
    "hyper_cl": ("hyper_cl", "hyper_cl_evaluation", "ranking"),
    "hyper_clip": ("hyper_clip",),
    "hyper_align": ("hyper_align",),
    "hyper_align_memory": ("hyper_align_memory",),  # minutes
    "apps": ("apps", "apps_browser"),  # minutes
    "families": ("families",),
}


def run_bench(name: str, out: Path | None, device: str = "cpu") -> str:
    """Run a benchmark, write its rows as JSON if asked, and return them as a table.

    Below the table stands what a module's ``notes()`` says, if it has any.

    Raises:
        WorkbenchError: no benchmark of that name.
    """
    if name not in BENCHES:
        raise WorkbenchError(f"no benchmark named {name[:80]!r}; there are: {', '.join(BENCHES)}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter, read when torch is imported
    import torch

    modules = [import_module(f"workbench.bench.{module}") for module in BENCHES[name]]
    rows = [row for module in modules for row in module.rows(device)]
    if out is not None:
        write_atomic(out / f"{name}.json", json.dumps(rows, indent=1))
    used = rows[0].get("threads", torch.get_num_threads())
    machine = f"{os.cpu_count()} cores, {used} thread{'s' * (used > 1)}, {platform.machine()}"
    if device.startswith("cuda"):
        machine = torch.cuda.get_device_name()
    said = [note for module in modules if hasattr(module, "notes") for note in module.notes()]
    return "\n".join([*_printed(machine, rows), *said])


def _printed(machine: str, rows: list[dict[str, Any]]) -> list[str]:
    """Lay out the rows under a head; bars and verdicts where a benchmark has them."""
    wide, held = max(72, *(len(row["name"]) + 2 for row in rows)), any("bar" in row for row in rows)
    head = (
        f"{machine:{wide}}{'ours s':>10}{'reference s':>13}{'ratio':>8}{'ours MiB':>10}{'reference MiB':>15}"
    )
    lines = [head + (f"{'bar':>10}{'verdict':>9}" if held else "")]
    for row in rows:
        line = (
            f"{row['name']:{wide}}{row['ours_s']:10.4f}{row['reference_s']:13.4f}{row['ratio']:8.2f}"
            f"{row['ours_mib']:10.1f}{row['reference_mib']:15.1f}"
        )
        lines.append(line + (f"{row['bar'] or '-':>10}{row['verdict'] or '-':>9}" if held else ""))
    return lines

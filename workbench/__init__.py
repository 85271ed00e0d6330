"""A workbench for conditioned representations: a hypernetwork turns a condition into weights.

    condition --(embed)--> condition embedding --(generator)--> generated weights --(apply)--> target -->
    metrics

Names are imported when first used, so that ``import workbench`` takes milliseconds.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "ConditionedIndex": "workbench.search",
    "EmbeddingStore": "workbench.store",
    "HyperCL": "workbench.model",
    "LinkPredictor": "workbench.link_prediction",
    "Run": "workbench.runs",
    "TextEncoder": "workbench.encoders",
    "WorkbenchError": "workbench.errors",
    "bundled_sentences": "workbench.datasets.bundled:sentences",
    "find_run": "workbench.runs",
    "load_recipe": "workbench.papers",
    "measure_robustness": "workbench.robustness",
    "run_notebook": "workbench.notebooks",
    "run_recipe": "workbench.runs",
}
__all__ = [*sorted(_PUBLIC), "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}; it has: {', '.join(_PUBLIC)}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute or name)

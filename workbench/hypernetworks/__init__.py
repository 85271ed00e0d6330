"""Condition -> generator -> generated weights -> application: the idea every paper here is a case of."""

from workbench.hypernetworks.apply import Rows, pool_tokens, project
from workbench.hypernetworks.generators import LinearGenerator
from workbench.hypernetworks.health import Health, health_of
from workbench.hypernetworks.spec import GeneratedWeights, ParamSpec, Slot

__all__ = [
    "GeneratedWeights",
    "Health",
    "LinearGenerator",
    "ParamSpec",
    "Rows",
    "Slot",
    "health_of",
    "pool_tokens",
    "project",
]

"""Condition -> generator -> generated weights -> application: the idea every paper here is a case of."""

from workbench.hypernetworks.apply import Rows, pool_tokens, project
from workbench.hypernetworks.generators import LinearGenerator, SetGenerator
from workbench.hypernetworks.health import Health, health_of
from workbench.hypernetworks.norms import Affines, ChannelAffine, ConditionedNorm
from workbench.hypernetworks.spec import GeneratedWeights, ParamSpec, Slot

__all__ = [
    "Affines",
    "ChannelAffine",
    "ConditionedNorm",
    "GeneratedWeights",
    "Health",
    "LinearGenerator",
    "ParamSpec",
    "Rows",
    "SetGenerator",
    "Slot",
    "health_of",
    "pool_tokens",
    "project",
]

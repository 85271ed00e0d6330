"""Condition -> generator -> generated weights -> application: the idea every paper here is a case of."""

from workbench.hypernetworks.apply import Rows, pool_tokens, project
from workbench.hypernetworks.conditioned import Conditioned
from workbench.hypernetworks.generators import (
    ChunkedGenerator,
    LinearGenerator,
    MLPGenerator,
    RandomProjection,
    SetGenerator,
    Table,
)
from workbench.hypernetworks.health import Health, health_of
from workbench.hypernetworks.norms import Affines, ChannelAffine, ConditionedNorm
from workbench.hypernetworks.peft_files import save_peft
from workbench.hypernetworks.spec import GeneratedWeights, ParamSpec, Slot

__all__ = [
    "Affines",
    "ChannelAffine",
    "ChunkedGenerator",
    "Conditioned",
    "ConditionedNorm",
    "GeneratedWeights",
    "Health",
    "LinearGenerator",
    "MLPGenerator",
    "ParamSpec",
    "RandomProjection",
    "Rows",
    "SetGenerator",
    "Slot",
    "Table",
    "health_of",
    "pool_tokens",
    "project",
    "save_peft",
]

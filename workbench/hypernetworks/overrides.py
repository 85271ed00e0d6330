"""Convolutions and linear layers to whose weight a generated one is added: the dearer rivals of the norms.

As with norms, the sum lives in the layer until it is replaced or cleared, so that what is computed again in
a backward pass sees the same weights.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from workbench.hypernetworks.spec import GeneratedWeights, ParamSpec, Slot


class ConditionedWeight(nn.Module):
    """A layer with a weight of its own, to which a generated one can be added."""

    def __init__(self, layer: nn.Module) -> None:
        """Take over a layer's weight."""
        super().__init__()
        self.own = layer._parameters.pop("weight")
        self.layer = layer
        self.reset()

    def use(self, change: Tensor) -> None:
        """Add a weight to the layer's own."""
        self.layer.__dict__["weight"] = self.own + change.to(self.own.dtype).view_as(self.own)

    def reset(self) -> None:
        """Go back to the layer's own weight."""
        self.layer.__dict__["weight"] = self.own

    def _apply(self, function, recurse: bool = True) -> "ConditionedWeight":  # noqa: ANN001
        """Follow a move to another device or type."""
        super()._apply(function, recurse)
        self.reset()
        return self

    def _load_from_state_dict(self, *args: object) -> None:
        """Follow a loading, which may put another parameter in place (``assign=True``)."""
        super()._load_from_state_dict(*args)
        self.reset()

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer with the weight in use."""
        return self.layer(inputs)


@dataclass(frozen=True)
class Overrides:
    """The conditioned layers of a tower, used as :class:`~workbench.hypernetworks.norms.Affines` are."""

    layers: dict[str, ConditionedWeight]

    @classmethod
    def wrap(cls, tower: nn.Module, which: Literal["linear", "convolutions"]) -> "Overrides":
        """Wrap layers of a tower in place.

        Args:
            tower: an image encoder.
            which: "linear" is its last linear layer, the projection; "convolutions" are the first one and
                those with a kernel per channel, which hold few numbers and see all of the image.

        Raises:
            ValueError: the tower has no such layer.
        """
        found = list(tower.named_modules())
        if which == "linear":
            chosen = [item for item in found if isinstance(item[1], nn.Linear)][-1:]
        else:
            layers = [item for item in found if isinstance(item[1], nn.Conv2d)]
            chosen = [
                item
                for place, item in enumerate(layers)
                if place == 0 or 1 < item[1].groups == item[1].in_channels
            ]
        if not chosen:
            raise ValueError(
                f"{type(tower).__name__} has no layer of the kind {which} to generate weights for"
            )
        wrapped = {}
        for name, layer in chosen:
            parent, _, last = name.rpartition(".")
            wrapped[name] = ConditionedWeight(layer)
            setattr(tower.get_submodule(parent), last, wrapped[name])
        return cls(wrapped)

    def spec(self, gain: float = 1.0) -> ParamSpec:
        """Return what a generator has to yield, scaled to the fan-in of each layer."""
        return ParamSpec(
            tuple(
                Slot(
                    f"{name}.weight",
                    (layer.own.numel(),),
                    "vector",
                    gain=gain / math.sqrt(layer.own[0].numel()),
                )
                for name, layer in self.layers.items()
            )
        )

    def use(self, weights: GeneratedWeights, rows: Tensor | None = None) -> None:
        """Add the weights of one condition.

        Raises:
            ValueError: several conditions; only norms take one per row.
        """
        if len(weights) != 1 or rows is not None:
            raise ValueError(
                "generated convolutions and linear layers take one condition for the whole batch"
            )
        for name, layer in self.layers.items():
            layer.use(weights.tensors[f"{name}.weight"][0])

    def reset(self) -> None:
        """Go back to the layers' own weights."""
        for layer in self.layers.values():
            layer.reset()

    def train_own(self, train: bool) -> None:
        """Let the layers' own weights be trained, or keep them as they are."""
        for layer in self.layers.values():
            layer.own.requires_grad_(train)

    @torch.no_grad()
    def bake(self) -> None:
        """Make what is in use the layers' own."""
        for layer in self.layers.values():
            layer.own.data = layer.layer.__dict__["weight"].detach().clone()
            layer.reset()

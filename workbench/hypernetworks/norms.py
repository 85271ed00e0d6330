"""Norm layers whose scale and shift can be generated, one pair for a batch or one per row.

The generated values live in modules of our own and stay there until they are replaced or cleared. That makes
gradient checkpointing exact: what is computed again in the backward pass sees the same values, which swapping
parameters for the length of a forward call (``torch.func.functional_call``) does not give. With
checkpointing, replacing or clearing has to wait for the backward pass.

Shape letters: B rows, U conditions, C channels of a layer.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from workbench.hypernetworks.spec import GeneratedWeights, ParamSpec, Slot


class ChannelAffine(nn.Module):
    """Scale and shift per channel, at its start the identity: where a tower's own norms are folded away."""

    def __init__(self, channels: int) -> None:
        """Build it for inputs ``[B, C, ...]``."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, inputs: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        """Scale and shift; without both, pass on."""
        if self.weight is None:
            return inputs
        shape = (1, -1) + (1,) * (inputs.dim() - 2)
        return inputs * self.weight.view(shape) + self.bias.view(shape)


class ConditionedNorm(nn.Module):
    """A norm layer with a scale and shift of its own, which generated ones can take the place of.

    The wrapped layer keeps its statistics; an activation that it brings (timm's ``BatchNormAct2d``) is done
    here, since a scale per row comes between the two.
    """

    def __init__(self, norm: nn.Module) -> None:
        """Take over a layer's parameters."""
        super().__init__()
        # The same parameters, not copies: frozen ones stay frozen, and an optimizer keeps what it holds.
        self.scale, self.shift = (norm._parameters.pop(name) for name in ("weight", "bias"))
        self.after = nn.Sequential()
        for name in ("drop", "act"):
            if isinstance(getattr(norm, name, None), nn.Module):
                self.after.append(getattr(norm, name))
                setattr(norm, name, nn.Identity())
        # Channels come last only in a plain LayerNorm; timm's LayerNorm2d derives from it, with them second.
        self.last = isinstance(norm, nn.LayerNorm) and "2d" not in type(norm).__name__
        self.norm = norm
        self.by_row: tuple[Tensor, Tensor] | None = None
        self.use(self.scale, self.shift)

    def use(self, scale: Tensor | None, shift: Tensor | None) -> None:
        """Set what the layer scales and shifts by: one vector each, or one row per row of the batch."""
        self.by_row = None if scale is None or scale.dim() == 1 else (scale, shift)
        whole = self.by_row is None
        # Straight into the dictionary: a generated tensor is no parameter, and ours must not count twice.
        self.norm.__dict__["weight"] = scale if whole else None
        self.norm.__dict__["bias"] = shift if whole else None

    def reset(self) -> None:
        """Go back to the layer's own scale and shift."""
        self.use(self.scale, self.shift)

    def _apply(self, function, recurse: bool = True) -> "ConditionedNorm":  # noqa: ANN001
        """Follow a move to another device or type, which may make new parameters."""
        super()._apply(function, recurse)
        self.reset()
        return self

    def _load_from_state_dict(self, *args: object) -> None:
        """Follow a loading, which may put other parameters in place (``assign=True``)."""
        super()._load_from_state_dict(*args)
        self.reset()

    def forward(self, inputs: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """Normalise, scale, shift, activate."""
        if self.by_row is None:
            return self.after(self.norm(inputs))
        scale, shift = self.by_row
        if isinstance(self.norm, _BatchNorm) and not self.norm.training:
            # Known statistics: one pass over the maps instead of two.
            scale = scale / (self.norm.running_var + self.norm.eps).sqrt()
            shift, normalised = shift - self.norm.running_mean * scale, inputs
        else:
            normalised = self.norm(inputs)
        middle = (1,) * (inputs.dim() - 2)
        shape = (len(inputs), *middle, -1) if self.last else (len(inputs), -1, *middle)
        return self.after(torch.addcmul(shift.view(shape), normalised, scale.view(shape)))


def is_norm(module: nn.Module) -> bool:
    """Tell whether a layer has a scale and shift per channel; by its class and not its name."""
    if not isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm, ChannelAffine)):
        return False
    # A layer that is wrapped already has no parameters left; a LayerNorm over whole maps has no channels.
    both = [module._parameters.get(name) for name in ("weight", "bias")]
    return all(part is not None and part.dim() == 1 for part in both)


@dataclass(frozen=True)
class Affines:
    """All conditioned norms of a tower, in the order of its modules, which their spec fixes.

    Attributes:
        norms: by the name of the layer they wrap.
    """

    norms: dict[str, ConditionedNorm]

    @classmethod
    def wrap(cls, tower: nn.Module) -> "Affines":
        """Put every norm layer of a tower into a wrapper, in place.

        Raises:
            ValueError: the tower has no norm layer with a scale and shift; the message says what to do.
        """
        # A layer that a tower uses in two places is listed at both, and gets one wrapper.
        modules = tower.named_modules(remove_duplicate=False)
        found = [(name, module) for name, module in modules if is_norm(module)]
        if not found:
            raise ValueError(
                f"{type(tower).__name__} has no norm layer with a scale and shift to generate, or is "
                "wrapped already; without one, add a "
                "ChannelAffine after its convolutions, or choose a tower with norms"
            )
        wrapped: dict[nn.Module, ConditionedNorm] = {}
        names = {}
        for name, module in found:
            parent, _, last = name.rpartition(".")
            if module not in wrapped:
                names[name] = wrapped[module] = ConditionedNorm(module)
            setattr(tower.get_submodule(parent), last, wrapped[module])
        return cls(names)

    def spec(self, gain: float = 1.0) -> ParamSpec:
        """Return what a generator has to yield: per layer what is added to its scale and to its shift."""
        return ParamSpec(
            tuple(
                Slot(f"{name}.{part}", tuple(norm.scale.shape), "vector", gain=gain)
                for name, norm in self.norms.items()
                for part in ("scale", "shift")
            )
        )

    def use(self, weights: GeneratedWeights, rows: Int[Tensor, " B"] | None = None) -> None:
        """Add generated values to every layer's own, until the next call or :meth:`reset`.

        Args:
            weights: of one condition, or of U with ``rows``.
            rows: which condition each row of the coming batch has.
        """
        if rows is None and len(weights) != 1:
            raise ValueError(f"weights of {len(weights)} conditions need to be told which row has which")
        for name, norm in self.norms.items():
            # The layer's own precision under autocast too: norm kernels take no half-precision scale there.
            scale, shift = (
                weights.tensors[f"{name}.{part}"].to(norm.scale.dtype) for part in ("scale", "shift")
            )
            scale, shift = norm.scale + scale, norm.shift + shift
            norm.use(*((scale[0], shift[0]) if rows is None else (scale[rows], shift[rows])))

    def reset(self) -> None:
        """Go back to every layer's own scale and shift."""
        for norm in self.norms.values():
            norm.reset()

    def train_own(self, train: bool) -> None:
        """Let the layers' own scales and shifts be trained, or keep them as they are."""
        for norm in self.norms.values():
            norm.scale.requires_grad_(train)
            norm.shift.requires_grad_(train)

    def bake(self) -> None:
        """Make what is in use, of one condition, the layers' own: a plain tower again."""
        for norm in self.norms.values():
            if norm.by_row is not None:
                raise ValueError("scales per row cannot be baked in; use the weights of one condition")
            scale, shift = norm.norm.__dict__["weight"], norm.norm.__dict__["bias"]
            norm.scale.data, norm.shift.data = scale.detach().clone(), shift.detach().clone()
            norm.reset()

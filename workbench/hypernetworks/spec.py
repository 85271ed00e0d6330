"""What is generated, as pure data, and the generated weights themselves.

A generator only ever yields coefficients of about unit variance. The spec owns the scale: it multiplies each
slot by the standard deviation that slot needs, so that one rule serves full, low-rank and chunked generators
(``scaled=False`` keeps the coefficients as they are, which is how the published code starts).

Shape letters: U unique conditions, P coefficients, D width, K rank.
"""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import RunError
from workbench.geometry.rank import Ranks, ranks_of_products

VERSION = 1
Mode = Literal["full", "lowrank", "vector", "tensor"]
Joins = Literal["replace", "add", "multiply"]


@dataclass(frozen=True)
class Slot:
    """One tensor to generate.

    Attributes:
        name: how the target asks for it.
        shape: shape of the weight that acts, (D_in, D_out) for a matrix and (D,) for a vector; "tensor" has
            torch's layout, (out, in, ...).
        mode: "full" generates every entry, "lowrank" two factors of a matrix, "vector" a vector, "tensor" a
            module's own parameter of two or more dimensions.
        rank: K of the factors; only for "lowrank".
        identity: the matrix is added to the identity, so the target starts at the unconditioned map.
        gain: standard deviation of what the slot does to a unit-variance input at the start.
        joins: what becomes of a module's own parameter p under the generated value g: "replace" gives g,
            "add" p + g, "multiply" p (1 + g).
    """

    name: str
    shape: tuple[int, ...]
    mode: Mode
    rank: int | None = None
    identity: bool = False
    gain: float = 1.0
    joins: Joins = "replace"

    def __post_init__(self) -> None:
        """Refuse slots that cannot act."""
        dimensions = {"vector": (1,), "tensor": range(2, 6)}.get(self.mode, (2,))
        if len(self.shape) not in dimensions or min(self.shape) < 1:
            raise ValueError(f"slot {self.name}: a {self.mode} slot cannot have shape {self.shape}")
        if (self.mode == "lowrank") != (self.rank is not None):
            raise ValueError(
                f"slot {self.name}: rank goes with mode 'lowrank' and with no other, got {self.rank}"
            )
        if self.rank is not None and not 0 < self.rank <= min(self.shape):
            raise ValueError(
                f"slot {self.name}: rank must lie in 1..{min(self.shape)} (the matrix is {self.shape}), "
                f"got {self.rank}; use mode 'full' for every entry"
            )
        square = self.mode in ("full", "lowrank") and self.shape[0] == self.shape[1]
        if self.identity and not square:
            raise ValueError(
                f"slot {self.name}: only a square matrix can start at the identity, got {self.shape}"
            )

    @property
    def parts(self) -> dict[str, tuple[tuple[int, ...], float]]:
        """Shape and starting standard deviation of each generated tensor of this slot."""
        if self.mode == "vector":
            return {self.name: (self.shape, self.gain)}
        if self.mode == "tensor":
            return {self.name: (self.shape, self.gain / math.sqrt(math.prod(self.shape[1:])))}
        fan_in, fan_out = self.shape
        if self.rank is None:
            return {self.name: (self.shape, self.gain / math.sqrt(fan_in))}
        # Each entry of down @ up has variance K * (1 / D_in) * (gain^2 / K) = gain^2 / D_in, as in "full".
        return {
            f"{self.name}.down": ((fan_in, self.rank), 1 / math.sqrt(fan_in)),
            f"{self.name}.up": ((self.rank, fan_out), self.gain / math.sqrt(self.rank)),
        }


@dataclass(frozen=True)
class ParamSpec:
    """An ordered list of slots, and the scale their coefficients are brought to."""

    slots: tuple[Slot, ...]
    scaled: bool = True

    def __post_init__(self) -> None:
        """Refuse a spec that generates nothing or one name twice."""
        names = [slot.name for slot in self.slots]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a spec needs at least one slot and no name twice, got {names}")

    @property
    def numel(self) -> int:
        """Number of coefficients P that a generator yields for one condition."""
        return sum(math.prod(shape) for slot in self.slots for shape, _ in slot.parts.values())

    def compose(self, coefficients: Float[Tensor, "U P"]) -> "GeneratedWeights":
        """Cut coefficients into the slots' tensors and bring each to its scale.

        Args:
            coefficients: one row per unique condition, about unit variance each when ``scaled``.
        """
        parts = [part for slot in self.slots for part in slot.parts.items()]
        # One split, not a slice each: the backward pass joins the gradients once.
        pieces = coefficients.split([math.prod(shape) for _, (shape, _) in parts], 1)
        tensors = {}
        for piece, (name, (shape, deviation)) in zip(pieces, parts, strict=True):
            shaped = piece.unflatten(1, shape)
            tensors[name] = shaped * deviation if self.scaled and deviation != 1 else shaped
        return GeneratedWeights(self, tensors)

    @classmethod
    def of(
        cls,
        target: nn.Module,
        include: str | Sequence[str] = "*",
        *,
        joins: Joins = "add",
        rank: int | None = None,
        gain: float = 0.3,
    ) -> "ParamSpec":
        """List parameters of a module by the pattern of their names.

        Args:
            target: any module.
            include: one or more patterns as in a shell, for example "*.weight" or "*norm*".
            joins: what becomes of the module's own values, see :class:`Slot`.
            rank: K of the factors for the weights of linear layers; other parameters come whole. Needs
                ``joins="add"``.
            gain: standard deviation of what generated weights add to a layer's output for inputs of unit
                variance; a bias has a share of it of 1 / sqrt(fan-in), as torch starts it, and the scale
                and shift of a norm have the gain itself. 0.3 leaves the module's own values in charge at the
                start; a network that is replaced whole wants sqrt(2) before a ReLU.

        Raises:
            ValueError: a pattern that matches nothing, parameters that are shared between modules, that are
                not floating point, or a rank with another joining than "add".
        """
        patterns = [include] if isinstance(include, str) else list(include)
        named = dict(target.named_parameters(remove_duplicate=False))
        for pattern in patterns:
            if not fnmatch.filter(named, pattern):
                raise ValueError(
                    f"no parameter of {type(target).__name__} is named like {pattern!r}; there are: "
                    f"{', '.join([*named][:12])}{', ...' if len(named) > 12 else ''}"
                )
        chosen = [name for name in named if any(fnmatch.fnmatchcase(name, one) for one in patterns)]
        refuse_shared(named, chosen)
        if rank is not None and joins != "add":
            raise ValueError(f"factors of rank {rank} are added to a weight; use joins='add', not {joins!r}")
        slots = []
        for name in chosen:
            parameter, (module, _, last) = named[name], name.rpartition(".")
            if not parameter.is_floating_point():
                raise ValueError(
                    f"parameter {name} holds {parameter.dtype}; only floating point is generated"
                )
            linear = last == "weight" and isinstance(target.get_submodule(module), nn.Linear)
            if rank is not None and linear:
                if not module:
                    raise ValueError("factors need a linear layer with a name; wrap it: nn.Sequential(layer)")
                shape = parameter.shape[1], parameter.shape[0]
                slots.append(Slot(module, shape, "lowrank", rank, gain=gain, joins=joins))
            elif parameter.ndim > 1:
                slots.append(Slot(name, tuple(parameter.shape), "tensor", gain=gain, joins=joins))
            else:
                weight = named.get(f"{module}.weight" if module else "weight")
                fan_in = weight[0].numel() if weight is not None and weight.ndim > 1 else 1
                # A single number is a vector of one entry.
                size = (parameter.numel(),)
                slots.append(Slot(name, size, "vector", gain=gain / math.sqrt(fan_in), joins=joins))
        return cls(tuple(slots))

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON types, with the version of this format."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "ParamSpec":
        """Rebuild a spec.

        Raises:
            RunError: written by a version of the workbench that this one does not know.
        """
        if content.get("version") != VERSION:
            raise RunError(
                f"weights spec has version {content.get('version')}, this workbench reads {VERSION}"
            )
        slots = tuple(Slot(**{**slot, "shape": tuple(slot["shape"])}) for slot in content["slots"])
        return cls(slots, content["scaled"])


def refuse_shared(named: dict[str, nn.Parameter], chosen: list[str]) -> None:
    """Refuse parameters that two modules share: to generate one is to change the other.

    Raises:
        ValueError: naming both.
    """
    for name in chosen:
        others = [other for other, one in named.items() if one is named[name] and other != name]
        if others:
            raise ValueError(
                f"parameter {name} is shared with {', '.join(others)}; leave all of them out, or untie them"
            )


@dataclass(frozen=True)
class GeneratedWeights:
    """The weights of U conditions: named tensors with a leading axis U, and what inspectors ask."""

    spec: ParamSpec
    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        """Number of conditions U."""
        return len(next(iter(self.tensors.values())))

    def to(self, device: torch.device | str) -> "GeneratedWeights":
        """Return the same weights on a device."""
        return GeneratedWeights(self.spec, {name: one.to(device) for name, one in self.tensors.items()})

    def slot(self, name: str) -> Slot:
        """Return the slot of that name.

        Raises:
            KeyError: no such slot; the message lists those there are.
        """
        found = next((slot for slot in self.spec.slots if slot.name == name), None)
        if found is None:
            raise KeyError(f"no slot {name!r}; there are: {', '.join(slot.name for slot in self.spec.slots)}")
        return found

    def matrix(self, name: str, condition: int) -> Float[Tensor, "A B"]:
        """Form one condition's weight as it acts, identity included: for looking at, never for applying.

        A vector comes as one row, a tensor of more dimensions with all but its first laid end to end.
        """
        slot = self.slot(name)
        if slot.mode == "vector":
            return self.tensors[name][condition][None]
        if slot.mode == "tensor":
            return self.tensors[name][condition].flatten(1)
        if slot.mode == "lowrank":
            weight = self.tensors[f"{name}.down"][condition] @ self.tensors[f"{name}.up"][condition]
        else:
            weight = self.tensors[name][condition]
        return weight + torch.eye(slot.shape[0], device=weight.device) if slot.identity else weight

    def inner_products(self, name: str) -> Float[Tensor, "U U"]:
        """Frobenius inner products between conditions' generated weights, the low-rank product never formed.

        <A B, A' B'> = sum of (A^T A') * (B B'^T), K x K instead of D x D per pair. In double precision, since
        differences of these are what matters.
        """
        if self.slot(name).mode != "lowrank":
            flat = self.tensors[name].flatten(1).double()
            return flat @ flat.T
        down, up = self.tensors[f"{name}.down"].double(), self.tensors[f"{name}.up"].double()
        rows = []
        for one in range(len(self)):
            left = torch.einsum("dk,udl->ukl", down[one], down)
            right = torch.einsum("ke,ule->ukl", up[one], up)
            rows.append((left * right).sum((1, 2)))
        return torch.stack(rows)

    def norms(self, name: str) -> Float[Tensor, " U"]:
        """Frobenius norm of each condition's generated weight (the identity left out); 0 or more."""
        return self.inner_products(name).diagonal().clamp_min(0).sqrt()

    def distances(self, name: str) -> Float[Tensor, "U U"]:
        """Frobenius distance between conditions' generated weights; 0 on the diagonal."""
        inner = self.inner_products(name)
        square = inner.diagonal()
        found = (square[:, None] + square[None] - 2 * inner).clamp_min(0).sqrt()
        return found.fill_diagonal_(0)

    def drift_from(self, kept: "GeneratedWeights") -> Tensor:
        """Squared distance to other weights of the same conditions, over all slots, mean over conditions.

        0 or more, with a gradient; factors are compared as they are, not their product.

        Source: von Oswald et al. (2020), arXiv 1906.00695, the regulariser of equation (2) without its
        lookahead.
        """
        parts = [(self.tensors[name] - tensor).square().sum() for name, tensor in kept.tensors.items()]
        return torch.stack(parts).sum() / len(self)

    def ranks(self, name: str) -> Ranks:
        """Effective and stable rank over conditions, with a verdict: the alarm for a collapsed generator."""
        return ranks_of_products(self.inner_products(name))

    def effective_rank(self, name: str) -> float:
        """Effective rank over conditions: exp of the entropy of the normalised spectrum of centred weights.

        Between 1 and U - 1; 1 means that all conditions move the weights along one direction, and 0 is
        returned if they do not move them at all.

        Source: see :func:`workbench.geometry.rank.ranks`.
        """
        return self.ranks(name).effective

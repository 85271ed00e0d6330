"""What is generated, as pure data, and the generated weights themselves.

A generator only ever yields coefficients of about unit variance. The spec owns the scale: it multiplies each
slot by the standard deviation that slot needs, so that one rule serves full, low-rank and chunked generators
(``scaled=False`` keeps the coefficients as they are, which is how the published code starts).

Shape letters: U unique conditions, P coefficients, D width, K rank.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import RunError

VERSION = 1
Mode = Literal["full", "lowrank", "vector"]


@dataclass(frozen=True)
class Slot:
    """One tensor to generate.

    Attributes:
        name: how the target asks for it.
        shape: shape of the weight that acts, (D_in, D_out) for a matrix and (D,) for a vector.
        mode: "full" generates every entry, "lowrank" two factors of a matrix, "vector" a vector.
        rank: K of the factors; only for "lowrank".
        identity: the matrix is added to the identity, so the target starts at the unconditioned map.
        gain: standard deviation of what the slot does to a unit-variance input at the start.
    """

    name: str
    shape: tuple[int, ...]
    mode: Mode
    rank: int | None = None
    identity: bool = False
    gain: float = 1.0

    def __post_init__(self) -> None:
        """Refuse slots that cannot act."""
        if len(self.shape) != (1 if self.mode == "vector" else 2) or min(self.shape) < 1:
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
        if self.identity and (self.mode == "vector" or self.shape[0] != self.shape[1]):
            raise ValueError(
                f"slot {self.name}: only a square matrix can start at the identity, got {self.shape}"
            )

    @property
    def parts(self) -> dict[str, tuple[tuple[int, ...], float]]:
        """Shape and starting standard deviation of each generated tensor of this slot."""
        if self.mode == "vector":
            return {self.name: (self.shape, self.gain)}
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


@dataclass(frozen=True)
class GeneratedWeights:
    """The weights of U conditions: named tensors with a leading axis U, and what inspectors ask."""

    spec: ParamSpec
    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        """Number of conditions U."""
        return len(next(iter(self.tensors.values())))

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

        A vector comes as one row.
        """
        slot = self.slot(name)
        if slot.mode == "vector":
            return self.tensors[name][condition][None]
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

    def effective_rank(self, name: str) -> float:
        """Effective rank over conditions: exp of the entropy of the normalised spectrum of centred weights.

        Between 1 and U - 1; 1 means that all conditions move the weights along one direction, and 0 is
        returned if they do not move them at all.

        Source: Roy and Vetterli (2007), The effective rank, definition 1.
        """
        inner = self.inner_products(name)
        centred = inner - inner.mean(0) - inner.mean(1, keepdim=True) + inner.mean()
        values = torch.linalg.eigvalsh(centred).clamp_min(0).sqrt()
        if values.max() <= 1e-6 * inner.diagonal().max().sqrt().clamp_min(1e-30):
            return 0.0
        share = values / values.sum()
        share = share[share > 1e-12]
        return float(torch.exp(-(share * share.log()).sum()))

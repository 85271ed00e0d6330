"""Connectors: maps from one text encoder's space into the spaces of many image encoders, all at once.

Learned one by one they are a :class:`ConnectorBank`, whose weights lie end to end so that one product maps a
batch of texts for all image encoders; generated from an encoder's code they come from a
:class:`ConnectorGenerator`.

Shape letters: B rows of a batch, X text width, Z image width, E encoders, C code width.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from workbench.hypernetworks.generators import MLPGenerator
from workbench.hypernetworks.spec import ParamSpec, Slot


class ConnectorBank(nn.Module):
    """Linear or one-hidden-layer connectors from one text width to several image widths.

    Source: APE (Rosenfeld et al. 2022, arXiv 2210.03927) for one connector; all in one product as horizontal
    fusion does (Wang et al. 2021, HFTA, arXiv 2102.02344).
    """

    def __init__(self, width: int, outputs: Sequence[int], hidden: int | None = None) -> None:
        """Start every connector as ``nn.Linear`` starts.

        Args:
            width: X.
            outputs: Z of each image encoder.
            hidden: width of a layer with ReLU between, None for linear connectors.
        """
        super().__init__()
        self.outputs, self.hidden = tuple(outputs), hidden
        self.enter = nn.Linear(width, sum(self._first))
        self.leave = nn.ModuleList([nn.Linear(hidden, size) for size in outputs] if hidden else [])

    @property
    def _first(self) -> tuple[int, ...]:
        """Rows of the first layer that belong to each connector."""
        return (self.hidden,) * len(self.outputs) if self.hidden else self.outputs

    def forward(self, texts: Float[Tensor, "B X"], which: range | None = None) -> list[Float[Tensor, "B _"]]:
        """Map texts for some neighbouring encoders, or for all; each result has unit rows."""
        which = range(len(self.outputs)) if which is None else which
        start, stop = sum(self._first[: which.start]), sum(self._first[: which.stop])
        mapped = functional.linear(texts, self.enter.weight[start:stop], self.enter.bias[start:stop])
        parts = mapped.split([self._first[place] for place in which], dim=1)
        if self.hidden:
            parts = [self.leave[place](part.relu()) for place, part in zip(which, parts, strict=True)]
        return [functional.normalize(part, dim=1) for part in parts]

    @torch.no_grad()
    def fill(self, place: int, weight: Float[Tensor, "X Z"], bias: Float[Tensor, " Z"]) -> None:
        """Start a linear connector at a known map.

        Raises:
            ValueError: the connectors have a hidden layer.
        """
        rows = self._rows(place)
        self.enter.weight[rows] = weight.T
        self.enter.bias[rows] = bias

    def linear(self, place: int) -> tuple[Float[Tensor, "X Z"], Float[Tensor, " Z"]]:
        """Return a linear connector's weight and bias as they are, not copied.

        Raises:
            ValueError: the connectors have a hidden layer.
        """
        rows = self._rows(place)
        return self.enter.weight[rows].T.detach(), self.enter.bias[rows].detach()

    def _rows(self, place: int) -> slice:
        """Return the rows of a linear connector."""
        if self.hidden:
            raise ValueError("only linear connectors start at or give a linear map; set hidden: null")
        start = sum(self.outputs[:place])
        return slice(start, start + self.outputs[place])


class ConnectorGenerator(nn.Module):
    """Linear connectors generated from a code of the image encoder; narrower encoders take the first columns.

    H(c_j) = (W_j, b_j) with W_j of shape (X, widest Z), scaled by numel^-1/2; encoder j uses the first Z_j
    columns.

    Source: Hyper-Align, the poster's L_H; sizes, scale and slicing from the authors' research code.
    """

    def __init__(
        self,
        width: int,
        outputs: Sequence[int],
        *,
        code: Literal["mean", "learned"] = "mean",
        code_width: int = 32,
        hidden: Sequence[int] = (128, 512),
    ) -> None:
        """Build the generator.

        Args:
            width: X.
            outputs: Z of each image encoder.
            code: "mean", the mean of an encoder's unit features, filled with zeros up to the widest; or
                "learned", one learned vector per encoder.
            code_width: C.
            hidden: widths of the generator's hidden layers.
        """
        super().__init__()
        self.outputs, self.widest = tuple(outputs), max(outputs)
        scale = self.widest**-0.5  # of coefficients after the slot's own 1 / sqrt(X): numel^-1/2
        slots = (
            Slot("weight", (width, self.widest), "full", gain=scale),
            Slot("bias", (self.widest,), "vector", gain=scale),
        )
        self.generator = MLPGenerator(code_width, ParamSpec(slots), hidden, unit=False)
        self.enter = nn.Linear(self.widest, code_width) if code == "mean" else None
        self.codes = nn.Embedding(len(self.outputs), code_width) if code == "learned" else None

    def code(self, places: Sequence[int], means: Sequence[Float[Tensor, " _"]]) -> Float[Tensor, "E C"]:
        """Return the codes of some encoders.

        Args:
            places: which encoders.
            means: of their unit features, read only by code "mean".
        """
        if self.codes is not None:
            return self.codes(torch.tensor(list(places), device=self.codes.weight.device))
        filled = [functional.pad(mean, (0, self.widest - len(mean))) for mean in means]
        return self.enter(torch.stack(filled).to(self.enter.weight))

    def forward(
        self, codes: Float[Tensor, "E C"], places: Sequence[int]
    ) -> list[tuple[Float[Tensor, "X _"], Float[Tensor, " _"]]]:
        """Generate weight and bias of some encoders' connectors."""
        tensors = self.generator(codes).tensors
        # Unbound, not indexed: the backward pass then stacks the gradients once.
        each = zip(places, tensors["weight"].unbind(), tensors["bias"].unbind(), strict=True)
        return [
            (weight[:, : self.outputs[place]], bias[: self.outputs[place]]) for place, weight, bias in each
        ]


def sum_by_parts(parts: Sequence[Callable[[], Tensor]], module: nn.Module) -> Float[Tensor, ""]:
    """Sum losses whose activations never live at the same time.

    Each part's gradient is taken as soon as its value is known. The result behaves like the plain sum:
    calling ``backward`` on it fills the gradients of the module's parameters.

    Args:
        parts: each computes a scalar from the module's parameters.
        module: whose parameters get gradients.
    """
    if len(parts) == 1:
        return parts[0]()
    return _ByParts.apply(parts, *[tensor for tensor in module.parameters() if tensor.requires_grad])


class _ByParts(torch.autograd.Function):
    """Value and gradients of a sum, part by part."""

    @staticmethod
    def forward(context: Any, parts: Sequence[Callable[[], Tensor]], *parameters: Tensor) -> Tensor:
        total, gradients = None, [None] * len(parameters)  # None: no part uses it, as in the plain sum
        for part in parts:
            with torch.enable_grad():
                value = part()
            for place, found in enumerate(torch.autograd.grad(value, parameters, allow_unused=True)):
                if found is not None:
                    kept = gradients[place]
                    gradients[place] = found if kept is None else kept + found
            total = value.detach() if total is None else total + value.detach()
        context.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(context: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if found is None else found * upstream for found in context.saved_tensors)

"""Generators: modules from condition embeddings to coefficients.

Shape letters: U unique conditions, T members of a set, C condition width, P coefficients.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.hypernetworks.spec import GeneratedWeights, ParamSpec


class LinearGenerator(nn.Module):
    """One linear map from a condition embedding to all coefficients, with an optional bottleneck before it.

    With ``scaled`` starts, inputs of unit variance give coefficients of unit variance, and the bias, the
    weights every condition shares, starts at zero. Otherwise the layers start as ``nn.Linear`` does, which is
    what the published code relies on.

    A table of one learned row per condition is this generator on one-hot conditions.

    Source: Hyper-CL section 3.2 (the linear hypernetwork); the scaled start follows "unit coefficients,
    spec-side scale" of Ortiz, Guttag and Dalca (2023), arXiv 2304.07645.
    """

    def __init__(
        self,
        condition_width: int,
        spec: ParamSpec,
        *,
        bottleneck: int | None = None,
        transform: bool = False,
        dropout: float = 0.1,
    ) -> None:
        """Build the generator.

        Args:
            condition_width: C.
            spec: what to generate; owns the scale.
            bottleneck: width of a linear layer before the head, which bounds the rank over conditions.
            transform: the C x C linear layer that the published code puts before the hypernetwork.
            dropout: share of condition entries dropped while training, 0 to below 1.
        """
        super().__init__()
        self.spec = spec
        self.dropout = nn.Dropout(dropout)
        self.transform = nn.Linear(condition_width, condition_width) if transform else None
        self.narrow = nn.Linear(condition_width, bottleneck) if bottleneck else None
        self.head = nn.Linear(bottleneck or condition_width, spec.numel)
        if spec.scaled:
            for layer in (self.transform, self.narrow, self.head):
                if layer is not None:
                    _start_unit(layer)

    def forward(self, conditions: Float[Tensor, "U C"]) -> GeneratedWeights:
        """Generate the weights of U unique conditions, each exactly once.

        Args:
            conditions: condition embeddings with entries of about unit variance.

        Raises:
            ValueError: embeddings of another width than the generator was built for.
        """
        _check_width(conditions, (self.transform or self.narrow or self.head).in_features)
        hidden = self.dropout(conditions)
        if self.transform is not None:
            hidden = self.dropout(self.transform(hidden))
        if self.narrow is not None:
            hidden = self.narrow(hidden)
        return self.spec.compose(self.head(hidden))

    def cost(self) -> dict[str, int]:
        """Return what the generator costs; see :func:`cost_of`."""
        return cost_of(self)


class SetGenerator(nn.Module):
    """From a set of embeddings to coefficients: the order of the set and repeating it change nothing.

    Linear, transformer without positions or mask, bottleneck, mean over the set, one linear head for all
    coefficients. The head starts near zero, so a target that adds the coefficients to its own starts almost
    as it is.

    Source: HyperCLIP, the figure of its hypernetwork; sizes, start and scale are ours, since they are not
    published.
    """

    def __init__(
        self,
        condition_width: int,
        spec: ParamSpec,
        *,
        width: int = 128,
        layers: int = 1,
        heads: int = 4,
        bottleneck: int = 32,
        tokens: int = 0,
    ) -> None:
        """Build the generator.

        Args:
            condition_width: C.
            spec: what to generate; owns the scale.
            width: of the transformer; its feed-forward layers are four times as wide.
            layers: of the transformer.
            heads: of its attention, a divisor of the width.
            bottleneck: numbers that a set is summed up in; bounds the rank over conditions.
            tokens: above 0, the set is ignored and this many learned vectors take its place: the control
                that has the same machinery and is told nothing.
        """
        super().__init__()
        self.spec = spec
        self.tokens = nn.Parameter(torch.randn(tokens, condition_width)) if tokens else None
        self.enter = nn.Linear(condition_width, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.narrow = nn.Linear(width, bottleneck)
        self.head = nn.Linear(bottleneck, spec.numel)
        nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)

    def forward(self, sets: Float[Tensor, "U T C"]) -> GeneratedWeights:
        """Generate the weights of U sets of equal size.

        Args:
            sets: members with entries of about unit variance.

        Raises:
            ValueError: embeddings of another width than the generator was built for, or an empty set.
        """
        if sets.shape[-1] != self.enter.in_features or sets.shape[1] == 0:
            raise ValueError(
                f"the generator takes sets of one or more vectors of width {self.enter.in_features}, got "
                f"{tuple(sets.shape[1:])}"
            )
        if self.tokens is not None:
            sets = self.tokens.expand(len(sets), -1, -1)
        members = self.narrow(self.transformer(self.enter(sets)))
        return self.spec.compose(self.head(members.mean(1)))

    def cost(self) -> dict[str, int]:
        """Return what the generator costs; see :func:`cost_of`."""
        return cost_of(self)


class MLPGenerator(nn.Module):
    """From a code to coefficients through hidden layers with GELU.

    The last hidden layer is normalised and the head starts so that every coefficient has unit variance,
    whatever the code; with ``unit=False`` layers start as ``nn.Linear`` does, as published.

    Source: Hyper-Align's hypernetwork, 32 -> 128 -> 512 -> all coefficients; the unit start follows Ortiz,
    Guttag and Dalca (2023), arXiv 2304.07645.
    """

    def __init__(
        self, code_width: int, spec: ParamSpec, hidden: Sequence[int] = (128, 512), *, unit: bool = True
    ) -> None:
        """Build the generator.

        Args:
            code_width: C.
            spec: what to generate; owns the scale.
            hidden: widths of the hidden layers, at least one.
            unit: start with coefficients of unit variance; false: as torch starts layers.
        """
        super().__init__()
        self.spec = spec
        self.body = _hidden_layers((code_width, *hidden), unit)
        self.head = nn.Linear(hidden[-1], spec.numel)
        if unit:
            _start_unit(self.head)

    def forward(self, codes: Float[Tensor, "U C"]) -> GeneratedWeights:
        """Generate the weights of U codes.

        Raises:
            ValueError: codes of another width than the generator was built for.
        """
        _check_width(codes, self.body[0].in_features)
        return self.spec.compose(self.head(self.body(codes)))

    def cost(self) -> dict[str, int]:
        """Return what the generator costs; see :func:`cost_of`."""
        return cost_of(self)


class ChunkedGenerator(nn.Module):
    """From a code to coefficients a chunk at a time: one small head, told which chunk by a learned vector.

    It can hold fewer numbers than it generates.

    Source: von Oswald et al. (2020), arXiv 1906.00695, section 3 (chunking); the unit start as in
    :class:`MLPGenerator`.
    """

    def __init__(
        self,
        code_width: int,
        spec: ParamSpec,
        hidden: Sequence[int] = (128, 512),
        *,
        chunk: int = 512,
        chunk_width: int = 16,
    ) -> None:
        """Build the generator.

        Args:
            code_width: C.
            spec: what to generate; owns the scale.
            hidden: widths of the hidden layers, at least one.
            chunk: coefficients generated at once.
            chunk_width: width of the vector that names a chunk.
        """
        super().__init__()
        self.spec, count = spec, math.ceil(spec.numel / chunk)
        self.chunks = nn.Parameter(torch.randn(count, chunk_width))
        self.body = _hidden_layers((code_width + chunk_width, *hidden), unit=True)
        self.head = nn.Linear(hidden[-1], chunk)
        _start_unit(self.head)

    def forward(self, codes: Float[Tensor, "U C"]) -> GeneratedWeights:
        """Generate the weights of U codes.

        Raises:
            ValueError: codes of another width than the generator was built for.
        """
        _check_width(codes, self.body[0].in_features - self.chunks.shape[1])
        shape = len(codes), len(self.chunks), -1
        pairs = torch.cat([codes[:, None].expand(shape), self.chunks.expand(shape)], -1)
        coefficients = self.head(self.body(pairs)).flatten(1)
        return self.spec.compose(coefficients[:, : self.spec.numel])

    def cost(self) -> dict[str, int]:
        """Return what the generator costs; see :func:`cost_of`."""
        return cost_of(self)


class Table(nn.Module):
    """One learned row of coefficients per condition, asked for by its number: nothing is shared.

    The per-task baseline of every hypernetwork; with factors in the spec it is LoRA.
    """

    def __init__(self, conditions: int, spec: ParamSpec) -> None:
        """Build the table of that many conditions; rows start with unit variance."""
        super().__init__()
        self.spec, self.head = spec, nn.Embedding(conditions, spec.numel)

    def forward(self, numbers: Int[Tensor, " U"]) -> GeneratedWeights:
        """Return the weights of conditions by number.

        Raises:
            ValueError: a number that the table has no row for.
        """
        size = self.head.num_embeddings
        outside = numbers[(numbers < 0) | (numbers >= size)]
        if outside.numel():
            raise ValueError(
                f"condition {int(outside[0])} of a table of {size}; give numbers from 0 to {size - 1}, or "
                "build a larger Table"
            )
        return self.spec.compose(self.head(numbers))

    def cost(self) -> dict[str, int]:
        """Return what the table costs; see :func:`cost_of`."""
        return cost_of(self)


class RandomProjection(nn.Module):
    """A fixed random linear map from a code to coefficients: nothing in it is trained, only the code is.

    Source: D'OH (2024), arXiv 2403.19163: decoder-only random hypernetworks.
    """

    def __init__(self, code_width: int, spec: ParamSpec, seed: int) -> None:
        """Draw the projection; the seed is all that has to be kept of it."""
        super().__init__()
        self.spec = spec
        draw = torch.randn(code_width, spec.numel, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("projection", draw / math.sqrt(code_width))

    def forward(self, codes: Float[Tensor, "U C"]) -> GeneratedWeights:
        """Generate the weights of U codes with entries of about unit variance."""
        _check_width(codes, len(self.projection))
        return self.spec.compose(codes @ self.projection)

    def cost(self) -> dict[str, int]:
        """Return what the generator costs; see :func:`cost_of`."""
        return cost_of(self)


def _hidden_layers(widths: Sequence[int], unit: bool) -> nn.Sequential:
    """Linear layers with GELU between and after them; with ``unit`` their last output is normalised."""
    layers = [layer for one, two in pairwise(widths) for layer in (nn.Linear(one, two), nn.GELU())]
    if unit:
        layers.append(nn.LayerNorm(widths[-1], elementwise_affine=False))
    return nn.Sequential(*layers)


def _start_unit(head: nn.Linear) -> None:
    """Start a head so that inputs of unit variance give outputs of unit variance."""
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features))
    nn.init.zeros_(head.bias)


def _check_width(codes: Tensor, width: int) -> None:
    if codes.shape[-1] != width:
        raise ValueError(f"the generator takes conditions of width {width}, got {codes.shape[-1]}")


def cost_of(generator: nn.Module) -> dict[str, int]:
    """Return parameters of a generator, generated numbers per condition, and the break-even count.

    Break-even: from how many conditions on the generator is smaller than one learned set per condition.
    """
    return cost_of_numbers(sum(one.numel() for one in generator.parameters()), generator.spec.numel)


def cost_of_numbers(parameters: int, generated: int) -> dict[str, int]:
    """Return what :func:`cost_of` does for a generator that is no module of its own.

    Args:
        parameters: that the generator holds.
        generated: numbers per condition.
    """
    return {
        "generator_parameters": parameters,
        "generated_parameters": generated,
        "break_even_conditions": math.ceil(parameters / generated),
    }


def standardise(embeddings: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
    """Bring unit-norm embeddings to entries of about unit variance, by the factor sqrt(D).

    Generators and heads expect it: the papers feed raw hidden states, whose entries have about unit variance,
    while sentence-transformers encoders end in a unit-norm layer.
    """
    return embeddings * math.sqrt(embeddings.shape[-1])


def token_scale(states: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
    """Bring every token state to zero mean and unit variance over its entries; padding stays zero.

    A few entries of a transformer's hidden state are far larger than the rest and would decide every dot
    product.
    """
    return torch.nn.functional.layer_norm(states, states.shape[-1:])

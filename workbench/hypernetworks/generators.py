"""Generators: modules from condition embeddings to coefficients.

Shape letters: U unique conditions, C condition width, P coefficients.
"""

import math

import torch
from jaxtyping import Float
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
                    nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
                    nn.init.zeros_(layer.bias)

    def forward(self, conditions: Float[Tensor, "U C"]) -> GeneratedWeights:
        """Generate the weights of U unique conditions, each exactly once.

        Args:
            conditions: condition embeddings with entries of about unit variance.

        Raises:
            ValueError: embeddings of another width than the generator was built for.
        """
        width = (self.transform or self.narrow or self.head).in_features
        if conditions.shape[-1] != width:
            raise ValueError(f"the generator takes conditions of width {width}, got {conditions.shape[-1]}")
        hidden = self.dropout(conditions)
        if self.transform is not None:
            hidden = self.dropout(self.transform(hidden))
        if self.narrow is not None:
            hidden = self.narrow(hidden)
        return self.spec.compose(self.head(hidden))

    def cost(self) -> dict[str, int]:
        """Parameters of the generator, generated numbers per condition, and the break-even count.

        Break-even: from how many conditions on the generator is smaller than one learned set per condition.
        """
        parameters = sum(tensor.numel() for tensor in self.parameters())
        generated = self.spec.numel
        return {
            "generator_parameters": parameters,
            "generated_parameters": generated,
            "break_even_conditions": math.ceil(parameters / generated),
        }


def standardise(embeddings: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
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

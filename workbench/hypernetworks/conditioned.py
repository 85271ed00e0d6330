"""Any module, some of whose parameters are generated from a condition.

Weights are passed by hand, never left inside the module: nothing is shared between two calls, an exception
leaves nothing behind, and conditions can be batched. Rows of one condition go through the module together,
and the product of two generated factors is never formed.

Shape letters: U unique conditions, C condition width, N rows, M rows of one condition.
"""

import copy

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from workbench.errors import RunError
from workbench.hypernetworks.apply import Rows
from workbench.hypernetworks.generators import cost_of
from workbench.hypernetworks.health import Health, health_of
from workbench.hypernetworks.spec import GeneratedWeights


class FactoredLinear(nn.Linear):
    """A linear layer that adds the map of two factors to its own: x W^T + b + (x down) up.

    The factors are zero here; a :class:`Conditioned` call brings the generated ones. Parameters keep their
    names, so a plain module's state dict still fits.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        """Take over a layer's parameters."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        own = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.register_buffer("down", torch.zeros(self.in_features, rank, **own), persistent=False)
        self.register_buffer("up", torch.zeros(rank, self.out_features, **own), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs; two thin products in place of one wide matrix."""
        return super().forward(inputs) + (inputs @ self.down) @ self.up


class Conditioned(nn.Module):
    """A target, and a generator of some of its parameters.

    ``model(inputs, model.weights(conditions))`` is the whole of it. A table of one learned row per condition
    in place of the generator gives the per-task baseline (with a rank, LoRA) by the same path.
    """

    def __init__(self, target: nn.Module, generator: nn.Module, *, learn_base: bool = True) -> None:
        """Join a target and a generator of its parameters.

        Args:
            target: any module; linear layers that get factors are wrapped in place.
            generator: its ``spec`` names parameters of the target, see ``ParamSpec.of``.
            learn_base: train the target's own parameters as well; those that are replaced never are.

        Raises:
            ValueError: the generator's weights are for another module: a name or a shape differs.
        """
        super().__init__()
        self.target, self.generator, self.spec = target, generator, generator.spec
        parameters = dict(target.named_parameters())
        if not learn_base:
            target.requires_grad_(False)
        for slot in self.spec.slots:
            name = f"{slot.name}.weight" if slot.mode == "lowrank" else slot.name
            expected = (slot.shape[1], slot.shape[0]) if slot.mode == "lowrank" else slot.shape
            found = parameters.get(name)
            if found is None or tuple(found.shape or (1,)) != expected:
                is_there = (
                    "it has no such parameter" if found is None else f"there it is {tuple(found.shape)}"
                )
                raise ValueError(
                    f"the generator yields {name} of shape {expected} for another module than "
                    f"{type(target).__name__}: {is_there}; make its spec with ParamSpec.of(target)"
                )
            if slot.mode == "lowrank":
                _put(target, slot.name, FactoredLinear(target.get_submodule(slot.name), slot.rank))
            elif slot.joins == "replace":
                found.requires_grad_(False)
        head = getattr(generator, "head", None)
        self._start = None if head is None else head.weight.detach().clone()

    def weights(self, conditions: Shaped[Tensor, " U *C"]) -> GeneratedWeights:
        """Generate the weights of U unique conditions, each once.

        Raises:
            ValueError: conditions of another width than the generator was built for.
            RunError: the generator yields NaN or infinity.
        """
        found = self.generator(conditions)
        for name, tensor in found.tensors.items():
            if not torch.isfinite(tensor).all():
                raise RunError(
                    f"the generator yields NaN or infinity for {name}; look at the conditions, lower the "
                    "learning rate or clip gradients"
                )
        return found

    def parameters_of(self, weights: GeneratedWeights) -> dict[str, Tensor]:
        """Join generated values with the target's own, one tensor per name with a leading axis U."""
        own, found = dict(self.target.named_parameters()), {}
        for slot in self.spec.slots:
            if slot.mode == "lowrank":
                found |= {name: weights.tensors[name] for name in slot.parts}
                continue
            base, made = own[slot.name], weights.tensors[slot.name]
            made = made.view(len(weights), *base.shape)
            found[slot.name] = {
                "replace": lambda _, made: made,
                "add": lambda base, made: base + made,
                "multiply": lambda base, made: base * (1 + made),
            }[slot.joins](base, made)
        return found

    def forward(self, inputs: Tensor, weights: GeneratedWeights, rows: Rows | Tensor | None = None) -> Tensor:
        """Apply the target under generated weights.

        Args:
            inputs: for one condition what the target takes; for several ``[U, M, ...]``, a batch of each
                condition, or with ``rows`` ``[N, ...]``, one row each.
            weights: of U conditions.
            rows: which condition each row uses, as indices or grouped by :class:`Rows`; rows of one
                condition are computed together.

        Raises:
            ValueError: a number of conditions or rows that does not fit, or BatchNorm in training mode under
                several conditions.
        """
        tensors = self.parameters_of(weights)
        if rows is None and len(weights) == 1:
            return functional_call(self.target, {name: one[0] for name, one in tensors.items()}, (inputs,))
        self._refuse_running_statistics()
        if rows is None:
            if len(inputs) != len(weights):
                raise ValueError(
                    f"{len(weights)} conditions need inputs of shape [{len(weights)}, M, ...] or rows=, got "
                    f"{tuple(inputs.shape)}"
                )
            return self._each(inputs, tensors)
        grouped = rows if isinstance(rows, Rows) else Rows.of(rows)
        if len(grouped) != len(inputs) or int(grouped.unique.max()) >= len(weights):
            raise ValueError(
                f"rows name {len(grouped)} rows and conditions up to {int(grouped.unique.max())}, there are "
                f"{len(inputs)} inputs and {len(weights)} conditions"
            )
        ordered = {name: one.index_select(0, grouped.unique) for name, one in tensors.items()}

        def block(span: slice, part: Tensor) -> Tensor:
            return self._each(part, {name: one[span] for name, one in ordered.items()})

        return grouped.apply(inputs, block)

    def _each(self, inputs: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """Send ``inputs[u]`` through the target with ``tensors[...][u]``; U and M stay leading axes."""

        def one(own: dict[str, Tensor], part: Tensor) -> Tensor:
            return functional_call(self.target, own, (part,))

        return vmap(one, randomness="different")(tensors, inputs)

    def _refuse_running_statistics(self) -> None:
        for name, module in self.target.named_modules():
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
                raise ValueError(
                    f"{name or 'the target'} is {type(module).__name__} in training mode, whose running "
                    "statistics cannot be kept for several conditions at once; call eval() on it, use "
                    "GroupNorm, or give one condition per batch"
                )

    @torch.no_grad()
    def freeze(self, condition: Shaped[Tensor, " *C"]) -> nn.Module:
        """Return the target with one condition's weights baked in: a plain module with a plain state dict."""
        weights = self.weights(condition[None])
        plain = copy.deepcopy(self.target)
        tensors, own = self.parameters_of(weights), dict(plain.named_parameters())
        for slot in self.spec.slots:
            if slot.mode != "lowrank":
                own[slot.name].copy_(tensors[slot.name][0])
                continue
            factored = plain.get_submodule(slot.name)
            layer = nn.Linear(factored.in_features, factored.out_features, bias=False)
            # The same parameters, so that a bias that is generated as well lands in it.
            layer.weight, layer.bias = factored.weight, factored.bias
            layer.weight += weights.matrix(slot.name, 0).T
            _put(plain, slot.name, layer)
        return plain.requires_grad_(True)

    @torch.no_grad()
    def health(self, conditions: Shaped[Tensor, " U *C"], inputs: Tensor | None = None) -> Health:
        """Say whether the generator trained, conditions move the weights and weights the output.

        Args:
            conditions: distinct ones.
            inputs: for one condition; each is computed under every condition.
        """
        outputs = None
        if inputs is not None:
            weights = self.weights(conditions)
            outputs = self(inputs.expand(len(conditions), *inputs.shape), weights)
        return health_of(self.generator, conditions, self._start, outputs)

    def cost(self) -> dict[str, int]:
        """Return what the generator costs; see :func:`~workbench.hypernetworks.generators.cost_of`."""
        return cost_of(self.generator)


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    """Put a part in place of the one of that name."""
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, part)

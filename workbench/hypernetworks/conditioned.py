"""Any module, some of whose parameters are generated from a condition.

Weights are passed by hand, never left inside the module: nothing is shared between two calls, an exception
leaves nothing behind, and conditions can be batched. Rows of one condition go through the module together,
and the product of two generated factors is never formed.

Shape letters: U unique conditions, C condition width, N rows, M rows of one condition.
"""

import copy
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from workbench.errors import RunError
from workbench.hypernetworks.apply import Rows
from workbench.hypernetworks.calls import Tree, call_each
from workbench.hypernetworks.generators import cost_of
from workbench.hypernetworks.health import Health, health_of_weights
from workbench.hypernetworks.spec import GeneratedWeights, Slot, refuse_shared


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

    def __init__(
        self, target: nn.Module, generator: nn.Module, *, learn_base: bool = True, one_by_one: bool = False
    ) -> None:
        """Join a target and a generator of its parameters.

        Args:
            target: any module; linear layers that get factors are wrapped in place.
            generator: its ``spec`` names parameters of the target, see ``ParamSpec.of``.
            learn_base: train the target's own parameters as well; those that are replaced never are.
            one_by_one: compute several conditions in turn, not together. It takes modules that branch on the
                values of a tensor, as transformers do on the mask of the tokens. It is slower for many
                conditions of few rows, and on a CPU faster for convolutions under few conditions.

        Raises:
            ValueError: the generator's weights are for another module: a name or a shape differs; or for
                parameters that two parts of this one share.
        """
        super().__init__()
        self.target, self.generator, self.spec = target, generator, generator.spec
        self.one_by_one = one_by_one
        parameters = dict(target.named_parameters(remove_duplicate=False))
        names = {
            slot.name: f"{slot.name}.weight" if slot.mode == "lowrank" else slot.name
            for slot in self.spec.slots
        }
        refuse_shared(parameters, [name for name in names.values() if name in parameters])
        if not learn_base:
            target.requires_grad_(False)
        for slot in self.spec.slots:
            name = names[slot.name]
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
            # One pass and no memory; a sum of finite numbers may overflow, so only then each is looked at.
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                raise RunError(
                    f"the generator yields NaN or infinity for {name}; look at the conditions, lower the "
                    "learning rate or clip gradients"
                )
        return found

    def parameters_of(self, weights: GeneratedWeights) -> dict[str, Tensor]:
        """Join generated values with the target's own, one tensor per name with a leading axis U.

        Raises:
            ValueError: weights that were generated for another module.
        """
        self._refuse_others(weights)
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

    def _refuse_others(self, weights: GeneratedWeights) -> None:
        """Refuse weights of another spec, and tensors that are not what their spec says."""
        differs = []
        if weights.spec not in (self.spec, self.generator.spec):
            mine, theirs = (
                {slot.name: _told(slot) for slot in spec.slots} for spec in (self.spec, weights.spec)
            )
            pairs = ((name, mine.get(name, "missing"), theirs.get(name, "missing")) for name in mine | theirs)
            differs = [one for one in pairs if one[1] != one[2]]
        for slot in () if differs else self.spec.slots:
            for name, (shape, _) in slot.parts.items():
                found = weights.tensors.get(name)
                if found is None or tuple(found.shape[1:]) != shape:
                    differs.append((name, shape, "missing" if found is None else tuple(found.shape[1:])))
        if differs:
            name, expected, found = differs[0]
            raise ValueError(
                f"the weights were generated for another module than {type(self.target).__name__}: {name} is "
                f"{found}, here it is {expected}; give what this model's own weights(conditions) returns"
            )

    def forward(
        self,
        inputs: Tensor,
        weights: GeneratedWeights,
        rows: Rows | Tensor | None = None,
        *more: Any,
        **named: Any,
    ) -> Any:
        """Apply the target under generated weights.

        Args:
            inputs: the target's first argument; for one condition what the target takes; for several
                ``[U, M, ...]``, a batch of each condition, or with ``rows`` ``[N, ...]``, one row each.
            weights: of U conditions.
            rows: which condition each row uses, as N integers from 0 to U - 1 or grouped by :class:`Rows`;
                rows of one condition are computed together.
            *more: further arguments of the target. Under several conditions, tensors (in tuples and dicts
                too) as long as ``inputs`` go with its rows, also one that has that length by chance; all else
                is passed as it is to every condition.
            **named: keyword arguments of the target, likewise.

        Returns:
            What the target returns, tuple, dict or model output alike; tensors under several conditions are
            laid out as ``inputs``.

        Raises:
            ValueError: weights of another module, a number of conditions or rows that does not fit, rows
                that name no condition, BatchNorm in training mode under several conditions, a module that
                cannot be computed for several conditions together, or with ``rows`` an output without a row
                per input.
        """
        tensors = self.parameters_of(weights)
        if rows is None and len(weights) == 1:
            one = {name: of_all[0] for name, of_all in tensors.items()}
            return functional_call(self.target, one, (inputs, *more), named)
        self._refuse_running_statistics()
        parts, call = Tree.take(((inputs, *more), named), lambda one: one.ndim and len(one) == len(inputs))
        if rows is None:
            if len(inputs) != len(weights):
                raise ValueError(
                    f"{len(weights)} conditions need inputs of shape [{len(weights)}, M, ...] or rows=, got "
                    f"{tuple(inputs.shape)}"
                )
            found, form = call_each(self.target, tensors, call, parts, one_by_one=self.one_by_one)
            return form.fill(found)
        _refuse_rows(rows, len(inputs), len(weights))
        grouped = rows if isinstance(rows, Rows) else Rows.of(rows.long())
        return self._by_rows(tensors, call, parts, grouped)

    def _by_rows(self, tensors: dict[str, Tensor], call: Tree, parts: list[Tensor], rows: Rows) -> Any:
        """Send each row through the target under the weights of its condition."""
        ordered, whole = tensors, len(next(iter(tensors.values())))
        if not torch.equal(rows.unique, torch.arange(whole, device=rows.unique.device)):
            ordered = {name: one.index_select(0, rows.unique) for name, one in tensors.items()}
        forms = []

        def block(span: slice, some: list[Tensor]) -> list[Tensor]:
            own = {name: one[span] for name, one in ordered.items()}
            found, form = call_each(self.target, own, call, some, one_by_one=self.one_by_one)
            forms.append(form)
            for place, one in enumerate(found):
                if one.shape[1:2] != some[0].shape[1:2]:
                    raise ValueError(
                        f"output {place} of {type(self.target).__name__} has shape {tuple(one.shape[1:])} "
                        f"for {some[0].shape[1]} inputs; with rows= each output needs a row per input, so "
                        "give a batch of each condition, [U, M, ...], without rows="
                    )
            return found

        found = rows.apply_all(parts, block)
        return forms[-1].fill(found)

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
    def health(
        self, conditions: Shaped[Tensor, " U *C"], inputs: Tensor | None = None, *more: Any, **named: Any
    ) -> Health:
        """Say whether the generator trained, conditions move the weights and weights the output.

        Args:
            conditions: distinct ones.
            inputs: for one condition; each is computed under every condition.
            *more: further arguments of the target, for one condition as well.
            **named: its keyword arguments.

        Raises:
            RunError: the generator yields NaN or infinity.
        """
        weights, outputs = self.weights(conditions), None
        if inputs is not None:
            self._refuse_running_statistics()
            tensors = self.parameters_of(weights)
            _, call = Tree.take(((inputs, *more), named), lambda _: False)
            found, _ = call_each(self.target, tensors, call, [], one_by_one=self.one_by_one)
            parts = [one.reshape(len(one), -1) for one in found if one.is_floating_point()]
            outputs = torch.cat(parts, 1) if parts else None
        head = None if self._start is None else self.generator.head.weight
        own = dict(self.target.named_parameters())
        return health_of_weights(weights, head, self._start, outputs, own)

    def cost(self) -> dict[str, int]:
        """Return what the generator costs; see :func:`~workbench.hypernetworks.generators.cost_of`."""
        return cost_of(self.generator)

    def card(self, conditions: Shaped[Tensor, " U *C"], inputs: Tensor) -> dict[str, dict[str, Any]]:
        """Return what a run's card says of a generator: cost and health.

        Args:
            conditions: distinct ones.
            inputs: for one condition; each is computed under every condition.
        """
        return {"cost": self.cost(), "health": self.health(conditions, inputs).to_dict()}


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    """Put a part in place of the one of that name."""
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, part)


def _refuse_rows(rows: Rows | Tensor, inputs: int, conditions: int) -> None:
    """Refuse rows that are not one condition's number for each input."""
    ids = rows.unique if isinstance(rows, Rows) else rows
    shape = (len(rows),) if isinstance(rows, Rows) else tuple(rows.shape)
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    told = f"of shape {shape} and type {ids.dtype}"
    if whole and ids.numel():
        low, high = torch.stack(torch.aminmax(ids.long())).tolist()
        if shape == (inputs,) and low >= 0 and high < conditions:
            return
        told = f"from {low} to {high}, {told}"
    raise ValueError(
        f"rows= takes for each input the number of its condition: integers from 0 to {conditions - 1}, as "
        f"many as inputs ({inputs}) and at least one; got numbers {told}"
    )


def _told(slot: Slot) -> str:
    """Describe what of a slot has to agree; its scale may differ."""
    rank = "" if slot.rank is None else f" of rank {slot.rank}"
    return (
        f"{slot.mode} {slot.shape}{rank}{', on the identity' if slot.identity else ''}, joins {slot.joins!r}"
    )

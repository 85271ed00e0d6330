"""A module's arguments and outputs, whatever their form: tensors that go with their rows, and the rest.

Arguments and outputs are trees: tuples, lists, dicts and what is registered as one, such as the outputs of
Hugging Face models. Tensors are taken out, sent through, and put back where they stood.

Shape letters: U conditions, M rows of one condition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_TAKEN = object()


@dataclass(frozen=True)
class Tree:
    """A tree some of whose tensors were taken out.

    Attributes:
        leaves: what stayed, and a mark for each tensor that was taken.
        form: how the leaves hang together.
    """

    leaves: tuple[Any, ...]
    form: TreeSpec

    @classmethod
    def take(cls, tree: Any, chosen: Callable[[Tensor], bool]) -> tuple[list[Tensor], "Tree"]:
        """Take out the tensors that are chosen, in order."""
        leaves, form = tree_flatten(tree)
        taken = [isinstance(leaf, Tensor) and chosen(leaf) for leaf in leaves]
        rest = (_TAKEN if gone else leaf for gone, leaf in zip(taken, leaves, strict=True))
        return [leaf for gone, leaf in zip(taken, leaves, strict=True) if gone], cls(tuple(rest), form)

    def fill(self, tensors: list[Tensor]) -> Any:
        """Put as many tensors back as were taken."""
        given = iter(tensors)
        return tree_unflatten([next(given) if leaf is _TAKEN else leaf for leaf in self.leaves], self.form)


def call_each(
    target: nn.Module,
    own: dict[str, Shaped[Tensor, "U ..."]],
    call: Tree,
    parts: list[Shaped[Tensor, "U ..."]],
    *,
    one_by_one: bool = False,
) -> tuple[list[Shaped[Tensor, "U ..."]], Tree]:
    """Call a module under the parameters of each condition.

    Args:
        target: the module.
        own: parameters by name, those of U conditions.
        call: positional and keyword arguments, ``(arguments, keywords)``.
        parts: what was taken out of them; the u-th of each goes with the u-th parameters.
        one_by_one: loop over conditions in place of vmap.

    Returns:
        The outputs' tensors, and what they are to be put into.

    Raises:
        ValueError: a module that vmap cannot take, or an output that holds other than tensors and constants.
    """
    outputs: list[Tree] = []

    def one(own: dict[str, Tensor], parts: list[Tensor]) -> list[Tensor]:
        arguments, keywords = call.fill(parts)
        tensors, rest = Tree.take(functional_call(target, own, arguments, keywords), lambda _: True)
        for leaf in rest.leaves:
            if leaf is not _TAKEN and not isinstance(leaf, bool | int | float | str | None):
                raise ValueError(
                    f"{type(target).__name__} gives back a {type(leaf).__name__}, which cannot be joined "
                    "over several conditions; have it return tensors only (of a transformer: use_cache=False)"
                )
        outputs.append(rest)
        return tensors

    if one_by_one:
        count = len(next(iter(own.values())))
        found = [
            one({name: of_all[u] for name, of_all in own.items()}, [part[u] for part in parts])
            for u in range(count)
        ]
        return [torch.stack(each) for each in zip(*found, strict=True)], outputs[-1]
    try:
        return vmap(one, randomness="different")(own, parts), outputs[-1]
    except RuntimeError as problem:
        if not str(problem).startswith("vmap:"):
            raise
        raise ValueError(
            f"{type(target).__name__} does what cannot be done for several conditions together ({problem}); "
            "build the model with Conditioned(..., one_by_one=True)"
        ) from problem

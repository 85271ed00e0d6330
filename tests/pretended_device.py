"""A device that is not there: its tensors compute on the CPU, and meet none of the CPU's.

With it, code for accelerators is tested where there is none: what was not moved, is mixed, or is read as
NumPy without being brought back fails as it would on a GPU. Speed, streams and rounding are not pretended.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "pretended"
_aten = torch.ops.aten


class _Hook(torch._C._acc.PrivateUse1Hooks):
    """Nobody who looks for an accelerator finds this one; it has to be named."""

    def is_available(self) -> bool:
        """Never."""
        return False

    def has_primary_context(self, device: int) -> bool:
        """Ask for nothing to be prepared."""
        return True

    def is_built(self) -> bool:
        """Torch knows the device."""
        return True


class _Module:
    """What torch asks of a device's module."""

    is_available = is_initialized = _is_in_bad_fork = staticmethod(lambda: False)
    current_device = device_count = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)


_setup_privateuseone_for_python_backend(DEVICE, backend_module=_Module(), hook=_Hook())
# A GPU's tensor may be indexed by the CPU's.
_TOGETHER = (_aten.cat.default, _aten.stack.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


class There(torch.Tensor):
    """A tensor on the device; what it holds lies on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "There":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device(DEVICE, 0), requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    def tolist(self) -> Any:
        """Torch refuses this for subclasses; real devices copy."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on what is held."""
        return _computed(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """As long as it is entered, tensors can be made on the device and moved there and back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As tensors on the device do."""
        return _computed(func, args, kwargs or {})


def _held(tensor: torch.Tensor) -> torch.Tensor:
    while isinstance(tensor, There):
        tensor = tensor.held
    return tensor


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    there, asked = [one for one in tensors if isinstance(one, There)], kwargs.get("device")
    moves = func in (_aten._to_copy.default, _aten.copy_.default)
    indexed = func in _INDEXED and isinstance(args[0], There)
    # Numbers may come from the CPU, but not where tensors are put together.
    apart = [one for one in tensors if not isinstance(one, There)]
    here = [one for one in apart if one.ndim or func in _TOGETHER]
    if there and here and not moves and not indexed:
        raise RuntimeError(f"{func} mixes devices: {[tuple(one.shape) for one in here]} are on the CPU")
    named = asked is not None and torch.device(asked).type == DEVICE
    goes = named or (asked is None and bool(there))
    inner, options = tree_map_only(torch.Tensor, _held, (args, kwargs))
    found = func(*inner, **({**options, "device": "cpu"} if named else options))
    if func._schema.name.endswith("_") and not func._schema.name.endswith("__"):  # in place
        return args[0]
    if not goes:
        return found
    known = {id(one.held): one for one in there}

    def shown(one: torch.Tensor) -> There:
        return one if isinstance(one, There) else known[id(one)] if id(one) in known else There(one)

    with torch.inference_mode(False):  # else views of what was made outside it could not be taken inside
        return tree_map_only(torch.Tensor, shown, found)


def _empty(size: Any, stride: Any, dtype: Any = None, **_: Any) -> There:
    return There(torch.empty_strided(size, stride, dtype=dtype))


def _copied(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _held(target).copy_(_held(source))
    return target


_LIBRARY = torch.library.Library("aten", "IMPL")  # for what torch does below modes: tensors of Python lists
_LIBRARY.impl("empty_strided", _empty, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copied, "PrivateUse1")

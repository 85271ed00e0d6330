"""Floating-point operations as torch's counter sees them, with factorisations added by their usual formulas.

Products are counted exactly, elementwise work and optimiser steps not at all, as in the papers; a step is
counted once and multiplied, since every step of a training has the same shapes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

Result = TypeVar("Result")


def _square(shape: Sequence[int]) -> int:
    return math.prod(shape[:-2]) * shape[-1] ** 3


def _cholesky(shape: Sequence[int], *_: Any, **__: Any) -> int:
    """n^3 / 3."""
    return _square(shape) // 3


def _triangular(shape: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """n^2 k, from whichever side."""
    return shape[-1] * math.prod(right)


def _cholesky_solve(right: Sequence[int], factor: Sequence[int], *_: Any, **__: Any) -> int:
    """Two triangular solutions: 2 n^2 k."""
    return 2 * factor[-1] * math.prod(right)


def _eigh(shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Symmetric eigendecomposition with vectors, about 9 n^3 (Golub and Van Loan, section 8.3)."""
    return 9 * _square(shape)


def _svd(shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Thin singular value decomposition, about 6 m n^2 + 20 n^3, m >= n (Golub and Van Loan, 8.6)."""
    small, large = sorted(shape[-2:])
    return math.prod(shape[:-2]) * (6 * large * small**2 + 20 * small**3)


def _solve(shape: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """LU factorisation and two triangular solutions: 2/3 n^3 + 2 n^2 k."""
    return 2 * _square(shape) // 3 + 2 * shape[-1] * math.prod(right)


_FACTORISATIONS = {
    torch.ops.aten.linalg_cholesky_ex: _cholesky,
    torch.ops.aten.linalg_solve_triangular: _triangular,
    torch.ops.aten.cholesky_solve: _cholesky_solve,
    torch.ops.aten._cholesky_solve_helper: _cholesky_solve,
    torch.ops.aten._linalg_eigh: _eigh,
    torch.ops.aten._linalg_svd: _svd,
    torch.ops.aten._linalg_solve_ex: _solve,
}


def count_flops(action: Callable[[], Result]) -> tuple[Result, int]:
    """Run an action once and return its result and how many floating-point operations it took."""
    with FlopCounterMode(display=False, custom_mapping=_FACTORISATIONS) as counter:
        result = action()
    return result, counter.get_total_flops()

"""Operators that ONNX or ONNX Runtime lacks, written with others that they have.

Axes: C rows of a system, R right sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["decomposition_table"]


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """Return ``log(1 + e^(beta x)) / beta``, of which ONNX Runtime has no float64 form.

    Example:
        >>> x = torch.tensor([-100.0, 0.0, 3.0], dtype=torch.float64)
        >>> bool(torch.allclose(_softplus(x), torch.nn.functional.softplus(x)))
        True
    """
    scaled = x * beta
    return (scaled.clamp(min=0) + (1 + (-scaled.abs()).exp()).log()) / beta


def _solve_triangular(
    system: Tensor, right: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """Solve a lower triangular system whose diagonal is 1, by products of matrices alone.

    With N what lies below the diagonal, ``(1 + N)^-1 = (1 - N)(1 + N^2)(1 + N^4) ...``, which ends
    since N^C is 0.

    Raises:
        NotImplementedError: The system is another one.

    Example:
        >>> system = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 2.0, 1.0]])
        >>> x = _solve_triangular(system, torch.eye(3), upper=False, unitriangular=True)
        >>> bool(torch.allclose(system @ x, torch.eye(3)))
        True
    """
    if upper or not left or not unitriangular:
        raise NotImplementedError("a triangular system that is not lower with ones")
    power, solved, reached = -system.tril(-1), right, 1
    while reached < system.shape[-1]:
        solved = solved + power @ solved
        power, reached = power @ power, 2 * reached
    return solved


def _running_extreme(x: Tensor, dim: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """Largest (or smallest) of each value and those before it, and where it is.

    By a comparison of all pairs: for axes of some hundreds, as of traces.

    Example:
        >>> x = torch.tensor([[1.0, 3.0, 2.0]])
        >>> _running_extreme(x, 1, largest=True)[0]
        tensor([[1., 3., 3.]])
    """
    moved = x.movedim(dim, -1)
    number = torch.arange(moved.shape[-1], device=x.device)
    before = number <= number[:, None]
    never = -torch.inf if largest else torch.inf
    pairs = torch.where(before, moved[..., None, :], never)
    values, places = pairs.max(-1) if largest else pairs.min(-1)
    return values.movedim(-1, dim), places.movedim(-1, dim)


def _cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _running_extreme(x, dim, largest=True)


def _cummin(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _running_extreme(x, dim, largest=False)


def decomposition_table() -> Mapping[Any, Callable[..., Any]]:
    """Return what takes the place of operators before a network becomes ONNX."""
    aten = torch.ops.aten
    return {
        aten.softplus.default: _softplus,
        aten.linalg_solve_triangular.default: _solve_triangular,
        aten.cummax.default: _cummax,
        aten.cummin.default: _cummin,
    }

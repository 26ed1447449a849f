"""Eigenvectors of many matrices, on the device or on the CPU, whichever is faster.

CUDA has a batched solver for small matrices only; larger ones go one after the other, each slower
than on a core of the CPU. Which is faster depends on both, so it is measured at first use.

Axes: M matrices, D rows.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fulgurite.devices import read_clock

__all__ = ["eigh", "fastest_device"]

_SMALL = 32  # rows of the largest matrices that CUDA's batched solver takes
_SAMPLE = 8  # matrices of a measurement
_CPU = torch.device("cpu")

# by device and size, rounded up to a power of two
_solver_devices: dict[tuple[torch.device, int], torch.device] = {}


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, smallest first, and eigenvectors as columns, of symmetric matrices.

    On the CPU this is :func:`torch.linalg.eigh`. In deterministic mode no clock may decide how
    results are rounded: matrices that CUDA does not solve in batches then go to the CPU.

    Args:
        matrices: Symmetric matrices. Shape: (..., D, D).

    Returns:
        Eigenvalues and eigenvectors. Shapes: (..., D) and (..., D, D), on the device of
        ``matrices``.

    Example:
        >>> eigh(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))[0]
        tensor([1., 2.])

    Source: inferred; pytorch issue 174674 (batches of eigh on CUDA).
    """
    device, size = matrices.device, matrices.shape[-1]
    if device.type == "cpu" or size <= _SMALL or not matrices.numel():
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors
    batch = matrices.reshape(-1, size, size)
    if torch.are_deterministic_algorithms_enabled():
        solver = _CPU
    else:
        key = device, 1 << (size - 1).bit_length()
        if key not in _solver_devices:
            _solver_devices[key] = fastest_device(batch[:_SAMPLE])
        solver = _solver_devices[key]
    values, vectors = _solve(batch, solver)
    return values.view(matrices.shape[:-1]), vectors.view(matrices.shape)


def fastest_device(
    matrices: Tensor, clock: Callable[[torch.device], float] = read_clock
) -> torch.device:
    """The CPU, or the device of the matrices where it is faster.

    Args:
        matrices: A sample of the matrices to be solved. Shape: (M, D, D).
        clock: Reads the time [s] once a device has finished its queued work.
    """
    device = matrices.device
    _solve(matrices[:1], device)  # the first call loads libraries
    times = []
    for solver in (device, _CPU):
        begun = clock(device)
        _solve(matrices, solver)
        times.append(clock(device) - begun)
    return device if times[0] < times[1] else _CPU


def _solve(matrices: Tensor, solver: torch.device) -> tuple[Tensor, Tensor]:
    """Solve on a device, on the CPU in threads; results come back to the device."""
    if solver == matrices.device:
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors
    parts = matrices.to(solver).tensor_split(min(torch.get_num_threads(), len(matrices)))
    with ThreadPoolExecutor(len(parts)) as threads:
        solved = list(threads.map(torch.linalg.eigh, parts))
    values, vectors = (torch.cat(batches) for batches in zip(*solved, strict=True))
    return values.to(matrices.device), vectors.to(matrices.device)

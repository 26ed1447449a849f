"""What code that runs on a CPU and on a GPU needs of both.

A number that Python asks a GPU for (``float``, ``bool``, ``tolist``, a mask as index) and a copy
from ordinary memory make the host wait until the GPU has done all that it was given. Some
operations are refused there by ``torch.use_deterministic_algorithms(True)``; here they are made
of others.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["count_weighted", "lower_median", "move", "pins_memory", "read_clock", "running_sum"]


def pins_memory() -> bool:
    """Whether loaders should give batches in pinned memory: where a CUDA device can read it.

    Source: ``pin_memory`` of :class:`torch.utils.data.DataLoader`.
    """
    return torch.cuda.is_available()


def move(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor of the host to a device without waiting for what the device is doing.

    From ordinary memory too: CUDA then takes its copy of the source before it returns, so that the
    source may change afterwards. In the other direction this waits.

    Args:
        tensor: Any shape.
        device: Where it is wanted.
        dtype: Type that is wanted; by default the tensor's.

    Example:
        >>> move(torch.arange(2), "cpu", torch.float32)
        tensor([0., 1.])

    Source: "API synchronization behavior" in the documentation of the CUDA runtime.
    """
    device = torch.device(device)
    dtype = tensor.dtype if dtype is None else dtype
    # a copy to the host that does not wait could be read before it is there
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")


def read_clock(device: torch.device | str) -> float:
    """The clock [s], once the device has done all that it was given.

    Example:
        >>> begun = read_clock("cpu")
        >>> read_clock("cpu") >= begun
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def running_sum(x: Tensor) -> Tensor:
    """Sums of the first 1, 2, … entries of the last axis, also where ``cumsum`` is refused.

    Shape: (..., N), kept.

    Example:
        >>> running_sum(torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 3., 6.])
    """
    return x.cumsum(-1) if x.device.type == "cpu" or not x.is_floating_point() else _doubled_sum(x)


def _doubled_sum(x: Tensor) -> Tensor:
    """Running sums in log2 N additions, each of sums twice as long as before."""
    reach = 1
    while reach < x.shape[-1]:
        x = x + F.pad(x[..., :-reach], (reach, 0))
        reach *= 2
    return x


def lower_median(x: Tensor, dim: int) -> Tensor:
    """The median along an axis, the lower of the middle two, equal to ``x.median(dim).values``.

    Args:
        x: Without NaN. Shape: (..., N, ...).
        dim: The axis.

    Shape: to (..., ...), without the axis.

    Example:
        >>> lower_median(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 1)
        tensor([2.])
    """
    if x.device.type == "cpu":
        return x.median(dim).values
    return x.sort(dim).values.select(dim, (x.shape[dim] - 1) // 2)


def count_weighted(cells: Tensor, weight: Tensor, size: int) -> Tensor:
    """Sum of the weights in each cell, equal to ``cells.bincount(weight, size)``.

    Args:
        cells: From 0 to ``size`` − 1, int64. Shape: (N,).
        weight: Floating. Shape: (N,).
        size: Number of cells.

    Shape: to (size,).

    Example:
        >>> count_weighted(torch.tensor([2, 0, 2]), torch.tensor([1.0, 0.5, 1.0]), 4)
        tensor([0.5000, 0.0000, 2.0000, 0.0000])
    """
    return weight.new_zeros(size).index_add_(0, cells, weight)

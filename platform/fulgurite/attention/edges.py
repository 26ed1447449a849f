"""Additive masks of rectangles of scores at the edge of what queries see, made on a device.

Axes: M queries, N keys.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CACHED_MASKS", "MOST_PIECES", "Edge", "cached_edge_bias", "copy_to_device", "edge_bias"]

#: How many biases a GPU keeps: those of a window's edge are the same all along the sequence.
CACHED_MASKS = 2

#: Pieces of an edge from which on the numbers of its rows are copied to the device.
MOST_PIECES = 8


class Edge(NamedTuple):
    """What is seen of a rectangle.

    Attributes:
        queries: M'.
        keys: N'.
        pieces: Ranges of rows, each with the slope, and the value at its first row, of the first
            key that is seen and of the key behind the last.
    """

    queries: int
    keys: int
    pieces: tuple[tuple[int, int, tuple[int, int], tuple[int, int]], ...]


def edge_bias(edge: Edge, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask of a rectangle, made on the device alone. Shape: (1, 1, M', N')."""
    columns = torch.arange(edge.keys, device=device)
    bias = torch.zeros(edge.queries, edge.keys, dtype=dtype, device=device)
    for begin, behind, (first_slope, first), (end_slope, end) in edge.pieces:
        rows = torch.arange(behind - begin, device=device)[:, None]
        hidden = columns < rows * first_slope + first
        hidden |= columns >= rows * end_slope + end
        bias[begin:behind].masked_fill_(hidden, -torch.inf)
    return bias[None, None]


@functools.lru_cache(maxsize=CACHED_MASKS)
def cached_edge_bias(edge: Edge, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same, of which the last few are kept; it must not be changed."""
    return edge_bias(edge, dtype, device)


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host; a GPU does not wait for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

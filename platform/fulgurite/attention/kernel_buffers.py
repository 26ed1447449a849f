"""Memory that kernels allocate beside their results, and copies that they need of their inputs."""

from __future__ import annotations

from typing import NamedTuple

from fulgurite.arithmetic import ceil_div
from fulgurite.attention.kernels import TileKernelNames

__all__ = ["TileSizes", "buffer_bytes"]

_ALIGNMENT = 8  # numbers that kernels of CUDA load at once
_FLASH_ROWS, _FLASH_WIDTH = 128, 32  # blocks to which flash rounds its accumulators
_FLOAT = 4  # bytes of a float32, in which all kernels accumulate


class TileSizes(NamedTuple):
    """Sizes of the largest tile of a plan.

    Attributes:
        batch: Batch entries at once.
        heads: Query heads at once.
        kv_heads: Key/value heads at once.
        queries: Rows.
        keys: Columns.
        head_dim: D.
        value_dim: E.
        itemsize: Bytes of a number of query, key and value.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    itemsize: int

    @property
    def width(self) -> int:
        """The size that kernels of CUDA get for queries, keys and values alike."""
        width = max(self.head_dim, self.value_dim)
        return width + -width % _ALIGNMENT


def buffer_bytes(kernels: TileKernelNames, tile: TileSizes, *, gradients: bool) -> int:
    """Return what the hungriest of some kernels holds beside inputs and results [bytes].

    The kernel of CPUs keeps its buffers to itself, a fixed number of bytes for each thread; the
    scores of matrix products are counted where the rest of a tile is.

    Args:
        kernels: Which may compute the tile.
        tile: Its sizes.
        gradients: Whether it computes gradients.

    Source: inferred from PyTorch 2.11 (``flash_api.cpp``, ``attention_backward.cu``,
    ``MHA.cpp``) and from what :mod:`fulgurite.attention.cuda_kernels` copies.
    """
    names = {*kernels.full, *kernels.masked} - {"cpu", "math"}
    return max((_bytes_of(name, tile, gradients, kernels.processors) for name in names), default=0)


def _bytes_of(name: str, tile: TileSizes, gradients: bool, processors: int) -> int:
    rows = tile.batch * tile.heads * tile.queries
    keys = tile.batch * tile.kv_heads * tile.keys
    all_keys = tile.batch * tile.heads * tile.keys
    row_bytes, width = tile.width * tile.itemsize, tile.width
    is_grouped = tile.heads != tile.kv_heads
    total = 0
    if tile.head_dim % _ALIGNMENT or tile.value_dim % _ALIGNMENT:  # padded copies
        total += (rows + 2 * keys) * row_bytes
    if name != "flash" and is_grouped:  # each query head gets a copy of its keys and values
        total += 2 * all_keys * row_bytes
    if not gradients:
        return total + rows * _FLOAT  # a log-sum-exp with padding
    total += 3 * rows * _FLOAT  # row sums, and log-sum-exps in one piece
    if name == "efficient":  # the result in another order
        total += rows * row_bytes
    elif tile.batch * tile.heads > 1:  # the result and its gradient in one piece
        total += 2 * rows * row_bytes
    if is_grouped:  # gradients of keys and values for each query head
        total += 2 * all_keys * row_bytes
    if name == "flash":
        padded = tile.batch * tile.heads * (tile.queries + -tile.queries % _FLASH_ROWS)
        copies = ceil_div(processors, tile.batch * tile.heads) if processors else 1
        return total + padded * (width + -width % _FLASH_WIDTH) * _FLOAT * max(1, copies)
    if tile.itemsize < _FLOAT:  # sums of half types
        total += rows * width * _FLOAT
        if name == "efficient":
            total += 2 * all_keys * width * _FLOAT
    return total

"""What work costs on a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["GPU_COSTS", "MachineCosts", "usual_costs"]


@dataclass(frozen=True)
class MachineCosts:
    """What work costs on a machine.

    Args:
        flops: Floating operations of a large tile [1/s].
        bandwidth: Bandwidth of copies between where tensors lie and the device [bytes/s].
        call: Overhead of a kernel call and the merge of its result [s].
        merge: What each number of a result costs beside its pairs [s].
        short_tiles: How much slower kernels are on tiles of few queries: the number of queries
            and the factor, ascending; taller tiles than the last are as fast as it.
        fills_with_heads: Whether the queries of all heads together fill the device, so that short
            tiles of many heads are as fast as tall ones.
    """

    flops: float = 5e10
    bandwidth: float = 5e9
    call: float = 3e-5
    merge: float = 1e-9
    short_tiles: tuple[tuple[int, float], ...] = ((64, 1.3), (256, 1.15), (768, 1.0))
    fills_with_heads: bool = False

    def slowdown(self, height: int) -> float:
        """Return the factor of tiles of so many queries, between those that were measured."""
        heights, factors = zip(*self.short_tiles, strict=True)
        return float(np.interp(math.log(max(height, 1)), np.log(heights), factors))


#: Of a large GPU, for plans that are made without measuring (inferred from what is published of
#: an H100: about 320 TFLOP/s, pinned copies of 25 GB/s, a quarter of a millisecond for a call).
GPU_COSTS = MachineCosts(
    flops=3.2e14,
    bandwidth=2.5e10,
    call=2.5e-4,
    merge=1e-11,
    short_tiles=((128, 64.0), (2048, 4.0), (16384, 1.0)),
    fills_with_heads=True,
)


def usual_costs(on_gpu: bool) -> MachineCosts:
    """Return costs that nobody measured, so that every process plans by the same.

    Args:
        on_gpu: Whether a GPU computes.
    """
    return GPU_COSTS if on_gpu else MachineCosts()

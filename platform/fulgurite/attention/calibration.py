"""What work costs on this machine, measured as streamed attention does it."""

from __future__ import annotations

import functools
import time

import torch

from fulgurite.attention.cost_model import CostEstimate, Costs
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.masking import Visibility
from fulgurite.attention.planning import ExecutionPlan
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.units import AttentionInputs, clear_, commit_, units

__all__ = ["measured_costs"]

_SHORT, _TALL = (64, 256), 768  # queries of tiles: PyTorch's CPU kernel changes its blocks between


@functools.cache
def measured_costs(device: torch.device, dtype: torch.dtype, head_dim: int) -> Costs:
    """Measure the machine; a fraction of a second, once per process.

    Args:
        device: Where attention is computed.
        dtype: Of query, key and value.
        head_dim: D.

    Source: inferred; the model of time is that of :func:`~fulgurite.attention.plan`.
    """
    side = 2048
    pair = _seconds(device, dtype, head_dim, (side, side), (side, side)) / side**2
    small = _seconds(device, dtype, head_dim, (128, 128), (16, 16)) / 64
    call = max(small - 16 * 16 * pair, 1e-7)
    tall = _seconds(device, dtype, head_dim, (1024, 512), (1024, 16)) / 32
    merge = max(tall - call - 1024 * 16 * pair, 0.0) / (1024 * head_dim)
    slow = [
        _seconds(device, dtype, head_dim, (height, side), (height, side)) / (height * side * pair)
        for height in _SHORT
    ]
    # measured times scatter: taller tiles are never slower
    factors = [max(1.0, *slow[i:]) for i in range(len(slow))]
    source = torch.empty(2**22, dtype=torch.uint8)
    begun = time.perf_counter()
    source.to(device, copy=True)
    _wait(device)
    copied = max(time.perf_counter() - begun, 1e-7)
    return Costs(
        flops=4 * head_dim / pair,
        bandwidth=source.numel() / copied,
        call=call,
        merge=merge,
        short_tiles=(*zip(_SHORT, factors, strict=True), (_TALL, 1.0)),
    )


def _seconds(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    tokens: tuple[int, int],
    tile: tuple[int, int],
) -> float:
    """Least time of a forward pass in tiles."""
    spec = AttentionSpec(1, 1, 1, head_dim, head_dim, dtype, (Visibility.of(*tokens),))
    plan = ExecutionPlan(spec, "rect", (1, 1), tile, 0, CostEstimate(0, 0, 0, 0.0, 0.0))
    query, key = (torch.ones(1, 1, count, head_dim, dtype=dtype, device=device) for count in tokens)
    out = torch.empty_like(query)
    lse = out.new_empty(out.shape[:-1], dtype=accumulator_dtype(dtype))
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        clear_(out, lse)
        for unit in units(AttentionInputs(query, key, key), plan):
            commit_(unit, out, lse, merge=False)
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

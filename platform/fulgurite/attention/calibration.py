"""What work costs on this machine, measured as streamed attention does it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from fulgurite.attention.cost_model import Cut
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.inputs import AttentionInputs
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.machine_costs import MachineCosts
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.units import clear_, commit_, units
from fulgurite.attention.visibility import Visibility

__all__ = ["agreed_costs", "estimate_cpu_costs", "estimate_gpu_costs", "measured_costs"]

_TURNS = 4  # of which the fastest counts: the first prepares kernels

#: Seconds of a forward pass over so many (queries, keys) in tiles of so many (queries, keys).
Timer = Callable[[tuple[int, int], tuple[int, int]], float]


@functools.cache
def measured_costs(device: torch.device, dtype: torch.dtype, head_dim: int) -> MachineCosts:
    """Measure the machine; a fraction of a second, once per process.

    Args:
        device: Where attention is computed.
        dtype: Data type of query, key and value.
        head_dim: D.

    Source: inferred; the model of time is that of :func:`~fulgurite.attention.plan`.
    """
    timer = functools.partial(_seconds, device, dtype, head_dim=head_dim)
    if device.type == "cuda":
        return estimate_gpu_costs(timer, head_dim, _pinned_bandwidth(device))
    return estimate_cpu_costs(timer, head_dim, _bandwidth(device))


def agreed_costs(device: torch.device, dtype: torch.dtype, head_dim: int) -> MachineCosts:
    """Return what the first rank of torch.distributed measured, on all ranks.

    Ranks must plan alike, so all of them call this, and wait for the first.

    Args:
        device: Device whose speed is measured.
        dtype: Data type of query, key and value.
        head_dim: D.
    """
    return _agreed_costs(dist.group.WORLD, device, dtype, head_dim)


@functools.lru_cache(maxsize=8)
def _agreed_costs(
    _group: object, device: torch.device, dtype: torch.dtype, head_dim: int
) -> MachineCosts:
    shared = [measured_costs(device, dtype, head_dim) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0, device=device)
    assert shared[0] is not None
    return shared[0]


def estimate_cpu_costs(timer: Timer, head_dim: int, bandwidth: float) -> MachineCosts:
    """Estimate the costs of a CPU, on which one head keeps all threads busy.

    Args:
        timer: Measures the machine.
        head_dim: D.
        bandwidth: Speed of copies in memory [bytes/s].
    """
    side, heights = 2048, (64, 256)
    pair = timer((side, side), (side, side)) / side**2
    call = max(timer((128, 128), (16, 16)) / 64 - 16 * 16 * pair, 1e-7)
    tall = timer((1024, 512), (1024, 16)) / 32
    merge = max(tall - call - 1024 * 16 * pair, 0.0) / (1024 * head_dim)
    slow = [timer((height, side), (height, side)) / (height * side * pair) for height in heights]
    # PyTorch's CPU kernel changes its blocks below 768 queries
    points = (*zip(heights, _descending(slow), strict=True), (768, 1.0))
    return MachineCosts(4 * head_dim / pair, bandwidth, call, merge, points)


def estimate_gpu_costs(timer: Timer, head_dim: int, bandwidth: float) -> MachineCosts:
    """Estimate the costs of a GPU, which a single head fills only if it has many queries.

    A small tile takes what the host needs to start it, whatever its pairs; a large one is
    computed while the host waits, so that the two are told apart.

    Args:
        timer: Measures the machine.
        head_dim: D.
        bandwidth: Speed of copies from pinned memory [bytes/s].
    """
    side, heights = 16384, (128, 512, 2048)
    call = timer((2048, 2048), (256, 256)) / 64
    square = timer((side, side), (side, side))
    pair = max(square - call, square / 10) / side**2
    tall = timer((side, 4096), (side, 256)) / 16
    merge = max(tall - call - side * 256 * pair, 0.0) / (side * head_dim)
    slow = []
    for height in heights:
        seconds = timer((height, side), (height, side)) - call
        slow.append(seconds / (height * side * pair))
    points = (*zip(heights, _descending(slow), strict=True), (side, 1.0))
    return MachineCosts(4 * head_dim / pair, bandwidth, call, merge, points, fills_with_heads=True)


def _descending(factors: Sequence[float]) -> list[float]:
    """Factors that never rise nor fall below 1: measured times scatter, and taller is faster."""
    return [max(1.0, *factors[i:]) for i in range(len(factors))]


def _seconds(
    device: torch.device,
    dtype: torch.dtype,
    tokens: tuple[int, int],
    tile: tuple[int, int],
    *,
    head_dim: int,
) -> float:
    """Least time of a forward pass in tiles."""
    spec = AttentionSpec(1, 1, 1, head_dim, head_dim, dtype, (Visibility.of(*tokens),))
    plan = ExecutionPlan(spec, Cut("rect", (1, 1), tile))
    query, key = (torch.ones(1, 1, count, head_dim, dtype=dtype, device=device) for count in tokens)
    out = torch.empty_like(query)
    lse = out.new_empty(out.shape[:-1], dtype=accumulator_dtype(dtype))

    def run() -> None:
        clear_(out, lse)
        for unit in units(AttentionInputs(query, key, key), plan):
            commit_(unit, out, lse, merge=False)

    return min(_measure_seconds(run, device) for _ in range(_TURNS))


def _measure_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until a device has done what is started; on a GPU by its own clock."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _bandwidth(device: torch.device) -> float:
    """Speed of copies in memory [bytes/s]."""
    source = torch.empty(2**22, dtype=torch.uint8)
    return source.numel() / max(
        _measure_seconds(lambda: source.to(device, copy=True), device), 1e-7
    )


def _pinned_bandwidth(device: torch.device) -> float:
    """Speed of copies from pinned memory, which is what streams to a GPU [bytes/s]."""
    source = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    copies = (
        _measure_seconds(lambda: target.copy_(source, non_blocking=True), device)
        for _ in range(_TURNS)
    )
    return source.numel() / max(min(copies), 1e-7)

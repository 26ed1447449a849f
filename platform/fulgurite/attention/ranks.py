"""Brings together what ranks of torch.distributed computed apart.

Axes: B batch, H heads, M queries, N keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.attention.bounds import Range
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.schedules import chunk_ranges
from fulgurite.attention.steps import Slices
from fulgurite.attention.units import Unit, clear_, commit_
from fulgurite.errors import DataError

__all__ = [
    "broadcast_columns_", "broadcast_rows_", "merge_shards_", "refuse_different_inputs",
    "sum_shards_",
]  # fmt: skip

# Share of its norm by which a sum may differ between ranks: by rounding, not by other data
_TOLERANCE = 0.01


def refuse_different_inputs(device: torch.device, **tensors: Tensor) -> None:
    """Refuse inputs that ranks give differently: what they merge would be attention of nothing.

    Compared are sizes and, of the sum over tokens, one projection: rounding passes, as it may
    differ between machines, and so does other data that is as near.

    Args:
        device: Where ranks exchange tensors.
        tensors: Inputs by name. Shape of each: (B, H, N, D).

    Raises:
        DataError: An input of two ranks is not the same.
    """
    signs = torch.Generator().manual_seed(0)
    rows = []
    for tensor in tensors.values():
        total = tensor.detach().sum(2, dtype=torch.float64).flatten()
        sign = torch.randint(2, total.shape, generator=signs).to(total) * 2 - 1
        rows.append([*map(total.new_tensor, tensor.shape), total @ sign, total.norm()])
    mine = torch.stack([torch.stack(row) for row in rows]).to(device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    for rank, other in enumerate(every):
        sizes_differ = other[:, :-2] != every[0][:, :-2]
        bound = _TOLERANCE * torch.maximum(other[:, -1], every[0][:, -1])
        differs = sizes_differ.any(1) | ((other[:, -2] - every[0][:, -2]).abs() > bound)
        if bool(differs.any()):
            name = [*tensors][int(differs.nonzero()[0])]
            raise DataError(
                f"Ranks 0 and {rank} give attention another {name}, and are to share its tasks.",
                "Give all ranks the same batches: no data by rank, and no random numbers that "
                "differ between ranks, such as those of workers of a loader.",
            )


def broadcast_rows_(plan: ExecutionPlan, *tensors: Tensor) -> None:
    """Give all ranks the rows that one of them computed. Shape of each: (B, H, M, ...)."""
    pieces = (
        ((group.batch, group.heads, slice(*row.queries)), plan.owner(index))
        for group in plan.groups()
        for index, task in enumerate(plan.tasks(group.visible))
        for row in task.rows
    )
    _broadcast(pieces, tensors)


def broadcast_columns_(plan: ExecutionPlan, *tensors: Tensor) -> None:
    """Give all ranks the columns that one of them computed. Shape of each: (B, G, N, ...)."""
    keys, width = plan.spec.keys, plan.tile[1]
    pieces = (
        ((group.batch, group.kv_heads, slice(start, min(start + width, keys))), plan.owner(index))
        for group in plan.groups()
        for index, start in enumerate(range(0, keys, width))
    )
    _broadcast(pieces, tensors)


def _broadcast(pieces: Iterable[tuple[Slices, int]], tensors: Iterable[Tensor]) -> None:
    tensors = list(tensors)
    for at, owner in pieces:
        for tensor in tensors:
            piece = tensor[at].contiguous()
            dist.broadcast(piece, src=owner)
            tensor[at] = piece


def merge_shards_(
    compute: Callable[[Range], Iterator[Unit]], plan: ExecutionPlan, out: Tensor, lse: Tensor
) -> None:
    """Merge the tasks of all ranks, one shard of the queries after the other.

    No rank holds an accumulator longer than a shard: each shard is reduced to the rank that owns
    it, normalised there, and given to all in the type of the result.

    Args:
        compute: Gives this rank's units with queries in a range.
        plan: How it is cut.
        out: Result, overwritten. Shape: (B, H, M, D).
        lse: Its log-sum-exp, overwritten. Shape: (B, H, M).

    Source: docs/papers/stream_cqsa.md section 1.10.
    """
    rank, world = plan.shard
    chunks = chunk_ranges(plan.spec.queries, plan.chunks)
    for owner, (first, end) in enumerate(chunk_ranges(plan.chunks, world)):
        start, stop = chunks[first][0], chunks[end - 1][1]  # a row of a task is within a chunk
        part = torch.empty_like(out[:, :, start:stop], dtype=lse.dtype).contiguous()
        part_lse = part.new_empty(part.shape[:-1])
        clear_(part, part_lse)
        for unit in compute((start, stop)):
            batch, heads, rows = unit.at
            at = batch, heads, slice(rows.start - start, rows.stop - start)
            commit_(unit._replace(at=at), part, part_lse, merge=True)
        largest = part_lse.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        weight = torch.exp(part_lse - largest).nan_to_num_(nan=0.0)  # nan: nobody sees anything
        part.mul_(weight[..., None])
        dist.reduce(part, dst=owner)
        dist.reduce(weight, dst=owner)
        if rank == owner:
            part.div_(weight[..., None].clamp_min(torch.finfo(weight.dtype).tiny))
            largest += weight.log()
        narrow = part.to(out.dtype)
        dist.broadcast(narrow, src=owner)
        dist.broadcast(largest, src=owner)
        out[:, :, start:stop], lse[:, :, start:stop] = narrow, largest


def sum_shards_(total: Tensor, result: Tensor, plan: ExecutionPlan) -> None:
    """Sum over ranks, each of which adds up one shard of the tokens.

    Args:
        total: Share of this rank, in the type of accumulators. Shape: (B, H, N, D).
        result: Overwritten with the sum, in its own type. Shape: (B, H, N, D).
        plan: Whose ranks.
    """
    for owner, (start, stop) in enumerate(chunk_ranges(total.shape[2], plan.shard[1])):
        shard = total[:, :, start:stop].contiguous()
        dist.reduce(shard, dst=owner)
        narrow = shard.to(result.dtype)
        dist.broadcast(narrow, src=owner)
        result[:, :, start:stop] = narrow

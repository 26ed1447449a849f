"""Clients dealt out to ranks, and what ranks exchange; every rank must take part in each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.arithmetic import ceil_div
from fulgurite.sampling import rank_and_world

__all__ = ["all_reduce", "balanced_assignment", "gather_objects", "gather_rows"]


def all_reduce(tensor: Tensor, operation: Literal["sum", "max"]) -> None:
    """Reduce a tensor over ranks, in place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)


def gather_objects(entries: Mapping[int, Any]) -> dict[int, Any]:
    """Merge the dictionaries of all ranks, in the order of their keys; meant for small objects."""
    _, world = rank_and_world()
    if world == 1:
        return dict(entries)
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, dict(entries))
    merged = {k: v for part in parts for k, v in part.items()}
    return {k: merged[k] for k in sorted(merged)}


def gather_rows(rows: Mapping[int, Tensor], clients: Sequence[int], device: torch.device) -> Tensor:
    """Stack one tensor per client, each known to the rank that simulated it.

    Args:
        rows: This rank's tensors, all of one shape and dtype.
        clients: All clients, of all ranks, in the order of the result.
        device: Device of what other ranks send.

    Returns:
        One row per client, equal on every rank. Shape: (len(clients), …).
    """
    if rank_and_world()[1] == 1:
        return torch.stack([rows[k] for k in clients])
    gathered = gather_objects({k: rows[k].cpu() for k in clients if k in rows})
    return torch.stack([gathered[k] for k in clients]).to(device)


def balanced_assignment(sizes: Mapping[int, int], ranks: int) -> list[list[int]]:
    """Deal clients out to ranks: equal counts (up to one), sizes balanced greedily.

    Example:
        >>> balanced_assignment({0: 9, 1: 5, 2: 4, 3: 1}, 2)
        [[0, 3], [1, 2]]
    """
    capacity = ceil_div(len(sizes), ranks)
    groups: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for client in sorted(sizes, key=lambda k: (-sizes[k], k)):
        rank = min(
            (r for r in range(ranks) if len(groups[r]) < capacity), key=lambda r: (loads[r], r)
        )
        groups[rank].append(client)
        loads[rank] += sizes[client]
    return [sorted(group) for group in groups]

"""Traces of a batch as graphs: which stack they are of, how far apart, and who is whose neighbour.

One graph serves all layers of a stack.

Axes: B stacks, N traces of all of them, M traces of the longest, D any features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fulgurite.devices import move
from fulgurite.domains.ice_layers.geodesy import haversine
from fulgurite.errors import ConfigError

__all__ = ["GraphKind", "Track", "adjacency", "edges", "haversine", "note_sizes"]

GraphKind = Literal["full", "knn", "partition", "inverse", "none"]


@dataclass(frozen=True)
class Track:
    """How the traces of a batch lie in its stacks.

    Args:
        ptr: First trace of each stack, and the end. Shape: (B + 1,).
        sizes: Traces of each stack.

    Example:
        >>> track = Track.of([2, 1])
        >>> track.stack, track.offset
        (tensor([0, 0, 1]), tensor([0, 1, 0]))
    """

    ptr: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device | str | None = None) -> Track:
        """From the number of traces of each stack."""
        ptr = torch.zeros(len(sizes) + 1, dtype=torch.long)
        ptr[1:] = torch.tensor(list(sizes)).cumsum(0)
        return cls(move(ptr, device or "cpu"), list(sizes))

    @classmethod
    def from_ptr(cls, ptr: Tensor) -> Track:
        """From PyG's ``batch.ptr``."""
        return cls(ptr, ptr.diff().tolist())

    @classmethod
    def of_batch(cls, batch: Any) -> Track:
        """From a batch of PyG; after :func:`note_sizes` without waiting for the device."""
        sizes = getattr(batch, "traces", None)
        return cls.from_ptr(batch.ptr) if sizes is None else cls(batch.ptr, sizes)

    @cached_property
    def length_of(self) -> Tensor:
        """Traces of each stack. Shape: (B,)."""
        return self.ptr.diff()

    @cached_property
    def stack(self) -> Tensor:
        """Which stack each trace is of. Shape: (N,)."""
        return torch.arange(len(self.sizes), device=self.ptr.device).repeat_interleave(
            self.length_of, output_size=sum(self.sizes)
        )

    @cached_property
    def offset(self) -> Tensor:
        """Number of each trace in its stack. Shape: (N,)."""
        return torch.arange(len(self.stack), device=self.ptr.device) - self.ptr[self.stack]

    @cached_property
    def length(self) -> Tensor:
        """Traces in the stack of each trace. Shape: (N,)."""
        return self.length_of[self.stack]

    @property
    def longest(self) -> int:
        """Traces of the longest stack, M."""
        return max(self.sizes)

    @property
    def uniform(self) -> bool:
        """Whether all stacks are equally long, so that padding is a view."""
        return len(self.sizes) == 1 or len({*self.sizes}) == 1

    @cached_property
    def valid(self) -> Tensor:
        """Where a padded batch holds traces. Shape: (B, M)."""
        count = torch.arange(self.longest, device=self.ptr.device)
        return count < self.length_of[:, None]

    def pad(self, x: Tensor) -> Tensor:
        """Stacks side by side, filled up with zeros. Shape: (N, ...) to (B, M, ...)."""
        shape = (len(self.sizes), self.longest, *x.shape[1:])
        if self.uniform:
            return x.reshape(shape)
        out = x.new_zeros(shape)
        out[self.stack, self.offset] = x
        return out

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`pad`. Shape: (B, M, ...) to (N, ...)."""
        return x.flatten(0, 1) if self.uniform else x[self.stack, self.offset]


def note_sizes(batch: Any) -> None:
    """Write the number of traces of each stack into a batch of PyG, while it is on the CPU."""
    batch.traces = batch.ptr.diff().tolist()


def adjacency(
    track: Track,
    pos: Tensor,
    kind: GraphKind,
    neighbours: int = 4,
    *,
    part: int = 16,
    overlap: int = 4,
) -> Tensor:
    """Weights of each trace's neighbours: rows sum to 1, or to 0 for a trace without any.

    Args:
        track: The stacks.
        pos: Latitude and longitude [degrees]. Shape: (N, 2).
        kind: ``full``: all other traces alike. ``knn``: the nearest on each side along the flight
            line. ``partition``: all others of overlapping parts of the flight line. ``inverse``:
            all others, by inverse distance. ``none``: no neighbours.
        neighbours: Traces on each side of ``knn``.
        part: Traces of a part of ``partition``.
        overlap: Traces that neighbouring parts share.

    Shape: to (B, M, M), float32.

    Raises:
        ConfigError: ``kind`` is unknown or a number is out of range.

    Example:
        >>> adjacency(Track.of([3]), torch.zeros(3, 2), "knn", neighbours=1)
        tensor([[[0.0000, 1.0000, 0.0000],
                 [0.5000, 0.0000, 0.5000],
                 [0.0000, 1.0000, 0.0000]]])

    Source: docs/papers/ice_layers.md section 1.2; partition after GRIT-LP (arXiv 2511.18716), its
    sizes inferred.
    """
    check_graph(kind, neighbours, part, overlap)
    size = track.longest
    index = torch.arange(size, device=pos.device)
    apart = (index[:, None] - index).abs()
    allowed = track.valid[:, :, None] & track.valid[:, None, :] & (apart > 0)
    if kind == "knn":
        allowed = allowed & (apart <= neighbours)
    elif kind == "partition":
        allowed = allowed & _share_part(index, part, overlap)
    elif kind == "none":
        allowed = torch.zeros_like(allowed)
    if kind == "inverse":
        padded = track.pad(pos)
        metres = haversine(padded[:, :, None], padded[:, None, :])
        # a metre at least: traces at one position would divide by zero
        weights = allowed / metres.clamp_min(1.0)
    else:
        weights = allowed.double()
    return (weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)).float()


def check_graph(kind: str, neighbours: int, part: int, overlap: int) -> None:
    """Refuse what :func:`adjacency` cannot build.

    Raises:
        ConfigError: ``kind`` is unknown or a number is out of range.
    """
    prefix = "model.init_args.network.init_args.spatial"
    if kind not in get_args(GraphKind):
        raise ConfigError(
            f"{prefix}.graph={kind} is unknown.", f"Use {', '.join(get_args(GraphKind))}."
        )
    if neighbours < 1:
        raise ConfigError(f"{prefix}.neighbours={neighbours} is too few.", "Give 1 or more.")
    if not 0 <= overlap < part:
        raise ConfigError(
            f"{prefix}.part={part} and overlap={overlap} do not go together.",
            "Set 0 <= overlap < part.",
        )


def _share_part(index: Tensor, part: int, overlap: int) -> Tensor:
    """Whether two traces are of one part. Shape: (M,) to (M, M).

    Example:
        >>> _share_part(torch.arange(5), part=3, overlap=1)[2]
        tensor([True, True, True, True, True])
        >>> _share_part(torch.arange(5), part=3, overlap=1)[1]
        tensor([ True,  True,  True, False, False])
    """
    step = part - overlap
    # in operations that know no number of traces, so that one exported network is for any
    steps = -((overlap - index.shape[0]) // step) - 1
    last = torch.sym_max(0, steps) * step  # type: ignore[no-untyped-call]
    earlier = torch.minimum(index[:, None], index)
    later = torch.maximum(index[:, None], index)
    start = (earlier // step * step).clamp(max=last)  # of the last part that has the earlier trace
    return later < start + part


def edges(track: Track, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same graph as a list of edges, as PyG has it.

    Args:
        track: The stacks.
        weights: Weights of the neighbours, from :func:`adjacency`. Shape: (B, M, M).

    Returns:
        Source and target of each edge, shape (2, E), and its weight, shape (E,).

    Example:
        >>> track = Track.of([2, 2])
        >>> edges(track, adjacency(track, torch.zeros(4, 2), "full"))[0]
        tensor([[1, 0, 3, 2],
                [0, 1, 2, 3]])
    """
    stack, target, source = weights.nonzero(as_tuple=True)
    first = track.ptr[stack]
    return torch.stack([first + source, first + target]), weights[stack, target, source]

"""Brings pieces of tensors to a device and results back while the device computes.

Axes: N tokens, D head size.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["CudaLanes", "Lanes", "Mark", "Prefetcher", "head_copies"]

_T = TypeVar("_T")

_TOKENS = 2  # axis, behind batch and heads
_MOST_COPIES = 64  # of one piece; more take longer than gathering it in pinned memory

#: Ranges of one tensor that become one piece, joined along the tokens.
Views = Sequence[Tensor]


class Mark(Protocol):
    """A moment in the work of a lane."""

    def synchronize(self) -> None:
        """Wait until the work before it is done."""
        ...


class Lanes(Protocol):
    """Copies of a device that run beside its computation."""

    def pinned(self, size: int) -> Tensor:
        """Host memory that the device can copy from and to. Shape: (size,) bytes."""
        ...

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether the device can copy from where a tensor lies."""
        ...

    def upload(self, host: Tensor) -> tuple[Tensor, Mark]:
        """Begin to copy a pinned tensor to the device."""
        ...

    def upload_joined(self, views: Views, shape: Sequence[int]) -> tuple[Tensor, Mark]:
        """Begin to copy pinned ranges of tokens to the device, head by head, joined there."""
        ...

    def download(self, tensor: Tensor, host: Tensor) -> Mark:
        """Begin to copy what the computation so far gives into pinned memory."""
        ...

    def use(self, tensors: Sequence[Tensor], mark: Mark) -> None:
        """Make the computation wait for a mark, and keep the tensors until it has used them."""
        ...

    def mark(self) -> Mark:
        """Mark where the computation is."""
        ...


class CudaLanes:
    """Copies on two CUDA streams, one for each direction.

    Args:
        device: The GPU.

    Source: docs/papers/stream_cqsa.md section 3.4.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.up = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.down = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, size: int) -> Tensor:
        """See :class:`Lanes`.

        Where the system pins no more memory, plain memory does, from which copies are slower.
        """
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:  # CUDA has no type of its own for it
            if "out of memory" not in str(error):
                raise
            warnings.warn(
                f"{size} bytes of host memory cannot be pinned; copies to and from {self.device} "
                "will be slower.",
                stacklevel=2,
            )
            return torch.empty(size, dtype=torch.uint8)

    def is_pinned(self, tensor: Tensor) -> bool:
        """See :class:`Lanes`."""
        return tensor.is_pinned()

    def upload(self, host: Tensor) -> tuple[Tensor, Mark]:
        """See :class:`Lanes`."""
        with torch.cuda.stream(self.up):
            tensor = host.to(self.device, non_blocking=True)
            return tensor, self.up.record_event()

    def upload_joined(self, views: Views, shape: Sequence[int]) -> tuple[Tensor, Mark]:
        """See :class:`Lanes`."""
        with torch.cuda.stream(self.up):
            tensor = torch.empty(*shape, dtype=views[0].dtype, device=self.device)
            for target, source in head_copies(tensor, views):
                target.copy_(source, non_blocking=True)
            return tensor, self.up.record_event()

    def download(self, tensor: Tensor, host: Tensor) -> Mark:
        """See :class:`Lanes`."""
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down):
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self.down)
            mark: Mark = self.down.record_event()
        return mark

    def use(self, tensors: Sequence[Tensor], mark: Mark) -> None:
        """See :class:`Lanes`."""
        stream = torch.cuda.current_stream(self.device)
        assert isinstance(mark, torch.cuda.Event)
        stream.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(stream)

    def mark(self) -> Mark:
        """See :class:`Lanes`."""
        mark: Mark = torch.cuda.current_stream(self.device).record_event()
        return mark


class _Slot:
    """Pinned memory that is written again only once its last copy is done."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.memory: Tensor | None = None
        self.busy: Mark | None = None

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return room for a tensor."""
        if self.busy is not None:
            self.busy.synchronize()
            self.busy = None
        size = math.prod(shape) * dtype.itemsize
        if self.memory is None or self.memory.numel() < size:
            self.memory = None  # before the larger one is made
            self.memory = self.lanes.pinned(size)
        return self.memory[:size].view(dtype).view(*shape)


class Prefetcher:
    """Gives a device its pieces, the next while it computes with the current one.

    Where there is nothing to overlap (a CPU, or tensors that lie on the device), pieces and
    results pass as they are.

    Args:
        device: Where is computed.
        lanes: How copies run beside the computation; None where they do not.

    Source: docs/papers/stream_cqsa.md section 3.4 (streams, slots that are used in turn, waiting
    before reuse).
    """

    def __init__(self, device: torch.device, lanes: Lanes | None = None) -> None:
        self.device, self.lanes = device, lanes
        self.slots: dict[tuple[str, int, int], _Slot] = {}

    @classmethod
    def between(cls, source: torch.device, device: torch.device) -> Prefetcher:
        """Prefetcher a device from where the tensors lie."""
        overlaps = device.type == "cuda" and source.type != "cuda"
        return cls(device, CudaLanes(device) if overlaps else None)

    def prefetch(self, pieces: Iterable[tuple[_T, Sequence[Views]]]) -> Iterator[tuple[_T, Any]]:
        """Bring pieces to the device, at most one ahead of what is computed.

        Args:
            pieces: What each is for, and its tensors, each as ranges to be joined.

        Yields:
            What it is for, and its tensors on the device.
        """
        if self.lanes is None:
            for item, views in pieces:
                yield item, [_join_views(x).to(self.device) for x in views]
            return
        running: deque[Mark] = deque()
        for turn, (item, views) in enumerate(pieces):
            if len(running) == 2:  # else copies would run ahead of the computation without end
                running.popleft().synchronize()
            sent = [self._send(x, turn, i) for i, x in enumerate(views)]
            for tensor, mark in sent:
                self.lanes.use([tensor], mark)
            yield item, [tensor for tensor, _ in sent]
            running.append(self.lanes.mark())

    def _send(self, views: Views, turn: int, slot_index: int) -> tuple[Tensor, Mark]:
        assert self.lanes is not None
        first = views[0]
        shape = list(first.shape)
        shape[_TOKENS] = sum(x.shape[_TOKENS] for x in views)
        if _is_copied_by_heads(views) and all(self.lanes.is_pinned(x) for x in views):
            return self.lanes.upload_joined(views, shape)
        slot = self._slot("up", turn, slot_index)
        host = slot.take(shape, first.dtype)
        if len(views) == 1:
            host.copy_(first)
        else:
            torch.cat(list(views), dim=_TOKENS, out=host)
        tensor, slot.busy = self.lanes.upload(host)
        return tensor, slot.busy

    def write_back(
        self, results: Iterable[tuple[_T, Sequence[Tensor]]]
    ) -> Iterator[tuple[_T, Any]]:
        """Bring results to the host, each while the next one is computed.

        Args:
            results: What each is for, and its tensors on the device.

        Yields:
            What it is for, and its tensors on the host; good until the next is asked for.
        """
        if self.lanes is None:
            yield from results
            return
        waiting: tuple[_T, list[Tensor], list[Mark]] | None = None
        for turn, (item, tensors) in enumerate(results):
            hosts, marks = [], []
            for index, tensor in enumerate(tensors):
                slot = self._slot("down", turn, index)
                host = slot.take(tensor.shape, tensor.dtype)
                slot.busy = self.lanes.download(tensor, host)
                hosts.append(host)
                marks.append(slot.busy)
            if waiting is not None:
                yield _wait_for_copies(*waiting)
            waiting = item, hosts, marks
        if waiting is not None:
            yield _wait_for_copies(*waiting)

    def _slot(self, way: str, turn: int, slot_index: int) -> _Slot:
        assert self.lanes is not None
        return self.slots.setdefault((way, turn % 2, slot_index), _Slot(self.lanes))


def _wait_for_copies(item: _T, hosts: list[Tensor], marks: list[Mark]) -> tuple[_T, list[Tensor]]:
    for mark in marks:
        mark.synchronize()
    return item, hosts


def _join_views(views: Views) -> Tensor:
    """One tensor of ranges of tokens. Shape: (B, H, N, ...)."""
    return views[0] if len(views) == 1 else torch.cat(list(views), dim=_TOKENS)


def _is_copied_by_heads(views: Views) -> bool:
    """Whether the tokens of each head lie in one piece, and there are few of these."""
    heads = math.prod(views[0].shape[:_TOKENS])
    return heads * len(views) <= _MOST_COPIES and all(x[0, 0].is_contiguous() for x in views)


def head_copies(target: Tensor, views: Views) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parts of a tensor with what belongs there: the tokens of one head of one view.

    Args:
        target: Shape: (B, H, N, ...), N the tokens of all views together.
        views: Shape of each: (B, H, N', ...).
    """
    offset = 0
    for view in views:
        tokens = view.shape[_TOKENS]
        for b, h in itertools.product(*(range(size) for size in view.shape[:_TOKENS])):
            yield target[b, h, offset : offset + tokens], view[b, h]
        offset += tokens

"""Brings pieces of tensors to a device and results back while the device computes.

Axes: N tokens, D head size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["CudaLanes", "Lanes", "Mark", "Prefetcher"]

_T = TypeVar("_T")

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

    def upload(self, host: Tensor) -> tuple[Tensor, Mark]:
        """Begin to copy a pinned tensor to the device."""
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

    Source: card section 3.4.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.up = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.down = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, size: int) -> Tensor:
        """See :class:`Lanes`."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def upload(self, host: Tensor) -> tuple[Tensor, Mark]:
        """See :class:`Lanes`."""
        with torch.cuda.stream(self.up):
            tensor = host.to(self.device, non_blocking=True)
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

    Source: card section 3.4 (streams, slots that are used in turn, waiting before reuse).
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
                yield item, [_joined(x).to(self.device) for x in views]
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

    def _send(self, views: Views, turn: int, place: int) -> tuple[Tensor, Mark]:
        assert self.lanes is not None
        first = views[0]
        if len(views) == 1 and first.is_pinned() and first.is_contiguous():
            return self.lanes.upload(first)
        shape = list(first.shape)
        if len(views) > 1:
            shape[-2] = sum(x.shape[-2] for x in views)
        slot = self._slot("up", turn, place)
        host = slot.take(shape, first.dtype)
        if len(views) == 1:
            host.copy_(first)
        else:
            torch.cat(list(views), dim=-2, out=host)
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
            for place, tensor in enumerate(tensors):
                slot = self._slot("down", turn, place)
                host = slot.take(tensor.shape, tensor.dtype)
                slot.busy = self.lanes.download(tensor, host)
                hosts.append(host)
                marks.append(slot.busy)
            if waiting is not None:
                yield _arrived(*waiting)
            waiting = item, hosts, marks
        if waiting is not None:
            yield _arrived(*waiting)

    def _slot(self, way: str, turn: int, place: int) -> _Slot:
        assert self.lanes is not None
        return self.slots.setdefault((way, turn % 2, place), _Slot(self.lanes))


def _arrived(item: _T, hosts: list[Tensor], marks: list[Mark]) -> tuple[_T, list[Tensor]]:
    for mark in marks:
        mark.synchronize()
    return item, hosts


def _joined(views: Views) -> Tensor:
    """One tensor of ranges of tokens. Shape: (..., N, D)."""
    return views[0] if len(views) == 1 else torch.cat(list(views), dim=-2)

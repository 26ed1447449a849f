"""A mask without memory, as models of Hugging Face transformers hand it on to their attention.

Axes: B batch, M queries, N keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fulgurite.attention.biases import ScoreBlock, TileBias
from fulgurite.attention.bounds import Range
from fulgurite.attention.spec import MaskSpec
from fulgurite.attention.visibility import Visibility

__all__ = ["MaskSource", "MaskTiles", "StreamMask"]

#: Gives the boolean mask of a rectangle. Shape: (B, 1, M', N').
MaskTiles = Callable[[Range, Range], Tensor]


@dataclass(frozen=True)
class MaskSource:
    """What a mask lets queries see.

    Attributes:
        batch: B.
        visible: Intervals, for all batch entries or for each.
        tiles: The mask itself, which decides within the intervals where it is no such.
        is_interval: Whether the intervals say all.
        dense: Gives the mask in full, as the model's own code expects it. Shape: (B, 1, M, N).
    """

    batch: int
    visible: tuple[Visibility, ...]
    tiles: MaskTiles
    is_interval: bool
    dense: Callable[[], Tensor]

    @property
    def biases(self) -> tuple[TileBias, ...]:
        """What hides keys within the intervals."""
        return () if self.is_interval else (_TileMask(self.tiles),)

    def cropped(self, keys: int) -> MaskSource:
        """Return the mask of the first so many keys."""
        visible = tuple(replace(x, keys=keys).clipped() for x in self.visible)
        return replace(self, visible=visible, dense=lambda: self.dense()[..., :keys])


class _TileMask:
    """A mask that is no interval, as a bias."""

    def __init__(self, tiles: MaskTiles) -> None:
        self.tiles = tiles
        self.spec = MaskSpec(True, False, True, True)
        self.tensors: tuple[Tensor, ...] = ()

    def tile(self, block: ScoreBlock) -> Tensor:
        """See :class:`~fulgurite.attention.biases.TileBias`."""
        return self.tiles(block.queries, block.keys)[block.batch]


class StreamMask(Tensor):
    """A mask without memory, that says what is seen when it arrives at the attention.

    Models hand it on, move it and cut keys off its end. Whatever else their own code does with it
    is done with the mask in full, and a warning says so.

    Shape: (B, 1, M, N).
    """

    source: MaskSource

    @staticmethod
    def make(source: MaskSource, dtype: torch.dtype, device: torch.device) -> StreamMask:
        """Return the mask of a source.

        Args:
            source: What it lets queries see.
            dtype: That of the mask in full.
            device: Device of the model.
        """
        sizes = source.visible[0]
        single = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)
        shape = source.batch, 1, sizes.queries, sizes.keys
        mask = single.expand(shape).as_subclass(StreamMask)
        mask.source = source
        return mask

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer what needs no numbers, and do the rest with the mask in full."""
        kwargs = kwargs or {}
        if func in _facts():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(args[0] if args else None, StreamMask):
            mask: StreamMask = args[0]
            if func in _copies() and not _changes_type(mask.dtype, args[1:], kwargs):
                return mask
            if func is Tensor.__getitem__:
                keys = _count_cropped_keys(args[1], mask.shape)
                if keys is not None:
                    return StreamMask.make(mask.source.cropped(keys), mask.dtype, mask.device)
        warnings.warn(
            f"The model's own code ({getattr(func, '__name__', func)}) works on its attention "
            "mask, which is therefore made in full, outside the memory budget.",
            stacklevel=2,
        )
        args, kwargs = tree_map(
            lambda x: x.source.dense() if isinstance(x, StreamMask) else x, (args, kwargs)
        )
        return func(*args, **kwargs)


def _facts() -> set[Any]:
    """What a tensor says of itself without its numbers."""
    names = ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout", "is_meta",
             "is_sparse", "is_nested", "grad_fn", "is_leaf", "grad")  # fmt: skip
    getters = {getattr(Tensor, name).__get__ for name in names}
    methods = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
    return getters | methods | {torch.is_floating_point, Tensor.is_complex, Tensor.get_device}


def _copies() -> set[Any]:
    """What gives the same mask."""
    return {
        Tensor.to, Tensor.contiguous, Tensor.clone, Tensor.detach, Tensor.cpu,
        Tensor.requires_grad_, torch.clone, torch.detach,
    }  # fmt: skip


def _changes_type(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    options = (*args, *kwargs.values())
    types = [x.dtype if isinstance(x, Tensor) else x for x in options]
    return any(isinstance(x, torch.dtype) and x != dtype for x in types)


def _count_cropped_keys(index: Any, shape: torch.Size) -> int | None:
    """The number of keys that an index leaves, if it does nothing but cut some off the end."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (5 - len(parts))
    parts += [slice(None)] * (4 - len(parts))
    if len(parts) != 4 or not all(isinstance(part, slice) for part in parts):
        return None
    bounds = [part.indices(size) for part, size in zip(parts, shape, strict=True)]
    is_complete = all(
        bound == (0, size, 1) for bound, size in zip(bounds[:3], shape[:3], strict=True)
    )
    start, stop, step = bounds[3]
    return stop if is_complete and start == 0 and step == 1 else None

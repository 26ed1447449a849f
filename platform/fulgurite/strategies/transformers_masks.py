"""Masks of Hugging Face transformers as intervals of keys, or tile by tile, never in full.

transformers describes a mask by a function of indices, and asks the attention implementation for
what its attention is to get. Here that is a tensor without memory, which knows what is seen.

Axes: B batch, M queries, N keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fulgurite.attention.biases import ScoreBlock, TileBias
from fulgurite.attention.bounds import Range
from fulgurite.attention.masks import as_intervals, merge_visible, row_intervals
from fulgurite.attention.spec import MaskSpec
from fulgurite.attention.visibility import EntryMasks, Visibility
from fulgurite.errors import ConfigError

__all__ = ["MaskSource", "StreamMask", "make_mask"]

_AT_ONCE = 2**22  # pairs of query and key that are looked at together
_CHECKED_ROWS = 8  # rows in which what was recognised is compared with the function itself

#: Gives the boolean mask of a rectangle. Shape: (B, 1, M', N').
_Tiles = Callable[[Range, Range], Tensor]


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
    tiles: _Tiles
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

    def __init__(self, tiles: _Tiles) -> None:
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


class _Sizes(NamedTuple):
    """Of a mask.

    Attributes:
        batch: B.
        queries: M.
        keys: N.
        offset: Position of the first query among the keys.
        first_key: Index of the first key in transformers' count.
    """

    batch: int
    queries: int
    keys: int
    offset: int
    first_key: int


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype | None = None,
    config: Any = None,
    is_additive: bool = False,
    **unknown: Any,
) -> StreamMask:
    """Return a mask for streamed attention; what transformers calls to make one.

    A mask that is made of transformers' own parts (causal, windows, chunks, padding, packing) is
    recognised by these; any other is looked at a few rows at a time. Both are exact: what was
    recognised is compared with the function in some rows, and given up if it differs.

    Args:
        batch_size: B.
        q_length: M.
        kv_length: N.
        q_offset: Index of the first query.
        kv_offset: Index of the first key.
        mask_function: Takes indices of batch, head, query and key.
        attention_mask: True for tokens that are no padding. Shape: (B, at least N).
        use_vmap: Whether the function takes single indices only.
        device: Device of the model.
        local_size: Width of a window, which the function has too.
        allow_is_causal_skip: Whether a plain mask may be left out; this one never is.
        allow_is_bidirectional_skip: Whether a bidirectional one may be left out; likewise never.
        dtype: Data type of a dense additive mask.
        config: Configuration of the model.
        is_additive: Whether the model's own code expects a mask that is added to scores.
        unknown: Nothing that changes the mask.

    Returns:
        Shape: (B, 1, M, N).

    Raises:
        ConfigError: transformers asks for something that is not known here.
    """
    from transformers import masking_utils

    if names := [name for name, value in unknown.items() if value is not None]:
        raise ConfigError(
            f"transformers describes a mask by {', '.join(names)}, which streamed attention does "
            "not know.",
            "Use --trainer.strategy=auto.",
        )

    function = mask_function or masking_utils.causal_mask_function
    if attention_mask is not None:  # which the user may change before the gradients
        attention_mask = attention_mask.clone()
    first_query, first_key = int(q_offset), int(kv_offset)
    sizes = _Sizes(batch_size, q_length, kv_length, first_query - first_key, first_key)

    def tiles(queries: Range, keys: Range) -> Tensor:
        sdpa_mask: Any = masking_utils.sdpa_mask  # never None where it may not be left out
        return sdpa_mask(  # type: ignore[no-any-return]
            batch_size=batch_size,
            q_length=queries[1] - queries[0],
            kv_length=keys[1] - keys[0],
            q_offset=first_query + queries[0],
            kv_offset=first_key + keys[0],
            mask_function=function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )

    def dense() -> Tensor:
        make: Any  # never None where it may not be left out
        make = masking_utils.eager_mask if is_additive else masking_utils.sdpa_mask
        return make(  # type: ignore[no-any-return]
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=first_query,
            kv_offset=first_key,
            mask_function=function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            dtype=dtype or torch.float32,
            use_vmap=use_vmap,
            device=device,
        )

    visible = _recognise(function, sizes)
    if visible is not None and attention_mask is not None:
        padding = _recognise_padding(attention_mask.bool(), sizes)
        visible = None if padding is None else merge_visible(visible, padding)
    if visible is not None and not _agrees(visible, tiles, sizes):
        visible = None
    if visible is None:
        visible = _look_at_rows(tiles, sizes)
    is_interval = visible is not None
    if visible is None:
        visible = (Visibility.of(q_length, kv_length),)
    source = MaskSource(batch_size, visible, tiles, is_interval, dense)
    mask_dtype = (dtype or torch.float32) if is_additive else torch.bool
    return StreamMask.make(source, mask_dtype, torch.device(device))


def _recognise(function: Callable[..., Any], sizes: _Sizes) -> tuple[Visibility, ...] | None:
    """What a function lets queries see, if it is made of known parts."""
    name = getattr(function, "__qualname__", "").split(".<locals>")[0]
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    facts = dict(
        zip(code.co_freevars if code else (), (c.cell_contents for c in cells), strict=True)
    )
    of, (_, queries, keys, offset, _) = Visibility.of, sizes
    if name == "causal_mask_function":
        return (of(queries, keys, EntryMasks(is_causal=True, offset=offset)),)
    if name == "bidirectional_mask_function":
        return (of(queries, keys),)
    if name == "and_masks":
        visible: tuple[Visibility, ...] = (of(queries, keys),)
        for part in facts["mask_functions"]:
            part_visible = _recognise(part, sizes)
            if part_visible is None:
                return None
            visible = merge_visible(visible, part_visible)
        return visible
    if name == "sliding_window_overlay" and int(facts["sliding_window"]) > 0:
        return (of(queries, keys, EntryMasks(window=int(facts["sliding_window"]), offset=offset)),)
    if name == "sliding_window_bidirectional_overlay" and int(facts["sliding_window"]) >= 0:
        width = int(facts["sliding_window"])
        return (of(queries, keys, EntryMasks(window=(width + 1, width), offset=offset)),)
    if name == "chunked_overlay" and 0 <= offset <= keys - queries:
        starts = (int(start) - sizes.first_key for start in facts["left_padding"])
        chunk = int(facts["chunk_size"])
        return tuple(
            of(queries, keys, EntryMasks(chunk=chunk, chunk_start=start, offset=offset))
            for start in starts
        )
    if name == "padding_mask_function":
        return _recognise_padding(facts["padding_mask"].bool(), sizes)
    if name == "packed_sequence_mask_function" and queries == keys and not offset:
        return _recognise_documents(facts["packed_sequence_mask"], sizes)
    if name == "remap_positions_for_packed_sequence":
        # positions count on within each document, and differences are all that these compare
        inner = facts["mask_function"]
        return _recognise(inner, sizes) if _compares_differences(inner) else None
    return None


def _compares_differences(function: Callable[..., Any]) -> bool:
    """Whether a mask function looks at nothing but how far a key is from its query."""
    name = getattr(function, "__qualname__", "").split(".<locals>")[0]
    if name == "and_masks":
        code, cells = function.__code__, function.__closure__ or ()
        facts = dict(zip(code.co_freevars, (c.cell_contents for c in cells), strict=True))
        return all(_compares_differences(part) for part in facts["mask_functions"])
    return name in (
        "causal_mask_function", "bidirectional_mask_function", "sliding_window_overlay",
        "sliding_window_bidirectional_overlay",
    )  # fmt: skip


def _recognise_padding(mask: Tensor, sizes: _Sizes) -> tuple[Visibility, ...] | None:
    """What a mask of tokens lets queries see; keys behind its end are padding."""
    end = sizes.first_key + sizes.keys
    if mask.shape[-1] < end:
        mask = torch.nn.functional.pad(mask, (0, end - mask.shape[-1]))
    keys = mask[:, None, None, sizes.first_key : end]
    return as_intervals(keys, sizes.batch, sizes.queries, sizes.keys)


def _recognise_documents(ids: Tensor, sizes: _Sizes) -> tuple[Visibility, ...] | None:
    """What packed documents let queries see, whose ids ascend."""
    visible = []
    for row in ids.expand(sizes.batch, -1).cpu().numpy():
        steps = np.diff(row)
        if (steps < 0).any():
            return None
        starts = [0, *(np.flatnonzero(steps) + 1).tolist()]
        visible.append(Visibility.of(sizes.queries, sizes.keys, EntryMasks(documents=starts)))
    return tuple(visible)


def _agrees(visible: tuple[Visibility, ...], tiles: _Tiles, sizes: _Sizes) -> bool:
    """Whether some rows are as the mask itself has them."""
    rows = np.unique(np.linspace(0, sizes.queries - 1, _CHECKED_ROWS).astype(np.int64))
    columns = np.arange(sizes.keys)
    for row in rows[:, None] if sizes.queries and sizes.keys else ():
        mask = tiles((int(row[0]), int(row[0]) + 1), (0, sizes.keys))[:, 0].cpu().numpy()
        for entry, truth in enumerate(mask):
            expected = visible[entry if len(visible) > 1 else 0]
            first, end = expected.first.at(row)[:, None], expected.end.at(row)[:, None]
            if (((columns >= first) & (columns < end)) != truth).any():
                return False
    return True


def _look_at_rows(tiles: _Tiles, sizes: _Sizes) -> tuple[Visibility, ...] | None:
    """Intervals of all rows, if they are such."""
    if 0 in (sizes.queries, sizes.keys):
        return None
    height = max(1, _AT_ONCE // (sizes.batch * sizes.keys))
    bounds: list[list[tuple[Any, Any]]] = [[] for _ in range(sizes.batch)]
    for top in range(0, sizes.queries, height):
        mask = tiles((top, min(top + height, sizes.queries)), (0, sizes.keys))
        if mask.shape[1] != 1:
            return None
        for entry, part in enumerate(mask[:, 0]):
            interval = row_intervals(part, sizes.keys)
            if interval is None:
                return None
            bounds[entry].append(interval)
    visible = []
    for parts in bounds:
        first, end = (np.concatenate(column) for column in zip(*parts, strict=True))
        intervals = Visibility.from_intervals(sizes.keys, first, end)
        if intervals is None:
            return None
        visible.append(intervals)
    return tuple(visible)

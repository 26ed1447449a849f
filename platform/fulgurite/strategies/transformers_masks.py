"""Masks of Hugging Face transformers as intervals of keys, or tile by tile, never in full.

transformers describes a mask by a function of indices, and asks the attention implementation for
what its attention is to get. Here that is a tensor without memory, which knows what is seen.

Axes: B batch, M queries, N keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fulgurite.attention.bounds import Range
from fulgurite.attention.keywords import make_record
from fulgurite.attention.masks import as_intervals, merge_visible, row_intervals
from fulgurite.attention.visibility import EntryMasks, Visibility
from fulgurite.errors import ConfigError
from fulgurite.strategies.stream_mask import MaskSource, MaskTiles, StreamMask

__all__ = ["MaskRequest", "make_mask"]

_AT_ONCE = 2**22  # pairs of query and key that are looked at together
_CHECKED_ROWS = 8  # rows in which what was recognised is compared with the function itself


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


@dataclass(frozen=True)
class MaskRequest:
    """How transformers describes a mask.

    Args:
        batch_size: B.
        q_length: M.
        kv_length: N.
        q_offset: Index of the first query.
        kv_offset: Index of the first key.
        mask_function: Takes indices of batch, head, query and key; causal by default.
        attention_mask: True for tokens that are no padding. Shape: (B, at least N).
        use_vmap: Whether the function takes single indices only.
        device: Device of the model.
        local_size: Width of a window, which the function has too.
        allow_is_causal_skip: Whether a plain mask may be left out; this one never is.
        allow_is_bidirectional_skip: Whether a bidirectional one may be left out; likewise never.
        dtype: Data type of a dense additive mask.
        config: Configuration of the model.
        is_additive: Whether the model's own code expects a mask that is added to scores.
    """

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int | Tensor = 0
    kv_offset: int | Tensor = 0
    mask_function: Callable[..., Any] | None = None
    attention_mask: Tensor | None = None
    use_vmap: bool = False
    device: torch.device | str = "cpu"
    local_size: int | None = None
    allow_is_causal_skip: bool = True
    allow_is_bidirectional_skip: bool = False
    dtype: torch.dtype | None = None
    config: Any = None
    is_additive: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any], *, is_additive: bool = False) -> MaskRequest:
        """Read what transformers gives.

        Args:
            options: By name.
            is_additive: Whether the model's own code expects a mask that is added to scores.

        Raises:
            ConfigError: transformers asks for something that is not known here.
        """
        names = {field.name for field in fields(cls)}
        unknown = [
            name for name, value in options.items() if name not in names and value is not None
        ]
        if unknown:
            raise ConfigError(
                f"transformers describes a mask by {', '.join(unknown)}, which streamed attention "
                "does not know.",
                "Use --trainer.strategy=auto.",
            )
        return make_record(cls, options, is_additive=is_additive)

    @property
    def sizes(self) -> _Sizes:
        """Sizes and offsets of the mask."""
        first_key = int(self.kv_offset)
        offset = int(self.q_offset) - first_key
        return _Sizes(self.batch_size, self.q_length, self.kv_length, offset, first_key)


class _OwnMask(NamedTuple):
    """A mask as transformers itself computes it.

    Attributes:
        request: How it is described.
        function: Takes indices of batch, head, query and key.
        padding: True for tokens that are no padding.
    """

    request: MaskRequest
    function: Callable[..., Any]
    padding: Tensor | None

    @classmethod
    def of(cls, request: MaskRequest) -> _OwnMask:
        """Read a request; of padding, which the user may change before the gradients, a copy."""
        from transformers import masking_utils

        function = request.mask_function or masking_utils.causal_mask_function
        padding = request.attention_mask
        return cls(request, function, None if padding is None else padding.clone())

    def tiles(self, queries: Range, keys: Range) -> Tensor:
        """Boolean mask of a rectangle. Shape: (B, 1, M', N')."""
        from transformers import masking_utils

        make: Any = masking_utils.sdpa_mask
        return self._compute(make, queries, keys)

    def dense(self) -> Tensor:
        """The mask in full, as the model's own code expects it. Shape: (B, 1, M, N)."""
        from transformers import masking_utils

        request = self.request
        make: Any = masking_utils.sdpa_mask
        ranges = (0, request.q_length), (0, request.kv_length)
        if request.is_additive:
            make = masking_utils.eager_mask
        return self._compute(make, *ranges, dtype=request.dtype or torch.float32)

    def _compute(self, make: Any, queries: Range, keys: Range, **options: Any) -> Tensor:
        request = self.request
        return make(  # type: ignore[no-any-return]  # never None where it may not be left out
            batch_size=request.batch_size,
            q_length=queries[1] - queries[0],
            kv_length=keys[1] - keys[0],
            q_offset=int(request.q_offset) + queries[0],
            kv_offset=int(request.kv_offset) + keys[0],
            mask_function=self.function,
            attention_mask=self.padding,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=request.use_vmap,
            device=request.device,
            **options,
        )


def make_mask(request: MaskRequest) -> StreamMask:
    """Return a mask for streamed attention; what transformers calls to make one.

    A mask that is made of transformers' own parts (causal, windows, chunks, padding, packing) is
    recognised by these; any other is looked at a few rows at a time. Both are exact: what was
    recognised is compared with the function in some rows, and given up if it differs.

    Args:
        request: How transformers describes it.

    Returns:
        Shape: (B, 1, M, N).
    """
    mask, sizes = _OwnMask.of(request), request.sizes
    visible = _recognise(mask.function, sizes)
    if visible is not None and mask.padding is not None:
        padding = _recognise_padding(mask.padding.bool(), sizes)
        visible = None if padding is None else merge_visible(visible, padding)
    if visible is not None and not _agrees(visible, mask.tiles, sizes):
        visible = None
    if visible is None:
        visible = _look_at_rows(mask.tiles, sizes)
    is_interval = visible is not None
    if visible is None:
        visible = (Visibility.of(sizes.queries, sizes.keys),)
    source = MaskSource(
        batch=sizes.batch, visible=visible, tiles=mask.tiles, is_interval=is_interval,
        dense=mask.dense,
    )  # fmt: skip
    dtype = (request.dtype or torch.float32) if request.is_additive else torch.bool
    return StreamMask.make(source, dtype, torch.device(request.device))


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


def _agrees(visible: tuple[Visibility, ...], tiles: MaskTiles, sizes: _Sizes) -> bool:
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


def _look_at_rows(tiles: MaskTiles, sizes: _Sizes) -> tuple[Visibility, ...] | None:
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

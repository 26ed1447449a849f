"""What a way to cut attention holds at once, moves and takes.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D size of a query and key,
E size of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from fulgurite.arithmetic import ceil_div
from fulgurite.attention.biases import AT_ONCE, KEYS_AT_ONCE
from fulgurite.attention.kernel_buffers import TileSizes, buffer_bytes
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.quorums import quorum
from fulgurite.attention.request import PlanRequest
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.tiles import MASKED_SIDE

__all__ = [
    "BACKWARD_FLOPS",
    "CostEstimate",
    "Cut",
    "estimate",
]  # fmt: skip

#: Operations of the backward pass by those of the forward pass (docs/papers/stream_cqsa.md section
#: 3.5).
BACKWARD_FLOPS = 2.5

_MATH_SLOWDOWN = 2.0  # of tiles computed by matrix products, against a fast kernel (measured)


@dataclass(frozen=True)
class CostEstimate:
    """What a plan is predicted to take.

    Attributes:
        peak_bytes: Most bytes held at once: inputs of a tile, accumulators, results of kernels.
        moved_bytes: Bytes copied between where the tensors lie and the device, if not there.
        calls: Kernel calls, about.
        flops: Floating operations.
        seconds: Time, of one rank alone.
    """

    peak_bytes: int = 0
    moved_bytes: int = 0
    calls: int = 0
    flops: float = 0.0
    seconds: float = 0.0


class Cut(NamedTuple):
    """A way to cut a call.

    Attributes:
        schedule: ``whole`` (one call), ``heads`` (one call per group of heads), ``rect`` (tiles of
            queries past which keys are streamed) or ``cqs`` (quorums of chunks).
        head_step: Batch entries and key/value heads at once; each of these brings its query heads.
        tile: Queries and keys of a tile, for ``rect``.
        chunks: c, for ``cqs``.
        depth: How often the sequence is divided, for ``cqs``.
        passes: How often gradients go through all tiles: 2 where sums over all keys do not fit.
        gradients: Whether gradients are computed, not the result.
    """

    schedule: Literal["whole", "heads", "rect", "cqs"]
    head_step: tuple[int, int]
    tile: tuple[int, int] = (0, 0)
    chunks: int = 0
    depth: int = 1
    passes: int = 1
    gradients: bool = False


def estimate(spec: AttentionSpec, cut: Cut, request: PlanRequest) -> CostEstimate:
    """Predict what a way to cut a call takes.

    Args:
        spec: What is computed.
        cut: How it is cut.
        request: Where, and by which kernels.

    Source: docs/papers/stream_cqsa.md section 1.9 (model of memory and time).
    """
    costs, queries, keys = request.costs, spec.queries, spec.keys
    placement = request.placement
    size, wide = spec.dtype.itemsize, accumulator_dtype(spec.dtype).itemsize
    heads = spec.heads // spec.kv_heads
    together = cut.head_step[0] * cut.head_step[1]  # key/value heads at once
    groups = sum(ceil_div(end - begin, cut.head_step[0]) for begin, end, _ in spec.runs())
    groups *= ceil_div(spec.kv_heads, cut.head_step[1])
    if cut.schedule == "cqs":
        members = len(quorum(cut.chunks))
        height = ceil_div(keys, cut.chunks)
        loaded, rows = members * height, cut.chunks * members
        calls = rows * 2 * groups
        passed = cut.chunks * loaded  # tokens loaded over all tasks
    else:
        height, loaded = cut.tile
        rows = ceil_div(queries, height)
        reach = spec.reach(height)
        calls = int(rows * -(-reach // loaded) + 1) * groups  # reach is a mean
        passed = int(rows * reach)
    if spec.slides:  # the edge of a window is cut into tiles of its own
        calls += 2 * groups * ceil_div(queries, request.masked_side(spec) or MASKED_SIDE)
    direct = cut.schedule in ("whole", "heads") and spec.is_simple and not placement.tiled
    tile = _TileCost(spec, cut, request, (height, loaded), is_direct=direct)
    peak = tile.gradients() if cut.gradients else tile.forward()
    peak += 0 if direct else _accumulators(spec, cut, request)
    kv_heads = spec.batch * spec.kv_heads
    sizes = spec.head_dim + spec.value_dim
    writes = spec.batch * spec.heads * queries * (sizes * size + wide)
    if cut.schedule == "cqs":  # results are read, merged and written by each task of a chunk
        merged = kv_heads * heads * queries * (spec.value_dim + 1) * wide
        writes += 2 * len(quorum(cut.chunks)) * merged
    moved = writes + kv_heads * passed * sizes * size
    flops = 2.0 * spec.pairs * sizes * spec.heads
    if cut.gradients:
        flops *= BACKWARD_FLOPS * cut.passes
        moved *= 1 + cut.passes
    copied = moved if not placement.resident else (moved - writes if cut.schedule == "cqs" else 0)
    if request.computes_scores(spec):
        slowdown = _MATH_SLOWDOWN
    else:
        slowdown = costs.slowdown(height * (heads * together if costs.fills_with_heads else 1))
    seconds = flops / costs.flops * slowdown
    seconds += max(0, copied) / costs.bandwidth + calls * costs.call
    if not direct:  # each call is merged into its row, each row of cqs into the result
        merges = calls + (rows * groups if cut.schedule == "cqs" else 0)
        seconds += costs.merge * merges * height * heads * together * spec.value_dim
    return CostEstimate(int(peak), int(moved), calls, flops, seconds)


class _TileCost:
    """Bytes that a tile holds with what comes in and goes out."""

    def __init__(
        self,
        spec: AttentionSpec,
        cut: Cut,
        request: PlanRequest,
        tile: tuple[int, int],
        *,
        is_direct: bool,
    ) -> None:
        self.spec, self.request, self.passes, self.is_direct = spec, request, cut.passes, is_direct
        self.size, self.wide = spec.dtype.itemsize, accumulator_dtype(spec.dtype).itemsize
        self.batch, self.kv_heads = cut.head_step
        self.heads = self.kv_heads * (spec.heads // spec.kv_heads)
        self.height, self.loaded = tile
        self.rows = self.batch * self.heads * self.height  # of all heads together
        self.keys = self.batch * self.kv_heads * self.loaded
        self.passing = 2 if request.placement.ahead else 1  # what is copied ahead counts twice
        self.copies_rows = not request.placement.resident or request.placement.packs
        self.copies_keys = self.copies_rows or cut.schedule == "cqs"

    def forward(self) -> int:
        """Query, key and value where they are copied, what the kernel gives, and accumulators."""
        spec, size, wide = self.spec, self.size, self.wide
        total = self.rows * spec.head_dim * size * self.copies_rows
        total += (
            self.keys * (spec.head_dim + spec.value_dim) * size * self.copies_keys * self.passing
        )
        total += self.rows * (spec.value_dim * size + wide)
        if not self.is_direct:  # and what merging takes for a moment
            total += self.rows * (spec.value_dim + 1) * wide * self.passing
            total += self.rows * (spec.value_dim * (size < wide) + 1) * wide
        total += 4 * self.rows * wide * spec.has_sinks
        total += self._padding(rows=1) + self._buffers(gradients=False)
        return total + self._bias() + self._scores(1)

    def gradients(self) -> int:
        """Rows and keys where they are copied, what the kernel gives, and what stays."""
        spec, size, wide = self.spec, self.size, self.wide
        sizes = spec.head_dim + spec.value_dim
        row = ((spec.head_dim + 2 * spec.value_dim) * size + wide) * self.copies_rows * self.rows
        key = sizes * size * self.copies_keys * self.keys
        inputs = row + key * self.passing
        if self.passes == 2:
            inputs = max(inputs, row * self.passing + key)
        total = inputs + (self.rows * spec.head_dim + self.keys * sizes) * size
        columns = self.keys * sizes if self.passes == 2 else 0
        if not self.is_direct:
            total += max(self.rows * spec.head_dim, columns) * wide
        slopes = 3 if spec.softcap is not None else 2
        total += self._padding(rows=3) + self._buffers(gradients=True)
        return total + self._bias() + self._scores(slopes)

    def _buffers(self, *, gradients: bool) -> int:
        """What kernels allocate besides."""
        spec = self.spec
        sizes = TileSizes(
            self.batch, self.heads, self.kv_heads, self.height, self.loaded, spec.head_dim,
            spec.value_dim, self.size,
        )  # fmt: skip
        return buffer_bytes(self.request.kernels, sizes, gradients=gradients)

    def _padding(self, rows: int) -> int:
        """Copies in which query, key and value get one size."""
        spec = self.spec
        if spec.head_dim == spec.value_dim or self.request.computes_scores(spec):
            return 0
        return (rows * self.rows + 2 * self.keys) * max(spec.head_dim, spec.value_dim) * self.size

    def _bias(self) -> int:
        """What is added to the scores of a tile, its booleans and positions."""
        spec, total = self.spec, 0
        is_full = all(visible.is_full for visible in spec.visible)
        if spec.has_bias and not is_full:  # edges are added to the biases of whole tiles
            total += self.height * self.loaded * (self.size + 2)
        elif not all(visible.is_simple for visible in spec.visible):  # of a tile at an edge
            pairs = self._edge_pairs()
            total += pairs * (self.size + 2) + pairs * self.size * self.request.cached_masks
            if "math" in self.request.kernels.masked:
                total += 3 * self.batch * self.heads * pairs * self.wide
        if spec.mask is not None:
            copies = self.batch if spec.mask.by_batch else 1
            copies *= self.heads if spec.mask.by_head else 1
            height = self.height if spec.mask.by_query or not is_full else 1
            bytes_per_pair = copies * (self.size + self.wide + 1) + self.wide
            total += height * self.loaded * bytes_per_pair
            if spec.mask.needs_shift:
                total += max(AT_ONCE, KEYS_AT_ONCE * self.rows) * (2 * self.wide + 2)
        return total

    def _edge_pairs(self) -> int:
        """Pairs of the largest tile at the edge of a mask."""
        side = self.request.masked_side(self.spec) or MASKED_SIDE
        return min(self.height, side) * min(self.loaded, side)

    def _scores(self, copies: int) -> int:
        """Scores, and what else has their size, where matrix products compute them."""
        spec = self.spec
        if not self.request.computes_scores(spec):
            return 0
        narrow = self.size < self.wide
        inputs = (self.rows * spec.head_dim + self.keys * (spec.head_dim + spec.value_dim)) * narrow
        inputs += self.rows * spec.head_dim  # rows of grouped heads side by side
        numbers = copies * self.rows * self.loaded + inputs + 4 * self.rows
        return numbers * self.wide + 2 * self.height * self.loaded  # booleans of a causal tile


def _accumulators(spec: AttentionSpec, cut: Cut, request: PlanRequest) -> int:
    """Bytes of what is summed over a whole sequence, beside the result."""
    size, wide = spec.dtype.itemsize, accumulator_dtype(spec.dtype).itemsize
    ranks, heads = request.ranks, spec.heads // spec.kv_heads
    is_merged = cut.schedule == "cqs"
    if not cut.gradients:
        if not is_merged or request.placement.tiled or (size == wide and ranks == 1):
            return 0
        tokens = ceil_div(spec.queries, ranks)
        return spec.batch * spec.heads * tokens * (spec.value_dim + 1) * wide
    if cut.passes == 2:
        return 0
    sizes, total = spec.head_dim + spec.value_dim, 0
    rows = spec.queries * heads * spec.head_dim if is_merged else 0  # else tile by tile
    columns = spec.keys * sizes
    if size < wide or not request.placement.resident:
        total = (rows + columns) * wide
    if ranks > 1:  # the shard that is being summed
        total += max(rows, columns) // ranks * (wide + size)
    return cut.head_step[0] * cut.head_step[1] * total

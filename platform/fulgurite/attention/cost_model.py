"""What a way to cut attention holds at once, moves and takes.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D size of a query and key,
E size of a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from fulgurite.attention.biases import AT_ONCE, KEYS_AT_ONCE
from fulgurite.attention.kernel_buffers import TileSizes, buffer_bytes
from fulgurite.attention.kernels import TileKernelNames, accumulator_dtype
from fulgurite.attention.quorums import quorum
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.tiles import MASKED_SIDE

__all__ = [
    "BACKWARD_FLOPS",
    "GPU_COSTS",
    "CostEstimate",
    "Cut",
    "MachineCosts",
    "Setting",
    "estimate",
]  # fmt: skip

#: Operations of the backward pass by those of the forward pass (card section 3.5).
BACKWARD_FLOPS = 2.5

_MATH_SLOWDOWN = 2.0  # of tiles computed by matrix products, against a fast kernel (measured)


@dataclass(frozen=True)
class MachineCosts:
    """What work costs on a machine.

    Args:
        flops: Floating operations of a large tile [1/s].
        bandwidth: Bandwidth of copies between where tensors lie and the device [bytes/s].
        call: Overhead of a kernel call and the merge of its result [s].
        merge: What each number of a result costs beside its pairs [s].
        short_tiles: How much slower kernels are on tiles of few queries: the number of queries
            and the factor, ascending; taller tiles than the last are as fast as it.
        fills_with_heads: Whether the queries of all heads together fill the device, so that short
            tiles of many heads are as fast as tall ones.
    """

    flops: float = 5e10
    bandwidth: float = 5e9
    call: float = 3e-5
    merge: float = 1e-9
    short_tiles: tuple[tuple[int, float], ...] = ((64, 1.3), (256, 1.15), (768, 1.0))
    fills_with_heads: bool = False

    def slowdown(self, height: int) -> float:
        """Return the factor of tiles of so many queries, between those that were measured."""
        heights, factors = zip(*self.short_tiles, strict=True)
        return float(np.interp(math.log(max(height, 1)), np.log(heights), factors))


#: Of a large GPU, for plans that are made without measuring (inferred from what is published of
#: an H100: about 320 TFLOP/s, pinned copies of 25 GB/s, a quarter of a millisecond for a call).
GPU_COSTS = MachineCosts(
    flops=3.2e14,
    bandwidth=2.5e10,
    call=2.5e-4,
    merge=1e-11,
    short_tiles=((128, 64.0), (2048, 4.0), (16384, 1.0)),
    fills_with_heads=True,
)


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

    peak_bytes: int
    moved_bytes: int
    calls: int
    flops: float
    seconds: float


class Setting(NamedTuple):
    """What all ways to cut a call have in common; by default, tensors on one CPU.

    Attributes:
        gradients: Whether gradients are computed, not the result.
        resident: Whether the tensors lie on the device, so that tiles are views of them.
        packs: Whether tiles are copied although they lie there, since their last stride is not 1.
        tiled: Whether the result is written tile by tile, so that even a whole is one of tiles.
        ahead: Whether the next tile is copied to the device while one is computed.
        ranks: How many share the tasks.
        costs: Measured costs of the machine.
        kernels: Which compute the tiles.
        masked_side: Side of the largest tiles under the bias of a mask's edge; None for that of
            CPUs.
        cached_masks: How many of these biases are kept.
    """

    gradients: bool = False
    resident: bool = True
    packs: bool = False
    tiled: bool = False
    ahead: bool = False
    ranks: int = 1
    costs: MachineCosts = MachineCosts()
    kernels: TileKernelNames = TileKernelNames()
    masked_side: int | None = None
    cached_masks: int = 0

    def computes_scores(self, spec: AttentionSpec) -> bool:
        """Whether the scores of whole tiles lie in memory."""
        names = self.kernels.masked if spec.has_bias else self.kernels.full
        return spec.needs_math or "math" in names


class Cut(NamedTuple):
    """A way to cut a call.

    Attributes:
        schedule: ``whole``, ``heads``, ``rect`` or ``cqs``.
        head_step: Batch entries and key/value heads at once.
        tile: Queries and keys of a tile.
        chunks: Number of chunks of ``cqs``.
        passes: How often gradients go through all tiles.
    """

    schedule: Literal["whole", "heads", "rect", "cqs"]
    head_step: tuple[int, int]
    tile: tuple[int, int]
    chunks: int = 0
    passes: int = 1


def estimate(spec: AttentionSpec, cut: Cut, setting: Setting) -> CostEstimate:
    """Predict what a way to cut a call takes.

    Source: card section 1.9 (model of memory and time).
    """
    costs, queries, keys = setting.costs, spec.queries, spec.keys
    size, wide = spec.dtype.itemsize, accumulator_dtype(spec.dtype).itemsize
    heads = spec.heads // spec.kv_heads
    together = cut.head_step[0] * cut.head_step[1]  # key/value heads at once
    groups = sum(-(-(end - begin) // cut.head_step[0]) for begin, end, _ in spec.runs())
    groups *= -(-spec.kv_heads // cut.head_step[1])
    if cut.schedule == "cqs":
        members = len(quorum(cut.chunks))
        height = -(-keys // cut.chunks)
        loaded, rows = members * height, cut.chunks * members
        calls = rows * 2 * groups
        passed = cut.chunks * loaded  # tokens loaded over all tasks
    else:
        height, loaded = cut.tile
        rows = -(-queries // height)
        reach = spec.reach(height)
        calls = int(rows * -(-reach // loaded) + 1) * groups
        passed = int(rows * reach)
    if spec.slides:  # the edge of a window is cut into tiles of its own
        calls += 2 * groups * -(-queries // (setting.masked_side or MASKED_SIDE))
    direct = cut.schedule in ("whole", "heads") and spec.is_simple and not setting.tiled
    tile = _TileCost(spec, cut, setting, height, loaded, direct)
    peak = tile.gradients() if setting.gradients else tile.forward()
    peak += _accumulators(spec, cut, setting, direct)
    kv_heads = spec.batch * spec.kv_heads
    sizes = spec.head_dim + spec.value_dim
    writes = spec.batch * spec.heads * queries * (sizes * size + wide)
    if cut.schedule == "cqs":  # results are read, merged and written by each task of a chunk
        merged = kv_heads * heads * queries * (spec.value_dim + 1) * wide
        writes += 2 * len(quorum(cut.chunks)) * merged
    moved = writes + kv_heads * passed * sizes * size
    flops = 2.0 * spec.pairs * sizes * spec.heads
    if setting.gradients:
        flops *= BACKWARD_FLOPS * cut.passes
        moved *= 1 + cut.passes
    copied = moved if not setting.resident else (moved - writes if cut.schedule == "cqs" else 0)
    if setting.computes_scores(spec):
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
        setting: Setting,
        height: int,
        loaded: int,
        direct: bool,
    ) -> None:
        self.spec, self.setting, self.passes, self.direct = spec, setting, cut.passes, direct
        self.size, self.wide = spec.dtype.itemsize, accumulator_dtype(spec.dtype).itemsize
        self.batch, self.kv_heads = cut.head_step
        self.heads = self.kv_heads * (spec.heads // spec.kv_heads)
        self.height, self.loaded = height, loaded
        self.rows = self.batch * self.heads * height  # of all heads together
        self.keys = self.batch * self.kv_heads * loaded
        self.passing = 2 if setting.ahead else 1  # what is copied ahead counts twice
        self.copies_rows = not setting.resident or setting.packs
        self.copies_keys = self.copies_rows or cut.schedule == "cqs"

    def forward(self) -> int:
        """Query, key and value where they are copied, what the kernel gives, and accumulators."""
        spec, size, wide = self.spec, self.size, self.wide
        total = self.rows * spec.head_dim * size * self.copies_rows
        total += (
            self.keys * (spec.head_dim + spec.value_dim) * size * self.copies_keys * self.passing
        )
        total += self.rows * (spec.value_dim * size + wide)
        if not self.direct:  # and what merging takes for a moment
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
        if not self.direct:
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
        return buffer_bytes(self.setting.kernels, sizes, gradients=gradients)

    def _padding(self, rows: int) -> int:
        """Copies in which query, key and value get one size."""
        spec = self.spec
        if spec.head_dim == spec.value_dim or self.setting.computes_scores(spec):
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
            total += pairs * (self.size + 2) + pairs * self.size * self.setting.cached_masks
            if "math" in self.setting.kernels.masked:
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
        side = self.setting.masked_side or MASKED_SIDE
        return min(self.height, side) * min(self.loaded, side)

    def _scores(self, copies: int) -> int:
        """Scores, and what else has their size, where matrix products compute them."""
        spec = self.spec
        if not self.setting.computes_scores(spec):
            return 0
        narrow = self.size < self.wide
        inputs = (self.rows * spec.head_dim + self.keys * (spec.head_dim + spec.value_dim)) * narrow
        inputs += self.rows * spec.head_dim  # rows of grouped heads side by side
        numbers = copies * self.rows * self.loaded + inputs + 4 * self.rows
        return numbers * self.wide + 2 * self.height * self.loaded  # booleans of a causal tile


def _accumulators(spec: AttentionSpec, cut: Cut, setting: Setting, direct: bool) -> int:
    """Bytes of what is summed over a whole sequence, beside the result."""
    if direct:
        return 0
    size, wide = spec.dtype.itemsize, accumulator_dtype(spec.dtype).itemsize
    ranks, heads = setting.ranks, spec.heads // spec.kv_heads
    is_merged = cut.schedule == "cqs"
    if not setting.gradients:
        if not is_merged or setting.tiled or (size == wide and ranks == 1):
            return 0
        tokens = -(-spec.queries // ranks)
        return spec.batch * spec.heads * tokens * (spec.value_dim + 1) * wide
    if cut.passes == 2:
        return 0
    sizes, total = spec.head_dim + spec.value_dim, 0
    rows = spec.queries * heads * spec.head_dim if is_merged else 0  # else tile by tile
    columns = spec.keys * sizes
    if size < wide or not setting.resident:
        total = (rows + columns) * wide
    if ranks > 1:  # the shard that is being summed
        total += max(rows, columns) // ranks * (wide + size)
    return cut.head_step[0] * cut.head_step[1] * total

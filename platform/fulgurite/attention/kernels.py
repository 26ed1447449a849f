"""Attention of one tile with its log-sum-exp, forward and backward, on stock PyTorch kernels.

Here are the kernel of CPUs and the one for everything else; those of CUDA are in
:mod:`fulgurite.attention.cuda_kernels`, and the choice between them in
:mod:`fulgurite.attention.kernel_choice`.

A tile is a rectangle of scores that one kernel call computes: all pairs, a causal square, or pairs
under an additive bias. Tiles never have rows without keys except under a bias.

Axes: B batch, H query heads, G key/value heads (G divides H), M queries, N keys, D size of a query
and key, E size of a value.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "AtenCpuFlash",
    "MathKernel",
    "TileInputs",
    "TileKernel",
    "TileKernelNames",
    "accumulator_dtype",
    "empty_rows",
    "repeat_heads",
    "sum_heads",
]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of log-sum-exps and of what is summed over tiles: float64 for float64, else float32.

    Example:
        >>> accumulator_dtype(torch.bfloat16)
        torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


class TileInputs(NamedTuple):
    """What a kernel computes the attention of.

    Attributes:
        query: Shape: (B, H, M, D).
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, E).
        scale: Scale of the products of query and key.
        is_causal: Query i sees keys up to i.
        bias: Added to the scores, −inf where nothing is seen. Shape: one that broadcasts to
            (B, H, M, N), with N keys.
        softcap: Scores s become softcap · tanh(s / softcap) before the bias is added.
        shift: Subtracted from the scores of each row; the log-sum-exp is that of what is left.
            Shape: one that broadcasts to (B, H, M).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    is_causal: bool = False
    bias: Tensor | None = None
    softcap: float | None = None
    shift: Tensor | None = None


class TileKernelNames(NamedTuple):
    """Which kernels compute the tiles of a call.

    Attributes:
        full: For all pairs and causal squares, whatever their size: ``cpu`` or some of
            :data:`~fulgurite.attention.kernel_choice.KERNEL_NAMES`.
        masked: For tiles under a bias.
        processors: Multiprocessors among which deterministic gradients are divided; 0 where they
            need not be deterministic.
    """

    full: tuple[str, ...] = ("cpu",)
    masked: tuple[str, ...] = ("cpu",)
    processors: int = 0


class TileKernel(Protocol):
    """Computes a tile.

    Shape:
        - forward -> out (B, H, M, E) in the type of query, lse (B, H, M) natural logarithm in
          :func:`accumulator_dtype`, −inf for a row without keys
        - backward -> gradients of query, key and value in their types
    """

    def forward(self, tile: TileInputs) -> tuple[Tensor, Tensor]:
        """Attention within the tile."""
        ...

    def backward(
        self, tile: TileInputs, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Share of the tile in the gradients, given the out and lse over all keys.

        Args:
            tile: What was computed.
            grad: Gradient of out. Shape: (B, H, M, E).
            out: Over all keys. Shape: (B, H, M, E).
            lse: Over all keys, +inf for rows without any. Shape: (B, H, M).
        """
        ...


class AtenCpuFlash:
    """The CPU's flash kernel of PyTorch; all floating types, any D and E, grouped heads.

    The operator takes the last stride of its inputs for 1 without looking, and one size for query,
    key and value: tiles are copied where they are otherwise.

    Source: docs/papers/stream_cqsa.md section 4.1 (how the kernel behaves was measured there).
    """

    def forward(self, tile: TileInputs) -> tuple[Tensor, Tensor]:
        """See :class:`TileKernel`."""
        width = max(tile.query.shape[-1], tile.value.shape[-1])
        query, key, value = (_pack_rows(x, width) for x in tile[:3])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, tile.is_causal, attn_mask=_mask(tile), scale=tile.scale
        )
        if tile.bias is not None:  # the kernel gives a row without keys the lse 0
            lse = lse.masked_fill(empty_rows(tile.bias), -math.inf)
        return out[..., : tile.value.shape[-1]], lse

    def backward(
        self, tile: TileInputs, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`TileKernel`."""
        width = max(tile.query.shape[-1], tile.value.shape[-1])
        inputs = [_pack_rows(x, width) for x in (grad, *tile[:3], out)]
        dquery, dkey, dvalue = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, lse, 0.0, tile.is_causal, attn_mask=_mask(tile), scale=tile.scale
        )
        size = tile.query.shape[-1]
        return dquery[..., :size], dkey[..., :size], dvalue[..., : tile.value.shape[-1]]


def _pack_rows(tensor: Tensor, width: int) -> Tensor:
    """Give rows of a tile a width, with zeros, and a last stride of 1. Shape: (..., D)."""
    if tensor.shape[-1] < width:
        return F.pad(tensor, (0, width - tensor.shape[-1]))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _mask(tile: TileInputs) -> Tensor | None:
    """The bias as the CPU's kernel takes it: with all keys, in the type of query or float32."""
    if tile.bias is None:
        return None
    return tile.bias.expand(*tile.bias.shape[:-1], tile.key.shape[2])


class MathKernel:
    """Matrix products that hold the scores of the tile.

    For softcap, scales that are not positive, shifted rows and gradients of a bias, which no fast
    kernel does; and for devices and types without one.
    """

    def forward(self, tile: TileInputs) -> tuple[Tensor, Tensor]:
        """See :class:`TileKernel`."""
        dtype = accumulator_dtype(tile.query.dtype)
        with _without_autocast(tile.query.device):
            scores = _scores(tile)[0]
            largest = scores.amax(-1)
            safe = largest.masked_fill(largest == -math.inf, 0.0)
            weights = scores.sub_(safe[..., None]).exp_()
            total = weights.sum(-1)
            out = _times_keys(weights, tile.value.to(dtype))
            out /= total.masked_fill(total == 0, 1.0)[..., None]
            lse = total.log_().add_(safe)
        return out.to(tile.query.dtype), lse

    def backward(
        self, tile: TileInputs, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`TileKernel`.

        Source: docs/papers/stream_cqsa.md section 1.7; the derivative of softcap: inferred.
        """
        query, key, value = tile[:3]
        dtype = accumulator_dtype(query.dtype)
        with _without_autocast(query.device):
            grad = grad.to(dtype)
            weights, dscores, slope = self._weights(tile, grad, out, lse)
            dvalue = _times_rows(weights, grad, value.shape[1])
            del weights
            if slope is not None:
                dscores *= slope
            dquery = _times_keys(dscores, key.to(dtype)).mul_(tile.scale)
            dkey = _times_rows(dscores, query.to(dtype), key.shape[1]).mul_(tile.scale)
        return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype)

    def bias_gradient(self, tile: TileInputs, grad: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """Gradient of the bias. Shape: (B, H, M, N), in the type of accumulators.

        Args:
            tile: What was computed.
            grad: Gradient of the result, as for :meth:`backward`.
            out: Result over all keys.
            lse: Log-sum-exp over all keys.
        """
        with _without_autocast(tile.query.device):
            return self._weights(tile, grad.to(accumulator_dtype(grad.dtype)), out, lse)[1]

    def _weights(
        self, tile: TileInputs, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attention weights, gradient of the capped scores, and the slope of the cap, if any."""
        dtype = grad.dtype
        scores, slope = _scores(tile, with_slope=True)
        weights = scores.sub_(lse[..., None]).exp_()
        inner = (grad * out.to(dtype)).sum(-1, keepdim=True)
        dscores = _times_queries(grad, tile.value.to(dtype)).sub_(inner).mul_(weights)
        return weights, dscores, slope


def _scores(tile: TileInputs, *, with_slope: bool = False) -> tuple[Tensor, Tensor | None]:
    """Scores (B, H, M, N) in the type of accumulators, and the derivative of softcap, if any."""
    dtype = accumulator_dtype(tile.query.dtype)
    scores = _times_queries(tile.query.to(dtype), tile.key.to(dtype)).mul_(tile.scale)
    slope = None
    if tile.softcap is not None:
        scores.div_(tile.softcap).tanh_()
        if with_slope:
            slope = scores.square().neg_().add_(1.0)
        scores.mul_(tile.softcap)
    if tile.bias is not None:
        scores += tile.bias.to(dtype)
    if tile.shift is not None:
        scores -= tile.shift[..., None]
    if tile.is_causal:
        after = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(after, -math.inf)
    return scores, slope


def _by_groups(tensor: Tensor, groups: int) -> Tensor:
    """Rows of all query heads of a key/value head together. (B, H, M, X) -> (B, G, H/G·M, X)."""
    return tensor.reshape(tensor.shape[0], groups, -1, tensor.shape[-1])


def _times_queries(rows: Tensor, keys: Tensor) -> Tensor:
    """Products of rows and keys. (B, H, M, D), (B, G, N, D) -> (B, H, M, N)."""
    product = _by_groups(rows, keys.shape[1]) @ keys.mT
    return product.view(*rows.shape[:3], keys.shape[2])


def _times_keys(weights: Tensor, keys: Tensor) -> Tensor:
    """Weighted sums of keys. (B, H, M, N), (B, G, N, D) -> (B, H, M, D)."""
    product = _by_groups(weights, keys.shape[1]) @ keys
    return product.view(*weights.shape[:3], keys.shape[3])


def _times_rows(weights: Tensor, rows: Tensor, groups: int) -> Tensor:
    """Weighted sums of rows over all heads of a group. -> (B, G, N, D)."""
    return _by_groups(weights, groups).mT @ _by_groups(rows, groups)


def repeat_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """Give each query head its key/value head. (B, G, N, D) -> (B, H, N, D)."""
    group = query.shape[1] // tensor.shape[1]
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)


def sum_heads(grad: Tensor, tensor: Tensor) -> Tensor:
    """Sum over the query heads of each key/value head. (B, H, N, D) -> (B, G, N, D)."""
    batch, kv_heads = tensor.shape[:2]
    return grad.reshape(batch, kv_heads, -1, *grad.shape[2:]).sum(2)


def empty_rows(bias: Tensor) -> Tensor:
    """Rows in which a bias hides every key. (..., M, N) -> (..., M)."""
    return (bias == -math.inf).all(-1)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where matrix products keep the type of what they are given."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()

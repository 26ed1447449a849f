"""Attention of one tile with its log-sum-exp, forward and backward, on stock PyTorch kernels.

Here are the kernel of CPUs and the one for everything else; those of CUDA are in
:mod:`fulgurite.attention.cuda_kernels`.

A tile is a rectangle of scores that one kernel call computes: all pairs, a causal square, or pairs
under an additive bias. Tiles never have rows without keys except under a bias.

Axes: B batch, H query heads, G key/value heads (G divides H), M queries, N keys, D head size.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from fulgurite.errors import ConfigError

__all__ = [
    "AtenCpuFlash",
    "Eager",
    "TileKernel",
    "accumulator_dtype",
    "empty_rows",
    "kernel_for",
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


class TileKernel(Protocol):
    """Computes a tile.

    Shape:
        - query: (B, H, M, D); key, value: (B, G, N, D); bias: (B or 1, 1, M, N) or None
        - forward -> out (B, H, M, D) in the type of query, lse (B, H, M) natural logarithm in
          :func:`accumulator_dtype`, −inf for a row without keys
        - backward -> gradients of query, key and value in their types
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool,
        scale: float,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention within the tile."""
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        is_causal: bool,
        scale: float,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Share of the tile in the gradients, given the out and lse over all keys."""
        ...


class AtenCpuFlash:
    """The CPU's flash kernel of PyTorch; all floating types, any D, grouped heads.

    Source: card section 4.1 (how the kernel behaves was measured there).
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool,
        scale: float,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`TileKernel`."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
        )
        if bias is not None:  # the kernel gives a row without keys the lse 0
            lse = lse.masked_fill(empty_rows(bias), -math.inf)
        return out, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        is_causal: bool,
        scale: float,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`TileKernel`."""
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale
        )
        return grads[0], grads[1], grads[2]


class Eager:
    """Matrix products that hold the scores of the tile; for devices and types without a kernel."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool,
        scale: float,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`TileKernel`."""
        dtype = accumulator_dtype(query.dtype)
        with _without_autocast(query.device):
            scores = self._scores(query, key, is_causal, scale, bias)
            lse = scores.logsumexp(-1)
            weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
            out = weights @ repeat_heads(value.to(dtype), query)
        return out.to(query.dtype), lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        is_causal: bool,
        scale: float,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`TileKernel`.

        Source: card section 1.7.
        """
        dtype = accumulator_dtype(query.dtype)
        with _without_autocast(query.device):
            weights = (self._scores(query, key, is_causal, scale, bias) - lse[..., None]).exp()
            grad = grad.to(dtype)
            inner = (grad * out.to(dtype)).sum(-1, keepdim=True)
            dscores = weights * (grad @ repeat_heads(value.to(dtype), query).mT - inner)
            dquery = dscores @ repeat_heads(key.to(dtype), query) * scale
            dkey = sum_heads(dscores.mT @ query.to(dtype) * scale, key)
            dvalue = sum_heads(weights.mT @ grad, value)
        return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype)

    @staticmethod
    def _scores(
        query: Tensor, key: Tensor, is_causal: bool, scale: float, bias: Tensor | None
    ) -> Tensor:
        dtype = accumulator_dtype(query.dtype)
        scores = query.to(dtype) @ repeat_heads(key.to(dtype), query).mT * scale
        if bias is not None:
            scores = scores + bias.to(dtype)
        if is_causal:
            after = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(after, -math.inf)
        return scores


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


def kernel_for(
    device: torch.device, dtype: torch.dtype, *, prefer: str | None = None
) -> TileKernel:
    """Return the kernel for tiles of a type on a device.

    Args:
        device: Where tiles are computed.
        dtype: Of query, key and value.
        prefer: On CUDA, the kernel to try first: flash, cudnn or efficient; or eager for none.

    Raises:
        ConfigError: The type is no floating type that attention can do, or there is no such kernel.

    Example:
        >>> type(kernel_for(torch.device("cpu"), torch.bfloat16)).__name__
        'AtenCpuFlash'
    """
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"Attention does not do {dtype}.", "Use float64, float32, bfloat16 or float16."
        )
    if device.type == "cuda":
        from fulgurite.attention.cuda_kernels import cuda_kernel  # builds on this module

        return cuda_kernel(dtype, prefer)
    return AtenCpuFlash() if device.type == "cpu" else Eager()

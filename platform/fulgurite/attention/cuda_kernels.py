"""The attention operators of PyTorch for CUDA as tile kernels.

Axes: B batch, H query heads, G key/value heads (G divides H), M queries, N keys, D head size.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.attention.kernels import TileInputs, TileKernel, empty_rows, repeat_heads, sum_heads
from fulgurite.errors import ConfigError

__all__ = [
    "CUDA_KERNELS", "AtenCudaEfficient", "AtenCudaFlash", "AtenCudnn", "CudaKernel", "align_rows",
    "row_width",
]  # fmt: skip

# Elements: kernels load 16 bytes at once, which is 8 numbers of a half type.
_ALIGNMENT = 8

# The efficient kernel's log-sum-exp has a multiple of so many rows.
_LSE_ROWS = 32

_HALF = (torch.float16, torch.bfloat16)

# The first version of cuDNN, as PyTorch numbers them, that does any number of tokens: 9.15.1.
_SOUND_CUDNN = 91501


class CudaKernel(TileKernel, Protocol):
    """A tile kernel that does not take every tile."""

    def takes(self, tile: TileInputs) -> bool:
        """Whether it is made for tiles like this."""
        ...


class _AtenKernel:
    """Brings tiles into the form that the operators of its heirs take, and their results back.

    Attributes:
        has_groups: Whether the operators take fewer key/value heads than query heads; where they
            do not, each query head gets a copy of its key/value head.
        has_bias: Whether they take a bias.
    """

    has_groups = False
    has_bias = True

    def forward(self, tile: TileInputs) -> tuple[Tensor, Tensor]:
        """See :class:`~fulgurite.attention.kernels.TileKernel`."""
        out, lse = self._forward(self.align_tile(tile))
        out = out.narrow(-1, 0, tile.value.shape[-1])
        if tile.bias is None:
            return out, lse
        empty = empty_rows(tile.bias)  # what operators give rows without keys differs
        return out.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, -math.inf)

    def backward(
        self, tile: TileInputs, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~fulgurite.attention.kernels.TileKernel`."""
        query, key, value = tile[:3]
        width = max(query.shape[-1], value.shape[-1])
        grads = self._backward(
            self.align_tile(tile),
            align_rows(grad, width),
            align_rows(out, width),
            _contiguous(lse),
        )
        sizes = query.shape[-1], key.shape[-1], value.shape[-1]
        narrow = (x.narrow(-1, 0, size) for x, size in zip(grads[:3], sizes, strict=True))
        dquery, dkey, dvalue = narrow
        if dkey.shape[1] != key.shape[1]:  # in autocast, sums are float32
            dkey, dvalue = (sum_heads(x, key).to(key.dtype) for x in (dkey, dvalue))
        return dquery, dkey, dvalue

    def align_tile(self, tile: TileInputs) -> TileInputs:
        """Return a tile whose tensors the operators can load."""
        query, key, value = tile[:3]
        bias, width = tile.bias, max(query.shape[-1], value.shape[-1])
        if not self.has_groups:
            key, value = repeat_heads(key, query), repeat_heads(value, query)
        if bias is not None:
            if not self.has_bias:
                raise ConfigError("This kernel does no bias.", "Use the one of kernel_for.")
            bias = bias.to(query.dtype).expand(*bias.shape[:2], query.shape[2], key.shape[2])
            if not _is_aligned(bias):
                bias = align_rows(bias).narrow(-1, 0, key.shape[2])
        query, key, value = (align_rows(x, width) for x in (query, key, value))
        return tile._replace(query=query, key=key, value=value, bias=bias)

    def _forward(self, tile: TileInputs) -> tuple[Tensor, Tensor]:
        """Out (B, H, M, D) and log-sum-exp (B, H, M)."""
        raise NotImplementedError

    def _backward(
        self, tile: TileInputs, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of query, key and value of the tile."""
        raise NotImplementedError


class AtenCudaFlash(_AtenKernel):
    """PyTorch's FlashAttention: half types, D up to 256, grouped heads, no bias.

    The implementations that ``torch.nn.attention.activate_flash_attention_impl`` puts behind the
    same operators (FlashAttention 3 and 4) are used once a program has activated them.

    Source: docs/papers/stream_cqsa.md section 4.1; inferred from PyTorch's sources: the kernel
    takes the log-sum-exp for contiguous without looking, and masks a causal rectangle from its
    lower right corner.
    """

    has_groups = True
    has_bias = False

    def takes(self, tile: TileInputs) -> bool:
        """See :class:`CudaKernel`."""
        if tile.bias is not None or tile.query.dtype not in _HALF or row_width(tile) > 256:
            return False
        return not tile.is_causal or tile.query.shape[2] == tile.key.shape[2]

    def _forward(self, tile: TileInputs) -> tuple[Tensor, Tensor]:
        query, key, value, scale, is_causal, *_ = tile
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, scale=scale
        )
        return out, lse

    def _backward(
        self, tile: TileInputs, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        query, key, value, scale, is_causal, *_ = tile
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
            *(grad, query, key, value, out, lse),
            *(None, None, query.shape[2], key.shape[2]),  # sequences are not packed
            *(0.0, is_causal, *_no_seeds(query)),
            scale=scale,
        )


class AtenCudaEfficient(_AtenKernel):
    """PyTorch's memory-efficient attention: float32 and half types, any D, bias.

    Source: docs/papers/stream_cqsa.md section 4.1; inferred from PyTorch's sources: the layout that
    the backward kernel takes for granted, and that infinite log-sum-exps mark rows that take no
    part.
    """

    def takes(self, tile: TileInputs) -> bool:
        """See :class:`CudaKernel`."""
        return tile.query.dtype in (*_HALF, torch.float32)

    def _forward(self, tile: TileInputs) -> tuple[Tensor, Tensor]:
        query, key, value, scale, is_causal, bias, *_ = _for_all_heads(tile)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, is_causal, scale=scale
        )
        return out, lse.narrow(-1, 0, query.shape[2])

    def _backward(
        self, tile: TileInputs, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        query, key, value, scale, is_causal, bias, *_ = _for_all_heads(tile)
        # (B, M, H, D) in memory: the kernel takes H * D for the way from token to token
        out = _contiguous(out.transpose(1, 2)).transpose(1, 2)
        lse = F.pad(lse, (0, -lse.shape[-1] % _LSE_ROWS), value=math.inf)
        return torch.ops.aten._scaled_dot_product_efficient_attention_backward(  # type: ignore[no-any-return]
            *(grad, query, key, value, bias, out, lse, *_no_seeds(query)),
            *(0.0, [True, True, True, False], is_causal),
            scale=scale,
        )


class AtenCudnn(_AtenKernel):
    """cuDNN's attention: half types, D up to 128, no bias.

    Some versions of cuDNN do larger D on some devices, others not; none is deterministic. Under a
    bias, versions up to 9.20 give NaN gradients where the last tile of keys is half full and a
    log-sum-exp is below -88; versions up to 9.15.0 leave their tensors where the number of tokens
    is no multiple of 128.

    Source: docs/papers/stream_cqsa.md section 4.1; the limits: inferred from PyTorch's sources, and
    from its issues 169849 and 196678.
    """

    has_bias = False

    def takes(self, tile: TileInputs) -> bool:
        """See :class:`CudaKernel`."""
        if tile.bias is not None or tile.query.dtype not in _HALF or row_width(tile) > 128:
            return False
        if (torch.backends.cudnn.version() or 0) < _SOUND_CUDNN:  # type: ignore[no-untyped-call]
            return False
        if 1 in (tile.query.shape[2], tile.key.shape[2]):
            return False
        strict = not torch.is_deterministic_algorithms_warn_only_enabled()
        return not (torch.are_deterministic_algorithms_enabled() and strict)

    def _forward(self, tile: TileInputs) -> tuple[Tensor, Tensor]:
        query, key, value, scale, is_causal, *_ = tile
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, is_causal, scale=scale
        )
        return out, lse.reshape(query.shape[:3])  # from (B, H, M, 1)

    def _backward(
        self, tile: TileInputs, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        query, key, value, scale, is_causal, *_ = tile
        lse = lse.clamp(max=1e30)  # rows without keys: exp(score - 1e30) is 0, and 1e30 a number
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(  # type: ignore[no-any-return]
            *(grad, query, key, value, out, lse.unsqueeze(-1), *_no_seeds(query), None),
            *(None, None, query.shape[2], key.shape[2]),  # sequences are not packed
            *(0.0, is_causal),
            scale=scale,
        )


def row_width(tile: TileInputs) -> int:
    """The size that query, key and value are given, since operators take one."""
    return max(tile.query.shape[-1], tile.value.shape[-1])


def align_rows(tensor: Tensor, width: int = 0) -> Tensor:
    """Give rows a length and offsets that kernels can load, where they have not.

    Zeros at the end of each row leave scores as they are. Shape: (..., D) -> (..., D or more).
    """
    width = max(width, tensor.shape[-1])
    if extra := width + -width % _ALIGNMENT - tensor.shape[-1]:
        return F.pad(tensor, (0, extra))
    return tensor if _is_aligned(tensor) else _contiguous(tensor)


def _contiguous(tensor: Tensor) -> Tensor:
    """A copy; ``contiguous`` would leave any steps in axes of size 1, and any start."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether rows lie in one piece, each at a multiple of what is loaded at once."""
    steps = (tensor.storage_offset(), *tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and not any(step % _ALIGNMENT for step in steps)


def _for_all_heads(tile: TileInputs) -> TileInputs:
    """A tile with a view of its bias for each head. Shape: (B or 1, 1, M, N) -> (B, H, M, N)."""
    if tile.bias is None:
        return tile
    return tile._replace(bias=tile.bias.expand(*tile.query.shape[:3], tile.key.shape[2]))


def _no_seeds(query: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of the state of a random generator, of which only dropout makes use."""
    seed = query.new_empty((), dtype=torch.int64)
    return seed, seed


#: In the order in which they are tried.
CUDA_KERNELS: dict[str, CudaKernel] = {
    "flash": AtenCudaFlash(),
    "cudnn": AtenCudnn(),
    "efficient": AtenCudaEfficient(),
}

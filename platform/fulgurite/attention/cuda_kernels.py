"""The attention kernels of PyTorch for CUDA as tile kernels, and the choice between them.

A kernel is trusted after its results have been compared once with those of
:class:`~fulgurite.attention.kernels.MathKernel`, on the device, in the type and for the head size
of the call.

Axes: B batch, H query heads, G key/value heads (G divides H), M queries, N keys, D head size.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from fulgurite.attention.kernels import (
    KERNEL_NAMES,
    MathKernel,
    TileInputs,
    TileKernel,
    TileKernelNames,
    accumulator_dtype,
    empty_rows,
    repeat_heads,
    sum_heads,
)
from fulgurite.errors import ConfigError

__all__ = [
    "AtenCudaEfficient", "AtenCudaFlash", "AtenCudnn", "CheckedKernels", "cuda_kernel",
    "cuda_kernel_names",
]  # fmt: skip

# Elements: kernels load 16 bytes at once, which is 8 numbers of a half type.
_ALIGNMENT = 8

# The efficient kernel's log-sum-exp has a multiple of so many rows.
_LSE_ROWS = 32

_HALF = (torch.float16, torch.bfloat16)

# The first version of cuDNN, as PyTorch numbers them, that does any number of tokens: 9.15.1.
_SOUND_CUDNN = 91501

# From so many queries and keys on cuDNN is the faster kernel on GPUs of these generations; below
# it, building its graph for each shape costs more than it saves.
_LARGE_TILE, _CUDNN_GENERATIONS = 4096, (9, 10)

# Largest error that a right kernel may have, relative to the largest number of the result. Right
# kernels stay below a quarter of it.
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 6e-3, torch.float32: 1e-4}
_LSE_TOLERANCE = 1e-3


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
        out, lse = self._forward(self._aligned_tile(tile))
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
            self._aligned_tile(tile),
            _align_rows(grad, width),
            _align_rows(out, width),
            _contiguous(lse),
        )
        sizes = query.shape[-1], key.shape[-1], value.shape[-1]
        narrow = (x.narrow(-1, 0, size) for x, size in zip(grads[:3], sizes, strict=True))
        dquery, dkey, dvalue = narrow
        if dkey.shape[1] != key.shape[1]:  # in autocast, sums are float32
            dkey, dvalue = (sum_heads(x, key).to(key.dtype) for x in (dkey, dvalue))
        return dquery, dkey, dvalue

    def _aligned_tile(self, tile: TileInputs) -> TileInputs:
        query, key, value = tile[:3]
        bias, width = tile.bias, max(query.shape[-1], value.shape[-1])
        if not self.has_groups:
            key, value = repeat_heads(key, query), repeat_heads(value, query)
        if bias is not None:
            if not self.has_bias:
                raise ConfigError("This kernel does no bias.", "Use the one of kernel_for.")
            bias = bias.to(query.dtype).expand(*bias.shape[:2], query.shape[2], key.shape[2])
            if not _is_aligned(bias):
                bias = _align_rows(bias).narrow(-1, 0, key.shape[2])
        query, key, value = (_align_rows(x, width) for x in (query, key, value))
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

    Source: card section 4.1; inferred from PyTorch's sources: the kernel takes the log-sum-exp for
    contiguous without looking, and masks a causal rectangle from its lower right corner.
    """

    has_groups = True
    has_bias = False

    def takes(self, tile: TileInputs) -> bool:
        """See :class:`CudaKernel`."""
        if tile.bias is not None or tile.query.dtype not in _HALF or _width(tile) > 256:
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

    Source: card section 4.1; inferred from PyTorch's sources: the layout that the backward kernel
    takes for granted, and that infinite log-sum-exps mark rows that take no part.
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

    Source: card section 4.1; the limits: inferred from PyTorch's sources, and from its issues
    169849 and 196678.
    """

    has_bias = False

    def takes(self, tile: TileInputs) -> bool:
        """See :class:`CudaKernel`."""
        if tile.bias is not None or tile.query.dtype not in _HALF or _width(tile) > 128:
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


# In the order in which they are tried.
_KERNELS: dict[str, CudaKernel] = {
    "flash": AtenCudaFlash(),
    "cudnn": AtenCudnn(),
    "efficient": AtenCudaEfficient(),
}


@dataclass(frozen=True)
class CheckedKernels:
    """Computes each tile with the first kernel that takes it and that gave the right numbers.

    Args:
        names: Names of the kernels, in the order in which they are tried; after them
            :class:`~fulgurite.attention.kernels.MathKernel` is.
        orders_by_size: Whether cuDNN is tried first for large tiles, on GPUs where it is the
            fastest.
    """

    names: tuple[str, ...]
    orders_by_size: bool = False

    def forward(self, tile: TileInputs) -> tuple[Tensor, Tensor]:
        """See :class:`~fulgurite.attention.kernels.TileKernel`."""
        return self.kernel(tile).forward(tile)

    def backward(
        self, tile: TileInputs, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~fulgurite.attention.kernels.TileKernel`."""
        return self.kernel(tile).backward(tile, grad, out, lse)

    def kernel(self, tile: TileInputs) -> TileKernel:
        """Return the kernel for tiles like this."""
        name = self.kernel_name(tile)
        return MathKernel() if name == "math" else _KERNELS[name]

    def kernel_name(self, tile: TileInputs, device: torch.device | None = None) -> str:
        """Return the name of the kernel for tiles like this.

        Args:
            tile: Whose types and sizes are looked at, never its numbers.
            device: Where it would be computed; by default where the tile is.
        """
        device = device or tile.query.device
        width, is_biased = _width(tile), tile.bias is not None
        for name in self._order(tile, device):
            if _KERNELS[name].takes(tile) and _is_right(
                name, device, tile.query.dtype, width, is_biased
            ):
                return name
        return "math"

    def _order(self, tile: TileInputs, device: torch.device) -> tuple[str, ...]:
        is_large = min(tile.query.shape[2], tile.key.shape[2]) >= _LARGE_TILE
        if self.orders_by_size and is_large and _prefers_cudnn(device):
            return tuple(sorted(self.names, key=lambda name: name != "cudnn"))
        return self.names


def cuda_kernel(dtype: torch.dtype, prefer: str | None = None) -> TileKernel:
    """Return the kernel for tiles of a type on a CUDA device.

    Args:
        dtype: Data type of query, key and value.
        prefer: Kernel to try before the others: flash, cudnn or efficient; or math for none.

    Raises:
        ConfigError: There is no kernel of this name.

    Example:
        >>> cuda_kernel(torch.bfloat16, prefer="cudnn").names
        ('cudnn', 'flash', 'efficient')
    """
    if prefer not in (None, *KERNEL_NAMES):
        raise ConfigError(
            f"There is no attention kernel {prefer!r}.", f"Use {', '.join(KERNEL_NAMES)}."
        )
    if prefer == "math" or dtype not in _TOLERANCE:
        return MathKernel()
    return CheckedKernels(tuple(sorted(_KERNELS, key=lambda name: name != prefer)), prefer is None)


def cuda_kernel_names(
    device: torch.device, dtype: torch.dtype, head_dim: int, prefer: str | None, has_wide_bias: bool
) -> TileKernelNames:
    """Return which kernels compute the tiles of a call, for its plan.

    Args:
        device: A GPU of this machine.
        dtype: Data type of query, key and value.
        head_dim: The larger of D and E.
        prefer: Kernel to try before the others.
        has_wide_bias: Whether a bias is wider than ``dtype``, which only matrix products add.
    """
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    strict = is_deterministic and not torch.is_deterministic_algorithms_warn_only_enabled()
    return _kernel_names(device, dtype, head_dim, prefer, has_wide_bias, strict)


@functools.cache
def _kernel_names(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    prefer: str | None,
    has_wide_bias: bool,
    is_deterministic: bool,
) -> TileKernelNames:
    kernel = cuda_kernel(dtype, prefer)
    if not isinstance(kernel, CheckedKernels):
        return TileKernelNames(("math",), ("math",))
    full = [
        kernel.kernel_name(_shapes_alone(side, dtype, head_dim), device)
        for side in (_LARGE_TILE, _LARGE_TILE // 2)
    ]
    masked = "math"
    if not has_wide_bias:
        masked = kernel.kernel_name(_shapes_alone(64, dtype, head_dim, biased=True), device)
    processors = 0
    if is_deterministic:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return TileKernelNames(tuple(dict.fromkeys(full)), (masked,), processors)


def _shapes_alone(side: int, dtype: torch.dtype, head_dim: int, biased: bool = False) -> TileInputs:
    """A tile without numbers."""
    rows = torch.empty(1, 1, side, head_dim, dtype=dtype, device="meta")
    bias = rows.new_empty(1, 1, side, side) if biased else None
    return TileInputs(rows, rows, rows, 1.0, False, bias)


@functools.cache
def _prefers_cudnn(device: torch.device) -> bool:
    """Whether cuDNN is the fastest kernel for large tiles, as PyTorch itself has it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] in _CUDNN_GENERATIONS


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_right(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, biased: bool
) -> bool:
    """Whether a kernel gives the right numbers; found out once, and by compilers not traced."""
    return _compare_kernel(name, device, dtype, head_dim, biased)


@functools.cache
def _compare_kernel(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, biased: bool
) -> bool:
    if device.type == "cuda" and torch.cuda.is_available():
        _refuse_capture(name)
    kernel = _KERNELS[name]
    # whatever the caller is in (fake tensors, counters of operations), this is computed
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        kinds = ("bias", "low bias") if biased else ("full", "causal", "low")
        faults = (_fault(kernel, device, dtype, head_dim, kind) for kind in kinds)
        fault = next(filter(None, faults), None)
    if fault:
        warnings.warn(
            f"The {name} kernel is not used for attention{' under a bias' if biased else ''} in "
            f"{str(dtype).removeprefix('torch.')} with head size {head_dim} on {device}: {fault}.",
            stacklevel=4,
        )
    return fault is None


def _refuse_capture(name: str) -> None:
    """Refuse to compare a kernel where nothing is computed yet.

    Raises:
        ConfigError: A CUDA graph is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            f"The {name} kernel was not compared with matrix products before a CUDA graph was "
            "captured.",
            "Run the step once before capturing it.",
        )


class _Case(NamedTuple):
    """A tile, and what a kernel is to compute for it."""

    tile: TileInputs
    grad: Tensor
    out: Tensor  # over all keys, of which the tile has some
    lse: Tensor
    results: dict[str, Tensor]


def _case(device: torch.device, dtype: torch.dtype, head_dim: int, kind: str) -> _Case:
    """A small tile in grouped heads, cut out of larger tensors as all tiles are.

    Args:
        device: Where it lies.
        dtype: Data type of query, key and value.
        head_dim: D.
        kind: ``full``, ``causal`` or ``bias``; ``low`` and ``low bias`` have log-sum-exps near
            -120 and a last block of keys that is half full.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        padded = torch.randn(2, heads, tokens + 5, head_dim, generator=generator)
        return padded.to(device, dtype).narrow(2, 3, tokens)

    is_low = kind.startswith("low")
    queries, keys = 150 if kind == "causal" else 45, 192 if is_low else 150
    scale = 1.3 / math.sqrt(head_dim)
    grad, query, out = (draw(4, queries) for _ in range(3))
    key, value = (draw(2, keys) for _ in range(2))
    if is_low:
        step = math.sqrt(125 / (scale * head_dim))
        query, key = query + step, key - step
    bias = None
    if kind.endswith("bias"):
        rows = torch.arange(queries)[:, None]
        hidden = (torch.arange(keys) > rows + 60) | (rows == 7)  # row 7 has no keys
        bias = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)[None, None]
        bias = bias.to(device, dtype)
    tile = TileInputs(query, key, value, scale, kind == "causal", bias)
    # in float64, which no setting of matrix products narrows
    exact = tile._replace(
        query=query.double(), key=key.double(), value=value.double(),
        bias=None if bias is None else bias.double(),
    )  # fmt: skip
    exact_out, exact_lse = MathKernel().forward(exact)
    # as if there were more keys
    lse = (exact_lse + 0.5).masked_fill(exact_lse == -math.inf, math.inf)
    lse = F.pad(lse.to(accumulator_dtype(dtype)), (3, 2)).narrow(2, 3, queries)
    grads = MathKernel().backward(exact, grad.double(), out.double(), lse.double())
    names = ("out", "log-sum-exp", "gradient of query", "gradient of key", "gradient of value")
    results = dict(zip(names, (exact_out, exact_lse, *grads), strict=True))
    return _Case(tile, grad, out, lse, results)


def _fault(
    kernel: TileKernel, device: torch.device, dtype: torch.dtype, head_dim: int, kind: str
) -> str | None:
    """What is wrong with a kernel."""
    try:
        tile, grad, out, lse, results = _case(device, dtype, head_dim, kind)
        computed = [*kernel.forward(tile), *kernel.backward(tile, grad, out, lse)]
        return next(_differences(results, computed, dtype), None)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:  # of a build, a driver, a device: any kind
        return f"it raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _differences(
    results: dict[str, Tensor], computed: list[Tensor], dtype: torch.dtype
) -> Iterator[str]:
    for (name, expected), got in zip(results.items(), computed, strict=True):
        is_lse = name == "log-sum-exp"
        result_dtype = accumulator_dtype(dtype) if is_lse else dtype
        if got.shape != expected.shape or got.dtype != result_dtype:
            yield f"its {name} is {tuple(got.shape)} in {got.dtype}"
            continue
        nothing = expected == -math.inf
        error = (got.double() - expected).masked_fill(nothing & (got == -math.inf), 0).abs().max()
        ratio = float(error / expected.masked_fill(nothing, 0).abs().max())
        allowed = _LSE_TOLERANCE if is_lse else _TOLERANCE[dtype]
        if not ratio <= allowed:  # nor nan
            yield f"its {name} is off by {ratio:.2g} of the largest number, {allowed:g} is allowed"


def _width(tile: TileInputs) -> int:
    """The size that query, key and value are given, since operators take one."""
    return max(tile.query.shape[-1], tile.value.shape[-1])


def _align_rows(tensor: Tensor, width: int = 0) -> Tensor:
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

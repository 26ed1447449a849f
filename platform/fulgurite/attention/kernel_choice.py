"""Which kernel computes a tile, on which device, and which kernels a plan counts with.

Axes: B batch, H query heads, G key/value heads (G divides H), M queries, N keys, D head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.attention.cuda_kernels import CUDA_KERNELS, row_width
from fulgurite.attention.kernel_checks import CHECKED_DTYPES, KernelUse, is_right
from fulgurite.attention.kernels import (
    AtenCpuFlash,
    MathKernel,
    TileInputs,
    TileKernel,
    TileKernelNames,
)
from fulgurite.errors import ConfigError

__all__ = [
    "FLOATS",
    "KERNEL_NAMES",
    "CheckedKernels",
    "cuda_kernel",
    "kernel_for",
    "kernel_names",
    "usual_kernel_names",
]

#: What ``kernel`` may be.
KERNEL_NAMES = ("flash", "cudnn", "efficient", "math")

#: Types that attention does.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MATH_ALONE = TileKernelNames(("math",), ("math",))

# From so many queries and keys on cuDNN is the faster kernel on GPUs of these generations; below
# it, building its graph for each shape costs more than it saves.
_LARGE_TILE, _CUDNN_GENERATIONS = 4096, (9, 10)


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
        return MathKernel() if name == "math" else CUDA_KERNELS[name]

    def kernel_name(self, tile: TileInputs, device: torch.device | None = None) -> str:
        """Return the name of the kernel for tiles like this.

        Args:
            tile: Whose types and sizes are looked at, never its numbers.
            device: Where it would be computed; by default where the tile is.
        """
        device = device or tile.query.device
        width, is_biased = row_width(tile), tile.bias is not None
        for name in self._order(tile, device):
            if CUDA_KERNELS[name].takes(tile) and is_right(
                name, device, tile.query.dtype, head_dim=width, is_biased=is_biased
            ):
                return name
        return "math"

    def _order(self, tile: TileInputs, device: torch.device) -> tuple[str, ...]:
        is_large = min(tile.query.shape[2], tile.key.shape[2]) >= _LARGE_TILE
        if self.orders_by_size and is_large and prefers_cudnn(device):
            return tuple(sorted(self.names, key=lambda name: name != "cudnn"))
        return self.names


@functools.cache
def prefers_cudnn(device: torch.device) -> bool:
    """Whether cuDNN is the fastest kernel for large tiles, as PyTorch itself has it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] in _CUDNN_GENERATIONS


def _check_name(prefer: str | None) -> None:
    """Check the name of a kernel.

    Raises:
        ConfigError: There is no kernel of this name.
    """
    if prefer not in (None, *KERNEL_NAMES):
        raise ConfigError(
            f"There is no attention kernel {prefer!r}.", f"Use {', '.join(KERNEL_NAMES)}."
        )


def kernel_for(
    device: torch.device, dtype: torch.dtype, *, prefer: str | None = None
) -> TileKernel:
    """Return the kernel for tiles of a type on a device.

    Args:
        device: Where tiles are computed.
        dtype: Data type of query, key and value.
        prefer: ``math`` for :class:`~fulgurite.attention.kernels.MathKernel`; on CUDA also the
            kernel to try first: flash, cudnn or efficient.

    Raises:
        ConfigError: The type is no floating type that attention can do, or there is no such kernel.

    Example:
        >>> type(kernel_for(torch.device("cpu"), torch.bfloat16)).__name__
        'AtenCpuFlash'
    """
    if dtype not in FLOATS:
        raise ConfigError(
            f"Attention does not do {dtype}.", "Use float64, float32, bfloat16 or float16."
        )
    _check_name(prefer)
    if device.type == "cuda":
        return cuda_kernel(dtype, prefer)
    return AtenCpuFlash() if device.type == "cpu" and prefer != "math" else MathKernel()


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
    _check_name(prefer)
    if prefer == "math" or dtype not in CHECKED_DTYPES:
        return MathKernel()
    names = tuple(sorted(CUDA_KERNELS, key=lambda name: name != prefer))
    return CheckedKernels(names, orders_by_size=prefer is None)


def usual_kernel_names(
    on_gpu: bool, dtype: torch.dtype, prefer: str | None = None
) -> TileKernelNames:
    """Return which kernels may compute tiles, for plans that are the same on all machines.

    Args:
        on_gpu: Whether a GPU computes them.
        dtype: Data type of query, key and value.
        prefer: Kernel to try before the others, as in :func:`kernel_for`.
    """
    if prefer == "math" or (on_gpu and dtype == torch.float64):
        return _MATH_ALONE
    if not on_gpu:
        return TileKernelNames()
    if dtype == torch.float32:
        return TileKernelNames(("efficient",), ("efficient",))
    return TileKernelNames(("flash", "cudnn", "efficient"), ("efficient",))


def kernel_names(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    prefer: str | None = None,
    has_wide_bias: bool = False,
) -> TileKernelNames:
    """Return which kernels compute the tiles of a call; :func:`kernel_for` gives them.

    Args:
        device: Where tiles are computed; a GPU that this machine has not counts as a CPU.
        dtype: Data type of query, key and value.
        head_dim: The larger of D and E.
        prefer: Kernel to try before the others, as in :func:`kernel_for`.
        has_wide_bias: Whether a bias is wider than ``dtype``, which on a GPU only matrix products
            add.

    Example:
        >>> kernel_names(torch.device("cpu"), torch.float32, 64).full
        ('cpu',)
    """
    if device.type == "cuda" and torch.cuda.is_available():
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        strict = is_deterministic and not torch.is_deterministic_algorithms_warn_only_enabled()
        use = KernelUse(device, dtype, head_dim)
        return _cuda_kernel_names(use, prefer, has_wide_bias=has_wide_bias, is_deterministic=strict)
    if prefer == "math" or device.type not in ("cpu", "cuda", "meta"):
        return _MATH_ALONE
    return TileKernelNames()


@functools.cache
def _cuda_kernel_names(
    use: KernelUse, prefer: str | None, *, has_wide_bias: bool, is_deterministic: bool
) -> TileKernelNames:
    kernel = cuda_kernel(use.dtype, prefer)
    if not isinstance(kernel, CheckedKernels):
        return _MATH_ALONE
    full = [
        kernel.kernel_name(_shapes_alone(use, side), use.device)
        for side in (_LARGE_TILE, _LARGE_TILE // 2)
    ]
    masked = "math"
    if not has_wide_bias:
        masked = kernel.kernel_name(_shapes_alone(use._replace(is_biased=True), 64), use.device)
    processors = 0
    if is_deterministic:
        processors = torch.cuda.get_device_properties(use.device).multi_processor_count
    return TileKernelNames(tuple(dict.fromkeys(full)), (masked,), processors)


def _shapes_alone(use: KernelUse, side: int) -> TileInputs:
    """A square tile without numbers."""
    rows = torch.empty(1, 1, side, use.head_dim, dtype=use.dtype, device="meta")
    bias = rows.new_empty(1, 1, side, side) if use.is_biased else None
    return TileInputs(rows, rows, rows, 1.0, bias=bias)

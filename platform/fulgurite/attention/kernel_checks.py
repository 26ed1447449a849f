"""Comparison of a kernel of CUDA with matrix products, before it is trusted.

Each is compared once on the device, in the type and for the head size of a call.

Axes: B batch, H query heads, G key/value heads (G divides H), M queries, N keys, D head size.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from fulgurite.attention.cuda_kernels import CUDA_KERNELS
from fulgurite.attention.kernels import MathKernel, TileInputs, TileKernel, accumulator_dtype
from fulgurite.errors import ConfigError

__all__ = ["CHECKED_DTYPES", "KernelUse", "compare_kernel", "is_right"]

# Largest error that a right kernel may have, relative to the largest number of the result. Right
# kernels stay below a quarter of it.
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 6e-3, torch.float32: 1e-4}
_LSE_TOLERANCE = 1e-3

#: Types in which a kernel of CUDA may be right.
CHECKED_DTYPES = tuple(_TOLERANCE)


class KernelUse(NamedTuple):
    """What a kernel is used for, and must be right in.

    Attributes:
        device: Where it computes.
        dtype: Data type of query, key and value.
        head_dim: The larger of D and E.
        is_biased: Whether a bias is added to the scores.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    is_biased: bool = False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_right(
    name: str, device: torch.device, dtype: torch.dtype, *, head_dim: int, is_biased: bool
) -> bool:
    """Whether a kernel gives the right numbers; measured once, and by compilers not traced.

    The use is given in parts: compilers take no record of ours for a constant.
    """
    return compare_kernel(name, KernelUse(device, dtype, head_dim, is_biased))


@functools.cache
def compare_kernel(name: str, use: KernelUse) -> bool:
    """Compare a kernel with matrix products, and warn if it is wrong.

    Args:
        name: Its name in :data:`~fulgurite.attention.cuda_kernels.CUDA_KERNELS`.
        use: What it is to be used for.

    Raises:
        ConfigError: A CUDA graph is being captured.
        OutOfMemoryError: The device has no room for the comparison.
    """
    if use.device.type == "cuda" and torch.cuda.is_available():
        _refuse_capture(name)
    kernel = CUDA_KERNELS[name]
    # whatever the caller is in (fake tensors, counters of operations), this is computed
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        kinds = ("bias", "low bias") if use.is_biased else ("full", "causal", "low")
        fault = next(filter(None, (find_fault(kernel, use, kind) for kind in kinds)), None)
    if fault:
        under_bias = " under a bias" if use.is_biased else ""
        warnings.warn(
            f"The {name} kernel is not used for attention{under_bias} in "
            f"{str(use.dtype).removeprefix('torch.')} with head size {use.head_dim} on "
            f"{use.device}: {fault}.",
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


def _make_case(use: KernelUse, kind: str) -> _Case:
    """A small tile in grouped heads, cut out of larger tensors as all tiles are.

    Args:
        use: Where it lies, its type and its head size.
        kind: ``full``, ``causal`` or ``bias``; ``low`` and ``low bias`` have log-sum-exps near
            -120 and a last block of keys that is half full.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        padded = torch.randn(2, heads, tokens + 5, use.head_dim, generator=generator)
        return padded.to(use.device, use.dtype).narrow(2, 3, tokens)

    is_low = kind.startswith("low")
    queries, keys = 150 if kind == "causal" else 45, 192 if is_low else 150
    scale = 1.3 / math.sqrt(use.head_dim)
    grad, query, out = (draw(4, queries) for _ in range(3))
    key, value = (draw(2, keys) for _ in range(2))
    if is_low:
        step = math.sqrt(125 / (scale * use.head_dim))
        query, key = query + step, key - step
    bias = None
    if kind.endswith("bias"):
        rows = torch.arange(queries)[:, None]
        hidden = (torch.arange(keys) > rows + 60) | (rows == 7)  # row 7 has no keys
        bias = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)[None, None]
        bias = bias.to(use.device, use.dtype)
    tile = TileInputs(query, key, value, scale, is_causal=kind == "causal", bias=bias)
    # in float64, which no setting of matrix products narrows
    exact = tile._replace(
        query=query.double(), key=key.double(), value=value.double(),
        bias=None if bias is None else bias.double(),
    )  # fmt: skip
    exact_out, exact_lse = MathKernel().forward(exact)
    # as if there were more keys
    lse = (exact_lse + 0.5).masked_fill(exact_lse == -math.inf, math.inf)
    lse = F.pad(lse.to(accumulator_dtype(use.dtype)), (3, 2)).narrow(2, 3, queries)
    grads = MathKernel().backward(exact, grad.double(), out.double(), lse.double())
    names = ("out", "log-sum-exp", "gradient of query", "gradient of key", "gradient of value")
    results = dict(zip(names, (exact_out, exact_lse, *grads), strict=True))
    return _Case(tile, grad, out, lse, results)


def find_fault(kernel: TileKernel, use: KernelUse, kind: str) -> str | None:
    """Return what is wrong with a kernel; None if nothing is.

    Args:
        kernel: What is compared.
        use: What it is to be used for.
        kind: Of which tile, see :func:`_make_case`.
    """
    try:
        tile, grad, out, lse, results = _make_case(use, kind)
        computed = [*kernel.forward(tile), *kernel.backward(tile, grad, out, lse)]
        return next(_differences(results, computed, use.dtype), None)
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

"""Checks of what is given to attention in files, and one form for tensors of any rank.

Axes: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from fulgurite.errors import ConfigError, DataError

__all__ = [
    "GRADIENTS", "INPUTS", "RESULTS", "SAVED", "check_beside", "check_integer", "check_number",
    "host_tensors", "kernel_device", "name_tensors",
]  # fmt: skip

#: Names of the tensors of a call.
INPUTS = ("query", "key", "value")
#: Names of what it gives.
RESULTS = ("out", "lse")
#: Names of what its gradients are computed from.
SAVED = ("grad", *INPUTS, *RESULTS)
#: Names of its gradients.
GRADIENTS = ("dquery", "dkey", "dvalue")


def check_integer(name: str, value: object) -> int:
    """Return a whole number, also one of NumPy.

    Raises:
        ConfigError: The value is not an integer.
    """
    try:
        if isinstance(value, bool | Tensor):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{name}={value!r} is no whole number.", "Give an int.") from None


def check_number(name: str, value: object) -> float:
    """Return a number that is the same for all scores.

    Raises:
        ConfigError: The value is not a real number, or is a tensor, whose gradient would be lost.
    """
    if isinstance(value, bool | Tensor) or not isinstance(value, Real):
        raise ConfigError(
            f"{name} is {value!r} of type {type(value).__name__}.",
            "Give a float; multiply query by a scale that is learned.",
        )
    return float(value)


def name_tensors(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return tensors by name.

    Args:
        names: Their names.
        tensors: In the order of the names.

    Raises:
        DataError: There are more or fewer tensors than names.

    Example:
        >>> list(name_tensors(RESULTS, torch.zeros(2, 3)))
        ['out', 'lse']
    """
    if len(tensors) != len(names):
        raise DataError(
            f"{len(tensors)} tensors were given for {', '.join(names)}.",
            "Give them all, in this order.",
        )
    return dict(zip(names, tensors, strict=True))


def host_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return views of four axes, without gradients; of three for log-sum-exps.

    Args:
        tensors: By name, in host memory. Shape of each: (N, D), (H, N, D), (B, H, N, D) or
            (..., H, N, D), without the last axis for ``lse``.

    Returns:
        Views by name. Shape of each: (B, H, N, D), and (B, H, N) for ``lse``.

    Raises:
        DataError: A value is not a tensor, lies on another device, or its axes do not join in a
            view.

    Example:
        >>> host_tensors({"query": torch.zeros(7, 2), "lse": torch.zeros(5, 4, 3, 7)})["lse"].shape
        torch.Size([20, 3, 7])
    """
    views = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DataError(
                f"{name} is a {type(tensor).__name__}, not a tensor.",
                "Give a tensor; torch.from_numpy makes one that shares the memory of an array.",
            )
        if tensor.device.type != "cpu":
            raise DataError(
                f"{name} is on the device {tensor.device}.",
                "Give tensors in host memory or in files; `device` says where they are computed.",
            )
        axes = 3 if name == "lse" else 4
        if tensor.ndim < axes - 2:
            raise DataError(
                f"{name} is {tuple(tensor.shape)}, which has too few axes.",
                "Give (batch, heads, tokens, head size); lse has no head size.",
            )
        tensor = tensor.detach()
        while tensor.ndim < axes:
            tensor = tensor[None]
        cut = tensor.ndim - axes + 1
        size = math.prod(tensor.shape[:cut]), *tensor.shape[cut:]
        try:  # nothing is copied where there is nothing
            views[name] = tensor.view(size) if tensor.numel() else tensor.reshape(size)
        except RuntimeError as error:
            raise DataError(
                f"The batch axes of {name} {tuple(tensor.shape)} do not join in a view (strides "
                f"{tensor.stride()}).",
                "Give one batch axis, or a contiguous tensor.",
            ) from error
    return views


def check_beside(
    name: str, tensor: Tensor, size: Sequence[int], dtype: torch.dtype | None = None
) -> None:
    """Check a tensor that is given beside query, key and value.

    Args:
        name: As errors call it.
        tensor: What is checked.
        size: The shape that it must have.
        dtype: The type that it must have; any floating type by default.

    Raises:
        DataError: The shape or the type is not the required one.
    """
    required = dtype or tensor.dtype
    if (
        tuple(tensor.shape) != tuple(size)
        or tensor.dtype != required
        or not required.is_floating_point
    ):
        kind = str(dtype) if dtype else "a floating type"
        raise DataError(
            f"{name} is {tuple(tensor.shape)} of {tensor.dtype}; it must be {tuple(size)} of "
            f"{kind}.",
            "Make it with fulgurite.attention.memory_mapped(..., create=True).",
        )


def kernel_device(device: torch.device | str | None) -> torch.device:
    """Return the device where kernels run, if this machine has it.

    Args:
        device: The CPU by default.

    Raises:
        ConfigError: The name is not that of a device, or this machine has no such device.

    Example:
        >>> kernel_device(None)
        device(type='cpu')
    """
    try:
        parsed = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device={device!r} names no device.", 'Give "cpu", "cuda" or "cuda:1", say.'
        ) from error
    missing = parsed.type == "meta"
    if parsed.type == "cuda":
        missing = not torch.cuda.is_available() or (parsed.index or 0) >= torch.cuda.device_count()
    if missing:
        raise ConfigError(f"This machine has no device {parsed}.", 'Give device="cpu".')
    return with_index(parsed)


def with_index(device: torch.device) -> torch.device:
    """Return a GPU with its number, as tensors have it: "cuda" is the current one.

    Example:
        >>> with_index(torch.device("cpu"))
        device(type='cpu')
    """
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device

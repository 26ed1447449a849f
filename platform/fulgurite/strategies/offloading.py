"""Keeps what is saved for the backward pass elsewhere, so that a device holds what is in use.

Axes: none; tensors of any shape.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fulgurite.errors import ConfigError

__all__ = ["SMALLEST_SIZE", "copy_to_file", "copy_to_host", "saved_in_files", "saved_on_host"]

#: Size below which a tensor stays where it is [bytes].
SMALLEST_SIZE = 2**16


@contextmanager
def saved_in_files(folder: str | Path, keep: Iterable[Tensor] = ()) -> Iterator[None]:
    """Write tensors that autograd saves meanwhile to files, and map them when it needs them.

    The files have no name any more once they are mapped, so they go with the last use of their
    tensor, or with the process. Mapped pages are the operating system's to write out and drop;
    they count as cache, not as memory of the process.

    Args:
        folder: Where the files are made; made itself if it is not there. Best on a fast local
            disk; a folder in memory (tmpfs) would save nothing.
        keep: Tensors that stay where they are whatever views of them are saved: parameters.

    Raises:
        ConfigError: No file can be made there, or the disk is full.

    Example:
        >>> x = torch.ones(200, 200, requires_grad=True)
        >>> with tempfile.TemporaryDirectory() as folder, saved_in_files(folder):
        ...     y = (x * x).sum()
        ...     y.backward()
        >>> x.grad.sum().item()
        80000.0

    Source: inferred; as ``torch.autograd.graph.save_on_cpu``, with files as memory.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with _save_moved(lambda tensor: copy_to_file(tensor, folder), keep):
        yield


@contextmanager
def saved_on_host(keep: Iterable[Tensor] = ()) -> Iterator[None]:
    """Keep tensors that autograd saves meanwhile in host memory.

    Those of a GPU lie in pinned memory, to which and from which it copies fastest.

    Args:
        keep: Tensors that stay where they are whatever views of them are saved: parameters.

    Example:
        >>> x = torch.ones(200, 200, requires_grad=True)
        >>> with saved_on_host():
        ...     y = (x * x).sum()
        ...     y.backward()
        >>> x.grad.sum().item()
        80000.0

    Source: inferred; as ``torch.autograd.graph.save_on_cpu``, which takes parameters along.
    """
    with _save_moved(copy_to_host, keep):
        yield


class _Kept(NamedTuple):
    """What stays where it is, and the version in which it was saved."""

    tensor: Tensor
    version: int


class _Moved(NamedTuple):
    """A copy elsewhere, and the device to which it comes back."""

    device: torch.device
    tensor: Tensor


@contextmanager
def _save_moved(move: Callable[[Tensor], Tensor], keep: Iterable[Tensor]) -> Iterator[None]:
    """Let autograd save what a function gives for large tensors that are not kept."""
    kept_storages = {tensor.untyped_storage().data_ptr() for tensor in keep}

    def pack(tensor: Tensor) -> _Kept | _Moved:
        is_small = tensor.layout != torch.strided or tensor.nbytes < SMALLEST_SIZE
        if is_small or tensor.untyped_storage().data_ptr() in kept_storages:
            return _Kept(tensor, tensor._version)
        return _Moved(tensor.device, move(tensor))

    def unpack(packed: _Kept | _Moved) -> Tensor:
        if isinstance(packed, _Moved):
            return packed.tensor.to(packed.device, non_blocking=packed.tensor.is_pinned())
        if packed.tensor._version != packed.version:  # autograd does not look, where hooks are
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(packed.tensor.shape)} is at version "
                f"{packed.tensor._version}; expected version {packed.version} instead."
            )
        return packed.tensor

    with saved_tensors_hooks(pack, unpack):
        yield


def copy_to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor into host memory, pinned if the tensor is on a GPU."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor)


def copy_to_file(tensor: Tensor, folder: str | Path) -> Tensor:
    """Copy a tensor into a file without a name, and map it.

    Args:
        tensor: The tensor, on any device.
        folder: Where the file is made.

    Raises:
        ConfigError: No file can be made, or the disk is full.
    """
    try:
        file, path = tempfile.mkstemp(prefix=".saved-", dir=folder)
        try:
            os.posix_fallocate(file, 0, tensor.nbytes)  # a full disk fails here, not when mapped
            mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(file)
            os.unlink(path)
    except OSError as error:
        raise ConfigError(
            f"Activations of {tensor.nbytes} bytes cannot be kept in {folder} ({error.strerror}).",
            "Free space there, or give another offload.folder, or offload.activations=host.",
        ) from error
    mapped = mapped.view(tensor.shape)
    mapped.copy_(tensor)
    return mapped

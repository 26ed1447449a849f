"""Named tensors of a call in a folder of ``.npy`` files or in one ``.safetensors`` file.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fulgurite.attention.checks import GRADIENTS, SAVED
from fulgurite.errors import DataError, FulguriteError, near_miss
from fulgurite.extras import optional_import
from fulgurite.foreign import map_array, reading
from fulgurite.io import atomic_write

__all__ = ["create_arrays", "map_tensors"]

_HINT = "Write it again, as numbers of float16, float32 or float64."


def map_tensors(source: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Map tensors of a folder or a file, read-only; their numbers are read where they are used.

    Args:
        source: A folder with ``query.npy``, ``key.npy`` and ``value.npy`` (for gradients also
            ``grad.npy``, ``out.npy`` and ``lse.npy``), or a ``.safetensors`` file with tensors of
            these names, which can also hold bfloat16.
        names: Which of them to map.

    Returns:
        The tensors by name, in the order of the names.

    Raises:
        DataError: A tensor is missing, has a name that none of the call has, or cannot be read.
        MissingExtraError: The file needs a package that is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder) / "query.npy", np.ones((1, 2, 5, 8), np.float32))
        ...     map_tensors(Path(folder), ["query"])["query"].shape
        torch.Size([1, 2, 5, 8])
    """
    if source.is_dir():
        available = sorted(path.stem for path in source.glob("*.npy"))
    elif source.suffix == ".safetensors" and source.is_file():
        return _map_safetensors(source, names)
    else:
        raise DataError(
            f"{source} is neither a folder nor a .safetensors file.",
            f"Give a folder with {', '.join(f'{name}.npy' for name in names)}.",
        )
    _check_names(source, available, names)
    return {name: _map_npy(source / f"{name}.npy") for name in names}


def _check_names(source: Path, available: Sequence[str], names: Sequence[str]) -> None:
    """Refuse missing tensors, and others: a mask that is not read would change the result.

    Raises:
        DataError: A name is missing or unknown.
    """
    for name in available:
        if name not in (*SAVED, *GRADIENTS):
            raise DataError(
                f"{source} holds {name!r}, which is no tensor of the call.",
                near_miss(name, SAVED)
                or f"There are {', '.join(SAVED)}; masks that are intervals are options.",
            )
    for name in names:
        if name not in available:
            raise DataError(
                f"{source} holds no {name!r}.",
                f"Write {', '.join(names)} into it, each as (batch, heads, tokens, head size).",
            )


def _map_npy(path: Path) -> Tensor:
    with reading(path, "The tensor", _HINT):
        array = map_array(path)
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"its numbers are {array.dtype}")
        with warnings.catch_warnings():  # it is not writable, and is meant to be so
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(array)


def _map_safetensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    library = optional_import("safetensors", "export", f"Reading {path.name}")
    with (
        reading(path, "The file", "Write it again with safetensors.torch.save_file."),
        library.safe_open(path, framework="pt") as file,
    ):
        _check_names(path, sorted(file.keys()), names)
        return {name: file.get_tensor(name) for name in names}


@contextmanager
def create_arrays(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> Iterator[dict[str, Tensor]]:
    """Make ``.npy`` files of results, which take their names when the block ends without an error.

    Args:
        folder: Where they are made; what was there before is replaced.
        shapes: Shape of each by its name.
        dtypes: Type of each by its name; bfloat16, which the format has not, becomes float32.

    Yields:
        Tensors by name, mapped to be written.

    Raises:
        DataError: A file cannot be made.
    """
    targets = {}
    try:
        with ExitStack() as stack:
            for name, shape in shapes.items():
                dtype = torch.float32 if dtypes[name] == torch.bfloat16 else dtypes[name]
                kind = torch.zeros((), dtype=dtype).numpy().dtype
                path = stack.enter_context(atomic_write(folder / f"{name}.npy"))
                with open(path, "xb") as file:
                    header = {"descr": kind.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_2_0(file, header)
                    begin = file.tell()
                    file.truncate(begin + math.prod(shape) * kind.itemsize)
                is_empty = not math.prod(shape)  # no file can be mapped empty
                array = (
                    np.zeros(shape, kind) if is_empty else np.memmap(path, kind, "r+", begin, shape)
                )
                targets[name] = torch.from_numpy(array)
            yield targets
    except OSError as error:
        if isinstance(error, FulguriteError):
            raise
        raise DataError(
            f"The results cannot be written into {folder} ({error.strerror}).",
            "Free space on the disk, or give another --out.",
        ) from error

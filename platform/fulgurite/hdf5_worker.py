"""The process that opens HDF5 and NetCDF files for :mod:`fulgurite.hdf5`: a script of its own.

The libraries behind these formats are written in C, follow what a file says, and can crash, run
for ever or fill the memory on a damaged one. Here that ends this process alone. It reads requests
as lines of JSON, and answers each with a line of JSON and the bytes of the arrays in it. It imports
nothing of fulgurite, so that it starts fast.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

_DEEPEST = 32  # groups in groups, or references to references
_PLAIN = "biuf"


class _Answer:
    """A value as JSON, and the arrays in it."""

    def __init__(self, limit: int) -> None:
        self.arrays: list[np.ndarray[Any, Any]] = []
        self.limit = limit

    def reserve(self, shape: tuple[int, ...], itemsize: int) -> None:
        """Refuse values beyond the limit before they are read."""
        size = math.prod(shape) * itemsize
        self.limit -= size
        if self.limit < 0:
            raise ValueError(f"values of shape {tuple(shape)} are out of proportion to the file")

    def add(self, array: Any) -> dict[str, Any]:
        """Put an array beside the JSON."""
        array = np.asarray(array)
        if array.dtype.kind not in _PLAIN + "c":
            raise ValueError(f"it holds values of type {array.dtype}")
        self.arrays.append(np.ascontiguousarray(array).reshape(array.shape))
        return {"array": len(self.arrays) - 1}


# --- HDF5 ----------------------------------------------------------------------------------------


def _check_links(group: Any, budget: list[int], depth: int = 0) -> None:
    """Refuse links and storage that lead out of the file, and groups without end."""
    import h5py

    if depth > _DEEPEST:
        raise ValueError("it is nested too deeply")
    for name in group:
        budget[0] -= 1
        if budget[0] < 0:
            raise ValueError("it names more than it has room for")
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name} is a link that may lead to another file")
        item = group.get(name)
        if isinstance(item, h5py.Group):
            _check_links(item, budget, depth + 1)
        elif isinstance(item, h5py.Dataset):
            _check_storage(item)


def _check_storage(item: Any) -> None:
    if item.external or item.is_virtual:
        raise ValueError(f"the values of {item.name} are in another file")


def _open_hdf5(path: str) -> Any:
    import h5py

    return h5py.File(path, "r")


def _items(path: str) -> list[int]:
    # an object has a header and an entry of some hundred bytes; a shared one counts each time
    return [1000 + os.path.getsize(path) // 64]


def read_matlab(path: str, limit: int) -> tuple[Any, _Answer]:
    """Variables of a MATLAB file of version 7.3."""
    import h5py

    answer, budget = _Answer(limit), _items(path)

    def convert(item: Any, file: Any, depth: int) -> Any:
        budget[0] -= 1
        if depth > _DEEPEST or budget[0] < 0:
            raise ValueError("its references lead too far")
        if isinstance(item, h5py.Group):
            parts = {k: convert(item[k], file, depth + 1) for k in item if k != "#refs#"}
            return {"fields": parts}
        if not isinstance(item, h5py.Dataset):
            raise ValueError(f"it holds a {type(item).__name__}")
        kind = item.attrs.get("MATLAB_class")
        if item.attrs.get("MATLAB_empty", 0):
            return {"text": ""} if kind == b"char" else answer.add(np.zeros(0))
        _check_storage(item)
        if item.shape is None:
            raise ValueError(f"{item.name} has no values")
        answer.reserve(item.shape, max(1, item.dtype.itemsize))
        values = np.asarray(item[()])
        if item.dtype == h5py.ref_dtype:
            # MATLAB is column-major: the file holds the transpose
            cells = [convert(file[r], file, depth + 1) for r in values.T.ravel(order="F")]
            return {"cells": cells}
        if kind == b"char":
            return {"text": "".join(map(chr, values.T.ravel(order="F").tolist()))}
        if kind == b"string":  # an object, whose text is in the file's table of objects
            return answer.add(values.T) | {"class": "string"}
        return answer.add(values.T)

    with _open_hdf5(path) as file:
        _check_links(file, _items(path))
        return convert(file, file, 0), answer


# --- NetCDF --------------------------------------------------------------------------------------


def _check_netcdf(path: str) -> None:
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"\x89HDF":
        with _open_hdf5(path) as hdf5:
            _check_links(hdf5, _items(path))
    elif start not in (b"CDF\x01", b"CDF\x02", b"CDF\x05"):
        raise ValueError("it is no NetCDF file")


class _Opened:
    """The file that stays open between requests which ask for it; the next one closes others."""

    path = ""
    dataset: Any = None

    @classmethod
    def close(cls) -> None:
        dataset, cls.dataset, cls.path = cls.dataset, None, ""
        if dataset is not None:
            dataset.close()

    @classmethod
    @contextmanager
    def open(cls, path: str, stays: bool) -> Iterator[Any]:
        import netCDF4

        if path != cls.path:
            cls.close()
            cls.dataset, cls.path = netCDF4.Dataset(path, "r"), path
        try:
            yield cls.dataset
        except BaseException:
            stays = False
            raise
        finally:
            if not stays:
                cls.close()


def close_netcdf() -> tuple[Any, _Answer]:
    """Close the file that is open."""
    _Opened.close()
    return None, _Answer(0)


def _attributes(item: Any) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name in item.ncattrs():
        value = item.getncattr(name)
        plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        content[name] = plain if isinstance(plain, str | int | float | list) else str(plain)
    return content


def describe_netcdf(path: str, limit: int) -> tuple[Any, _Answer]:
    """Attributes and variables of a NetCDF file."""
    _Opened.close()  # it may be another file of the same name by now
    _check_netcdf(path)
    with _Opened.open(path, stays=False) as dataset:
        variables = {
            name: {
                "shape": list(variable.shape),
                "dimensions": list(variable.dimensions),
                "attributes": _attributes(variable),
            }
            for name, variable in dataset.variables.items()
        }
        return {"attributes": _attributes(dataset), "variables": variables}, _Answer(limit)


def read_netcdf(
    path: str, limit: int, name: str, *, first: bool, is_masked: bool, stays_open: bool
) -> tuple[Any, _Answer]:
    """Values of a variable, or of its first step; NaN where they are masked."""
    answer = _Answer(limit)
    with _Opened.open(path, stays_open) as dataset:
        variable = dataset.variables[name]
        variable.set_auto_mask(is_masked)
        shape = (1, *variable.shape[1:]) if first else variable.shape
        if variable.dtype is str:
            answer.reserve(shape, 8)
            texts = np.atleast_1d(variable[:1] if first else variable[:]).ravel().tolist()
            return {"texts": [str(text) for text in texts]}, answer
        if variable.dtype.kind not in _PLAIN:
            raise ValueError(f"it holds values of type {variable.dtype}")
        answer.reserve(shape, variable.dtype.itemsize)
        values = variable[:1] if first else variable[:]
        if is_masked:
            values = np.ma.asarray(values)
            if values.dtype.kind != "f":
                values = values.astype(np.float64)
            values = np.ma.filled(values, np.nan)
        return answer.add(values), answer


# --- requests ------------------------------------------------------------------------------------

_TASKS: dict[str, Callable[..., tuple[Any, _Answer]]] = {
    "matlab": read_matlab,
    "describe": describe_netcdf,
    "netcdf": read_netcdf,
    "close": close_netcdf,
}


def _restrict(seconds: float, room: int) -> None:
    """Let this process use so much more time [s of CPU] and memory [bytes]."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (spent, resource.RLIM_INFINITY))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
    except OSError:  # not on macOS
        return
    limit = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _preload(task: str) -> None:
    """Import what a task needs, before its limits."""
    if task == "matlab":
        import h5py
    else:
        import h5py  # noqa: F401
        import netCDF4  # noqa: F401


def main(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more."""
    for line in requests:
        request = json.loads(line)
        arrays: list[np.ndarray[Any, Any]] = []
        try:
            _preload(request["task"])
            _restrict(request["seconds"], request["room"])
            value, answer = _TASKS[request["task"]](**request["arguments"])
            arrays = answer.arrays
            facts = [[array.dtype.str, list(array.shape)] for array in arrays]
            reply = json.dumps({"value": value, "arrays": facts}).encode()
        except Exception as error:
            arrays = []
            lines = str(error).strip().splitlines() or [type(error).__name__]
            if isinstance(error, MemoryError):
                lines = ["it asks for more memory than there is"]
            missing = error.name if isinstance(error, ImportError) else None
            reply = json.dumps({"error": lines[0][:300], "missing": missing}).encode()
        answers.write(len(reply).to_bytes(8, "little") + reply)
        for array in arrays:
            answers.write(array.reshape(-1).view(np.uint8).data if array.size else b"")
        answers.flush()


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except ImportError:
        pass
    main(sys.stdin.buffer, channel)

"""HDF5 and NetCDF files of others, opened in a process of its own.

A damaged file can crash the libraries that read these formats. :mod:`fulgurite.hdf5_worker` is the
process in which that happens: it has a limit of time and memory in proportion to the file, and its
end is an error of the file.

Axes: T time steps.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fulgurite.errors import MissingExtraError
from fulgurite.extras import missing_package
from fulgurite.foreign import expansion_limit
from fulgurite.matlab_objects import decode_strings

__all__ = ["NetcdfFile", "NetcdfVariable", "need_package", "read_matlab73"]

_SECONDS, _BYTES_PER_SECOND = 1.5, 20e6  # of CPU; of a file that is read from a slow disk
_ROOM = 512 << 20  # memory beside what the values take [bytes]
_WAIT = 10.0  # how many times its CPU time a request may last
_START = 120.0  # until the process has started and imported its libraries [s]


class _ReaderProcess:
    """The process, started when it is first needed and again after its end."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0

    def _start_process(self) -> subprocess.Popen[bytes]:
        # a forked process must not share the pipes of its parent
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            script = Path(__file__).with_name("hdf5_worker.py")
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(script)],  # -P: its folder has modules named as others
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
            self.owner = os.getpid()
        return self.process

    def stop(self) -> None:
        """End the process, if it is this one's."""
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def close_file(self) -> None:
        """Have the file closed that the process has open, if there is a process."""
        process = self.process
        if process is not None and self.owner == os.getpid() and process.poll() is None:
            self.ask("close", _SECONDS, _ROOM, {})

    def ask(
        self, task: str, seconds: float, room: int, arguments: dict[str, Any]
    ) -> tuple[Any, list[npt.NDArray[Any]]]:
        """Have a task done; gives its value and the arrays in it.

        Raises:
            ValueError: The task failed, or the process ended.
            ImportError: The task needs a package that is not installed.
        """
        request = {"task": task, "seconds": seconds, "room": room, "arguments": arguments}
        with self.lock:
            process = self._start_process()
            assert process.stdin is not None
            try:
                try:
                    process.stdin.write(json.dumps(request).encode() + b"\n")
                except OSError:  # it ended after the last answer
                    self.stop()
                    process = self._start_process()
                    assert process.stdin is not None
                    process.stdin.write(json.dumps(request).encode() + b"\n")
                deadline = time.monotonic() + _START + _WAIT * seconds
                size = int.from_bytes(_take(process, 8, deadline), "little")
                reply = json.loads(bytes(_take(process, size, deadline)))
                arrays = []
                for spec, shape in reply.get("arrays", ()):
                    kind = np.dtype(spec)
                    content = _take(process, math.prod(shape) * kind.itemsize, deadline)
                    arrays.append(np.frombuffer(content, kind).reshape(shape))
            except BaseException:
                self.stop()  # an answer that was not read would be the next one's
                raise
        if reply.get("missing"):
            raise ImportError(reply["error"], name=reply["missing"])
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["value"], arrays


_worker = _ReaderProcess()
atexit.register(_worker.stop)


def _take(process: subprocess.Popen[bytes], size: int, deadline: float) -> bytearray:
    """Read so many bytes of an answer.

    Raises:
        ValueError: The process ended, or takes too long.
    """
    assert process.stdout is not None
    content, done = bytearray(size), 0
    view, pipe = memoryview(content), process.stdout.fileno()
    while done < size:
        if (
            os.name == "posix"
            and not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]
        ):
            raise ValueError("reading it takes too long")
        chunk = os.read(pipe, min(size - done, 1 << 20))
        if not chunk:
            raise ValueError(_describe_end(process.wait()))
        view[done : done + len(chunk)] = chunk
        done += len(chunk)
    return content


def _describe_end(status: int) -> str:
    import signal

    if status == -getattr(signal, "SIGXCPU", 0):
        return "reading it takes too long"
    return f"its reader crashed ({f'signal {-status}' if status < 0 else f'status {status}'})"


def _ask(task: str, path: str | Path, **arguments: Any) -> tuple[Any, list[npt.NDArray[Any]]]:
    for package in ("h5py",) if task == "matlab" else ("h5py", "netCDF4"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"No module named {package!r}", name=package)
    path = Path(path).absolute()
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is no regular file")
    limit = expansion_limit(size)
    seconds = _SECONDS + size / _BYTES_PER_SECOND
    return _worker.ask(
        task, seconds, _ROOM + 4 * limit, {"path": str(path), "limit": limit, **arguments}
    )


def read_matlab73(path: str | Path) -> dict[str, Any]:
    """Read a MATLAB file of version 7.3.

    Structures become dictionaries, cells lists, text strings; arrays are as MATLAB shows them.
    Variables of the class ``string`` become text, or lists of text; one that cannot be read stays
    the numbers that it is stored as.

    Args:
        path: The file.

    Raises:
        ValueError: The file is damaged, links to other files, or its values are out of proportion.
        OSError: The file does not exist.
        ImportError: h5py is not installed.
    """
    value, arrays = _ask("matlab", path)

    def convert(item: Mapping[str, Any], objects: Sequence[Any] = ()) -> Any:
        if "fields" in item:
            return {name: convert(part, objects) for name, part in item["fields"].items()}
        if "cells" in item:
            return [convert(part, objects) for part in item["cells"]]
        if item.get("class") == "string":
            with suppress(ValueError):
                return decode_strings(arrays[item["array"]], objects)
        return item["text"] if "text" in item else arrays[item["array"]]

    hidden = convert({"fields": {"": value["fields"].pop("#subsystem#", {"text": ""})}})[""]
    objects = hidden.get("MCOS") if isinstance(hidden, dict) else None
    content: dict[str, Any] = convert(value, objects if isinstance(objects, list) else ())
    return content


@dataclass(frozen=True)
class NetcdfVariable:
    """What a NetCDF file says of one of its variables.

    Attributes:
        name: Its name.
        shape: Its lengths.
        attributes: Value by name.
        dimensions: Names of its dimensions, in the order of ``shape``.
    """

    name: str
    shape: tuple[int, ...]
    attributes: Mapping[str, Any]
    dimensions: tuple[str, ...] = ()

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


class NetcdfFile:
    """A NetCDF file, whose variables are read one by one.

    Each reading opens and closes it, but those in its context open it once.

    Args:
        path: The file.

    Attributes:
        attributes: Attributes of the file, value by name.
        variables: By name, in the file's order.

    Raises:
        ValueError: The file is damaged, or links to other files.
        OSError: The file does not exist.
        ImportError: netCDF4 is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stays_open = False
        facts, _ = _ask("describe", path)
        self.attributes: dict[str, Any] = facts["attributes"]
        self.variables = {
            name: NetcdfVariable(
                name, tuple(fact["shape"]), fact["attributes"], tuple(fact["dimensions"])
            )
            for name, fact in facts["variables"].items()
        }

    def __enter__(self) -> NetcdfFile:
        self._stays_open = True
        return self

    def __exit__(self, *error: object) -> None:
        self._stays_open = False
        _worker.close_file()

    def read(self, name: str, first: bool = False, is_masked: bool = True) -> npt.NDArray[Any]:
        """Values of a variable of numbers.

        Args:
            name: Name of the variable.
            first: Only its first step.
            is_masked: NaN where the file says that a value is missing.

        Shape:
            - (T, …), or (1, …) for the first step.

        Raises:
            ValueError: The values cannot be read, are not numbers, or are out of proportion to the
                file.
        """
        value, arrays = self._values(name, first, is_masked)
        if "array" not in value:
            raise ValueError(f"{name} holds text")
        values: npt.NDArray[Any] = arrays[value["array"]]
        return values

    def read_texts(self, name: str) -> list[str]:
        """Values of a variable of text.

        Raises:
            ValueError: The values cannot be read, or are not text.
        """
        value, _ = self._values(name, False, False)
        if "texts" not in value:
            raise ValueError(f"{name} holds no text")
        return [str(text) for text in value["texts"]]

    def _values(self, name: str, first: bool, is_masked: bool) -> tuple[Any, list[Any]]:
        options = {"first": first, "is_masked": is_masked, "stays_open": self._stays_open}
        return _ask("netcdf", self.path, name=name, **options)


def need_package(error: ImportError, subject: str) -> MissingExtraError:
    """The error to raise where the process lacks a package.

    Example:
        >>> print(need_package(ImportError("no", name="h5py"), "Reading a.mat"))
        Reading a.mat needs h5py. Install it with `pip install 'fulgurite[ice]'`.
    """
    return missing_package(str(error.name), "ice", subject)

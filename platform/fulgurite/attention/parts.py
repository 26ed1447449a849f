"""Files of partial results: tensors with where they belong, and with checksums.

A file holds the bytes of its tensors one after the other, then an index in JSON with the place,
type, shape and SHA-256 of each, then the SHA-256 and the length of the index. It is written tensor
by tensor, so that nothing waits in memory, and is there as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fulgurite.attention.fingerprint import pieces
from fulgurite.attention.steps import Slices
from fulgurite.errors import CheckpointError

__all__ = [
    "Part",
    "PartRecord",
    "PartWriter",
    "publish_file",
    "read_part",
    "temporary_files",
    "write_part",
]

_MAGIC = b"fulgurite part 1\n"
_TAIL = struct.Struct("<32sq")  # digest and length of the index
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16,
           "float16": torch.float16}  # fmt: skip


class PartRecord(NamedTuple):
    """A tensor in a part.

    Attributes:
        name: Name of the result that it belongs to.
        at: Where it belongs: slices of batch, heads and tokens.
        dtype: Its type.
        shape: Its sizes.
        offset: First byte in the file.
        sha256: Digest of its bytes.
    """

    name: str
    at: Slices
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    sha256: str


class Part(NamedTuple):
    """What a file holds, without its tensors.

    Attributes:
        path: Path of the file.
        facts: What it says about itself.
        records: Its tensors, in the order in which they were written.
    """

    path: Path
    facts: dict[str, Any]
    records: tuple[PartRecord, ...]

    def read(self, record: PartRecord) -> Tensor:
        """Read a tensor and compare its checksum.

        Raises:
            CheckpointError: The file is damaged or gone.
        """
        tensor = torch.empty(record.shape, dtype=record.dtype)
        data = tensor.view(-1).view(torch.uint8).numpy()
        try:
            with open(self.path, "rb") as file:
                file.seek(record.offset)
                count = file.readinto(data.data)
        except OSError as error:
            raise _damage_error(self.path, error.strerror) from error
        if count != data.nbytes or hashlib.sha256(data.data).hexdigest() != record.sha256:
            raise _damage_error(self.path, f"{record.name} at byte {record.offset} has changed")
        return tensor


class PartWriter:
    """Writes tensors into a part.

    Args:
        file: Open for writing, behind its first bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.index: list[dict[str, Any]] = []

    def add(self, name: str, at: Slices, tensor: Tensor) -> None:
        """Write a tensor. Any shape.

        Args:
            name: Name of the result that it belongs to.
            at: Where it belongs.
            tensor: What is written.
        """
        digest, offset = hashlib.sha256(), self.file.tell()
        for piece in pieces(tensor.cpu()):
            data = piece.contiguous().view(-1).view(torch.uint8).numpy().data
            digest.update(data)
            self.file.write(data)
        self.index.append(
            {
                "name": name,
                "at": [(s.start, s.stop) for s in at],
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "offset": offset,
                "sha256": digest.hexdigest(),
            }
        )


@contextmanager
def write_part(
    path: Path, facts: Mapping[str, Any], *, keeps_first: bool = False
) -> Iterator[PartWriter]:
    """Write a part, which is there as a whole when the block ends, and not at all if it fails.

    Args:
        path: Path of the file.
        facts: What it says about itself, in types that JSON knows.
        keeps_first: Whether a file that is there already stays; else it is replaced.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        with open(temporary, "xb") as file:
            file.write(_MAGIC)
            writer = PartWriter(file)
            yield writer
            content = json.dumps({"facts": dict(facts), "records": writer.index}).encode()
            file.write(content + _TAIL.pack(hashlib.sha256(content).digest(), len(content)))
            file.flush()
            os.fsync(file.fileno())
        publish_file(temporary, path, keeps_first)
    finally:
        with suppress(OSError):
            temporary.unlink()


def publish_file(temporary: Path, path: Path, keeps_first: bool) -> None:
    """Give a file its name, for good if the first of several is kept.

    Args:
        temporary: The file as it was written.
        path: Its name.
        keeps_first: Whether a file that is there already stays; else it is replaced.
    """
    if keeps_first:
        with suppress(FileExistsError, FileNotFoundError):  # another wrote it, or does so instead
            try:
                os.link(temporary, path)
            except (FileExistsError, FileNotFoundError):
                raise
            except OSError:  # a file system without links
                temporary.replace(path)
    else:
        temporary.replace(path)


def temporary_files(path: Path) -> Iterator[Path]:
    """Files that a writer of a part left behind if it was killed."""
    return path.parent.glob(f".{path.name}.tmp-*")


def read_part(path: Path) -> Part:
    """Read what a part holds, without its tensors.

    Raises:
        CheckpointError: The file is damaged or gone, or is not a part.
    """
    try:
        content, size = _read_index(path)
    except OSError as error:
        raise _damage_error(path, error.strerror) from error
    except ValueError as error:
        raise _damage_error(path, str(error)) from error
    index = json.loads(content)
    records = []
    for entry in index["records"]:
        batch, heads, tokens = (slice(*bounds) for bounds in entry["at"])
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        if entry["offset"] + math.prod(shape) * dtype.itemsize > size:
            raise _damage_error(path, "it is shorter than its index says")
        at = batch, heads, tokens
        records.append(
            PartRecord(entry["name"], at, dtype, shape, entry["offset"], entry["sha256"])
        )
    return Part(path, index["facts"], tuple(records))


def _read_index(path: Path) -> tuple[bytes, int]:
    """The index of a part, and where it begins.

    Raises:
        OSError: The file cannot be read.
        ValueError: The index is damaged.
    """
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it does not begin as one")
        end = file.seek(0, os.SEEK_END) - _TAIL.size
        if end < len(_MAGIC):
            raise ValueError("its end is missing")
        file.seek(end)
        digest, length = _TAIL.unpack(file.read(_TAIL.size))
        if not 0 <= length <= end - len(_MAGIC):
            raise ValueError("its end is missing")
        file.seek(end - length)
        content = file.read(length)
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("its index has changed")
    return content, end - length


def _damage_error(path: Path, why: str | None) -> CheckpointError:
    return CheckpointError(
        f"The file of partial results {path} is damaged ({why}).",
        "Remove it, and run again what wrote it.",
    )

"""Files that others wrote: read within bounds, or refused by one error that names the file.

A parser raises nearly any exception on damaged bytes, and a small file can ask for gigabytes. Every
reader of such files does its work inside :func:`reading`, which turns what was raised into one
error of :mod:`fulgurite.errors`; the helpers here keep what is read in proportion to the file, and
raise a plain ``ValueError`` that says why, for :func:`reading` to name the file.

Axes: R rows.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import math
import os
import pickletools
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fulgurite.errors import CheckpointError, DataError, FulguriteError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "BoundedReader",
    "check_archive",
    "check_parquet",
    "check_tensor_file",
    "check_tensors",
    "check_tiff",
    "describe_error",
    "expansion_limit",
    "map_array",
    "open_archive",
    "open_compressed",
    "open_picture",
    "read_array",
    "read_array_shape",
    "read_arrays",
    "read_csv",
    "read_json",
    "read_member",
    "read_state_dict",
    "reading",
]

#: What any file may expand to, and how many times its size a larger one may [bytes]: more than
#: real data compress (inferred), and little enough for a bomb to be refused in time.
SMALLEST_LIMIT, LARGEST_RATIO = 64 << 20, 100
_MOST_TEXT = 48 << 20  # of JSON, which takes twenty times its size in memory [bytes]
_MOST_FIELDS = 10_000  # of a line of a table
_CHUNK = 1 << 20
_TIFF_LZMA, _TIFF_DEFLATE = 34925, (8, 32946)
_DEFLATES = 1032  # largest ratio of deflate
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_HEADERS: dict[tuple[int, int], Callable[[Any], tuple[tuple[int, ...], bool, Any]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def describe_error(error: BaseException) -> str:
    """What an exception says, in one short printable line.

    Example:
        >>> describe_error(ValueError("bad")), describe_error(EOFError())
        ('bad', 'EOFError')
    """
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    line = "".join(c if c.isprintable() else "?" for c in lines[0]) if lines else ""
    return line[:200] or type(error).__name__


def reading(
    path: str | Path,
    subject: str,
    hint: str,
    error: Callable[[str, str], FulguriteError] = DataError,
    fault: str = "cannot be read",
) -> Reading:
    """Turn whatever a parser raises into one error that names the file.

    Errors of this project pass unchanged, and so does ``ImportError``, which is no fault of the
    file.

    Args:
        path: The file, named in the error; one that is there must be a regular file, since others
            (pipes, devices) may never end.
        subject: What it is, as the beginning of a sentence: ``The stack``.
        hint: What to do about it.
        error: The error to raise.
        fault: What is wrong, as the rest of the sentence.

    Raises:
        FulguriteError: ``error``, if the block raises.

    Example:
        >>> with reading("a.json", "The table", "Fetch it again."):
        ...     raise EOFError("it ends")
        Traceback (most recent call last):
        ...
        fulgurite.errors.DataError: The table a.json cannot be read (it ends). Fetch it again.
    """
    return Reading(path, f"{subject} {path} {fault}", hint, error)


class Reading:
    """The context that :func:`reading` gives."""

    def __init__(
        self, path: str | Path, subject: str, hint: str, error: Callable[[str, str], FulguriteError]
    ) -> None:
        self.path, self.subject, self.hint, self.error = path, subject, hint, error

    def __enter__(self) -> None:
        """Refuse what is no regular file."""
        try:
            _refuse_special(self.path)
        except ValueError as raised:
            raise self._name_file(raised) from raised

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, _: object
    ) -> None:
        """Name the file in what was raised."""
        if raised is None or isinstance(raised, FulguriteError | ImportError):
            return
        # a panic of Rust code (tokenizers) is no Exception, so that few programs catch it
        if isinstance(raised, Exception) or type(raised).__name__ == "PanicException":
            raise self._name_file(raised) from raised

    def _name_file(self, raised: BaseException) -> FulguriteError:
        return self.error(f"{self.subject} ({describe_error(raised)}).", self.hint)


def _refuse_special(path: str | Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # the reader says what is missing
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError("it is no regular file")


def expansion_limit(size: int) -> int:
    """How many bytes a file of ``size`` bytes may expand to.

    Example:
        >>> expansion_limit(1000) == 64 << 20, expansion_limit(10 << 20) == 1000 << 20
        (True, True)
    """
    return max(SMALLEST_LIMIT, LARGEST_RATIO * size)


# --- text --------------------------------------------------------------------------------------


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice[:80]!r} twice")
    return content


def read_json(source: str | Path | bytes) -> Any:
    """Read JSON of a file, or its bytes, in UTF-8; an object may have each name once.

    Raises:
        ValueError: The content is not JSON, is larger than 48 MiB, or repeats a name in an object.
        OSError: The file cannot be opened.

    Example:
        >>> read_json(b'{"a": [1, 2]}')
        {'a': [1, 2]}
    """
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            source = file.read(_MOST_TEXT + 1)
    if len(source) > _MOST_TEXT:
        raise ValueError(f"it is larger than {_MOST_TEXT >> 20} MiB")
    return json.loads(source.decode("utf-8"), object_pairs_hook=_refuse_twice)


class BoundedReader(io.RawIOBase):
    """Reads a stream, and refuses to go on beyond a limit.

    Args:
        stream: What is read.
        limit: Most bytes that it may have.

    Example:
        >>> BoundedReader(io.BytesIO(b"abc"), 3).read(2)
        b'ab'
    """

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        super().__init__()
        self.stream, self.limit, self.count = stream, limit, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes; see ``io.RawIOBase``."""
        chunk = self.stream.read(min(len(buffer), _CHUNK))
        self.count += len(chunk)
        if self.count > self.limit:
            raise ValueError(f"it expands to more than {self.limit >> 20} MiB")
        buffer[: len(chunk)] = chunk
        return len(chunk)


@contextmanager
def open_compressed(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that may be compressed by gzip, bzip2 or xz, within :func:`expansion_limit`.

    The content decides, not the name.

    Raises:
        ValueError: The content expands too much (raised by ``read``).
        OSError: The file cannot be opened.
    """
    with open(path, "rb") as file:
        start = file.read(6)
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        stream: Any = file
        if start.startswith(b"\x1f\x8b"):
            stream = gzip.GzipFile(fileobj=file)
        elif start.startswith(b"BZh"):
            stream = bz2.BZ2File(file)
        elif start.startswith(b"\xfd7zXZ\x00"):
            stream = lzma.LZMAFile(file)  # noqa: SIM115  # closed with the file below it
        yield io.BufferedReader(BoundedReader(stream, expansion_limit(size)), _CHUNK)


def read_csv(path: str | Path, **options: Any) -> pd.DataFrame:
    """Read a table of comma-separated values, also compressed, with pandas.

    Only an empty cell is missing: ``NA``, ``None``, ``null`` and the like are names, as they are in
    any other format.

    Args:
        path: The file.
        options: Options of ``pandas.read_csv``.

    Raises:
        ValueError: The file is of another format, a line has more than 10,000 fields or more of
            them than the header, or the header names a column twice.
        Exception: What pandas raises.
    """
    import pandas as pd

    with open_compressed(path) as file:
        content = file.read()
    _refuse_other_formats(content)
    widest = max((line.count(b",") for line in content.splitlines()), default=0)
    if widest > _MOST_FIELDS:
        raise ValueError(f"a line has {widest:,} fields")
    table: pd.DataFrame = pd.read_csv(
        io.BytesIO(content), compression=None, keep_default_na=False, na_values=[""], **options
    )
    _refuse_unclear_header(content, list(table.columns))
    if "index_col" not in options and not isinstance(table.index, pd.RangeIndex):
        raise ValueError("lines have more fields than the header")
    return table


#: How files begin that are often given instead of a table of comma-separated values.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a spreadsheet (.xlsx, .ods) or another zip",
    b"\xd0\xcf\x11\xe0": "a spreadsheet (.xls)",
    b"PAR1": "parquet, which needs the ending .parquet",
    codecs.BOM_UTF16_LE: "text in UTF-16",
    codecs.BOM_UTF16_BE: "text in UTF-16",
}


def _refuse_other_formats(content: bytes) -> None:
    for start, name in _OTHER_FORMATS.items():
        if content.startswith(start):
            raise ValueError(f"it is {name}, not comma-separated values in UTF-8")


def _refuse_unclear_header(content: bytes, columns: list[Any]) -> None:
    """Refuse a header that names a column twice, or whose fields another sign separates."""
    start = content[:_CHUNK].removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
    lines = start.splitlines()
    names = next((row for row in csv.reader(lines) if any(row)), [])
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"it has two columns {twice[:80]!r}")
    for sign, word in (("\t", "tabs"), (";", "semicolons")):
        if len(columns) == 1 and sign in str(columns[0]):
            raise ValueError(f"its fields are separated by {word}: separate them by commas")


def check_parquet(path: str | Path) -> None:
    """Refuse a parquet table whose rows are out of proportion to the file.

    Raises:
        ValueError: The rows are out of proportion to the file.
        Exception: What pyarrow raises.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        facts, size = table.metadata, os.path.getsize(path)
        cells = facts.num_rows * max(1, facts.num_columns)
        groups = [facts.row_group(k).total_byte_size for k in range(facts.num_row_groups)]
        limit = expansion_limit(size)
        if (
            facts.num_rows < 0
            or 8 * cells > limit
            or sum(groups) > limit
            or min(groups, default=0) < 0
        ):
            raise ValueError(f"{size:,} bytes say that they hold {facts.num_rows:,} rows")


# --- zips and arrays -----------------------------------------------------------------------------


def check_archive(archive: zipfile.ZipFile, size: int, names: Iterable[str] | None = None) -> int:
    """Check what an archive says of its members, and return how many bytes they are in all.

    Args:
        archive: The open zip.
        size: Size of its file [bytes].
        names: Names of the members to check; all by default.

    Raises:
        ValueError: A member is encrypted, compressed in an unusual way or named twice, or they
            expand too much.
        KeyError: The archive has no member of that name.
    """
    members = archive.infolist() if names is None else [archive.getinfo(name) for name in names]
    if len({member.filename for member in members}) < len(members):
        raise ValueError("it holds two members of one name")
    for member in members:
        if member.flag_bits & 0x1:
            raise ValueError(f"{member.filename} is encrypted")
        if member.compress_type not in _METHODS:
            raise ValueError(
                f"{member.filename} is compressed by method {member.compress_type}: only stored "
                "and deflated members are read"
            )
    total = sum(member.file_size for member in members)
    if total > expansion_limit(size):
        raise ValueError(f"{size:,} bytes expand to {total:,}")
    return total


@contextmanager
def open_archive(path: str | Path) -> Iterator[tuple[zipfile.ZipFile, int]]:
    """Open a zip; gives it and the size of its file [bytes]."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        yield archive, os.fstat(file.fileno()).st_size


def read_member(archive: zipfile.ZipFile, name: str, size: int) -> bytes:
    """Read one member of a zip whole.

    Args:
        archive: The open zip.
        name: Name of the member.
        size: Size of the zip's file [bytes].

    Raises:
        ValueError: The member fails :func:`check_archive`.
        Exception: What ``zipfile`` and ``zlib`` raise.
    """
    check_archive(archive, size, [name])
    return archive.read(name)


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format is not read")
    shape, fortran, kind = _HEADERS[version](stream)
    if kind.kind not in "biufcSU" or not kind.itemsize or kind.itemsize > _CHUNK:
        raise ValueError(f"it holds {kind}, neither numbers nor text")
    if any(length < 0 for length in shape) or len(shape) > 32:
        raise ValueError(f"its shape is {shape}")
    return shape, fortran, kind


def _read_array(stream: IO[bytes], size: int, limit: int) -> npt.NDArray[Any]:
    """An array in NumPy's format of ``size`` bytes, header included."""
    shape, fortran, kind = _array_header(stream)
    # an empty array has no bytes, whatever its other dimensions are
    if math.prod(length for length in shape if length) > max(limit, 1):
        raise ValueError(f"its shape {shape} is out of proportion to the file")
    expected = math.prod(shape) * kind.itemsize
    if expected > size:
        raise ValueError(f"an array of shape {shape} and type {kind} is cut off")
    content = bytearray(stream.read(expected))
    if len(content) < expected:
        raise ValueError(f"an array of shape {shape} and type {kind} is cut off")
    if stream.read(1):
        raise ValueError(f"bytes follow an array of shape {shape} and type {kind}")
    if kind.kind == "U":
        codes = np.frombuffer(content, np.dtype(np.uint32).newbyteorder(kind.byteorder))
        if (codes > 0x10FFFF).any():
            raise ValueError("it holds text that is none")
    array: npt.NDArray[Any] = np.frombuffer(content, kind)
    if kind.kind == "b":
        array = array.view(np.uint8) != 0  # other bytes are neither true nor false
    return array.reshape(shape, order="F" if fortran else "C")


def read_arrays(
    path: str | Path, names: Iterable[str] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Read arrays of numbers and text of an npz file; nothing in it is unpickled.

    Args:
        path: The file.
        names: Names of the arrays to read, where they are there; all by default.

    Raises:
        ValueError: The file is no zip of arrays, holds objects, or they are out of proportion.
        Exception: What ``zipfile``, ``zlib`` and NumPy raise.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(Path(folder) / "a.npz", a=np.arange(3))
        ...     read_arrays(Path(folder) / "a.npz")
        {'a': array([0, 1, 2])}
    """
    with open_archive(path) as (archive, size):
        members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
        if not members and archive.infolist():
            raise ValueError("it holds no array")
        if names is not None:
            filenames = {f"{name}.npy" for name in names}
            members = [member for member in members if member.filename in filenames]
        total = check_archive(
            archive, size, None if names is None else [m.filename for m in members]
        )
        arrays = {}
        for member in members:
            with archive.open(member) as stream:
                arrays[member.filename[:-4]] = _read_array(stream, member.file_size, total)
        return arrays


def read_array_shape(path: str | Path, name: str) -> tuple[int, ...] | None:
    """Read only the shape of an array of an npz file; None if it is not there.

    Raises:
        Exception: See :func:`read_arrays`.
    """
    with open_archive(path) as (archive, size):
        if f"{name}.npy" not in archive.namelist():
            return None
        check_archive(archive, size, [f"{name}.npy"])
        with archive.open(f"{name}.npy") as stream:
            return _array_header(stream)[0]


def read_array(stream: IO[bytes], size: int) -> npt.NDArray[Any]:
    """Read an npy file of ``size`` bytes; nothing in it is unpickled.

    Raises:
        ValueError: The file is none, holds objects, or is cut off.
        Exception: What NumPy raises.

    Example:
        >>> stream = io.BytesIO()
        >>> np.save(stream, np.arange(3))
        >>> read_array(io.BytesIO(stream.getvalue()), len(stream.getvalue())).tolist()
        [0, 1, 2]
    """
    return _read_array(stream, size, size)


def map_array(path: str | Path) -> npt.NDArray[Any]:
    """Map an array of an npy file, read-only; nothing in it is unpickled.

    Raises:
        ValueError: The file is none, holds objects, or is cut off.
        Exception: What NumPy raises.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder) / "a.npy", np.arange(3))
        ...     map_array(Path(folder) / "a.npy").tolist()
        [0, 1, 2]
    """
    with open(path, "rb") as file:
        shape, fortran, kind = _array_header(file)
        begin, size = file.tell(), os.fstat(file.fileno()).st_size
    if math.prod(length for length in shape if length) > size:
        raise ValueError(f"its shape {shape} is out of proportion to the file")
    if begin + math.prod(shape) * kind.itemsize != size:
        raise ValueError(f"{size - begin:,} bytes are no array of shape {shape} and type {kind}")
    order: Any = "F" if fortran else "C"
    if not math.prod(shape):  # no file can be mapped empty
        return np.zeros(shape, kind, order)
    return np.memmap(path, kind, "r", begin, shape, order)


# --- pictures ------------------------------------------------------------------------------------


@contextmanager
def open_picture(source: str | Path | IO[bytes]) -> Iterator[Any]:
    """Open a PNG or JPEG with Pillow; other formats run what this project does not need.

    Raises:
        ValueError: The picture has another format, or more pixels than Pillow's
            ``Image.MAX_IMAGE_PIXELS``.
        Exception: What Pillow raises.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        opened = Image.open(source, formats=("PNG", "JPEG"))
    except UnidentifiedImageError as error:
        raise ValueError("it is neither a PNG nor a JPEG") from error
    with opened as picture:
        max_pixels = Image.MAX_IMAGE_PIXELS
        if max_pixels is not None and picture.width * picture.height > max_pixels:
            raise ValueError(
                f"{picture.width} x {picture.height} pixels are more than {max_pixels:,}"
            )
        yield picture


def check_tiff(pages: Iterable[Any], size: int) -> None:
    """Refuse a TIFF whose planes are out of proportion to the file.

    Args:
        pages: Planes, of ``tifffile``.
        size: Size of the file [bytes].

    Raises:
        ValueError: The planes are out of proportion, or their compression hides their size.
    """
    total = 0
    for page in pages:
        total += page.nbytes
        if total > expansion_limit(size) or not page.dataoffsets:
            raise ValueError(f"{size:,} bytes say that they hold {total:,}")
        if page.compression == _TIFF_LZMA:
            raise ValueError("it is compressed by LZMA")
        # the decoder takes as much memory as there is to expand, whatever a piece's size is
        if page.compression in _TIFF_DEFLATE and sum(page.databytecounts) * _DEFLATES > total:
            expected = math.prod(page.chunks) * page.dtype.itemsize
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                page.parent.filehandle.seek(offset)
                content = page.parent.filehandle.read(count)
                if len(zlib.decompressobj().decompress(content, expected + 1)) > expected:
                    raise ValueError("a piece of it expands beyond its size")


# --- files of torch ------------------------------------------------------------------------------


def check_tensor_file(path: str | Path) -> None:
    """Refuse a file of ``torch.save`` that would expand, or whose checksums do not hold.

    Raises:
        ValueError: A member is compressed, damaged or named twice, or a codec would inflate text.
        Exception: What ``zipfile`` raises.
    """
    if not zipfile.is_zipfile(path):  # of torch before 1.6: pickles, one after the other
        with open(path, "rb") as file:
            for _ in range(5):
                _refuse_codecs(file)
        return
    with open_archive(path) as (archive, size):
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("its members are compressed, which torch.save does not do")
        if check_archive(archive, size) > size:
            raise ValueError(f"{size:,} bytes expand to more")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} does not hold: it is damaged")
        for member in archive.infolist():
            if member.filename.endswith(".pkl"):
                with archive.open(member) as stream:
                    _refuse_codecs(stream)


def _refuse_codecs(stream: IO[bytes]) -> None:
    """Refuse codecs that turn bytes into more bytes; bytes of old pickles need text's alone."""
    names: set[str] = set()
    encodes = False
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                encodes |= argument == "_codecs encode"
            elif isinstance(argument, str) and len(argument) < 64:
                names.add(argument)
    except Exception:  # torch's own reader says what is wrong with it
        return
    for name in names if encodes or "encode" in names else ():
        try:
            is_text = codecs.lookup(name)._is_text_encoding
        except (LookupError, ValueError):
            continue
        if not is_text:
            raise ValueError(f"it asks for the codec {name}")


def check_tensors(content: Any, size: int) -> None:
    """Refuse what a small file of ``torch.save`` says is large, such as repeated tensors.

    Args:
        content: What was loaded.
        size: Size of the file [bytes].

    Raises:
        ValueError: Tensors or bytes are out of proportion to the file.
    """
    import torch

    total, visited, pending = 0, set(), [content]
    while pending:
        value = pending.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, bytes | bytearray):
            total += len(value)
        elif isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            pending += value
    if total > expansion_limit(size):
        raise ValueError(f"{size:,} bytes expand to {total:,}")


def read_state_dict(
    path: str | Path, option: str, hint: str = "Name a file, or give null."
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint, or a state dict alone, that ``torch.save`` wrote.

    Args:
        path: The file.
        option: Who asks for it, as the user spells it; named in errors.
        hint: What to do where there is no such file.

    Returns:
        The whole checkpoint (empty for a state dict alone), and its tensors by name.

    Raises:
        CheckpointError: The file does not exist, is damaged, or holds other types.
    """
    from torch import Tensor

    from fulgurite.io import load_plain

    content = load_plain(path, option, hint)
    is_checkpoint = isinstance(content, dict) and "state_dict" in content
    tensors = content["state_dict"] if is_checkpoint else content
    if (
        not isinstance(tensors, dict)
        or not tensors
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items())
    ):
        raise CheckpointError(
            f"{option}={path} holds no state dict of named tensors.",
            "Give a checkpoint, or save torch.save(network.state_dict(), path).",
        )
    return (content if is_checkpoint else {}), dict(tensors)

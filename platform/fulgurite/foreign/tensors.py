"""Files of ``torch.save`` that others wrote."""

from __future__ import annotations

import codecs
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

from fulgurite.foreign.archives import check_archive, open_archive
from fulgurite.foreign.reading import expansion_limit

__all__ = ["check_tensor_file", "check_tensors"]


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

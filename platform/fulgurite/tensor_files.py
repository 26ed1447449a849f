"""Checkpoints and weights as files of tensors and plain types, which nothing in them executes."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fulgurite.errors import CheckpointError, RunError
from fulgurite.foreign import check_tensor_file, check_tensors, describe_error
from fulgurite.io import atomic_write

__all__ = ["load_plain", "read_state_dict", "save_plain", "seal_archive"]

_SEALED = "fulgurite_digest"
_SEAL = b"fulgurite sha256 "


def load_plain(
    path: str | Path, option: str, hint: str = "Name a file, or give null.", **options: Any
) -> Any:
    """Read a file that ``torch.save`` wrote: tensors and plain types, onto the CPU.

    Nothing in the file is executed, its checksums hold, and what it expands to is in proportion to
    its size.

    Args:
        path: The file.
        option: Who asks for it, as the user spells it; named in errors.
        hint: What to do where there is no such file.
        options: Options of ``torch.load``.

    Raises:
        CheckpointError: The file does not exist, is damaged, or holds other types.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save({"a": torch.ones(2)}, file.name)
        ...     load_plain(file.name, "weights")
        {'a': tensor([1., 1.])}
    """
    import torch

    if not Path(path).is_file():
        raise CheckpointError(f"{option}={path} is not a file.", hint)
    again = "It may be truncated, or written by something else than torch.save: use another."
    try:
        sealed = _check_seal(Path(path))
        check_tensor_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, **options)
        check_tensors(content, os.path.getsize(path))
        if not sealed and isinstance(content, Mapping) and _SEALED in content:
            raise ValueError("its digest is missing")
    except Exception as error:  # a damaged file raises nearly any
        classes: list[str] = []
        if isinstance(error, pickle.UnpicklingError):
            with suppress(Exception):  # a file that is damaged beside it is refused below
                classes = _list_foreign(Path(path))
        if classes:
            raise CheckpointError(
                f"{option}={path} holds {', '.join(classes)}: only tensors and plain types are "
                "read.",
                "Write it without them, as str(path), enum.value, array.tolist() or tensors.",
            ) from error
        raise CheckpointError(
            f"{option}={path} cannot be read as plain tensors ({describe_error(error)}).", again
        ) from error
    return content


def save_plain(content: Mapping[str, Any], path: str | Path) -> None:
    """Write tensors and plain types with ``torch.save``, and a digest that reading checks.

    The digest is the comment of the zip archive that ``torch.save`` writes, so that ``torch.load``
    reads the file as any other.

    Raises:
        CheckpointError: The content has other types, which :func:`load_plain` would not read.
        RunError: The file cannot be written; what was there before is kept.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_plain({"a": torch.ones(2)}, f"{folder}/a.ckpt")
        ...     load_plain(f"{folder}/a.ckpt", "weights")["a"]
        tensor([1., 1.])
    """
    import torch

    path = Path(path)
    try:
        with atomic_write(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save({**content, _SEALED: "sha256"}, file)
            _check_plain(temporary, content, path)
            seal_archive(temporary)
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        before = "The one before it is kept." if path.is_file() else ""
        raise RunError(
            f"The checkpoint {path} cannot be written ({cause.strerror}). {before}".strip(),
            "Make room or the folder writable, then resume with --ckpt_path=last.",
        ) from error


def _check_plain(file: Path, content: Mapping[str, Any], path: Path) -> None:
    """Whether :func:`load_plain` would read what was written.

    Args:
        file: Where the content was written.
        content: What it was.
        path: Where it is to be, for errors.

    Raises:
        CheckpointError: The content has other types than tensors and plain ones.
    """
    if not (classes := _list_foreign(file)):
        return
    where, kind = next(_find_foreign(content, ""), ("it", classes[0]))
    raise CheckpointError(
        f"The checkpoint {path} would be one that cannot be read again: {where} holds a {kind}, "
        "and only tensors and plain types are read.",
        "Keep a plain type there (str(path), enum.value, array.tolist()), or leave it out of "
        "state_dict, on_save_checkpoint or save_hyperparameters.",
    )


def _list_foreign(path: Path) -> list[str]:
    """Names of what a file of ``torch.save`` needs that is neither a tensor nor a plain type."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    return sorted(get_unsafe_globals_in_checkpoint(path))


def _find_foreign(content: Any, where: str) -> Iterator[tuple[str, str]]:
    """Where a content holds other types than tensors and plain ones, and which."""
    import torch

    if isinstance(content, Mapping):
        parts = [(f"{where}.{key}" if where else str(key), part) for key, part in content.items()]
    elif isinstance(content, list | tuple | set):
        parts = [(f"{where}[{number}]", part) for number, part in enumerate(content)]
    else:
        kind = type(content)
        plain = isinstance(content, torch.Tensor) or kind.__module__ in ("builtins", "torch")
        if not plain or callable(content):
            yield where, f"{kind.__module__}.{kind.__qualname__}"
        return
    for name, part in parts:
        yield from _find_foreign(part, name)


def seal_archive(path: Path) -> None:
    """Append the digest of a zip archive to it, as its comment.

    Args:
        path: What ``torch.save`` wrote.
    """
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 2)
        file.write((len(_SEAL) + 64).to_bytes(2, "little"))
        file.write(_SEAL)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(digest.encode())


def _check_seal(path: Path) -> bool:
    """Check the digest of a file that has one.

    Returns:
        Whether it has a digest.

    Raises:
        ValueError: The content is not what was written.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail = len(_SEAL) + 64
        file.seek(max(0, size - tail))
        end = file.read()
        if end.startswith(_SEAL):
            digest, remaining = hashlib.sha256(), size - 64
            file.seek(0)
            while remaining:
                block = file.read(min(remaining, 2**20))
                digest.update(block)
                remaining -= len(block)
            if digest.hexdigest().encode() != end[len(_SEAL) :]:
                raise ValueError("its digest is another: it is damaged")
            return True
    return False


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

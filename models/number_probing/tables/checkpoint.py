"""Rows of the token embedding of a checkpoint in safetensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.errors import DataError
from fulgurite.foreign import read_json, reading
from fulgurite.models.number_probing.tables.number_table import (
    NumberTable,
    shorten,
    to_finite_tensor,
)
from fulgurite.models.number_probing.tables.tokens import (
    Spelling,
    number_tokens,
    read_encoder,
    read_json_file,
    vocabulary,
)

__all__ = ["read_checkpoint"]

#: Ends of the names that token embeddings have in checkpoints.
_NAMES = (
    "embed_tokens.weight", "word_embeddings.weight", "wte.weight", "tok_embeddings.weight",
    "embed_in.weight", "backbone.embeddings.weight", "backbone.embedding.weight", "shared.weight",
    "word_embedding.weight", "token_embedding.weight", "model.embeddings.weight",
)  # fmt: skip
_LARGEST_HEADER = 100_000_000  # of safetensors, as its own library has it [bytes]
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Read the tensors' entries of a safetensors file, and the offset of their bytes."""
    hint = "The file may be cut off or a pointer of Git LFS: fetch it again."
    with reading(path, "The file", hint, fault="cannot be read as safetensors"):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= path.stat().st_size - 8:
                raise ValueError("it is too short")
            header = read_json(file.read(min(size, _LARGEST_HEADER)))
        if not isinstance(header, dict):
            raise ValueError("its header names no tensors")
        header.pop("__metadata__", None)
    return header, 8 + size


def read_checkpoint(
    folder: Path,
    numbers: Sequence[int] | None,
    *,
    tensor: str | None,
    spelling: Spelling,
    name: str,
    file: Path | None = None,
) -> NumberTable:
    """Embeddings of numbers of a checkpoint, by the tokenizer in its folder.

    Args:
        folder: Folder of the checkpoint.
        numbers: Numbers that must be there; None for all from 0 to the first gap.
        tensor: Name of the embedding; None where it is to be recognised.
        spelling: See :func:`number_tokens`.
        name: Name of the table.
        file: The file of weights; by default that of the folder, or its shards.

    Raises:
        DataError: A file is missing or damaged, or does not cover the numbers.
    """
    index = folder / "model.safetensors.index.json"
    file = file or folder / "model.safetensors"
    file_of: Callable[[str], Path]
    if file.is_file():
        names = list(_read_header(file)[0])
        file_of = lambda key: file  # noqa: E731
    elif index.is_file():
        content = read_json_file(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(
            isinstance(s, str) and Path(s).name == s for s in shards.values()
        ):
            raise DataError(
                f"{index} has no `weight_map` of files beside it.", "Fetch the checkpoint again."
            )
        names = list(shards)
        file_of = lambda key: folder / shards[key]  # noqa: E731
    else:
        raise DataError(
            f"There is no model.safetensors (or its index) in {folder}.",
            "Give the folder of a checkpoint; save pytorch_model.bin as safetensors first.",
        )
    key = _find_embedding(names, tensor, folder)
    encode = read_encoder(folder)
    token_of, prefix = number_tokens(
        vocabulary(folder), numbers, spelling, source=f"the vocabulary of {folder}", encode=encode
    )
    embeddings = _read_rows(file_of(key), key, list(token_of.values()))
    spelling_note = "without a space" if not prefix else f"with a leading space ({prefix!r})"
    if encode is None:
        spelling_note += ", by their spelling in the vocabulary alone"
    return NumberTable(name, tuple(token_of), embeddings, None, f"{key}; tokens {spelling_note}")


def _find_embedding(names: Sequence[str], tensor: str | None, folder: Path) -> str:
    """Find the name of the token embedding."""
    if tensor is not None:
        if tensor in names:
            return tensor
        candidates: list[str] = []
    else:
        candidates = [n for n in names if f".{n}".endswith(tuple(f".{x}" for x in _NAMES))]
        # of an encoder and a decoder that share it, one is enough
        candidates = [n for n in candidates if n.endswith("shared.weight")] or candidates
        if len(candidates) == 1:
            return candidates[0]
    suggestions = candidates or [n for n in names if "emb" in n.lower()] or list(names)
    problem = f"no tensor '{tensor}'" if tensor else f"{len(candidates)} possible token embeddings"
    raise DataError(
        f"There is {problem} in {folder}.",
        f"Name it, e.g. --tensor {suggestions[0] if suggestions else 'NAME'}; there are "
        f"{', '.join(suggestions[:6])}.",
    )


def _read_rows(path: Path, key: str, ids: Sequence[int]) -> Tensor:
    """Read rows of one tensor of a safetensors file, and nothing else of it."""
    header, start = _read_header(path)
    entry = header.get(key)
    dtype_name = entry.get("dtype") if isinstance(entry, dict) else None
    if isinstance(dtype_name, str) and dtype_name not in _TYPES:
        raise DataError(
            f"The tensor {key} of {path} holds {shorten(dtype_name)}, and embeddings are "
            f"read from {', '.join(_TYPES)}.",
            "Save it in one of these (quantised weights times their scales), or name another "
            "tensor with --tensor.",
        )
    matrix = _parse_matrix(entry, path.stat().st_size - start)
    if matrix is None:
        raise DataError(
            f"The tensor {key} of {path} is no whole matrix of floating point numbers: "
            f"{str(entry)[:200]}.",
            "Fetch the file again, or name another tensor with --tensor.",
        )
    dtype, rows, width, begin = matrix
    if max(ids) >= rows:
        raise DataError(
            f"{key} of {path} has {rows} rows, and the tokenizer asks for row {shorten(max(ids))}.",
            "Put the tokenizer that belongs to these weights beside them.",
        )
    size = width * dtype.itemsize
    with reading(path, "The file", "Fetch it again."), open(path, "rb") as file:
        parts = []
        for i in ids:
            file.seek(start + begin + i * size)
            parts.append(file.read(size))
        content = torch.frombuffer(bytearray(b"".join(parts)), dtype=dtype).view(len(ids), -1)
    return to_finite_tensor(content.float().numpy(), f"{key} of {path}")


def _parse_matrix(entry: Any, size: int) -> tuple[torch.dtype, int, int, int] | None:
    """Type, rows, columns and first byte of a tensor; None if no matrix in ``size`` bytes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return None
    dtype, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    if dtype not in _TYPES or not all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)
        for pair in (shape, offsets)
    ):
        return None
    (rows, width), (begin, end) = entry["shape"], entry["data_offsets"]
    if not width or end > size or end - begin != rows * width * _TYPES[dtype].itemsize:
        return None
    return _TYPES[dtype], rows, width, begin

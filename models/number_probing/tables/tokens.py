"""Which row of a table is which number: tokens, vocabularies and lists of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from fulgurite.domains.number_probing import Encoder, encode_known, encode_numbers
from fulgurite.errors import ConfigError, DataError
from fulgurite.foreign import read_json, reading
from fulgurite.models.number_probing.tables.number_table import (
    DEFAULT_STOP,
    check_covered,
    check_tokens,
)

__all__ = [
    "Encoder",
    "Spelling",
    "find_word_rows",
    "number_tokens",
    "read_encoder",
    "read_json_file",
    "read_lines",
    "vocabulary",
]

Spelling = Literal["auto", "bare", "spaced"]

_SPACES = ("Ġ", "▁", " ")  # how byte-level BPE, SentencePiece and plain vocabularies write a space


def number_tokens(
    vocabulary: Mapping[str, int],
    numbers: Sequence[int] | None = None,
    spelling: Spelling = "auto",
    *,
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

    Source: docs/papers/number_probing.md sections 1.1 and 3 (tables that collect "7" and " 7" hold
    a number twice).
    """
    if spelling not in get_args(Spelling):
        raise ConfigError(
            f"spelling={spelling!r} is unknown.", f"Use {', '.join(get_args(Spelling))}."
        )
    candidates = range(DEFAULT_STOP) if numbers is None else numbers
    prefixes = {"auto": ("", *_SPACES), "bare": ("",), "spaced": _SPACES}[spelling]
    single_token, possible_tokens = encode_numbers(candidates, encode) if encode else ({}, None)
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
    check_covered(best[0], numbers, source)
    check_tokens(best[0], source)
    return best


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
        with reading(path, "The tokenizer", "Save the tokenizer again.", fault="cannot encode"):
            encodings = tokenizer.encode_batch_fast([*texts], add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

    return partial(encode_known, encode)


def find_word_rows(
    words: Sequence[str], numbers: Sequence[int] | None, source: str, spelling: Spelling = "bare"
) -> dict[int, int]:
    """Find the row of each number in a list of words."""
    return number_tokens(index_words(words, source), numbers, spelling, source=source)[0]


def index_words(words: Sequence[str], source: str) -> dict[str, int]:
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


def read_lines(path: Path) -> list[str]:
    """The lines of a list of words.

    Raises:
        DataError: The file cannot be read, or is no text in UTF-8.
    """
    hint = "Give a text file in UTF-8 with one word a line."
    with reading(path, "The list of words", hint):
        # not splitlines, which ends lines at a dozen signs that are tokens of vocabularies
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        return lines[:-1] if lines[-1] == "" else lines


def read_json_file(path: Path) -> Any:
    """The content of a JSON file of a checkpoint.

    Raises:
        DataError: The file cannot be read, or is no JSON.
    """
    with reading(path, "The file", "Fetch the checkpoint again.", fault="cannot be read as JSON"):
        return read_json(path)


def vocabulary(folder: Path) -> dict[str, int]:
    """Identifier of each token, from whichever file of a tokenizer is in a folder.

    Raises:
        DataError: The folder has no tokenizer, or a damaged one.
    """
    if (path := folder / "tokenizer.json").is_file():
        content = read_json_file(path)
        hint = "Save the tokenizer again."
        with reading(path, "The tokenizer", hint, fault="has no vocabulary in `model.vocab`"):
            vocab = content["model"]["vocab"]
            if isinstance(vocab, list):  # of Unigram: pairs of token and score
                vocab = index_words([str(token) for token, _ in vocab], str(path))
            added_tokens = {t["content"]: t["id"] for t in content.get("added_tokens") or []}
            return {**vocab, **added_tokens}
    if (path := folder / "vocab.json").is_file():
        vocab = read_json_file(path)
        if not isinstance(vocab, dict):
            raise DataError(f"{path} is no mapping of tokens.", "Save the tokenizer again.")
        return vocab
    if (path := folder / "vocab.txt").is_file():
        return index_words(read_lines(path), str(path))
    raise DataError(
        f"There is no tokenizer in {folder}.",
        "Put tokenizer.json, vocab.json or vocab.txt beside the weights; a tokenizer.model must be "
        "saved as tokenizer.json first.",
    )

"""From text to tokens: words with one token for each number 0 … 999, or a ``tokenizer.json``.

Axes: V vocabulary.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy.typing as npt

from fulgurite.domains.number_probing import encode_known, encode_numbers
from fulgurite.errors import ConfigError
from fulgurite.extras import optional_import
from fulgurite.foreign import read_json, reading
from fulgurite.io import data_path

__all__ = [
    "DigitTokenizer",
    "FileTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "make_tokenizer",
    "number_of",
    "number_tokens",
]

_LARGEST = 999
_PREFIXES = ("Ġ", "▁", " ")  # of words after a space, in GPT-2's bytes and SentencePiece
_WORD = re.compile(r"\d+|[^\W\d_]+|[^\w\s]|_")
_WORD_OR_DIGIT = re.compile(r"\d|[^\W\d_]+|[^\w\s]|_")
_HINT = "Give a tokenizer.json in `--data.init_args.tokenizer.name`, or `words`, or `digits`."
_MOST_UNUSED = 1 << 20  # numbers without a token
_LONGEST = 100  # characters that a rule of a tokenizer may put for one
_UNKNOWN, _END, _LONG = "<unknown>", "<end>", "<number>"


class Tokenizer(Protocol):
    """The interface of tokenizers to the token cache.

    Attributes:
        vocab_size: V, known before any text is read.
        key: Identifies everything that tokens depend on, except the text.
        end: Token after each document; None for none.
        numbers: Number that each token stands for, of those that do.
    """

    vocab_size: int
    key: str
    end: int | None
    numbers: dict[int, int]

    def learn(self, documents: Iterable[str]) -> None:
        """Choose the vocabulary, if it depends on the text."""
        ...

    def encode(self, documents: Sequence[str]) -> list[list[int]]:
        """Tokens of each document."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the choices of :meth:`learn`, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state of :meth:`state`."""
        ...

    def spaced(self, token: int) -> bool:
        """Whether a token begins with a space."""
        ...


def number_of(token: str) -> int | None:
    """The number 0 … 999 that a token spells, with or without the space before it.

    Example:
        >>> [number_of(token) for token in ("7", "Ġ42", "▁999", "007", "1000", "x")]
        [7, 42, 999, None, None, None]

    Source: inferred.
    """
    text = token[1:] if token[:1] in _PREFIXES else token
    if not (text.isascii() and text.isdigit()) or len(text) > 3 or str(int(text)) != text:
        return None
    return int(text)


class WordTokenizer:
    """Words in lower case and single signs; each whole number 0 … 999 is one token.

    Longer runs of digits, and those with leading zeros, are one common token: they are no small
    numbers. Of the other words, the most frequent ones have a token.

    Args:
        vocab_size: V, numbers and special tokens included; fewer words leave tokens unused.

    Raises:
        ConfigError: V leaves no token for words.

    Example:
        >>> tokenizer = WordTokenizer(1010)
        >>> tokenizer.learn(["Room 7 of 10."])
        >>> tokenizer.encode(["of 7, 0012"]) == [[tokenizer.words["of"], 10, 0, 2]]
        True

    Source: inferred; one token for each number as in Llama 3's, docs/papers/number_probing.md
    section 1.1.
    """

    end: int | None = 1
    name = "words"
    largest = _LARGEST  # number that is one token
    pattern = _WORD

    def __init__(self, vocab_size: int = 8192) -> None:
        special = (_UNKNOWN, _END, _LONG)
        reserved = len(special) + self.largest + 1
        if vocab_size <= reserved:
            raise ConfigError(
                f"A vocabulary of {vocab_size} tokens leaves none for words.",
                f"Set `--data.init_args.tokenizer.vocab_size` above {reserved}.",
            )
        self.vocab_size, self.key = vocab_size, f"{self.name}-1-{vocab_size}"
        self.special = {name: i for i, name in enumerate(special)}
        self.numbers = {len(special) + n: n for n in range(self.largest + 1)}
        self.words = {str(n): token for token, n in self.numbers.items()}

    def learn(self, documents: Iterable[str]) -> None:
        """Count words, and keep the most frequent ones; equally frequent ones by the alphabet."""
        counts: Counter[str] = Counter()
        for document in documents:
            counts.update(self.pattern.findall(document.lower()))
        words = [word for word in counts if not word[0].isdigit()]
        words.sort(key=lambda word: (-counts[word], word))
        self.restore({"words": words[: self.vocab_size - len(self.special) - len(self.numbers)]})

    def encode(self, documents: Sequence[str]) -> list[list[int]]:
        """Tokens of each document."""
        get = self.words.get
        unknown, long = self.special[_UNKNOWN], self.special[_LONG]
        return [
            [
                token
                if (token := get(word)) is not None
                else (long if word[0].isdigit() else unknown)
                for word in self.pattern.findall(document.lower())
            ]
            for document in documents
        ]

    def state(self) -> dict[str, Any]:
        """The words that have a token, in the order of the tokens."""
        first = len(self.special) + len(self.numbers)
        return {"words": [word for word, token in self.words.items() if token >= first]}

    def restore(self, state: dict[str, Any]) -> None:
        """Give words tokens."""
        numbers = {str(n): token for token, n in self.numbers.items()}
        first = len(self.special) + len(numbers)
        self.words = numbers | {word: first + i for i, word in enumerate(state["words"])}

    def spaced(self, token: int) -> bool:
        """Return False: no token begins with a space."""
        return False


class DigitTokenizer(WordTokenizer):
    """Words in lower case, single signs and single digits: a number is as many tokens as digits.

    Args:
        vocab_size: V, digits and special tokens included; fewer words leave tokens unused.

    Raises:
        ConfigError: V leaves no token for words.

    Example:
        >>> DigitTokenizer(20).encode(["7, 0012"])
        [[10, 0, 3, 3, 4, 5]]

    Source: inferred.
    """

    name = "digits"
    largest = 9
    pattern = _WORD_OR_DIGIT


class FileTokenizer:
    """A ``tokenizer.json`` of the package ``tokenizers``, such as Llama 3's.

    A number may have two tokens, alone and after a space; both count as number tokens. Those that
    the tokenizer gives for no text of the number, as where it splits digits, do not.

    Args:
        path: The file, or the folder that holds it; absolute, or relative to ``FULGURITE_DATA``.

    Raises:
        MissingExtraError: The package is not installed.
        DataError: There is no such file, or it is no tokenizer.

    Source: docs/papers/number_probing.md section 2.2; both tokens: inferred.
    """

    def __init__(self, path: str) -> None:
        subject = f"--data.init_args.tokenizer.name={path} (words and digits need nothing)"
        tokenizers = optional_import("tokenizers", "transformers", subject)
        file = data_path(path)
        self._file = file = file / "tokenizer.json" if file.is_dir() else file
        with reading(file, "The tokenizer", _HINT):
            content = file.read_bytes()
            _refuse_inflation(read_json(content))
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
            # a text is read whole, and nothing is added to it
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            size = int(self._tokenizer.get_vocab_size())
            vocabulary: dict[str, int] = self._tokenizer.get_vocab()
            largest = max(vocabulary.values(), default=0)
            if largest >= _MOST_UNUSED + 2 * len(vocabulary):
                raise ValueError(f"of {len(vocabulary):,} tokens one has the number {largest:,}")
        self.vocab_size = max(size, largest + 1)
        self.key = f"file-1-{hashlib.sha256(content).hexdigest()}"
        parsed = ((token, number_of(text)) for text, token in vocabulary.items())
        numbers = {token: n for token, n in parsed if n is not None}
        _, possible_tokens = encode_numbers(
            sorted({*numbers.values()}), partial(encode_known, self.encode)
        )
        # where digits are split, tokens of several digits never occur, and are never trained
        self.numbers = {token: n for token, n in numbers.items() if token in possible_tokens[n]}
        ends = ("<|end_of_text|>", "<|endoftext|>", "</s>", "[SEP]")
        self.end = next((vocabulary[name] for name in ends if name in vocabulary), None)

    def learn(self, documents: Iterable[str]) -> None:
        """Do nothing: the file has the vocabulary."""

    def encode(self, documents: Sequence[str]) -> list[list[int]]:
        """Tokens of each document."""
        with reading(self._file, "The tokenizer", _HINT, fault="cannot encode the text"):
            encodings = self._tokenizer.encode_batch_fast([*documents], add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

    def state(self) -> dict[str, Any]:
        """Return nothing: the file has it all."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Do nothing: the file has it all."""

    def spaced(self, token: int) -> bool:
        """Whether a token begins with a space."""
        return str(self._tokenizer.id_to_token(token))[:1] in _PREFIXES


def _refuse_inflation(content: Any) -> None:
    """Refuse rules that replace a character by a long text: a file of text would fill the memory.

    Raises:
        ValueError: A rule puts more than 100 characters for one.
    """
    stack = [content[name] for name in ("normalizer", "pre_tokenizer") if name in dict(content)]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            for name in ("content", "prepend", "replacement"):
                if isinstance(part.get(name), str) and len(part[name]) > _LONGEST:
                    raise ValueError(f"one of its rules puts {len(part[name]):,} characters")
            stack += part.values()
        elif isinstance(part, list):
            stack += part


def make_tokenizer(tokenizer: str, vocab_size: int) -> Tokenizer:
    """Make the tokenizer ``words`` or ``digits``, or that of a file.

    Raises:
        MissingExtraError: A file is named, and the package tokenizers is not installed.
        DataError: The file is missing, or no tokenizer.
        ConfigError: ``vocab_size`` leaves no token for words.
    """
    for kind in (WordTokenizer, DigitTokenizer):
        if tokenizer == kind.name:
            return kind(vocab_size)
    return FileTokenizer(tokenizer)


def number_tokens(tokenizer: Tokenizer, counts: npt.NDArray[Any]) -> dict[int, int]:
    """One token for each number that has any.

    Where numbers are spelled in two ways, alone and after a space, all are taken from the
    spelling that occurs more often, or from that which has at least twice as many numbers: single
    digits occur within all others. The spellings are never mixed, since a mixture has periods of
    its own; numbers that the other alone has are left out.

    Args:
        tokenizer: Knows which tokens stand for numbers.
        counts: How often each token occurs. Shape: (V,).

    Returns:
        Token of each number, by number.

    Example:
        >>> import numpy as np
        >>> tokenizer = WordTokenizer(1010)
        >>> tokens = number_tokens(tokenizer, np.zeros(1010, int))
        >>> len(tokens), tokenizer.numbers[tokens[7]]
        (1000, 7)

    Source: inferred.
    """
    spellings: dict[bool, dict[int, int]] = {False: {}, True: {}}
    for token, n in sorted(tokenizer.numbers.items()):
        spellings[tokenizer.spaced(token)].setdefault(n, token)
    total = {
        spaced: int(counts[[*token_of.values()]].sum()) for spaced, token_of in spellings.items()
    }
    size = {spaced: len(token_of) for spaced, token_of in spellings.items()}
    spaced = total[True] > total[False]
    if size[not spaced] >= 2 * size[spaced]:
        spaced = not spaced
    return dict(sorted(spellings[spaced].items()))

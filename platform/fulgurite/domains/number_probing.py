"""Which tokens a tokenizer gives for a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fulgurite.errors import DataError

__all__ = ["Encoder", "encode_known", "encode_numbers"]

#: Tokens of each of several texts.
Encoder = Callable[[Sequence[str]], list[list[int]]]

_FORMS = ("{}", " {}", "a {}", "({})", "a{}")  # in which a number may have another token


def encode_known(encode: Encoder, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts; one that the tokenizer cannot encode has no tokens.

    Some tokenizers have nothing for what they do not know.

    Args:
        encode: Raises a ``DataError`` where it cannot.
        texts: The texts.
    """
    try:
        return encode(texts)
    except DataError:
        if len(texts) == 1:
            return [[]]
        return [encode_known(encode, [text])[0] for text in texts]


def encode_numbers(
    numbers: Sequence[int], encode: Encoder
) -> tuple[dict[int, int], dict[int, set[int]]]:
    """Encode numbers in texts: the token of each that is a single token, and all tokens of each.

    Args:
        numbers: The numbers.
        encode: The tokenizer.

    Example:
        >>> encode_numbers([3, 12], lambda texts: [[ord(c) for c in t] for t in texts])[0]
        {3: 51}
    """
    tokens = [encode([form.format(n) for n in numbers]) for form in _FORMS]
    single_token = {n: ids[0] for n, ids in zip(numbers, tokens[0], strict=True) if len(ids) == 1}
    by_number = zip(numbers, *tokens, strict=True)
    return single_token, {
        n: {token for ids in encodings for token in ids} for n, *encodings in by_number
    }

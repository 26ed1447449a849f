"""Names of classes as people write them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

__all__ = ["describe_misspelt", "find_alike", "find_misspelt", "find_repeated", "quote_names"]


def find_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that comes twice, if any.

    Example:
        >>> find_repeated(["a", "b", "a"]), find_repeated(["a", "b"])
        ('a', None)
    """
    names_before: set[str] = set()
    for name in names:
        if name in names_before:
            return name
        names_before.add(name)
    return None


def find_alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return different names that one may take for the same, group by group.

    Names are alike if they differ only in case, in blanks, in Unicode's way to write a letter
    (``µ`` has two), or in ``.0`` behind a number.

    Example:
        >>> find_alike(["DMSO", "dmso", "1", "1.0", "cat"])
        [('DMSO', 'dmso'), ('1', '1.0')]
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(_simplify(name), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def quote_names(names: Iterable[str]) -> str:
    r"""Return names in quotes, joined by ``and``.

    Those that are drawn alike, such as the two ways of Unicode to write ``é``, are escaped.

    Example:
        >>> print(quote_names(["DMSO", "dmso"]))
        'DMSO' and 'dmso'
        >>> print(quote_names(["\u00e9", "e\u0301"]))
        '\xe9' and 'e\u0301'
    """
    names = list(names)
    is_drawn_alike = len({unicodedata.normalize("NFKC", name) for name in names}) < len(names)
    return " and ".join(map(ascii if is_drawn_alike else repr, names))


def find_misspelt(names: Iterable[str], known: Iterable[str]) -> tuple[str, str] | None:
    """Return the first name that only resembles a known one, and that one, if any.

    A name that is known passes, and so does one whose likeness is there too, rightly spelled.

    Args:
        names: Such as the columns of a table.
        known: Names that are looked for.

    Example:
        >>> find_misspelt(["plate", "Lab", " site"], ["plate", "lab", "site"])
        ('Lab', 'lab')
        >>> find_misspelt(["plate", "Plate", "notes"], ["plate", "lab"])
    """
    names = list(names)
    absent = {_simplify(name): name for name in known if name not in names}
    pairs = ((name, absent.get(_simplify(name))) for name in names)
    return next(((name, meant) for name, meant in pairs if meant is not None), None)


def describe_misspelt(names: Iterable[str], known: Iterable[str]) -> str:
    """Return a sentence that names the first name that only resembles a known one, or nothing.

    Example:
        >>> describe_misspelt(["Cat"], ["cat", "dog"])
        " 'Cat' and 'cat' are not the same name."
        >>> describe_misspelt(["elk"], ["cat", "dog"])
        ''
    """
    pair = find_misspelt(names, known)
    return f" {quote_names(pair)} are not the same name." if pair else ""


def _simplify(name: str) -> str:
    text = "".join(unicodedata.normalize("NFKC", name).casefold().split())
    return text.removesuffix(".0") if text.removesuffix(".0").isdigit() else text

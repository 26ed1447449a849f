"""Citations of the pages of the papers in docstrings, and the labels that they mean.

``docs/papers/cs_arm_bn.md sections 1.3 and 7.4`` means the labels ``cs-arm-bn-1-3`` and
``cs-arm-bn-7-4``; ``Stage I, step 4`` of a page is ``fedsir-stage-1-step-4``, ``section 6, check
9`` is ``ice-layers-6-check-9``, and ``section 0 (7)`` is the seventh item of section 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_NUMBER = r"(?:\d+[a-d]?(?:\.\d+)*|I{1,3})"
_LIST = rf"{_NUMBER}(?:(?:, | and | to ){_NUMBER})*"
_PART = r"\b(?:\d+|[a-d])\b"
_PARTS = rf"{_PART}(?:(?:, | and | to ){_PART})*"
_CITATION = re.compile(
    rf"docs/papers/(?P<page>\w+)\.md (?P<kind>sections?|Stages?) (?P<numbers>{_LIST})"
    rf"(?: \((?P<item>\d+)\))?"
    rf"(?:, (?P<unit>step|check|row|item|trap)s? (?P<parts>{_PARTS}))?"
)
_ROMAN = {"I": "1", "II": "2", "III": "3"}


@dataclass(frozen=True)
class Citation:
    """A place of a page that a text cites.

    Args:
        page: Name of the page, such as ``fedsir``.
        number: Number of the section or stage, or of a part of it, as the text has it.
        label: Label of the place on the page.
    """

    page: str
    number: str
    label: str


def _label(page: str, kind: str, number: str) -> str:
    slug = page.replace("_", "-")
    if kind.startswith("Stage"):
        return f"{slug}-stage-{_ROMAN[number]}"
    return f"{slug}-{number.replace('.', '-')}"


def _cited(match: re.Match[str]) -> list[Citation]:
    page, kind = match["page"], match["kind"]
    numbers = re.findall(_NUMBER, match["numbers"])
    labels = [_label(page, kind, number) for number in numbers]
    cited = [Citation(page, number, label) for number, label in zip(numbers, labels, strict=True)]
    parts = re.findall(_PART, match["parts"] or "") or ([match["item"]] if match["item"] else [])
    unit = "" if match["unit"] in (None, "item") else f"{match['unit']}-"
    return cited + [Citation(page, part, f"{labels[-1]}-{unit}{part}") for part in parts]


def flatten(text: str) -> str:
    """A text in one line, without the marks of comments."""
    return " ".join(re.sub(r"\n\s*#:?", "\n", text).split())


def find_citations(text: str) -> list[Citation]:
    """All places of pages that a text cites.

    Args:
        text: Code or a docstring.
    """
    return [one for match in _CITATION.finditer(flatten(text)) for one in _cited(match)]


def link_citations(text: str, link: Callable[[str, str], str]) -> str:
    """The text with a link in place of each cited section.

    Args:
        text: In one line.
        link: Makes the markup of a link from its words and the label.
    """

    def replace(match: re.Match[str]) -> str:
        first = match.start("numbers") - match.start()
        last = match.end("numbers") - match.start()
        linked = re.sub(
            _NUMBER,
            lambda number: link(number[0], _label(match["page"], match["kind"], number[0])),
            match["numbers"],
        )
        return match[0][:first] + linked + match[0][last:]

    return _CITATION.sub(replace, text)

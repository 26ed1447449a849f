"""Options of DataModules of text: which files are read, and how they are split."""

from __future__ import annotations

from dataclasses import dataclass, field

from fulgurite.data.listing import STDLIB
from fulgurite.data.splits import check_fractions
from fulgurite.options import PositiveInt, RightOpenUnitInterval, check_options

__all__ = ["TextOptions", "TextSplit"]

_KEY = "data.init_args"


@dataclass(frozen=True)
class TextOptions:
    """Which files of text are read, and what of their borders is kept.

    Args:
        paths: Files, folders or glob patterns, absolute or relative to ``FULGURITE_DATA``;
            ``stdlib`` or ``null`` for the sources of Python's standard library, about 12 MB of
            real text that is on every machine (but is another one for another Python).
        suffixes: Endings of the names of files that are read in folders.
        documents: Mark the documents of a sequence, which must not see each other.

    Raises:
        ConfigError: A value is of another type.
    """

    paths: list[str] | str | None = None
    suffixes: list[str] = field(default_factory=lambda: [".txt", ".md", ".rst", ".py"])
    documents: bool = False

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.text")

    @property
    def all_paths(self) -> list[str]:
        """The paths as a list."""
        return [self.paths or STDLIB] if isinstance(self.paths, str | None) else list(self.paths)


@dataclass(frozen=True)
class TextSplit:
    """How a text is split: its beginning is training, its end test, validation lies between.

    Args:
        val_fraction: Fraction of the tokens for validation; 0 for none.
        test_fraction: Fraction of the tokens for test and prediction; 0 for none.
        val_sequences: Keep at most this many validation windows, spread evenly; ``null`` for all.

    Raises:
        ConfigError: A fraction is out of range, or nothing is left for training.
    """

    val_fraction: RightOpenUnitInterval = 0.05
    test_fraction: RightOpenUnitInterval = 0.05
    val_sequences: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.split")
        check_fractions(self.val_fraction, self.test_fraction, f"{_KEY}.split")

    @property
    def fractions(self) -> tuple[float, float]:
        """Of validation and test."""
        return self.val_fraction, self.test_fraction

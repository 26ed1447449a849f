"""Parsing that the command lines of number probing share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fulgurite.errors import ConfigError

__all__ = ["OneLineParser", "parse_integers"]


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are the one line that all commands print."""

    def error(self, message: str) -> NoReturn:
        """Raise the parser's error as a ConfigError."""
        raise ConfigError(f"{self.prog}: {message}.", f"`{self.prog} --help` lists the options.")


def parse_integers(text: str, option: str) -> list[int]:
    """Parse whole numbers between commas.

    Raises:
        ConfigError: The text is no list of whole numbers.

    Example:
        >>> parse_integers("2,5,10", "--periods")
        [2, 5, 10]
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} {text} is no list of whole numbers.", f"Write e.g. {option} 2,5,10."
        ) from None

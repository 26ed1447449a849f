"""What the command lines of number probing share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fulgurite.errors import ConfigError

__all__ = ["OneLineParser", "integers"]


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are the one line that all commands print."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line."""
        raise ConfigError(f"{self.prog}: {message}.", f"`{self.prog} --help` lists the options.")


def integers(text: str, option: str) -> list[int]:
    """Whole numbers between commas.

    Raises:
        ConfigError: It is something else.

    Example:
        >>> integers("2,5,10", "--periods")
        [2, 5, 10]
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} {text} is no list of whole numbers.", f"Write e.g. {option} 2,5,10."
        ) from None

"""Arithmetic of whole numbers that Python does not name."""

from __future__ import annotations

__all__ = ["ceil_div"]


def ceil_div(numerator: int, denominator: int) -> int:
    """Return the quotient, rounded up.

    Example:
        >>> ceil_div(7, 3), ceil_div(6, 3)
        (3, 2)
    """
    return -(-numerator // denominator)

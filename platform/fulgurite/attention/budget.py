"""How much memory attention may hold: budgets as users write them, in bytes."""

from __future__ import annotations

import re

import numpy as np
import torch

from fulgurite.attention.device_memory import device_memory
from fulgurite.errors import ConfigError

__all__ = ["Budget", "format_bytes", "parse_budget"]

Budget = int | float | str | None

_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", re.IGNORECASE)


def parse_budget(budget: Budget, device: torch.device) -> int | None:
    """Return a budget in bytes, or None for no limit.

    Args:
        budget: Bytes, a size such as ``"2GiB"`` (binary units, with or without the i), a fraction
            of the device's memory in (0, 1], ``"auto"`` for what is free on it, or None.
        device: Where attention is computed.

    Raises:
        ConfigError: The budget is none of these, or not positive.

    Example:
        >>> parse_budget("1.5 GiB", torch.device("cpu")), parse_budget(4096, torch.device("cpu"))
        (1610612736, 4096)
    """
    if budget is None:
        return None
    if budget == "auto":
        free = device_memory(device)[0]
        # in steps of a sixteenth, so that plans are the same while little changes
        step = max(1, 1 << max(0, free.bit_length() - 5))
        return free // step * step
    try:
        if isinstance(budget, str) and (match := _SIZE.fullmatch(budget)):
            number, unit = float(match[1]), match[2].lower()
            is_size = bool(unit) or budget.strip().lower().endswith("b") or budget.isdigit()
        else:
            is_size = isinstance(budget, int | np.integer)
            number, unit = float(budget), ""
        if isinstance(budget, bool) or not 0 < number < float("inf"):
            raise ValueError
        size = int(number * (_UNITS[unit] if is_size else 1))
    except (ValueError, TypeError, OverflowError):
        # Python spells no number of more than 4,300 digits
        huge = isinstance(budget, int) and budget.bit_length() > 256
        label = f"2**{int(budget).bit_length()} bytes" if huge else repr(budget)[:80]
        raise ConfigError(
            f"A memory budget of {label} cannot be read.",
            'Give bytes, a size such as "2GiB", a fraction of the device in (0, 1], or "auto".',
        ) from None
    if not is_size and number <= 1:
        return int(number * device_memory(device)[1])
    return size


def format_bytes(number: float) -> str:
    """A size in binary units.

    Example:
        >>> format_bytes(3 * 2**30), format_bytes(100)
        ('3 GiB', '100 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"
        number /= 1024
    raise AssertionError

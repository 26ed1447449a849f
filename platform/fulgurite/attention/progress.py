"""A bar for calls that take long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["LONG", "bar", "byte_bar"]

#: Predicted seconds from which a call within a model shows a bar.
LONG = 20.0


@contextmanager
def bar(
    label: str, total: int, *, done: int = 0, show: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show rows done, tokens per second and the time left; give what moves it by a row.

    Args:
        label: What runs.
        total: Rows.
        done: Rows that were done before.
        show: Whether there is a bar at all.

    Example:
        >>> with bar("attention", 2, show=False) as advance:
        ...     advance(100)
    """
    if not show:
        yield lambda tokens: None
        return
    from tqdm.auto import tqdm

    passed, begun = 0, time.monotonic()
    with tqdm(total=total, initial=done, unit=" rows", desc=label, leave=False) as progress_bar:

        def advance(tokens: int) -> None:
            nonlocal passed
            passed += tokens
            speed = passed / max(time.monotonic() - begun, 1e-9)
            progress_bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
            progress_bar.update()

        yield advance


@contextmanager
def byte_bar(label: str, total: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Show bytes done, bytes per second and the time left; give what moves it by bytes.

    Args:
        label: What runs.
        total: Bytes.
        show: Whether there is a bar at all.

    Example:
        >>> with byte_bar("reading", 10, show=False) as advance:
        ...     advance(10)
    """
    if not show:
        yield lambda size: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=label, leave=False) as progress_bar:
        yield lambda size: (progress_bar.update(size), None)[1]

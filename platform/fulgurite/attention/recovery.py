"""What goes on in smaller tiles where a device runs out of memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch

from fulgurite.attention.execution_plan import ExecutionPlan, Halvings

__all__ = ["ran_out_of_memory", "with_smaller_tiles"]


class _Numbered(Protocol):
    @property
    def number(self) -> int: ...


_U = TypeVar("_U", bound=_Numbered)


def with_smaller_tiles(
    compute: Callable[[int, Halvings], Iterator[_U]], plan: ExecutionPlan
) -> Iterator[_U]:
    """Go on with smaller tiles where the device runs out of memory; no unit is given twice.

    Args:
        compute: Gives what comes after the unit of a number, with tiles halved so often.
        plan: What is computed.
    """
    after, halvings = -1, Halvings()
    while True:
        try:
            for unit in compute(after, halvings):
                number = unit.number
                yield unit
                del unit
                after = number
            return
        except RuntimeError as error:
            smaller = plan.smaller_tiles(halvings) if ran_out_of_memory(error) else None
            if smaller is None:
                raise
        halvings = smaller
        parts = [f"1/{1 << n} of the {name}" for name, n in halvings._asdict().items() if n]
        warnings.warn(
            f"Attention ran out of memory; going on with {plan.schedule}, at once "
            f"{' and '.join(parts)}.",
            stacklevel=2,
        )


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; only those of a GPU's memory have a type of their own."""
    messages = ("DefaultCPUAllocator", "CUDA error: out of memory")  # the second: of pinned memory
    return isinstance(error, torch.OutOfMemoryError) or any(x in str(error) for x in messages)

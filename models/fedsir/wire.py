"""What of a record is sent between clients and server, and its size."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["count_payload", "on_wire"]


def on_wire(dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Metadata of a dataclass's field that is a tensor which is sent.

    Args:
        dtype: Type of its numbers on the wire; by default that of the tensor.

    Example:
        >>> on_wire(torch.float32)
        {'wire': torch.float32}
    """
    return {"wire": dtype}


def count_payload(record: Any) -> int:
    """Size of the tensors of a record that are sent, those of records inside it too [bytes].

    Args:
        record: A dataclass, such as a message.

    Example:
        >>> from fulgurite.models.fedsir.federation import TrainReply
        >>> count_payload(TrainReply(model=torch.zeros(10)))
        40
    """
    total = 0
    for entry in fields(record):
        value = getattr(record, entry.name)
        if is_dataclass(value):
            total += count_payload(value)
        elif isinstance(value, Tensor) and "wire" in entry.metadata:
            total += value.numel() * (entry.metadata["wire"] or value.dtype).itemsize
    return total

"""Questions and answers as Flower's records.

A message of Flower has three records: ``envelope``, what the two sides tell each other beside the
method; ``message``, the class and the scalars of a request or reply; ``tensors``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fulgurite.errors import DataError
from fulgurite.models.fedsir.flower.records import FlatRecord, Scalar

__all__ = ["hash_model", "pack", "unpack"]

_CLASS = "class"


def hash_model(model: Tensor) -> str:
    """A name of a model that depends on each of its bits. Shape: (P,).

    Example:
        >>> hash_model(torch.zeros(2)) == hash_model(torch.zeros(3))
        False
    """
    return hashlib.blake2b(model.cpu().numpy().tobytes(), digest_size=16).hexdigest()


def pack(
    envelope: Mapping[str, Scalar], kind: str = "", flat: FlatRecord | None = None
) -> RecordDict:
    """Make the content of a message.

    Args:
        envelope: What the two sides tell each other beside the method.
        kind: Name of the message's class; empty where there is no message.
        flat: Its fields.
    """
    flat = flat or FlatRecord()
    arrays = {name: Array(tensor.numpy()) for name, tensor in flat.tensors.items()}
    return RecordDict(
        {
            "envelope": ConfigRecord(dict(envelope)),
            "message": ConfigRecord({**flat.scalars, _CLASS: kind}),
            "tensors": ArrayRecord(arrays),
        }
    )


def unpack(content: RecordDict) -> tuple[dict[str, Any], str, FlatRecord]:
    """Read the content of a message: its envelope, its class and its fields.

    Raises:
        DataError: It is no message of a federation of fulgurite.
    """
    try:
        envelope = dict(content.config_records["envelope"])
        scalars = dict(content.config_records["message"])
        arrays = dict(content.array_records["tensors"])
        kind = str(scalars.pop(_CLASS))
    except KeyError as error:
        raise DataError(
            f"A message without the record {error} came in.",
            "Give all nodes the same app and the same version of fulgurite.",
        ) from error
    # copies, since arrays of received bytes cannot be written to
    tensors = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
    return envelope, kind, FlatRecord(scalars, tensors)  # type: ignore[arg-type]

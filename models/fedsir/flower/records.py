"""Messages as scalars and tensors by name, which Flower carries; nothing is ever unpickled.

A field of a message is a tensor, a number, a word, None, or a record of such fields.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar

from torch import Tensor

from fulgurite.errors import DataError
from fulgurite.models.fedsir.federation import Reply, Request

__all__ = ["FlatRecord", "Scalar", "flatten_message", "message_class", "restore_message"]

Scalar = int | float | bool | str
Message = TypeVar("Message", Request, Reply)


@dataclass(frozen=True)
class FlatRecord:
    """A record by the dotted names of its fields.

    Attributes:
        scalars: Numbers and words.
        tensors: Tensors on the CPU.
    """

    scalars: dict[str, Scalar] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def class_name(kind: type) -> str:
    """The name of a class on the wire."""
    return f"{kind.__module__}.{kind.__qualname__}"


def message_class(name: str, base: type[Message]) -> type[Message]:
    """Find a class of messages that this process knows.

    Args:
        name: Its module and name.
        base: :class:`Request` or :class:`Reply`.

    Raises:
        DataError: There is none of that name, so that other code than the method's is never run.
    """
    pending: list[type[Message]] = [base]
    while pending:
        kind = pending.pop()
        if class_name(kind) == name:
            return kind
        pending.extend(kind.__subclasses__())
    raise DataError(
        f"The message is a {name}, which is no {base.__name__} of this federation's method.",
        "Give all nodes the same app and the same version of fulgurite.",
    )


def flatten_message(record: Any, *, without: frozenset[str] = frozenset()) -> FlatRecord:
    """List the fields of a record, and of records in it.

    Args:
        record: A dataclass.
        without: Fields that are left out.

    Raises:
        TypeError: A field is of a type that no message may have.

    Example:
        >>> import torch
        >>> from fulgurite.models.fedsir.federation import TrainRequest
        >>> flat = flatten_message(TrainRequest(model=torch.zeros(2), epochs=1, round=3))
        >>> flat.scalars, list(flat.tensors)
        ({'epochs': 1, 'round': 3}, ['model'])
    """
    flat = FlatRecord()
    for entry in fields(record):
        value = getattr(record, entry.name)
        if entry.name in without or value is None:
            continue
        if is_dataclass(value):
            nested = flatten_message(value)
            flat.scalars.update({f"{entry.name}.{k}": v for k, v in nested.scalars.items()})
            flat.tensors.update({f"{entry.name}.{k}": v for k, v in nested.tensors.items()})
        elif isinstance(value, Tensor):
            flat.tensors[entry.name] = value.detach().cpu()
        elif isinstance(value, int | float | str):
            flat.scalars[entry.name] = value
        else:
            raise TypeError(
                f"{type(record).__name__}.{entry.name} is a {type(value).__name__}, which no "
                "message may hold."
            )
    return flat


def restore_message(kind: type[Any], flat: FlatRecord) -> Any:
    """Make a record of its fields.

    Args:
        kind: Its class.
        flat: The fields by name; one that may be None may be absent.

    Raises:
        DataError: A field is missing or unknown, or of the wrong type.

    Example:
        >>> import torch
        >>> from fulgurite.models.fedsir.federation import TrainReply
        >>> restore_message(TrainReply, FlatRecord({}, {"model": torch.zeros(2)})).model
        tensor([0., 0.])
    """
    hints = typing.get_type_hints(kind)
    names = [entry.name for entry in fields(kind)]
    unknown = {key.partition(".")[0] for key in (*flat.scalars, *flat.tensors)} - set(names)
    if unknown:
        raise _misfit(kind, f"has an unknown field {sorted(unknown)[0]!r}")
    return kind(**{name: _restore_field(kind, name, hints[name], flat) for name in names})


def _restore_field(kind: type[Any], name: str, hint: Any, flat: FlatRecord) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    nested = next((k for k in kinds if is_dataclass(k)), None)
    if nested is not None:
        part = FlatRecord(_strip(name, flat.scalars), _strip(name, flat.tensors))
        return restore_message(nested, part)  # type: ignore[arg-type]
    value = flat.tensors.get(name, flat.scalars.get(name))
    if value is None and NoneType in kinds:
        return None
    if value is None:
        raise _misfit(kind, f"lacks the field {name!r}")
    if not any(_fits(value, k) for k in kinds):
        raise _misfit(kind, f"has a {type(value).__name__} as {name!r}")
    return value


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool) or kind is bool:  # a bool is an int to Python
        return kind is bool and isinstance(value, bool)
    return isinstance(value, kind)


def _strip(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{name}."
    return {k[len(prefix) :]: v for k, v in values.items() if k.startswith(prefix)}


def _misfit(kind: type[Any], fault: str) -> DataError:
    return DataError(
        f"A {kind.__name__} {fault}.",
        "Give all nodes the same app and the same version of fulgurite.",
    )

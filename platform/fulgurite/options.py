"""Options as records: frozen dataclasses whose annotations say what a value may be.

The command line nests them (``--data.evaluation.queries=8``), checks their values against the
restricted types below and shows those in ``--help``; a record checks itself by the same
annotations when Python makes it::

    @dataclass(frozen=True)
    class EvaluationOptions:
        queries: PositiveInt = 64

        def __post_init__(self) -> None:
            check_options(self, "data.init_args.evaluation")

Restricted types are those of jsonargparse. The values are plain ``int`` and ``float``, so that
records are written as YAML, and checkpoints are read with ``weights_only=True``.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import typing as restricted
from jsonargparse.typing import register_type

from fulgurite.errors import ConfigError

__all__ = [
    "ClosedUnitInterval",
    "IntAboveOne",
    "LeftOpenUnitInterval",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenUnitInterval",
    "PositiveFloat",
    "PositiveInt",
    "RightOpenUnitInterval",
    "check_arguments",
    "check_options",
    "list_options",
    "make_options",
    "restrict_number",
]

Record = TypeVar("Record")
Comparison = tuple[Literal[">", ">=", "<", "<=", "!="], float]


def restrict_number(name: str, base: type, *comparisons: Comparison) -> Any:
    """Return a type of numbers in a range, for annotations; its values are plain numbers.

    For mypy, annotations must name the plain type; in this order, since the parser of the command
    line executes blocks of ``if TYPE_CHECKING:``, and would know nothing of the range::

        if not TYPE_CHECKING:
            Percentage = restrict_number("Percentage", float, (">=", 0), ("<=", 100))
        else:
            Percentage = float

    Args:
        name: What ``--help`` and errors call it.
        base: ``int`` or ``float``.
        *comparisons: What holds for each value, such as ``(">", 0)``; all of them.

    Example:
        >>> restrict_number("Percentage", float, (">=", 0), ("<=", 100)).__name__
        'Percentage'
    """
    kind = restricted.restricted_number_type(name, base, list(comparisons))
    # else the values would be of a class of jsonargparse's, which no safe unpickler knows
    register_type(kind, base, lambda value: base(kind(value)), type_check=lambda *_: False)
    return kind


if TYPE_CHECKING:
    # each by itself: mypy takes a chain of assignments for variables, not for names of types
    PositiveInt = int
    NonNegativeInt = int
    IntAboveOne = int
    PositiveFloat = float
    NonNegativeFloat = float
    ClosedUnitInterval = float
    OpenUnitInterval = float
    LeftOpenUnitInterval = float
    RightOpenUnitInterval = float
else:
    PositiveInt = restrict_number("PositiveInt", int, (">", 0))
    NonNegativeInt = restrict_number("NonNegativeInt", int, (">=", 0))
    IntAboveOne = restrict_number("IntAboveOne", int, (">", 1))
    PositiveFloat = restrict_number("PositiveFloat", float, (">", 0))
    NonNegativeFloat = restrict_number("NonNegativeFloat", float, (">=", 0))
    ClosedUnitInterval = restrict_number("ClosedUnitInterval", float, (">=", 0), ("<=", 1))
    OpenUnitInterval = restrict_number("OpenUnitInterval", float, (">", 0), ("<", 1))
    LeftOpenUnitInterval = restrict_number("LeftOpenUnitInterval", float, (">", 0), ("<=", 1))
    RightOpenUnitInterval = restrict_number("RightOpenUnitInterval", float, (">=", 0), ("<", 1))


def check_options(record: Any, option: str) -> None:
    """Refuse values that the annotations of a frozen dataclass do not allow: its `__post_init__`.

    Numbers become plain ones (also those of numpy), and mappings become the records that they
    describe.

    Args:
        record: The dataclass.
        option: Where the command line has it, such as ``data.init_args.evaluation``.

    Raises:
        ConfigError: A value is of another type, out of range, or none of the words.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Crop:
        ...     size: PositiveInt = 32
        ...     def __post_init__(self) -> None:
        ...         check_options(self, "data.init_args.crop")
        >>> Crop(8)
        Crop(size=8)
        >>> Crop(0)
        Traceback (most recent call last):
        ...
        fulgurite.errors.ConfigError: The size of crop is 0. Set `--data.init_args.crop.size` to \
an int > 0.
    """
    kind: Any = type(record)
    hints = _read_hints(kind)
    for field in dataclasses.fields(record):
        checked = _check(hints[field.name], getattr(record, field.name), f"{option}.{field.name}")
        object.__setattr__(record, field.name, checked)


def check_arguments(
    constructor: Callable[..., Any], values: Mapping[str, Any], option: str
) -> dict[str, Any]:
    """Refuse arguments that the annotations of a constructor do not allow.

    Args:
        constructor: The function whose annotations say what the values may be.
        values: Values by the name of the argument; other names are ignored, so that ``locals()``
            at the start of the constructor will do.
        option: Where the command line has them, such as ``data.init_args``.

    Returns:
        The values of the arguments, numbers as plain ones.

    Raises:
        ConfigError: A value is of another type, out of range, or none of the words.

    Example:
        >>> def load(workers: NonNegativeInt = 0) -> None: ...
        >>> check_arguments(load, {"workers": 2}, "data.init_args")
        {'workers': 2}
    """
    return {
        name: _check(hint, values[name], f"{option}.{name}")
        for name, hint in _read_hints(constructor).items()
        if name in values
    }


def make_options(kind: type[Record], values: Record | Mapping[str, Any]) -> Record:
    """Return a record as it is, or the one that a mapping describes, as checkpoints hold them.

    Raises:
        ConfigError: The mapping has a name that is no option of the record.
    """
    if not isinstance(values, Mapping):
        return values
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(names)):
        raise ConfigError(
            f"{kind.__name__} has no option {unknown[0]!r}.", f"It has: {', '.join(names)}."
        )
    return kind(**values)


def list_options(record: Any) -> dict[str, Any]:
    """Return the options of a record as plain values, as checkpoints and YAML files hold them.

    Records inside it become mappings; other values stay what they are.
    """
    return {
        field.name: _to_plain(getattr(record, field.name)) for field in dataclasses.fields(record)
    }


def _to_plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_to_plain(part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return list_options(value)
    return value


@cache
def _read_hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner)


class _Mismatch(Exception):
    """A value does not fit its annotation; the message says what would."""


def _check(hint: Any, value: Any, option: str) -> Any:
    """Return the value as its annotation has it, or raise the error that names the option."""
    try:
        return _convert(hint, value)
    except _Mismatch as mismatch:
        owner, name = option.split(".")[-2:]
        inside = "" if owner == "init_args" else f" of {owner}"
        raise ConfigError(
            f"The {name}{inside} is {value!r}.", f"Set `--{option}` to {mismatch}."
        ) from None


def _convert(hint: Any, value: Any) -> Any:
    """Return the value with plain numbers, and raise :class:`_Mismatch` if it does not fit.

    Annotations that describe no option (classes, callables) are not looked at.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_alternative(arguments, value)
    if origin is Literal:
        if any(value == word and type(value) is type(word) for word in arguments):
            return value
        raise _Mismatch("one of " + ", ".join(_name_value(word) for word in arguments))
    if origin is list:
        return _convert_list(arguments[0], value)
    if origin is tuple:
        return _convert_tuple(arguments, value)
    if hint in (int, float) or hasattr(hint, "_restrictions"):
        return _convert_number(hint, value)
    if hint in (bool, str):
        if isinstance(value, hint):
            return value
        raise _Mismatch("true or false" if hint is bool else "a text")
    if hint is type(None):
        if value is None:
            return None
        raise _Mismatch("null")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _convert_record(hint, value)
    return value


def _convert_alternative(hints: Sequence[Any], value: Any) -> Any:
    reasons = []
    for hint in hints:
        try:
            return _convert(hint, value)
        except _Mismatch as mismatch:
            reasons.append(str(mismatch))
    raise _Mismatch(" or ".join(dict.fromkeys(reasons)))


def _convert_list(hint: Any, value: Any) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _Mismatch("a list")
    try:
        return [_convert(hint, part) for part in value]
    except _Mismatch as mismatch:
        raise _Mismatch(f"a list, each value {mismatch}") from None


def _convert_tuple(hints: Sequence[Any], value: Any) -> tuple[Any, ...]:
    parts = _convert_list(Any, value)
    if len(hints) == 2 and hints[1] is Ellipsis:
        return tuple(_convert_list(hints[0], parts))
    if len(parts) != len(hints):
        raise _Mismatch(f"a list of {len(hints)} values")
    return tuple(_convert(hint, part) for hint, part in zip(hints, parts, strict=True))


def _convert_number(hint: Any, value: Any) -> int | float:
    base: type = getattr(hint, "_type", hint)
    article = "an int" if base is int else "a float"
    kind = numbers.Integral if base is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise _Mismatch(article)
    number: int | float = base(value)
    if expression := getattr(hint, "_expression", ""):
        try:
            hint(number)
        except ValueError:
            comparisons = re.sub(r"v([<>!=]+)", r"\1 ", expression)
            raise _Mismatch(f"{article} {comparisons}") from None
    return number


def _convert_record(kind: type, value: Any) -> Any:
    if isinstance(value, kind | Mapping):
        return make_options(kind, value)
    raise _Mismatch(f"the options of a {kind.__name__}")


def _name_value(value: Any) -> str:
    return "null" if value is None else str(value)

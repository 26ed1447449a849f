"""Sections of a comparison file: mappings of YAML that become frozen dataclasses.

A section is a dataclass. Its field names are the keys that the file may have, jsonargparse holds
each value against the field's annotation, and what has a short form in the file names its own
reader in the field's metadata.
"""

from __future__ import annotations

import copy
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import NonNegativeInt

from fulgurite.errors import ConfigError, near_miss

__all__ = [
    "Axes",
    "Overrides",
    "check_keys",
    "check_mapping",
    "read_axes",
    "read_axis",
    "read_count",
    "read_field",
    "read_name",
    "read_overrides",
    "read_section",
    "read_seeds",
    "reader",
    "section_keys",
    "select",
    "spell",
]

_T = TypeVar("_T")

Overrides = dict[str, Any]
"""Dotted command-line keys and their values."""

Axes = dict[str, dict[str, Overrides]]
"""For each axis its labels, for each label its overrides."""

Reader = Callable[[Any, str], Any]
"""Takes a value and the keys that lead to it; returns the field's value or raises ConfigError."""

_NAME = re.compile(r"[\w.+-]+")
_OPTION = re.compile(r"[A-Za-z_][\w.+]*")


def reader(function: Reader) -> dict[str, Reader]:
    """Metadata of a field that has a reader of its own."""
    return {"reader": function}


def read_section(
    section: type[Any], values: Mapping[str, Any], key_path: str = "", *, file: str = ""
) -> dict[str, Any]:
    """The fields of a section that a mapping gives, checked.

    Args:
        section: Dataclass of the section.
        values: What the file has there.
        key_path: The keys that lead there; empty at the top of the file.
        file: Name of the file, for the top.

    Raises:
        ConfigError: A key is unknown, or a value is none of its field.
    """
    check_keys(values, section_keys(section), key_path or file)
    return {key: read_field(section, key, value, key_path) for key, value in values.items()}


def section_keys(section: type[Any]) -> list[str]:
    """The keys that a section of the file may have."""
    return [field.name for field in fields(section) if field.metadata.get("key", True)]


def read_field(section: type[Any], key: str, value: object, key_path: str = "") -> Any:
    """The value of one field of a section.

    Args:
        section: Dataclass of the section.
        key: Name of the field.
        value: What the file says.
        key_path: The keys that lead to the section; empty for the top of the file.

    Raises:
        ConfigError: The value is none of the field.
    """
    field = next(field for field in fields(section) if field.name == key)
    here = f"{key_path}.{key}" if key_path else key
    if not value and (empty := _empty_default(field)) is not None:
        return empty
    if own := field.metadata.get("reader"):
        return own(value, here)
    annotation = get_type_hints(section)[key]
    if str in _alternatives(annotation) and isinstance(value, int | float):
        value = value if isinstance(value, bool) else str(value)  # such as `title: 2024`
    return _check_type(value, annotation, here)


def _empty_default(field: Field[Any]) -> Any:
    """The default of a field that may be left empty; None where it may not."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return default if default == () or default == {} else None


def _check_type(value: Any, annotation: Any, key_path: str) -> Any:
    """A value that jsonargparse takes for one of the annotated type, and leaves as it is.

    Raises:
        ConfigError: jsonargparse refuses or changes the value.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        items = check_mapping(value, key_path).items()
        return {str(k): _check_type(v, arguments[1], f"{key_path}.{k}") for k, v in items}
    if _fits(value, annotation):
        return tuple(value) if origin is tuple else value
    if origin is tuple:
        raise ConfigError(
            f"{key_path} is not a list of names.", f"Write `{key_path}: [name, name]`."
        )
    raise ConfigError(f"{key_path} is {value!r}.", _describe(_alternatives(annotation), key_path))


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _describe(options: Sequence[Any], key_path: str) -> str:
    """What may stand where a value of one of some types is wanted."""
    if bool in options:
        return "Use true or false."
    literals = [
        "null" if value is None else str(value)
        for option in options
        for value in (get_args(option) if get_origin(option) is Literal else ())
    ]
    if literals:
        literals += ["null"] if type(None) in options else []
        return f"Use {', '.join(literals[:-1])} or {literals[-1]}."
    return f"Write `{key_path}:` and a name."


@cache
def _parser(annotation: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    return parser


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is one of a type as it stands: no text that only reads like a number."""
    if value is None:  # which the parser takes for a value that is not there
        return type(None) in _alternatives(annotation)
    try:
        # a copy, since what is parsed is replaced in place
        parsed = _parser(annotation).parse_object({"value": copy.deepcopy(value)}).value
    except (ArgumentError, TypeError):
        return False
    written = json.dumps(value, default=str)
    return json.dumps(parsed, default=str) == written


def read_seeds(value: object, key_path: str) -> tuple[int, ...]:
    """Different seeds, at least one.

    Raises:
        ConfigError: The value is no list of different integers from 0 on.
    """
    if not (isinstance(value, list) and value and _fits(value, list[NonNegativeInt])) or len(
        set(value)
    ) < len(value):
        raise ConfigError(
            f"{key_path} is {value!r}.", "Give a list of different integers, e.g. [0, 1, 2]."
        )
    return tuple(value)


def read_count(value: object, key_path: str) -> int:
    """A number of things.

    Raises:
        ConfigError: The value is no integer from 0 on.
    """
    if not isinstance(value, int) or not _fits(value, NonNegativeInt):
        raise ConfigError(f"{key_path} is {value!r}.", "Give a whole number, e.g. 1.")
    return value


def read_axes(value: object, key_path: str) -> Axes:
    """Axes by name, each in one of the forms that :func:`read_axis` takes.

    Raises:
        ConfigError: A name cannot stand in a file name, or an axis is wrong.
    """
    return {
        read_name(axis, key_path): read_axis(labels, f"{key_path}.{axis}")
        for axis, labels in check_mapping(value or {}, key_path).items()
    }


def read_axis(value: object, key_path: str) -> dict[str, Overrides]:
    """The labels of an axis with their overrides, from ``{key, values}`` or written out.

    Raises:
        ConfigError: The axis is written in neither way, or has no label.
    """
    mapping = check_mapping(value, key_path)
    if set(mapping) == {"key", "values"}:
        values = mapping["values"]
        if not isinstance(values, list) or any(isinstance(v, dict | list) for v in values):
            raise ConfigError(
                f"{key_path}.values is not a list of plain values.",
                f"Use `{key_path}: {{LABEL: {{dotted.key: value}}}}` for anything else.",
            )
        pairs = [(spell(value), {str(mapping["key"]): value}) for value in values]
    else:
        pairs = [
            (spell(label), read_overrides(overrides, f"{key_path}.{spell(label)}"))
            for label, overrides in mapping.items()
        ]
    labels = dict(pairs)
    if len(labels) < len(pairs):  # such as 1 and "1"
        twice = next(label for label in labels if [name for name, _ in pairs].count(label) > 1)
        raise ConfigError(f"{key_path} has the label {twice!r} twice.", "Drop or rename one.")
    if not labels:
        raise ConfigError(f"{key_path} has no values.", "Give one at least, or leave the axis out.")
    return labels


def read_overrides(value: object, key_path: str) -> Overrides:
    """Dotted command-line keys with any values.

    Raises:
        ConfigError: It is no mapping, or a key is no command-line key.
    """
    overrides = check_mapping(value or {}, key_path)
    for key in overrides:
        if not isinstance(key, str) or not _OPTION.fullmatch(key):
            raise ConfigError(
                f"{key_path} has the key {key!r}, which is not a dotted command-line key.",
                "Write it as in `model.init_args.lr: 0.1`, without dashes.",
            )
    return overrides


def read_name(value: object, key_path: str) -> str:
    """A name that may stand in a file name.

    Raises:
        ConfigError: The name has characters that a file name should not have.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ConfigError(
            f"{key_path} has the name {value!r}.", "Use letters, digits, '_', '.', '+' and '-'."
        )
    return value


def check_mapping(value: object, key_path: str) -> dict[str, Any]:
    """A copy of a mapping.

    Raises:
        ConfigError: The value is no mapping.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{key_path} is not a mapping.", "Write it as `key: value` lines.")
    return dict(value)


def check_keys(keys: Iterable[str], allowed: Sequence[str], key_path: str) -> None:
    """Refuse a key that a section does not have.

    Raises:
        ConfigError: There is one.
    """
    for key in keys:
        if key not in allowed:
            raise ConfigError(
                f"{key_path} has the unknown key {key!r}.",
                near_miss(key, allowed) or f"Known are {', '.join(allowed)}.",
            )


def select(choices: Mapping[str, _T], name: object, key_path: str) -> _T:
    """The choice of a name.

    Raises:
        ConfigError: There is none.
    """
    if not isinstance(name, str) or name not in choices:
        known = f"Known are {', '.join(choices)}."
        raise ConfigError(f"{key_path} names {name!r}.", near_miss(name, choices) or known)
    return choices[name]


def spell(value: object) -> str:
    """A value as the command line spells it.

    >>> spell(0.5), spell(None), spell(True), spell("iid"), spell([1, 2])
    ('0.5', 'null', 'true', 'iid', '[1, 2]')
    """
    return value if isinstance(value, str) else json.dumps(value)

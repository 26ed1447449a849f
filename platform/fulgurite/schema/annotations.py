"""Annotations of Python as JSON schemas, in the meaning that the command line gives them."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import inspect
import operator
import os
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from docstring_parser.google import parse as parse_docstring

from fulgurite.schema.classes import find_class, list_subclasses

__all__ = ["SchemaBuilder"]

Schema = dict[str, Any]

_PLAIN: dict[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    type(None): {"type": "null"},
    datetime.timedelta: {"type": "string"},
}
_LIMITS = {
    operator.gt: "exclusiveMinimum",
    operator.ge: "minimum",
    operator.lt: "exclusiveMaximum",
    operator.le: "maximum",
}


class SchemaBuilder:
    """Schemas of annotations, with one definition for each class that they lead to.

    Attributes:
        definitions: Schemas of the arguments of classes, by the classes' full names.
    """

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def describe(self, annotation: Any) -> Schema:
        """Return the schema of the values that an option of this annotation takes.

        What is not understood takes any value, so that no valid file is underlined.
        """
        if annotation is Any:
            return {}
        if annotation in _PLAIN:
            return dict(_PLAIN[annotation])
        if hasattr(annotation, "_restrictions"):
            return _describe_number(annotation)
        if isinstance(annotation, TypeVar):
            return self.describe(annotation.__bound__) if annotation.__bound__ else {}
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin in (Union, types.UnionType):
            return _join([self.describe(argument) for argument in arguments])
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin is type:
            return self._describe_class_name(arguments[0])
        if origin is Callable:
            return self._describe_callable(arguments)
        if inspect.isclass(origin or annotation):
            return self._describe_container(origin or annotation, arguments)
        return {}

    def _describe_container(self, kind: type, arguments: Sequence[Any]) -> Schema:
        """A mapping, a list, an enum, a path, a record, or an object of a class."""
        if issubclass(kind, Mapping):
            values = self.describe(arguments[1]) if len(arguments) == 2 else {}
            return {"type": "object", "additionalProperties": values or True}
        if issubclass(kind, tuple) and arguments and arguments[-1] is not Ellipsis:
            items = [self.describe(argument) for argument in arguments]
            size = len(items)
            return {"type": "array", "prefixItems": items, "minItems": size, "maxItems": size}
        if kind in (list, tuple, set, frozenset, Sequence, Iterable, Iterator, Collection):
            return {
                "type": "array",
                **({"items": self.describe(arguments[0])} if arguments else {}),
            }
        if issubclass(kind, enum.Enum):
            return {"enum": [member.name for member in kind]}
        if issubclass(kind, Path | os.PathLike):
            return {"type": "string"}
        if dataclasses.is_dataclass(kind):  # its fields, or a class path as of any class
            fields = self.refer(kind, f"{kind.__module__}.{kind.__qualname__}")
            return _join([fields, self.describe_object(kind)])
        return self.describe_object(kind)

    def describe_object(self, base: type) -> Schema:
        """Return the schema of an object of a class: ``class_path`` and ``init_args``.

        A class that is not public here may stand for it too, with arguments that are not checked.
        """
        names = [] if base is object else list_subclasses(base)
        cases = [
            {
                "if": {"properties": {"class_path": {"const": name}}, "required": ["class_path"]},
                "then": {"properties": {"init_args": self._refer_to_name(name)}},
            }
            for name in names
        ]
        path: Schema = {"type": "string"}
        if names:
            path = {"anyOf": [{"enum": names}, {"type": "string"}]}
        record: Schema = {
            "type": "object",
            "properties": {"class_path": path, "init_args": {"type": "object"}, "dict_kwargs": {}},
            "additionalProperties": False,
        }
        if cases:
            record["allOf"] = cases
        return {"anyOf": [path, record]}

    def _describe_class_name(self, base: Any) -> Schema:
        names: list[str] = list_subclasses(base) if isinstance(base, type) else []
        return {"anyOf": [{"enum": names}, {"type": "string"}]} if names else {"type": "string"}

    def _describe_callable(self, arguments: Sequence[Any]) -> Schema:
        """The name of a function, or the class of what it makes with its other arguments."""
        result = arguments[-1] if arguments else None
        if inspect.isclass(result) and result.__module__ != "builtins":
            return self.describe_object(result)
        return _join([{"type": "string"}, self.describe_object(object)])

    def _refer_to_name(self, name: str) -> Schema:
        kind = find_class(name)
        return self.refer(kind, name) if kind else {}

    def refer(self, kind: type, name: str) -> Schema:
        """Return a reference to the schema of the arguments of a class."""
        if name not in self.definitions:
            self.definitions[name] = {}  # what refers to itself finds it
            self.definitions[name] = self.describe_arguments(kind)
        return {"$ref": f"#/$defs/{name}"}

    def describe_arguments(self, kind: type) -> Schema:
        """Return the schema of the arguments of a class, none of them required.

        Arguments of base classes count where the class takes them as ``**kwargs``.
        """
        schema: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
        if summary := _summarise(kind):
            schema["description"] = summary
        for owner in kind.__mro__:
            constructor = vars(owner).get("__init__")
            if constructor is None or owner is object:
                continue
            if not self._add_arguments(schema, owner, constructor):
                return schema
        return schema

    def _add_arguments(self, schema: Schema, owner: type, constructor: Any) -> bool:
        """Add the arguments of a constructor; returns whether it takes others' by ``**``."""
        hints = _read_hints(owner, constructor)
        descriptions = _describe_parameters(owner)
        takes_others = False
        try:
            parameters = inspect.signature(constructor).parameters
        except (TypeError, ValueError):  # of an extension written in C
            schema["additionalProperties"] = True
            return False
        for name, parameter in list(parameters.items())[1:]:
            if parameter.kind is parameter.VAR_KEYWORD:
                takes_others = True
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                option = self.describe(hints.get(name, Any))
                if text := descriptions.get(name):
                    option = {**option, "description": text}
                if _is_plain(parameter.default):
                    option = {**option, "default": parameter.default}
                schema["properties"].setdefault(name, option)
        return takes_others


def _describe_number(annotation: Any) -> Schema:
    schema = dict(_PLAIN[annotation._type])
    for comparison, limit in annotation._restrictions:
        if keyword := _LIMITS.get(comparison):
            schema[keyword] = limit
        elif comparison is operator.ne:
            schema["not"] = {"const": limit}
    return schema


def _join(schemas: Sequence[Schema]) -> Schema:
    """The schema of values that fit one of several; any value where one takes any."""
    flat: list[Schema] = []
    for schema in schemas:
        inner = schema["anyOf"] if set(schema) == {"anyOf"} else [schema]
        flat += [part for part in inner if part not in flat]
    if {} in flat:
        return {}
    return flat[0] if len(flat) == 1 else {"anyOf": flat}


def _read_hints(owner: type, constructor: Any) -> dict[str, Any]:
    """Annotations of a constructor; those that only type checkers can see are any."""
    raw = getattr(constructor, "__annotations__", {})
    try:
        return get_type_hints(constructor)
    except (NameError, AttributeError, TypeError):
        module = inspect.getmodule(owner)
        hints = {}
        for name, annotation in raw.items():
            try:
                one = types.SimpleNamespace(__annotations__={name: annotation})
                hints[name] = get_type_hints(one, vars(module) if module else None)[name]
            except (NameError, AttributeError, TypeError):
                hints[name] = Any
        return hints


def _summarise(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def _describe_parameters(owner: type) -> dict[str, str]:
    """Descriptions of arguments in the docstrings of a class and its constructor."""
    texts = [inspect.getdoc(owner) or "", getattr(vars(owner)["__init__"], "__doc__", "") or ""]
    return {
        parameter.arg_name: " ".join(parameter.description.split())
        for text in texts
        for parameter in parse_docstring(text).params
        if parameter.description
    }


def _is_plain(value: Any) -> bool:
    """Whether a default can be written as JSON as it stands."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)

"""Candidates for the last word of a command line."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from fulgurite.completion.options import RunCommand, read_options
from fulgurite.completion.scripts import SCRIPTS
from fulgurite.errors import FulguriteError
from fulgurite.systems import RESERVED_COMMANDS, RUN_COMMANDS, list_configs, resolve_config, systems

__all__ = ["list_candidates"]

Schema = Mapping[str, Any]


def list_candidates(line: str, run_command: RunCommand) -> list[str]:
    """Return the words that the last word of a command line may become.

    Args:
        line: The command line up to the cursor, with the name of the program.
        run_command: Prints the help of commands, for :func:`read_options`.

    Returns:
        Whole words, sorted; those that end with ``.`` or ``=`` go on. Empty where files are meant,
        or where nothing fits.

    Example:
        >>> list_candidates("fulgurite comp", run_command=lambda words: 0)
        ['compare', 'completion']
    """
    words = _split(line)
    if len(words) < 2:
        return []
    *before, word = words[1:]
    if not before:
        added = [command.name for system in systems().values() for command in system.commands]
        return _fitting([*RESERVED_COMMANDS, *added], word)
    words_of = _run_words if before[0] in RUN_COMMANDS else _other_words
    return _fitting(words_of(before, word, run_command), word)


def _split(line: str) -> list[str]:
    """The words of a line; the last one is empty after a space."""
    try:
        words = shlex.split(line)
    except ValueError:  # a quote that is still open
        words = line.split()
    return words if line and not line[-1].isspace() else [*words, ""]


def _fitting(candidates: Sequence[str], word: str) -> list[str]:
    return sorted({candidate for candidate in candidates if candidate.startswith(word)})


def _other_words(before: Sequence[str], word: str, run_command: RunCommand) -> list[str]:
    """Words of commands that train nothing themselves."""
    command = before[0]
    if word.startswith("-") or before[-1].startswith("-"):
        options: dict[str, list[str]] = read_options(run_command)["commands"].get(command, {})
        return [*options] if word.startswith("-") else options.get(before[-1], [])
    if command == "completion":
        return [*SCRIPTS]
    if len(before) == 1 and command in ("compare", "sweep"):
        return list_configs("comparison" if command == "compare" else "sweep")
    if before == ["federate"]:
        return ["app"]
    if before == ["federate", "app"]:
        return list_configs("run")
    return []


def _run_words(before: Sequence[str], word: str, run_command: RunCommand) -> list[str]:
    """Options and values of ``fit``, ``validate``, ``test`` and ``predict``."""
    if before[-1] in ("--config", "-c"):
        return list_configs("run")
    name, equals, _ = word.partition("=")
    if name == "--config" and equals:
        return [f"--config={path}" for path in list_configs("run")]
    is_value = not word.startswith("-")
    option = before[-1] if is_value else name
    if is_value and not option.startswith("--"):
        return []
    if option == "--ckpt_path" and (is_value or equals):
        values = ["last", "best"]
        return values if is_value else [f"{option}={value}" for value in values]
    schema = read_options(run_command)["schema"]
    if is_value:
        return _values(schema, before, option)
    if equals:
        return [f"{name}={value}" for value in _values(schema, before, name)]
    groups = ["--config=", "--print_config", "--help", "--debug"]
    return [*groups, *_options(schema, before, name)]


def _values(schema: Schema, before: Sequence[str], option: str) -> list[str]:
    """What an option may be: words, class paths, true and false."""
    parts = option.removeprefix("--").split(".")
    alternatives = _walk(schema, [schema], _read_values(before), parts)
    values: list[str] = []
    for alternative in alternatives:
        values += [_spell(value) for value in alternative.get("enum", [])]
        kind = alternative.get("type")
        values += ["true", "false"] * (kind == "boolean") + ["null"] * (kind == "null")
    return values


def _spell(value: object) -> str:
    return "null" if value is None else str(value)


def _options(schema: Schema, before: Sequence[str], prefix: str) -> Iterator[str]:
    """Options one level below the last dot of a prefix."""
    *parts, _ = prefix.removeprefix("--").split(".")
    values = _read_values(before)
    parents = _walk(schema, [schema], values, parts)
    stem = ".".join(["--" + parts[0], *parts[1:], ""]) if parts else "--"
    for parent in parents:
        for name in parent.get("properties", {}):
            inner = _walk(schema, [parent], _at(values, parts), [name])
            takes_value = [a for a in inner if "properties" not in a] or not inner
            if any(a.get("properties") for a in inner):
                yield f"{stem}{name}."
            if takes_value and name not in ("init_args", "dict_kwargs"):
                yield f"{stem}{name}="


def _walk(
    schema: Schema, nodes: Sequence[Schema], values: object, parts: Sequence[str]
) -> list[Schema]:
    """The alternatives at the end of a path through a schema, without references.

    Args:
        schema: The whole schema, to which references lead.
        nodes: Alternatives where the path begins.
        values: What is configured there; it says which class's ``init_args`` are meant.
        parts: Names on the path.
    """
    flat = [part for node in nodes for part in _alternatives(schema, node)]
    for name in parts:
        steps = [node["properties"][name] for node in flat if name in node.get("properties", {})]
        if name == "init_args":
            class_path = values.get("class_path") if isinstance(values, Mapping) else values
            steps = [
                case["then"]["properties"]["init_args"]
                for node in flat
                for case in node.get("allOf", [])
                if case["if"]["properties"]["class_path"]["const"] == class_path
            ]
        flat = [part for step in steps for part in _alternatives(schema, step)]
        values = _at(values, [name])
    return flat


def _alternatives(schema: Schema, node: Schema) -> Iterator[Schema]:
    """Follow references and unions to plain schemas."""
    if reference := node.get("$ref"):
        yield from _alternatives(schema, schema["$defs"][reference.removeprefix("#/$defs/")])
    elif "anyOf" in node:
        for part in node["anyOf"]:
            yield from _alternatives(schema, part)
    else:
        yield node


def _at(values: object, parts: Sequence[str]) -> object:
    for part in parts:
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _read_values(words: Sequence[str]) -> dict[str, Any]:
    """What configurations and options before the cursor say, as far as it names classes."""
    values: dict[str, Any] = {}
    pending = list(words[1:])
    while pending:
        word = pending.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or (not equals and not pending):
            continue
        value = value if equals else pending.pop(0)
        if name == "--config":
            with contextlib.suppress(FulguriteError, OSError, yaml.YAMLError):
                _merge(values, yaml.safe_load(resolve_config(value).read_text(encoding="utf-8")))
        else:
            content: Any = value
            for part in reversed(name.removeprefix("--").split(".")):
                content = {part: content}
            _merge(values, content)
    return values


def _merge(values: dict[str, Any], more: object) -> None:
    """Add mappings into mappings; a class named by its path alone keeps nothing of another."""
    if not isinstance(more, Mapping):
        return
    for key, value in more.items():
        old = values.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            _merge(old, value)
        elif isinstance(old, str) and isinstance(value, Mapping):
            values[key] = {"class_path": old}
            _merge(values[key], value)
        else:
            values[key] = {} if isinstance(value, Mapping) else value
            if isinstance(value, Mapping):
                _merge(values[key], value)

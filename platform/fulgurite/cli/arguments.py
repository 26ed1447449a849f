"""Words of a command line, made ready for the parser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from fulgurite.compare.yaml_file import check_text
from fulgurite.errors import ConfigError
from fulgurite.systems import check_kind, read_keys, resolve_config

__all__ = ["prepare_arguments"]

_load_yaml = get_loader("yaml")
_DEEPEST = 100  # levels; jsonargparse shows values by a recursion


def _load_bounded_yaml(text: str) -> Any:
    try:
        if any(sign in text for sign in ":?{&"):  # else it has neither keys nor aliases
            check_text(text)
        content = _load_yaml(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # such as an integer of ten thousand digits
        raise yaml.YAMLError(str(error)) from error
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        level = [child for value in level for child in _children(value)]
        if not level:
            return content
    raise yaml.YAMLError(f"it is nested deeper than {_DEEPEST} levels")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


# of configurations, files that they include, and values: jsonargparse writes all aliases out
set_loader("yaml", _load_bounded_yaml, (yaml.YAMLError,))


def _run_config(name: str) -> Path:
    """The file of a configuration of a run.

    Raises:
        ConfigError: There is no such configuration, or it describes a comparison or a sweep.
    """
    path = resolve_config(name)
    check_kind(name, read_keys(path), "run")
    _check_file(path)
    return path


def _check_file(path: Path) -> None:
    """Name the file that is no configuration; the parser's errors do not.

    Raises:
        ConfigError: The file is no YAML, gives a key twice, or holds no options.
    """
    try:
        root = check_text(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path} cannot be read{line}: {error.problem}.") from error
    except (OSError, RecursionError, UnicodeDecodeError, yaml.YAMLError):
        return  # which the parser names
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{path} holds no options.", "Write them as a mapping: `model:`, `data:`, `trainer:`."
        )


def prepare_arguments(argv: Sequence[str]) -> list[str]:
    """Replace packaged configuration names by their files, and nulls by what is parsed as such.

    Example:
        >>> prepare_arguments(["--data.init_args.source.init_args.test=null", "--model=A"])
        ['--data.init_args.source={"init_args": {"test": null}}', '--model=A']
        >>> prepare_arguments(["--data.text.paths=null"])
        ['--data.text={"paths": null}']
        >>> prepare_arguments(["--trainer.strategy.offload.folder=null"])
        ['--trainer.strategy.offload={"folder": null}']
        >>> prepare_arguments(["--trainer.callbacks.rows.embedding=null"])
        ['--trainer.callbacks.rows={"embedding": null}']
    """
    return _with_nulls(_with_resolved_configs(argv))


# an argument of a class, to which JSON is given, and the path to a field inside of it
_INNER_ARGUMENT = re.compile(
    r"--(?P<argument>(?:data|model|trainer\.\w+)(?:\.init_args)?\.(?!init_args\b)\w+)(?P<field>(?:\.\w+)+)"
)
_NULLS = ("null", "Null", "NULL", "~")  # the words that YAML takes for null


def _with_nulls(argv: Sequence[str]) -> list[str]:
    """Write a null of an inner argument as JSON, since jsonargparse 4.53 makes it the text None."""
    out: list[str] = []
    for arg in argv:
        name, eq, value = arg.partition("=")
        if not eq and out and _INNER_ARGUMENT.fullmatch(out[-1]):
            name, value = out[-1], arg
        match = _INNER_ARGUMENT.fullmatch(name)
        if value not in _NULLS or match is None:
            out.append(arg)
            continue
        if not eq:
            out.pop()
        content: Any = None
        for part in reversed(match["field"].split(".")[1:]):
            content = {part: content}
        out.append(f"--{match['argument']}={json.dumps(content)}")
    return out


def _with_resolved_configs(argv: Sequence[str]) -> list[str]:
    """Replace packaged configuration names by their files."""
    out: list[str] = []
    for i, arg in enumerate(argv):
        flag, eq, value = arg.partition("=")
        if flag in ("--config", "-c") and eq:
            out.append(f"--config={_run_config(value)}")
        elif i and argv[i - 1] in ("--config", "-c"):
            out.append(str(_run_config(arg)))
        else:
            out.append(arg)
    return out

"""YAML of people, read within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fulgurite.errors import ConfigError

__all__ = ["check_aliases", "check_keys", "read_yaml"]

_LARGEST = 2**20  # [bytes]; a comparison file has some ten thousand
_MOST_VALUES = 100_000
_DEEPEST = 50
_PLAIN = ("str", "int", "float", "bool", "null", "seq", "map", "merge")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, of plain values only.

    Raises:
        ConfigError: The file cannot be read, is no YAML, is too large once its aliases are
            expanded,
            or gives a key twice.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w+") as file:
        ...     _ = file.write("a: [1, 2]"), file.flush()
        ...     read_yaml(Path(file.name))
        {'a': [1, 2]}
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LARGEST + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not YAML: it is no text in UTF-8.") from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}).", "Name a readable YAML file."
        ) from error
    if len(text) > _LARGEST:
        raise ConfigError(f"{path} is larger than a megabyte.", "Name a file of settings.")
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _count(root, path, {}, 0)
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path} is not YAML{line}: {problem}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply.", "Write it flatter.") from error
    except ValueError as error:  # such as an integer of ten thousand digits
        raise ConfigError(f"{path} holds a value that cannot be read: {error}.") from error


def check_aliases(text: str) -> None:
    r"""Whether a text of YAML stays small once its aliases are written out, as parsers do.

    Raises:
        YAMLError: It does not, it holds itself, or it is no YAML.

    Example:
        >>> check_aliases("a: &a [1, 2]\nb: *a")
    """
    if "&" in text and "*" in text:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _count_expanded(root, {})


def check_keys(text: str) -> yaml.Node | None:
    r"""Whether no mapping in a text of YAML gives a key twice: parsers take the last one.

    Returns:
        What the text holds; None for nothing.

    Raises:
        YAMLError: One does, or it is no YAML.

    Example:
        >>> check_keys("a: 1\nb: {a: 2}").tag
        'tag:yaml.org,2002:map'
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    nodes, seen = [root] if root is not None else [], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            nodes += node.value
            continue
        names = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if (key.tag, key.value) in names:
                    problem = f"this gives {key.value!r} again"
                    raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
                names.add((key.tag, key.value))
            nodes.append(value)
    return root


def _count_expanded(node: yaml.Node, counts: dict[int, int]) -> int:
    if (counted := counts.get(id(node))) is not None:
        if not counted:
            raise yaml.MarkedYAMLError(None, None, "this holds itself", node.start_mark)
        return counted
    counts[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    number = 1 + sum(_count_expanded(child, counts) for child in children)
    if number > _MOST_VALUES:
        problem = f"this stands for more than {_MOST_VALUES:,} values by its aliases"
        raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
    counts[id(node)] = number
    return number


def _count(node: yaml.Node, path: Path, counts: dict[int, int], depth: int) -> int:
    """Number of values of a node with its aliases written out."""
    if (counted := counts.get(id(node))) is not None:
        if not counted:
            raise _refuse(path, node, "holds itself", "Leave out the alias.")
        return counted
    counts[id(node)] = 0  # until it is counted; met again before, it holds itself
    if depth > _DEEPEST:
        raise _refuse(path, node, f"lies deeper than {_DEEPEST} levels", "Write it flatter.")
    kind = node.tag.rpartition(":")[2]
    if kind not in _PLAIN:  # such as a date, which no command line could be given
        raise _refuse(path, node, f"is a {kind} to YAML", "Write it in quotes.")
    number = 1
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, str]] = set()
        for key, value in node.value:
            number += _count(key, path, counts, depth + 1)
            number += _count(value, path, counts, depth + 1)
            if not isinstance(key, yaml.ScalarNode):
                raise _refuse(path, key, "is no key", "Use a name.")
            if not key.tag.endswith(":merge"):
                if (key.tag, key.value) in keys:
                    raise _refuse(path, key, f"gives the key {key.value!r} again", "Drop one.")
                keys.add((key.tag, key.value))
    elif isinstance(node, yaml.SequenceNode):
        number += sum(_count(item, path, counts, depth + 1) for item in node.value)
    if number > _MOST_VALUES:
        hint = "Write out less of it by aliases."
        raise _refuse(path, node, f"stands for more than {_MOST_VALUES:,} values", hint)
    counts[id(node)] = number
    return number


def _refuse(path: Path, node: yaml.Node, problem: str, hint: str) -> ConfigError:
    return ConfigError(f"{path}, line {node.start_mark.line + 1}: this {problem}.", hint)

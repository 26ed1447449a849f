"""YAML of people, read within bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fulgurite.errors import ConfigError

__all__ = ["check_text", "read_yaml"]

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
        _Walk(partial(_refuse, path), partial(_check_plain, path)).count(root)
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path} is not YAML{line}: {problem}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply.", "Write it flatter.") from error
    except ConfigError:  # which is a ValueError, too
        raise
    except ValueError as error:  # such as an integer of ten thousand digits
        raise ConfigError(f"{path} holds a value that cannot be read: {error}.") from error


def check_text(text: str) -> yaml.Node | None:
    r"""Whether a text of YAML gives no key twice, and stays small where parsers write out aliases.

    Returns:
        What the text holds; None for nothing.

    Raises:
        YAMLError: A mapping gives a key twice, of which parsers take the last, aliases stand for
            too much, something holds itself, or it is no YAML.

    Example:
        >>> check_text("a: &a [1, 2]\nb: *a").tag
        'tag:yaml.org,2002:map'
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        has_aliases = "&" in text and "*" in text
        most = _MOST_VALUES if has_aliases else math.inf
        _Walk(_mark, _mark_repeated_key, most, "values by its aliases").count(root)
    return root


@dataclass
class _Walk:
    """A walk through the nodes of a text, each once, however many aliases name it.

    Args:
        refuse: Makes the error for a node from its problem and a hint.
        check: Raises if a node at a depth may not be there.
        most: Most values that the text may stand for.
        values: What these are called.
    """

    refuse: Callable[[yaml.Node, str, str], Exception]
    check: Callable[[yaml.Node, int], None]
    most: float = _MOST_VALUES
    values: str = "values"
    counts: dict[int, int] = field(default_factory=dict)

    def count(self, node: yaml.Node, depth: int = 0) -> int:
        """Number of values of a node with its aliases written out."""
        if (counted := self.counts.get(id(node))) is not None:
            if not counted:
                raise self.refuse(node, "holds itself", "Leave out the alias.")
            return counted
        self.counts[id(node)] = 0  # until it is counted; met again before, it holds itself
        self.check(node, depth)
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        number = 1
        for child in children:
            number += self.count(child, depth + 1)
        if number > self.most:
            hint = "Write out less of it by aliases."
            raise self.refuse(node, f"stands for more than {self.most:,} {self.values}", hint)
        self.counts[id(node)] = number
        return number


def _find_repeated_key(node: yaml.Node) -> yaml.ScalarNode | None:
    names: set[tuple[str, str]] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
            if (key.tag, key.value) in names:
                return key
            names.add((key.tag, key.value))
    return None


def _mark(node: yaml.Node, problem: str, hint: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, f"this {problem}", node.start_mark)


def _mark_repeated_key(node: yaml.Node, depth: int) -> None:
    if (key := _find_repeated_key(node)) is not None:
        raise _mark(key, f"gives {key.value!r} again", "")


def _check_plain(path: Path, node: yaml.Node, depth: int) -> None:
    """Refuse what no command line could be given, and keys that are none or come twice."""
    if depth > _DEEPEST:
        raise _refuse(path, node, f"lies deeper than {_DEEPEST} levels", "Write it flatter.")
    kind = node.tag.rpartition(":")[2]
    if kind not in _PLAIN:  # such as a date
        raise _refuse(path, node, f"is a {kind} to YAML", "Write it in quotes.")
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode):
            raise _refuse(path, key, "is no key", "Use a name.")
    if (key := _find_repeated_key(node)) is not None:
        raise _refuse(path, key, f"gives the key {key.value!r} again", "Drop one.")


def _refuse(path: Path, node: yaml.Node, problem: str, hint: str) -> ConfigError:
    return ConfigError(f"{path}, line {node.start_mark.line + 1}: this {problem}.", hint)

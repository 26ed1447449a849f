"""Parse in half of the time: arguments are looked up by name, not searched for in lists."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jsonargparse

__all__ = ["indexing_arguments"]

# private: there is no public place to say this. None in versions that are built in another way,
# which parse as they are.
_ACTIONS: Any = getattr(jsonargparse, "_actions", None)
_NAMESPACE: Any = getattr(jsonargparse, "_namespace", None)
_SUBCOMMANDS: Any = getattr(jsonargparse, "_subcommands", None)
_PLAIN: Any = jsonargparse.Namespace
_FIND, _SPLIT = "find_action_and_subcommand", "_parse_key"
_NEEDED = (
    (_ACTIONS, "_ActionConfigLoad"),
    (_ACTIONS, "ActionFail"),
    (_ACTIONS, "filter_non_parsing_actions"),
    (_NAMESPACE, "add_clash_mark"),
    (_SUBCOMMANDS, "ActionSubCommands"),
    (_SUBCOMMANDS, _FIND),
    (_PLAIN, _SPLIT),
)
#: The attribute of a parser that holds its arguments, and these by name.
_INDEX = "_fulgurite_index"


@contextmanager
def indexing_arguments() -> Iterator[None]:
    """Let jsonargparse find arguments by an index, and keys without dots at once.

    It goes through all arguments of a parser for each key, thousands of times in one command line.
    Whatever is found is the same. Versions of jsonargparse that are built in another way than 4.53
    are left alone.

    Example:
        >>> from jsonargparse import ArgumentParser
        >>> parser = ArgumentParser()
        >>> _ = parser.add_argument("--a.b", type=int, default=1)
        >>> with indexing_arguments():
        ...     parser.parse_args(["--a.b=2"]).a.b
        2
    """
    if not all(hasattr(owner, name) for owner, name in _NEEDED):
        yield
        return
    fallbacks = (_ACTIONS._ActionConfigLoad, _ACTIONS.ActionFail)
    find, split = getattr(_SUBCOMMANDS, _FIND), getattr(_PLAIN, _SPLIT)
    users = [
        module
        for name, module in [*sys.modules.items()]
        if name.startswith("jsonargparse.") and vars(module).get(_FIND) is find
    ]

    def find_by_index(parser: Any, dest: str, exclude: Any = None) -> tuple[Any, str | None]:
        actions = _index_actions(parser)
        if actions is None:
            return find(parser, dest, exclude=exclude)  # type: ignore[no-any-return]
        last = None
        for action in actions.get(dest, ()):
            if exclude is not None and isinstance(action, exclude):
                continue
            if not isinstance(action, fallbacks):
                return action, None
            last = action
        return last, None

    def split_key(namespace: Any, key: Any) -> tuple[str, Any, str]:
        if type(key) is str and key and "." not in key and " " not in key:
            return _NAMESPACE.add_clash_mark(key), namespace, ""
        return split(namespace, key)  # type: ignore[no-any-return]

    for module in users:
        setattr(module, _FIND, find_by_index)
    setattr(_PLAIN, _SPLIT, split_key)
    try:
        yield
    finally:
        for module in users:
            setattr(module, _FIND, find)
        setattr(_PLAIN, _SPLIT, split)


def _index_actions(parser: Any) -> dict[str, list[Any]] | None:
    """The arguments of a parser by their names, in order; None where it has subcommands."""
    everything = parser._actions
    before: tuple[list[Any], dict[str, list[Any]] | None] | None = vars(parser).get(_INDEX)
    if before is not None and before[0] == everything:  # links replace arguments
        return before[1]
    actions = _ACTIONS.filter_non_parsing_actions(everything)
    by_name: dict[str, list[Any]] | None = None
    if not any(isinstance(action, _SUBCOMMANDS.ActionSubCommands) for action in actions):
        by_name = {}
        for action in actions:
            options = {o.removeprefix("--") for o in action.option_strings if o.startswith("--")}
            for name in {action.dest} | options:
                by_name.setdefault(name, []).append(action)
    setattr(parser, _INDEX, ([*everything], by_name))
    return by_name

"""What becomes of the arguments of a configured class when another class replaces it: nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace, _typehints

__all__ = ["dropping_replaced_arguments"]

_TYPES: Any = _typehints  # private: there is no public place to say this


@contextmanager
def dropping_replaced_arguments() -> Iterator[None]:
    """Let a class that replaces another one begin with its own defaults.

    Jsonargparse would pass on all arguments whose names the new class has too, even the defaults of
    the old one: a ``path`` of other data, or the learning rate of another optimizer.

    Example:
        >>> from jsonargparse import ArgumentParser
        >>> from torch import optim
        >>> parser = ArgumentParser()
        >>> _ = parser.add_subclass_arguments(optim.Optimizer, "o", skip={"params"})
        >>> words = ["--o=torch.optim.Adam", "--o.init_args.lr=7", "--o=torch.optim.SGD"]
        >>> with dropping_replaced_arguments():
        ...     parser.parse_args(words).o.init_args.lr
        0.001
        >>> parser.parse_args(words).o.init_args.lr
        7.0
    """
    # the one place where all ways to replace a class meet
    passes_on = _TYPES.discard_init_args_on_class_path_change

    def discard(parser_or_action: Any, previous: Any, value: Any) -> None:
        if isinstance(previous, Namespace) and not _is_same(previous, value):
            for name in ("init_args", "dict_kwargs"):
                # emptied, not replaced: the configuration holds the same object
                arguments = previous.get(name)
                for key in list(vars(arguments)) if isinstance(arguments, Namespace) else ():
                    arguments.pop(key)
        passes_on(parser_or_action, previous, value)

    _TYPES.discard_init_args_on_class_path_change = discard
    try:
        yield
    finally:
        _TYPES.discard_init_args_on_class_path_change = passes_on


def _is_same(previous: Any, value: Any) -> bool:
    """Whether two class paths, perhaps by different names, are of one class."""
    one, other = previous.get("class_path"), value.get("class_path")
    if one == other:
        return True
    try:
        return _TYPES.import_object(one) is _TYPES.import_object(other)
    except Exception:  # whatever importing a module raises, and parsing tells
        return False

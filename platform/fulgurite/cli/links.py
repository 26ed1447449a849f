"""Sizes that a model takes from the data, and what is said where both or neither have one."""

from __future__ import annotations

import inspect
from typing import Any

from jsonargparse import Namespace, _util
from lightning.pytorch import LightningDataModule

from fulgurite.errors import ConfigError, DataError
from fulgurite.run_folders import LINKS

__all__ = ["choose_size", "given_sizes"]

_UNKNOWN = object()
_import_object: Any = _util.import_object  # private: as the parser reads class paths


def _default_of(path: str, name: str) -> Any:
    """Default of an argument of a class, which a class that it inherits from may have."""
    model = _import_object(path)
    for kind in model.__mro__ if isinstance(model, type) else (model,):
        parameter = inspect.signature(kind).parameters.get(name)
        if parameter is not None:
            return parameter.default
    return _UNKNOWN


def given_sizes(section: Namespace) -> dict[str, Any]:
    """Sizes of the model that the user has set to another value than the default."""
    sizes = {name: section.get(f"model.init_args.{name}") for name in LINKS}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    defaults = {name: _default_of(str(section.model.class_path), name) for name in sizes}
    return {
        name: size
        for name, size in sizes.items()
        if defaults[name] is not _UNKNOWN and size != defaults[name]
    }


def choose_size(section: Namespace, data: LightningDataModule, name: str) -> Any:
    """The DataModule's attribute, or what the user gave the model where the data have none.

    Args:
        section: Configuration of the command.
        data: The DataModule, before its ``setup``.
        name: One of ``LINKS``.

    Raises:
        ConfigError: Data and options say different sizes, or neither says one that is needed.
        DataError: The data of a system are not there.
    """
    if f"model.init_args.{name}" not in section:  # the model has no such argument
        return None
    user_size = section.get(f"model.init_args.{name}")
    kind = type(data).__name__
    try:
        size = getattr(data, name, None)
    except DataError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{kind}.{name} cannot be read before setup ({type(error).__name__}: {error}).",
            "The model is made first: let it be known when the data are made.",
        ) from error
    model = str(section.model.class_path)
    if size is None:
        if user_size is None and _default_of(model, name) is inspect.Parameter.empty:
            raise ConfigError(
                f"{model} needs {name}, which {kind} does not have before setup.",
                f"Give it by --model.{name}, or make it an attribute of {kind}.",
            )
        return user_size
    if name in given_sizes(section) and user_size != size:
        raise ConfigError(
            f"--model.{name} is {user_size}, and that of {kind} is {size}.",
            "Leave the option out: the data say it.",
        )
    return size

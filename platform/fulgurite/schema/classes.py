"""The classes that a configuration may name, under the names by which it names them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from types import ModuleType

from fulgurite.errors import MissingExtraError
from fulgurite.systems import systems

__all__ = ["find_class", "list_classes", "list_subclasses"]

#: Modules of libraries whose classes configurations name.
_LIBRARIES = (
    "torch.optim",
    "torch.optim.lr_scheduler",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
)
_PARTS = ("models", "datamodules", "callbacks")


def _public_classes(module: ModuleType) -> Iterator[tuple[str, type]]:
    """Public classes of a module, under its own name."""
    names: Iterable[str] = getattr(module, "__all__", None) or dir(module)
    for name in sorted(names):
        if name.startswith("_"):
            continue
        try:
            value = getattr(module, name)
        except MissingExtraError:  # its parts are imported on first use
            continue
        if inspect.isclass(value) and value.__module__.partition(".")[0] == _top(module):
            yield f"{module.__name__}.{name}", value


def _top(module: ModuleType) -> str:
    return module.__name__.partition(".")[0]


def _list_modules() -> Iterator[str]:
    """Modules of fulgurite, of plug-ins, and of libraries, those of systems first."""
    for name, system in systems().items():
        package = system.configs.partition(".")[0]
        if package != "fulgurite":
            yield from _list_with_parts(package)
        for part in _PARTS:
            yield from _list_with_parts(f"fulgurite.{part}.{name}")
    yield "fulgurite.strategies"
    yield from _LIBRARIES


def _list_with_parts(package: str) -> Iterator[str]:
    """A package and the modules in it, such as ``methods`` and ``backbones``."""
    spec = find_spec(package)
    if spec is not None:
        yield package
        for module in pkgutil.iter_modules(spec.submodule_search_locations or []):
            if not module.name.startswith("_"):
                yield f"{package}.{module.name}"


@cache
def list_classes() -> dict[str, type]:
    """Public classes by their full name; each class once, under its shortest public name.

    Systems whose libraries are missing are left out, as their configurations cannot run.
    """
    names: dict[type, str] = {}
    for module_name in _list_modules():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # of a library that is not installed
            continue
        for name, value in _public_classes(module):
            if value not in names or len(name) < len(names[value]):
                names[value] = name
    return {name: value for value, name in names.items()}


@cache
def list_subclasses(base: type) -> list[str]:
    """Full names of the public classes that can stand for a base class, itself included."""
    return sorted(
        name
        for name, value in list_classes().items()
        if issubclass(value, base) and not inspect.isabstract(value)
    )


def find_class(name: str) -> type | None:
    """The public class of a full name; None where there is none."""
    return list_classes().get(name)

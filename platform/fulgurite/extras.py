"""Packages that only some inputs need: imported where they are used, or named with their extra."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

from fulgurite.errors import MissingExtraError

__all__ = ["list_optional_packages", "missing_package", "optional_import", "suggest_extra"]

_OF_DEVELOPERS = ("test", "dev", "bench", "docs")


def suggest_extra(extra: str, otherwise: str = "") -> str:
    """Say how an extra is installed, in quotes, without which zsh takes the brackets for a pattern.

    Args:
        extra: The extra of fulgurite.
        otherwise: What else can be done, as the end of the sentence.

    Example:
        >>> suggest_extra("ice", "use backend=dense")
        "Install it with `pip install 'fulgurite[ice]'`, or use backend=dense."
    """
    choice = f", or {otherwise}" if otherwise else ""
    return f"Install it with `pip install 'fulgurite[{extra}]'`{choice}."


def missing_package(
    package: str, extra: str, subject: str, otherwise: str = ""
) -> MissingExtraError:
    """The error to raise where a package is not installed.

    Args:
        package: Name of the package.
        extra: The extra of fulgurite that brings it.
        subject: What needs it, as the beginning of a sentence.
        otherwise: What else can be done, as the end of a sentence.

    Example:
        >>> print(missing_package("h5py", "ice", "Reading a.mat"))
        Reading a.mat needs h5py. Install it with `pip install 'fulgurite[ice]'`.
    """
    return MissingExtraError(f"{subject} needs {package}.", suggest_extra(extra, otherwise))


def optional_import(name: str, extra: str, subject: str, otherwise: str = "") -> Any:
    """Import a module of a package that may be absent.

    Args:
        name: The module, such as ``safetensors.torch``.
        extra: The extra of fulgurite that brings its package.
        subject: What needs it, as the beginning of a sentence.
        otherwise: What else can be done, as the end of a sentence.

    Raises:
        MissingExtraError: The package is not installed.
        ImportError: It is, and cannot be imported for another reason.

    Example:
        >>> optional_import("json", "ice", "Reading a.json").loads("[1]")
        [1]
    """
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != package:
            raise
        raise missing_package(package.replace("_", "-"), extra, subject, otherwise) from error


def list_optional_packages(distribution: str = "fulgurite") -> dict[str, list[str]]:
    """The extras that bring each optional package, as the installed metadata has them.

    Those that developers alone need are left out.

    Args:
        distribution: Name of the installed distribution.
    """
    from packaging.requirements import Requirement

    described = metadata.metadata(distribution)
    extras = [e for e in described.get_all("Provides-Extra") or [] if e not in _OF_DEVELOPERS]
    packages: dict[str, list[str]] = {}
    for line in metadata.requires(distribution) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or requirement.name == distribution or marker.evaluate({"extra": ""}):
            continue
        for extra in extras:
            if marker.evaluate({"extra": extra}):
                packages.setdefault(requirement.name, []).append(extra)
    return packages

"""Packages that only some inputs need: imported where they are used, or named with their extra."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from fulgurite.errors import MissingExtraError

__all__ = [
    "list_optional_packages",
    "list_unfit_packages",
    "missing_package",
    "optional_import",
    "suggest_extra",
]

if TYPE_CHECKING:
    from packaging.requirements import Requirement

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


def list_unfit_packages(distribution: str = "fulgurite") -> dict[str, str]:
    """Installed packages whose version a distribution or one of its extras does not take.

    Those that developers alone need are left out.

    Args:
        distribution: Name of the installed distribution.

    Returns:
        What versions are taken instead, by the name of the package.
    """
    unfit: dict[str, str] = {}
    for requirement, extras in _list_requirements(distribution):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if extras and not requirement.specifier.contains(version, prereleases=True):
            user = f"{distribution}[{extras[0]}]" if extras[0] else distribution
            unfit[requirement.name] = f"{user} takes {requirement.name}{requirement.specifier}"
    return unfit


def list_optional_packages(distribution: str = "fulgurite") -> dict[str, list[str]]:
    """The extras that bring each optional package, as the installed metadata has them.

    Those that developers alone need are left out.

    Args:
        distribution: Name of the installed distribution.
    """
    packages: dict[str, list[str]] = {}
    for requirement, extras in _list_requirements(distribution):
        if requirement.name != distribution and "" not in extras and extras:
            packages.setdefault(requirement.name, []).extend(extras)
    return packages


def _list_requirements(distribution: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Each requirement of a distribution with the extras it is of; the extra "" is of all."""
    from packaging.requirements import Requirement

    described = metadata.metadata(distribution)
    extras = [e for e in described.get_all("Provides-Extra") or [] if e not in _OF_DEVELOPERS]
    for line in metadata.requires(distribution) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        yield requirement, [e for e in ("", *extras) if not marker or marker.evaluate({"extra": e})]

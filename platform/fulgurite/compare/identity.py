"""What a cell of a comparison is: the configuration that its commands resolve to, and its data.

The digest of a cell is one of what is run, not of the text that asks for it: included files and
defaults in signatures count, comments and the place of a file do not.

Files and folders count that the configuration names under ``data`` or ``model``, and under
``trainer`` where they lie in ``FULGURITE_DATA`` (others are mostly written by the run). Their
times do not count, since copies have others:

========================  ==========================================================
file                      size and content; above 64 MiB the size, both ends and 16
                          pieces in between
folder                    names and sizes of its files, without hidden ones (the
                          first 100,000), and the content of the first 2,000, of
                          which those above 1 MiB by their ends and 16 pieces
glob pattern              names of what matches, and the first 2,000 of them as above
``stdlib``                the version of Python
========================  ==========================================================

Not seen: code that changes without a change of a signature or version, and data that no value of
the configuration names (such as images that an installed package brings).
"""

from __future__ import annotations

import enum
import glob
import hashlib
import importlib
import itertools
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fulgurite import __version__
from fulgurite.compare.hashing import digest
from fulgurite.data.listing import STDLIB
from fulgurite.systems import ENTRY_POINTS

__all__ = ["RUNNER", "Definition", "Resolver", "data_identity"]

RUNNER = "fulgurite.cli:main"
"""What runs a command line, as ``module:function``."""

_WHOLE = 64 * 2**20  # [bytes]; a file up to this size is read whole
_WHOLE_IN_FOLDER = 2**20  # [bytes]; the same for one of a folder's files
_PIECE = 2**16  # [bytes]
_PIECES = 16
_FOLDER_NAMES = 100_000
_FOLDER_CONTENTS = 2_000
_PLACE = re.compile("path|root|folder|file|dir")

Role = Literal["place", "data", "trainer", ""]


class Definition(NamedTuple):
    """What a command would run.

    Args:
        configuration: The resolved configuration as plain data, without where the run is recorded.
        data: Identity of each file and folder that it names, by its spelling there.
        versions: Versions of fulgurite and of the plug-ins that it takes classes from.
    """

    configuration: Any
    data: Mapping[str, str] = {}
    versions: Mapping[str, str] = {}


class Resolver:
    """Resolves command lines as the command line itself would, each different one once.

    Args:
        runner: ``module:function`` that runs a command line; ``parse`` of the same module takes
            one to its configuration.
    """

    def __init__(self, runner: str = RUNNER) -> None:
        self._runner = runner
        self._known: dict[tuple[str, ...], Definition] = {}
        self._identity = cache(data_identity)  # most commands name the same files
        self._plug_ins = cache(_plug_in_packages)

    def __call__(self, command: Sequence[str]) -> Definition:
        """What a command would run.

        Args:
            command: Subcommand and options.

        Raises:
            FulguriteError: An option or a value of it is wrong.
        """
        words = tuple(command)
        if words not in self._known:
            self._known[words] = self._define(self._parse(words))
        return self._known[words]

    def _define(self, parsed: Any) -> Definition:
        configuration = _plain(parsed)
        for key in ("config", "run", "ckpt_path", "subcommand"):
            configuration.pop(key, None)
        if configuration.get("input") is None:  # of predict; it is there where it says something
            configuration.pop("input", None)
        texts = dict.fromkeys((text, _role(path)) for path, text in _texts(configuration))
        data = {text: identity for text, role in texts if (identity := self._identity(text, role))}
        return Definition(configuration, data, _versions(configuration, self._plug_ins()))

    def _parse(self, words: Sequence[str]) -> Any:
        if self._runner == RUNNER:
            return _parse_with_one_parser(words)
        return importlib.import_module(self._runner.partition(":")[0]).parse([*words])


@cache
def _command_parsers() -> Mapping[str, Any]:
    """The parser of each subcommand, which takes a fifth of a second to build."""
    from fulgurite.cli import FulguriteCLI

    class Parsers(FulguriteCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise _Built(self._subcommand_parsers)

    try:
        Parsers([], only_parse=True)
    except _Built as built:
        parsers: Mapping[str, Any] = built.args[0]
        return parsers
    raise AssertionError("the command line was parsed without being asked")


class _Built(Exception):
    """Ends the construction of a command line whose parsers are there."""


def _parse_with_one_parser(words: Sequence[str]) -> Any:
    from fulgurite import cli
    from fulgurite.indexing import indexing_arguments
    from fulgurite.replacing import dropping_replaced_arguments

    command, *options = words
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself will say them
            with dropping_replaced_arguments(), indexing_arguments():
                return _command_parsers()[command].parse_args(cli.prepare_arguments(options))
    except Exception:
        return cli.parse(words)  # slower; says in one line what is wrong


def _plain(value: Any) -> Any:
    """A parsed value as JSON has it; objects by what they are, not by where they lie in memory."""
    if hasattr(value, "as_dict"):
        value = vars(value)
    if isinstance(value, Mapping):
        names = sorted((str(key), key) for key in value)
        return {name: _plain(value[key]) for name, key in names if not name.startswith("__")}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if name := getattr(value, "__qualname__", ""):
        return f"{value.__module__}.{name}"
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(value).__qualname__} {value!r}")


def _texts(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """All texts of a configuration but class paths, each with the keys that lead there."""
    if value is None and path[-1] == "paths":
        yield path, STDLIB  # what DataModules of text read then
    elif isinstance(value, str) and path and path[-1] != "class_path":
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, (*path, key))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, path)


def _role(path: tuple[str, ...]) -> Role:
    """What a text may stand for, by the keys that lead to it."""
    if path[0] == "data":
        return "place" if _PLACE.search(path[-1]) else "data"
    if path[0] == "input":  # of predict
        return "place"
    return "data" if path[0] == "model" else "trainer" if path[0] == "trainer" else ""


def _plug_in_packages() -> dict[str, metadata.Distribution]:
    """The distribution behind each package that announces a system."""
    return {
        entry.module.partition(".")[0]: entry.dist
        for entry in metadata.entry_points(group=ENTRY_POINTS)
        if entry.dist is not None
    }


def _versions(configuration: Any, plug_ins: Mapping[str, metadata.Distribution]) -> dict[str, str]:
    packages = {path.partition(".")[0] for path in _class_paths(configuration)}
    named = (plug_ins[package] for package in sorted(packages & plug_ins.keys()))
    return {"fulgurite": __version__, **{dist.name: dist.version for dist in named}}


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        value = [*value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _class_paths(item)


def data_identity(text: str, role: Role = "data") -> str:
    """Identity of the file, folder or files that a value of a configuration names.

    Args:
        text: The value.
        role: ``place`` where the key says that it is a path; ``data`` where it may be one;
            ``trainer`` where it is one of data only if it lies in ``FULGURITE_DATA``.

    Returns:
        A hash; empty where nothing of this name is there.
    """
    if role in ("place", "data") and text == STDLIB:
        return f"Python {platform.python_version()}"
    if not role or not text.strip("./") or len(text) > 4096:
        return ""
    try:
        return _identity_of_path(text, role)
    except (OSError, ValueError):  # it cannot be read, or is no path: the run will say so
        return ""


def _identity_of_path(text: str, role: Role) -> str:
    root = os.environ.get("FULGURITE_DATA")
    path, folder = Path(text).expanduser(), Path(root).expanduser() if root else None
    there = folder / path if folder is not None else None  # an absolute path stays what it is
    if there is not None and not there.exists():
        there = None
    if role == "trainer":
        if there is None or folder is None:
            return ""
        inside = there.absolute().is_relative_to(folder.absolute())
        return _path_identity(there) if inside else ""
    # Here first, as `fulgurite.io.data_path` looks. A bare word that is a folder's name here is
    # mostly something else, unless there are data of this name, too.
    is_place = role == "place" or os.sep in text or there is not None
    if path.is_file() or (path.is_dir() and is_place):
        return _path_identity(path)
    if there is not None:
        return _path_identity(there)
    if role == "place" and glob.has_magic(text):
        for base in filter(None, (Path(), folder)):
            names = sorted(glob.iglob(str(path), root_dir=base, recursive=True))[:_FOLDER_NAMES]
            read = [_path_identity(base / name) for name in names[:_FOLDER_CONTENTS]]
            if names:
                return digest([names, read])
    return ""


def _path_identity(path: Path) -> str:
    return _folder_identity(path) if path.is_dir() else _file_identity(path, _WHOLE)


def _file_identity(path: Path, hash_limit: int) -> str:
    size = path.stat().st_size
    content = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= hash_limit:
            while piece := file.read(2**20):
                content.update(piece)
        else:
            for number in range(_PIECES + 2):  # both ends among them
                file.seek((size - _PIECE) * number // (_PIECES + 1))
                content.update(file.read(_PIECE))
    return content.hexdigest()[:16]


def _folder_identity(folder: Path) -> str:
    content = hashlib.sha256()
    files = itertools.islice(_files(folder), _FOLDER_NAMES)
    for number, (name, path) in enumerate(files):
        content.update(f"{name}\0{path.stat().st_size}\0".encode())
        if number < _FOLDER_CONTENTS:
            with suppress(PermissionError):  # its name and size count still
                content.update(_file_identity(path, _WHOLE_IN_FOLDER).encode())
    return content.hexdigest()[:16]


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files below a folder in the order of their names, hidden ones left out."""
    visited: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(folder).as_posix(), path

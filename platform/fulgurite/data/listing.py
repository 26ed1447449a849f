"""Resolve paths, folders and glob patterns to a list of files; links are followed."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
import zipfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fulgurite.errors import DataError
from fulgurite.foreign import open_archive, read_member, reading
from fulgurite.io import checksum, data_path

__all__ = ["STDLIB", "FileTree", "find_files", "list_files", "match_files"]

#: The path that means the sources of Python's standard library.
STDLIB = "stdlib"

# what is in the folder of the standard library and is not the library
_NOT_STDLIB = frozenset(("site-packages", "dist-packages", "test", "tests", "idle_test"))


def find_files(paths: Sequence[str], suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """Return the files that paths stand for, each once, in an order that never changes.

    A path is a file, a folder (searched to the bottom for files with one of the suffixes; names
    that begin with a dot are skipped), a glob pattern (each match counts as if it were given
    itself), or ``stdlib``.

    Args:
        paths: Absolute, or relative to the current folder or else to ``FULGURITE_DATA``.
        suffixes: What names of files in folders end with.

    Returns:
        (name, path) of each file, in the order of ``paths``, inside a folder by name. The name is
        relative to the folder.

    Raises:
        DataError: No file matches, or a folder cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.txt", "a.txt", "c.png"):
        ...         _ = (Path(folder) / name).write_bytes(b"text")
        ...     [name for name, _ in find_files([folder], [".txt"])]
        ['a.txt', 'b.txt']
    """
    by_path: dict[Path, tuple[str, Path]] = {}  # a file given twice would be in two splits
    for pattern in paths:
        for name, path in _find(pattern, tuple(suffixes)):
            by_path.setdefault(path.resolve(), (name, path))
    if not by_path:
        raise DataError(
            f"There is no file at {', '.join(paths) or 'no path'} with the suffix "
            f"{' or '.join(suffixes) or '(none is allowed)'}.",
            "Set `--data.init_args.text.paths` to files, folders or glob patterns, and "
            "`--data.init_args.text.suffixes` to the suffixes of files in these folders.",
        )
    return list(by_path.values())


def _find(pattern: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    if pattern == STDLIB:
        yield from list_files(Path(sysconfig.get_path("stdlib")), (".py",), _NOT_STDLIB)
        return
    path = data_path(pattern, must_exist=False)
    if not path.exists() and glob.has_magic(pattern):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    else:
        matches = [data_path(pattern)]
    for match in matches:
        if match.is_dir():
            yield from list_files(match, suffixes)
        else:
            yield match.name, match


def match_files(pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files that a path or a glob pattern names, which may be none.

    A file of this very name counts before the pattern, since names may have brackets.

    Args:
        pattern: A file, a folder or a glob pattern of both, absolute or relative to the current
            folder or to ``FULGURITE_DATA``.
        suffixes: What names of files in folders end with.
    """
    path = data_path(pattern, must_exist=False)
    matches = [path]
    if not path.exists():
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    return [
        file
        for match in matches
        for file in (
            [file for _, file in list_files(match, suffixes)] if match.is_dir() else [match]
        )
    ]


def list_files(
    folder: Path, suffixes: tuple[str, ...] = ("",), skipped: frozenset[str] = frozenset()
) -> list[tuple[str, Path]]:
    """Return the files below a folder by name, also those below links to folders.

    Names that begin with a dot are skipped, and a link to a folder that it lies in.

    Args:
        folder: Where to look.
        suffixes: What names end with.
        skipped: Names of folders to leave out.

    Returns:
        (name, path) of each file; the name is relative to the folder, with slashes.

    Raises:
        DataError: A folder cannot be read, or a link leads nowhere.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (Path(folder) / "a").mkdir()
        ...     (Path(folder) / "a" / "b.txt").touch()
        ...     (Path(folder) / "link").symlink_to("a")
        ...     [name for name, _ in list_files(Path(folder))]
        ['a/b.txt', 'link/b.txt']
    """
    return sorted(_walk(folder, "", suffixes, skipped, above=()))


def _walk(
    folder: Path,
    prefix: str,
    suffixes: tuple[str, ...],
    skipped: frozenset[str],
    *,
    above: tuple[tuple[int, int], ...],
) -> Iterator[tuple[str, Path]]:
    """Walk a folder; ``above`` identifies the folders that lead to it."""
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except NotADirectoryError as error:
        raise DataError(
            f"{folder} is a file, and no folder.", "Name the folder that it is in."
        ) from error
    except OSError as error:
        raise DataError(
            f"The folder {folder} cannot be read ({error.strerror}).",
            "Make it readable, or leave it out of the path.",
        ) from error
    identity = status.st_dev, status.st_ino
    if identity in above:
        return
    for entry in entries:
        name = f"{prefix}{entry.name}"
        if entry.name[0] == ".":
            continue
        if entry.is_dir():
            if entry.name not in skipped:
                path = folder / entry.name
                yield from _walk(path, f"{name}/", suffixes, skipped, above=(*above, identity))
        elif entry.name.endswith(suffixes):
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise DataError(
                    f"The link {entry.path} leads nowhere ({os.readlink(entry.path)}).",
                    "Repair it, or remove it.",
                )
            yield name, folder / entry.name


class FileTree:
    """The files of a folder or a zip, by name; links in a folder are followed.

    It may be sent to other processes, which open the zip anew.

    Args:
        root: The folder or zip.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "a.txt").write_bytes(b"text")
        ...     tree = FileTree(Path(folder))
        ...     tree.names, tree.read("a.txt")
        (['a.txt'], b'text')
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._archive: tuple[int, zipfile.ZipFile, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_archive": None}

    @cached_property
    def names(self) -> list[str]:
        """Names of all files, sorted, with slashes.

        Names that begin with a dot, and what macOS adds to zips, are left out.

        Raises:
            DataError: Nothing is there, a folder cannot be read, a link leads nowhere, or the zip
                is damaged, holds two files of one name, or a path that leads through `.` or `..`.
        """
        if self.root.is_dir():
            names = [name for name, _ in list_files(self.root)]
        elif not self.root.exists():  # such as a glob pattern
            raise DataError(
                f"There is no folder or zip {self.root}.", "Name one, without `*`, `?` or brackets."
            )
        else:
            again = "Fetch or pack it again."
            with (
                reading(self.root, "The zip", again, fault="is damaged or truncated"),
                open_archive(self.root) as (archive, _),
            ):
                names = [name for name in archive.namelist() if not name.endswith("/")]
            if len(set(names)) < len(names):
                raise DataError(f"The zip {self.root} holds two files of one name.", again)
            if winding := [name for name in names if {".", ".."} & {*name.split("/")}]:
                raise DataError(
                    f"The zip {self.root} holds {winding[0]!r}, a path with `.` or `..` in it.",
                    "Pack it again with plain paths.",
                )
        return sorted(name for name in names if not _is_hidden(name))

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            Exception: What the file system and ``zipfile`` raise.
        """
        if self.root.is_dir():
            return (self.root / name).read_bytes()
        if self._archive is None or self._archive[0] != os.getpid():
            # one for each process: a shared one would share its position in the file
            self._archive = os.getpid(), zipfile.ZipFile(self.root), self.root.stat().st_size
        return read_member(self._archive[1], name, self._archive[2])

    def fingerprint(self, names: Sequence[str]) -> str:
        """Return a digest that changes with a zip, or with names, sizes and times of files."""
        if self.root.is_file():
            return checksum(self.root)
        digest = hashlib.sha256()
        for name in names:
            status = (self.root / name).stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def _is_hidden(name: str) -> bool:
    return "/." in f"/{name}" or name.startswith("__MACOSX/")

"""Which files people mean by paths, folders and glob patterns; links are followed."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from fulgurite.errors import DataError
from fulgurite.io import data_path

__all__ = ["STDLIB", "find_files", "list_files"]

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
        DataError: Nothing is there, or a folder cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.txt", "a.txt", "c.png"):
        ...         _ = (Path(folder) / name).write_bytes(b"text")
        ...     [name for name, _ in find_files([folder], [".txt"])]
        ['a.txt', 'b.txt']
    """
    found: dict[Path, tuple[str, Path]] = {}  # a file given twice would be in two splits
    for given in paths:
        for name, path in _find(given, tuple(suffixes)):
            found.setdefault(path.resolve(), (name, path))
    if not found:
        raise DataError(
            f"There is no file at {', '.join(paths) or 'no path'} with the suffix "
            f"{' or '.join(suffixes) or '(none is allowed)'}.",
            "Set `--data.init_args.paths` to files, folders or glob patterns, and "
            "`--data.init_args.suffixes` to the suffixes of files in these folders.",
        )
    return list(found.values())


def _find(given: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    if given == STDLIB:
        yield from list_files(Path(sysconfig.get_path("stdlib")), (".py",), _NOT_STDLIB)
        return
    path = data_path(given, must_exist=False)
    if not path.exists() and glob.has_magic(given):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    else:
        matches = [data_path(given)]
    for match in matches:
        if match.is_dir():
            yield from list_files(match, suffixes)
        else:
            yield match.name, match


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
    return sorted(_walk(folder, "", suffixes, skipped, ()))


def _walk(
    folder: Path,
    prefix: str,
    suffixes: tuple[str, ...],
    skipped: frozenset[str],
    above: tuple[tuple[int, int], ...],
) -> Iterator[tuple[str, Path]]:
    """Walk a folder; ``above`` identifies the folders that lead to it."""
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
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
                yield from _walk(path, f"{name}/", suffixes, skipped, (*above, identity))
        elif entry.name.endswith(suffixes):
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise DataError(
                    f"The link {entry.path} leads nowhere ({os.readlink(entry.path)}).",
                    "Mend it, or remove it.",
                )
            yield name, folder / entry.name

"""What commands take, kept in the cache: the schema of runs, and the options of other commands."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fulgurite import __version__
from fulgurite.data.store import cache_folder
from fulgurite.io import atomic_write
from fulgurite.systems import ENTRY_POINTS, RESERVED_COMMANDS, RUN_COMMANDS, systems

__all__ = ["OTHER_COMMANDS", "RunCommand", "read_options"]

RunCommand = Callable[[list[str]], int]
"""Runs the command line of fulgurite; returns its exit status."""

#: Commands whose options are those of their ``--help``.
OTHER_COMMANDS = sorted(RESERVED_COMMANDS - {*RUN_COMMANDS, "systems", "doctor", "help"})


def read_options(run_command: RunCommand) -> dict[str, Any]:
    """Return the schema of runs and the options of commands, from the cache where it is fresh.

    Args:
        run_command: Prints the help of each command, where it is not in the cache.

    Returns:
        ``schema``, as :func:`fulgurite.schema.describe_run` makes it, and ``commands``, the
        options of each other command, each with the words that it chooses among, if it does.
    """
    path = cache_folder() / "completion" / f"{_fingerprint()}.json"
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"schema", "commands"} <= content.keys():
            return content
    content = _make_options(run_command)
    with contextlib.suppress(OSError):  # without a cache it only takes longer
        for old in path.parent.glob("*.json"):
            old.unlink(missing_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
    return content


def _fingerprint() -> str:
    """What changes with the sources of fulgurite and the versions of plug-ins."""
    digest = hashlib.sha256(__version__.encode())
    for path in _source_files():
        digest.update(f"{path}:{path.stat().st_mtime_ns}".encode())
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        digest.update(f"{entry.value}:{entry.dist.version if entry.dist else ''}".encode())
    return digest.hexdigest()[:16]


def _source_files() -> Iterator[Path]:
    for package in ("fulgurite", *(f"fulgurite.{part}" for part in ("models", "datamodules"))):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            yield from sorted(Path(folder).rglob("*.py"))


def _make_options(run_command: RunCommand) -> dict[str, Any]:
    from fulgurite.schema import describe_run

    names = [*OTHER_COMMANDS, *(c.name for s in systems().values() for c in s.commands)]
    return {
        "schema": describe_run(),
        "commands": {name: _read_help(name, run_command) for name in names},
    }


def _read_help(command: str, run_command: RunCommand) -> dict[str, list[str]]:
    """The options that ``--help`` of a command lists, and the words that each chooses among."""
    text = io.StringIO()
    with (
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        run_command([command, "--help"])
    options: dict[str, list[str]] = {}
    for name, words in re.findall(r"(?<![\w-])(--[a-z][\w-]*)(?: {([^}]*)})?", text.getvalue()):
        options[name] = options.get(name) or [word for word in words.split(",") if word]
    return options

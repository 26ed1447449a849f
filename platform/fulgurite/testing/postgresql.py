"""A PostgreSQL server for the time of a test, on a free port of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fulgurite.testing.survival import find_free_port

__all__ = ["find_initdb", "run_postgresql"]


def find_initdb() -> Path | None:
    """The newest installed ``initdb``, on the search path or where Debian keeps it; else None."""
    if on_path := shutil.which("initdb"):
        return Path(on_path)
    installed = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max(installed, key=lambda p: float(p.parents[1].name), default=None)


@contextmanager
def run_postgresql() -> Iterator[str]:
    """Start a server with an empty database in a temporary folder, and remove both at the end.

    It listens on 127.0.0.1 alone, trusts every local user, and does not wait for the disk. Started
    by root it runs as ``nobody``, since PostgreSQL refuses to run as root.

    Yields:
        The address of its database, for SQLAlchemy with psycopg.

    Raises:
        FileNotFoundError: PostgreSQL is not installed.
        subprocess.CalledProcessError: The server could not be started.
    """
    initdb = find_initdb()
    if initdb is None:
        raise FileNotFoundError("PostgreSQL is not installed: there is no initdb.")
    home = Path(tempfile.mkdtemp(prefix="postgresql-"))
    prefix: list[str] = []
    if os.getuid() == 0:
        shutil.chown(home, "nobody")
        prefix = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    port, data = find_free_port(), str(home / "data")
    pg_ctl = [str(initdb.with_name("pg_ctl")), "-D", data]

    def call(*command: str) -> None:
        subprocess.run([*prefix, *command], check=True, capture_output=True, cwd=home, timeout=120)

    try:
        call(str(initdb), "-D", data, "-U", "tester", "-A", "trust", "--no-sync")
        options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1 -c fsync=off"
        call(*pg_ctl, "-o", options, "-l", str(home / "log"), "-w", "start")
        try:
            yield f"postgresql+psycopg://tester:secret@127.0.0.1:{port}/postgres"
        finally:
            call(*pg_ctl, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home)

"""The database behind a sweep: its address, and what it answers where it cannot be used."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
from optuna.exceptions import OptunaError
from sqlalchemy import Connection, Engine, event, make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from fulgurite.errors import ConfigError

__all__ = [
    "MEMORY",
    "check_kept",
    "hide_password",
    "open_storage",
    "reaching_storage",
    "sqlite_url",
]

MEMORY = "memory"
"""Address of a study that ends with its process."""

_ATTEMPTS = 20  # of half a second


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Open a storage, or make it.

    Args:
        url: Its address.

    Raises:
        ConfigError: It cannot be reached, or is none of Optuna.
    """
    if url == MEMORY:
        return optuna.storages.InMemoryStorage()
    # a writer waits for another one, and a connection that the server closed is opened anew
    sqlite = {"connect_args": {"timeout": 60}}
    arguments = sqlite if url.startswith("sqlite") else {"pool_pre_ping": True}
    template = url.replace("{", "{{").replace("}", "}}")  # Optuna fills in braces
    try:
        for attempt in itertools.count():
            try:
                storage = optuna.storages.RDBStorage(template, engine_kwargs=arguments)
                if url.startswith("sqlite"):
                    _lock_whole_transactions(storage.engine)
                return storage
            except (SQLAlchemyError, OptunaError) as error:
                # another machine makes the tables at this moment
                is_race = isinstance(error, IntegrityError) or "already exists" in str(error)
                if not is_race or attempt == _ATTEMPTS:
                    raise
                time.sleep(0.5)
    except ImportError as error:
        raise ConfigError(
            f"The storage {hide_password(url)} needs a driver that is not here ({error}).",
            "pip install 'fulgurite[sweeps]', and write the address as postgresql+psycopg://….",
        ) from error
    except (SQLAlchemyError, OptunaError, RuntimeError, ValueError) as error:
        raise _storage_error(url, error) from error
    raise AssertionError("unreachable")


def _lock_whole_transactions(engine: Engine) -> None:
    """Let each transaction of SQLite write alone from its beginning.

    Optuna reads a trial's state, or the number of trials, and writes the next one. PostgreSQL locks
    the rows that it read; SQLite locks at the first write, so that two processes would take the
    same trial from the queue, or give two trials one number.
    """

    @event.listens_for(engine, "connect")
    def leave_transactions(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # else Python's driver begins them, at the first write

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections that are open were not told


@contextmanager
def reaching_storage(url: str) -> Iterator[None]:
    """Say in one line that a storage is of something else, or that it went away.

    Args:
        url: Its address.

    Raises:
        ConfigError: The storage cannot be used.
    """
    try:
        yield
    except (SQLAlchemyError, OptunaError) as error:
        raise _storage_error(url, error) from error


def _storage_error(url: str, error: Exception) -> ConfigError:
    cause: BaseException = error
    while not isinstance(cause, SQLAlchemyError) and cause.__cause__ is not None:
        cause = cause.__cause__  # Optuna guesses at what it met
    lines = str(getattr(cause, "orig", None) or cause).strip().splitlines()
    return ConfigError(
        f"The storage {hide_password(url)} cannot be used ({lines[0] if lines else error}).",
        "Give --storage such as sqlite:///study.db or "
        "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, with the server running.",
    )


def sqlite_url(path: Path) -> str:
    """Address of a database in a file, whatever its name.

    >>> sqlite_url(Path("/a b/50%?/study.db"))
    'sqlite:////a b/50%25%3F/study.db'
    """
    quoted = str(path).replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    return f"sqlite:///{quoted}"


def check_kept(url: str) -> None:
    """Refuse a storage that ends with the process, and that no worker would see.

    Args:
        url: Its address.

    Raises:
        ConfigError: The storage is in memory.
    """
    is_memory = url == MEMORY
    with suppress(SQLAlchemyError):
        address = make_url(url)
        names = (None, "", ":memory:")
        is_memory |= address.get_backend_name() == "sqlite" and address.database in names
    if is_memory:
        raise ConfigError(
            f"--storage={url} is kept in memory, and would end with each process.",
            "Name a file, such as --storage=sqlite:///study.db.",
        )


def hide_password(url: str) -> str:
    """An address to be printed."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        scheme, separator, _ = url.partition("://")
        return f"{scheme}://…" if separator else "that is given"

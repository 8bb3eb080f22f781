"""The registry's database: engines, read and write transactions, retries, and translated errors."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sqlalchemy import create_engine, event
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from registry.errors import StoreError
from registry.retries import are_logged
from registry.storage import coe_home, translate_disk_full

_BUSY_TIMEOUT_S = 30.0
_SETTLE_MS = 200
"""Milliseconds that a change waits for readers before it leaves its log beside the file."""
_WRITES = "registry_writes"
T = TypeVar("T")


def open_engine(url: str | None) -> tuple[Engine, str]:
    """An engine for `url` (`None`: SQLite at `$COE_HOME/registry.db`), and the URL without its password.

    Raises:
        StoreError: the URL is invalid, its driver is not installed, or $COE_HOME cannot be created.
    """
    try:
        parsed = make_url(url or f"sqlite:///{coe_home() / 'registry.db'}")
        if parsed.drivername == "postgres":  # as hosting providers write it
            parsed = parsed.set(drivername="postgresql")
        shown = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() != "sqlite":
            return create_engine(parsed, pool_pre_ping=True), shown
        if url is None:
            with translate_disk_full(coe_home()):
                coe_home().mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, connect_args={"timeout": _BUSY_TIMEOUT_S})
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise StoreError(
            f"no driver for {shown} is installed ({error}); for Postgres: "
            "pip install 'composition-of-experts[postgres]'"
        ) from error
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"{shown_url(url or '')!r} is not a database URL, such as sqlite:///registry.db") from error
    except OSError as error:
        raise StoreError(
            f"the folder {coe_home()} cannot be created: {error}; set COE_HOME to another folder"
        ) from error
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine, shown


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Which file a database is in. A file that replaces it has another one, under the same path."""

    path: Path
    device: int
    inode: int


def file_identity(engine: Engine) -> FileIdentity | None:
    """The file of an SQLite database; None for one in memory or on a server.

    Raises:
        StoreError: the file does not exist, or its folder may not be read.
    """
    name = engine.url.database
    if engine.dialect.name != "sqlite" or not name or name == ":memory:" or name.startswith("file:"):
        return None
    try:
        stat = Path(name).stat()
    except OSError as error:
        raise StoreError(
            f"the registry {engine.url.render_as_string(hide_password=True)} cannot be used: its file "
            f"{error.strerror.lower() if error.strerror else error}. Put it back, or register the experts again: "
            "`coe registry apply FILE`"
        ) from error
    return FileIdentity(Path(name), stat.st_dev, stat.st_ino)


def shown_url(url: str) -> str:
    """The URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return re.sub(r"//[^/]*@", "//***@", url)


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A read transaction on a consistent snapshot of the database."""
    with engine.connect() as connection:
        if engine.dialect.name != "sqlite":  # SQLite transactions do so by default
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        with connection.begin():
            yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A write transaction; on SQLite it takes the write lock at its start, so that it cannot fail to get it later."""
    with engine.connect() as connection, connection.execution_options(**{_WRITES: True}).begin():
        yield connection


def settle(engine: Engine) -> None:
    """Move what was written from the write-ahead log into the file of an SQLite database, if no reader is in the way.

    The file is then complete: it can be copied, and a file put in its place is not mixed with a log of the old one.
    """
    raw = engine.raw_connection()
    try:
        cursor = raw.cursor()
        with suppress(sqlite3.Error):  # the change is stored all the same
            cursor.execute(f"PRAGMA busy_timeout={_SETTLE_MS}")
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            cursor.execute(f"PRAGMA busy_timeout={int(_BUSY_TIMEOUT_S * 1000)}")
        cursor.close()
    finally:
        raw.close()


def with_retries(work: Callable[[], T]) -> T:
    """Retry a transaction that lost to another writer: a lock timeout, or a row or table created concurrently."""
    import stamina

    are_logged()
    caller = stamina.RetryingCaller(attempts=20, timeout=60.0, wait_initial=0.02, wait_max=0.5, wait_jitter=0.1)
    return caller(_is_contention, work)


@contextmanager
def translate_errors(shown_url: str) -> Iterator[None]:
    """Translate database errors to StoreError with the URL."""
    try:
        yield
    except DBAPIError as error:
        if "disk is full" in str(error.orig):
            raise StoreError(
                f"the registry {shown_url} cannot be written: the disk is full; nothing changed"
            ) from error
        raise StoreError(f"the registry {shown_url} cannot be used: {error.orig}") from error
    except SQLAlchemyError as error:
        raise StoreError(f"the registry {shown_url} cannot be used: {error}") from error


def _is_contention(error: Exception) -> bool:
    if isinstance(error, IntegrityError):
        return True
    message = str(error.orig).lower() if isinstance(error, DBAPIError) else ""
    return any(words in message for words in ("locked", "already exists", "deadlock", "could not serialize"))


def _prepare_sqlite(connection: sqlite3.Connection, record: object) -> None:
    """Switch to write-ahead logging, in which readers and the writer do not block each other."""
    connection.isolation_level = None  # _begin_sqlite begins transactions, not the driver
    if connection.execute("PRAGMA journal_mode").fetchone()[0] not in ("wal", "memory"):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            # Another process is switching it, or the disk is read-only: reading works in both cases.
            if not any(words in str(error) for words in ("locked", "readonly", "read-only")):
                raise


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(_WRITES) else "BEGIN")

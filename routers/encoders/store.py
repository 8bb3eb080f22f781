"""Vectors and other values by key in one SQLite file, shared by processes; damaged rows and files are discarded."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_V = TypeVar("_V")
Vector = NDArray[np.float32]
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_BUSY_TIMEOUT_S = 60.0
_KEYS_A_QUERY = 500
_CHECK_BYTES = 8
# Column names date from the first kind of value.
_SCHEMA = "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB, checksum BLOB) WITHOUT ROWID"


class Store(Generic[_V]):
    """key -> value.

    Every row has a checksum, and a row that fails it counts as absent. A file that SQLite reports as damaged or cut is
    deleted and recreated: its values can be computed again. Where the disk is full or read-only, the store logs a
    warning per call and returns nothing.

    Args:
        to_bytes, from_bytes: serialisation of a value.
    """

    def __init__(self, path: Path, to_bytes: Callable[[_V], bytes], from_bytes: Callable[[bytes], _V]) -> None:
        self.path = path
        self._to_bytes, self._from_bytes = to_bytes, from_bytes

    def get(self, keys: Sequence[bytes]) -> dict[bytes, _V]:
        """Stored and intact values of these keys."""
        if not self.path.exists():
            return {}
        nothing: dict[bytes, bytes] = {}
        found = self._guarded(lambda connection: dict(_rows(connection, list(dict.fromkeys(keys)))), default=nothing)
        return {key: self._from_bytes(data) for key, data in found.items()}

    def put(self, values: Mapping[bytes, _V]) -> None:
        """Store values, in one transaction."""
        stored = {key: self._to_bytes(value) for key, value in values.items()}
        rows = [(key, data, _checksum(key, data)) for key, data in stored.items()]
        self._guarded(lambda connection: _insert(connection, rows), default=None)

    def _guarded(self, work: Callable[[sqlite3.Connection], _T], *, default: _T) -> _T:
        for attempt in (1, 2):
            try:
                return self._run(work)
            except (sqlite3.Error, OSError) as error:
                if attempt == 1 and _is_damage(error):
                    _log.warning("the cache %s is damaged and is recreated: %s", self.path, error)
                    self._reset()
                else:
                    _log.warning("the cache %s is not used: %s", self.path, error)
                    break
        return default

    def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        # One connection per call: cheap compared with encoding, and safe across threads and forks.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S)) as connection, connection:
            connection.execute(_SCHEMA)
            return work(connection)

    def _reset(self) -> None:
        """Delete the file, unless another process has already recreated it."""
        with FileLock(f"{self.path}.lock"):
            try:
                self._run(_integrity)
            except sqlite3.Error as error:
                if not _is_damage(error):
                    raise
                self.path.unlink(missing_ok=True)
                self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)


class EmbeddingStore(Store[Vector]):
    """key -> float32 vector."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _to_bytes, _from_bytes)

    def dim(self) -> int | None:
        """Length of the stored vectors; `None` where there are none."""
        if not self.path.exists():
            return None
        return self._guarded(_dim, default=None)


def _to_bytes(vector: Vector) -> bytes:
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()


def _from_bytes(data: bytes) -> Vector:
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


def _rows(connection: sqlite3.Connection, keys: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    for start in range(0, len(keys), _KEYS_A_QUERY):
        some = keys[start : start + _KEYS_A_QUERY]
        marks = ",".join("?" * len(some))
        query = f"SELECT key, vector, checksum FROM vectors WHERE key IN ({marks})"
        for key, data, checksum in connection.execute(query, some):
            if checksum == _checksum(key, data):
                yield key, data


def _insert(connection: sqlite3.Connection, rows: list[tuple[bytes, bytes, bytes]]) -> None:
    connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)


def _dim(connection: sqlite3.Connection) -> int | None:
    row = connection.execute("SELECT key, vector, checksum FROM vectors LIMIT 1").fetchone()
    return len(row[1]) // 4 if row is not None and row[2] == _checksum(row[0], row[1]) else None


def _integrity(connection: sqlite3.Connection) -> None:
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        error = sqlite3.DatabaseError(verdict)
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


def _checksum(key: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(key + data, digest_size=_CHECK_BYTES).digest()


def _is_damage(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE

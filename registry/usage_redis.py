"""What API keys use, in Redis: for gateways on several machines, or more requests than a database takes."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, cast

from registry.errors import StoreError
from registry.keys import ApiKey, Per, What
from registry.usage import Books, Reserve, Settle, Spent, begins_of

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

TIMEOUT_S: Final = 2.0
"""Seconds for a command; a request waits no longer for its reservation than the ledger allows."""
KEEP_S: Final = 40 * 86_400
"""Seconds after which what a key has used is dropped: the longest window is a month."""
ATTEMPTS: Final = 64
"""Attempts of a transaction that loses to other writers of the same keys."""


def usage_url(variable: str) -> str:
    """The URL in an environment variable. Raises StoreError if it is not set."""
    if not (url := os.environ.get(variable, "").strip()):
        raise StoreError(
            f"the environment variable {variable} is not set: it has the URL of Redis, redis://HOST:6379/0"
        )
    return url


class RedisUsage:
    """Reserves and settles in a Redis server, as `registry.store.Registry` does in its database.

    Of each key there are two hashes: `coe:{ID}:used` (what/window/begin -> amount) and `coe:{ID}:held` (request -> what
    it reserves, and until when). A transaction reads both, decides by `Books`, and writes if nobody has written
    meanwhile (WATCH), else it is repeated. Thread-safe.

    Args:
        url: such as `redis://HOST:6379/0`, `rediss://` with TLS.

    Raises:
        StoreError: the URL is none of Redis, or the package is not installed. Nothing is sent yet.
    """

    def __init__(self, url: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        try:
            import redis
        except ModuleNotFoundError as error:
            raise StoreError("no client for Redis is installed: pip install 'composition-of-experts[redis]'") from error
        try:
            self._redis: Redis = redis.Redis.from_url(
                url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, decode_responses=True
            )
        except ValueError as error:
            raise StoreError("the usage of API keys is kept at a URL such as redis://HOST:6379/0") from error
        address = self._redis.connection_pool.connection_kwargs
        self._where = address.get("path") or f"{address.get('host', 'localhost')}:{address.get('port', 6379)}"
        self._sleep = sleep

    def __enter__(self) -> RedisUsage:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def check(self) -> None:
        """Ask the server for a sign of life. Raises StoreError."""
        with self._translated():
            self._redis.ping()

    def account(self, entries: Sequence[Reserve | Settle], now: float) -> list[Spent | None]:
        """Settle, then reserve in order: all of it, or nothing.

        Returns:
            For each entry why it is refused; None if it is not.

        Raises:
            StoreError: Redis cannot be used now.
        """
        from redis import WatchError

        keys = sorted({entry.key for entry in entries})
        with self._translated(), self._redis.pipeline() as pipe:
            for attempt in range(ATTEMPTS):
                try:
                    return self._attempt(pipe, keys, entries, now)
                except WatchError:
                    self._sleep(random.uniform(0, 1e-3 * min(2**attempt, 32)))
        raise StoreError(f"Redis at {self._where}: others write the usage of the same API keys all the time")

    def used(self, key: ApiKey, now: float) -> list[float]:
        """What a key has used of each of its limits in its window of now, without what is reserved."""
        with self._translated():
            stored = cast(Mapping[str, str], self._redis.hgetall(_used_of(key.id)))
        begins = begins_of(now)
        return [float(stored.get(_field(each.what, each.per, begins[each.per]), 0.0)) for each in key.spec.limits]

    def _attempt(
        self, pipe: Pipeline, keys: Sequence[str], entries: Sequence[Reserve | Settle], now: float
    ) -> list[Spent | None]:
        pipe.watch(*(name for key in keys for name in (_used_of(key), _held_of(key))))  # type: ignore[no-untyped-call]
        ended = {(entry.key, entry.id) for entry in entries if isinstance(entry, Settle)}
        books, past, over = Books(now, {}, {}), [], []
        for key in keys:
            past += _read_used(books, key, cast(Mapping[str, str], pipe.hgetall(_used_of(key))))
            over += _read_held(books, key, cast(Mapping[str, str], pipe.hgetall(_held_of(key))), ended)
        found = books.work(entries)
        pipe.multi()
        _write(pipe, books, past, over)
        pipe.execute()
        return found

    @contextmanager
    def _translated(self) -> Iterator[None]:
        from redis import RedisError, WatchError

        try:
            yield
        except WatchError:
            raise
        except (RedisError, OSError) as error:
            raise StoreError(f"Redis at {self._where} cannot be used: {error}") from error


def _read_used(books: Books, key: str, stored: Mapping[str, str]) -> list[tuple[str, str]]:
    """Enter what a key has used. Returns what is of past windows: (hash, field)."""
    begins, past = begins_of(books.now), []
    for name, amount in stored.items():
        what, per, at = name.split("/")
        if begins[cast(Per, per)] == int(at):
            books.used[key, cast(What, what), cast(Per, per)] = float(amount)
        elif int(at) < begins[cast(Per, per)]:
            past.append((_used_of(key), name))
    return past


def _read_held(books: Books, key: str, stored: Mapping[str, str], ended: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Enter what requests in progress reserve. Returns the reservations that are over: (hash, field)."""
    over = []
    for request, text in stored.items():
        row: dict[str, Any] = json.loads(text)
        if (key, request) in ended or row["expires_at"] <= books.now:
            over.append((_held_of(key), request))
            continue
        for what, amount in row["amounts"].items():
            books.held[key, what] = books.held.get((key, what), 0.0) + amount
    return over


def _write(pipe: Pipeline, books: Books, past: Sequence[tuple[str, str]], over: Sequence[tuple[str, str]]) -> None:
    for name, field in (*past, *over):
        pipe.hdel(name, field)
    begins, written = begins_of(books.now), set()
    for (key, what, per), amount in books.changed.items():
        pipe.hincrbyfloat(_used_of(key), _field(what, per, begins[per]), amount)
        written.add(_used_of(key))
    for entry in books.reserved:
        if entry.reserves:
            row = {"expires_at": entry.ends_at, "amounts": entry.reserves}
            pipe.hset(_held_of(entry.key), entry.id, json.dumps(row))
            written.add(_held_of(entry.key))
    for name in sorted(written):
        pipe.expire(name, KEEP_S)


def _used_of(key: str) -> str:
    return f"coe:{{{key}}}:used"


def _held_of(key: str) -> str:
    return f"coe:{{{key}}}:held"


def _field(what: What, per: Per, begins: int) -> str:
    return f"{what}/{per}/{begins}"

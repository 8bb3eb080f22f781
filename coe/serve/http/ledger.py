"""Ledger: the limits of API keys, for all gateways, in the registry's database or in Redis.

    held = await ledger.reserve(key, id, amounts, ends_at)     # raises LimitReached
    ledger.settle(held, amounts)                               # what the request has used

Every change is a transaction, since other gateways change the same rows. A process writes one at a time, `PERIOD_S`
apart, and together what has come meanwhile: a transaction takes 2 ms of CPU time, as much as the rest of a request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol

from coe.config import ServeConfig
from coe.serve.http.refusals import KeysUnavailable, LimitReached
from registry.errors import RegistryError
from registry.keys import ApiKey
from registry.store import Registry
from registry.usage import Amounts, Reserve, Settle, Spent
from registry.usage_redis import RedisUsage, usage_url

MOST_TOGETHER: Final = 256
"""Most entries of a transaction."""
MOST_UNSETTLED: Final = 100_000
"""Ended requests that wait for a database that cannot be written; of more, the oldest are lost, which is logged."""
WAIT_S: Final = 5.0
"""Seconds that a request waits for its reservation."""
RETRY_S: Final = 1.0
PERIOD_S: Final = 0.01
"""Least seconds between two transactions."""
SETTLE_S: Final = 0.1
"""Seconds that what requests have used waits for others to be written with."""
logger = logging.getLogger(__name__)


class Accounts(Protocol):
    """Where limits are kept: `registry.store.Registry` or `registry.usage_redis.RedisUsage`."""

    def account(self, entries: Sequence[Reserve | Settle], now: float) -> Sequence[Spent | None]:
        """Reserve and settle; blocks."""
        ...


def open_accounts(settings: ServeConfig, registry: str | None) -> Accounts:
    """The Redis server of `serve.usage_url_env`, or the database of the registry. Raises StoreError."""
    if settings.usage_url_env is None:
        return Registry(registry)
    return RedisUsage(usage_url(settings.usage_url_env))


class Ledger:
    """Writes reservations and settlements. Use inside one event loop.

    Args:
        accounts: opens the database; called in a thread, once.
        wall: seconds since the epoch.
    """

    def __init__(self, accounts: Callable[[], Accounts], *, wall: Callable[[], float] = time.time) -> None:
        self._open, self._wall = accounts, wall
        self._accounts: Accounts | None = None
        self._waiting: list[tuple[Reserve, asyncio.Future[Spent | None]]] = []
        self._unsettled: list[Settle] = []
        self._writing: asyncio.Task[None] | None = None
        self._asked = asyncio.Event()
        self._wrote_at = 0.0

    async def reserve(self, key: ApiKey, request: str, amounts: Amounts, ends_at: float) -> Reserve | None:
        """Reserve what a request may use; None if its key has no limits.

        Raises:
            LimitReached: with what is left, and until when.
            KeysUnavailable: the database could not be written in `WAIT_S`.
        """
        if not key.spec.limits:
            return None
        entry = Reserve(request, key.id, key.spec.limits, amounts, ends_at)
        done: asyncio.Future[Spent | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, done))
        self._asked.set()
        self._write()
        try:
            async with asyncio.timeout(WAIT_S):
                spent = await done
        except (TimeoutError, RegistryError) as error:
            self._settled(Settle(request, key.id, (), {}))  # it may be written yet
            raise KeysUnavailable("the limits of API keys cannot be read now; try again later") from error
        except asyncio.CancelledError:
            self._settled(Settle(request, key.id, (), {}))
            raise
        if spent is not None:
            raise LimitReached(str(spent), 1.0 if spent.held else max(1.0, spent.resets_at - self._wall()))
        return entry

    def settle(self, held: Reserve, amounts: Amounts) -> None:
        """Replace what a request has reserved by what it has used. Waits for nothing."""
        self._settled(Settle(held.id, held.key, held.limits, amounts))

    async def close(self) -> None:
        """Write what is left, as far as that works."""
        self._asked.set()
        if self._writing is not None:
            await asyncio.wait((self._writing,), timeout=WAIT_S)

    def _settled(self, entry: Settle) -> None:
        self._unsettled.append(entry)
        if len(self._unsettled) > MOST_UNSETTLED:
            lost = self._unsettled.pop(0)
            logger.error("what the request %s of the key %s has used is lost: too much waits", lost.id, lost.key)
        self._write()

    def _write(self) -> None:
        if self._writing is None:
            self._writing = asyncio.ensure_future(self._write_all())

    async def _write_all(self) -> None:
        try:
            while self._waiting or self._unsettled:
                await self._gather()
                settled, self._unsettled = self._unsettled[:MOST_TOGETHER], self._unsettled[MOST_TOGETHER:]
                asked, self._waiting = self._waiting[:MOST_TOGETHER], self._waiting[MOST_TOGETHER:]
                asked = [each for each in asked if not each[1].done()]  # the request has given up
                try:
                    found = await asyncio.to_thread(self._account, [*settled, *(entry for entry, _ in asked)])
                except Exception as error:
                    logger.warning("the limits of API keys cannot be written: %s", error)
                    self._unsettled = settled + self._unsettled
                    for _, done in asked:
                        if not done.done():
                            done.set_exception(error)
                    await asyncio.sleep(RETRY_S)
                    continue
                for (_, done), spent in zip(asked, found[len(settled) :], strict=True):
                    if not done.done():
                        done.set_result(spent)
        finally:
            self._writing = None

    async def _gather(self) -> None:
        """Wait for what is written together: shortly if a request waits for it."""
        if not self._waiting:
            with suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_S):
                    await self._asked.wait()
        self._asked.clear()
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, self._wrote_at + PERIOD_S - loop.time()))
        self._wrote_at = loop.time()

    def _account(self, entries: Sequence[Reserve | Settle]) -> Sequence[Spent | None]:
        if self._accounts is None:
            self._accounts = self._open()
        return self._accounts.account(entries, self._wall())

"""Core: the engine process of one expert, started again after it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, TypeVar

from coe.errors import EngineError, Scope
from coe.seam import text_of

T = TypeVar("T")
_MOST_BACKOFF_S: Final = 60.0
_HEALTHY_S: Final = 60.0
"""Seconds after which an engine that dies is no longer counted as failing in a row."""
logger = logging.getLogger(__name__)


class EngineLost(EngineError, scope=Scope.PROCESS, status=503, code="engine_lost", retryable=True):
    """The engine process of an expert died, or does not start again; another host may answer."""


class Core(Generic[T]):
    """The running engine of an expert. After its death, the next request starts another one, which all wait for.

    The n-th death in a row delays the start by 2^(n-2) seconds, at most 60. If a start fails, the requests that wait
    for it fail, and the next request tries again after the delay.

    Args:
        name: of the expert.
        start: starts an engine process.
        stop: ends one, dead or alive.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[T]],
        stop: Callable[[T], Awaitable[None]],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._name, self._start, self._stop, self._clock, self._sleep = name, start, stop, clock, sleep
        self._live: T | None = None
        self._since = 0.0
        self._deaths = 0
        self._starting: asyncio.Task[T] | None = None
        self._delay: asyncio.Future[Any] | None = None
        self._stopping: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def deaths(self) -> int:
        """Deaths and failed starts in a row."""
        return self._deaths

    @property
    def engine(self) -> T | None:
        """The running engine; None while there is none."""
        return self._live

    @property
    def problem(self) -> str | None:
        """Why requests wait or fail now; None if an engine runs, or the expert was unloaded."""
        if self._live is not None or self._closed or not self._deaths:
            return None
        if self._starting is not None:
            return f"its engine process died and starts again (failure {self._deaths} in a row)"
        return f"its engine process died (failure {self._deaths} in a row); the next request starts it again"

    async def open(self) -> T:
        """Start the first engine process. Raises what `start` raises."""
        self._live, self._since = await self._start(), self._clock()
        return self._live

    def adopt(self, engine: T) -> None:
        """Serve with a running engine that another Core has released."""
        self._live, self._since = engine, self._clock()

    def release(self) -> T | None:
        """Give the running engine away; None if there is none now. No other one starts here."""
        engine, self._live, self._closed = self._live, None, True
        return engine

    async def live(self) -> T:
        """The running engine; waits while it starts again.

        Raises:
            EngineError: the expert was unloaded.
            EngineLost: the engine does not start again.
        """
        if self._closed:
            raise EngineError(f"{self._name!r} was unloaded: load it again")
        if self._live is not None:
            return self._live
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start_again())
            self._starting.add_done_callback(_retrieved)
        return await asyncio.shield(self._starting)

    def lost(self, engine: T) -> None:
        """Note that this engine died; later calls for the same one do nothing."""
        if self._live is not engine:
            return
        self._live = None
        self._deaths = 1 if self._clock() - self._since > _HEALTHY_S else self._deaths + 1
        logger.error("expert %r: its engine process died (%d in a row)", self._name, self._deaths)
        self._retire(engine)

    async def close(self) -> None:
        """End the engine process; waits until it is gone."""
        self._closed = True
        if self._delay is not None:
            self._delay.cancel()
        if self._starting is not None:
            # A start runs in a thread and cannot be cancelled: its process would outlive it.
            await asyncio.wait([self._starting])
        if self._live is not None:
            engine, self._live = self._live, None
            self._retire(engine)
        if self._stopping:
            await asyncio.wait(set(self._stopping))

    async def _start_again(self) -> T:
        try:
            if self._deaths > 1:
                await self._wait(min(_MOST_BACKOFF_S, 2.0 ** (self._deaths - 2)))
            if self._stopping:
                await asyncio.wait(set(self._stopping))  # the memory of the dead one
            if self._closed:
                raise EngineError(f"{self._name!r} was unloaded: load it again")
            engine = await self._start()
        except Exception as error:
            if self._closed:
                raise
            self._deaths += 1
            logger.error("expert %r: its engine process does not start again: %s", self._name, text_of(error))
            raise EngineLost(
                f"the engine process of {self._name!r} died and does not start again: {text_of(error)}",
                public=f"the engine process of {self._name!r} died and does not start again",
            ) from error
        finally:
            self._starting = None
        self._live, self._since = engine, self._clock()
        return engine

    async def _wait(self, seconds: float) -> None:
        """Wait, but not after `close`."""
        self._delay = asyncio.ensure_future(self._sleep(seconds))
        try:
            await asyncio.wait({self._delay})
        finally:
            self._delay.cancel()
            self._delay = None

    def _retire(self, engine: T) -> None:
        task = asyncio.ensure_future(self._end(engine))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def _end(self, engine: T) -> None:
        try:
            await self._stop(engine)
        except Exception as error:
            logger.warning(
                "expert %r: stopping its engine process failed: %s", self._name, text_of(error), exc_info=error
            )


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Mark a failure as retrieved: the requests that wait raise it, but all of them may have been cancelled."""
    if not task.cancelled():
        task.exception()

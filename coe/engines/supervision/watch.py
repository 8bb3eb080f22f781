"""Watch: notices that the engine process of an expert is dead or hung, also while no request uses it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from coe.engines.supervision.core import Core
from coe.errors import EngineError
from coe.seam import text_of

T = TypeVar("T")
PERIOD_S: Final = 5.0
"""Seconds between two probes."""
SLOW_S: Final = 10.0
"""Seconds without a response after which the expert counts as unhealthy. A long prompt may take as long."""
DYING_S: Final = 10.0
"""Seconds that a killed process has to end."""
MOST_DEATHS: Final = 5
"""Deaths and failed starts in a row after which no process starts until a request needs it."""
logger = logging.getLogger(__name__)


class Watch(Generic[T]):
    """Probes the engine process of a Core. A dead one is started again, a hung one is killed first.

    Args:
        name: of the expert.
        probe: returns when an engine has responded; raises if it is dead.
        kill: ends an engine that does not respond.
        hung_s: seconds without a response after which a process counts as hung.
    """

    def __init__(
        self,
        name: str,
        core: Core[T],
        probe: Callable[[T], Awaitable[None]],
        kill: Callable[[T], None],
        *,
        hung_s: float,
        slow_s: float = SLOW_S,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._core, self._probe, self._kill, self._clock = name, core, probe, kill, clock
        self._hung_s, self._slow_s, self._period_s = hung_s, min(slow_s, hung_s), period_s
        self._silent_since: float | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def problem(self) -> str | None:
        """Why the expert does not answer now; None if it does."""
        if self._silent_since is not None:
            return f"its engine process has not responded for {self._clock() - self._silent_since:.0f} s"
        return self._core.problem

    def start(self) -> None:
        """Probe from now on, in the running event loop."""
        self._task = self._task or asyncio.ensure_future(self._run())

    def stop(self) -> None:
        """Probe no more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    async def step(self) -> None:
        """Probe once, and act on the result."""
        engine = self._core.engine
        if engine is None:
            await self._start_again()
            return
        probing = asyncio.ensure_future(self._probe(engine))
        try:
            await self._answer(engine, probing)
        finally:
            self._silent_since = None
            probing.cancel()
        if probing.done() and not probing.cancelled() and (error := probing.exception()) is not None:
            logger.warning("expert %r: its engine process is dead: %s", self._name, text_of(error))
            self._core.lost(engine)
            await self._start_again()

    async def _answer(self, engine: T, probing: asyncio.Future[None]) -> None:
        """Wait for a response; kill a process that does not respond in time, so that the probe fails."""
        began = self._clock()
        await asyncio.wait({probing}, timeout=self._slow_s)
        if probing.done():
            return
        self._silent_since = began
        logger.warning("expert %r: its engine process has not responded for %.0f s", self._name, self._slow_s)
        await asyncio.wait({probing}, timeout=self._hung_s - self._slow_s)
        if not probing.done() and self._core.engine is engine:
            logger.error(
                "expert %r: its engine process has not responded for %.0f s and is killed", self._name, self._hung_s
            )
            self._kill(engine)
            await asyncio.wait({probing}, timeout=DYING_S)

    async def _start_again(self) -> None:
        if self._core.deaths > MOST_DEATHS:
            return
        try:
            await self._core.live()
        except EngineError as error:  # logged by the core; requests raise it
            logger.debug("expert %r: %s", self._name, error)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            try:
                await self.step()
            except Exception:
                logger.exception("expert %r: its engine process cannot be watched", self._name)

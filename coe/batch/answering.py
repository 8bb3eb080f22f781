"""Answering a shift: the asks of one group, with as many in flight as keep the engine busy, written unit by unit."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from coe.batch.parts import answers_folder, read_asks, units_name, write_answers
from coe.batch.records import dump_outcome
from coe.batch.stages import Unit
from coe.batch.storage import Folder
from coe.compose import Ask
from coe.errors import EngineError, InvalidRequest, OutOfMemory, WeightsError
from coe.host import Host
from coe.orchestrator import Orchestrator
from coe.types import Answer, Failure

logger = logging.getLogger(__name__)
_AHEAD = 2
"""Times an expert's capacity that is asked at once: the next requests wait at the engine when one is done."""
_WINDOW = 32
"""Asks at once while the expert loads, and its capacity is not known."""


@dataclass(slots=True)
class Answered:
    """What happened since the last report of a shift, by expert."""

    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Open:
    """A unit with asks in flight: it is written when none is left."""

    unit: Unit
    records: list[dict[str, Any]]
    left: int


class Shift:
    """The work on one group of a stage.

    Args:
        report: told from time to time what was done since the last time.
    """

    def __init__(
        self, host: Host, folder: Folder, stage: int, units: Sequence[Unit], report: Callable[[Answered], None]
    ) -> None:
        self._host, self._folder, self._stage, self._units = host, folder, stage, units
        self._orchestrator = Orchestrator(host.snapshot, {}, ask=host.ask)
        self._report, self._since = report, Answered()
        self._unusable: dict[str, Exception] = {}
        self._in_flight = 0
        self._place_free = asyncio.Event()

    async def run(self) -> None:
        """Answer everything; what fails is an answer, too.

        Raises:
            RegistryError: the answers cannot be written.
        """
        before = self._host.loads
        ticker = asyncio.create_task(self._tick())
        try:
            async with asyncio.TaskGroup() as tasks, aclosing(self._read()) as units:
                async for unit, asks in units:
                    opened = _Open(unit, [{} for _ in asks], len(asks))
                    for position, (row, ask) in enumerate(asks):
                        await self._place(unit)
                        tasks.create_task(self._one(opened, position, row, ask))
        except* Exception as group:
            raise group.exceptions[0] from None  # one is enough to say; the others follow from it
        finally:
            ticker.cancel()
        self._since.loads = self._host.loads - before
        self._flush()

    async def _read(self) -> AsyncGenerator[tuple[Unit, list[tuple[int, Ask]]], None]:
        """The units that are not answered yet, each read while the one before it is answered."""
        # A worker that died may have written some of them before its work came here.
        there = await asyncio.to_thread(self._folder.names, answers_folder(self._stage))
        left = [unit for unit in self._units if units_name(unit) not in there]
        reads = (asyncio.to_thread(read_asks, self._folder, self._stage, unit) for unit in left)
        following = asyncio.ensure_future(next(reads)) if left else None
        try:
            for unit in left:
                assert following is not None  # there is one for each unit
                asks = await following
                following = asyncio.ensure_future(read) if (read := next(reads, None)) else None
                yield unit, asks
        finally:
            if following is not None:
                following.cancel()

    async def _place(self, unit: Unit) -> None:
        while self._in_flight >= self._window(unit):
            self._place_free.clear()
            await self._place_free.wait()
        self._in_flight += 1

    def _window(self, unit: Unit) -> int:
        expert = self._host.cache.peek(self._ref(unit.expert))
        return _WINDOW if expert is None else _AHEAD * expert.capacity

    async def _one(self, opened: _Open, position: int, row: int, ask: Ask) -> None:
        outcome = await self._answer(ask)
        self._in_flight -= 1
        self._place_free.set()
        self._since.done[ask.expert] += 1
        self._since.failed[ask.expert] += isinstance(outcome, Failure)
        opened.records[position] = dump_outcome(row, ask.id, outcome)
        opened.left -= 1
        if not opened.left:
            await asyncio.to_thread(write_answers, self._folder, self._stage, opened.unit, opened.records)

    async def _answer(self, ask: Ask) -> Answer | Failure:
        """The whole answer. An expert that cannot be loaded is not loaded again for each of its asks."""
        if ask.expert in self._unusable:
            return Failure(ask.expert, self._unusable[ask.expert])
        try:
            outcome = await self._orchestrator.whole(ask)
        except Exception as error:
            logger.exception("%s failed on a row", ask.expert)
            return Failure(ask.expert, EngineError(f"{ask.expert!r} failed: {type(error).__name__}: {error}"))
        if isinstance(outcome, Failure) and self._is_final(ask.expert, outcome.error):
            self._unusable[ask.expert] = outcome.error
        return outcome

    def _is_final(self, expert: str, error: Exception) -> bool:
        """Whether the error is of the expert's weights, and not of one request."""
        if isinstance(error, InvalidRequest):
            return False
        if isinstance(error, OutOfMemory):
            return self._ref(expert) not in self._host.cache.resident
        return isinstance(error, WeightsError)

    def _ref(self, expert: str) -> str:
        """What the host's cache calls the group of an expert."""
        experts = self._host.snapshot.experts
        return experts[experts[expert].residency_key].ref

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self._flush()

    def _flush(self) -> None:
        since, self._since = self._since, Answered()
        if since.done or since.loads:
            self._report(since)

"""Answers a work item: the calls of one residency, with enough in flight to keep the engine busy, written unit by unit.

Meanwhile the weights of the next work item are loaded, where memory has room for both.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from coe.batch.parts import answers_folder, read_calls, units_name, write_answers
from coe.batch.records import dump_outcome
from coe.batch.stages import Unit
from coe.compose import ExpertCall
from coe.errors import CoeError, OutOfMemory, without_refusal
from coe.host import Host
from coe.orchestrator import Orchestrator
from coe.runs.storage import Folder
from coe.types import Answer, Chunk, Failure, GenerateRequest
from registry.spec import residency_names
from registry.store import Snapshot

_AHEAD = 2
"""Calls in flight, as a multiple of an expert's capacity: when one is done, the next already waits at the engine."""
_WINDOW = 32
"""Calls in flight while the expert loads, when its capacity is not known."""


@dataclass(slots=True)
class WorkReport:
    """Work since the last report, by expert.

    Attributes:
        loads: loads of each residency, those for the next work item included.
        loaded_bytes, load_s: bytes loaded into memory, and seconds of loading, of all residencies together.
        work_s: for each residency, seconds from the moment its weights were in memory to the last answer.
    """

    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    completion_tokens: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    loaded_bytes: int = 0
    load_s: float = 0.0
    work_s: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> WorkReport:
        """From `records.plain`."""
        counts: dict[str, Any] = {
            n: Counter(value) if isinstance(value, dict) else value for n, value in record.items()
        }
        return cls(**counts)

    def __iadd__(self, other: WorkReport) -> WorkReport:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        return self


class AnsweringHost(Protocol):
    """What answers expert calls: a `coe.host.Host`, or the hosts of a running service.

    snapshot: the experts.
    """

    snapshot: Snapshot

    def ask(self, name: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generate with an expert."""
        ...

    def capacity(self, name: str) -> int | None:
        """Requests that the expert answers at once; None while that is not known."""
        ...

    def is_resident(self, name: str) -> bool:
        """Whether the weights of the expert are in memory."""
        ...

    def prefetch(self, *names: str, keep: Collection[str] = ()) -> bool:
        """Start to load experts, if there is room beside those to keep; whether it did."""
        ...


class Loads(Protocol):
    """Counts the loads of a host."""

    def add_to(self, report: WorkReport) -> None:
        """Add the loads since the last call."""
        ...


class LoadCounter:
    """What a host loaded since the last report. One for all its work items: one may load weights for the next."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loads, self._bytes, self._seconds = self._now()

    def add_to(self, report: WorkReport) -> None:
        """Add the loads since the last call."""
        loads, loaded_bytes, seconds = self._now()
        report.loads += loads - self._loads
        report.loaded_bytes += loaded_bytes - self._bytes
        report.load_s += seconds - self._seconds
        self._loads, self._bytes, self._seconds = loads, loaded_bytes, seconds

    def _now(self) -> tuple[Counter[str], int, float]:
        stats = self._host.cache.stats
        return self._host.loads, stats.bytes_loaded, stats.load_s


def _loads_of(host: AnsweringHost) -> LoadCounter:
    assert isinstance(host, Host)  # the loads of others are counted elsewhere
    return LoadCounter(host)


@dataclass(slots=True)
class OpenUnit:
    """A unit with calls in flight; it is written after the last answer."""

    unit: Unit
    records: list[dict[str, Any]]
    left: int


class Answerer:
    """Answers the units of one work item.

    Args:
        report: called every half second with the work since the last call.
        loads: the host's counter, if it answers several work items.
        following: residency of the next work item; its weights are loaded once this one's expert answers.
    """

    def __init__(
        self,
        host: AnsweringHost,
        folder: Folder,
        stage: int,
        units: Sequence[Unit],
        report: Callable[[WorkReport], None],
        *,
        loads: Loads | None = None,
        following: str | None = None,
    ) -> None:
        self._host, self._folder, self._stage, self._units = host, folder, stage, units
        self._orchestrator = Orchestrator(host.snapshot, {}, ask=self._ask)
        self._report, self._since = report, WorkReport()
        self._loads, self._following = loads or _loads_of(host), following
        self._began_s: float | None = None
        self._unusable: dict[str, Exception] = {}
        self._in_flight = 0
        self._place_free = asyncio.Event()

    async def run(self) -> None:
        """Answer everything. A failure is recorded as an answer.

        Raises:
            RegistryError: the answers cannot be written.
        """
        ticker = asyncio.create_task(self._tick())
        try:
            async with asyncio.TaskGroup() as tasks, aclosing(self._read()) as units:
                async for unit, calls in units:
                    opened = OpenUnit(unit, [{} for _ in calls], len(calls))
                    for position, (row, call) in enumerate(calls):
                        await self._place(unit)
                        tasks.create_task(self._one(opened, position, row, call))
        except* Exception as group:
            raise group.exceptions[0] from None  # the others follow from the first
        finally:
            ticker.cancel()
        if self._began_s is not None:
            seconds: Any = time.perf_counter() - self._began_s  # a Counter adds floats as well as integers
            self._since.work_s[self._units[0].residency] += seconds
        self._flush()

    async def _read(self) -> AsyncGenerator[tuple[Unit, list[tuple[int, ExpertCall]]], None]:
        """Units without answers; each is read while the one before it is answered."""
        # A worker that died may have written some of them before its work item came here.
        answered = await asyncio.to_thread(self._folder.names, answers_folder(self._stage))
        left = [unit for unit in self._units if units_name(unit) not in answered]
        reads = (asyncio.to_thread(read_calls, self._folder, self._stage, unit) for unit in left)
        following = asyncio.ensure_future(next(reads)) if left else None
        try:
            for unit in left:
                assert following is not None  # one for each unit
                calls = await following
                following = asyncio.ensure_future(read) if (read := next(reads, None)) else None
                yield unit, calls
        finally:
            if following is not None:
                following.cancel()

    async def _place(self, unit: Unit) -> None:
        while self._in_flight >= self._window(unit):
            self._place_free.clear()
            await self._place_free.wait()
        self._in_flight += 1

    def _window(self, unit: Unit) -> int:
        capacity = self._host.capacity(unit.expert)
        return _WINDOW if capacity is None else _AHEAD * capacity

    async def _ask(self, name: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """The host's answer. Its first chunk means that the expert answers; its last one has the time of the lease."""
        began = False
        async with aclosing(self._host.ask(name, replace(request, patient=True))) as chunks:
            async for chunk in chunks:
                if not began:
                    began = True
                    self._load_following()
                if chunk.timing is not None:
                    leased_s = time.perf_counter() - chunk.timing.engine_s
                    self._began_s = min(self._began_s or leased_s, leased_s)
                yield chunk

    def _load_following(self) -> None:
        """Load the next residency. Without room for it, try again when the next answer begins."""
        if self._following is None:
            return
        keep = residency_names(self._units[0].residency)
        if self._host.prefetch(*residency_names(self._following), keep=keep):
            self._following = None

    async def _one(self, opened: OpenUnit, position: int, row: int, call: ExpertCall) -> None:
        outcome = await self._answer(call)
        self._in_flight -= 1
        self._place_free.set()
        self._since.done[call.expert] += 1
        if isinstance(outcome, Failure):
            self._since.failed[call.expert] += 1
        else:
            self._since.prompt_tokens[call.expert] += outcome.usage.prompt_tokens
            self._since.completion_tokens[call.expert] += outcome.usage.completion_tokens
        opened.records[position] = dump_outcome(row, call.id, outcome)
        opened.left -= 1
        if not opened.left:
            await asyncio.to_thread(write_answers, self._folder, self._stage, opened.unit, opened.records)

    async def _answer(self, call: ExpertCall) -> Answer | Failure:
        """The whole answer. An expert that cannot be loaded is not tried again for each call."""
        if call.expert in self._unusable:
            return Failure(call.expert, self._unusable[call.expert])
        outcome = await self._orchestrator.whole(call)
        if isinstance(outcome, Failure) and isinstance(outcome.error, CoeError):
            # Whether a host still tries to load it depends on its earlier work items: results must not.
            outcome = Failure(outcome.expert, without_refusal(outcome.error))
        if isinstance(outcome, Failure) and self._is_final(call.expert, outcome.error):
            self._unusable[call.expert] = outcome.error
        return outcome

    def _is_final(self, expert: str, error: Exception) -> bool:
        """Whether all calls to the expert fail like this one. Memory for one answer is no matter of its weights."""
        if isinstance(error, OutOfMemory):
            return not self._host.is_resident(expert)
        return isinstance(error, CoeError) and error.lasting

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self._flush()

    def _flush(self) -> None:
        since, self._since = self._since, WorkReport()
        self._loads.add_to(since)
        if since != WorkReport():
            self._report(since)

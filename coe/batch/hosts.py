"""The hosts of a run on Ray: actors that live from the first stage that needs them to the end of the run.

An expert with calls in two stages is loaded once, if memory keeps it between them. Ray Data's actor pools end with each
stage, so these actors are the run's own: the process of the command gives them work items, one at a time, and reads
their reports as a stream. They are not detached: Ray ends them with the run, also where its process is killed.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import uuid
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from coe.batch.answering import Answerer, LoadCounter, WorkReport
from coe.batch.claims import Claim, Claims
from coe.batch.errors import BatchError
from coe.batch.parts import Job
from coe.batch.records import plain
from coe.batch.stages import WorkItem
from coe.hosting import open_host
from registry.spec import residency_names

_DEATH = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError, ObjectLostError)
"""What Ray raises where the process of an actor is gone: among others as its memory monitor kills it
(OutOfMemoryError), or as its node ends with a report on it (ObjectLostError)."""
_LONGEST_CAUSE = 300
"""Characters of what Ray says of a death: its own texts go on with advice on settings of Ray."""


def is_death(error: BaseException) -> bool:
    """Whether the process of a host is gone; an error that it raised (RayTaskError) is none."""
    return isinstance(error, _DEATH) and not isinstance(error, RayTaskError)


@dataclass(eq=False, slots=True)
class _Running:
    """A host's actor.

    Attributes:
        stream: of what it does: opens its host, or answers an item; None while it is free.
        is_open: whether its host is open.
        item: the number of the work item that it answers; None while it opens its host.
        held: the residencies in its memory after its last work item.
    """

    actor: Any
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    stream: Any = None
    is_open: bool = False
    item: int | None = None
    held: frozenset[str] = frozenset()


class HostPool:
    """The hosts of a run.

    A host that is not up yet gets no work, so a cluster with room for fewer hosts than the most works with those.
    Deaths are bounded, since the cause of one may kill them all. Hosts that die while they open have lost no work: they
    count by themselves, and where others are up, the pool goes on with those.

    Args:
        options: of the actors, for Ray: CPUs, GPUs, environment.
        most: hosts at once.
        most_deaths: hosts that die at work in a stage, and hosts in a row that die while they open; one more ends the
            run, or makes the pool smaller.
    """

    def __init__(self, job: Job, options: dict[str, Any], most: int, most_deaths: int) -> None:
        self._job, self._options, self._most, self._most_deaths = job, options, most, most_deaths
        self._hosts: list[_Running] = []
        self._deaths: Counter[int] = Counter()
        self._unopened = 0  # hosts in a row that died while they opened

    def answer(self, stage: int, items: Sequence[WorkItem]) -> Iterator[WorkReport]:
        """Answer the work items of a stage.

        Raises:
            BatchError: too many hosts died.
        """
        for host in [host for host in self._hosts if host.item is not None]:
            self._end(host)  # a call that was left early: its numbers of items mean others here
        claims = Claims([item[0].residency for item in items], min(self._most, len(items)))
        while True:
            while len(self._hosts) < min(self._most, len(items)):
                self._hosts.append(self._start())
            for host in self._hosts:
                if host.stream is None:
                    self._give(host, claims, stage, items)
            busy = [host for host in self._hosts if host.stream is not None]
            if all(host.item is None for host in busy) and not claims.left:
                return  # hosts that still start are for the next stage
            ready, _ = ray.wait([host.stream for host in busy], num_returns=1)
            for host in busy:
                if host.stream in ready:
                    yield from self._read(host, claims, stage)

    def close(self) -> None:
        """End all hosts, and with them what they hold and do."""
        hosts, self._hosts = self._hosts, []
        for host in hosts:
            ray.kill(host.actor)

    def _end(self, host: _Running) -> None:
        self._hosts.remove(host)
        ray.kill(host.actor)  # it may only be out of reach

    def _start(self) -> _Running:
        host = _Running(ray.remote(_HostActor).options(max_restarts=0, **self._options).remote(self._job))
        host.stream = host.actor.open.remote()
        return host

    def _give(self, host: _Running, claims: Claims, stage: int, items: Sequence[WorkItem]) -> None:
        """The next work item to a free host, if there is one."""
        others = (other.held for other in self._hosts if other is not host)
        claim: Claim | None = claims.claim(host.name, host.held, frozenset().union(*others))
        if claim is not None:
            following = None if claim.reserved is None else items[claim.reserved][0].residency
            host.item = claim.item
            host.stream = host.actor.answer.remote(stage, items[claim.item], following)

    def _read(self, host: _Running, claims: Claims, stage: int) -> Iterator[WorkReport]:
        """The next report of a host, or what follows from its end."""
        try:
            reported = ray.get(next(host.stream))
        except StopIteration:
            host.stream = host.item = None
        except Exception as error:
            if not is_death(error):
                raise
            self._end(host)
            if host.item is not None:
                claims.give_back(host.name, host.item)
            if host.is_open:
                self._count_death(stage, error)
            else:
                self._count_unopened(error)
        else:
            if not host.is_open:
                host.is_open, self._unopened = True, 0
            host.held = frozenset(reported["held"])
            if reported["work"] is not None:
                yield WorkReport.of(reported["work"])

    def _count_death(self, stage: int, error: Exception) -> None:
        self._deaths[stage] += 1
        if self._deaths[stage] > self._most_deaths:
            raise _died(f"{self._deaths[stage]} host processes died in stage {stage + 1}", error) from error

    def _count_unopened(self, error: Exception) -> None:
        self._unopened += 1
        if self._unopened <= self._most_deaths:
            return
        if not any(host.is_open for host in self._hosts):
            raise _died(f"{self._unopened} host processes in a row died while they opened", error) from error
        self._most, self._unopened = len(self._hosts), 0


def _died(what: str, error: Exception) -> BatchError:
    said = " ".join(str(error).split())[:_LONGEST_CAUSE]
    return BatchError(
        f"{what}, the last with {type(error).__name__}: {said}; check that they have memory for what they load "
        "(`host.budget`, `batch.hosts.replicas`); --resume continues"
    )


class _HostActor:
    """Answers work items. Its host lives on an event loop in a thread, between work items and stages too."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()

    def open(self) -> Iterator[dict[str, Any]]:
        """Open the host; its errors are those of this call, while one of the constructor would be a dead actor's."""
        threading.Thread(target=self._loop.run_forever, name="host", daemon=True).start()
        opened = self._stack.enter_async_context(open_host(self._job.config, self._job.snapshot))
        self._host = asyncio.run_coroutine_threadsafe(opened, self._loop).result()
        self._loads = LoadCounter(self._host)
        yield self._report(None)

    def answer(self, stage: int, item: WorkItem, following: str | None) -> Iterator[dict[str, Any]]:
        """Answer a work item; yields reports, and at the end what is in memory."""
        reports: queue.SimpleQueue[WorkReport | None] = queue.SimpleQueue()
        answerer = Answerer(
            self._host, self._job.folder, stage, item, reports.put, loads=self._loads, following=following
        )
        running = asyncio.run_coroutine_threadsafe(answerer.run(), self._loop)
        running.add_done_callback(lambda _: reports.put(None))
        while (report := reports.get()) is not None:
            yield self._report(report)
        running.result()
        yield self._report(None)

    def _report(self, work: WorkReport | None) -> dict[str, Any]:
        return {"work": None if work is None else plain(work), "held": sorted(self._held())}

    def _held(self) -> Collection[str]:
        residencies = {self._job.snapshot.residency(name) for name in self._job.snapshot.experts}
        return [each for each in residencies if all(map(self._host.is_resident, residency_names(each)))]

"""Rules of admission that a simulation compares: ours, first come first served, and CoServe's.

Each has the interface of `coe.scheduler.Scheduler`, whose ids are the indices of the requests.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from coe.memory.demand import NO_DEMAND, Demand
from coe.memory.eviction import Resident
from coe.scheduler import Residency
from coe.simulation.device import Device
from coe.simulation.workload import Machine, Workload


class Rule(Protocol):
    """Decides which requests are admitted."""

    def submit(self, residency: Residency, now_s: float) -> int:
        """A request arrives; returns its index."""
        ...

    def admit(self, now_s: float) -> Iterable[int]:
        """Requests to admit now, in order; each takes its lease before the next is read."""
        ...

    def leave(self, residency: Residency) -> None:
        """An answer has ended."""
        ...

    def loaded(self) -> None:
        """A load has ended."""
        ...

    def demand(self, name: str, now_s: float) -> Demand:
        """How much weights are wanted, for the eviction policy."""
        ...


class InOrder:
    """Admits in a fixed order; a request that has no place, or no room to load now, holds up those behind it.

    Args:
        order: indices of the requests; None: in order of arrival.
        known: whether `demand` is the position of the next use in that order, as Belady's policy needs; else nothing.
    """

    def __init__(
        self, workload: Workload, device: Device, places: int, order: Sequence[int] | None = None, *, known: bool
    ) -> None:
        self._workload, self._device, self._places = workload, device, places
        self._order = range(len(workload)) if order is None else order
        self._arrived = 0
        self._next = 0
        self._in_flight: Counter[str] = Counter()
        self._uses: dict[str, deque[int]] = {name: deque() for name in workload.bytes_of}
        if known:
            for position, index in enumerate(self._order):
                for name in self._residency(index):
                    self._uses[name].append(position)

    def submit(self, residency: Residency, now_s: float) -> int:
        """See `Rule`."""
        self._arrived += 1
        return self._arrived - 1

    def admit(self, now_s: float) -> Iterator[int]:
        """See `Rule`."""
        while self._next < len(self._order) and (index := self._order[self._next]) < self._arrived:
            residency = self._residency(index)
            full = any(self._in_flight[name] >= self._places for name in residency)
            if full or not (self._device.is_near(residency) or self._can_load(residency)):
                return
            self._in_flight.update(residency)
            self._next += 1
            yield index

    def leave(self, residency: Residency) -> None:
        """See `Rule`."""
        self._in_flight.subtract(residency)

    def loaded(self) -> None:
        """See `Rule`."""

    def demand(self, name: str, now_s: float) -> Demand:
        """See `Rule`."""
        uses = self._uses[name]
        while uses and uses[0] < self._next:
            uses.popleft()
        return Demand(float(uses[0])) if uses else NO_DEMAND

    def _can_load(self, residency: Residency) -> bool:
        return not self._device.copies and self._device.room(residency, (), drain=False) is not None

    def _residency(self, index: int) -> Residency:
        return self._workload.residencies[self._workload.wants[index]]


@dataclass(slots=True, eq=False)
class _Group:
    """Requests for one residency, which run as a batch."""

    residency: Residency
    indices: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Executor:
    """A queue of groups. `last`: the residency at its end. `left`: requests in progress. `queue_s`: expected."""

    queue: deque[_Group] = field(default_factory=deque)
    last: Residency | None = None
    left: int = 0
    queue_s: float = 0.0


class CoServe:
    """CoServe's rule, from its description: executors on one device, each with a queue of groups.

    A request joins the group of its expert that waits. Else it is a new group at the end of the queue that is shortest
    with it: `K * requests + B` seconds for each group, and those of a switch unless the group before has the same
    expert. An executor runs one group at a time, as a batch. The policy is `by_share`: the experts with the smallest
    share of all requests, known in advance, leave first.

    Differences: `K` and `B` are the means of the simulated machine, not fits to measurements.
    """

    def __init__(self, workload: Workload, device: Device, machine: Machine, *, executors: int) -> None:
        self._workload, self._device, self._places = workload, device, machine.places
        self._executors = [_Executor() for _ in range(executors)]
        self._waiting: dict[Residency, tuple[_Executor, _Group]] = {}
        self._runs: dict[Residency, deque[_Executor]] = {}
        self._arrived = 0
        requests = max(1, len(workload))
        work_s = sum(map(machine.prompt_s, workload.prompt_tokens)) + sum(map(machine.new_s, workload.new_tokens))
        self._batch_s, self._request_s = work_s / requests, work_s / requests / machine.places
        self._switch_s = machine.load_s(max(workload.bytes_of.values()))

    def submit(self, residency: Residency, now_s: float) -> int:
        """See `Rule`."""
        index, self._arrived = self._arrived, self._arrived + 1
        if residency not in self._waiting:
            executor = min(self._executors, key=lambda each: each.queue_s + self._group_s(each, residency))
            executor.queue_s += self._group_s(executor, residency)
            group = _Group(residency)
            executor.queue.append(group)
            executor.last = residency
            self._waiting[residency] = executor, group
        executor, group = self._waiting[residency]
        group.indices.append(index)
        executor.queue_s += self._request_s
        return index

    def _group_s(self, executor: _Executor, residency: Residency) -> float:
        return self._batch_s + (0.0 if executor.last == residency else self._switch_s)

    def admit(self, now_s: float) -> Iterator[int]:
        """See `Rule`."""
        for executor in self._executors:
            if executor.left or not executor.queue:
                continue
            group = executor.queue[0]
            if self._device.is_near(group.residency) or (
                not self._device.copies and self._device.room(group.residency, (), drain=False) is not None
            ):
                yield from self._start(executor, group)

    def _start(self, executor: _Executor, group: _Group) -> Sequence[int]:
        batch, group.indices = group.indices[: self._places], group.indices[self._places :]
        executor.left = len(batch)
        self._runs.setdefault(group.residency, deque()).append(executor)
        executor.queue_s -= self._request_s * len(batch)
        if not group.indices:
            executor.queue.popleft()
            del self._waiting[group.residency]
            executor.queue_s = max(0.0, executor.queue_s - self._batch_s - self._switch_s)
        return batch

    def leave(self, residency: Residency) -> None:
        """See `Rule`."""
        runs = self._runs[residency]
        runs[0].left -= 1
        if not runs[0].left:
            runs.popleft()

    def loaded(self) -> None:
        """See `Rule`."""

    def demand(self, name: str, now_s: float) -> Demand:
        """See `Rule`."""
        return Demand(per_s=self._workload.shares[name])


def by_share(evictable: Sequence[Resident]) -> Sequence[Resident]:
    """Least wanted first; names break ties."""
    return sorted(evictable, key=lambda each: (each.demand.per_s, each.name))

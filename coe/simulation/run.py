"""The events of a simulation: arrivals, ends of loads, first tokens and ends of answers, under a virtual clock.

Experts that share the compute progress at 1/k of its rate while k of them are at work. All of them then progress at one
rate, so the work done since the start is a clock of its own, and what an expert does next is due at a fixed time on it.
`coe.simulation.batch` has the work of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final

from coe.scheduler import Residency
from coe.simulation.batch import Batch
from coe.simulation.device import Device, Moves
from coe.simulation.rules import Rule
from coe.simulation.workload import Machine, Workload

_NEVER: Final = float("inf")
SHOWN_EVERY: Final = 2_000
"""Answers between two calls of `watch`."""


@dataclass(slots=True)
class Outcome:
    """What a simulated run did.

    Attributes:
        wait_s, first_s, done_s: seconds from the arrival of each request to its admission, first token and end.
        admitted: indices of the requests in order of admission.
        served: indices of the requests in the order in which they began to run.
        end_s: when the last answer ended.
    """

    wait_s: list[float]
    first_s: list[float]
    done_s: list[float]
    moves: Moves
    admitted: list[int] = field(default_factory=list)
    served: list[int] = field(default_factory=list)
    end_s: float = 0.0


class Simulation:
    """One run of a workload on a device under a rule."""

    def __init__(self, workload: Workload, machine: Machine, device: Device, rule: Rule) -> None:
        self._workload, self._machine, self._device, self._rule = workload, machine, device, rule
        device.demand = rule.demand
        zeros = [0.0] * len(workload)
        self._found = Outcome(zeros, zeros.copy(), zeros.copy(), device.moves)
        self._work_s = 0.0  # the clock of the work done
        self._working: dict[str, Batch] = {}  # experts at work, by their first weights
        self._due: list[tuple[float, int, Batch]] = []  # on the clock of the work; entries may be out of date
        self._steps = 0  # numbers of entries
        self._loads: list[tuple[float, int, list[int]]] = []  # ends of loads, and the requests that wait for them
        self._of_load: dict[tuple[str, ...], list[int]] = {}

    def run(self, watch: Callable[[int], None] = lambda done: None) -> Outcome:
        """Simulate to the end of the last answer. watch: called with the number of answers that have ended."""
        workload, found, device, due = self._workload, self._found, self._device, self._due
        arrivals, next_arrival, now_s, done = workload.at_s, 0, 0.0, 0
        while True:
            arrival_s = arrivals[next_arrival] if next_arrival < len(arrivals) else _NEVER
            load_s = self._loads[0][0] if self._loads else _NEVER
            while due and due[0][1] != due[0][2].step:
                heappop(due)
            slow = max(1, len(self._working)) if self._machine.shared else 1
            step_s = now_s + (due[0][0] - self._work_s) * slow if due else _NEVER
            before_s, now_s = now_s, min(arrival_s, load_s, step_s)
            if now_s == _NEVER:
                break
            device.now_s = now_s
            if now_s == step_s:
                self._work_s, _, batch = heappop(due)
                index, is_end = batch.take_step(self._work_s)
                if not is_end:
                    found.first_s[index] = now_s - arrivals[index]
                    self._plan_step(batch)
                    continue
                self._end(index, batch, now_s)
                done += 1
                if not done % SHOWN_EVERY:
                    watch(done)
            else:
                self._work_s += (now_s - before_s) / slow
                if now_s == load_s:
                    self._end_load()
                else:
                    self._arrive(workload.residencies[workload.wants[next_arrival]], now_s)
                    next_arrival += 1
                    continue
            self._admit(now_s)
        if done != len(workload):
            raise RuntimeError(f"{len(workload) - done} requests were never admitted: the rule of admission is wrong")
        watch(done)
        found.end_s = before_s
        return found

    def _arrive(self, residency: Residency, now_s: float) -> None:
        """A request comes; weights that must wait for their room are read ahead, as a host does."""
        self._rule.submit(residency, now_s)
        self._admit(now_s)
        if not self._device.is_near(residency):
            self._device.read_ahead(residency)

    def _admit(self, now_s: float) -> None:
        workload, found = self._workload, self._found
        for index in self._rule.admit(now_s):
            residency = workload.residencies[workload.wants[index]]
            found.admitted.append(index)
            found.wait_s[index] = now_s - workload.at_s[index]
            ready_s = self._device.lease(residency)
            if ready_s <= now_s:
                self._loaded(residency)  # it was in memory, or its load is too short for the clock
                self._begin(index, residency)
            elif (waiting := self._of_load.get(residency)) is not None:
                waiting.append(index)
            else:
                waiting = self._of_load[residency] = [index]
                heappush(self._loads, (ready_s, index, waiting))

    def _end_load(self) -> None:
        _, first, waiting = heappop(self._loads)
        residency = self._workload.residencies[self._workload.wants[first]]
        del self._of_load[residency]
        self._loaded(residency)
        for index in waiting:
            self._begin(index, residency)

    def _loaded(self, residency: Residency) -> None:
        if not all(name in self._device.resident for name in residency):
            self._device.ready(residency)
            self._rule.loaded()

    def _begin(self, index: int, residency: Residency) -> None:
        """A request joins the batch of its expert."""
        workload, machine = self._workload, self._machine
        self._found.served.append(index)
        if (batch := self._working.get(residency[0])) is None:
            batch = self._working[residency[0]] = Batch(self._work_s, machine.reading_share)
        batch.add(
            self._work_s,
            index,
            machine.prompt_s(workload.prompt_tokens[index]),
            machine.new_s(workload.new_tokens[index]),
        )
        self._plan_step(batch)

    def _plan_step(self, batch: Batch) -> None:
        self._steps += 1
        batch.step = self._steps
        heappush(self._due, (batch.due_s(), self._steps, batch))

    def _end(self, index: int, batch: Batch, now_s: float) -> None:
        workload = self._workload
        residency = workload.residencies[workload.wants[index]]
        self._found.done_s[index] = now_s - workload.at_s[index]
        if batch.is_empty:
            del self._working[residency[0]]
        else:
            self._plan_step(batch)
        self._device.release(residency)
        self._rule.leave(residency)

"""Rivals on one workload: what each loads, and how long its requests wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from coe.errors import ConfigError
from coe.memory.eviction import EvictionPolicy, look_ahead, lru
from coe.scheduler import Scheduler
from coe.simulation.bound import fewest_loads
from coe.simulation.device import Device
from coe.simulation.rules import CoServe, InOrder, Rule, by_share
from coe.simulation.run import Outcome, Simulation
from coe.simulation.workload import Machine, Workload

POLICIES: Final = ("fcfs-lru", "coserve", "ours", "belady-arrival", "belady-ours")
"""First come first served with LRU; CoServe's; ours; first come first served with Belady's policy; Belady's policy on
the order in which ours began its answers."""
EXECUTORS: Final = 2
"""Executors of CoServe on one device, at most as many as experts fit."""


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one policy.

    Attributes:
        loads, loads_bound: loads of weights; those of Belady's policy on the same order of answers (`fewest_loads`).
        bytes_moved: to the device. disk_reads, bytes_from_disk: from the disk to host memory, read ahead included.
        ttft_*: seconds from the arrival of a request to its first token; done_*: to the end of its answer.
        longest_wait_s: the longest wait for admission.
        makespan_s: from the first arrival to the end of the last answer.
        goodput_per_s: requests with their first token within the limit, by seconds of makespan.
    """

    policy: str
    requests: int
    loads: int
    loads_bound: int
    evictions: int
    bytes_moved: int
    disk_reads: int
    bytes_from_disk: int
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    done_p50_s: float
    done_p95_s: float
    longest_wait_s: float
    makespan_s: float
    goodput_per_s: float

    def document(self) -> dict[str, Any]:
        """The row as JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs policies on a machine.

    Attributes:
        aging_s, eviction: of our scheduler.
        ttft_limit_s: the limit that counts as good.
    """

    machine: Machine
    aging_s: float = 10.0
    eviction: EvictionPolicy = look_ahead
    ttft_limit_s: float = 10.0

    def rows(
        self,
        workload: Workload,
        policies: Sequence[str] = POLICIES,
        watch: Callable[[str, int], None] = lambda policy, done: None,
    ) -> list[Row]:
        """A row for each policy. watch: called with a policy and the number of answers that have ended.

        Raises:
            ConfigError: an expert does not fit the device, or a policy does not exist.
        """
        if unknown := sorted(set(policies) - set(POLICIES)):
            raise ConfigError(f"no policy {', '.join(unknown)}; there are {', '.join(POLICIES)}")
        self.machine.check(workload)
        rows: list[Row] = []
        own: Outcome | None = None
        for policy in sorted(policies, key=POLICIES.index):
            if policy == "belady-ours" and own is None:
                own = self.run(workload, "ours")
            found = self.run(workload, policy, order=own.served if own else None, watch=partial(watch, policy))
            own = found if policy == "ours" else own
            rows.append(self.row(workload, policy, found))
        return rows

    def run(
        self,
        workload: Workload,
        policy: str,
        *,
        order: Sequence[int] | None = None,
        watch: Callable[[int], None] = lambda done: None,
    ) -> Outcome:
        """Simulate one policy. order: of the answers, for `belady-ours`."""
        evicts = {"fcfs-lru": lru, "coserve": by_share, "ours": self.eviction}.get(policy, look_ahead)
        device = Device(
            self.machine.device_bytes,
            workload.bytes_of,
            load_s=self.machine.load_s,
            policy=evicts,
            host_bytes=self.machine.host_bytes,
            disk_bytes_per_s=self.machine.disk_bytes_per_s,
        )
        return Simulation(workload, self.machine, device, self._rule(workload, device, policy, order)).run(watch)

    def _rule(self, workload: Workload, device: Device, policy: str, order: Sequence[int] | None) -> Rule:
        places = self.machine.places
        if policy == "ours":
            return Scheduler(device, capacity=lambda name: places, aging_s=self.aging_s)
        if policy == "coserve":
            fit = self.machine.device_bytes // max(sum(workload.bytes_of[n] for n in r) for r in workload.residencies)
            return CoServe(workload, device, self.machine, executors=max(1, min(EXECUTORS, fit)))
        known = policy.startswith("belady")
        return InOrder(workload, device, places, order if policy == "belady-ours" else None, known=known)

    def row(self, workload: Workload, policy: str, found: Outcome) -> Row:
        """The figures of an outcome."""
        order = [workload.residencies[workload.wants[index]] for index in found.served]
        first_s, done_s = np.array(found.first_s), np.array(found.done_s)
        ttft_p50_s, ttft_p95_s, ttft_p99_s = np.quantile(first_s, [0.5, 0.95, 0.99]).tolist()
        done_p50_s, done_p95_s = np.quantile(done_s, [0.5, 0.95]).tolist()
        makespan_s = found.end_s - workload.at_s[0]
        return Row(
            policy,
            len(workload),
            len(found.moves.loads),
            fewest_loads(order, workload.bytes_of, self.machine.device_bytes),
            len(found.moves.evictions),
            found.moves.bytes_moved,
            found.moves.disk_reads,
            found.moves.bytes_from_disk,
            ttft_p50_s,
            ttft_p95_s,
            ttft_p99_s,
            done_p50_s,
            done_p95_s,
            max(found.wait_s),
            makespan_s,
            int((first_s <= self.ttft_limit_s).sum()) / makespan_s if makespan_s > 0 else 0.0,
        )

"""Calls, loads, moved bytes, cost and time of a batch, before anything runs.

A rehearsal counts the calls; sizes come from the engines, prices from the experts' specs. Rates are measured or given
(`rates`). An unknown figure is None, never a guess.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

from coe.batch.budget import Budget
from coe.batch.joint import points
from coe.batch.parts import Job
from coe.batch.planning.rates import Rates
from coe.batch.planning.rehearsal import Demand, PlannedItem, Rehearsal
from coe.batch.run import Batch, Watcher, open_input
from coe.batch.sizes import footprints, residency_bytes
from coe.config import Config
from coe.hosting import open_host
from coe.policy import AUTO
from coe.runs.folder import RunFolder
from coe.runs.storage import Folder
from registry.spec import residency_names
from registry.store import Snapshot

_POINTS = 8
"""Budgets in the table of what they buy."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a host has room for.

    Attributes:
        budget_bytes: for all weights.
        sizes: bytes of each residency, and of each expert in one; None if its files do not state it.
        pins: experts whose weights stay once loaded; they have sizes, too.
    """

    budget_bytes: int
    sizes: Mapping[str, int | None]
    pins: frozenset[str] = frozenset()

    def needed(self, *residencies: str) -> float | None:
        """Bytes of these residencies and of the pins; None where one is unknown."""
        names = self.pins.union(*map(residency_names, residencies))
        return _added(self.sizes[name] for name in names)

    def fits(self, *residencies: str) -> bool:
        """Whether these fit at once; False where a size is unknown."""
        needed = self.needed(*residencies)
        return needed is not None and needed <= self.budget_bytes

    @property
    def too_large(self) -> list[str]:
        """Residencies that never fit."""
        return [residency for residency in self.sizes if (self.needed(residency) or 0) > self.budget_bytes]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A batch in which no expert fails.

    Attributes:
        stages: the work items of each stage, in order, if all answers differ: the largest number of calls.
        fewest: the same if all answers agree: the smallest number of calls.
        errors: rows that fail before any call, by the code of their error.
        joint: the joint assignment within a budget, as JSON values, with `points`: what other budgets would buy.
    """

    rows: int
    hosts: int
    snapshot: Snapshot
    stages: Sequence[Sequence[PlannedItem]]
    fewest: Sequence[Sequence[PlannedItem]]
    errors: Mapping[str, int]
    memory: Memory
    rates: Rates
    joint: Mapping[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """All figures as JSON values; unknown ones are None."""
        stages = [self._stage(items) for items in self.stages]
        totals, least = _summed(stages), _summed([self._stage(items) for items in self.fewest])
        return {
            "rows": self.rows,
            "errors": dict(self.errors),
            "hosts": self.hosts,
            "memory": {
                "budget_bytes": self.memory.budget_bytes,
                "sizes": dict(self.memory.sizes),
                "pins": sorted(self.memory.pins),
                "too_large": self.memory.too_large,
            },
            "stages": stages,
            "totals": totals,
            "if_answers_agree": None if least == totals else least,
            "more_memory": self._more_memory(),
            "joint": self.joint,
        }

    def _more_memory(self) -> dict[str, Any] | None:
        """The plan with room for the largest residency once more; None where all fit, or sizes are unknown."""
        names = {item.residency for stage in self.stages for item in stage}
        largest = max((self.memory.sizes[name] or 0 for name in names), default=0)
        if not largest or self.memory.fits(*names) or None in (self.memory.sizes[name] for name in names):
            return None
        memory = replace(self.memory, budget_bytes=self.memory.budget_bytes + largest)
        larger = replace(self, memory=memory)
        stages = [larger._stage(items) for items in self.stages]
        return {
            "more_bytes": largest,
            **{name: _added(stage[name] for stage in stages) for name in ("loads_ahead", "seconds", "seconds_at_most")},
            "loads": sum(len(items) for items in self.stages),
        }

    def _stage(self, items: Sequence[PlannedItem]) -> dict[str, Any]:
        residencies = [item.residency for item in items]
        experts = _by_expert(items)
        records = {name: self._expert(name, demand) for name, demand in experts.items()}
        return {
            "experts": records,
            "loads": dict(Counter(residencies)),
            "loaded_bytes": _added(self.memory.sizes[residency] for residency in residencies),
            "loads_ahead": sum(map(self.memory.fits, residencies, residencies[1:])) if self.hosts == 1 else None,
            "seconds": self._seconds(items, at_most=False),
            "seconds_at_most": self._seconds(items, at_most=True),
        }

    def _expert(self, name: str, demand: Demand) -> dict[str, Any]:
        price = self.snapshot.experts[name].price
        expected = demand.tokens
        return {
            "residency": self.snapshot.residency(name),
            "calls": demand.calls,
            "too_long": demand.too_long,
            "prompt_tokens": demand.prompt_tokens,
            "tokens": expected,
            "tokens_at_most": demand.tokens_at_most,
            "cost_usd": None if price is None or expected is None else price.cost_usd(demand.prompt_tokens, expected),
            "cost_usd_at_most": price and price.cost_usd(demand.prompt_tokens, demand.tokens_at_most),
        }

    def _seconds(self, items: Sequence[PlannedItem], *, at_most: bool) -> float | None:
        """Seconds of a stage: the first free host takes the next work item, and loads ahead while it answers."""
        hosts = [(0.0, number) for number in range(self.hosts)]
        began: dict[int, tuple[float, str]] = {}
        for item in items:
            demand = item.experts.values()
            tokens = _added(each.tokens_at_most if at_most else each.tokens for each in demand)
            load_s = self.rates.load_s(self.memory.sizes[item.residency])
            work_s = self.rates.work_s(item.residency, tokens)
            if load_s is None or work_s is None:
                return None
            free, host = heapq.heappop(hosts)
            before, residency = began.get(host, (free, ""))
            if residency == item.residency:
                load_s = 0.0
            loads_from = before if residency and self.memory.fits(residency, item.residency) else free
            starts = max(free, loads_from + load_s)
            began[host] = (starts, item.residency)
            heapq.heappush(hosts, (starts + work_s, host))
        return max(free for free, _ in hosts)


def plan_batch(
    config: Config,
    *,
    source: str,
    watch: Watcher,
    model: str = AUTO,
    rates: Rates | None = None,
    budget: Budget | None = None,
) -> BatchPlan:
    """Route the input and rehearse the batch. No expert is loaded, and no file is kept.

    Args:
        source, model, budget: as in `run.run_batch`.
        rates: known speeds and lengths of answers.

    Raises:
        InputError: the input cannot be read.
        BudgetError: the rows cannot be assigned within the budget.
        ConfigError, RegistryError, RouterError: the configuration, the registry or a router is wrong.
        UnknownModel: `model` is neither a policy nor an expert.
    """
    rates = rates or Rates()
    router, found = open_input(config, source, model, watch, budget)
    joint: dict[str, Any] | None = None
    most = Rehearsal(config.batch.hosts.replicas.max, router, rates.mean_tokens)
    with TemporaryDirectory(prefix="coe-plan-") as scratch:

        def rehearse(rehearsal: Rehearsal, name: str, watch: Watcher) -> Rehearsal:
            job = Job(Folder.of(f"{scratch}/{name}"), found, config, router.snapshot, model, budget)
            run = RunFolder(job.folder, {}, [])
            Batch(job, run, rehearsal, watch).answer()
            if "assignment" in run.run:
                nonlocal joint
                joint = run.run["assignment"] | {"points": _points(job)}
            return rehearsal

        rehearse(most, "most", watch)
        several = len(most.stages) > 1  # the first stage depends on no answer
        fewest = rehearse(most.agreeing(), "fewest", _Unseen()) if several else most
    residencies = {item.residency for stage in most.stages for item in stage}
    memory = asyncio.run(_memory(config, router.snapshot, residencies))
    return BatchPlan(
        found.rows, most.hosts, router.snapshot, most.stages, fewest.stages, most.errors, memory, rates, joint
    )


def _points(job: Job) -> list[dict[str, float]]:
    """What other budgets would buy."""
    assert job.budget is not None
    sizes = residency_bytes(job.config, job.snapshot) if job.budget.load_weight else {}
    parts = [split.part for split in job.source.splits]
    return [asdict(point) for point in points(job.folder, parts, job.budget, job.snapshot, sizes, _POINTS)]


class _Unseen:
    """A watcher that shows nothing: the second rehearsal is short."""

    def phase(self, name: str, totals: Mapping[str, int]) -> None:
        """See `run.Watcher`."""

    def advance(self, name: str, done: int, failed: int = 0) -> None:
        """See `run.Watcher`."""


async def _memory(config: Config, snapshot: Snapshot, residencies: Collection[str]) -> Memory:
    pins = frozenset(key for name in config.host.pins for key in snapshot.get(name).residency_keys(snapshot.experts))
    async with open_host(config, snapshot) as host:
        sizes = footprints(host, pins.union(residencies, *map(residency_names, residencies)))
        return Memory(host.cache.budget_bytes, sizes, pins)


def _by_expert(items: Iterable[PlannedItem]) -> dict[str, Demand]:
    """The calls to each expert in all work items of a stage."""
    experts: dict[str, Demand] = {}
    for item in items:
        for name, demand in item.experts.items():
            experts[name] = experts.get(name, Demand()) + demand
    return dict(sorted(experts.items()))


_FIGURES = ("calls", "too_long", "prompt_tokens", "tokens", "tokens_at_most", "cost_usd", "cost_usd_at_most")


def _summed(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each figure summed over experts and stages; None where a summand is unknown."""
    experts = [expert for stage in stages for expert in stage["experts"].values()]
    totals = {name: _added(expert[name] for expert in experts) for name in _FIGURES}
    totals["loads"] = sum(sum(stage["loads"].values()) for stage in stages)
    return totals | {
        name: _added(stage[name] for stage in stages) for name in ("loaded_bytes", "seconds", "seconds_at_most")
    }


def _added(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    return None if None in listed else sum(value for value in listed if value is not None)

"""What a batch will ask, load and move, what it will cost and how long it will take, before anything runs.

A rehearsal (`plan_rehearsal`) says who is asked what; sizes come from the engines, prices from the experts' specs.
Rates are measured or given (`plan_rates`), and what is not known is None: nothing is guessed.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from coe.batch.parts import Job
from coe.batch.planning.rates import Rates
from coe.batch.planning.rehearsal import Demand, PlannedItem, Rehearsal
from coe.batch.run import Batch, Watcher, open_input
from coe.config import Config
from coe.errors import WeightsError
from coe.host import open_host
from coe.policy import AUTO
from coe.runs.folder import RunFolder
from coe.runs.storage import Folder
from registry.spec import residency_names
from registry.store import Snapshot


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
        """Bytes of these, and of what is pinned."""
        names = self.pins.union(*map(residency_names, residencies))
        return _added(self.sizes[name] for name in names)

    def fits(self, *residencies: str) -> bool:
        """Whether these fit at once; of unknown sizes it is not known, so not."""
        needed = self.needed(*residencies)
        return needed is not None and needed <= self.budget_bytes

    @property
    def too_large(self) -> list[str]:
        """Residencies that never fit."""
        return [residency for residency in self.sizes if (self.needed(residency) or 0) > self.budget_bytes]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A batch as it will go if no expert fails.

    Attributes:
        stages: the items of each, in their order; where answers decide what is asked next, the most that may be.
        fewest: the same if all answers agree, which is the least.
        errors: rows that nobody is asked for, by the code of their error.
    """

    rows: int
    hosts: int
    snapshot: Snapshot
    stages: Sequence[Sequence[PlannedItem]]
    fewest: Sequence[Sequence[PlannedItem]]
    errors: Mapping[str, int]
    memory: Memory
    rates: Rates

    def record(self) -> dict[str, Any]:
        """All figures, as plain values; the unknown ones are None."""
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
        }

    def _stage(self, items: Sequence[PlannedItem]) -> dict[str, Any]:
        residencies = [item.residency for item in items]
        experts = _by_expert(items)
        records = {name: self._expert(name, asked) for name, asked in experts.items()}
        return {
            "experts": records,
            "loads": dict(Counter(residencies)),
            "loaded_bytes": _added(self.memory.sizes[residency] for residency in residencies),
            "loads_ahead": sum(map(self.memory.fits, residencies, residencies[1:])) if self.hosts == 1 else None,
            "seconds": self._seconds(items, at_most=False),
            "seconds_at_most": self._seconds(items, at_most=True),
        }

    def _expert(self, name: str, asked: Demand) -> dict[str, Any]:
        price = self.snapshot.experts[name].price
        expected = asked.tokens
        return {
            "residency": self.snapshot.residency(name),
            "calls": asked.calls,
            "too_long": asked.too_long,
            "prompt_tokens": asked.prompt_tokens,
            "tokens": expected,
            "tokens_at_most": asked.tokens_at_most,
            "cost_usd": None if price is None or expected is None else price.cost_usd(asked.prompt_tokens, expected),
            "cost_usd_at_most": price and price.cost_usd(asked.prompt_tokens, asked.tokens_at_most),
        }

    def _seconds(self, items: Sequence[PlannedItem], *, at_most: bool) -> float | None:
        """How long a stage takes: who is free first takes the next item, and loads what comes next while it works."""
        hosts = [(0.0, number) for number in range(self.hosts)]
        began: dict[int, tuple[float, str]] = {}
        for item in items:
            asked = item.experts.values()
            tokens = _added(each.tokens_at_most if at_most else each.tokens for each in asked)
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
    config: Config, *, source: str, watch: Watcher, model: str = AUTO, rates: Rates | None = None
) -> BatchPlan:
    """Route the input, and see who would be asked what. No expert is loaded, and nothing is written that stays.

    Args:
        source, model: as in `run.run_batch`.
        rates: what is known of answers and speeds.

    Raises:
        InputError: the input cannot be read.
        ConfigError, RegistryError, RouterError: the configuration, the registry or a router is wrong.
        UnknownModel: `model` is neither a policy nor an expert.
    """
    rates = rates or Rates()
    router, found = open_input(config, source, model, watch)
    most = Rehearsal(config.batch.hosts.replicas.max, router, rates.mean_tokens)
    with TemporaryDirectory(prefix="coe-plan-") as scratch:

        def rehearse(rehearsal: Rehearsal, name: str, watch: Watcher) -> Rehearsal:
            job = Job(Folder.of(f"{scratch}/{name}"), found, config, router.snapshot, model)
            Batch(job, RunFolder(job.folder, {}, []), rehearsal, watch).answer()
            return rehearsal

        rehearse(most, "most", watch)
        several = len(most.stages) > 1  # what is asked first depends on no answer
        fewest = rehearse(most.agreeing(), "fewest", _Unseen()) if several else most
    residencies = {item.residency for stage in most.stages for item in stage}
    memory = asyncio.run(_memory(config, router.snapshot, residencies))
    return BatchPlan(found.rows, most.hosts, router.snapshot, most.stages, fewest.stages, most.errors, memory, rates)


class _Unseen:
    """A watcher of what takes no time worth showing."""

    def phase(self, name: str, totals: Mapping[str, int]) -> None:
        """See `run.Watcher`."""

    def advance(self, name: str, done: int, failed: int = 0) -> None:
        """See `run.Watcher`."""


async def _memory(config: Config, snapshot: Snapshot, residencies: Collection[str]) -> Memory:
    pins = frozenset(key for name in config.host.pins for key in snapshot.get(name).residency_keys(snapshot.experts))
    sizes: dict[str, int | None] = {}
    async with open_host(config, snapshot) as host:
        for residency in sorted(pins.union(residencies, *map(residency_names, residencies))):
            try:
                sizes[residency] = host.footprint(*residency_names(residency))
            except WeightsError:
                sizes[residency] = None
        return Memory(host.cache.budget_bytes, sizes, pins)


def _by_expert(items: Iterable[PlannedItem]) -> dict[str, Demand]:
    """What each expert is asked in all items of a stage."""
    experts: dict[str, Demand] = {}
    for item in items:
        for name, asked in item.experts.items():
            experts[name] = experts.get(name, Demand()) + asked
    return dict(sorted(experts.items()))


_FIGURES = ("calls", "too_long", "prompt_tokens", "tokens", "tokens_at_most", "cost_usd", "cost_usd_at_most")


def _summed(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each figure of all experts and stages; unknown where one of them is."""
    experts = [expert for stage in stages for expert in stage["experts"].values()]
    totals = {name: _added(expert[name] for expert in experts) for name in _FIGURES}
    totals["loads"] = sum(sum(stage["loads"].values()) for stage in stages)
    return totals | {
        name: _added(stage[name] for stage in stages) for name in ("loaded_bytes", "seconds", "seconds_at_most")
    }


def _added(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    return None if None in listed else sum(value for value in listed if value is not None)

"""Host: holds the weights of a process, and generates with any registered expert.

    async for chunk in host.ask("sql", request): ...

A request waits until the scheduler admits it, leases the weights that its expert needs, and generates; the engine
batches requests on the same weights. Closing the iterator at any point releases everything.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from coe.admission import AdmissionQueue
from coe.chunks import until
from coe.engines import engine_kind
from coe.engines.base import ComposedEngine, Engine, Expert
from coe.engines.checked import checked, endpoints_of, problem_of
from coe.engines.latent.asking import ask_with_peers
from coe.errors import BudgetExceeded, CoeError, Rejected, UnknownModel, Unsupported, WeightsError
from coe.expert_spans import HostSpans, host_spans
from coe.host_engines import HostEngines, needed_weights
from coe.memory import EvictionPolicy, ExpertCache, look_ahead
from coe.residents import Residents, WeightsInMemory
from coe.scheduler import Residency
from coe.seam import seam
from coe.types import Chunk, GenerateRequest, Timing
from registry.composed import changed_member
from registry.errors import UnknownExpert
from registry.spec import STAGED_ARCHITECTURES, ExpertSpec, Kind
from registry.store import Snapshot


class Host:
    """Schedules, leases and generates over a snapshot of experts. Use inside one event loop.

    Args:
        engines: by kind (`coe.engines.engine_kind`).
        locate: local path of an expert's verified files; may block (it runs in a thread).
        kind_of: the kind of engine that serves an expert.
        ttl_s: seconds without a request after which weights are unloaded whose expert states no `ttl_s`; None: never.
        most_parked: engine processes that stay without weights, for the next expert of their shape
            (`coe.engines.base.ParkingEngine`).
    """

    def __init__(
        self,
        snapshot: Snapshot,
        engines: Mapping[str, Engine],
        *,
        budget_bytes: int,
        locate: Callable[[ExpertSpec], Path],
        pins: tuple[str, ...] = (),
        aging_s: float = 10.0,
        max_waiting: int = 10_000,
        kind_of: Callable[[ExpertSpec], str] = engine_kind,
        eviction: EvictionPolicy = look_ahead,
        ttl_s: float | None = None,
        most_parked: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engines = HostEngines(engines, locate, kind_of)
        self._clock, self._pins = clock, pins
        self._needed: dict[str, tuple[ExpertSpec, ...]] = {}
        self._specs: dict[str, ExpertSpec] = {}  # of all weights ever needed, by `name@version`
        self.cache: ExpertCache[Expert] = ExpertCache(
            budget_bytes,
            new_slot=lambda ref: self._engines.new_slot(self._specs[ref], self._specs.__getitem__),
            need=lambda ref: self._engines.need(self._specs[ref]),
            policy=eviction,
            copies=_Copies(self._engines, self._specs),
            most_parked=most_parked,
            clock=clock,
        )
        self._queue = AdmissionQueue(
            self.cache,
            aging_s=aging_s,
            max_waiting=max_waiting,
            clock=clock,
            copy_engine=lambda ref: self._engines.kind_of(self._specs[ref]),
        )
        self._residents = Residents(self.cache, self._specs, wanted=lambda: self._queue.wanted, ttl_s=ttl_s)
        self.update(snapshot)

    def update(self, snapshot: Snapshot, pins: tuple[str, ...] | None = None) -> None:
        """Serve another snapshot from now on.

        Running requests finish on the weights they started with. A changed expert has a new `name@version`: its new
        weights load on the first request for it, and the old ones are evicted when the memory is needed.

        Args:
            pins: the pinned experts from now on; None: as before.

        Raises:
            UnknownModel: a pinned expert is not in it; the old snapshot and pins are kept.
        """
        pins = self._pins if pins is None else pins
        refs = frozenset(ref for name in pins for ref in _refs(needed_weights(_find(snapshot, name), snapshot)))
        self.snapshot, self._pins, self.cache.pins = snapshot, pins, refs
        self._needed = {name: needed_weights(spec, snapshot) for name, spec in snapshot.experts.items()}
        self._specs |= {each.ref: each for weights in self._needed.values() for each in weights}
        self.cache.priorities = _priorities(snapshot, self._needed)

    async def ask(self, name: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generate with the expert `name`.

        Raises:
            UnknownModel: no such expert; with close matches.
            Overloaded: too many requests are waiting.
            BudgetExceeded: its weights cannot fit the budget.
            LoadFailing: loads of its weights failed in a row, and are not tried for a while.
            WeightsError: its files are missing or not the registered ones.
            DeadlineExceeded: `request.deadline_s` passed.
            Unsupported: its engine cannot produce what `request.wants`, or serves no composed experts.
            Rejected: the expert cannot take the request.
            EngineError: the engine failed; what it raises is translated (`coe.seam`).
        """
        spec = _find(self.snapshot, name)
        self._check_served(spec, request)
        spans: HostSpans | None = None
        if spec.is_staged and request.notes is None:
            chunks = ask_with_peers(spec, request, self.ask)
        else:
            spans = host_spans(spec, request)
            chunks = self._generate(spec, request, spans)
        if request.deadline_s is not None:
            chunks = until(chunks, request.deadline_s, name)
        if spans is not None:
            chunks = spans.around(chunks)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    def too_large(self) -> dict[str, BudgetExceeded]:
        """Experts that never fit the memory of this host, by name, with the error that requests for them get."""
        found = {}
        for name, weights in self._needed.items():
            try:
                self.cache.check(_refs(weights), name)
            except BudgetExceeded as error:
                found[name] = error
            except CoeError:
                pass  # its size is unknown: its load ends with the error
        return found

    def unhealthy(self) -> dict[str, str]:
        """Experts that do not answer now, by name, with the reason (`Expert.unhealthy`, or why their loads fail).

        The host is healthy nevertheless: the requests of other experts are answered.
        """
        failing = {ref: each.error(ref).public or "" for ref, each in self.cache.failing.items()}
        reasons = failing | self._unhealthy()
        return {self._specs[ref].name: reason for ref, reason in reasons.items()}

    def endpoints(self) -> list[dict[str, Any]]:
        """The state of each endpoint of the remote experts that have been called, with the name of its expert."""
        experts = {self._specs[ref].name: self.cache.peek(ref) for ref in sorted(self.cache.resident)}
        return [{"expert": name, **each} for name, expert in experts.items() for each in endpoints_of(expert)]

    def load_s(self) -> dict[str, float]:
        """Expected seconds to load each expert now, from the loads so far by the same way; 0 if resident or loading.

        One that is resident and unhealthy takes as long as a load.
        """
        present = (self.cache.resident | self.cache.loading) - self._unhealthy().keys()
        absent = {each.ref for weights in self._needed.values() for each in weights} - present
        seconds = {ref: self._expected_load_s(ref) for ref in absent}
        return {name: sum(seconds.get(each.ref, 0.0) for each in weights) for name, weights in self._needed.items()}

    def queue_s(self) -> dict[str, float]:
        """Expected seconds that a new request for each expert waits for earlier ones, from the answers so far."""
        seconds = self._queue.queue_s(set(map(_refs, self._needed.values())))
        return {name: seconds[_refs(weights)] for name, weights in self._needed.items()}

    def answer_s(self) -> dict[str, float]:
        """Mean seconds that recent answers of each expert took in its engine; only of experts that have answered."""
        means = {name: self._queue.answer_s(_refs(weights)) for name, weights in self._needed.items()}
        return {name: seconds for name, seconds in means.items() if seconds is not None}

    def fits_free(self, name: str) -> bool:
        """Whether the expert is resident, loading, or could load now without evicting another."""
        try:
            return self.cache.fits_free(*_refs(self._weights_of(name)))
        except CoeError:
            return True  # its size is unknown: its load ends with the error

    def is_resident(self, name: str) -> bool:
        """Whether all weights that the expert needs are in memory."""
        return self.cache.resident.issuperset(_refs(self._weights_of(name)))

    def capacity(self, name: str) -> int | None:
        """Requests for the expert worth having in flight at once; None while its weights are not in memory."""
        refs = _refs(self._weights_of(name))
        return self._queue.capacity(refs) if self.cache.resident.issuperset(refs) else None

    def prefetch(self, *names: str, keep: Collection[str] = ()) -> bool:
        """Start loading experts that will be called soon; returns immediately, and leases nothing.

        Never evicts weights that are in use, that a waiting request needs, or of the experts in `keep`
        (`ExpertCache.prefetch`); without room, the engine reads them ahead if it can (`ExpertCache.read_ahead`).

        Returns:
            Whether all weights of these experts are in memory or loading.

        Raises:
            UnknownModel: no such expert; with close matches.
        """
        kept = {ref for name in keep for ref in _refs(self._weights_of(name))}
        refs = [ref for name in names for ref in _refs(self._weights_of(name))]
        begun = self.cache.prefetch(*refs, keep=self._queue.wanted | kept)
        if not begun:
            self.cache.read_ahead(*refs)
        return begun

    async def load(self, *names: str) -> tuple[str, ...]:
        """Load the weights of experts, and wait until all of them are in memory together. Nothing keeps them there.

        Those are tried, too, whose loads have failed in a row.

        Returns:
            The names of the weights: an adapter's are its base's.

        Raises:
            UnknownModel: no such expert; with close matches.
            BudgetExceeded: they cannot fit together.
            Overloaded, WeightsError, EngineError: as `ask`.
        """
        residency = tuple(sorted({ref for name in names for ref in _refs(self._weights_of(name))}))
        self.cache.retry(*residency)
        self.cache.check(residency)
        present = self.cache.resident.issuperset(residency)  # then it waits for no place among their requests
        if not present:
            await self._queue.enter(residency)
        try:
            async with self.cache.lease(*residency):
                self._queue.dispatch()
        finally:
            if not present:
                self._queue.leave(residency)
        return tuple(self._specs[ref].name for ref in residency)

    async def unload(self, *names: str, wait_s: float = 0.0) -> tuple[str, ...]:
        """Free the memory of the weights of experts, also of earlier versions; later requests load them again.

        Args:
            wait_s: seconds to wait for a moment at which no request uses them.

        Returns:
            The names of the weights that were unloaded: an adapter's are its base's.

        Raises:
            UnknownModel: no such expert; with close matches.
            InUse: they are pinned, or requests use them until `wait_s` has passed.
        """
        weights = {each.name for name in names for each in self._weights_of(name)}
        return await self._residents.unload(weights, wait_s)

    def unload_idle(self) -> tuple[str, ...]:
        """Start unloading the weights that no request has used for their `ttl_s`; return their names.

        Never those that are leased, pinned or wanted by a waiting request. Weights that their engine measures are
        counted by what they take now. To be called about once a second (`coe.hosting.open_host` does).
        """
        return self._residents.unload_idle()

    def in_memory(self) -> list[WeightsInMemory]:
        """The weights in memory or loading, by name and version."""
        return self._residents.weights()

    def footprint(self, *names: str) -> int:
        """Bytes that must be resident to answer with these experts, with their slots; a shared base counts once.

        Raises:
            UnknownModel: no such expert; with close matches.
            WeightsError: the size of one is not known.
        """
        weights = {each.ref: each for name in names for each in self._weights_of(name)}
        return sum(self._engines.need(spec).size_bytes for spec in weights.values())

    @property
    def resident(self) -> frozenset[str]:
        """Names of the experts whose weights are in memory; an adapter's are its base's."""
        return frozenset(self._specs[ref].name for ref in self.cache.resident)

    @property
    def busy(self) -> int:
        """Requests that wait or are being answered."""
        return len(self._queue) + self.answering

    @property
    def answering(self) -> int:
        """Requests that are being answered."""
        return self._queue.answering

    @property
    def in_flight(self) -> Counter[str]:
        """Requests that are being answered on each of the weights, by `name@version`."""
        return self._queue.in_flight

    @property
    def loads(self) -> Counter[str]:
        """How often each expert was loaded, by name, whatever its version."""
        by_name: Counter[str] = Counter()
        for ref, count in self.cache.stats.loads_by_name.items():
            by_name[self._specs[ref].name] += count
        return by_name

    async def aclose(self) -> None:
        """Unload every expert."""
        await self.cache.aclose()

    async def _generate(
        self, spec: ExpertSpec, request: GenerateRequest, spans: HostSpans | None
    ) -> AsyncGenerator[Chunk, None]:
        snapshot = self.snapshot  # may be replaced meanwhile
        residency = _refs(needed_weights(spec, snapshot))
        self.cache.check(
            residency, spec.name
        )  # now: what cannot load must not wait, nor have others give up their room
        submitted = self._clock()
        await self._queue.enter(residency, request.priority)
        admitted, first_s = self._clock(), None
        try:
            if spans is not None:
                spans.admitted([ref for ref in residency if ref not in self.cache.resident])
            adapters = await self._engines.adapters(spec, snapshot)
            path = await self._engines.path(spec) if spec.kind is Kind.COMPOSED and spec.source else None
            # Leased per request, not per batch: a lease costs microseconds, and a cancelled request disturbs no other.
            async with self.cache.lease(*residency, needed_by=spec.name) as experts:
                leased = self._clock()
                self._queue.loaded()
                if spans is not None:
                    request = spans.loaded(self.cache.way_in)
                expert, adapter = self._engines.expert(spec, snapshot, experts, adapters, path)
                async with aclosing(checked(spec.name, lambda: expert.generate(request, adapter))) as chunks:
                    async for chunk in chunks:
                        if first_s is None and not chunk.is_empty:
                            first_s = self._clock() - leased
                        if chunk.finish_reason is not None:
                            engine_s = self._clock() - leased
                            self._queue.note(residency, engine_s)
                            timing = Timing(admitted - submitted, leased - admitted, engine_s, first_s)
                            chunk = replace(chunk, timing=timing)
                        yield chunk
        finally:
            self._queue.leave(residency)

    def _check_served(self, spec: ExpertSpec, request: GenerateRequest) -> None:
        """Raises Unsupported or Rejected before anything is loaded or waited for."""
        served = spec if spec.kind is Kind.COMPOSED else self._needed[spec.name][0]  # an adapter by its base's engine
        with seam(spec.name):
            engine, kind = self._engines.of(served), self._engines.kind_of(served)
        if not engine.capabilities.serves(request.wants):
            raise Unsupported(f"{spec.name!r} cannot return {request.wants!r}: its engine {kind!r} does not produce it")
        if spec.kind is Kind.EMBEDDING and request.wants != "embedding":
            raise Rejected(f"{spec.name!r} is an embedding model, which generates no text: it serves /v1/embeddings")
        if spec.kind is Kind.COMPOSED and not isinstance(engine, ComposedEngine):
            raise Unsupported(f"{spec.name!r} is a composed expert, and its engine {kind!r} serves none")
        if request.notes is not None and not spec.is_staged:
            raise Rejected(
                f"{spec.name!r} reads no notes: only experts of {', '.join(sorted(STAGED_ARCHITECTURES))} do"
            )
        if reason := changed_member(spec.trained_with, self.snapshot.experts):
            raise WeightsError(f"{spec.name!r} cannot answer: {reason}")

    def _expected_load_s(self, ref: str) -> float:
        try:
            return self.cache.expected_load_s(ref)
        except CoeError:
            return 0.0  # its size is unknown: its load ends with the error

    def _weights_of(self, name: str) -> tuple[ExpertSpec, ...]:
        return self._needed[_find(self.snapshot, name).name]

    def _unhealthy(self) -> dict[str, str]:
        """Why weights in memory do not answer now, by `name@version`."""
        experts = {ref: self.cache.peek(ref) for ref in self.cache.resident}
        reasons = {ref: problem_of(expert) for ref, expert in experts.items() if expert is not None}
        return {ref: reason for ref, reason in reasons.items() if reason is not None}


class _Copies:
    """The copies in host memory that the engines keep, by `name@version`."""

    def __init__(self, engines: HostEngines, specs: Mapping[str, ExpertSpec]) -> None:
        self._engines, self._specs = engines, specs

    @property
    def budget_bytes(self) -> int:
        """Most bytes of all copies."""
        return self._engines.copy_budget_bytes()

    def holds(self, name: str) -> bool:
        """Whether there is a copy."""
        return self._engines.has_copy(self._specs[name])

    def drop(self, name: str) -> None:
        """Free a copy."""
        self._engines.drop_copy(self._specs[name])


def _find(snapshot: Snapshot, name: str) -> ExpertSpec:
    try:
        return snapshot.get(name)
    except UnknownExpert as error:
        raise UnknownModel(str(error)) from error


def _priorities(snapshot: Snapshot, needed: Mapping[str, tuple[ExpertSpec, ...]]) -> dict[str, int]:
    """The priority of weights, by `name@version`: the highest of the experts that use them."""
    highest: dict[str, int] = {}
    for name, weights in needed.items():
        for each in weights:
            priority = snapshot.experts[name].priority
            highest[each.ref] = max(highest.get(each.ref, priority), priority)
    return highest


def _refs(weights: Iterable[ExpertSpec]) -> Residency:
    return tuple(spec.ref for spec in weights)

"""Host: holds the weights of a process, and generates with any registered expert.

    async for chunk in host.ask("sql", request): ...

A request waits until the scheduler admits it, leases the weights that its expert needs, and generates; the engine
batches requests on the same weights. Closing the iterator at any point releases everything.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from coe.engines import engine_kind
from coe.engines.base import Adapter, ComposedEngine, Engine, Expert, Member, SlotEngine
from coe.engines.checked import checked, problem_of
from coe.engines.checked_slot import CheckedSlot, shape_of
from coe.engines.latent.asking import ask_with_peers
from coe.engines.slots import with_slots
from coe.errors import CoeError, DeadlineExceeded, Overloaded, Rejected, UnknownModel, Unsupported, WeightsError
from coe.memory import ExpertCache, Need
from coe.scheduler import Residency, Waiting, admit
from coe.seam import seam
from coe.types import Chunk, GenerateRequest, Timing
from registry.composed import changed_member
from registry.errors import DigestMismatch, RegistryError, UnknownExpert
from registry.spec import STAGED_ARCHITECTURES, ExpertSpec, Kind
from registry.store import Snapshot

UNLOADED_CAPACITY = 32
"""Assumed capacity of weights that are not resident yet, whose engine has not stated one."""

RECENT = 0.2
"""Weight of the latest answer in the moving average of answer times."""


@dataclass(slots=True, eq=False)
class _Job:
    """A waiting request. `residency`: the weights that must be in memory to answer it, as `name@version`."""

    id: int
    residency: Residency
    submitted_s: float
    admitted: asyncio.Future[None] = field(repr=False)


class Host:
    """Schedules, leases and generates over a snapshot of experts. Use inside one event loop.

    Args:
        engines: by kind (`coe.engines.engine_kind`).
        locate: local path of an expert's verified files; may block (it runs in a thread).
        kind_of: the kind of engine that serves an expert.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.in_flight: Counter[str] = Counter()  # requests on each of the weights, by `name@version`
        self.answering = 0
        self._engines, self._locate, self._kind_of = engines, locate, kind_of
        self._slot_engines: dict[str, SlotEngine] = {}  # the same, by kind
        self._aging_s, self._max_waiting, self._clock = aging_s, max_waiting, clock
        self._waiting: dict[int, _Job] = {}
        self._next_id = 0
        self._pins = pins
        self._answer_s: dict[Residency, float] = {}
        self._needed: dict[str, tuple[ExpertSpec, ...]] = {}
        self._specs: dict[str, ExpertSpec] = {}  # of all weights ever needed, by `name@version`
        self.cache: ExpertCache[Expert] = ExpertCache(
            budget_bytes,
            new_slot=self._new_slot,
            need=lambda ref: self._need(self._specs[ref]),
            clock=clock,
        )
        self.update(snapshot)

    def update(self, snapshot: Snapshot) -> None:
        """Serve another snapshot from now on.

        Running requests finish on the weights they started with. A changed expert has a new `name@version`: its new
        weights load on the first request for it, and the old ones are evicted when the memory is needed.

        Raises:
            UnknownModel: a pinned expert is not in it; the old snapshot is kept.
        """
        pins = frozenset(ref for name in self._pins for ref in _refs(_weights(_find(snapshot, name), snapshot)))
        self.snapshot, self.cache.pins = snapshot, pins
        self._needed = {name: _weights(spec, snapshot) for name, spec in snapshot.experts.items()}
        self._specs |= {each.ref: each for weights in self._needed.values() for each in weights}

    async def ask(self, name: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generate with the expert `name`.

        Raises:
            UnknownModel: no such expert; with close matches.
            Overloaded: too many requests are waiting.
            BudgetExceeded: its weights cannot fit the budget.
            WeightsError: its files are missing or not the registered ones.
            DeadlineExceeded: `request.deadline_s` passed.
            Unsupported: its engine cannot produce what `request.wants`, or serves no composed experts.
            Rejected: the expert cannot take the request.
            EngineError: the engine failed; what it raises is translated (`coe.seam`).
        """
        spec = _find(self.snapshot, name)
        self._check_served(spec, request)
        if spec.is_staged and request.notes is None:
            chunks = ask_with_peers(spec, request, self.ask)
        else:
            chunks = self._generate(spec, request)
        if request.deadline_s is not None:
            chunks = _until(chunks, request.deadline_s, name)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    def unhealthy(self) -> dict[str, str]:
        """Resident experts that do not answer now, by name, with the reason (`Expert.unhealthy`).

        The host is healthy nevertheless: the requests of other experts are answered.
        """
        return {self._specs[ref].name: reason for ref, reason in self._unhealthy().items()}

    def load_s(self) -> dict[str, float]:
        """Expected seconds to load each expert now, at the rate of the loads so far; 0 if resident or loading.

        One that is resident and unhealthy takes as long as a load.
        """
        stats = self.cache.stats
        rate = stats.bytes_loaded / stats.load_s if stats.bytes_loaded and stats.load_s else 1e9
        present = (self.cache.resident | self.cache.loading) - self._unhealthy().keys()
        absent = {each.ref: each for weights in self._needed.values() for each in weights if each.ref not in present}
        seconds = {ref: self._size(spec) / rate for ref, spec in absent.items()}
        return {name: sum(seconds.get(each.ref, 0.0) for each in weights) for name, weights in self._needed.items()}

    def queue_s(self) -> dict[str, float]:
        """Expected seconds that a new request for each expert waits for earlier ones, from the answers so far."""
        waiting = Counter(job.residency for job in self._waiting.values())
        seconds = {residency: self._queue_s(residency, waiting) for residency in set(map(_refs, self._needed.values()))}
        return {name: seconds[_refs(weights)] for name, weights in self._needed.items()}

    def answer_s(self) -> dict[str, float]:
        """Mean seconds that recent answers of each expert took in its engine; only of experts that have answered."""
        means = {name: self._answer_s.get(_refs(weights)) for name, weights in self._needed.items()}
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
        return min(map(self._capacity, refs)) if self.cache.resident.issuperset(refs) else None

    def prefetch(self, *names: str, keep: Collection[str] = ()) -> bool:
        """Start loading experts that will be called soon; returns immediately, and leases nothing.

        Never evicts weights that are in use, that a waiting request needs, or of the experts in `keep`
        (`ExpertCache.prefetch`).

        Returns:
            Whether all weights of these experts are in memory or loading.

        Raises:
            UnknownModel: no such expert; with close matches.
        """
        wanted = {ref for job in self._waiting.values() for ref in job.residency} | set(+self.in_flight)
        kept = {ref for name in keep for ref in _refs(self._weights_of(name))}
        refs = (ref for name in names for ref in _refs(self._weights_of(name)))
        return self.cache.prefetch(*refs, keep=wanted | kept)

    def footprint(self, *names: str) -> int:
        """Bytes that must be resident to answer with these experts, with their slots; a shared base counts once.

        Raises:
            UnknownModel: no such expert; with close matches.
            WeightsError: the size of one is not known.
        """
        weights = {each.ref: each for name in names for each in self._weights_of(name)}
        return sum(self._need(spec).size_bytes for spec in weights.values())

    @property
    def resident(self) -> frozenset[str]:
        """Names of the experts whose weights are in memory; an adapter's are its base's."""
        return frozenset(self._specs[ref].name for ref in self.cache.resident)

    @property
    def busy(self) -> int:
        """Requests that wait or are being answered."""
        return len(self._waiting) + self.answering

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

    async def _generate(self, spec: ExpertSpec, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        snapshot = self.snapshot  # may be replaced meanwhile
        residency = _refs(_weights(spec, snapshot))
        submitted = self._clock()
        await self._admission(residency)
        admitted = self._clock()
        try:
            adapters = await self._adapters(spec, snapshot)
            path = await self._path(spec) if spec.kind is Kind.COMPOSED and spec.source else None
            # Leased per request, not per batch: a lease costs microseconds, and a cancelled request disturbs no other.
            async with self.cache.lease(*residency, needed_by=spec.name) as experts:
                leased = self._clock()
                self._dispatch()  # what was "loading" may be resident now, with places to fill
                expert, adapter = self._expert(spec, snapshot, experts, adapters, path)
                async with aclosing(checked(spec.name, lambda: expert.generate(request, adapter))) as chunks:
                    async for chunk in chunks:
                        if chunk.finish_reason is not None:
                            engine_s = self._clock() - leased
                            self._note(residency, engine_s)
                            chunk = replace(chunk, timing=Timing(admitted - submitted, leased - admitted, engine_s))
                        yield chunk
        finally:
            self._take_places(residency, -1)
            self._dispatch()

    def _expert(
        self,
        spec: ExpertSpec,
        snapshot: Snapshot,
        experts: Mapping[str, Expert],
        adapters: Mapping[str, Adapter],
        path: Path | None,
    ) -> tuple[Expert, Adapter | None]:
        """What generates: the leased weights, or for a composed expert what its engine makes of its members."""
        if spec.kind is not Kind.COMPOSED:
            [expert] = experts.values()
            return expert, adapters.get(spec.name)
        members = {}
        for member in _resident_members(spec, snapshot):
            [weights] = _weights(member, snapshot)  # a member is a model, an adapter or a remote expert
            members[member.name] = Member(experts[weights.ref], adapters.get(member.name))
        with seam(spec.name):
            return cast(ComposedEngine, self._engine(spec)).compose(spec, members, path), None

    def _check_served(self, spec: ExpertSpec, request: GenerateRequest) -> None:
        """Raises Unsupported or Rejected before anything is loaded or waited for."""
        served = spec if spec.kind is Kind.COMPOSED else self._needed[spec.name][0]  # an adapter by its base's engine
        with seam(spec.name):
            engine, kind = self._engine(served), self._kind_of(served)
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

    async def _adapters(self, spec: ExpertSpec, snapshot: Snapshot) -> dict[str, Adapter]:
        """The adapters that a request uses: the expert itself, or members of a composed one."""
        parts = _resident_members(spec, snapshot) if spec.kind is Kind.COMPOSED else [spec]
        with seam(spec.name):
            return {part.name: Adapter(part, await self._path(part)) for part in parts if part.kind is Kind.ADAPTER}

    async def _admission(self, residency: Residency) -> None:
        """Wait for the scheduler. On return, the request holds a place on its weights."""
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests are waiting, which is host.max_waiting; try again later")
        job = _Job(self._next_id, residency, self._clock(), asyncio.get_running_loop().create_future())
        self._next_id += 1
        self._waiting[job.id] = job
        self._dispatch()
        try:
            await job.admitted
        except asyncio.CancelledError:
            self._waiting.pop(job.id, None)
            if not job.admitted.cancelled():  # admitted at the same moment: give the place back
                self._take_places(residency, -1)
                self._dispatch()
            raise

    def _take_places(self, residency: Residency, places: int = 1) -> None:
        self.answering += places
        for ref in residency:
            self.in_flight[ref] += places

    def _dispatch(self) -> None:
        """Admit the requests that the scheduler selects. Called after every change; cheap when nothing waits."""
        if not self._waiting:
            return
        resident = self.cache.resident
        ids = admit(
            [
                Waiting(job.id, job.residency, job.submitted_s)
                for job in self._waiting.values()
                if not job.admitted.done()
            ],
            resident=resident,
            loading={ref for ref, count in self.in_flight.items() if count and ref not in resident},
            in_flight=self.in_flight,
            capacity=self._admitted,
            loads_now=self._loads_now,
            now_s=self._clock(),
            aging_s=self._aging_s,
        )
        for job in map(self._waiting.pop, ids):
            self._take_places(job.residency)
            job.admitted.set_result(None)

    def _note(self, residency: Residency, engine_s: float) -> None:
        """Update the moving average of answer times."""
        mean = self._answer_s.get(residency, engine_s)
        self._answer_s[residency] = mean + RECENT * (engine_s - mean)

    def _queue_s(self, residency: Residency, waiting: Mapping[Residency, int]) -> float:
        """Seconds of the waiting requests that use any of the same weights."""
        rivals = (other for other in waiting if not set(other).isdisjoint(residency))
        ahead = sum(waiting[other] * self._answer_s.get(other, 0.0) for other in rivals)
        return ahead / min(map(self._capacity, residency))

    def _capacity(self, ref: str) -> int:
        expert = self.cache.peek(ref)
        return UNLOADED_CAPACITY if expert is None else expert.capacity

    def _admitted(self, ref: str) -> int:
        """Most requests that these weights are given at once."""
        ahead: int = getattr(self.cache.peek(ref), "ahead", 0)
        return self._capacity(ref) + ahead

    def _weights_of(self, name: str) -> tuple[ExpertSpec, ...]:
        return self._needed[_find(self.snapshot, name).name]

    def _unhealthy(self) -> dict[str, str]:
        """Why weights in memory do not answer now, by `name@version`."""
        experts = {ref: self.cache.peek(ref) for ref in self.cache.resident}
        reasons = {ref: problem_of(expert) for ref, expert in experts.items() if expert is not None}
        return {ref: reason for ref, reason in reasons.items() if reason is not None}

    def _new_slot(self, ref: str) -> CheckedSlot:
        """A slot of the shape of these weights."""
        spec = self._specs[ref]
        with seam(spec.name):
            engine = self._slot_engine(spec)
            return CheckedSlot(engine, shape_of(engine, spec), spec_of=self._specs.__getitem__, located=self._path)

    async def _path(self, spec: ExpertSpec) -> Path:
        """The verified files of an expert; downloads and hashes off the event loop."""
        try:
            return await asyncio.to_thread(self._locate, spec)
        except RegistryError as error:
            raise WeightsError(f"{spec.name!r} cannot be loaded: {error}", public=_for_clients(spec, error)) from error

    def _engine(self, spec: ExpertSpec) -> Engine:
        return self._engines[self._kind_of(spec)]

    def _slot_engine(self, spec: ExpertSpec) -> SlotEngine:
        kind = self._kind_of(spec)
        if kind not in self._slot_engines:
            self._slot_engines[kind] = with_slots(self._engines[kind])
        return self._slot_engines[kind]

    def _need(self, spec: ExpertSpec) -> Need:
        """What the weights take, and which slots they share."""
        with seam(spec.name):
            engine = self._slot_engine(spec)
            shape = shape_of(engine, spec)
            sizes = int(engine.footprint(spec)), int(engine.slot_bytes(shape))
            return Need((self._kind_of(spec), shape), *sizes, slots=int(engine.slots_per_shape))

    def _size(self, spec: ExpertSpec) -> int:
        """Bytes of the weights for estimates; 0 if the engine fails to state them: the expert's load has the error."""
        try:
            return self._need(spec).weight_bytes
        except CoeError:
            return 0

    def _loads_now(self, residency: Residency, keep: Collection[str]) -> bool:
        """Whether the weights could load now; so too if their size is unknown, since their load ends with the error."""
        try:
            return self.cache.fits_now(*residency, keep=keep)
        except CoeError:
            return True


def _for_clients(spec: ExpertSpec, error: RegistryError) -> str:
    """Why an expert has no files, without paths of this machine."""
    if isinstance(error, DigestMismatch):
        some = "; ".join(error.differences[:3]) + ("; ..." if len(error.differences) > 3 else "")
        return f"expert {spec.name!r} cannot answer: its files are not the registered ones ({some})"
    return f"expert {spec.name!r} cannot answer: its files are missing or cannot be read"


def _find(snapshot: Snapshot, name: str) -> ExpertSpec:
    try:
        return snapshot.get(name)
    except UnknownExpert as error:
        raise UnknownModel(str(error)) from error


def _weights(spec: ExpertSpec, snapshot: Snapshot) -> tuple[ExpertSpec, ...]:
    """The experts whose weights `spec` needs in memory (itself, its base, or its members'), in order of their names."""
    return tuple(snapshot.experts[name] for name in sorted(spec.residency_keys(snapshot.experts)))


def _resident_members(spec: ExpertSpec, snapshot: Snapshot) -> list[ExpertSpec]:
    """The members of a composed expert that are in memory together."""
    return [snapshot.experts[name] for name in spec.resident_members]


def _refs(weights: Iterable[ExpertSpec]) -> Residency:
    return tuple(spec.ref for spec in weights)


async def _until(chunks: AsyncGenerator[Chunk, None], deadline_s: float, name: str) -> AsyncGenerator[Chunk, None]:
    """The same chunks, until the deadline passes."""
    ends = asyncio.get_running_loop().time() + deadline_s
    async with aclosing(chunks):
        while True:
            try:
                async with asyncio.timeout_at(ends) as deadline:  # `wait_for` would make a task for every chunk
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if not deadline.expired():
                    raise
                raise DeadlineExceeded(f"{name!r} did not finish within {deadline_s:g} s") from None
            yield chunk

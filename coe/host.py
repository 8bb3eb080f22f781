"""Host: the one thing in a process that holds weights and answers for any registered expert.

    async for chunk in host.ask("sql", request): ...

A request waits until the scheduler admits it, leases what must be resident, and generates; the engine batches what runs
on the same weights. Closing the iterator at any point gives everything back.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from coe.config import Config
from coe.engines import create_engine, engine_kind
from coe.engines.base import Adapter, Engine, Expert
from coe.errors import DeadlineExceeded, Overloaded, UnknownModel, WeightsError
from coe.experts import locate, open_snapshot
from coe.memory import ExpertCache
from coe.scheduler import Waiting, admit
from coe.types import Chunk, GenerateRequest, Timing
from registry.errors import RegistryError, UnknownExpert
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

UNLOADED_CAPACITY = 32
"""Requests admitted at once to an expert that is not resident yet, whose real capacity is not known."""

FREE_SHARE = 0.8
"""Share of the free memory that weights may take where no budget is stated."""

WITHOUT_WEIGHTS = frozenset({"fake", "remote"})
"""Engines that need no memory for weights."""

RECENT = 0.2
"""Weight of the latest answer in the mean time that answers take."""


@dataclass(slots=True, eq=False)
class _Job:
    """A request that waits. `residency` is what must be resident to answer it, as `name@version`."""

    id: int
    residency: str
    submitted_s: float
    admitted: asyncio.Future[None] = field(repr=False)


class Host:
    """Schedules, leases and generates over a snapshot of experts. Use inside one event loop.

    Args:
        engines: engine of each kind (`coe.engines.ENGINES`).
        locate: local path of an expert's verified files; may block (it runs in a thread).
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.in_flight: Counter[str] = Counter()
        self._engines, self._locate = engines, locate
        self._aging_s, self._max_waiting, self._clock = aging_s, max_waiting, clock
        self._waiting: dict[int, _Job] = {}
        self._next_id = 0
        self._pins = pins
        self._answer_s: dict[str, float] = {}
        self._residencies: dict[str, ExpertSpec] = {}
        self.cache: ExpertCache[Expert] = ExpertCache(
            budget_bytes,
            load=self._load,
            unload=self._unload,
            footprint=lambda residency: self._footprint(self._residencies[residency]),
            clock=clock,
        )
        self.update(snapshot)

    def update(self, snapshot: Snapshot) -> None:
        """Serve another snapshot from now on.

        Requests under way end on what they began with. An expert that changed is another one: its new weights load
        when they are first asked for, and the old ones leave when the room is needed.

        Raises:
            UnknownModel: a pinned expert is not in it; the old snapshot stays.
        """
        pins = frozenset(_residency(_find(snapshot, name), snapshot) for name in self._pins)
        self.snapshot, self.cache.pins = snapshot, pins
        self._residencies |= {
            base.ref: base for base in (snapshot.experts[s.residency_key] for s in snapshot.experts.values())
        }

    async def ask(self, name: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generate with the expert `name`.

        Raises:
            UnknownModel: no such expert; with close matches.
            Overloaded: too many requests wait already.
            OutOfMemory: its weights cannot fit the budget.
            WeightsError: its files are missing or not those that were registered.
            DeadlineExceeded: `request.deadline_s` passed.
            EngineError, InvalidRequest: as the engine says.
        """
        spec = _find(self.snapshot, name)
        if request.deadline_s is None:
            chunks = self._generate(spec, request)
        else:
            chunks = _until(self._generate(spec, request), request.deadline_s, name)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    def load_s(self) -> dict[str, float]:
        """Expected seconds to load each expert now: zero where its weights are there, or on their way; else by the
        rate seen so far."""
        stats = self.cache.stats
        rate = stats.bytes_loaded / stats.load_s if stats.bytes_loaded and stats.load_s else 1e9
        present = self.cache.resident | self.cache.loading
        bases = {spec.residency_key for spec in self.snapshot.experts.values()}
        seconds = {
            name: 0.0 if base.ref in present else self._footprint(base) / rate
            for name, base in ((name, self.snapshot.experts[name]) for name in bases)
        }
        return {name: seconds[spec.residency_key] for name, spec in self.snapshot.experts.items()}

    def queue_s(self) -> dict[str, float]:
        """Expected seconds that a request for each expert would wait for those before it, by the answers so far."""
        waiting = Counter(job.residency for job in self._waiting.values())
        residencies = {name: _residency(spec, self.snapshot) for name, spec in self.snapshot.experts.items()}
        return {
            name: waiting[residency] * self._answer_s.get(residency, 0.0) / self._capacity(residency)
            for name, residency in residencies.items()
        }

    def fits_free(self, name: str) -> bool:
        """Whether the expert is there, or could load now without evicting another."""
        base = self.snapshot.experts[_find(self.snapshot, name).residency_key]
        present = base.ref in self.cache.resident | self.cache.loading
        return present or self.cache.used_bytes + self._footprint(base) <= self.cache.budget_bytes

    def prefetch(self, name: str, *, keep: Collection[str] = ()) -> bool:
        """Begin to load an expert that will be asked soon, beside what is used, waited for, or named in `keep`.

        Returns at once, and holds nothing: see `ExpertCache.prefetch`.

        Returns:
            Whether its weights are there now, or on their way.

        Raises:
            UnknownModel: no such expert; with close matches.
        """
        wanted = {job.residency for job in self._waiting.values()} | set(+self.in_flight)
        kept = {_residency(_find(self.snapshot, each), self.snapshot) for each in keep}
        return self.cache.prefetch(_residency(_find(self.snapshot, name), self.snapshot), keep=wanted | kept)

    def footprint(self, name: str) -> int:
        """Bytes that must be resident to ask an expert; an adapter's are its base's.

        Raises:
            UnknownModel: no such expert; with close matches.
            WeightsError: its size is not known.
        """
        return self._footprint(self.snapshot.experts[_find(self.snapshot, name).residency_key])

    @property
    def resident(self) -> frozenset[str]:
        """Names of the experts whose weights are in memory; an adapter's are its base's."""
        return frozenset(self._residencies[residency].name for residency in self.cache.resident)

    @property
    def busy(self) -> int:
        """Requests that wait or are being answered."""
        return len(self._waiting) + self.in_flight.total()

    @property
    def loads(self) -> Counter[str]:
        """How often each expert was loaded, by name, whatever its version."""
        by_name: Counter[str] = Counter()
        for residency, count in self.cache.stats.loads_by_name.items():
            by_name[self._residencies[residency].name] += count
        return by_name

    async def aclose(self) -> None:
        """Unload every expert."""
        await self.cache.aclose()

    async def _generate(self, spec: ExpertSpec, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        residency = _residency(spec, self.snapshot)
        submitted = self._clock()
        await self._admission(residency)
        admitted = self._clock()
        try:
            adapter = await self._adapter(spec)
            async with self.cache.lease(residency) as experts:
                leased = self._clock()
                self._dispatch()  # what was "loading" may be resident now, with places to fill
                chunks = cast(AsyncGenerator[Chunk, None], experts[residency].generate(request, adapter))
                async with aclosing(chunks):
                    async for chunk in chunks:
                        if chunk.finish_reason is not None:
                            engine_s = self._clock() - leased
                            self._note(residency, engine_s)
                            chunk = replace(chunk, timing=Timing(admitted - submitted, leased - admitted, engine_s))
                        yield chunk
        finally:
            self.in_flight[residency] -= 1
            self._dispatch()

    async def _admission(self, residency: str) -> None:
        """Wait for the scheduler. When this returns, a place of the residency is ours."""
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait already (host.max_waiting); try again later")
        job = _Job(self._next_id, residency, self._clock(), asyncio.get_running_loop().create_future())
        self._next_id += 1
        self._waiting[job.id] = job
        self._dispatch()
        try:
            await job.admitted
        except asyncio.CancelledError:
            self._waiting.pop(job.id, None)
            if not job.admitted.cancelled():  # admitted in the same instant: hand the place back
                self.in_flight[residency] -= 1
                self._dispatch()
            raise

    def _dispatch(self) -> None:
        """Admit what the scheduler says. Called whenever something changed; cheap when nothing waits."""
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
            loading={residency for residency, count in self.in_flight.items() if count and residency not in resident},
            in_flight=self.in_flight,
            capacity=self._capacity,
            loads_now=lambda residency, keep: self.cache.fits_now(residency, keep=keep),
            now_s=self._clock(),
            aging_s=self._aging_s,
        )
        for job in map(self._waiting.pop, ids):
            self.in_flight[job.residency] += 1
            job.admitted.set_result(None)

    def _note(self, residency: str, engine_s: float) -> None:
        """Keep the mean time of answers, the latest counting most."""
        mean = self._answer_s.get(residency, engine_s)
        self._answer_s[residency] = mean + RECENT * (engine_s - mean)

    def _capacity(self, residency: str) -> int:
        expert = self.cache.peek(residency)
        return UNLOADED_CAPACITY if expert is None else expert.capacity

    async def _adapter(self, spec: ExpertSpec) -> Adapter | None:
        return Adapter(spec, await self._path(spec)) if spec.kind is Kind.ADAPTER else None

    async def _load(self, residency: str) -> Expert:
        spec = self._residencies[residency]
        return await self._engine(spec).load(spec, await self._path(spec))

    async def _unload(self, expert: Expert) -> None:
        await self._engine(expert.spec).unload(expert)

    async def _path(self, spec: ExpertSpec) -> Path:
        """Where the files are, as registered: hashing and downloading happen off the event loop."""
        try:
            return await asyncio.to_thread(self._locate, spec)
        except RegistryError as error:
            raise WeightsError(f"{spec.name!r} cannot be loaded: {error}") from error

    def _engine(self, spec: ExpertSpec) -> Engine:
        return self._engines[engine_kind(spec)]

    def _footprint(self, spec: ExpertSpec) -> int:
        return self._engine(spec).footprint(spec)


def _find(snapshot: Snapshot, name: str) -> ExpertSpec:
    try:
        return snapshot.get(name)
    except UnknownExpert as error:
        raise UnknownModel(str(error)) from error


def _residency(spec: ExpertSpec, snapshot: Snapshot) -> str:
    """What must be resident to answer with `spec`: its base, or itself, in the version of the snapshot."""
    return snapshot.experts[spec.residency_key].ref


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


@asynccontextmanager
async def open_host(config: Config, snapshot: Snapshot | None = None) -> AsyncIterator[Host]:
    """A Host over `snapshot`, or over the experts that `config` names; everything is unloaded at the end."""
    if snapshot is None:
        snapshot = await asyncio.to_thread(open_snapshot, config)
    kinds = {engine_kind(spec) for spec in snapshot.experts.values()}
    engines = _Engines(config)
    for kind in sorted(kinds):
        engines[kind]  # now, so that a wrong configuration is refused at the start
    host = Host(
        snapshot,
        engines,
        budget_bytes=await asyncio.to_thread(budget_bytes, config, kinds),
        locate=locate,
        pins=config.host.pins,
        aging_s=config.host.aging_s,
        max_waiting=config.host.max_waiting,
    )
    try:
        yield host
    finally:
        await host.aclose()


class _Engines(dict[str, Engine]):
    """The engines of a configuration, each made when it is first needed: a later snapshot may need another kind."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config

    def __missing__(self, kind: str) -> Engine:
        self[kind] = engine = create_engine(kind, **engine_options(self._config, kind))
        return engine


async def update_host(host: Host, config: Config, snapshot: Snapshot) -> None:
    """`host.update`, and memory for weights where the first ones come with this snapshot.

    A host that began without any was given none, unless the configuration states a budget.
    """
    if not host.cache.budget_bytes:
        kinds = {engine_kind(spec) for spec in snapshot.experts.values()}
        host.cache.budget_bytes = await asyncio.to_thread(budget_bytes, config, kinds)
    host.update(snapshot)


def engine_options(config: Config, kind: str) -> dict[str, Any]:
    """The engine's section of the configuration, as its constructor's arguments."""
    return config.engines.settings(kind)


def budget_bytes(config: Config, kinds: Collection[str]) -> int:
    """The stated budget, else most of what is free: the rest is for key-value caches and activations."""
    if config.host.budget is not None or WITHOUT_WEIGHTS.issuperset(kinds):
        return int(config.host.budget or 0)
    from coe.engines.hf.load import choose_device, free_bytes

    return int(FREE_SHARE * free_bytes(choose_device(config.engines.hf.device)))

"""ExpertHost: one process that holds weights, as a Ray Serve replica around a `coe.host.Host`."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from coe.chunks import Joined, merged, whole_chunk
from coe.config import Config, HostPoolConfig
from coe.errors import CoeError, NotServedHere
from coe.host import Host
from coe.hosting import open_host, update_host
from coe.serve.cluster.catalog import Catalog, pins_of, pools_by_expert, serving
from coe.serve.cluster.link import LinkServer
from coe.serve.cluster.observing import attributed, log_to_serve, observe, process_name
from coe.serve.cluster.scaling import IN_FLIGHT
from coe.types import Chunk, GenerateRequest
from registry.store import Snapshot

FASTEST_S: Final = 0.025
SLOWEST_S: Final = 0.25
CHUNKS_PER_S: Final = 500
"""Most chunks a host sends per second over all answers, since each costs a message between processes. See `pace`."""
LINK_SLOWEST_S: Final = 0.08
LINK_CHUNKS_PER_S: Final = 5000
"""The same over links, where a message costs a tenth."""
GRACE_S: Final = 3.5
"""Seconds that calls over links have when a host stops; Serve kills it after `application.GRACE_S`."""
_NOTHING: Final = Chunk("")
CATCH_UP_S: Final = 10.0
"""Seconds a request waits for the catalog it was routed with, if the gateway received that first."""

Piece = Chunk | CoeError
log = logging.getLogger("ray.serve")


class ExpertHost:
    """One replica of a pool. Gateways call `stream` and `whole`.

    Errors cross processes as values: they are part of the protocol, and Ray would wrap and log exceptions. So an
    exception at the gateway is either a bug or Ray's report that this process is gone.

    Args:
        config: engines and host settings; fixed for the life of the process.
        pool: the configured pool this host belongs to.
    """

    def __init__(self, config: Config, pool: HostPoolConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._pool, self._clock = config, pool, clock
        self._end_traces = observe(config.serve, "host")
        self._exit = AsyncExitStack()  # never closed: the process ends with its weights
        self._host: Host | None = None
        self._generation = 0
        self._catalog: Catalog | None = None  # of that generation
        self._pools_of: dict[str, list[str]] = {}  # by that catalog, once it is needed
        self._loading: asyncio.Future[None] | None = None  # of pinned experts that this host has got meanwhile
        self._changed = asyncio.Condition()
        self._links: LinkServer | None = None
        self._calls: dict[str, Counter[str]] = {}  # gateway -> residency -> its calls, waiting or in progress
        self.loaded_s: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    async def reconfigure(self, document: Mapping[str, Any]) -> None:
        """Serve the experts of a new catalog, and load its pinned ones: the first catalog's before it returns.

        Experts that other pools have taken over stay known, since gateways may still send requests that they routed by
        the catalog before; their weights leave when the memory is needed.
        """
        catalog = Catalog.from_json(document)
        config, pool = catalog.config(self._config), catalog.pool(self._pool)
        own = own_config(config, pool, catalog.snapshot)
        host = self._host
        if host is not None and pool.experts is not None:
            former = (name for name in host.snapshot if name in catalog.snapshot)
            pool = pool.model_copy(update={"experts": (*pool.experts, *former)})
        snapshot = serving(catalog.snapshot, pool)
        if host is None:
            log_to_serve(("coe",))
            host = await self._exit.enter_async_context(open_host(own, snapshot, clock=self._clock))
            self._host = host
            await self._load_pinned(host)
        else:
            await update_host(host, own, snapshot)
            pinned = {ref.partition("@")[0] for ref in host.cache.pins}
            self.failed = {name: reason for name, reason in self.failed.items() if name in pinned}
            self._loading = asyncio.ensure_future(self._load_pinned(host))
        async with self._changed:
            self._generation, self._catalog, self._pools_of = catalog.generation, catalog, {}
            self._changed.notify_all()
        if self._links is None and (folder := session_folder()) is not None:
            await self._listen(folder / "coe")
        log.info("catalog %d: %d experts", catalog.generation, len(snapshot))

    async def _listen(self, folder: Path) -> None:
        """Accept links in a folder of sockets. Without them gateways call through Serve."""
        links = LinkServer(folder / f"{uuid4().hex[:16]}.sock", self.answer)
        try:
            await links.start()
        except OSError as error:
            log.warning("no links to this host, its calls cost more: %s", error)
        else:
            self._links = links

    async def answer(
        self, stream: bool, expert: str, request: GenerateRequest, generation: int, call: str
    ) -> AsyncGenerator[Piece, None]:
        """`stream` or `whole`, for a link."""
        if not stream:
            yield await self.whole(expert, request, generation, call)
            return
        pieces = self.stream(expert, request, generation, call, LINK_CHUNKS_PER_S, LINK_SLOWEST_S)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def stream(
        self,
        expert: str,
        request: GenerateRequest,
        generation: int,
        call: str = "",
        per_s: float = CHUNKS_PER_S,
        slowest_s: float = SLOWEST_S,
    ) -> AsyncGenerator[Piece, None]:
        """The answer in chunks as they are generated; an error is the last piece.

        Args:
            call: `placement.Call.id`.
            per_s, slowest_s: as for `pace`.
        """
        with self._counted(expert, call), attributed(request):
            try:
                host = await self._at(generation, expert)
                every_s = partial(_pace_of, host, per_s, slowest_s)
                async with aclosing(coalesce(host.ask(expert, request), every_s)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except CoeError as error:
                yield error

    async def whole(self, expert: str, request: GenerateRequest, generation: int, call: str = "") -> Piece:
        """The whole answer as one chunk, or the error. `call`: `placement.Call.id`."""
        joined = Joined()
        try:
            with self._counted(expert, call), attributed(request):
                host = await self._at(generation, expert)
                async with aclosing(host.ask(expert, request)) as chunks:
                    async for chunk in chunks:
                        joined.add(chunk)
        except CoeError as error:
            return error
        return replace(whole_chunk(joined.answer(expert, chunk)), value=chunk.value)

    async def load(self, names: Sequence[str], generation: int) -> dict[str, Any] | CoeError:
        """Load experts together (`Host.load`): the pool and the names of the weights, or the error."""
        try:
            host = await self._at(generation, *names)
            return {"pool": self._pool.name, "loaded": await host.load(*names)}
        except CoeError as error:
            return error

    async def unload(self, names: Sequence[str], wait_s: float, generation: int) -> dict[str, Any] | CoeError:
        """Unload experts (`Host.unload`): the pool and the names of the weights that were in memory, or the error."""
        try:
            host = await self._at(generation, *names)
            return {"pool": self._pool.name, "unloaded": await host.unload(*names, wait_s=wait_s)}
        except CoeError as error:
            return error

    async def state(self) -> dict[str, Any]:
        """The state of this host, for `/health`, metrics and status lines."""
        host = self._started()
        return {
            "pool": self._pool.name,
            "process": process_name(),
            "generation": self._generation,
            "resident": sorted(host.resident),
            "loaded_s": self.loaded_s,
            "failed": self.failed,
            "unhealthy": host.unhealthy(),
            "weights": [each.document() for each in host.in_memory()],
            "endpoints": host.endpoints(),
            "loads": dict(host.loads),
            "used_bytes": host.cache.used_bytes,
            "budget_bytes": host.cache.budget_bytes,
            "copies": {
                "experts": sorted(host.cache.copied),
                "used_bytes": host.cache.copied_bytes,
                "budget_bytes": host.cache.copies_budget_bytes,
            },
            "busy": host.busy,
            "gpus": _gpus(),
        }

    async def record_routing_stats(self) -> dict[str, Any]:
        """The state that placement reads (`coe.serve.cluster.placement.HostStatus`). Serve calls it twice a second.

        It awaits nothing, but must be async: Serve calls a plain function in a thread, beside the loop that changes the
        host.
        """
        host = self._host
        if host is None:
            return {}
        experts = host.snapshot.experts
        any_of = {spec.residency(experts): name for name, spec in experts.items()}
        load_s, queue_s, answer_s = host.load_s(), host.queue_s(), host.answer_s()
        places = {residency: host.capacity(name) for residency, name in any_of.items()}
        return {
            "load_s": {residency: load_s[name] for residency, name in any_of.items()},
            "queue_s": {residency: queue_s[name] for residency, name in any_of.items() if queue_s[name]},
            "tight": [residency for residency, name in any_of.items() if load_s[name] and not host.fits_free(name)],
            "busy": host.busy,
            "places": {residency: count for residency, count in places.items() if count is not None},
            "answer_s": {residency: answer_s[name] for residency, name in any_of.items() if name in answer_s},
            "calls": {gateway: dict(calls) for gateway, calls in self._calls.items()},
            "address": "" if self._links is None else str(self._links.path),
            "weights": {
                each.ref: {"state": each.state, "size_bytes": each.size_bytes, "unload_in_s": each.unload_in_s}
                for each in host.in_memory()
                if each.state != "failing"
            },
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The calls waiting or in progress, for `coe.serve.cluster.scaling`."""
        return {IN_FLIGHT: float(sum(sum(calls.values()) for calls in self._calls.values()))}

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls it before it ends this process, and awaits what it returns: the end of links and traces."""
        links, self._links = getattr(self, "_links", None), None
        end, self._end_traces = getattr(self, "_end_traces", None), None
        return None if links is None and end is None else _ended(links, end)

    def check_health(self) -> None:
        """Serve's health check: a process that responds is healthy.

        An expert that fails, or whose engine process starts again, must not take the others with it: `state` names it,
        and reports to gateways count it as not loaded, so that other hosts take its requests.
        """

    @contextmanager
    def _counted(self, expert: str, call: str) -> Iterator[None]:
        """Count a call of a gateway from its arrival to its end, so that the gateway knows it in reports."""
        gateway = call.partition("/")[0]
        host = self._host
        residency = host.snapshot.residency(expert) if host is not None and expert in host.snapshot else expert
        calls = self._calls.setdefault(gateway, Counter())
        calls[residency] += 1
        try:
            yield
        finally:
            calls[residency] -= 1
            if not calls[residency]:
                del calls[residency]
            if not calls and self._calls.get(gateway) is calls:
                del self._calls[gateway]

    async def _at(self, generation: int, *names: str) -> Host:
        """The host, once it has the catalog that a request was routed with.

        Raises:
            NotServedHere: it does not know one of the experts `names`, and has another catalog than that, in which
                the expert may be served.
        """
        if self._generation < generation:
            async with self._changed:
                known = self._changed.wait_for(lambda: self._generation >= generation)
                try:
                    await asyncio.wait_for(known, CATCH_UP_S)
                except TimeoutError:
                    log.warning("catalog %d has not arrived; answering with %d", generation, self._generation)
        host = self._started()
        for name in names:
            if name not in host.snapshot:
                self._check_gone(name, generation)
        return host

    def _check_gone(self, name: str, generation: int) -> None:
        """Raises NotServedHere unless an expert that this host does not know is served nowhere.

        A host that has started after the expert had left its pool gets requests of gateways with the catalog before.
        """
        if self._generation < generation:
            raise NotServedHere(
                f"a host of the pool {self._pool.name!r} has not got the change that brings it {name!r}; retry the "
                "request",
                generation=self._generation,
            )
        if self._generation > generation and self._catalog is not None and name in self._catalog.snapshot:
            self._pools_of = self._pools_of or pools_by_expert(self._catalog, self._config.serve.pools)
            raise NotServedHere(
                f"{name!r} has moved from the pool {self._pool.name!r} to other hosts; retry the request",
                generation=self._generation,
                pools=tuple(self._pools_of[name]),
            )

    def _started(self) -> Host:
        assert self._host is not None  # Serve sends nothing before `reconfigure` has returned
        return self._host

    async def _load_pinned(self, host: Host) -> None:
        """Load the pinned experts that are not in memory, and log the seconds of each.

        One that cannot be loaded is recorded, and fails its own requests: `coe serve` refuses to start with it, but a
        host that restarts later must serve the others.
        """
        for ref in sorted(host.cache.pins.difference(host.cache.resident)):
            name, started = ref.partition("@")[0], self._clock()
            try:
                async with host.cache.lease(ref):
                    self.loaded_s[name] = round(self._clock() - started, 3)
            except CoeError as error:
                self.failed[name] = str(error)
                log.error("%s is pinned and cannot be loaded: %s", name, error)
            else:
                self.failed.pop(name, None)
                log.info("%s loaded in %.2f s", name, self.loaded_s[name])


async def _ended(links: LinkServer | None, end_traces: Callable[[], None] | None) -> None:
    if links is not None:
        await links.close(GRACE_S)
    if end_traces is not None:
        await asyncio.to_thread(end_traces)


def _gpus() -> list[str]:
    """The GPUs that Ray, or the environment, has assigned to this process; empty if nothing is assigned."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def own_config(config: Config, pool: HostPoolConfig, snapshot: Snapshot) -> Config:
    """The configuration of a host: its pool overrides the `host` section; pins are those of `pins_of`.

    snapshot: all experts of the service.
    """
    pins = pins_of(config, pool, snapshot)
    budget = pool.budget if pool.budget is not None else config.host.budget
    return config.model_copy(update={"host": config.host.model_copy(update={"budget": budget, "pins": pins})})


def session_folder() -> Path | None:
    """The folder of this process's Ray for its sockets and logs; None outside Ray Serve."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        serve.get_replica_context()
    except RayServeException:
        return None
    return Path(ray._private.worker._global_node.get_session_dir_path())  # type: ignore[attr-defined]


def pace(answers: int, per_s: float = CHUNKS_PER_S, slowest_s: float = SLOWEST_S) -> float:
    """Seconds between the chunks of a stream while a host streams `answers`, for at most `per_s` chunks in all.

    Args:
        slowest_s: most seconds, however many answers there are.
    """
    return min(max(FASTEST_S, answers / per_s), slowest_s)


def _pace_of(host: Host, per_s: float, slowest_s: float) -> float:
    return pace(host.answering, per_s, slowest_s)


async def coalesce(chunks: AsyncGenerator[Chunk, None], every_s: Callable[[], float]) -> AsyncGenerator[Chunk, None]:
    """The same answer in fewer chunks: the first and last at once; no text is held back longer than `every_s()`."""
    clock = asyncio.get_running_loop().time
    held, sent_at = _NOTHING, float("-inf")
    coming: asyncio.Future[Chunk | None] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(chunks, None))
            if not held.is_empty:
                await asyncio.wait({coming}, timeout=max(0.0, sent_at + every_s() - clock()))
            if not (held.is_empty or coming.done()):
                yield held
                held, sent_at = _NOTHING, clock()
                continue
            chunk, coming = await coming, None
            if chunk is None:
                return
            held = merged(held, chunk)
            if chunk.finish_reason is not None or clock() - sent_at >= every_s():
                yield held
                held, sent_at = _NOTHING, clock()
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await chunks.aclose()

"""ExpertHost: one process that holds weights, as a Ray Serve replica around a `coe.host.Host`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any, Final

from coe.config import Config, HostPoolConfig
from coe.errors import CoeError
from coe.host import Host, open_host, update_host
from coe.serve.cluster.catalog import Catalog, serving
from coe.types import Chunk, GenerateRequest
from registry.store import Snapshot

FASTEST_S: Final = 0.025
SLOWEST_S: Final = 0.25
CHUNKS_PER_S: Final = 500
"""Of a host, over all its answers: each chunk costs a trip between processes. See `pace`."""
CATCH_UP_S: Final = 10.0
"""How long a request waits for the catalog that it was routed by, when the gateway heard of it first."""

Piece = Chunk | CoeError
log = logging.getLogger("ray.serve")


class ExpertHost:
    """What a gateway calls: `stream` and `whole` for answers.

    Errors are sent as values: they are part of the protocol, and Ray would wrap and log them. What is raised is a bug,
    or Ray's own word that this process is gone.

    Args:
        config: engines and host settings; fixed for the life of the process.
        pool: which of the configuration's pools of expert hosts this one belongs to.
    """

    def __init__(self, config: Config, pool: HostPoolConfig) -> None:
        self._config, self._pool = config, pool
        self._exit = AsyncExitStack()  # never closed: the weights go with the process
        self._host: Host | None = None
        self._generation = 0
        self._changed = asyncio.Condition()
        self.loaded_s: dict[str, float] = {}

    async def reconfigure(self, document: Mapping[str, Any]) -> None:
        """Serve the experts of a catalog from now on; the first one also loads the pinned ones."""
        catalog = Catalog.from_json(document)
        snapshot = serving(catalog.snapshot, self._pool)
        if self._host is None:
            self._host = await self._exit.enter_async_context(
                open_host(own_config(self._config, self._pool, snapshot), snapshot)
            )
            await self._load_pinned(self._host)
        else:
            await update_host(self._host, self._config, snapshot)
        async with self._changed:
            self._generation = catalog.generation
            self._changed.notify_all()
        log.info("catalog %d: %d experts", catalog.generation, len(snapshot))

    async def stream(self, expert: str, request: GenerateRequest, generation: int) -> AsyncGenerator[Piece, None]:
        """The answer in chunks as they come; an error is the last piece."""
        try:
            host = await self._at(generation)
            async with aclosing(coalesce(host.ask(expert, request), lambda: pace(host.in_flight.total()))) as chunks:
                async for chunk in chunks:
                    yield chunk
        except CoeError as error:
            yield error

    async def whole(self, expert: str, request: GenerateRequest, generation: int) -> Piece:
        """The whole answer as one chunk, or the error."""
        text = ""
        try:
            host = await self._at(generation)
            async with aclosing(host.ask(expert, request)) as chunks:
                async for chunk in chunks:
                    text += chunk.text
        except CoeError as error:
            return error
        return replace(chunk, text=text)

    async def state(self) -> dict[str, Any]:
        """What there is to say of this host: for people, `/health` and the metrics."""
        host = self._started()
        return {
            "pool": self._pool.name,
            "generation": self._generation,
            "resident": sorted(host.resident),
            "loaded_s": self.loaded_s,
            "loads": dict(host.loads),
            "used_bytes": host.cache.used_bytes,
            "budget_bytes": host.cache.budget_bytes,
            "busy": host.busy,
        }

    async def record_routing_stats(self) -> dict[str, Any]:
        """What placement needs, by pool (see `coe.serve.cluster.placement.HostView`); Serve calls it twice a second.

        It awaits nothing: Serve would call a plain function in a thread, beside the loop that changes the host.
        """
        host = self._host
        if host is None:
            return {}
        bases = {spec.residency_key for spec in host.snapshot.experts.values()}
        load_s, queue_s = host.load_s(), host.queue_s()
        return {
            "load_s": {base: load_s[base] for base in bases},
            "queue_s": {base: queue_s[base] for base in bases if queue_s[base]},
            "tight": [base for base in bases if load_s[base] and not host.fits_free(base)],
            "busy": host.busy,
        }

    def check_health(self) -> None:
        """Serve's probe: a process that answers is well; an expert that fails says so to who asks it."""

    async def _at(self, generation: int) -> Host:
        """The host, as soon as it knows the catalog that a request was routed by."""
        if self._generation < generation:
            async with self._changed:
                known = self._changed.wait_for(lambda: self._generation >= generation)
                try:
                    await asyncio.wait_for(known, CATCH_UP_S)
                except TimeoutError:
                    log.warning("catalog %d has not come; answering by %d", generation, self._generation)
        return self._started()

    def _started(self) -> Host:
        assert self._host is not None  # Serve sends nothing before `reconfigure` has returned
        return self._host

    async def _load_pinned(self, host: Host) -> None:
        """Bring in the experts that are to stay, so that the first request need not wait; say how long each took."""
        for name in sorted(host.cache.pins):
            started = time.perf_counter()
            async with host.cache.lease(name):
                self.loaded_s[name.partition("@")[0]] = round(time.perf_counter() - started, 3)
            log.info("%s loaded in %.2f s", name, self.loaded_s[name.partition("@")[0]])


def own_config(config: Config, pool: HostPoolConfig, snapshot: Snapshot) -> Config:
    """The configuration of a host: what its pool says goes before the `host` section, whose pins it may not serve."""
    pins = pool.pins if pool.pins is not None else tuple(name for name in config.host.pins if name in snapshot)
    budget = pool.budget if pool.budget is not None else config.host.budget
    return config.model_copy(update={"host": config.host.model_copy(update={"budget": budget, "pins": pins})})


def pace(answers: int) -> float:
    """Seconds between the chunks of a stream while a host gives so many answers."""
    return min(max(FASTEST_S, answers / CHUNKS_PER_S), SLOWEST_S)


async def coalesce(chunks: AsyncGenerator[Chunk, None], every_s: Callable[[], float]) -> AsyncGenerator[Chunk, None]:
    """The same text in fewer chunks: the first and the last at once, and no text is held for more than `every_s()`."""
    clock = asyncio.get_running_loop().time
    text, sent_at = "", float("-inf")
    coming: asyncio.Future[Chunk | None] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(chunks, None))
            if text:
                await asyncio.wait({coming}, timeout=max(0.0, sent_at + every_s() - clock()))
            if text and not coming.done():
                yield Chunk(text)
                text, sent_at = "", clock()
                continue
            chunk, coming = await coming, None
            if chunk is None:
                return
            text += chunk.text
            if chunk.finish_reason is not None or clock() - sent_at >= every_s():
                yield replace(chunk, text=text)
                text, sent_at = "", clock()
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await chunks.aclose()

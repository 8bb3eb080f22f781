"""CommandExpert: an expert behind a server of its own, which is started again when it dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coe.engines.base import Adapter
from coe.engines.command.server import Server, started
from coe.engines.remote.attempts import RetrySettings
from coe.engines.remote.client import open_client
from coe.engines.remote.endpoints import EndpointPool
from coe.engines.remote.engine import RemoteExpert
from coe.engines.supervision.core import Core, EngineLost
from coe.engines.supervision.watch import Watch
from coe.errors import EngineError, HostLost
from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec

_DYING_S: Final = 1.0
"""Seconds after a failed answer in which the end of the server's process is its reason."""
_PROBE_S: Final = 1.0
"""Seconds between two health checks of a server that did not answer the one before."""


@dataclass(slots=True, eq=False)
class Running:
    """A running server and its client. `n_chunks`: pieces of answers so far, a sign of life beside health checks."""

    server: Server
    client: RemoteExpert
    n_chunks: int = 0


class CommandExpert:
    """Answers of the server that the command of an expert starts.

    Args:
        folder: in which the command runs.
        environ: of the server, beside its `env`.
        retry: timeouts of calls; nothing is retried.
        hung_s: seconds without an answer to a health check after which the server is killed.
        on_measured: called with the most bytes that its processes have taken, in a thread, whenever that grows.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        folder: Path,
        environ: Mapping[str, str],
        *,
        key: str,
        secrets: tuple[str, ...],
        retry: RetrySettings,
        hung_s: float,
        on_measured: Callable[[int], None],
    ) -> None:
        assert spec.server is not None
        self.spec, self.capacity = spec, spec.server.capacity
        self._folder, self._environ, self._key, self._secrets, self._retry = folder, environ, key, secrets, retry
        self._measure, self._memory_bytes, self._closing = spec.server.measure, 0, False
        self._on_measured = on_measured
        self._core: Core[Running] = Core(spec.name, self._start, _stop)
        self._watch: Watch[Running] = Watch(spec.name, self._core, self._probe, _kill, hung_s=hung_s)

    async def open(self) -> None:
        """Start the server and wait until it is ready. Raises WeightsError."""
        running = await self._core.open()
        await self._look_at_memory(running)
        self._watch.start()

    async def close(self) -> None:
        """Stop the server and wait until it is gone; running answers end with an error."""
        self._closing = True
        self._watch.stop()
        if (running := self._core.engine) is not None:
            await self._look_at_memory(running)
        await self._core.close()

    def unhealthy(self) -> str | None:
        """Why it does not answer now, such as that its server starts again; None if it does."""
        running = self._core.engine
        if running is not None and (status := running.server.exit_status) is not None:
            return f"its server has ended (exit status {status}); the next request starts it again"
        return self._watch.problem

    def memory_bytes(self) -> int | None:
        """The most that its processes have taken so far; None if it is not measured."""
        return self._memory_bytes or None

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """Yield the server's answer; see `coe.engines.remote.engine.RemoteExpert.generate`.

        A server that has died since is started before.

        Raises:
            EngineLost: the server died before its first text, or does not start again.
            HostLost: it died after that.
            RemoteError, Rejected, InvalidRequest: as a remote expert.
        """
        if (ended := self._core.engine) is not None and ended.server.exit_status is not None:
            self._core.lost(ended)
        running, shown = await self._core.live(), False
        try:
            async with aclosing(running.client.generate(request, adapter)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    running.n_chunks += 1
                    shown = shown or not chunk.is_empty
                    yield chunk
        except EngineError as error:
            if not await _has_ended(running.server):
                raise
            self._core.lost(running)
            raise await self._died(running.server, shown=shown) from error

    async def _died(self, server: Server, *, shown: bool) -> EngineError:
        how = await asyncio.to_thread(server.ended)
        public = f"the server of {self.spec.name!r} died while it answered; retry the request"
        return (HostLost if shown else EngineLost)(f"the server of {self.spec.name!r} {how}", public=public)

    async def _start(self) -> Running:
        server = await started(self.spec, self._folder, self._environ, unless=lambda: self._closing)
        client = open_client(server.url, self._key, timeout_s=self._retry.timeout_s, connect_s=self._retry.connect_s)
        pool = EndpointPool.of_one(self.spec, client, self.capacity, self._secrets)
        return Running(server, RemoteExpert(self.spec, pool, self._retry))

    async def _probe(self, running: Running) -> None:
        """Return when the server has answered a health check or sent a piece of an answer. Raises if it has ended."""
        before = running.n_chunks
        while not await running.server.is_ready() and running.n_chunks == before:
            if running.server.exit_status is not None:
                raise EngineError(await asyncio.to_thread(running.server.ended))
            await asyncio.sleep(_PROBE_S)
        await self._look_at_memory(running)

    async def _look_at_memory(self, running: Running) -> None:
        """Note what the processes take; the most so far is kept for later loads."""
        if not self._measure:
            return
        memory_bytes = await asyncio.to_thread(running.server.memory_bytes)
        if memory_bytes > self._memory_bytes:
            self._memory_bytes = memory_bytes
            await asyncio.to_thread(self._on_measured, memory_bytes)


async def _stop(running: Running) -> None:
    await running.client.close()
    await running.server.stop()


def _kill(running: Running) -> None:
    running.server.kill()


async def _has_ended(server: Server) -> bool:
    """Whether the server has ended; a connection may break a moment before its process is gone."""
    for _ in range(int(_DYING_S / 0.05)):
        if server.exit_status is not None:
            return True
        await asyncio.sleep(0.05)
    return False

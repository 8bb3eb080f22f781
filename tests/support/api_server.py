"""A gateway's API on a real socket, in the test's own event loop, over a host with fake experts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai
import uvicorn

from coe.config import ServeConfig
from coe.engines.fake import FakeEngine
from coe.host import Host
from coe.orchestrator import Orchestrator
from coe.policy import Policy
from coe.protocol.residence import residence_body
from coe.serve.http.api import build_api
from coe.serve.http.finished import Finished
from coe.serve.http.service import Service
from registry.spec import ExpertSpec, Kind, Price
from registry.store import Snapshot
from routers.base import Estimate, Query
from routers.decision import Utility


def expert(name: str, source: str = "fake://echo", kind: Kind = Kind.MODEL, **fields: Any) -> ExpertSpec:
    return ExpertSpec(name=name, kind=kind, source=source, **fields)


PRICE = Price(input_usd_per_mtok=1, output_usd_per_mtok=2)
EXPERTS = (
    expert("echo"),
    expert("upper", "fake://upper", price=PRICE, tags=frozenset({"loud"})),
    expert("short", context_length=16),
    expert("broken", "fake://fail"),
    expert("half", "fake://fail?after=2"),
    expert("unloadable", "fake://fail?at=load"),
)


@dataclass
class Words:
    """A router that chooses the expert named in the query, or the first one."""

    experts: tuple[str, ...]
    requires: frozenset[str] = frozenset()

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        if any("break the router" in query.text for query in queries):
            raise ZeroDivisionError("a secret of the router")
        rows = [
            [0.9 if name in q.text.split() else 0.5 - j / 100 for j, name in enumerate(self.experts)] for q in queries
        ]
        return Estimate(self.experts, np.array(rows))


@dataclass
class Log:
    """The record of each request."""

    lines: list[Finished] = field(default_factory=list)

    def write(self, finished: Finished) -> None:
        self.lines.append(finished)

    async def ended(self, count: int) -> list[Finished]:
        """Wait until so many requests have ended."""
        async with asyncio.timeout(30):  # a busy machine
            while len(self.lines) < count:  # set from within  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return self.lines


@dataclass
class HostWeights:
    """The weights of a host in this process, as those of one pool."""

    host: Host

    def residence(self) -> dict[str, dict[str, Any]]:
        experts = self.host.snapshot.experts
        there = {each.ref: each.document() for each in self.host.in_memory()}
        return {
            name: residence_body([experts[key].ref for key in spec.residency_keys(experts)], [there])
            for name, spec in experts.items()
        }

    async def load(self, *names: str) -> list[dict[str, Any]]:
        return [{"pool": "hosts", "loaded": await self.host.load(*names)}]

    async def unload(self, *names: str, wait_s: float) -> list[dict[str, Any]]:
        return [{"pool": "hosts", "unloaded": await self.host.unload(*names, wait_s=wait_s)}]

    async def states(self) -> list[dict[str, Any]]:
        cache = self.host.cache
        weights = [each.document() for each in self.host.in_memory()]
        return [
            {"pool": "hosts", "used_bytes": cache.used_bytes, "budget_bytes": cache.budget_bytes, "weights": weights}
        ]


def orchestrator_over(
    host: Host,
    experts: Sequence[ExpertSpec] = EXPERTS,
    version: int = 7,
    policies: Mapping[str, Policy] | None = None,
) -> Orchestrator:
    snapshot = Snapshot(version, {spec.name: spec for spec in experts})
    router = Words(tuple(snapshot))
    policies = policies or {
        "default": Policy("default", router, utility=Utility(switch_weight=0.05), router_digest="sha256:1"),
        "safe": Policy("safe", router, fallback="echo"),
    }
    return Orchestrator(snapshot, policies, ask=host.ask)


@dataclass
class Gateway:
    """A running endpoint and everything behind it."""

    service: Service
    host: Host
    engine: FakeEngine
    log: Log
    url: str
    client: openai.AsyncOpenAI
    http: Any

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@asynccontextmanager
async def gateway(
    *,
    token_delay_s: float = 0.0,
    capacity: int = 32,
    settings: dict[str, Any] | None = None,
    experts: Sequence[ExpertSpec] = EXPERTS,
    engines: Mapping[str, Any] | None = None,
    policies: Mapping[str, Policy] | None = None,
    files: Path = Path("/nowhere"),
    budget_bytes: int = 2**20,
    pins: tuple[str, ...] = (),
    **options: Any,
) -> AsyncIterator[Gateway]:
    """A listening endpoint; closed at the end, with nothing left running.

    Args:
        engines: beside the fake one.
        files: of every expert. budget_bytes: for their weights.
    """
    engine, log = FakeEngine(token_delay_s=token_delay_s, capacity=capacity), Log()
    snapshot = Snapshot(7, {spec.name: spec for spec in experts})
    host = Host(
        snapshot, {"fake": engine, **(engines or {})}, budget_bytes=budget_bytes, locate=lambda spec: files, pins=pins
    )
    orchestrator = orchestrator_over(host, experts, policies=policies)
    weights = HostWeights(host)
    service = Service(orchestrator, settings=ServeConfig(**(settings or {})), log=log, weights=weights, **options)
    config = uvicorn.Config(build_api(service), port=0, log_level="critical", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())  # without `serve`'s signal handlers
    while not server.started:  # it has no event  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    http = openai.DefaultAsyncHttpxClient(base_url=url)
    try:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client:
            yield Gateway(service, host, engine, log, url, client, http)
    finally:
        server.should_exit = True
        await serving
        service.close()
        await host.aclose()


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A raw connection to a server of this machine."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

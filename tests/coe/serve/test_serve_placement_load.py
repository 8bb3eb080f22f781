"""Clients against several hosts, without Ray: real hosts, placement and pool client over a substitute for Serve.

Hosts report their status late, as they do through Serve's controller. Placement equalises expected starts, which it
derives from the measured seconds of answers. So these tests run in virtual time: on a busy machine the answers of one
host take longer than those of another, and it then rightly gets fewer calls.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from virtual_time import in_virtual_time

from coe.config import Config, HostPoolConfig
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.expert_host import ExpertHost
from coe.serve.cluster.placement import Board, HostStatus
from coe.serve.cluster.pool_client import PoolClient
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

PLACES = 4
EXPERTS = [ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo", size_bytes=2**10) for name in ("x", "y")]
CATALOG = Catalog(1, Snapshot(1, {spec.name: spec for spec in EXPERTS}), {}, "default")


def config(token_delay_s: float) -> Config:
    engine = {"capacity": PLACES, "token_delay_s": token_delay_s}
    return Config.model_validate({"host": {"budget": "1MiB"}, "engines": {"fake": engine}})


class Cluster:
    """Hosts, and the gateways that call them."""

    def __init__(self, hosts: dict[str, ExpertHost], gateways: int) -> None:
        self.hosts = hosts
        self.boards = [Board(asyncio.get_running_loop().time) for _ in range(gateways)]
        pools = {"hosts": HostPoolConfig()}
        self.clients = [PoolClient({"hosts": Handle(self, board)}, pools, board, CATALOG) for board in self.boards]  # type: ignore[dict-item]
        self.here: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()

    async def report(self) -> None:
        """Publish the status of every host, as it was a moment ago."""
        states = {name: copy.deepcopy(await host.record_routing_stats()) for name, host in self.hosts.items()}
        await asyncio.sleep(0.01)
        for board in self.boards:
            board.publish("hosts", [HostStatus.of(name, state) for name, state in states.items()])

    async def ask(self, expert: str, gateway: int = 0) -> None:
        request = GenerateRequest(messages=(Message("user", "one two three four five"),))
        assert [chunk async for chunk in self.clients[gateway].ask(expert, request)][-1].finish_reason == "stop"

    async def load(self, clients: int, rounds: int, expert: Callable[[int], str] = lambda turn: "x") -> None:
        """Clients that ask without a pause, spread over the gateways."""

        async def client(number: int) -> None:
            for turn in range(rounds):
                await self.ask(expert(number + turn), number % len(self.clients))

        self.most.clear()
        self.answered.clear()
        await asyncio.gather(*(client(number) for number in range(clients)))


class Handle:
    """A substitute for Serve's handle: the call goes to the host that was chosen for it."""

    def __init__(self, cluster: Cluster, board: Board) -> None:
        self.cluster, self.board = cluster, board

    def options(self, *, multiplexed_model_id: str, stream: bool) -> Any:
        def remote(expert: str, request: GenerateRequest, generation: int, call: str) -> Any:
            host = self.board.target(call)
            assert host is not None
            return Response(self.cluster, host, self.cluster.hosts[host].stream(expert, request, generation, call))

        return type("Bound", (), {"stream": type("Method", (), {"remote": staticmethod(remote)})})


class Response:
    """A substitute for a DeploymentResponseGenerator; counts what is at its host."""

    def __init__(self, cluster: Cluster, host: str, pieces: Any) -> None:
        self.cluster, self.host, self.pieces = cluster, host, pieces

    async def __aiter__(self) -> AsyncIterator[Any]:
        here, most = self.cluster.here, self.cluster.most
        here[self.host] += 1
        most[self.host] = max(most[self.host], here[self.host])
        try:
            async for piece in self.pieces:
                yield piece
            self.cluster.answered[self.host] += 1
        finally:
            here[self.host] -= 1

    def cancel(self) -> None:
        raise AssertionError("every answer ends")


@asynccontextmanager
async def cluster(*names: str, gateways: int = 1, delay_s: dict[str, float] | None = None) -> AsyncIterator[Cluster]:
    """Hosts whose experts generate a token in 2 ms, or in `delay_s` seconds by the name of the host."""
    clock, delays = asyncio.get_running_loop().time, delay_s or {}
    hosts = {name: ExpertHost(config(delays.get(name, 0.002)), HostPoolConfig(), clock) for name in names}
    for host in hosts.values():
        await host.reconfigure(CATALOG.to_json())
    running = Cluster(hosts, gateways)
    await running.report()

    async def reports() -> None:
        while True:
            await running.report()
            await asyncio.sleep(0.02)

    reporting = asyncio.create_task(reports())
    yield running
    reporting.cancel()
    await asyncio.gather(reporting, return_exceptions=True)
    left = [(await host.record_routing_stats())["calls"] for host in hosts.values()]
    assert not any(left), "calls that have ended are not counted"


@in_virtual_time
async def test_eight_clients_fill_the_places_of_two_hosts_and_nobody_waits() -> None:
    async with cluster("a", "b") as running:
        await running.load(8, rounds=4)  # both hosts load it
        await running.report()
        await running.load(8, rounds=25)
        assert max(running.most.values()) <= PLACES, "no call waits while the other host has a free place"
        assert min(running.answered.values()) > 60


@in_virtual_time
async def test_mixed_experts_fill_the_places_too() -> None:
    async with cluster("a", "b", "c") as running:
        await running.load(12, rounds=6, expert=lambda turn: "xy"[turn % 2])
        await running.report()
        await running.load(12, rounds=20, expert=lambda turn: "xy"[turn % 2])
        assert min(running.answered.values()) > 40, "no host stands idle"


@pytest.mark.parametrize("clients", [16, 40])
@in_virtual_time
async def test_more_clients_than_places_share_the_hosts_evenly(clients: int) -> None:
    async with cluster("a", "b") as running:
        await running.load(8, rounds=4)
        await running.report()
        await running.load(clients, rounds=10)
        assert max(running.most.values()) - min(running.most.values()) <= 2
        assert abs(running.answered["a"] - running.answered["b"]) <= clients


@in_virtual_time
async def test_two_gateways_share_the_hosts() -> None:
    async with cluster("a", "b", gateways=2) as running:
        await running.load(8, rounds=4)
        await running.report()
        await running.load(8, rounds=25)
        assert min(running.answered.values()) > 50


@in_virtual_time
async def test_a_host_that_answers_in_twice_the_time_gets_half_the_calls() -> None:
    async with cluster("fast", "slow", delay_s={"slow": 0.004}) as running:
        await running.load(8, rounds=10)  # their first answers; until then a host is not known to be slow
        await running.report()
        await running.load(40, rounds=30)
        assert sum(running.answered.values()) == 1200
        assert 1.8 < running.answered["fast"] / running.answered["slow"] < 2.2
        assert 1.5 < running.most["fast"] / running.most["slow"] < 2.5, "their last calls start at the same time"

"""Hosts that stop responding, without Ray: their calls go elsewhere, they are avoided, and they come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import pytest

from coe.config import HostPoolConfig
from coe.errors import EngineError, HostLost
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.liveness import HostSilent, Liveness, unless_lost
from coe.serve.cluster.placement import Board, HostStatus
from coe.serve.cluster.pool_client import PoolClient
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

SPEC = ExpertSpec(name="m", kind=Kind.MODEL, source="fake://echo")
CATALOG = Catalog(1, Snapshot(1, {"m": SPEC}), {}, "default")
SILENT_S = 2.0


class Hosts:
    """Hosts `a` and `b` behind a substitute for Serve's handle. A stopped one answers neither calls nor pings."""

    def __init__(self) -> None:
        self.now = 0.0
        self.board = Board(clock=lambda: self.now, silent_s=SILENT_S)
        self.running = {"a": asyncio.Event(), "b": asyncio.Event()}
        for host in self.running.values():
            host.set()
        self.calls: list[tuple[str, str]] = []
        self.cancelled: list[str] = []
        self.text_first = False
        self.board.publish("hosts", [HostStatus(name, load_s={"m": 0.0}) for name in self.running])
        self.liveness = Liveness(self.board, "hosts", self.ping, clock=lambda: self.now)
        self.client = PoolClient({"hosts": self}, {"hosts": HostPoolConfig()}, self.board, CATALOG)  # type: ignore[dict-item]

    async def ping(self, host: str) -> None:
        await self.running[host].wait()

    def stop(self, *names: str) -> None:
        for name in names:
            self.running[name].clear()

    async def seconds(self, count: float) -> None:
        """Let time pass, with a step of the liveness check every half second."""
        for _ in range(int(count * 2)):
            self.now += 0.5
            self.liveness.step()
            for _ in range(10):
                await asyncio.sleep(0)

    def options(self, *, multiplexed_model_id: str, stream: bool) -> Any:
        def remote(expert: str, request: GenerateRequest, generation: int, call: str) -> Response:
            return Response(self, self.board.target(call) or "", stream)

        bound = type("Bound", (), {"remote": staticmethod(remote)})
        return type("Handle", (), {"stream": bound, "whole": bound})

    def broadcast(self, method: str) -> Any:
        async def results(*, return_exceptions: bool) -> list[dict[str, Any]]:
            for host in self.running.values():
                await host.wait()
            return [{"pool": "hosts", "busy": 0} for _ in self.running]

        return type("Broadcast", (), {"results_async": staticmethod(results)})


class Response:
    """A substitute for the response of a host."""

    def __init__(self, hosts: Hosts, host: str, stream: bool) -> None:
        self.hosts, self.host = hosts, host
        hosts.calls.append((host, "stream" if stream else "whole"))

    def __await__(self) -> Generator[Any, None, Chunk]:
        yield from self.hosts.running[self.host].wait().__await__()
        return Chunk(f"from {self.host}", "stop", Usage(1, 1))

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        if self.hosts.text_first:
            yield Chunk("from ")
        await self.hosts.running[self.host].wait()
        yield Chunk(f"from {self.host}", "stop", Usage(1, 1))

    def cancel(self) -> None:
        self.hosts.cancelled.append(self.host)


def ask(hosts: Hosts, *, stream: bool = False) -> asyncio.Task[str]:
    async def text() -> str:
        request = GenerateRequest(messages=(Message("user", "hi"),), stream=stream)
        return "".join([chunk.text async for chunk in hosts.client.ask("m", request)])

    return asyncio.create_task(text())


async def settled(true: Callable[[], object]) -> None:
    for _ in range(100):
        if true():
            return
        await asyncio.sleep(0)
    raise AssertionError("nothing happens")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_call_of_a_stopped_host_is_made_again_elsewhere_and_new_calls_avoid_it(stream: bool) -> None:
    hosts = Hosts()
    hosts.stop("a")
    first = ask(hosts, stream=stream)
    await settled(lambda: hosts.calls)
    await hosts.seconds(SILENT_S)
    assert not first.done(), "the bound has not passed"
    await hosts.seconds(1)
    assert await first == "from b" and hosts.cancelled == ["a"]
    assert await ask(hosts) == "from b" and hosts.board.silent("hosts") == ["a"]
    hosts.running["a"].set()
    await hosts.seconds(1)
    assert hosts.board.silent("hosts") == []
    assert await ask(hosts) == "from a", "it comes back when it responds"
    assert not hosts.board._calls


async def test_a_host_that_takes_long_and_responds_is_not_a_stopped_one() -> None:
    hosts = Hosts()
    working = asyncio.Event()
    hosts.running["a"], responds = working, hosts.running["a"]

    async def ping(host: str) -> None:
        await responds.wait()

    hosts.liveness._ping = ping
    answer = ask(hosts)
    await settled(lambda: hosts.calls)
    await hosts.seconds(100 * SILENT_S)
    assert not answer.done() and hosts.board.silent("hosts") == []
    working.set()
    assert await answer == "from a" and hosts.calls == [("a", "whole")]


@pytest.mark.parametrize("stopped", ["a", "ab"])
async def test_text_that_a_client_has_seen_is_not_taken_back(stopped: str) -> None:
    hosts = Hosts()
    hosts.text_first = True
    hosts.stop(*stopped)
    answer = ask(hosts, stream=True)
    await settled(lambda: hosts.calls)
    await hosts.seconds(SILENT_S + 1)
    with pytest.raises(HostLost, match="'m' does not respond"):
        await answer
    assert hosts.calls == [("a", "stream")] and hosts.cancelled == ["a"]


async def test_when_no_host_responds_a_call_waits_for_the_first_that_does() -> None:
    hosts = Hosts()
    hosts.stop("a", "b")
    answer = ask(hosts)
    await settled(lambda: hosts.calls)
    await hosts.seconds(2 * SILENT_S + 2)
    assert hosts.calls == [("a", "whole"), ("b", "whole")] and hosts.board.silent("hosts") == ["a", "b"]
    await hosts.seconds(50)
    assert not answer.done() and len(hosts.calls) == 2, "there is no other host to ask"
    hosts.running["a"].set()
    await hosts.seconds(2)
    assert await answer == "from a" and hosts.calls[2:] == [("a", "whole")]
    hosts.stop("a")
    waits = ask(hosts)
    await settled(lambda: len(hosts.calls) > 3)
    await hosts.seconds(50)
    hosts.running["a"].set()
    await hosts.seconds(1)
    assert await waits == "from a" and len(hosts.calls) == 4, "the call that waited is answered, not made again"


async def test_time_in_which_the_gateway_itself_did_not_run_does_not_count() -> None:
    hosts = Hosts()
    hosts.stop("a")
    answer = ask(hosts)
    await settled(lambda: hosts.calls)
    await hosts.seconds(0.5)
    hosts.now += 60
    hosts.liveness.step()
    assert hosts.board.silent("hosts") == []
    hosts.running["a"].set()
    assert await answer == "from a"


async def test_a_host_that_is_gone_is_pinged_no_more() -> None:
    hosts = Hosts()
    hosts.stop("a")
    answer = ask(hosts)
    await settled(lambda: hosts.calls)
    await hosts.seconds(0.5)
    hosts.board.publish("hosts", [HostStatus("b", load_s={"m": 0.0})])
    await hosts.seconds(1)
    assert not hosts.liveness._pings and not hosts.liveness._since
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert hosts.cancelled == ["a"] and not hosts.board._calls


async def test_health_names_the_hosts_that_do_not_respond_and_fails_when_none_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coe.serve.cluster.pool_client.HEALTH_S", 0.05)
    hosts = Hosts()
    hosts.stop("a")
    hosts.board.lose("a")
    assert await hosts.client.states() == [
        {"pool": "hosts", "id": "a", "responds": False},
        {"pool": "hosts", "id": "b", "responds": True},
    ]
    hosts.board.lose("b")
    with pytest.raises(EngineError, match="no expert host responds"):
        await hosts.client.states()


async def test_a_timeout_of_the_call_itself_is_not_taken_for_a_silent_host() -> None:
    board = Board()
    call = board.open("m", ["hosts"])

    async def late() -> None:
        raise TimeoutError("the remote endpoint")

    with pytest.raises(TimeoutError, match="the remote endpoint"):
        await unless_lost(call, late())
    call.lost = True
    with pytest.raises(HostSilent):
        await unless_lost(call, asyncio.sleep(60))

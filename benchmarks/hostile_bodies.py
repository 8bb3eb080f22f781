"""A normal request while hostile ones arrive: the time of each against the time without them.

    python benchmarks/hostile_bodies.py [--bodies NAME ...] [--seconds 3] [--rounds 3] [--rival CHECKOUT] [--json PATH]

The API of a gateway runs in its own process on uvicorn, without Ray, over fake experts. One client sends normal
requests one after another; another client sends one hostile body in a loop. Rounds with and without it alternate.
`slow` opens `--sockets` connections that send 8 bytes each and wait, more than `serve.max_in_flight`.

    normal   p50 and p95 of the normal request, ms       ratio   p50 with the hostile body / without
    hostile  status, ms and bytes of its answer          refused normal requests that got no answer

`--rival` is another checkout of this project: it is measured in the same rounds, and the first table compares the CPU
time of a normal request in both (interleaved).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from load_client import free_port

MAX_IN_FLIGHT = 64
N_EXPERTS = 200
NORMAL: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "one two three four five six"}]}
TURN = NORMAL["messages"][0]
CHAT: dict[str, Any] = {"model": "expert-0", "messages": [TURN]}
BODIES: dict[str, Callable[[], Any]] = {
    "60,000 unknown fields": lambda: {**CHAT, **{f"unknown_field_{i}": i for i in range(60_000)}},
    "80,000 messages with `rol`": lambda: {"model": "auto", "messages": [{"rol": "user", "content": "x"}] * 80_000},
    "40,000 unknown experts": lambda: {**CHAT, "coe": {"experts": [f"unknown-{i}" for i in range(40_000)]}},
    "5,000 levels": lambda: "[" * 5_000 + "]" * 5_000,
    "numbers of 4,300 digits": lambda: '{"seed": [' + ",".join(["1" * 4_300] * 900) + "]}",
    "200,000 stop strings": lambda: {**CHAT, "stop": ["a"] * 200_000},
    "100,000 parts": lambda: {
        "model": "auto",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 100_000}],
    },
    "field names of 100 kB": lambda: {**CHAT, **{"x" * 100_000 + str(i): 1 for i in range(20)}},
    "model of 4 MB": lambda: {**CHAT, "model": "m" * 4_000_000},
    "4,096 wrong messages": lambda: {"model": "auto", "messages": [{"rol": "user", "content": "x"}] * 4_096},
    "10,000 experts, alike": lambda: {**CHAT, "coe": {"experts": [f"expert-{i}x" for i in range(10_000)]}},
    "99,000 numbers": lambda: {**CHAT, "tools": [1] * 99_000},
    "4 MB of escapes, no JSON": lambda: '{"model": "' + "\\n" * 2_000_000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a normal request while hostile bodies arrive.")
    parser.add_argument("--bodies", nargs="+", help="parts of their names; by default all, and `slow`")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each body in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--token-ms", type=float, default=2.0, help="of the fake expert; an answer has 6 tokens")
    parser.add_argument("--sockets", type=int, default=80)
    parser.add_argument("--rival", type=Path, help="another checkout")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.serve, given.token_ms / 1e3))
        return
    with ExitStack() as stack:
        servers = {"this": stack.enter_context(serving(given.token_ms, None))}
        if given.rival:
            servers["rival"] = stack.enter_context(serving(given.token_ms, given.rival.absolute()))
        results = asyncio.run(measure(given, servers))
    print(json.dumps(results))
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


async def serve(port: int, token_delay_s: float) -> None:
    """The API on a port, until it is terminated."""
    import uvicorn

    from coe.config import ServeConfig
    from coe.engines.fake import FakeEngine
    from coe.host import Host
    from coe.orchestrator import Orchestrator
    from coe.policy import Policy
    from coe.serve.http.api import build_api
    from coe.serve.http.service import Service
    from registry.spec import ExpertSpec, Kind
    from registry.store import Snapshot
    from routers.base import Estimate

    class First:
        """A router that chooses the first expert."""

        def estimate(self, queries: Any) -> Estimate:
            return Estimate(tuple(snapshot), np.tile(np.linspace(1, 0, len(snapshot)), (len(queries), 1)))

    specs = [ExpertSpec(name=f"expert-{i}", kind=Kind.MODEL, source="fake://echo") for i in range(N_EXPERTS)]
    snapshot = Snapshot(1, {spec.name: spec for spec in specs})
    engines = {"fake": FakeEngine(token_delay_s=token_delay_s, capacity=256)}
    host = Host(snapshot, engines, budget_bytes=2**20, locate=lambda spec: Path("/nowhere"))
    orchestrator = Orchestrator(snapshot, {"default": Policy("default", First())}, ask=host.ask)
    api = build_api(Service(orchestrator, settings=ServeConfig(max_in_flight=MAX_IN_FLIGHT)))
    await uvicorn.Server(uvicorn.Config(api, port=port, log_level="critical", ws="none", lifespan="off")).serve()


@contextmanager
def serving(token_ms: float, checkout: Path | None) -> Iterator[tuple[str, psutil.Process]]:
    """The API in its own process, from this checkout or another one. Yields the URL and the process."""
    port = free_port()
    path = {} if checkout is None else {"PYTHONPATH": str(checkout)}
    words = [sys.executable, __file__, "--serve", str(port), "--token-ms", str(token_ms)]
    process = subprocess.Popen(words, env=os.environ | path | {"OMP_NUM_THREADS": "1"})
    try:
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


async def measure(given: argparse.Namespace, servers: dict[str, tuple[str, psutil.Process]]) -> dict[str, Any]:
    wanted = given.bodies or [*BODIES, "slow"]
    names = [name for name in (*BODIES, "slow") if any(word in name for word in wanted)]
    rows = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for url, _ in servers.values():
            await until_ready(session, url)
        plain = [await compare_cpu(session, servers, given.seconds) for _ in range(given.rounds + 1)][1:]
        costs = {way: [each[way] for each in plain] for way in servers}
        show_costs(costs)
        print(
            f"{'':<28} {'':<6} {'normal p50':>10} {'p95':>7} {'with p50':>9} {'p95':>8} {'ratio':>6}  hostile",
            flush=True,
        )
        for name in names:
            for way, (url, _) in servers.items():
                rows.append(await one(session, given, name, way, url))
                show(rows[-1])
    return {"seconds": given.seconds, "rounds": given.rounds, "cpu_ms": costs, "rows": rows}


async def until_ready(session: aiohttp.ClientSession, url: str) -> None:
    for _ in range(600):
        with suppress(aiohttp.ClientError):
            async with session.get(f"{url}/health") as response:
                if response.status == 200:
                    return
        await asyncio.sleep(0.1)
    sys.exit(f"{url} does not answer")


async def compare_cpu(
    session: aiohttp.ClientSession, servers: dict[str, tuple[str, psutil.Process]], seconds: float
) -> dict[str, float]:
    """CPU milliseconds of a normal request, one server after the other."""
    found = {}
    for way, (url, process) in servers.items():
        before = sum(process.cpu_times()[:2])
        times, refused = await normal(session, url, seconds)
        found[way] = 1e3 * (sum(process.cpu_times()[:2]) - before) / (len(times) + refused)
    return found


async def normal(session: aiohttp.ClientSession, url: str, seconds: float) -> tuple[list[float], int]:
    """Milliseconds of each answered request, and the number of those that were refused."""
    times, refused, ends = [], 0, time.perf_counter() + seconds
    while (started := time.perf_counter()) < ends:
        async with session.post(f"{url}/v1/chat/completions", json=NORMAL) as response:
            text = await response.text()
        if response.status == 200 and "one two three" in text:
            times.append(1e3 * (time.perf_counter() - started))
        else:
            refused += 1
            await asyncio.sleep(0.05)
    return times, refused


async def one(
    session: aiohttp.ClientSession, given: argparse.Namespace, name: str, way: str, url: str
) -> dict[str, Any]:
    """One row: a body against one server; rounds without and with it alternate."""
    without: list[float] = []
    with_it: list[float] = []
    refused, answers = 0, list[dict[str, float]]()
    hostile = slow_sockets(url, given.sockets) if name == "slow" else looping(session, url, encoded(name), answers)
    for _ in range(given.rounds):
        without += (await normal(session, url, given.seconds))[0]
        async with hostile():
            times, more = await normal(session, url, given.seconds)
        with_it += times
        refused += more
    usual, seen = quantiles(without), quantiles(with_it)
    return {
        "body": name,
        "way": way,
        "without_ms": usual,
        "with_ms": seen,
        "ratio": round(seen[0] / usual[0], 2),
        "refused": refused,
        "n": len(with_it),
        "hostile": {key: round(float(np.median([each[key] for each in answers])), 1) for key in answers[0]}
        if answers
        else {},
    }


def encoded(name: str) -> bytes:
    body = BODIES[name]()
    return (body if isinstance(body, str) else json.dumps(body)).encode()


def quantiles(times: list[float]) -> list[float]:
    return [round(float(q), 2) for q in np.quantile(times or [np.inf], (0.5, 0.95))]


def looping(
    session: aiohttp.ClientSession, url: str, body: bytes, answers: list[dict[str, float]]
) -> Callable[[], Any]:
    """Sends a body again as soon as it is answered."""

    async def loop() -> None:
        while True:
            started = time.perf_counter()
            headers = {"content-type": "application/json"}
            async with session.post(f"{url}/v1/chat/completions", data=body, headers=headers) as response:
                size = len(await response.read())
            ms = 1e3 * (time.perf_counter() - started)
            answers.append({"status": response.status, "ms": ms, "bytes": size})

    @asynccontextmanager
    async def running() -> AsyncIterator[None]:
        task = asyncio.create_task(loop())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    return running


def slow_sockets(url: str, count: int) -> Callable[[], Any]:
    """Connections that send 8 bytes of a body and wait."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"

    @asynccontextmanager
    async def open_() -> AsyncIterator[None]:
        opened: list[Awaitable[Any]] = [
            asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2])) for _ in range(count)
        ]
        writers = [writer for _, writer in await asyncio.gather(*opened)]
        for writer in writers:
            writer.write(head + b"content-length: 1000\r\n\r\n" + b'{"model"')
        await asyncio.sleep(0.2)
        try:
            yield
        finally:
            for writer in writers:
                writer.close()

    return open_


def show_costs(costs: dict[str, list[float]]) -> None:
    for way, values in costs.items():
        each = ", ".join(f"{value:.3f}" for value in values)
        print(f"CPU of a normal request, {way}: {np.median(values):.3f} ms ({each})", flush=True)


def show(row: dict[str, Any]) -> None:
    hostile = " ".join(f"{key} {value:g}" for key, value in row["hostile"].items())
    print(
        f"{row['body']:<28} {row['way']:<6} {row['without_ms'][0]:>10.2f} {row['without_ms'][1]:>7.2f} "
        f"{row['with_ms'][0]:>9.2f} {row['with_ms'][1]:>8.2f} {row['ratio']:>6.2f}  {hostile}"
        + (f" refused {row['refused']}" if row["refused"] else ""),
        flush=True,
    )


if __name__ == "__main__":
    main()

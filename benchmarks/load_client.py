"""Load generator of the service benchmarks: a closed loop of keep-alive clients in one process, on one event loop.

It runs on the measured machine, so it must be cheap and report its own share: `client_cpu`, in cores. `cpu_ms` is the
CPU time per request of the processes under load, which other programs on the machine disturb least.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

WARM_UP_S = 0.3
"""Seconds at the start of every round that are not counted: connections open and queues fill."""


@dataclass(slots=True)
class Round:
    """Result of one round. latencies_s: of the requests that finished within `seconds`."""

    seconds: float
    latencies_s: list[float] = field(default_factory=list)
    client_cpu: float = 0.0
    cpu_ms: float = 0.0

    def figures(self) -> dict[str, float]:
        """Percentiles in milliseconds, requests per second, and the client's share of a core."""
        if not self.latencies_s:
            raise RuntimeError(f"no request was answered within {self.seconds:g} s: give more `--seconds`")
        p50, p95, p99 = np.quantile(1e3 * np.array(self.latencies_s), (0.50, 0.95, 0.99))
        per_s = len(self.latencies_s) / self.seconds
        return {
            "p50_ms": float(p50),
            "p95_ms": float(p95),
            "p99_ms": float(p99),
            "per_s": per_s,
            "cpu_ms": self.cpu_ms,
            "client_cpu": self.client_cpu,
        }


async def closed_loop(
    ask: Callable[[int], Awaitable[None]],
    n_clients: int,
    seconds: float,
    cpu_s: Callable[[], float] | None = None,
) -> Round:
    """Each client sends its next request on an answer. `ask` gets a number unique to the call.

    Args:
        cpu_s: CPU time of the processes under load; by default of all descendants of this process.
    """
    cpu_s = cpu_s or children_cpu_s
    numbers = itertools.count()
    clock = time.perf_counter
    begins = clock() + WARM_UP_S
    ends = begins + seconds
    seen = Round(seconds)

    async def client() -> None:
        while (started := clock()) < ends:
            await ask(next(numbers))
            if begins <= (now := clock()) < ends:
                seen.latencies_s.append(now - started)

    cpu, own = cpu_s(), time.process_time()
    await asyncio.gather(*(client() for _ in range(n_clients)))
    seen.client_cpu = (time.process_time() - own) / (clock() - begins + WARM_UP_S)
    seen.cpu_ms = 1e3 * (cpu_s() - cpu) / next(numbers)
    return seen


def children_cpu_s() -> float:
    """CPU time of all descendants of this process."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # ended meanwhile
            times = process.cpu_times()
            total += times.user + times.system
    return total


@contextmanager
def serving(service: Path) -> Iterator[str]:
    """`coe serve` of a configuration, as a child process. Yields the URL."""
    from coe.serve.cluster.server import Server
    from coe.serve.cluster.source import Source

    with Source(service) as source, Server(source, lambda part, what: print(f"{part}: {what}", file=sys.stderr)):
        yield f"http://127.0.0.1:{source.config.serve.port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def open_session() -> AsyncIterator[aiohttp.ClientSession]:
    """Keep-alive connections, one per client."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), headers={"content-type": "application/json"}
    ) as session:
        yield session


async def post(session: aiohttp.ClientSession, url: str, body: bytes, expected: bytes) -> None:
    """Send one request. Raises RuntimeError on a wrong answer: a fast wrong answer is worth nothing."""
    async with session.post(url, data=body) as response:
        answer = await response.read()
    if response.status != 200 or expected not in answer:
        raise RuntimeError(f"{url} answered {response.status}: {answer[:300]!r}")


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each figure, over the rounds."""
    return {name: round(float(np.median([each[name] for each in rounds])), 3) for name in rounds[0]}


def spread(rounds: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """The lowest and the highest of a figure."""
    values = [each[name] for each in rounds]
    return round(min(values), 3), round(max(values), 3)

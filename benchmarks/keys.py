"""What API keys and their limits cost a gateway: the same API with and without, side by side.

    python benchmarks/keys.py [--clients 1 16 64] [--seconds 3] [--rounds 5] [--json PATH]

Each way is a process with the API over one fake expert that answers at once, so that nearly all time is the gateway's:

    open      no key exists
    keyed     every request has a key
    limited   and that key has limits of requests, tokens and USD, in a registry in SQLite
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import psutil
from load_client import closed_loop, free_port

from registry.keys import KeySpec, Limit
from registry.store import Registry

if TYPE_CHECKING:
    from coe.serve.http.service import Service

WAYS: Final = ("open", "keyed", "limited")
BODY: Final = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "hello there"}]}).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--serve", nargs=2, metavar=("PORT", "URL"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(int(given.serve[0]), given.serve[1]))
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        served = {way: stack.enter_context(serving(way, Path(folder))) for way in WAYS}
        found = asyncio.run(measure(given, served))
    print(table(found))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


async def serve(port: int, url: str) -> None:
    """The API on a port, with the keys of a registry, until it is terminated."""
    import uvicorn

    from coe.serve.http.api import build_api

    config = uvicorn.Config(build_api(expert_service(url)), port=port, log_level="critical", ws="none", lifespan="off")
    await uvicorn.Server(config).serve()


def expert_service(url: str) -> Service:
    """A service over a host with one fake expert that answers at once, with the keys of a registry."""
    from coe.config import ServeConfig
    from coe.engines.fake import FakeEngine
    from coe.host import Host
    from coe.orchestrator import Orchestrator
    from coe.serve.http.keyring import Keyring, StoredKeys
    from coe.serve.http.ledger import Ledger
    from coe.serve.http.metrics import Metrics
    from coe.serve.http.service import Service
    from registry.spec import ExpertSpec, Kind, Price
    from registry.store import Snapshot

    price = Price(input_usd_per_mtok=1, output_usd_per_mtok=2)
    snapshot = Snapshot(1, {"echo": ExpertSpec(name="echo", kind=Kind.MODEL, source="fake://echo", price=price)})
    host = Host(snapshot, {"fake": FakeEngine(capacity=256)}, budget_bytes=2**20, locate=lambda spec: Path("/nowhere"))
    return Service(
        Orchestrator(snapshot, {}, ask=host.ask),
        settings=ServeConfig(),
        metrics=Metrics(),
        keyring=Keyring(StoredKeys(url)),
        ledger=Ledger(lambda: Registry(url)),
    )


def headers_for(way: str, url: str) -> dict[str, str]:
    """Create a registry, with a key unless the way is `open`. Returns the headers of a request."""
    headers = {"content-type": "application/json"}
    with Registry(url) as registry:
        if way != "open":
            most = {"requests": 1e12, "tokens": 1e12, "usd": 1e9} if way == "limited" else {}
            limits = tuple(Limit.model_validate({"what": w, "per": "day", "most": n}) for w, n in most.items())
            _, text = registry.create_api_key(KeySpec(name="load", limits=limits), time.time())
            headers["authorization"] = f"Bearer {text}"
    return headers


@contextmanager
def serving(way: str, folder: Path) -> Iterator[tuple[str, dict[str, str], psutil.Process]]:
    """The API in a process of its own: its URL, the headers of a request, and the process."""
    port, url = free_port(), f"sqlite:///{folder / f'{way}.db'}"
    headers = headers_for(way, url)
    command = [sys.executable, __file__, "--serve", str(port), url]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield f"http://127.0.0.1:{port}/v1/chat/completions", headers, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


async def measure(
    given: argparse.Namespace, served: dict[str, tuple[str, dict[str, str], psutil.Process]]
) -> list[dict[str, Any]]:
    """The ways in turn, so that other programs disturb all alike; the first round is not counted."""
    rows = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(way: str, _: int) -> None:
            url, headers, _ = served[way]
            async with session.post(url, data=BODY, headers=headers) as response:
                if response.status != 200:
                    raise RuntimeError(f"{way}: {response.status} {await response.text()}")
                await response.read()

        for way in served:
            for _ in range(100):
                try:
                    await ask(way, 0)
                    break
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.2)
        for clients in given.clients:
            for number in range(given.rounds + 1):
                for way in served:
                    process = served[way][2]

                    def cpu_s(process: psutil.Process = process) -> float:
                        times = process.cpu_times()
                        return float(times.user + times.system)

                    found = await closed_loop(partial(ask, way), clients, given.seconds, cpu_s)
                    if number:
                        rows.append({"way": way, "clients": clients, **found.figures()})
    return rows


def table(rows: list[dict[str, Any]], base: str = "open") -> str:
    """Medians over the rounds; ratios are of requests per second and of CPU time, to the way `base`."""
    from statistics import median

    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = [f"| clients | way | requests/s | of {base} | p50, ms | p95, ms | CPU ms/request | of {base} |"]
    lines.append("|---:|---|---:|---:|---:|---:|---:|---:|")
    for clients in dict.fromkeys(row["clients"] for row in rows):
        mine = {way: [r for r in rows if (r["way"], r["clients"]) == (way, clients)] for way in ways}
        for way in ways:
            pairs = list(zip(mine[way], mine[base], strict=True))
            middle = {name: median(row[name] for row in mine[way]) for name in ("per_s", "p50_ms", "p95_ms", "cpu_ms")}
            ratio = {name: median(a[name] / b[name] for a, b in pairs) for name in ("per_s", "cpu_ms")}
            lines.append(
                f"| {clients} | {way} | {middle['per_s']:.0f} | {ratio['per_s']:.2f} | {middle['p50_ms']:.2f} | "
                f"{middle['p95_ms']:.2f} | {middle['cpu_ms']:.2f} | {ratio['cpu_ms']:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""The three values of `serve.http` against bare echoes, in one run; places filled; and many streams at a steady rate.

    coe encoder distill --out static
    python benchmarks/http_paths.py --encoder ./static [--seconds 3] [--rounds 3] [--json PATH]

Every rival is a process of its own with its children; in each round one after the other is started, loaded and stopped,
since the processes of an idle Ray take CPU too. CPU per request is that of all the rival's processes.

    uvicorn        Starlette on uvicorn: the body out as it came in
    uvicorn+actor  the same, and the body goes through an actor of Ray: the least that a hop to another process costs
    direct, haproxy, proxy
                   `coe serve`: the category router with the encoder given, every prompt distinct, a fake expert in a
                   process of its own that answers at once with the 16 words of the prompt, as one body; decisions are
                   logged
    direct, MiniLM
                   the same service as `direct`, by a router whose encoder is MiniLM
    direct, 2 gateways
                   as `direct`, with two gateways

Then, of `direct`: 8 clients on 2 hosts with 4 places each, whose expert takes 0.2 s an answer; and 200 streams of 20
tokens a second: how late each token comes, against the moment of the stream's first token and the rate.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import asyncio
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil  # type: ignore[import-untyped]
from gateway import TOPICS, outcomes, wait_for
from load_client import Round, closed_loop, free_port, medians, open_session, post
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from routers.artifacts import save
from routers.encoders.build import build_encoder
from routers.factory import build

PATHS = ("direct", "haproxy", "proxy")
SERVICE = """
experts: [experts.yaml]
engines: {{fake: {{capacity: {capacity}, token_delay_s: {token_s}}}}}
host: {{budget: 1GiB}}
policies: {{default: {{router: static}}{minilm}}}
serve:
  http: {path}
  gateway: {{replicas: {gateways}}}
  pools: [{{replicas: {hosts}}}]
  log: {{folder: decisions}}
"""
MINILM = "direct, MiniLM"
ECHO = "uvicorn+actor"
STREAMS, TOKEN_S, TOKENS = 200, 0.05, 100
PLACES, HOSTS, ANSWER_S = 4, 2, 0.2


@dataclass(frozen=True, slots=True)
class Rival:
    """A server under load: its URL, and the process that it and all it starts descend from."""

    url: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """CPU time of all its processes."""
        times = [each.cpu_times() for each in self._alive()]
        return float(sum(time.user + time.system for time in times))

    def memory_mb(self) -> float:
        """Resident memory of the processes that serve: gateways and hosts."""
        serving = [each for each in self._alive() if "ServeReplica" in " ".join(each.cmdline())]
        return float(sum(each.memory_info().rss for each in serving)) / 1e6

    def _alive(self) -> list[psutil.Process]:
        found = [self.process, *self.process.children(recursive=True)]
        return [each for each in found if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


async def echo(request: Request) -> Response:
    """Return the body."""
    return Response(await request.body())


async def echo_through_actor(request: Request) -> Response:
    """Return the body, after a call to an actor of Ray."""
    return Response(await request.app.state.actor.echo.remote(await request.body()))


def echo_app() -> Starlette:
    """The bare echo, for `uvicorn --factory`."""
    return Starlette(routes=[Route("/", echo, methods=["POST"])])


def actor_app() -> Starlette:
    """The echo through an actor, for `uvicorn --factory`."""
    import ray

    @ray.remote(num_cpus=0)
    class Echo:
        async def echo(self, body: bytes) -> bytes:
            return body

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    app = Starlette(routes=[Route("/", echo_through_actor, methods=["POST"])])
    app.state.actor = Echo.options(max_concurrency=1000).remote()  # type: ignore[attr-defined]
    ray.get(app.state.actor.echo.remote(b""))
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Time each way of HTTP through the service against bare echoes.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--encoder", default="hashing", help="of the router: hashing, or a folder of `coe encoder distill`"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each rival in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--only", choices=("rates", "places", "streams"), help="one of the three parts")
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    parts = {"rates": rates, "places": places, "streams": streams}
    found: dict[str, Any] = {"cpus": os.cpu_count(), "load_average": os.getloadavg()}
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), given.encoder)
        for name, part in parts.items():
            if given.only in (None, name):
                found[name] = part(given, Path(folder))
    print(json.dumps(found))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def train(folder: Path, encoder: str) -> None:
    """The routers `static` and `minilm`, and the experts they choose from."""
    table = outcomes(np.random.default_rng(0))
    for name, kind in (("static", encoder), ("minilm", "minilm")):
        built = build_encoder(kind)
        save(build("category", built, {}).fit(table), folder / name, table=table, encoder=built)
    experts = [f"  - {{name: {name}, kind: model, source: 'fake://echo'}}" for name in table.experts]
    (folder / "experts.yaml").write_text("experts:\n" + "\n".join(experts) + "\n")


def rates(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each way and number of clients: the medians over the rounds."""
    rounds: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    numbers = itertools.count()
    for number in range(given.rounds):
        for way, start in rivals(given, folder).items():
            with start() as rival:
                for name in (way, MINILM) if way == "direct" else (way,):
                    for n_clients, seen in asyncio.run(load(given, name, rival, numbers)).items():
                        rounds[n_clients, name].append(seen.figures())
            print(f"round {number + 1}, {way}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    rows = [{"way": way, "clients": n, **medians(each)} for (n, way), each in sorted(rounds.items(), key=_by_clients)]
    show(rows)
    return rows


def rivals(given: argparse.Namespace, folder: Path) -> dict[str, Callable[[], AbstractContextManager[Rival]]]:
    """What starts each rival."""
    paths = {path: partial(coe_serve, folder, path, minilm=path == "direct") for path in given.paths}
    two = {"direct, 2 gateways": partial(coe_serve, folder, "direct", gateways=2)}
    return {"uvicorn": partial(uvicorn, "echo_app"), ECHO: partial(uvicorn, "actor_app"), **paths, **two}


async def load(given: argparse.Namespace, way: str, rival: Rival, numbers: Iterator[int]) -> dict[int, Round]:
    """A warm-up and a round for each number of clients."""
    async with open_session() as session:
        ask = partial(one_request, session, way, rival.url, numbers)
        seen = {}
        for n_clients in given.clients:
            await closed_loop(ask, n_clients, 1.0)
            seen[n_clients] = await closed_loop(ask, n_clients, given.seconds, cpu_s=rival.cpu_s)
        return seen


def _by_clients(row: tuple[tuple[int, str], Any]) -> int:
    return row[0][0]


def show(rows: list[dict[str, Any]]) -> None:
    """The rows, with the median latency over that of the echo through an actor."""
    print(f"clients  {'way':<20} p50 ms  p95 ms  p99 ms   req/s  CPU ms  over echo")
    echo_ms = {r["clients"]: r["p50_ms"] for r in rows if r["way"] == ECHO}
    for r in rows:
        print(
            f"{r['clients']:>7}  {r['way']:<20}{r['p50_ms']:>7.2f}{r['p95_ms']:>8.2f}{r['p99_ms']:>8.2f}"
            f"{r['per_s']:>8.0f}{r['cpu_ms']:>8.2f}{r['p50_ms'] - echo_ms[r['clients']]:>11.2f}"
        )


async def one_request(session: aiohttp.ClientSession, way: str, url: str, numbers: Iterator[int], i: int) -> None:
    """A distinct prompt, and a check of its answer."""
    number = next(numbers)
    topic = list(TOPICS.values())[number % len(TOPICS)]
    text = f"{number} please tell me about " + " and ".join(topic[(number + k) % len(topic)] for k in range(6))
    model = "coe/minilm" if way == MINILM else "auto"
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    where = url if way.startswith("uvicorn") else f"{url}/v1/chat/completions"
    await post(session, where, json.dumps(body).encode(), text.encode())


def places(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The share of places that clients keep filled, from the rate of answers."""
    token_s = ANSWER_S / 16
    with coe_serve(folder, "direct", hosts=HOSTS, capacity=PLACES, token_s=token_s) as rival:
        seen = asyncio.run(_filled(rival))
    alone_s, per_s = seen
    filled = per_s * alone_s / (HOSTS * PLACES)
    print(f"{HOSTS * PLACES} clients on {HOSTS} hosts x {PLACES} places: {100 * filled:.0f}% of the places filled")
    return {"alone_s": alone_s, "per_s": per_s, "filled": filled}


async def _filled(rival: Rival) -> tuple[float, float]:
    async with open_session() as session:
        ask = partial(one_request, session, "direct", rival.url, itertools.count())
        await closed_loop(ask, HOSTS * PLACES, 3.0)  # the experts get loaded on both hosts
        alone = await closed_loop(ask, 1, 3.0)
        together = await closed_loop(ask, HOSTS * PLACES, 6.0)
    return float(np.median(alone.latencies_s)), len(together.latencies_s) / together.seconds


def streams(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Lateness of tokens in milliseconds, CPU in cores, and memory before and after."""
    with coe_serve(folder, "direct", capacity=2 * STREAMS, token_s=TOKEN_S) as rival:
        asyncio.run(_stream_all(rival, 20))
        before_mb, cpu_s, started = rival.memory_mb(), rival.cpu_s(), time.perf_counter()
        late = asyncio.run(_stream_all(rival, TOKENS))
        cores = (rival.cpu_s() - cpu_s) / (time.perf_counter() - started)
        after_mb = rival.memory_mb()
    p50, p95, p99 = (float(value) for value in np.quantile(1e3 * np.array(late), (0.5, 0.95, 0.99)))
    found = {"late_p50_ms": p50, "late_p95_ms": p95, "late_p99_ms": p99, "late_max_ms": 1e3 * max(late), "cores": cores}
    print(f"{STREAMS} streams: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    print(f"gateway and host hold {before_mb:.0f} MB before, {after_mb:.0f} MB after")
    return {**found, "before_mb": before_mb, "after_mb": after_mb}


async def _stream_all(rival: Rival, tokens: int) -> list[float]:
    async with open_session() as session:
        text = " ".join(f"w{i}" for i in range(tokens))
        starts = (asyncio.sleep(i * TOKEN_S / STREAMS, i) for i in range(STREAMS))  # not all in one moment
        late = await asyncio.gather(*(_stream(session, rival.url, text, start) for start in starts))
    return [each for stream in late for each in stream]


async def _stream(session: aiohttp.ClientSession, url: str, text: str, start: Any) -> list[float]:
    """Seconds that each token of a stream comes after its time. Raises RuntimeError if the text is wrong."""
    await start
    body = {"model": "generalist", "stream": True, "messages": [{"role": "user", "content": text}]}
    arrivals: list[float] = []
    words = ""
    async with session.post(f"{url}/v1/chat/completions", data=json.dumps(body).encode()) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                choices = json.loads(line[6:])["choices"]
                new = choices[0]["delta"].get("content") or "" if choices else ""
                arrivals += [now] * len(new.split())
                words += new
    if words != text:
        raise RuntimeError(f"a stream's text is not what the expert says: {words[-80:]!r}")
    return [at - (arrivals[0] + i * TOKEN_S) for i, at in enumerate(arrivals)]


@contextmanager
def uvicorn(factory: str) -> Iterator[Rival]:
    """An application of this file in a process of its own."""
    port = free_port()
    words = ["uvicorn", f"http_paths:{factory}", "--factory", "--app-dir", str(Path(__file__).parent)]
    with _process([*words, "--port", str(port), "--no-access-log", "--log-level", "warning"], "-m") as process:
        wait_for(port)
        yield Rival(f"http://127.0.0.1:{port}", process)


@contextmanager
def coe_serve(
    folder: Path,
    path: str,
    *,
    gateways: int = 1,
    hosts: int = 1,
    capacity: int = 256,
    token_s: float = 0.0,
    minilm: bool = False,
) -> Iterator[Rival]:
    """`coe serve` of its own configuration."""
    port = free_port()
    config = folder / "service.yaml"
    more = ", minilm: {router: minilm}" if minilm else ""
    config.write_text(
        SERVICE.format(path=path, gateways=gateways, hosts=hosts, capacity=capacity, token_s=token_s, minilm=more)
    )
    ready = folder / f"{port}.json"
    command = "from coe.cli.app import main; main()"
    words = [command, "serve", "--config", str(config), "--port", str(port), "--json", str(ready)]
    with _process(words, "-c") as process:
        ends = time.monotonic() + 180
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > ends:
                sys.exit(f"`coe serve` with {path} does not start")
            time.sleep(0.2)
        yield Rival(f"http://127.0.0.1:{port}", process)


@contextmanager
def _process(words: list[str], how: str) -> Iterator[psutil.Popen]:
    process = psutil.Popen([sys.executable, how, *words], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except psutil.TimeoutExpired:
            process.kill()


if __name__ == "__main__":
    main()

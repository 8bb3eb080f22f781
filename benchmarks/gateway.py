"""Overhead of a request through `coe serve`, against a bare Ray Serve echo and a bare uvicorn echo.

    python benchmarks/gateway.py [--clients 1 16 64] [--seconds 3] [--rounds 5] [--json PATH]

One run, one Ray, one client process (see `load_client.py`). Every round loads each rival in turn, so that other
programs on the machine disturb all alike. Experts are fake and answer at once, so nearly all time is overhead.

    uvicorn        FastAPI on uvicorn: a JSON body in, the same JSON out
    serve echo     the same on Ray Serve with one hop: proxy -> ingress deployment -> handle -> second deployment
    expert         coe: a policy with a fixed expert; everything except routing
    category, knn  coe: a trained router with the hashing encoder, which is static: no weights
    minilm         coe: the category router with MiniLM, which encodes every prompt
    in process     the category policy without HTTP and Ray: time of router, host and engine

The service runs as `coe serve` starts it with `serve.http: proxy`, which the Serve echo needs: decisions are logged,
metrics counted, answers checked by the client. `http_paths.py` compares the values of `serve.http`.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import asyncio
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from fastapi import FastAPI
from load_client import Round, closed_loop, free_port, medians, open_session, post, serving, spread

from coe.local import open_local
from coe.types import GenerateRequest
from routers.artifacts import save
from routers.base import Message
from routers.encoders.build import build_encoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable

TOPICS = {
    "cooking": ("oven", "flour", "butter", "recipe", "simmer", "garlic", "roast", "whisk", "dough", "saucepan"),
    "geometry": ("triangle", "angle", "radius", "circle", "polygon", "tangent", "perimeter", "vertex", "diameter"),
    "law": ("tenant", "contract", "plaintiff", "statute", "liability", "court", "appeal", "verdict", "clause"),
    "music": ("violin", "chord", "melody", "tempo", "orchestra", "soprano", "rhythm", "sonata", "guitar", "harmony"),
}
POLICIES = {
    "expert": None,
    "category": ("category", "hashing"),
    "knn": ("knn", "hashing"),
    "minilm": ("category", "minilm"),
}
"""Policy -> its router's kind and encoder."""
BASE = "serve echo"
SERVICE = """
experts: [experts.yaml]
engines: {{fake: {{capacity: 256}}}}
default_policy: expert
policies:
  expert: {{expert: cooking-expert}}
{routers}
serve: {{http: proxy, port: {port}, log: {{folder: decisions}}}}
"""

uvicorn_echo = FastAPI()


@uvicorn_echo.post("/echo")
async def echo(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body."""
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description="Time requests through the gateway against bare echoes.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each rival in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        service = write_service(Path(folder), given.policies)
        with serving(service) as base, echoing() as uvicorn_url:
            deploy_echo()
            found = asyncio.run(measure(given, service, base, uvicorn_url))
    show(found["results"])
    print(json.dumps(found))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def write_service(folder: Path, policies: Sequence[str]) -> Path:
    """The configuration of the service, with its routers trained."""
    table = outcomes(np.random.default_rng(0))
    lines = []
    for name in policies:
        if trained := POLICIES[name]:
            kind, encoder = trained[0], build_encoder(trained[1])
            settings = {"k": 10} if kind == "knn" else {}
            save(build(kind, encoder, settings).fit(table), folder / name, table=table, encoder=encoder)
            lines.append(f"  {name}: {{router: {name}}}")
    experts = [f"  - {{name: {name}, kind: model, source: 'fake://echo'}}" for name in table.experts]
    (folder / "experts.yaml").write_text("experts:\n" + "\n".join(experts) + "\n")
    service = folder / "service.yaml"
    service.write_text(SERVICE.format(routers="\n".join(lines), port=free_port()))
    return service


def outcomes(rng: np.random.Generator, n: int = 400) -> OutcomeTable:
    """Expert i is good at topic i; a generalist is mediocre at all."""
    topics = [list(TOPICS)[i % len(TOPICS)] for i in range(n)]
    p = np.array([[0.9 if topic == own else 0.3 for own in TOPICS] + [0.6] for topic in topics])
    return OutcomeTable(
        query_ids=tuple(f"q{i}" for i in range(n)),
        prompts=tuple(prompt(topic, rng) for topic in topics),
        experts=(*(f"{topic}-expert" for topic in TOPICS), "generalist"),
        scores=(rng.random(p.shape) < p).astype(float),
        domains=tuple(topics),
    )


def prompt(topic: str, rng: np.random.Generator) -> str:
    return "please tell me about the " + " and the ".join(rng.choice(TOPICS[topic], 5))


def deploy_echo() -> None:
    """Two deployments without logic, with the service's options where they matter for time."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    app = FastAPI()
    small: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0.1},
        "max_ongoing_requests": 1000,
        "logging_config": LoggingConfig(enable_access_log=False),
    }

    @serve.deployment(**small)
    class Second:
        async def echo(self, body: dict[str, Any]) -> dict[str, Any]:
            return body

    @serve.deployment(**small)
    @serve.ingress(app)
    class First:
        def __init__(self, second: Any) -> None:
            self._second = second

        @app.post("/")
        async def echo(self, body: dict[str, Any]) -> Any:
            return await self._second.echo.remote(body)

    serve.run(First.bind(Second.bind()), name="echo", route_prefix="/echo")


@contextmanager
def echoing() -> Iterator[str]:
    """uvicorn in its own process. Yields the URL."""
    port = free_port()
    words = ["uvicorn", "gateway:uvicorn_echo", "--app-dir", str(Path(__file__).parent), "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", *words, "--no-access-log", "--log-level", "warning"])
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}/echo"
    finally:
        process.terminate()
        process.wait()


def wait_for(port: int, within_s: float = 60.0) -> None:
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    sys.exit(f"nothing listens on port {port} after {within_s:g} s")


async def measure(given: argparse.Namespace, service: Path, base: str, uvicorn_url: str) -> dict[str, Any]:
    """All rounds: every number of clients, every rival."""
    rng = np.random.default_rng(1)
    texts = [prompt(list(TOPICS)[i % len(TOPICS)], rng) for i in range(256)]
    results = []
    async with open_session() as session, open_local(service) as local:

        async def in_process(i: int) -> None:
            request = GenerateRequest(messages=(Message("user", texts[i % len(texts)]),))
            await local.answer(request, model="coe/category").text()

        ways: dict[str, Callable[[int], Awaitable[None]]] = {
            "uvicorn": partial(http, session, uvicorn_url, bodies("none", texts)),
            BASE: partial(http, session, f"{base}/echo/", bodies("none", texts)),
        }
        for policy in given.policies:
            ways[policy] = partial(http, session, f"{base}/v1/chat/completions", bodies(f"coe/{policy}", texts))
        if "category" in given.policies:
            ways["in process"] = in_process
        for n_clients in given.clients:
            results += await compare(ways, n_clients, given.rounds, given.seconds, partial(scrape, session, base))
    about = {"seconds": given.seconds, "rounds": given.rounds, "load_average": os.getloadavg(), "cpus": os.cpu_count()}
    return {**about, "results": results}


def bodies(model: str, texts: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """Bodies of requests, each with what its answer must contain."""
    messages = ([{"role": "user", "content": text}] for text in texts)
    sent = (json.dumps({"model": model, "messages": each}).encode() for each in messages)
    return list(zip(sent, (text.encode() for text in texts), strict=True))


async def http(session: aiohttp.ClientSession, url: str, sent: Sequence[tuple[bytes, bytes]], i: int) -> None:
    await post(session, url, *sent[i % len(sent)])


async def compare(
    ways: dict[str, Callable[[int], Awaitable[None]]],
    n_clients: int,
    n_rounds: int,
    seconds: float,
    scraped: Callable[[], Awaitable[dict[str, float]]],
) -> list[dict[str, Any]]:
    """One row per way."""
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(-1, n_rounds):  # the first one warms up
        for way, ask in ways.items():
            before = await scraped()
            seen: Round = await closed_loop(ask, n_clients, seconds if number >= 0 else min(seconds, 1.0))
            after = await scraped()
            if number >= 0:
                rounds[way].append(seen.figures() | own_times(before, after))
        print(f"{n_clients} clients, round {number + 1} of {n_rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return [row(way, n_clients, rounds[way], rounds[BASE]) for way in ways]


def row(way: str, clients: int, own: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds, and the median overhead over the echo of the same round."""
    over = [each["p50_ms"] - echo["p50_ms"] for each, echo in zip(own, base, strict=True)]
    return {
        "way": way,
        "clients": clients,
        **medians(own),
        "over_echo_p50_ms": round(float(np.median(over)), 3),
        "over_echo_range_ms": (round(min(over), 3), round(max(over), 3)),
        "p50_range_ms": spread(own, "p50_ms"),
    }


async def scrape(session: aiohttp.ClientSession, base: str) -> dict[str, float]:
    """Sums and counts of the service's own histograms."""
    async with session.get(f"{base}/metrics") as response:
        page = await response.text()
    totals: dict[str, float] = {}
    for name, value in re.findall(r"^coe_(\w+_seconds_(?:sum|count))\{[^\n]*\} (\S+)$", page, re.MULTILINE):
        totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def own_times(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Mean milliseconds by the service's clocks: gateway time beyond the engine, and time to the decision."""
    times = {}
    for name in ("gateway", "route", "engine"):
        total, n = (
            after.get(f"{name}_seconds_{kind}", 0.0) - before.get(f"{name}_seconds_{kind}", 0.0)
            for kind in ("sum", "count")
        )
        times[f"{name}_mean_ms"] = 1e3 * total / n if n else 0.0
    return times


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'clients':>7}  {'way':<11} {'p50 ms':>7} {'p95 ms':>7} {'p99 ms':>7} {'req/s':>7} {'over echo, p50 ms':>25}"
    )
    for r in rows:
        low, high = r["over_echo_range_ms"]
        over = f"{r['over_echo_p50_ms']:.2f} ({low:.2f} to {high:.2f})"
        print(
            f"{r['clients']:>7}  {r['way']:<11} {r['p50_ms']:>7.2f} {r['p95_ms']:>7.2f} {r['p99_ms']:>7.2f} "
            f"{r['per_s']:>7.0f} {r['cpu_ms']:>7.2f} {over:>25}"
        )


if __name__ == "__main__":
    main()

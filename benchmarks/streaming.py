"""Streams through `coe serve` against the same Host in this process: tokens per second, and the time to the first text.

    python benchmarks/streaming.py [--token-ms 0 5 20] [--clients 1 16 64] [--tokens 200] [--rounds 5] [--json PATH]

A fake expert sends `--tokens` words, one every `--token-ms`; all clients start at once, and a round ends when the last
of them has its last byte. Both sides alternate. With 0 ms the engine takes no time, so that the ratio compares the
transport alone; real engines take milliseconds per token.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from load_client import free_port, medians, open_session, serving

from coe.config import load_config
from coe.host import Host
from coe.hosting import open_host
from coe.types import GenerateRequest
from routers.base import Message

EXPERT = "talker"
SERVICE = """
experts: [experts.yaml]
engines: {{fake: {{capacity: 256, token_delay_s: {token_s}}}}}
policies:
  default: {{expert: talker}}
serve: {{port: {port}, log: {{folder: decisions}}}}
"""


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer. n_chunks: received by the client, or sent by the host; n_bytes: of the whole body."""

    text: str
    first_s: float
    n_chunks: int
    n_bytes: int


Ask = Callable[[], Awaitable[Stream]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time streams through the service against the Host in process.")
    parser.add_argument("--token-ms", type=float, nargs="+", default=[0.0, 5.0, 20.0], help="of the fake expert")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    rows = [row for token_ms in given.token_ms for row in measure(given, token_ms)]
    show(rows)
    found = {"tokens": given.tokens, "rounds": given.rounds, "load_average": os.getloadavg(), "results": rows}
    print(json.dumps(found))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(given: argparse.Namespace, token_ms: float) -> list[dict[str, Any]]:
    """A row for each number of clients, with an expert of that speed."""
    text = " ".join(f"word{i}" for i in range(given.tokens))
    with tempfile.TemporaryDirectory() as folder:
        service = write_service(Path(folder), token_ms / 1e3)
        with serving(service) as base:
            return asyncio.run(compare(given, service, base, text, token_ms))


def write_service(folder: Path, token_s: float) -> Path:
    (folder / "experts.yaml").write_text(f"experts:\n  - {{name: {EXPERT}, kind: model, source: 'fake://echo'}}\n")
    service = folder / "service.yaml"
    service.write_text(SERVICE.format(token_s=token_s, port=free_port()))
    return service


async def compare(
    given: argparse.Namespace, service: Path, base: str, text: str, token_ms: float
) -> list[dict[str, Any]]:
    rows = []
    async with open_session() as session, open_host(load_config(service)) as host:
        ways: dict[str, Ask] = {
            "host": lambda: through_host(host, text),
            "service": lambda: through_service(session, base, text),
        }
        for n_clients in given.clients:
            rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for number in range(-1, given.rounds):  # the first one warms up
                for way, ask in ways.items():
                    figures = await one_round(ask, n_clients, text, given.tokens)
                    if number >= 0:
                        rounds[way].append(figures)
                print(f"{token_ms:g} ms a token, {n_clients} clients, round {number + 1}", file=sys.stderr)
            rows.append({"token_ms": token_ms, "clients": n_clients, **summary(rounds["host"], rounds["service"])})
    return rows


async def one_round(ask: Ask, n_clients: int, text: str, n_tokens: int) -> dict[str, float]:
    """Rates of all clients together. Raises RuntimeError if a text is wrong."""
    started = time.perf_counter()
    streams = await asyncio.gather(*(ask() for _ in range(n_clients)))
    seconds = time.perf_counter() - started
    if any(stream.text != text for stream in streams):
        raise RuntimeError("a stream's text is not what the expert says")
    return {
        "tokens_per_s": n_clients * n_tokens / seconds,
        "chunks_per_s": sum(stream.n_chunks for stream in streams) / seconds,
        "bytes_per_s": sum(stream.n_bytes for stream in streams) / seconds,
        "first_p50_ms": 1e3 * float(np.median([stream.first_s for stream in streams])),
    }


async def through_host(host: Host, text: str) -> Stream:
    """The path of a gateway's request within the expert host: streamed, with a deadline."""
    request = GenerateRequest(messages=(Message("user", text),), stream=True, deadline_s=600.0)
    started = time.perf_counter()
    first_s, pieces = 0.0, []
    async with aclosing(host.ask(EXPERT, request)) as chunks:
        async for chunk in chunks:
            first_s = first_s or time.perf_counter() - started
            pieces.append(chunk.text)
    whole = "".join(pieces)
    return Stream(whole, first_s, len(pieces), len(whole.encode()))


async def through_service(session: aiohttp.ClientSession, base: str, text: str) -> Stream:
    """Server-sent events, read as bytes on arrival and as text at the end."""
    body = json.dumps({"model": EXPERT, "stream": True, "messages": [{"role": "user", "content": text}]}).encode()
    started = time.perf_counter()
    first_s, received = 0.0, bytearray()
    async with session.post(f"{base}/v1/chat/completions", data=body) as response:
        async for piece in response.content.iter_any():
            first_s = first_s or time.perf_counter() - started
            received += piece
    events = [event.removeprefix(b"data: ") for event in bytes(received).split(b"\n\n") if event]
    if response.status != 200 or events[-1] != b"[DONE]":
        raise RuntimeError(f"the service answered {response.status}: {bytes(received)[-300:]!r}")
    texts = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    return Stream("".join(texts), first_s, len(events), len(received))


def summary(host: list[dict[str, float]], service: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of both sides, and of the ratio of adjacent runs."""
    ratios = [ours["tokens_per_s"] / bare["tokens_per_s"] for bare, ours in zip(host, service, strict=True)]
    return {
        "host": medians(host),
        "service": medians(service),
        "share": round(float(np.median(ratios)), 3),
        "share_range": (round(min(ratios), 3), round(max(ratios), 3)),
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'ms/token':>8} {'clients':>7} {'host tok/s':>10} {'service tok/s':>13} {'share':>21} {'events/s':>9} "
        f"{'kB/s':>8} {'first ms, host':>14} {'service':>8}"
    )
    for r in rows:
        share = f"{r['share']:.3f} ({r['share_range'][0]:.3f} to {r['share_range'][1]:.3f})"
        host, service = r["host"], r["service"]
        print(
            f"{r['token_ms']:>8g} {r['clients']:>7} {host['tokens_per_s']:>10.0f} {service['tokens_per_s']:>13.0f} "
            f"{share:>21} {service['chunks_per_s']:>9.0f} {service['bytes_per_s'] / 1e3:>8.1f} "
            f"{host['first_p50_ms']:>14.1f} {service['first_p50_ms']:>8.1f}"
        )


if __name__ == "__main__":
    main()

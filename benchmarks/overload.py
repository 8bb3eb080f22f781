"""Load at 1x, 2x and 4x of what a service can do: how much is answered in time, and is all that was accepted?

    python benchmarks/overload.py [--seconds 180] [--factors 1 2 4] [--json PATH]

One gateway and one host with fake experts that write 20 tokens in 0.2 s and take 16 requests at once. Capacity is
measured first by a closed loop. Then requests arrive by a Poisson process at each rate, each with its own text and a
deadline of 5 s, and are not sent again. Goodput: right answers a second that came within the deadline.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np
from chaos_service import prepare, served
from checked_clients import loaded

DEADLINE_S: Final = 5.0
WORDS: Final = " ".join(["word"] * 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="of each rate")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="of the measured capacity")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="coe-overload-") as made:
        folder = Path(made)
        prepare(folder)
        with served(folder, replicas=1, capacity=16, max_in_flight=64, path="direct") as service:
            rows = asyncio.run(run(service.url, given.seconds, given.factors, random.Random(given.seed)))
    print(table(rows))
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(any(row["broken"] for row in rows))


async def run(url: str, seconds: float, factors: Sequence[float], rng: random.Random) -> list[dict[str, Any]]:
    """Capacity, then each rate."""
    capacity = await capacity_of(url, min(seconds, 20.0))
    print(f"capacity: {capacity:.1f} requests/s", file=sys.stderr, flush=True)
    rows = []
    for factor in factors:
        rows.append(await at_rate(url, factor * capacity, seconds, rng) | {"factor": factor, "capacity": capacity})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


async def capacity_of(url: str, seconds: float) -> float:
    """Answers a second with 56 clients that send without a pause: the places of the gateway, nearly all taken."""
    async with loaded(url, 56, f" {WORDS}") as clients:
        await asyncio.sleep(2.0)
        before, began = len(clients.ended), time.monotonic()
        await asyncio.sleep(seconds)
        return (len(clients.ended) - before) / (time.monotonic() - began)


async def at_rate(url: str, rate: float, seconds: float, rng: random.Random) -> dict[str, Any]:
    """Requests at random moments, whatever becomes of those before."""
    ended: list[tuple[str, float]] = []
    timeout = aiohttp.ClientTimeout(total=60.0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def one(number: int) -> None:
            began, text = time.monotonic(), f"{number} {WORDS}"
            body = {"model": "auto", "messages": [{"role": "user", "content": text}], "coe": {"deadline_s": DEADLINE_S}}
            ended.append((await outcome(session, url, body, text), time.monotonic() - began))

        tasks, due, number, began = [], time.monotonic(), 0, time.monotonic()
        while (due := due + rng.expovariate(rate)) < began + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.ensure_future(one(number)))
            number += 1
        await asyncio.gather(*tasks)
    kinds = Counter(kind for kind, _ in ended)
    good = [s for kind, s in ended if kind == "answered" and s <= DEADLINE_S]
    return {
        "sent": number,
        "goodput": len(good) / seconds,
        "p50_s": float(np.median(good)) if good else None,
        "p99_s": float(np.quantile(good, 0.99)) if good else None,
        "refused": kinds.pop("429", 0),
        "late": kinds.pop("504", 0) + kinds["answered"] - len(good),
        "broken": {kind: n for kind, n in kinds.items() if kind != "answered"},
    }


async def outcome(session: aiohttp.ClientSession, url: str, body: dict[str, Any], text: str) -> str:
    """`answered`, the status of a refusal, or what was wrong."""
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            said = await response.json()
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return type(error).__name__
    if response.status != 200:
        return str(response.status)
    return "answered" if said["choices"][0]["message"]["content"] == text.upper() else "wrong answer"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a rate."""
    lines = [
        "| rate, of capacity | sent | goodput/s | of capacity | p50, s | p99, s | refused (429) | late | broken |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        share, n = row["goodput"] / row["capacity"], sum(row["broken"].values())
        times = " | ".join("" if row[name] is None else f"{row[name]:.2f}" for name in ("p50_s", "p99_s"))
        lines.append(
            f"| {row['factor']:g} | {row['sent']} | {row['goodput']:.1f} | {share:.2f} | {times} | {row['refused']} | "
            f"{row['late']} | {n} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

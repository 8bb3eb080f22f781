"""Half an hour of mixed load: does any process of a service grow?

    python benchmarks/soak.py [--minutes 30] [--clients 8] [--json PATH]      # make soak

Whole answers, streams, streams whose client leaves, requests that are refused, decisions alone and the list of models,
each checked. The private memory (USS) of every process is read every 5 s; growth is the median of the last fifth of the
time over that of the second fifth. The exit status is 1 if a process grows by more than 2% and 2 MiB, if processes end
or come, or if an answer is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, Final

import aiohttp
import psutil
from chaos_service import prepare, served
from serve_process import ServeProcess, title

PERIOD_S: Final = 5.0
MOST_SHARE: Final = 0.02
MOST_BYTES: Final = 2 * 2**20
"""Growth below this is noise of the allocator in a small process."""
Ask = Callable[[aiohttp.ClientSession, str, str], Awaitable[bool]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="coe-soak-") as made:
        folder = Path(made)
        prepare(folder)
        with served(folder) as service:
            found = asyncio.run(run(service, 60 * given.minutes, given.clients))
    print(table(found))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(found["wrong"]) or any(row["grows"] or not row["whole"] for row in found["processes"]))


async def run(service: ServeProcess, seconds: float, n_clients: int) -> dict[str, Any]:
    """Load and samples for so long."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    samples: dict[int, list[tuple[float, int]]] = defaultdict(list)
    titles: dict[int, str] = {}
    ends = time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=120.0)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def client(number: int) -> None:
            rng, turn = random.Random(number), 0
            while time.monotonic() < ends:
                name = rng.choice(list(KINDS))
                turn += 1
                counts[name] += 1
                if not await KINDS[name](session, service.url, f"client {number} in turn {turn}"):
                    wrong.append(name)

        clients = [asyncio.ensure_future(client(i)) for i in range(n_clients)]
        began = time.monotonic()
        while time.monotonic() < ends:
            for pid, (name, uss) in (await asyncio.to_thread(memory, service)).items():
                titles[pid] = name
                samples[pid].append((time.monotonic() - began, uss))
            await asyncio.sleep(PERIOD_S)
        await asyncio.gather(*clients)
    rows = [judged(titles[pid], each, seconds) for pid, each in samples.items()]
    return {"requests": dict(counts), "wrong": dict(Counter(wrong)), "processes": rows}


def memory(service: ServeProcess) -> dict[int, tuple[str, int]]:
    """Title and private bytes of each process."""
    found = {}
    for process in service.everything():
        with suppress(psutil.Error):
            found[process.pid] = (title(process), process.memory_full_info().uss)
    return found


def judged(name: str, samples: Sequence[tuple[float, int]], seconds: float) -> dict[str, Any]:
    """How much a process has grown. whole: it lived all the time."""
    early = [uss for at, uss in samples if 0.2 * seconds <= at < 0.4 * seconds]
    late = [uss for at, uss in samples if at >= 0.8 * seconds]
    if not (early and late):
        return {"process": name, "whole": False, "grows": False, "early": None, "late": None, "share": None}
    before, after = median(early), median(late)
    share = after / before - 1
    grows = share > MOST_SHARE and after - before > MOST_BYTES
    return {"process": name, "whole": True, "grows": grows, "early": before, "late": after, "share": share}


async def whole(session: aiohttp.ClientSession, url: str, text: str) -> bool:
    """An answer as one body."""
    async with session.post(f"{url}/v1/chat/completions", json=chat(text)) as response:
        said = await response.json()
        return response.status == 200 and said["choices"][0]["message"]["content"] == text.upper()


async def stream(session: aiohttp.ClientSession, url: str, text: str) -> bool:
    """An answer as events."""
    async with session.post(f"{url}/v1/chat/completions", json=chat(text) | {"stream": True}) as response:
        events = [line[6:] async for line in response.content if line.startswith(b"data: ")]
    pieces = [json.loads(event)["choices"] for event in events[:-1]]
    said = "".join(each[0]["delta"].get("content") or "" for each in pieces if each)
    return events[-1].strip() == b"[DONE]" and said == text.upper()


async def left(session: aiohttp.ClientSession, url: str, text: str) -> bool:
    """A stream whose client leaves after the first event."""
    body = chat(f"{text} {'word ' * 50}") | {"stream": True}
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        await response.content.readline()
        response.close()
    return response.status == 200


async def refused(session: aiohttp.ClientSession, url: str, text: str) -> bool:
    """A request for an expert that does not exist."""
    async with session.post(f"{url}/v1/chat/completions", json=chat(text) | {"model": text}) as response:
        return response.status == 404 and (await response.json())["error"]["code"] == "model_not_found"


async def decided(session: aiohttp.ClientSession, url: str, text: str) -> bool:
    """The decision alone."""
    async with session.post(f"{url}/v1/route", json=chat(text)) as response:
        return response.status == 200 and "loud" in await response.text()


async def listed(session: aiohttp.ClientSession, url: str, text: str) -> bool:
    """The models, and the metrics."""
    async with session.get(f"{url}/v1/models") as models, session.get(f"{url}/metrics") as metrics:
        return "loud" in await models.text() and "coe_requests" in await metrics.text()


def chat(text: str) -> dict[str, Any]:
    """A request for `auto`."""
    return {"model": "auto", "messages": [{"role": "user", "content": text}]}


KINDS: Final[Mapping[str, Ask]] = {
    "whole": whole,
    "stream": stream,
    "left": left,
    "refused": refused,
    "decided": decided,
    "listed": listed,
}


def table(found: Mapping[str, Any]) -> str:
    """One line a process, the largest first."""
    total = sum(found["requests"].values())
    lines = [
        f"{total:,} requests ({', '.join(f'{n:,} {name}' for name, n in found['requests'].items())}), wrong: "
        f"{found['wrong'] or 'none'}",
        "",
        "| process | MiB, second fifth | MiB, last fifth | growth, % |",
        "|---|---:|---:|---:|",
    ]
    for row in sorted(found["processes"], key=lambda row: -(row["late"] or 0)):
        if row["whole"]:
            sizes = f"{row['early'] / 2**20:.1f} | {row['late'] / 2**20:.1f} | {100 * row['share']:+.1f}"
            lines.append(f"| {row['process'][:60]} | {sizes} |")
        else:
            lines.append(f"| {row['process'][:60]} | came or ended | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

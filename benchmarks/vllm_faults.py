"""What happens to requests on the vLLM engine when something dies, hangs or is broken, under `coe serve`.

    python benchmarks/vllm_faults.py [--out FILE.json] [--model FOLDER] [--requests 50] [--tokens 200]

One service with one gateway and one host. Its experts are a tiny random Llama (or `--model`), other weights of the same
shape, adapters, and broken ones of each kind. For each fault, `--requests` requests run at once, half of them streamed;
each prompt is distinct and has the same greedy answer in an undisturbed round before. Then something is killed. Counted
are whole answers (the text must be that of the undisturbed round), answers that end in an error after their first text,
requests that fail before any text, and requests without an end after `--limit` seconds. The exit status is 1 if a check
fails. Needs vLLM (docs/vllm.md), on a CPU or a GPU; takes some six minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

import aiohttp
from vllm_fault_models import tear
from vllm_fault_service import Client, Outcome, Service, lives, serving

from coe.engines.vllm.process import on_cpu

STOP_S: Final = 30.0


@dataclass
class Row:
    """One line of the table. `ended_s`: until all requests had ended; `next_s`: until a new one was answered."""

    fault: str
    answered: int = 0
    broken: int = 0
    refused: int = 0
    hung: int = 0
    ended_s: float | None = None
    next_s: float | None = None
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        """Note a check that does not hold."""
        if not holds:
            self.failed.append(what)


class Faults:
    """The faults, in the order in which they are tried."""

    def __init__(self, service: Service, client: Client, n_requests: int, folder: Path) -> None:
        self.service, self.client, self.n_requests, self.folder = service, client, n_requests, folder
        self.expected: dict[str, str] = {}

    async def all(self, only: Sequence[str]) -> list[Row]:
        """An undisturbed round and every fault, or those whose name has one of these words; prints each row."""
        under_load: dict[str, Callable[[], None]] = {
            "kill -9 of the engine process": lambda: self.service.core.kill(),
            "SIGSTOP of the engine process": lambda: self.service.core.suspend(),
            "kill -9 of the host": lambda: self.service.host.kill(),
            "ray.kill of the host": self.service.kill_actor,
        }
        faults: dict[str, Callable[[str], Awaitable[Row]]] = {
            "two broken adapters": self.broken_adapters,
            "reload of a torn checkpoint": self.bad_checkpoint,
            "a checkpoint that lacks weights": self.refused_checkpoint,
            **{name: partial(self.under_load, disturb=disturb) for name, disturb in under_load.items()},
            "SIGTERM of coe serve": self.sigterm,
        }
        rows = [await self.undisturbed("none")]
        show(rows[0])
        for name, fault in faults.items():
            if not only or any(word in name for word in only):
                rows.append(await fault(name))
                show(rows[-1])
        return rows

    async def undisturbed(self, fault: str) -> Row:
        """The answers that every later round must give."""
        row, began = Row(fault), time.monotonic()
        outcomes = await self._round()
        row.ended_s = time.monotonic() - began
        self.expected = {prompt: outcome.text for prompt, outcome in outcomes.items()}
        _count(row, list(outcomes.values()))
        row.check(row.answered == self.n_requests, "not all requests were answered")
        row.check(len(set(self.expected.values())) > self.n_requests // 2, "the answers do not depend on the prompts")
        return row

    async def broken_adapters(self, fault: str) -> Row:
        """Adapters that cannot be served, beside base and a good one."""
        tear(self.folder / "torn")
        row, began, core = Row(fault), time.monotonic(), self.service.core.pid
        names = ["base", "good", "torn", "high"] * 3
        outcomes = await asyncio.gather(*(self.client.ask(name, "the end", tokens=8) for name in names))
        row.ended_s = time.monotonic() - began
        _count(row, outcomes)
        for name, outcome in zip(names, outcomes, strict=True):
            right = "answered" if name in ("base", "good") else "refused"
            row.check(outcome.kind == right, f"{name} is {outcome.kind}: {outcome.error}")
        row.check(self.service.core.pid == core, "the engine process is another one")
        return await self._recovered(row)

    async def bad_checkpoint(self, fault: str) -> Row:
        """A checkpoint of the same shape whose file is torn: the engine stays, and the old expert answers."""
        tear(self.folder / "torn-model")
        row, core = Row(fault), self.service.core.pid
        await self._bad(row, "torn-model")
        row.check(self.service.core.pid == core, "the engine process is another one")
        return await self._recovered(row)

    async def refused_checkpoint(self, fault: str) -> Row:
        """A checkpoint of another size, which lacks weights: the old expert leaves before, and starts again."""
        row = Row(fault)
        await self._bad(row, "refused-model")
        return await self._recovered(row)

    async def _bad(self, row: Row, name: str) -> None:
        began = time.monotonic()
        outcome = await self.client.ask(name, "the end", tokens=8)
        row.ended_s = time.monotonic() - began
        _count(row, [outcome])
        row.check(outcome.kind == "refused", f"{name} is {outcome.kind}")
        row.notes.append(f"HTTP {outcome.status}: {outcome.error[:90]}")

    async def under_load(self, fault: str, disturb: Callable[[], None]) -> Row:
        """A fault while requests run, of which some have text."""
        row = Row(fault)
        requests = await self._some_with_text(row)
        began = time.monotonic()
        await asyncio.to_thread(disturb)
        noticed = asyncio.ensure_future(self._noticed(began))
        outcomes = await requests
        row.ended_s = time.monotonic() - began
        noticed.cancel()
        with suppress(asyncio.CancelledError):
            row.notes.append(f"in /health after {await noticed:.1f} s")
        _count(row, list(outcomes.values()))
        wrong = [p for p, o in outcomes.items() if o.kind == "answered" and o.text != self.expected[p]]
        row.check(not wrong, f"{len(wrong)} answers are not those of the undisturbed round")
        row.check(not row.hung, "requests without an end")
        lost = Counter(o.error for o in outcomes.values() if o.kind == "refused")
        row.notes += [f"{count} x {error[:120]}" for error, count in lost.most_common(2)]
        row.check(row.answered > 0, "no request was answered")
        return await self._recovered(row)

    async def sigterm(self, fault: str) -> Row:
        """SIGTERM of `coe serve` while requests run: it ends, and leaves no process."""
        row, everything = Row(fault), self.service.everything()
        requests = await self._some_with_text(row)
        began = time.monotonic()
        self.service.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(self.service.process.wait, STOP_S)
        row.notes.append(f"status {status} after {time.monotonic() - began:.1f} s")
        _count(row, list((await requests).values()))
        row.ended_s = time.monotonic() - began
        while (left := [each for each in everything if lives(each)]) and time.monotonic() - began < STOP_S:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        if not left:
            row.notes.append(f"no process left after {time.monotonic() - began:.1f} s")
        row.check(not left, f"left behind: {self.service.titles(left)}")
        row.check(status == 0, f"the exit status is {status}")
        row.check(not row.hung, "requests without an end")
        return row

    async def _round(self) -> dict[str, Outcome]:
        """All requests at once: prompt -> outcome."""
        prompts = [f"{i}: the capital of france is paris, the end of the answer" for i in range(self.n_requests)]
        asked = (self.client.ask("base", prompt, stream=i % 2 == 0) for i, prompt in enumerate(prompts))
        return dict(zip(prompts, await asyncio.gather(*asked), strict=True))

    async def _some_with_text(self, row: Row) -> asyncio.Future[dict[str, Outcome]]:
        """A round, of which some streams have text."""
        self.client.with_text = 0
        requests = asyncio.ensure_future(self._round())
        while not requests.done() and self.client.with_text < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        row.check(not requests.done(), "the requests ended before the fault")
        return requests

    async def _recovered(self, row: Row) -> Row:
        """Ask until an answer is right."""
        began, prompt = time.monotonic(), next(iter(self.expected))
        outcome = await self.client.ask("base", prompt)
        row.next_s = time.monotonic() - began
        row.check(outcome.kind == "answered", f"the next request is {outcome.kind}: {outcome.error}")
        row.check(outcome.text == self.expected[prompt], "the next answer is another one")
        return row

    async def _noticed(self, began: float) -> float:
        """Seconds until `/health` lists the expert as unhealthy."""
        while not any(host.get("unhealthy") for host in (await self.client.health()).get("hosts", ())):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return time.monotonic() - began


def _count(row: Row, outcomes: Sequence[Outcome]) -> None:
    kinds = Counter(outcome.kind for outcome in outcomes)
    row.answered, row.broken = kinds["answered"], kinds["broken"]
    row.refused, row.hung = kinds["refused"], kinds["hung"]


def show(row: Row) -> None:
    """Print a row of the table."""
    seconds = " | ".join("-" if each is None else f"{each:.1f}" for each in (row.ended_s, row.next_s))
    counts = f"{row.answered} | {row.broken} | {row.refused} | {row.hung}"
    notes = "; ".join([*row.notes, *(f"FAILED: {each}" for each in row.failed)])
    print(f"| {row.fault} | {counts} | {seconds} | {notes} |", flush=True)


async def measure(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """Start the service, try every fault."""
    environment = {"OMP_NUM_THREADS": "1"} if on_cpu() else {}
    with serving(folder, arguments.model, environment) as service:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout()) as session:
            client = Client(session, service.url, arguments.tokens, arguments.limit)
            start = Row("start", next_s=await service.wait_until_ready())
            began = time.monotonic()
            outcome = await client.ask("base", "the end", tokens=8)
            start.notes.append(f"first answer, with the start of the engine, after {time.monotonic() - began:.1f} s")
            start.check(outcome.kind == "answered", f"the first request is {outcome.kind}: {outcome.error}")
            print("| fault | answered | broken | refused | hung | ended, s | next, s | notes |")
            print("|---|---|---|---|---|---|---|---|")
            show(start)
            if start.failed:
                print(service.screen[-3000:], file=sys.stderr)
                return [start]
            return [start, *await Faults(service, client, arguments.requests, folder).all(arguments.only)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of the results as JSON")
    parser.add_argument("--model", type=Path, help="folder of the base; by default a tiny random Llama")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=[], help="words in the names of the faults to try; all by default")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds after which a request counts as hung")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vllm-faults-") as folder:
        rows = asyncio.run(measure(arguments, Path(folder)))
    if arguments.out is not None:
        about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "device": "cpu" if on_cpu() else "gpu"}
        arguments.out.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())

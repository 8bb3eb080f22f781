"""Time to first token and tokens/s of the hf engine under load: batches that requests join, and static batches.

    python benchmarks/hf_admission.py MODEL_DIR [--threads 1] [--repeats 3] [--requests 48] [--json PATH|-]

Both variants are the same engine in one process, with the same weights, requests and arrival times; they take turns. A
"static" batch ends before the next one starts. Requests have prompts of 10 to 120 words and answers of 16 to 64 tokens
(an end token does not stop), of the base and of `--adapters` random adapters. Loads:

    poisson    arrivals at 70% of the rate at which the static engine answers a burst
    burst      32 requests at once, while 4 answers of 64 tokens are generated
    N clients  each sends its next request when it has the answer to the last one

With `--clock cpu` all times are seconds of CPU time of this process, arrivals included, so that other programs on the
machine disturb them least; it is meant for `--threads 1`. That clock leaps to the next arrival while nothing runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind

sys.path.insert(0, str(Path(__file__).parent))
from hf_throughput import make_adapters

WORDS = ("the", "history", "of", "a", "town", "where", "people", "live", "and", "work", "by", "the", "sea", "in", "old")
SHARE = 0.7
VARIANTS = ("static", "joined")


class Clock:
    """Seconds of the clock, or of CPU time."""

    def __init__(self) -> None:
        self.read: Callable[[], float] = time.perf_counter
        self.n_running = 0
        self._leapt = 0.0

    def now(self) -> float:
        return self.read() + self._leapt

    async def wait_until(self, at: float) -> None:
        while (left := at - self.now()) > 0:
            if self.read is time.process_time and not self.n_running:
                self._leapt += left
            await asyncio.sleep(min(left, 0.002))


CLOCK = Clock()


@dataclass(frozen=True)
class Job:
    """A request, its adapter, and when it comes."""

    request: GenerateRequest
    adapter: Adapter | None
    at_s: float = 0.0


@dataclass(frozen=True)
class Served:
    """Seconds to the first and the last chunk of an answer, and its tokens."""

    first_s: float
    total_s: float
    n_tokens: int


@dataclass(frozen=True)
class Result:
    load: str
    variant: str
    ttft_p50_ms: float
    ttft_p95_ms: float
    answer_p50_ms: float
    tokens_per_s: float


def make_jobs(n: int, adapters: Sequence[Adapter | None], seed: int, rate: float | None = None) -> list[Job]:
    rng = random.Random(seed)
    jobs, at = [], 0.0
    for i in range(n):
        words = " ".join(rng.choices(WORDS, k=rng.randint(10, 120)))
        request = GenerateRequest(prompt=f"Number {i}: {words}.", max_tokens=rng.randint(16, 64))
        at += rng.expovariate(rate) if rate else 0.0
        jobs.append(Job(request, adapters[i % len(adapters)], at))
    return jobs


async def serve(expert: HFExpert, job: Job) -> Served:
    start, first, usage = CLOCK.now(), 0.0, None
    CLOCK.n_running += 1
    async for chunk in expert.generate(job.request, job.adapter):
        first, usage = first or CLOCK.now() - start, chunk.usage
    CLOCK.n_running -= 1
    assert usage is not None
    return Served(first, CLOCK.now() - start, usage.completion_tokens)


async def open_loop(expert: HFExpert, jobs: Sequence[Job]) -> tuple[list[Served], float]:
    """Each job at its time; also returns the seconds of all."""
    start, tasks = CLOCK.now(), []
    for job in jobs:
        await CLOCK.wait_until(start + job.at_s)
        tasks.append(asyncio.create_task(serve(expert, job)))
        await asyncio.sleep(0)  # it has begun
    served = await asyncio.gather(*tasks)
    return served, CLOCK.now() - start


async def clients(expert: HFExpert, jobs: Sequence[Job], n: int) -> tuple[list[Served], float]:
    left = iter(jobs)

    async def client() -> list[Served]:
        return [await serve(expert, job) for job in left]

    start = CLOCK.now()
    served = await asyncio.gather(*(client() for _ in range(n)))
    return [each for own in served for each in own], CLOCK.now() - start


async def burst(
    expert: HFExpert, jobs: Sequence[Job], adapters: Sequence[Adapter | None]
) -> tuple[list[Served], float]:
    """The figures are those of the burst, not of the answers before it."""
    requests = [GenerateRequest(prompt=f"Number {i}: the sea", max_tokens=64) for i in range(4)]
    earlier = [Job(request, adapters[i % len(adapters)]) for i, request in enumerate(requests)]
    before = [asyncio.create_task(serve(expert, job)) for job in earlier]
    await asyncio.sleep(0)
    await CLOCK.wait_until(CLOCK.now() + 0.5)
    served = await open_loop(expert, jobs)
    await asyncio.gather(*before)
    return served


def result(load: str, variant: str, served: Sequence[Served], seconds: float) -> Result:
    firsts = sorted(each.first_s * 1e3 for each in served)
    return Result(
        load,
        variant,
        statistics.median(firsts),
        firsts[int(0.95 * (len(firsts) - 1))],
        statistics.median(each.total_s * 1e3 for each in served),
        sum(each.n_tokens for each in served) / seconds,
    )


async def measure(arguments: argparse.Namespace) -> list[Result]:
    from transformers import AutoModelForCausalLM

    engine = HFEngine(device=arguments.device, dtype=arguments.dtype, threads=arguments.threads)
    spec = ExpertSpec(name="base", kind=Kind.MODEL, source=str(arguments.model))
    expert = await engine.load(spec, arguments.model)
    object.__setattr__(expert.loaded, "eos", frozenset())  # every answer runs to its last token
    with tempfile.TemporaryDirectory() as folder:
        own: list[Adapter] = []
        if arguments.adapters:
            spare = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=expert.loaded.model.dtype)
            own = make_adapters(spare, Path(folder), arguments.adapters)
        adapters: list[Adapter | None] = [None, *own]
        joining = expert._joining

        def choose(variant: str) -> None:
            expert.__dict__["_joining"] = joining if variant == "joined" else lambda: None

        choose("static")
        await open_loop(expert, make_jobs(8, adapters, seed=0))  # warms up, and loads the adapters
        rate = None
        if "poisson" in arguments.loads:
            served, seconds = await open_loop(expert, make_jobs(32, adapters, seed=1))
            rate = SHARE * len(served) / seconds
            print(f"the static engine answers {len(served) / seconds:.2f} requests/s of a burst", file=sys.stderr)

        async def run(load: str, seed: int) -> tuple[list[Served], float]:
            if load == "poisson":
                return await open_loop(expert, make_jobs(arguments.requests, adapters, seed, rate))
            if load == "burst":
                return await burst(expert, make_jobs(32, adapters, seed), adapters)
            n = int(load.split()[0])
            return await clients(expert, make_jobs(max(6, 2 * n), adapters, seed), n)

        loads = [*arguments.loads, *(f"{n} clients" for n in arguments.clients)]
        found: dict[tuple[str, str], list[Result]] = {}
        for repeat in range(arguments.repeats):
            for load in loads:
                for variant in VARIANTS if repeat % 2 == 0 else VARIANTS[::-1]:
                    choose(variant)
                    found.setdefault((load, variant), []).append(result(load, variant, *await run(load, 100 + repeat)))
                    print(found[load, variant][-1], file=sys.stderr)
        await engine.unload(expert)
    return [medians(results) for results in found.values()]


def medians(results: Sequence[Result]) -> Result:
    rows = [asdict(each) for each in results]
    numbers = {
        name: statistics.median(row[name] for row in rows) for name in rows[0] if name not in ("load", "variant")
    }
    return Result(results[0].load, results[0].variant, **numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=48, help="of the Poisson load")
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--loads", nargs="*", choices=["poisson", "burst"], default=["poisson", "burst"])
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", help="file to write the results to, or -")
    arguments = parser.parse_args()
    if arguments.clock == "cpu":
        CLOCK.read = time.process_time
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    results = asyncio.run(measure(arguments))
    print(f"{'load':<11} {'variant':<8} {'TTFT p50':>9} {'p95':>8} {'answer p50':>11} {'tok/s':>7}   (ms)")
    for r in results:
        print(
            f"{r.load:<11} {r.variant:<8} {r.ttft_p50_ms:>9.0f} {r.ttft_p95_ms:>8.0f} {r.answer_p50_ms:>11.0f} "
            f"{r.tokens_per_s:>7.1f}"
        )
    if arguments.json:
        text = json.dumps([asdict(r) for r in results], indent=2)
        sys.stdout.write(text + "\n") if arguments.json == "-" else Path(arguments.json).write_text(text)


if __name__ == "__main__":
    main()

"""Six full-weight experts, memory for two: served in order of arrival, and grouped by expert, against a lower bound.

    python benchmarks/expert_batches.py [--queries 240] [--window 32] [--two-stage 48] [--repeats 1] [--json PATH]

The experts are adapters of the zoo merged into SmolLM2 (written to --folder, or a temporary one; 540 MB each in
float32). The queries are those of the zoo's tasks in random order, answered greedily in this process on one thread:

    in order    windows of arrivals, grouped by expert within a window, weights in an LRU cache of two
    batch       `run_batch` in this process: one load per expert and stage, the next one while this one answers
    bound       each expert loaded once with nothing else running, then all its queries in full batches; as a sum, and
                `overlapped`, with every load but the first hidden behind the work before it

`--two-stage N` also sends N queries to two experts each, merged by one of two aggregators. All ways must give the same
outputs. `cpu` is the CPU time of this process, which other programs on the machine disturb least.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from coe.batch.answering import Answerer, LoadCounter, WorkReport
from coe.batch.parts import Job, PartRouter, PlannedPart, open_router, step_part
from coe.batch.planning.plan import plan_batch
from coe.batch.planning.rates import rates_of_run
from coe.batch.run import run_batch
from coe.batch.source import Split
from coe.batch.stages import WorkItem
from coe.compose import ExpertCall, Final
from coe.config import Config, load_config
from coe.host import Host
from coe.hosting import open_host
from coe.orchestrator import Orchestrator, query_of
from coe.types import Answer, Failure, GenerateRequest
from examples.zoo.fetch import fetch
from routers.artifacts import save
from routers.base import Message
from routers.encoders.build import build_encoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable

ZOO = Path(__file__).parent.parent / "examples" / "zoo"
EXPERTS = ("dates", "fields", "intent", "sentiment", "shell", "sql")
AGGREGATORS = {"dates": "fields", "fields": "intent", "intent": "fields", "sentiment": "intent", "shell": "fields"}
"""Aggregator by the task of the question; `intent` for all others."""
Stage = dict[str, list[GenerateRequest]]
"""The requests of each expert in a stage."""


@dataclass
class Way:
    """Cost of one way."""

    loads: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    seconds: float = 0.0
    cpu_s: float = 0.0
    outputs: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds, self.cpu_s = time.perf_counter() - wall, time.process_time() - cpu

    def count(self, host: Host) -> None:
        stats = host.cache.stats
        self.loads, self.loaded_bytes, self.load_s = stats.loads, stats.bytes_loaded, stats.load_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=240, help="of the run with one stage")
    parser.add_argument("--window", type=int, default=32, help="arrivals that are grouped in order of arrival")
    parser.add_argument("--two-stage", type=int, default=0, help="queries of the run with two stages")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps the merged experts")
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        experts = given.folder or Path(scratch) / "experts"
        config = write_service(Path(scratch), experts, given.max_batch)
        both = [row | {"model": f"coe/{aggregator_of(row['model'])}"} for row in queries(given.two_stage)]
        found = {
            name: compare(config, Path(scratch), rows, given.window, given.repeats)
            for name, rows in (("one stage", queries(given.queries)), ("two stages", both))
            if rows
        }
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def compare(config: Config, scratch: Path, rows: Sequence[dict[str, Any]], window: int, repeats: int) -> dict[str, Any]:
    """All ways, alternating; medians over the repeats."""
    source = scratch / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken: dict[str, list[Way]] = {}
    stages: list[Stage] = []
    for repeat in range(repeats):
        in_order, stages = asyncio.run(in_order_of_arrival(config, rows, window))
        taken.setdefault("in order", []).append(in_order)
        taken.setdefault("batch", []).append(by_expert(config, source, scratch / f"out-{len(rows)}-{repeat}"))
        taken.setdefault("bound", []).append(asyncio.run(bound(config, stages)))
    ways = {name: summary(each) for name, each in taken.items()}
    outputs = [way.outputs for name in ("in order", "batch") for way in taken[name]]
    same = all(each == outputs[0] for each in outputs)
    show(len(rows), stages, ways, same)
    return {"queries": len(rows), "loads_needed": [len(stage) for stage in stages], "same_outputs": same, "ways": ways}


async def in_order_of_arrival(config: Config, rows: Sequence[dict[str, Any]], window: int) -> tuple[Way, list[Stage]]:
    """Windows of arrivals; in each, step by step, one expert after the other in order of its first question."""
    way, stages = Way(), list[Stage]()
    async with open_host(config) as host:
        router = open_router(config, host.snapshot)
        asking = Orchestrator(host.snapshot, {}, ask=host.ask)
        with way.timed():
            for start in range(0, len(rows), window):
                await answer_window(router, asking, rows[start : start + window], way, stages)
        way.count(host)
    return way, stages


async def answer_window(
    router: Orchestrator, asking: Orchestrator, rows: Sequence[dict[str, Any]], way: Way, stages: list[Stage]
) -> None:
    requests = [request_of(row) for row in rows]
    routed = [router.route([query_of(request)], row["model"])[0] for request, row in zip(requests, rows, strict=True)]
    done: list[dict[str, Answer | Failure]] = [{} for _ in rows]
    stage = 0
    while True:
        calls: dict[str, list[tuple[int, ExpertCall]]] = {}
        for i, (request, each) in enumerate(zip(requests, routed, strict=True)):
            if rows[i]["id"] in way.outputs:
                continue
            following = each.composition.step(request, each.decision, done[i])
            if isinstance(following, Final):
                way.outputs[rows[i]["id"]] = following.answer.text
                continue
            for call in following.calls:
                calls.setdefault(call.expert, []).append((i, call))
        if not calls:
            return
        stages += [{}] if stage == len(stages) else []
        for expert, mine in calls.items():
            stages[stage].setdefault(expert, []).extend(call.request for _, call in mine)
            outcomes = await asyncio.gather(*(asking.whole(call) for _, call in mine))
            for (i, call), outcome in zip(mine, outcomes, strict=True):
                done[i][call.id] = outcome
        stage += 1


def by_expert(config: Config, source: Path, output: Path) -> Way:
    """The batch's own code, all in this process."""
    way = Way()
    with InProcess(config) as executor:
        with way.timed():
            run = run_batch(config, source=str(source), output=str(output), executor=executor.opened, watch=Unseen())
        way.count(executor.host)
        waited = sum(executor.waited_s.values())
    table = pq.read_table(output / "results.parquet")
    way.outputs = dict(zip(table.column("id").to_pylist(), table.column("answer").to_pylist(), strict=True))
    phases = run["sessions"][0]["phase_s"]
    rates = rates_of_run(str(output), executor.host.snapshot)
    planned = plan_batch(config, source=str(source), watch=Unseen(), rates=rates).record()["totals"]
    way.more = {
        "answering_s": sum(seconds for name, seconds in phases.items() if name.startswith("answering")),
        "planned_s": planned["seconds"],
        "planned_loads": planned["loads"],
        "load_s_waited_for": waited,
        "load_share_hidden": 1 - waited / way.load_s,
    }
    return way


class InProcess:
    """An executor of a batch with one host, in a thread with an event loop, for all stages."""

    hosts = 1

    def __init__(self, config: Config) -> None:
        self._config, self._loop = config, asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self.waited_s: dict[tuple[int, str], float] = {}

    def __enter__(self) -> InProcess:
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.host = self._wait(self._stack.enter_async_context(open_host(self._config)))
        self._loads = LoadCounter(self.host)
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)

    @contextmanager
    def opened(self) -> Iterator[InProcess]:
        yield self

    def route(self, job: Job, bundles: Sequence[tuple[Split, ...]]) -> Iterator[PlannedPart]:
        router = PartRouter(job, open_router(job.config, job.snapshot))
        for bundle in bundles:
            yield from router.route(bundle)

    def step(self, job: Job, stage: int, parts: Sequence[int]) -> Iterator[PlannedPart]:
        return (step_part(job, part, stage) for part in parts)

    def answer(self, job: Job, stage: int, items: Sequence[WorkItem]) -> Iterator[WorkReport]:
        reports: list[WorkReport] = []
        for number, units in enumerate(items):
            following = items[number + 1][0].residency if number + 1 < len(items) else None
            with self._watched(stage):
                answerer = Answerer(
                    self.host, job.folder, stage, units, reports.append, loads=self._loads, following=following
                )
                self._wait(answerer.run())
        yield from reports

    @contextmanager
    def _watched(self, stage: int) -> Iterator[None]:
        """Notes the longest that a call of each expert waited for weights."""
        call: Callable[..., Any] = self.host.ask

        async def watched(name: str, request: GenerateRequest) -> Any:
            async for chunk in call(name, request):
                if chunk.timing is not None:
                    key = (stage, name)
                    self.waited_s[key] = max(self.waited_s.get(key, 0.0), chunk.timing.load_s)
                yield chunk

        self.host.ask = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.host.ask = call  # type: ignore[method-assign]

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def bound(config: Config, stages: Sequence[Stage]) -> Way:
    """Load, then generate, sequentially."""
    way = Way()
    seconds = 0.0
    overlapped = 0.0
    async with open_host(config) as host:
        asking = Orchestrator(host.snapshot, {}, ask=host.ask)
        with way.timed():
            for stage in stages:
                steps = [await load_and_work(host, asking, expert, stage[expert]) for expert in stage]
                seconds += sum(load_s + work_s for load_s, work_s in steps)
                hidden = (min(steps[i][1], steps[i + 1][0]) for i in range(len(steps) - 1))
                overlapped += sum(load_s + work_s for load_s, work_s in steps) - sum(hidden)
        way.count(host)
    way.seconds, way.more = seconds, {"overlapped_s": overlapped, "generation_s": seconds - way.load_s}
    return way


async def load_and_work(
    host: Host, asking: Orchestrator, expert: str, requests: Sequence[GenerateRequest]
) -> tuple[float, float]:
    began = time.perf_counter()
    async with host.cache.lease(host.snapshot.experts[expert].ref):
        loaded = time.perf_counter()
        await asyncio.gather(*(asking.whole(ExpertCall("0", expert, request)) for request in requests))
        return loaded - began, time.perf_counter() - loaded


def summary(ways: Sequence[Way]) -> dict[str, Any]:
    def median(of: Callable[[Way], float]) -> float:
        return round(statistics.median(map(of, ways)), 3)

    return {
        "loads": ways[0].loads,
        "loaded_mib": round(ways[0].loaded_bytes / 2**20),
        "load_s": median(lambda way: way.load_s),
        "seconds": median(lambda way: way.seconds),
        "cpu_s": median(lambda way: way.cpu_s),
        **{name: median(lambda way, name=name: way.more[name]) for name in ways[0].more},
    }


def show(n_rows: int, stages: Sequence[Stage], ways: dict[str, dict[str, Any]], same: bool) -> None:
    calls = [sum(map(len, stage.values())) for stage in stages]
    print(f"{n_rows} queries; calls by stage: {calls}, of {[len(stage) for stage in stages]} experts")
    print(
        f"{'way':<10} {'loads':>6} {'MiB':>7} {'load s':>7} {'seconds':>8} {'/ bound':>8} {'cpu s':>7} {'/ bound':>8}"
    )
    least = ways["bound"]
    for name, way in ways.items():
        figures = f"{way['loads']:>6} {way['loaded_mib']:>7} {way['load_s']:>7.1f} {way['seconds']:>8.1f}"
        ratios = (way["seconds"] / least["seconds"], way["cpu_s"] / least["cpu_s"])
        print(f"{name:<10} {figures} {ratios[0]:>8.2f} {way['cpu_s']:>7.1f} {ratios[1]:>8.2f}")
    overlapped, batch = least["overlapped_s"], ways["batch"]
    print(f"overlapped bound {overlapped:.1f} s: the batch took {batch['seconds'] / overlapped:.2f} of it")
    print(f"loads hidden behind work: {batch['load_share_hidden']:.0%}; answering took {batch['answering_s']:.1f} s")
    print(f"`coe plan --like` this run: {batch['planned_loads']:.0f} loads, {batch['planned_s']:.1f} s")
    print("the same outputs" if same else "THE OUTPUTS DIFFER", flush=True)


class Unseen:
    """A watcher that shows nothing."""

    def phase(self, name: str, totals: Any) -> None:
        print(f"  {name}", file=sys.stderr)

    def advance(self, name: str, done: int, failed: int = 0) -> None:
        pass


def queries(n_rows: int) -> list[dict[str, Any]]:
    """Queries of the zoo's tasks, as many of each, in random order; each names the expert of its task."""
    rows = []
    for name in EXPERTS:
        task = yaml.safe_load((ZOO / "tasks" / f"{name}.yaml").read_text())
        lines = (ZOO / "tasks" / task["data"]).read_text().splitlines()
        for line in lines[: -(-n_rows // len(EXPERTS))]:
            row = json.loads(line)
            known = {"id": row["id"], "prompt": row["prompt"], "max_tokens": task["max_tokens"], "model": name}
            rows.append(known)
    random.Random(0).shuffle(rows)
    return rows[:n_rows]


def request_of(row: dict[str, Any]) -> GenerateRequest:
    return GenerateRequest((Message("user", row["prompt"]),), max_tokens=row["max_tokens"], stream=False)


def write_service(scratch: Path, experts: Path, max_batch: int) -> Config:
    """A configuration of the merged experts with memory for two, and policies that aggregate two answers."""
    for name in EXPERTS:
        if not (experts / name / "config.json").exists():
            merge(name, experts / name)
    specs = [{"name": name, "kind": "model", "source": str((experts / name).resolve())} for name in EXPERTS]
    (scratch / "experts.yaml").write_text(yaml.safe_dump({"experts": specs}))
    train_router(scratch / "router")
    policies = {
        name: {"router": "router", "composition": {"kind": "aggregate", "aggregator": name}, "k": 2}
        for name in ("fields", "intent")
    }
    service = {
        "experts": ["experts.yaml"],
        "engines": {"hf": {"dtype": "float32", "device": "cpu", "threads": 1, "max_batch": max_batch}},
        "policies": policies,
        "default_policy": "intent",
        "host": {"budget": 1},
    }
    path = scratch / "service.yaml"
    path.write_text(yaml.safe_dump(service))
    size = asyncio.run(largest(load_config(path)))
    path.write_text(yaml.safe_dump(service | {"host": {"budget": 2 * size + size // 2}}))
    return load_config(path)


async def largest(config: Config) -> int:
    async with open_host(config) as host:
        return max(host.footprint(name) for name in EXPERTS)


def merge(name: str, folder: Path) -> None:
    """Merge a zoo adapter into its base, as a full model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"  merging {name}", file=sys.stderr)
    base = fetch("smollm2")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(ZOO / "adapters" / name)).merge_and_unload()
    merged.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def aggregator_of(task: str) -> str:
    return AGGREGATORS.get(task, "intent")


def train_router(folder: Path) -> None:
    """Ranks the expert of a query's task first, and the one before it in the list second."""
    rows = queries(20 * len(EXPERTS))
    best = [EXPERTS.index(row["model"]) for row in rows]
    scores = np.zeros((len(rows), len(EXPERTS)))
    for i, expert in enumerate(best):
        scores[i, expert], scores[i, expert - 1] = 1.0, 0.5
    encoder = build_encoder("hashing:1024")
    table = OutcomeTable(
        query_ids=tuple(row["id"] for row in rows),
        prompts=tuple(row["prompt"] for row in rows),
        experts=EXPERTS,
        scores=scores,
    )
    save(build("knn", encoder, {"k": 5}).fit(table), folder, table=table, encoder=encoder)


if __name__ == "__main__":
    main()

"""`coe batch`: loads and rows per second against answering query by query, and its memory over many rows.

    python benchmarks/batch.py swaps [--rows 400] [--json PATH]
    python benchmarks/batch.py memory [--rows 1000000] [--json PATH]

`swaps`: four experts that take 0.5 s to load, with memory for one, called in random order: one request at a time, 32 at
a time (both through a Host in this process), and as a batch. All must give the same answers.

`memory`: short rows and the fake engine; the resident memory of each kind of process, in ten equal spans of time.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from coe.config import load_config
from coe.hosting import open_host
from coe.orchestrator import Orchestrator
from coe.types import GenerateRequest
from routers.base import Message

EXPERTS = ("ant", "bee", "cat", "dog")
SIZE_BYTES = 2**20
SERVICE = """
experts: [experts.yaml]
host: {{budget: {budget}}}
engines: {{fake: {{load_delay_s: {load_s}, token_delay_s: {token_s}, capacity: {capacity}}}}}
policies:
  default: {{expert: ant}}
"""
TENTHS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure coe batch.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rows in (("swaps", 400), ("memory", 1_000_000)):
        command = commands.add_parser(name)
        command.add_argument("--rows", type=int, default=rows)
        command.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = (swaps if given.command == "swaps" else memory)(Path(folder), given.rows)
    print(json.dumps(found))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def swaps(folder: Path, n_rows: int) -> dict[str, Any]:
    service = write_service(folder, budget=SIZE_BYTES, load_s=0.5, token_s=0.005, capacity=16)
    rng = random.Random(0)
    asked = [(rng.choice(EXPERTS), f"question {i} of {n_rows}") for i in range(n_rows)]
    rivals = [asyncio.run(through_host(service, asked, at_once)) for at_once in (1, 32)]
    rivals.append(through_batch(folder, service, asked))
    answers = [rival.pop("answers") for rival in rivals]
    print(f"{'way':<28} {'loads':>6} {'seconds':>9} {'rows/s':>8}")
    for rival in rivals:
        print(f"{rival['way']:<28} {rival['loads']:>6} {rival['seconds']:>9.1f} {rival['rows_per_s']:>8.1f}")
    same = all(each == answers[0] for each in answers)
    print("the same answers" if same else "THE ANSWERS DIFFER")
    return {"rows": n_rows, "experts": len(EXPERTS), "same_answers": same, "rivals": rivals}


async def through_host(service: Path, asked: Sequence[tuple[str, str]], at_once: int) -> dict[str, Any]:
    """Send requests in order, `at_once` at a time."""
    answers: dict[int, str] = {}
    async with open_host(load_config(service)) as host:
        orchestrator = Orchestrator(host.snapshot, {}, ask=host.ask)
        left = iter(enumerate(asked))

        async def call() -> None:
            for i, (expert, text) in left:
                request = GenerateRequest(messages=(Message("user", text),))
                answers[i] = await orchestrator.answer(request, model=expert).text()

        started = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(at_once)))
        seconds = time.perf_counter() - started
        loads = sum(host.loads.values())
    return figures(f"host, {at_once} at a time", loads, seconds, [answers[i] for i in range(len(asked))])


def through_batch(folder: Path, service: Path, asked: Sequence[tuple[str, str]]) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text, "model": expert}) + "\n" for expert, text in asked))
    started = time.perf_counter()
    subprocess.run(command(service, rows, folder / "out"), check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - started
    run = json.loads((folder / "out" / "run.json").read_text())
    answers = pq.read_table(folder / "out" / "results.parquet").column("answer").to_pylist()
    session = run["sessions"][0]
    found = figures("batch, all of the command", sum(session["loads"].values()), seconds, answers)
    return found | {"phase_s": session["phase_s"]}


def figures(way: str, loads: int, seconds: float, answers: list[str]) -> dict[str, Any]:
    rows_per_s = round(len(answers) / seconds, 1)
    return {"way": way, "loads": loads, "seconds": round(seconds, 1), "rows_per_s": rows_per_s, "answers": answers}


def memory(folder: Path, n_rows: int) -> dict[str, Any]:
    service = write_service(folder, budget=len(EXPERTS) * SIZE_BYTES, load_s=0, token_s=0, capacity=64)
    rows, out = folder / "rows.jsonl", folder / "out"
    with rows.open("w") as file:
        for i in range(n_rows):
            expert = EXPERTS[i % len(EXPERTS)]
            file.write(json.dumps({"prompt": f"number {i} is a short row", "model": expert}) + "\n")
    started = time.perf_counter()
    process = subprocess.Popen(command(service, rows, out), stdout=sys.stderr)
    samples = list(sampled(process, started))
    if process.wait():
        sys.exit("the batch failed")
    seconds = time.perf_counter() - started
    run = json.loads((out / "run.json").read_text())
    tenths = by_tenth(samples, seconds)
    show(tenths, seconds)
    sizes = {path.name: path.stat().st_size for path in (rows, *sorted(out.glob("results.*")))}
    phases = run["sessions"][0]["phase_s"]
    print(f"{n_rows:,} rows in {seconds:.0f} s: {n_rows / seconds:,.0f} rows/s; phases (s): {phases}; bytes: {sizes}")
    return {
        "rows": n_rows,
        "seconds": round(seconds, 1),
        "rows_per_s": round(n_rows / seconds),
        "phase_s": phases,
        "bytes": sizes,
        "peak_rss_mib_by_tenth": tenths,
        "results": run["results"],
    }


def sampled(process: subprocess.Popen[bytes], started: float) -> Iterator[tuple[float, dict[str, float]]]:
    """Samples twice a second: seconds, and the largest resident memory in MiB of a process of each kind."""
    root = psutil.Process(process.pid)
    while process.poll() is None:
        largest: dict[str, float] = defaultdict(float)
        for each in (root, *root.children(recursive=True)):
            try:
                kind = "driver" if each.pid == root.pid else kind_of(each.cmdline())
                largest[kind] = max(largest[kind], each.memory_info().rss / 2**20)
            except psutil.Error:
                continue  # ended since it was listed
        yield time.perf_counter() - started, dict(largest)
        time.sleep(0.5)


def kind_of(words: Sequence[str]) -> str:
    line = " ".join(words)
    kinds = {"_Router": "router", "_HostActor": "host", "_step": "planner", "ray::": "idle worker", "raylet": "raylet"}
    return next((kind for mark, kind in kinds.items() if mark in line), "other")


def by_tenth(samples: Sequence[tuple[float, dict[str, float]]], seconds: float) -> list[dict[str, float]]:
    """The peak of each kind of process in each tenth of the time."""
    tenths: list[dict[str, float]] = [{} for _ in range(TENTHS)]
    for at, largest in samples:
        tenth = tenths[min(TENTHS - 1, int(TENTHS * at / seconds))]
        for kind, mib in largest.items():
            tenth[kind] = round(max(tenth.get(kind, 0.0), mib))
    return tenths


def show(tenths: Sequence[dict[str, float]], seconds: float) -> None:
    kinds = sorted({kind for tenth in tenths for kind in tenth})
    print("peak MiB    " + "".join(f"{kind:>13}" for kind in kinds))
    for i, tenth in enumerate(tenths, start=1):
        print(f"{i * seconds / TENTHS:>6.0f} s {10 * i:>2}%" + "".join(f"{tenth.get(kind, ''):>13}" for kind in kinds))


def write_service(folder: Path, *, budget: int, load_s: float, token_s: float, capacity: int) -> Path:
    specs = (f"  - {{name: {name}, kind: model, source: 'fake://upper', size_bytes: {SIZE_BYTES}}}" for name in EXPERTS)
    (folder / "experts.yaml").write_text("experts:\n" + "\n".join(specs) + "\n")
    service = folder / "service.yaml"
    service.write_text(SERVICE.format(budget=budget, load_s=load_s, token_s=token_s, capacity=capacity))
    return service


def command(service: Path, rows: Path, out: Path) -> list[str]:
    words = ["batch", "--config", str(service), "--input", str(rows), "--out", str(out)]
    return [sys.executable, "-c", "from coe.cli.entry import main; main()", *words]


if __name__ == "__main__":
    main()

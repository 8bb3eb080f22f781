"""Sixteen experts with full weights, memory for four: requests as they come, and all at once, against bounds.

    python benchmarks/many_experts.py MODEL_DIR [--experts 16] [--memory 4] [--requests 96] [--engine hf] [--json PATH]
    python benchmarks/many_experts.py --simulate LOAD_S PROMPT_S TOKEN_S --rate PER_S [--seeds 20]

The experts are copies of the model in MODEL_DIR with other values in their weights, popular by Zipf's law (exponent 1).
Every request has its own short prompt and `--tokens` new tokens. First all requests come at once (a batch), which also
gives the capacity; then, at each share of it in `--loads`, they come as a Poisson process, the same one for every way:

    oldest-lru  the host with an aging bound of a microsecond, so that the oldest request goes first, and `lru`
    ours        the host as it is (`host.aging_s` of --aging-s)

With `--engine vllm` (and `--memory 1`) all experts take turns in one process of vLLM, which reads weights in place.
All ways must give the same answers. `fewest` are the loads of Belady's policy (1966) on the order in which a way began
its answers, and on the order of arrival. `simulated` is `coe.simulation` on the same requests, with the seconds of a
load, of a prompt and of a token that were measured alone (`machine_of`); these are printed below the table.

The second form only simulates, without a model: such requests with the seconds that are given, at the same shares of
the capacity PER_S, for each of so many seeds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from switching import variant

from coe.engines.hf.engine import HFEngine
from coe.host import Host
from coe.memory import lru
from coe.memory.eviction import look_ahead
from coe.sampling import SamplingOptions
from coe.simulation.bound import fewest_loads
from coe.simulation.compare import Comparison, Row
from coe.simulation.workload import Machine, Workload
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

WAYS: Final = {"oldest-lru": lru, "ours": look_ahead}
PROMPT_TOKENS: Final = 38.0
"""Tokens of a prompt with SmolLM2's chat template, for a simulation without a model."""
VLLM_BYTES: Final = 2**30 + 64 * 2**20
"""What a process of vLLM takes beside the weights: itself, and its key-value cache."""
IN_ORDER_S: Final = 1e-6
"""Aging bound under which every request is overdue at once, so that the oldest goes first."""


@dataclass
class Request:
    """One request of the load, and what became of it."""

    expert: str
    prompt: str
    at_s: float
    waited_s: float = 0.0
    began_s: float = 0.0
    first_s: float = 0.0
    done_s: float = 0.0
    text: str = ""


@dataclass
class Found:
    """What one way did with the requests."""

    loads: int
    switches: int
    makespan_s: float
    cpu_s: float
    requests: list[Request] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--simulate", type=float, nargs=3, metavar=("LOAD_S", "PROMPT_S", "TOKEN_S"))
    parser.add_argument("--rate", type=float, help="with --simulate: the capacity, in requests per second")
    parser.add_argument("--seeds", type=int, default=20, help="with --simulate: runs of each load")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--memory", type=int, default=4, help="experts that fit in memory")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf", help="vllm: one expert in memory at a time")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.5, 0.8, 1.1], help="shares of the capacity")
    parser.add_argument("--aging-s", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    if given.simulate is not None:
        if given.rate is None:
            parser.error("--simulate needs --rate")
        print(simulated_only(given))
        return
    if given.model is None:
        parser.error("name a model, or --simulate")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {f"e{i:02}": variant(given.model, Path(scratch) / f"e{i:02}", i) for i in range(given.experts)}
        found = asyncio.run(measure(folders, given))
    print(table(found))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


async def measure(folders: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """All ways, one after the other, on each load."""
    speed = await speeds(folders, given)
    size = bytes_of_one(folders, given)
    machine = machine_of(speed, size, given.memory)
    capacity: float | None = None
    rows: list[dict[str, Any]] = []
    texts: dict[str, set[str]] = {}
    for load in (None, *given.loads):  # None: all at once
        at_s = None if load is None or capacity is None else arrivals(given, load * capacity)
        for way in WAYS:
            requests = requests_of(folders, given, at_s)
            found = await run(folders, way, requests, given)
            for request in found.requests:
                texts.setdefault(request.prompt, set()).add(request.text)
            rows.append(row(way, load, found, size, machine, speed, given))
            print(rows[-1], file=sys.stderr)
        if load is None:
            capacity = given.requests / min(each["makespan_s"] for each in rows)
    same = all(len(each) == 1 for each in texts.values())
    return {
        "speeds": speed,
        "machine": asdict(machine),
        "capacity_per_s": capacity,
        "same_answers": same,
        "rows": rows,
    }


def machine_of(speed: dict[str, float], size: int, memory: int) -> Machine:
    """The simulated device.

    The forward of a prompt costs what that of a token does, and its tokens: the prompts of a batch share the former.
    So the rate of prompts is that of the tokens alone, and an answer has as many steps as tokens.
    """
    return Machine(
        memory * size,
        bytes_per_s=size / speed["load_s"],
        prompt_tokens_per_s=speed["prompt_tokens"] / max(1e-3, speed["prompt_s"] - speed["token_s"]),
        new_tokens_per_s=1 / speed["token_s"],
        places=32,
    )


def engine_of(given: argparse.Namespace) -> Any:
    if given.engine == "hf":
        return HFEngine("cpu", "float32", threads=1)
    from coe.engines.vllm.engine import VLLMEngine

    return VLLMEngine("float32", max_model_len=256, kv_cache_bytes=64 * 2**20, max_loras=0, canary="off")


def bytes_of_one(folders: dict[str, Path], given: argparse.Namespace) -> int:
    return int(engine_of(given).footprint(spec_of("any", next(iter(folders.values())), given.engine)))


def host_of(folders: dict[str, Path], given: argparse.Namespace, memory: int, eviction: Any, aging_s: float) -> Host:
    """A host with memory for so many experts."""
    return Host(
        Snapshot(1, {name: spec_of(name, folder, given.engine) for name, folder in folders.items()}),
        {given.engine: engine_of(given)},
        budget_bytes=memory * (bytes_of_one(folders, given) + (VLLM_BYTES if given.engine == "vllm" else 0)),
        locate=lambda spec: folders[spec.name],
        aging_s=aging_s,
        eviction=eviction,
    )


def spec_of(name: str, folder: Path, engine: str) -> ExpertSpec:
    from registry.headers import read_weights

    parameters = sum(tensor.elements for tensor in read_weights(folder)[0].values())
    return ExpertSpec(
        name=name,
        kind=Kind.MODEL,
        source=str(folder),
        architecture="LlamaForCausalLM",
        parameters_total=parameters,
        engine=engine,
    )


def requests_of(names: Collection[str], given: argparse.Namespace, at_s: Sequence[float] | None) -> list[Request]:
    """The same experts and prompts for every way and load."""
    rng = np.random.default_rng(given.seed)
    weights = 1 / np.arange(1, len(names) + 1)
    experts = rng.choice(sorted(names), size=given.requests, p=weights / weights.sum())
    times = at_s if at_s is not None else [0.0] * given.requests
    return [
        Request(str(name), f"Say something about the number {i}.", t)
        for i, (name, t) in enumerate(zip(experts, times, strict=True))
    ]


def arrivals(given: argparse.Namespace, per_s: float) -> list[float]:
    """A Poisson process of that rate."""
    gaps = np.random.default_rng(given.seed + 1).exponential(1 / per_s, given.requests)
    return [float(at) for at in np.cumsum(gaps) - gaps[0]]


async def run(folders: dict[str, Path], way: str, requests: list[Request], given: argparse.Namespace) -> Found:
    """Send the requests when they are due to a host of that way."""
    host = host_of(folders, given, given.memory, WAYS[way], IN_ORDER_S if way == "oldest-lru" else given.aging_s)
    started, cpu = time.perf_counter(), time.process_time()

    async def send(request: Request) -> None:
        await asyncio.sleep(max(0.0, request.at_s - (time.perf_counter() - started)))
        sent = time.perf_counter()
        async with aclosing(host.ask(request.expert, asked(request.prompt, given.tokens))) as chunks:
            async for chunk in chunks:
                if chunk.text and not request.text:
                    request.first_s = time.perf_counter() - sent
                request.text += chunk.text
                if chunk.timing is not None:
                    request.waited_s = chunk.timing.queue_s
                    request.began_s = sent - started + chunk.timing.queue_s + chunk.timing.load_s
        request.done_s = time.perf_counter() - sent
        request.first_s = request.first_s or request.done_s

    try:
        await asyncio.gather(*map(send, requests))
        seconds = time.perf_counter() - started
        stats = host.cache.stats
        return Found(stats.loads, stats.switches, seconds, time.process_time() - cpu, requests)
    finally:
        await host.aclose()


def asked(prompt: str, tokens: int) -> GenerateRequest:
    return GenerateRequest(
        messages=(Message("user", prompt),), max_tokens=tokens, sampling=SamplingOptions(ignore_eos=True)
    )


async def speeds(folders: dict[str, Path], given: argparse.Namespace) -> dict[str, float]:
    """Medians of what a switch, a prompt and a token take alone, in a host with memory for one expert."""
    host = host_of(folders, given, 1, lru, given.aging_s)
    load_s: list[float] = []
    prompt_s: list[float] = []
    token_s: list[float] = []
    try:
        for name in [*folders][:6]:
            first, _ = await alone(host, name, 1, 7)
            one, prompt = await alone(host, name, 1, 8)
            _, whole = await alone(host, name, given.tokens, 9)
            load_s.append(first.timing.load_s)
            prompt_s.append(prompt)
            token_s.append((whole - prompt) / (given.tokens - 1))
            tokens = one.usage.prompt_tokens
    finally:
        await host.aclose()
    medians = {"load_s": load_s[1:], "prompt_s": prompt_s[1:], "token_s": token_s[1:]}  # the first one opens the slot
    return {name: float(np.median(values)) for name, values in medians.items()} | {"prompt_tokens": float(tokens)}


async def alone(host: Host, name: str, tokens: int, number: int) -> tuple[Any, float]:
    """The last chunk of an answer to a prompt of its own, and its seconds."""
    started = time.perf_counter()
    async with aclosing(host.ask(name, asked(f"Say something about the number {number}.", tokens))) as chunks:
        async for chunk in chunks:
            last = chunk
    return last, time.perf_counter() - started


def row(
    way: str,
    load: float | None,
    found: Found,
    size: int,
    machine: Machine,
    speed: dict[str, float],
    given: argparse.Namespace,
) -> dict[str, Any]:
    """The figures of a run beside its bounds and its simulation."""
    requests = found.requests
    began = [(request.expert,) for request in sorted(requests, key=lambda each: each.began_s)]
    workload = workload_of(requests, size, int(speed["prompt_tokens"]), given.tokens)
    bytes_of = workload.bytes_of
    simulated = simulate(way, machine, workload, given)
    first = [request.first_s for request in requests]
    return {
        "way": way,
        "load": load,
        "loads": found.loads,
        "switches": found.switches,
        "fewest": fewest_loads(began, bytes_of, given.memory * size),
        "fewest_by_arrival": fewest_loads([(r.expert,) for r in requests], bytes_of, given.memory * size),
        "ttft_p50_s": round(float(np.quantile(first, 0.5)), 3),
        "ttft_p95_s": round(float(np.quantile(first, 0.95)), 3),
        "ttft_p99_s": round(float(np.quantile(first, 0.99)), 3),
        "longest_wait_s": round(max(request.waited_s for request in requests), 3),
        "makespan_s": round(found.makespan_s, 2),
        "cpu_s": round(found.cpu_s, 2),
        "simulated": {
            "loads": simulated.loads,
            "makespan_s": round(simulated.makespan_s, 2),
            "ttft_p50_s": round(simulated.ttft_p50_s, 3),
            "ttft_p95_s": round(simulated.ttft_p95_s, 3),
            "ttft_p99_s": round(simulated.ttft_p99_s, 3),
        },
    }


def workload_of(requests: Sequence[Request], size: int, prompt_tokens: int, tokens: int) -> Workload:
    """The requests as the simulator takes them."""
    names = sorted({request.expert for request in requests})
    return Workload(
        [(name,) for name in names],
        dict.fromkeys(names, size),
        [request.at_s for request in requests],
        [names.index(request.expert) for request in requests],
        [prompt_tokens] * len(requests),
        [tokens] * len(requests),
    )


def simulate(way: str, machine: Machine, workload: Workload, given: argparse.Namespace) -> Row:
    aging_s = IN_ORDER_S if way == "oldest-lru" else given.aging_s
    [simulated] = Comparison(machine, aging_s=aging_s, eviction=WAYS[way]).rows(workload, ["ours"])
    return simulated


def simulated_only(given: argparse.Namespace) -> str:
    """A table of both ways: means over the seeds, and the longest wait of all."""
    load_s, prompt_s, token_s = given.simulate
    size, names = 10**9, [f"e{i:02}" for i in range(given.experts)]
    speed = {"load_s": load_s, "prompt_s": prompt_s, "token_s": token_s, "prompt_tokens": PROMPT_TOKENS}
    machine = machine_of(speed, size, given.memory)
    heads = ["load", "way", "loads", "fewest, its order", "TTFT p50", "p95", "p99", "longest wait", "makespan"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for load in (None, *given.loads):
        for way in WAYS:
            rows: list[Row] = []
            for seed in range(given.seeds):
                seeded = argparse.Namespace(**{**vars(given), "seed": seed})
                at_s = None if load is None else arrivals(seeded, load * given.rate)
                requests = requests_of(names, seeded, at_s)
                workload = workload_of(requests, size, int(PROMPT_TOKENS), given.tokens)
                rows.append(simulate(way, machine, workload, given))
            fields = ("loads", "loads_bound", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s")
            cells = [np.mean([getattr(row, name) for row in rows]) for name in fields]
            cells += [max(row.longest_wait_s for row in rows), np.mean([row.makespan_s for row in rows])]
            shown = " | ".join(f"{value:.2f}" for value in cells)
            lines.append(f"| {'all at once' if load is None else load} | {way} | {shown} |")
    return "\n".join([*lines, f"\nsimulated machine: {asdict(machine)}"])


def table(found: dict[str, Any]) -> str:
    """The rows as markdown."""
    heads = ["load", "way", "loads", "fewest, its order", "by arrival", "TTFT p50", "p95", "p99", "longest wait"]
    heads += ["makespan", "CPU", "simulated: loads", "makespan", "p50", "p95", "p99"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for each in found["rows"]:
        simulated = each["simulated"]
        cells = ["all at once" if each["load"] is None else each["load"], each["way"], each["loads"], each["fewest"]]
        cells += [each["fewest_by_arrival"], each["ttft_p50_s"], each["ttft_p95_s"], each["ttft_p99_s"]]
        cells += [each["longest_wait_s"], each["makespan_s"], each["cpu_s"]]
        cells += [simulated["loads"], simulated["makespan_s"]]
        cells += [simulated["ttft_p50_s"], simulated["ttft_p95_s"], simulated["ttft_p99_s"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append(f"\nspeeds: {found['speeds']}\nsimulated machine: {found['machine']}")
    lines.append(f"capacity: {found['capacity_per_s']:.3g} requests per second; same answers: {found['same_answers']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

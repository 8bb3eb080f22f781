"""Tokens per second and time to first token of the vLLM engine: alone, in the Host, through the service; and rivals.

    python benchmarks/vllm_throughput.py --out FOLDER [--adapters 0 1 4] [--clients 1 8 32] [--minutes 7] [--resume]

SmolLM2 with adapters of the zoo, greedy streamed answers of `--tokens` tokens (an end token does not stop), prompts all
distinct. All rivals run during the whole benchmark; each round loads one after the other, in changing order. Rivals:

    asyncllm  vLLM's AsyncLLM, called directly: the one of `host`, so that process and settings are the same
    host      that engine in the Host of this process
    service   `coe serve`, over HTTP: a gateway and a host in processes of their own
    server    vLLM's OpenAI server with the same engine arguments, over HTTP
    hf        the hf engine in the Host of this process

A round is one line of FOLDER/rounds.jsonl. `--minutes` ends a run in time, and `--resume` does the rounds that are
left; the table is of all lines. Needs an environment with vLLM (docs/vllm.md), and the base (`python -m
examples.zoo.fetch smollm2`) or `--model`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence, Set
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from load_client import free_port, open_session
from vllm_requests import Ask, Served, alone, in_host, over_http
from vllm_rivals import (
    HF,
    MODEL,
    Server,
    Setup,
    coe_command,
    end_on_sigterm,
    engine_options,
    own_cpu_s,
    server_command,
    started,
    write_service,
)

from coe.config import load_config
from coe.hosting import open_host
from examples.zoo.fetch import fetch

ZOO = Path(__file__).parent.parent / "examples" / "zoo" / "adapters"
ADAPTERS = ("sql", "shell", "fields", "dates")
RIVALS = ("asyncllm", "host", "service", "server", "hf")
PROMPT = "Number {}: tell me about the history of the town where you were born, and what people do there."
Round = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the rounds")
    parser.add_argument("--model", type=Path, help="folder of the base; by default the zoo's SmolLM2")
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 4], choices=range(len(ADAPTERS) + 1))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--requests", type=int, nargs="+", default=[4, 2, 2], help="per client, for each of --clients")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each engine process")
    parser.add_argument("--dtype", default="float32", help="bfloat16 where the CPU computes in it (AVX-512 BF16)")
    parser.add_argument("--kv-mib", type=int, default=256)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=60.0, help="no round begins later; --resume continues")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the table here")
    given = parser.parse_args()
    ends = time.monotonic() + 60 * given.minutes
    end_on_sigterm()
    rounds = Rounds(given)
    for n_adapters in given.adapters:
        if (left := rounds.left(n_adapters)) and time.monotonic() < ends:
            measure(given, n_adapters, left, rounds, ends)
    if not rounds.found:
        sys.exit("no round was measured: give more --minutes")
    rows = table(rounds.found)
    show(rows)
    if n_left := sum(len(rounds.left(n)) for n in given.adapters):
        print(f"{n_left} rounds are left: the same command with --resume does them")
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


class Rounds:
    """The rounds of a run, in its folder."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._file = given.out / "rounds.jsonl"
        given.out.mkdir(parents=True, exist_ok=True)
        if self._file.exists() and not given.resume:
            sys.exit(f"{self._file} exists: --resume continues it, or choose another --out")
        self.found: list[Round] = []
        if self._file.exists():
            self.found = [json.loads(line) for line in self._file.read_text().splitlines()]

    def left(self, n_adapters: int) -> list[tuple[int, int, str]]:
        """What is to be measured: repeat, clients, rival. Who begins changes with the repeat."""
        given = self._given
        done = {(each["adapters"], each["repeat"], each["clients"], each["rival"]) for each in self.found}
        wanted = [
            (repeat, n, given.rivals[(i + repeat) % len(given.rivals)])
            for repeat in range(given.repeats)
            for n in given.clients
            for i in range(len(given.rivals))
        ]
        return [each for each in wanted if (n_adapters, *each) not in done]

    def add(self, measured: Round) -> None:
        self.found.append(measured)
        with self._file.open("a") as out:
            out.write(json.dumps(measured) + "\n")


def measure(
    given: argparse.Namespace, n_adapters: int, left: Sequence[tuple[int, int, str]], rounds: Rounds, ends: float
) -> None:
    """Open the rivals for so many adapters, and measure what is left."""
    names = ADAPTERS[:n_adapters]
    options = engine_options(
        n_adapters, max_num_seqs=given.max_num_seqs, kv_mib=given.kv_mib, rank=8, dtype=given.dtype
    )
    setup = Setup(given.model or fetch("smollm2"), {name: ZOO / name for name in names}, options, given.threads)
    setup.prepare_process()

    async def run() -> None:
        async with opened({rival for _, _, rival in left}, setup) as rivals:
            for rival, (ask, cpu_s) in rivals.items():  # warms up, and loads the adapters
                await load(ask, names, 8, range(8), 2, cpu_s)
                print(f"{rival} is warm, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
            for repeat, n_clients, rival in left:
                if time.monotonic() > ends:
                    return
                which = given.clients.index(n_clients)
                n = n_clients * given.requests[which % len(given.requests)]
                first = 1000 + 100 * (repeat * len(given.clients) + which)  # equal prompts for all rivals
                ask, cpu_s = rivals[rival]
                found = await load(ask, names, n_clients, range(first, first + n), given.tokens, cpu_s)
                known = {"adapters": n_adapters, "clients": n_clients, "repeat": repeat, "rival": rival}
                rounds.add({**known, **found, "threads": given.threads, "dtype": given.dtype, "tokens": given.tokens})

    asyncio.run(run())


@asynccontextmanager
async def opened(wanted: Set[str], setup: Setup) -> AsyncIterator[dict[str, tuple[Ask, Callable[[], float]]]]:
    """How to send a request to each rival, and its CPU seconds so far; all of them are up."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rivals: dict[str, tuple[Ask, Callable[[], float]]] = {}
        ports = free_port(), free_port()
        service = write_service(folder, setup, ports[0], hf="hf" in wanted)
        commands = {
            "service": (coe_command("serve", "--config", str(service)), ports[0]),
            "server": (server_command(setup, ports[1]), ports[1]),
        }
        session = await stack.enter_async_context(open_session())
        servers: list[Server] = []
        for rival in sorted(wanted & commands.keys()):
            command, port = commands[rival]
            url = f"http://127.0.0.1:{port}"
            servers.append(stack.enter_context(started(command, url, folder / f"{rival}.log")))
            rivals[rival] = partial(over_http, session, url), servers[-1].cpu_s
        if in_process := wanted & {"asyncllm", "host", "hf"}:
            host = await stack.enter_async_context(open_host(load_config(service)))
            own = partial(own_cpu_s, servers)
            if "host" in in_process:
                rivals["host"] = partial(in_host, host, ""), own
            if "hf" in in_process:
                rivals["hf"] = partial(in_host, host, HF), own
            if "asyncllm" in in_process:
                rivals["asyncllm"] = await alone(host, setup, stack), own
        for server in servers:
            print(f"{server.url} is up after {await asyncio.to_thread(server.ready):.0f} s", file=sys.stderr)
        yield rivals


async def load(
    ask: Ask,
    adapters: Sequence[str],
    n_clients: int,
    numbers: Sequence[int],
    n_tokens: int,
    cpu_s: Callable[[], float] = time.process_time,
) -> Round:
    """Clients that send their next request when they have the answer to the last one; adapters take turns.

    Args:
        numbers: of the prompts.
        cpu_s: CPU seconds of the rival so far.
    """
    left = iter(numbers)
    names = adapters or (MODEL,)

    async def client() -> list[Served]:
        return [await ask(names[i % len(names)], PROMPT.format(i), n_tokens) for i in left]

    cpu, start = cpu_s(), time.perf_counter()
    served = [each for own in await asyncio.gather(*(client() for _ in range(n_clients))) for each in own]
    seconds = time.perf_counter() - start
    wrong = [each.tokens for each in served if each.tokens != n_tokens]
    if wrong:
        raise RuntimeError(f"answers have {wrong} tokens instead of {n_tokens}")
    return {
        "tokens_per_s": round(len(served) * n_tokens / seconds, 2),
        "ttft_ms": [round(1e3 * each.first_s, 2) for each in served],
        "answer_ms": [round(1e3 * each.total_s, 2) for each in served],
        "prompt_tokens": sum(each.prompt_tokens for each in served),
        "tokens_per_cpu_s": round(len(served) * n_tokens / (cpu_s() - cpu), 2),
        "load_average": round(os.getloadavg()[0], 1),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(rounds: Sequence[Round]) -> list[Round]:
    """Medians over the repeats; ratios are those of rounds of the same repeat; percentiles of all requests."""
    cells = {(each["adapters"], each["clients"], each["repeat"], each["rival"]): each for each in rounds}
    for (n_adapters, clients, repeat, rival), each in cells.items():
        others = {cells.get((n_adapters, clients, repeat, other), each)["prompt_tokens"] for other in RIVALS}
        if len(others) > 1:
            raise RuntimeError(f"{rival} had other prompts than its rivals: {sorted(others)} tokens")
    rows = []
    for n_adapters, clients in sorted({key[:2] for key in cells}):
        for rival in RIVALS:
            own = {key[2]: each for key, each in cells.items() if key[:2] == (n_adapters, clients) and key[3] == rival}
            if not own:
                continue
            ttft = np.concatenate([each["ttft_ms"] for each in own.values()])
            row = {"adapters": n_adapters, "clients": clients, "rival": rival, "repeats": len(own)}
            for name in ("tokens_per_s", "tokens_per_cpu_s"):
                row[name] = statistics.median(each[name] for each in own.values())
            row |= {"ttft_p50_ms": float(np.median(ttft)), "ttft_p95_ms": float(np.quantile(ttft, 0.95))}
            for other in ("asyncllm", "server"):
                ratios = [
                    each["tokens_per_s"] / cells[n_adapters, clients, repeat, other]["tokens_per_s"]
                    for repeat, each in own.items()
                    if (n_adapters, clients, repeat, other) in cells
                ]
                row[f"of_{other}"] = statistics.median(ratios) if ratios else None
            rows.append(row)
    return rows


def show(rows: Sequence[Round]) -> None:
    columns = "adapters", "clients", "rival", "tokens/s", "of AsyncLLM", "of vLLM's server", "TTFT p50, ms", "p95"
    print(f"| {' | '.join(columns)} | tokens/CPU s | repeats |")
    print("|---:|---:|---" + 7 * "|---:" + "|")
    for r in rows:
        of = ["" if r[name] is None else f"{r[name]:.2f}" for name in ("of_asyncllm", "of_server")]
        print(
            f"| {r['adapters']} | {r['clients']} | {r['rival']} | {r['tokens_per_s']:.1f} | {of[0]} | {of[1]} | "
            f"{r['ttft_p50_ms']:.0f} | {r['ttft_p95_ms']:.0f} | {r['tokens_per_cpu_s']:.1f} | {r['repeats']} |"
        )


if __name__ == "__main__":
    main()

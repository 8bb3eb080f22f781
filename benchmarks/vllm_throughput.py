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
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence, Set
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from load_client import children_cpu_s, free_port, open_session
from vllm_rivals import (
    HF,
    MODEL,
    Served,
    Setup,
    chat_body,
    coe_command,
    engine_options,
    running,
    server_command,
    stream,
    write_service,
)

from coe.config import load_config
from coe.engines.base import Adapter
from coe.host import Host
from coe.hosting import open_host
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest
from examples.zoo.fetch import fetch
from routers.base import Message

ZOO = Path(__file__).parent.parent / "examples" / "zoo" / "adapters"
ADAPTERS = ("sql", "shell", "fields", "dates")
RIVALS = ("asyncllm", "host", "service", "server", "hf")
PROMPT = "Number {}: tell me about the history of the town where you were born, and what people do there."
Ask = Callable[[str, str, int], Awaitable[Served]]
"""`(expert, prompt, tokens)`: sends a request, and reads the whole answer of so many tokens."""
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
        async with opened({rival for _, _, rival in left}, setup) as asks:
            for rival, ask in asks.items():  # warms up, and loads the adapters
                await load(ask, names, given.clients[-1], range(given.clients[-1]), 4)
                print(f"{rival} is warm, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
            for repeat, n_clients, rival in left:
                if time.monotonic() > ends:
                    return
                which = given.clients.index(n_clients)
                n = n_clients * given.requests[which % len(given.requests)]
                first = 1000 + 100 * (repeat * len(given.clients) + which)  # equal prompts for all rivals
                found = await load(asks[rival], names, n_clients, range(first, first + n), given.tokens)
                known = {"adapters": n_adapters, "clients": n_clients, "repeat": repeat, "rival": rival}
                rounds.add({**known, **found, "threads": given.threads, "dtype": given.dtype, "tokens": given.tokens})

    asyncio.run(run())


@asynccontextmanager
async def opened(wanted: Set[str], setup: Setup) -> AsyncIterator[dict[str, Ask]]:
    """How to send a request to each rival; all of them are up."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        asks: dict[str, Ask] = {}
        ports = free_port(), free_port()
        service = write_service(folder, setup, ports[0], hf="hf" in wanted)
        commands = {
            "service": (coe_command("serve", "--config", str(service)), ports[0]),
            "server": (server_command(setup, ports[1]), ports[1]),
        }
        session = await stack.enter_async_context(open_session())
        for rival in sorted(wanted & commands.keys()):
            command, port = commands[rival]
            url = f"http://127.0.0.1:{port}"
            seconds = stack.enter_context(running(command, url, folder / f"{rival}.log"))
            print(f"{rival} is up in {seconds:.0f} s", file=sys.stderr)
            asks[rival] = partial(over_http, session, url)
        if in_process := wanted & {"asyncllm", "host", "hf"}:
            host = await stack.enter_async_context(open_host(load_config(service)))
            if "host" in in_process:
                asks["host"] = partial(in_host, host, "")
            if "hf" in in_process:
                asks["hf"] = partial(in_host, host, HF)
            if "asyncllm" in in_process:
                asks["asyncllm"] = await alone(host, setup, stack)
        yield asks


async def over_http(session: aiohttp.ClientSession, url: str, expert: str, prompt: str, n_tokens: int) -> Served:
    return await stream(session, url, chat_body(expert, prompt, n_tokens))


async def in_host(host: Host, ending: str, expert: str, prompt: str, n_tokens: int) -> Served:
    request = GenerateRequest(
        messages=(Message("user", prompt),), max_tokens=n_tokens, sampling=SamplingOptions(ignore_eos=True)
    )
    start, first, usage = time.perf_counter(), 0.0, None
    async for chunk in host.ask(expert + ending, request):
        if not first and chunk.text:
            first = time.perf_counter() - start
        usage = chunk.usage
    assert usage is not None  # by the contract of the last chunk
    total = time.perf_counter() - start
    return Served(first or total, total, usage.prompt_tokens, usage.completion_tokens)


async def alone(host: Host, setup: Setup, stack: AsyncExitStack) -> Ask:
    """The AsyncLLM that the host has started, called as a program without the Host would."""
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    await in_host(host, "", MODEL, "Start.", 1)  # loads the model
    spec = host.snapshot.get(MODEL)
    expert: Any = host.cache.peek(spec.ref)
    running = await expert.core.live()
    loras: dict[str, Any] = {MODEL: None}
    for name, path in setup.adapters.items():
        lease = running.adapters.lease(Adapter(host.snapshot.get(name), path))
        loras[name] = await stack.enter_async_context(lease)
    ids = itertools.count()

    async def ask(expert: str, prompt: str, n_tokens: int) -> Served:
        start, first, n = time.perf_counter(), 0.0, 0
        chat = [{"role": "user", "content": prompt}]
        prompt_ids = running.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        params = SamplingParams(
            temperature=0.0, max_tokens=n_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        outputs = running.llm.generate(
            tokens_input(prompt_ids), params, f"alone-{next(ids)}", lora_request=loras[expert]
        )
        async for output in outputs:
            [completion] = output.outputs
            if not first and completion.text:
                first = time.perf_counter() - start
            n += len(completion.token_ids)
        total = time.perf_counter() - start
        return Served(first or total, total, len(prompt_ids), n)

    return ask


async def load(ask: Ask, adapters: Sequence[str], n_clients: int, numbers: Sequence[int], n_tokens: int) -> Round:
    """Clients that send their next request when they have the answer to the last one; adapters take turns."""
    left = iter(numbers)
    names = adapters or (MODEL,)

    async def client() -> list[Served]:
        return [await ask(names[i % len(names)], PROMPT.format(i), n_tokens) for i in left]

    cpu, start = children_cpu_s() + time.process_time(), time.perf_counter()
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
        "busy_cores": round((children_cpu_s() + time.process_time() - cpu) / seconds, 2),
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
            row |= {"tokens_per_s": statistics.median(each["tokens_per_s"] for each in own.values())}
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
    print("| adapters | clients | rival | tokens/s | of AsyncLLM | of vLLM's server | TTFT p50, ms | p95 | repeats |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|---:|")
    for r in rows:
        of = ["" if r[name] is None else f"{r[name]:.2f}" for name in ("of_asyncllm", "of_server")]
        print(
            f"| {r['adapters']} | {r['clients']} | {r['rival']} | {r['tokens_per_s']:.1f} | {of[0]} | {of[1]} | "
            f"{r['ttft_p50_ms']:.0f} | {r['ttft_p95_ms']:.0f} | {r['repeats']} |"
        )


if __name__ == "__main__":
    main()

"""Rows per second of `coe batch` and `coe eval` on the vLLM engine, against vLLM's own offline `LLM.generate`.

    python benchmarks/vllm_batch.py --out FOLDER [--adapters 0 4] [--rows 2000] [--minutes 7] [--resume]

SmolLM2, greedy answers of at most `--tokens` tokens to distinct chat prompts. With adapters (of the zoo), each answers
an equal share of the rows, and the rows come ordered by adapter. Rivals, each in processes of its own, one at a time:

    generate  all prompts in one call of `LLM.generate`, chat template included; after a first call that warms up
    batch     `coe batch` on Ray with one host; from the moment the weights are in memory to the last answer
    eval      the run of `coe eval`, in one process, with its grading; the weights are in memory before

A measurement is one line of FOLDER/runs.jsonl. `--minutes` ends a run in time, and `--resume` does what is left; the
table is of all lines. Needs an environment with vLLM (docs/vllm.md), and the base or `--model`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from load_client import children_cpu_s
from vllm_rivals import MODEL, Setup, coe_command, end_on_sigterm, engine_options, write_service

from coe.config import Config, load_config
from coe.evaluation.answer_folder import ANSWERS, open_answer_folder
from coe.evaluation.plan import Settings, plan_run
from coe.evaluation.runner import run
from coe.evaluation.tasks import Task, load_task
from coe.hosting import open_host
from examples.zoo.fetch import fetch

ZOO = Path(__file__).parent.parent / "examples" / "zoo" / "adapters"
ADAPTERS = ("sql", "shell", "fields", "dates")
PROMPT = "Number {}: what do people do in the town by the sea where you were born?"
N_WARM = 32


@dataclass(frozen=True)
class Work:
    """What all rivals answer: each expert, `n_each` prompts of its own."""

    setup: Setup
    n_each: int
    tokens: int

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(sorted(self.setup.adapters)) or (MODEL,)

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(expert, prompt) pairs, ordered by expert."""
        return [(expert, PROMPT.format(1000 + i)) for expert in self.experts for i in range(self.n_each)]


@dataclass
class Taken:
    """Cost of a run: seconds with the weights in memory, seconds in all, CPU seconds, tokens; answers by row."""

    seconds: float
    whole_s: float
    cpu_s: float
    prompt_tokens: int
    tokens: int
    answers: dict[str, str]


class Stopwatch:
    """Seconds, and CPU seconds of this process and its children, since the start."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time() + children_cpu_s()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() + children_cpu_s() - self._cpu


def generate(work: Work) -> Taken:
    """vLLM's offline generation."""
    work.setup.prepare_process()
    whole = Stopwatch()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    arguments = {name: value for name, value in work.setup.arguments().items() if name != "enable_log_requests"}
    llm = LLM(model=str(work.setup.model), **arguments)
    tokenizer = llm.get_tokenizer()
    loras = {name: LoRARequest(name, i + 1, str(path)) for i, (name, path) in enumerate(work.setup.adapters.items())}
    params = SamplingParams(temperature=0.0, max_tokens=work.tokens)

    def answer(rows: Sequence[tuple[str, str]]) -> list[Any]:
        chats = [[{"role": "user", "content": prompt}] for _, prompt in rows]
        ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
        prompts = [{"prompt_token_ids": each} for each in ids]
        lora = [loras[expert] for expert, _ in rows] if loras else None
        outputs: list[Any] = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
        return outputs

    answer([(work.experts[i % len(work.experts)], f"Start {i}.") for i in range(N_WARM)])
    watch = Stopwatch()
    outputs = answer(work.rows)
    seconds, cpu_s = watch.read()
    return Taken(
        seconds,
        whole.read()[0],
        cpu_s,
        sum(len(each.prompt_token_ids) for each in outputs),
        sum(len(each.outputs[0].token_ids) for each in outputs),
        {key(*row): each.outputs[0].text for row, each in zip(work.rows, outputs, strict=True)},
    )


def batch(work: Work) -> Taken:
    """`coe batch`, as a command."""
    import pyarrow.parquet as pq

    work.setup.prepare_process()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        service = write_service(folder, work.setup)
        lines = [
            {"id": key(expert, prompt), "model": expert, "prompt": prompt, "max_tokens": work.tokens}
            for expert, prompt in work.rows
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ("--config", str(service), "--input", str(folder / "rows.jsonl"), "--out", str(folder / "out"))
        watch = Stopwatch()
        subprocess.run(coe_command("batch", *words), check=True, stdout=sys.stderr)
        whole_s, _ = watch.read()
        [session] = json.loads((folder / "out" / "run.json").read_text())["sessions"]
        answers = pq.read_table(folder / "out" / "results.parquet", columns=["id", "answer"]).to_pylist()
    return Taken(
        sum(session["work_s"].values()),
        whole_s,
        0.0,
        sum(session["prompt_tokens"].values()),
        sum(session["completion_tokens"].values()),
        {each["id"]: each["answer"] for each in answers},
    )


def evaluate(work: Work) -> Taken:
    """The run of `coe eval`."""
    work.setup.prepare_process()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = load_config(write_service(folder, work.setup))
        rows = [{"id": str(i), "prompt": PROMPT.format(1000 + i), "answer": "sea"} for i in range(work.n_each)]
        (folder / "town.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"name": "town", "data": "town.jsonl", "grader": "contains", "max_tokens": work.tokens}
        (folder / "town.yaml").write_text(yaml.safe_dump(task))
        return asyncio.run(_evaluate(work, config, load_task(folder / "town.yaml"), folder / "out"))


async def _evaluate(work: Work, config: Config, task: Task, output: Path) -> Taken:
    whole = Stopwatch()
    async with open_host(config) as host:
        async with host.cache.lease(host.snapshot.get(MODEL).ref):
            pass  # in memory now
        plan = plan_run(host.snapshot.experts, [task], list(work.experts), Settings())
        with open_answer_folder(output, plan) as folder:
            watch = Stopwatch()
            await run(plan, folder, host.ask)
            seconds, cpu_s = watch.read()
    records = [json.loads(line) for line in (output / ANSWERS).read_text().splitlines()]
    return Taken(
        seconds,
        whole.read()[0],
        cpu_s,
        sum(each["prompt_tokens"] for each in records),
        sum(each["completion_tokens"] for each in records),
        {key(each["expert"], PROMPT.format(1000 + int(each["row"]))): each["answer"] for each in records},
    )


WAYS: Mapping[str, Callable[[Work], Taken]] = {"generate": generate, "batch": batch, "eval": evaluate}


def key(expert: str, prompt: str) -> str:
    return f"{expert}: {prompt}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--model", type=Path, help="folder of the base; by default the zoo's SmolLM2")
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 4], choices=range(len(ADAPTERS) + 1))
    parser.add_argument("--rivals", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each engine process")
    parser.add_argument("--dtype", default="float32", help="bfloat16 where the CPU computes in it (AVX-512 BF16)")
    parser.add_argument("--kv-mib", type=int, default=256)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=60.0, help="no run begins later; --resume continues")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    lines = given.out / "runs.jsonl"
    if lines.exists() and not given.resume:
        sys.exit(f"{lines} exists: --resume continues it, or choose another --out")
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    ends = time.monotonic() + 60 * given.minutes
    end_on_sigterm()
    for repeat, n_adapters, rival in itertools.product(range(given.repeats), given.adapters, given.rivals):
        names = {"adapters": n_adapters, "rows": given.rows, "repeat": repeat, "rival": rival}
        if any(names.items() <= each.items() for each in found) or time.monotonic() > ends:
            continue
        found.append(names | measure(given, n_adapters, rival))
        with lines.open("a") as out:
            out.write(json.dumps(found[-1]) + "\n")
    show(found)


def measure(given: argparse.Namespace, n_adapters: int, rival: str) -> dict[str, Any]:
    """One run of a rival, in a process of its own."""
    options = engine_options(
        n_adapters, max_num_seqs=given.max_num_seqs, kv_mib=given.kv_mib, rank=8, dtype=given.dtype
    )
    adapters = {name: ZOO / name for name in ADAPTERS[:n_adapters]}
    setup = Setup(given.model or fetch("smollm2"), adapters, options, given.threads)
    work = Work(setup, given.rows // max(1, n_adapters), given.tokens)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        taken = process.submit(WAYS[rival], work).result()
    if len(taken.answers) != len(work.rows):
        raise RuntimeError(f"{rival} answered {len(taken.answers)} of {len(work.rows)} rows")
    figures = {
        "rows_per_s": round(len(work.rows) / taken.seconds, 2),
        "seconds": round(taken.seconds, 2),
        "whole_s": round(taken.whole_s, 2),
        "cpu_s": round(taken.cpu_s, 2),
        "prompt_tokens": taken.prompt_tokens,
        "tokens": taken.tokens,
        "threads": given.threads,
        "dtype": given.dtype,
        "load_average": round(os.getloadavg()[0], 1),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print(f"{n_adapters} adapters, {rival}: {figures}", file=sys.stderr)
    return figures | {"answers": {name: digest(text) for name, text in taken.answers.items()}}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def show(runs: Sequence[dict[str, Any]]) -> None:
    """Medians over the repeats. Ratios are those of runs of the same repeat; answers are compared with `generate`."""
    print("| adapters | rival | rows | rows/s | of generate | tokens | equal answers | seconds in all | runs |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    by = {(each["adapters"], each["repeat"], each["rival"]): each for each in runs}
    for n_adapters, rival in itertools.product(sorted({each["adapters"] for each in runs}), WAYS):
        own = [each for (n, _, name), each in sorted(by.items()) if (n, name) == (n_adapters, rival)]
        if not own:
            continue
        pairs = [(each, by.get((n_adapters, each["repeat"], "generate"))) for each in own]
        ratios = [each["rows_per_s"] / other["rows_per_s"] for each, other in pairs if other]
        same = [
            sum(each["answers"][name] == other["answers"].get(name) for name in each["answers"]) / each["rows"]
            for each, other in pairs
            if other
        ]
        median = [statistics.median(each[name] for each in own) for name in ("rows", "rows_per_s", "tokens", "whole_s")]
        of = f"{statistics.median(ratios):.2f}" if ratios else ""
        equal = f"{statistics.median(same):.1%}" if same else ""
        print(
            f"| {n_adapters} | {rival} | {median[0]:.0f} | {median[1]:.1f} | {of} | {median[2]:.0f} | {equal} | "
            f"{median[3]:.0f} | {len(own)} |"
        )


if __name__ == "__main__":
    main()

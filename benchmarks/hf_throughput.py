"""Tokens per second of the hf engine against bare `transformers.generate`, in one process, interleaved.

    python benchmarks/hf_throughput.py MODEL_DIR [--threads 1] [--repeats 3] [--tokens 64] [--json PATH|-]

Each repeat runs bare transformers, then the engine (base only, one adapter, four adapters mixed), at each batch size,
on the same prompts with the same number of greedy tokens (an end token does not stop). The ratio compares runs that are
adjacent in time, so that other programs disturb both sides alike; medians over the repeats are shown. "cpu" is the same
ratio in tokens per second of CPU time, which a busy machine disturbs least.
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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind

PROMPT = "Number {}: tell me about the history of the town where you were born, and what people do there. "


@dataclass(frozen=True)
class Speed:
    """Tokens per second of the clock, and of CPU time."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Result:
    batch: int
    variant: str
    tokens_per_s: float
    ratio_to_bare: float
    lowest_ratio: float
    highest_ratio: float
    cpu_ratio_to_bare: float


class Stopwatch:
    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def speed(self, n_tokens: int) -> Speed:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return Speed(n_tokens / wall, n_tokens / cpu)


def make_adapters(model: Any, folder: Path, n: int) -> list[Adapter]:
    """Random rank-8 adapters on q and v, as the zoo's are."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, n):
        peft.add_adapter(f"a{i}", config)
    peft.save_pretrained(str(folder))
    peft.unload()
    folders = [folder / f"a{i}" for i in range(n)]
    return [Adapter(ExpertSpec(name=f.name, kind=Kind.ADAPTER, source=str(f), base="base"), f) for f in folders]


def bare(expert_model: Any, tokenizer: Any, prompts: Sequence[str], n_tokens: int) -> Speed:
    """Speed of plain `generate`."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    watch = Stopwatch()
    ids = expert_model.generate(
        **batch.to(expert_model.device), do_sample=False, max_new_tokens=n_tokens, min_new_tokens=n_tokens
    )
    return watch.speed(len(prompts) * (ids.shape[1] - batch["input_ids"].shape[1]))


async def engine(expert: HFExpert, prompts: Sequence[str], n_tokens: int, adapters: Sequence[Adapter | None]) -> Speed:
    """Speed of the engine, all prompts submitted at once."""

    async def one(prompt: str, adapter: Adapter | None) -> int:
        chunks = [c async for c in expert.generate(GenerateRequest(prompt=prompt, max_tokens=n_tokens), adapter)]
        usage = chunks[-1].usage
        assert usage is not None
        return usage.completion_tokens

    watch = Stopwatch()
    counts = await asyncio.gather(*map(one, prompts, adapters))
    return watch.speed(sum(counts))


async def measure(arguments: argparse.Namespace) -> list[Result]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    host = HFEngine(device=arguments.device, dtype=arguments.dtype, threads=arguments.threads)
    spec = ExpertSpec(name="base", kind=Kind.MODEL, source=str(arguments.model))
    plain, mixed = await host.load(spec, arguments.model), await host.load(spec, arguments.model)
    for expert in (plain, mixed):
        object.__setattr__(expert.loaded, "eos", frozenset())  # every answer runs to its last token
    device, dtype = plain.loaded.model.device, plain.loaded.model.dtype
    reference = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        spare = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        adapters = make_adapters(spare, Path(folder), 4)
        del spare

        async def run(variant: str, prompts: Sequence[str]) -> Speed:
            if variant == "bare":
                return await asyncio.to_thread(bare, reference, tokenizer, prompts, arguments.tokens)
            used: Sequence[Adapter | None] = [None] if variant == "base" else adapters[: int(variant[0])]
            chosen = [used[i % len(used)] for i in range(len(prompts))]
            return await engine(plain if variant == "base" else mixed, prompts, arguments.tokens, chosen)

        return [result for n in arguments.batch for result in await compare(run, n, arguments.repeats)]


async def compare(run: Callable[[str, Sequence[str]], Awaitable[Speed]], n: int, repeats: int) -> list[Result]:
    prompts = [PROMPT.format(i) for i in range(n)]
    variants = ["base", "1 adapter"] + ["4 adapters"] * (n >= 4)
    speeds: dict[str, list[float]] = {v: [] for v in ["bare", *variants]}
    ratios: dict[str, list[float]] = {v: [] for v in variants}
    cpu_ratios: dict[str, list[float]] = {v: [] for v in variants}
    for repeat in range(-1, repeats):  # the first one warms up
        before = await run("bare", prompts)
        for variant in variants:
            speed, after = await run(variant, prompts), await run("bare", prompts)
            print(f"batch {n}, {variant}: {speed.wall:.1f} tok/s, bare {after.wall:.1f}", file=sys.stderr)
            if repeat >= 0:
                speeds["bare"].append(after.wall)
                speeds[variant].append(speed.wall)
                ratios[variant].append(speed.wall / ((before.wall + after.wall) / 2))
                cpu_ratios[variant].append(speed.cpu / ((before.cpu + after.cpu) / 2))
            before = after
    ratios["bare"] = cpu_ratios["bare"] = [1.0]
    median = statistics.median
    return [
        Result(n, v, median(speeds[v]), median(ratios[v]), min(ratios[v]), max(ratios[v]), median(cpu_ratios[v]))
        for v in ["bare", *variants]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", help="file to write the results to, or -")
    arguments = parser.parse_args()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    results = asyncio.run(measure(arguments))
    print(f"{'batch':>5}  {'variant':<10}  {'tok/s':>7}  {'of bare':>7}  {'cpu':>5}  range")
    for r in results:
        print(
            f"{r.batch:>5}  {r.variant:<10}  {r.tokens_per_s:>7.1f}  {r.ratio_to_bare:>7.3f}  "
            f"{r.cpu_ratio_to_bare:>5.3f}  "
            f"{r.lowest_ratio:.3f}-{r.highest_ratio:.3f}"
        )
    if arguments.json:
        text = json.dumps([asdict(r) for r in results], indent=2)
        sys.stdout.write(text + "\n") if arguments.json == "-" else Path(arguments.json).write_text(text)


if __name__ == "__main__":
    main()

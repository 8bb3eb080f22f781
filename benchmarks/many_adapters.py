"""200 LoRA adapters on one base, routed by their own prompts: throughput beside that of one adapter.

    python benchmarks/many_adapters.py MODEL_DIR ADAPTERS_DIR [--adapters 200] [--requests 300] [--slots 32]

ADAPTERS_DIR holds adapters of that base (examples/zoo/adapters); each of the benchmark's own is one of them with noise
of 1% on its matrices: other contents, the same size. Each owns the prompts about one product and one matter ("kettle",
"warranty"); a `category` router is trained on a table in which only the owner answers right. All requests wait from
the start; the base keeps at most `--slots` adapters (`engines.hf.max_adapters`), so that the others are read again.

    one       all requests name one adapter
    zipf      `auto`: the router chooses; owners are popular by Zipf's law with exponent 1
    uniform   `auto`, all owners alike

First, the CPU seconds of a load beside others on the same base. With `--requests 0` that is all.

The ways take turns, each in a new system, and answer prompts of the same length with the same number of tokens. `cpu`
is the CPU time of this process, which other programs disturb least; the shares compare CPU time.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from coe.local import System, open_local
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest
from routers.base import Message

PRODUCTS: Final = (
    *("kettle", "bicycle", "printer", "sofa", "camera", "lawn mower", "tent", "piano", "washing machine", "telescope"),
    *("wardrobe", "drill", "violin", "freezer", "microscope", "stroller", "keyboard", "lamp", "boat", "heater"),
)
MATTERS: Final = (
    *("warranty", "delivery date", "spare parts", "assembly", "cleaning"),
    *("energy use", "colours", "weight", "noise", "returns"),
)
SENTENCES: Final = (
    "What should I know about the {matter} of my new {product}?",
    "A customer asks about {matter} for the {product} that was ordered last week.",
    "Please explain the {matter} of this {product} in a few words.",
    "I have a question on the {product}: how about its {matter}?",
    "Tell me about {matter}, it is for a {product}.",
    "Our shop needs a short text on the {matter} of the {product}.",
)
WAYS: Final = ("one", "zipf", "uniform")


@dataclass(frozen=True)
class Found:
    """What one way took for all requests.

    Attributes:
        right: share of requests that went to the owner of their prompt; None where requests name their adapter.
        adapters: how many different ones answered.
    """

    way: str
    seconds: float
    cpu_s: float
    tokens: int
    adapters: int
    right: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, metavar="ADAPTERS_DIR")
    parser.add_argument("--adapters", type=int, default=200, help="at most 200")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(Path(scratch), given)
    if found:
        print(table(found))
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(each) for each in found], indent=2) + "\n")


def measure(folder: Path, given: argparse.Namespace) -> list[Found]:
    owners = perturbed(given.folder, folder / "adapters", given.adapters, given.seed)
    for beside, seconds in load_seconds(given.model, folder / "adapters", owners[:33]).items():
        print(f"a load beside {beside} adapters: {seconds:.3f} s of CPU")
    if not given.requests:
        return []
    train_router(folder, owners, given.seed)
    config = write_config(folder, given, owners)
    found = []
    for repeat in range(given.repeats):
        for way in WAYS if repeat % 2 == 0 else WAYS[::-1]:
            found.append(asyncio.run(run(config, way, owners, given)))
            print(found[-1], file=sys.stderr)
    return found


def perturbed(adapters: Path, folder: Path, count: int, seed: int) -> list[str]:
    """Write adapters with other contents and the same size; returns their names."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    sources = alike(adapters)
    names = [f"a{i:03}" for i in range(count)]
    for i, name in enumerate(names):
        source, target = sources[i % len(sources)], folder / name
        target.mkdir(parents=True)
        shutil.copy(source / "adapter_config.json", target)
        tensors = {}
        for key, tensor in load_file(source / "adapter_model.safetensors").items():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            tensors[key] = tensor + 0.01 * tensor.std() * noise
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return names


def load_seconds(model: Path, folder: Path, names: Sequence[str]) -> dict[int, float]:
    """Adapters before it -> CPU seconds of the load of one more, medians of up to three."""
    from transformers import AutoModelForCausalLM

    from coe.engines.base import Adapter
    from coe.engines.hf.lora.adapters import AdapterSlots
    from registry.spec import ExpertSpec, Kind

    slots = AdapterSlots(AutoModelForCausalLM.from_pretrained(model, dtype="float32"), "base", len(names))
    seconds = []
    for name in names:
        spec = ExpertSpec(name=name, kind=Kind.ADAPTER, source=str(folder / name), base="base")
        started = time.process_time()
        slots.acquire(Adapter(spec, folder / name))
        seconds.append(time.process_time() - started)
    groups = {n: seconds[n : n + 3] for n in (1, 8, 16, 30)}
    return {n: statistics.median(group) for n, group in groups.items() if group}


def alike(adapters: Path) -> list[Path]:
    """Those of one base and size: as the first one."""
    folders = sorted(file.parent for file in adapters.glob("*/adapter_config.json"))

    def kind(folder: Path) -> tuple[str, int]:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return base, (folder / "adapter_model.safetensors").stat().st_size

    return [folder for folder in folders if kind(folder) == kind(folders[0])]


def prompt_of(owner: int, rng: np.random.Generator) -> str:
    """A prompt of the cluster of an adapter."""
    product, matter = PRODUCTS[owner % len(PRODUCTS)], MATTERS[owner // len(PRODUCTS) % len(MATTERS)]
    return str(rng.choice(SENTENCES)).format(product=product, matter=matter) + f" It is number {rng.integers(1000)}."


def train_router(folder: Path, owners: Sequence[str], seed: int) -> None:
    """A `category` router, from a table with six prompts of each adapter, which it alone answers right."""
    import pandas as pd

    rng = np.random.default_rng(seed + 1)
    rows: list[dict[str, Any]] = []
    for number, owner in enumerate(owners):
        for i in range(6):
            row: dict[str, Any] = {"query_id": f"{owner}-{i}", "domain": owner, "prompt": prompt_of(number, rng)}
            rows.append(row | {f"score::{name}": float(name == owner) for name in owners})
    pd.DataFrame(rows).to_parquet(folder / "outcomes.parquet")
    train = ["router", "train", "--outcomes", str(folder / "outcomes.parquet"), "--kind", "category"]
    subprocess.run([sys.executable, "-m", "coe.cli.entry", *train, "--out", str(folder / "router")], check=True)


def write_config(folder: Path, given: argparse.Namespace, owners: Sequence[str]) -> Path:
    experts: list[dict[str, Any]] = [{"name": "base", "kind": "model", "source": str(given.model.resolve())}]
    experts += [{"name": name, "kind": "adapter", "base": "base", "source": f"adapters/{name}"} for name in owners]
    (folder / "experts.yaml").write_text(json.dumps({"experts": experts}))
    config = {
        "experts": ["experts.yaml"],
        "engines": {
            "hf": {"dtype": "float32", "threads": 1, "max_adapters": given.slots, "max_batch": given.batch},
        },
        "policies": {"default": {"router": str(folder / "router"), "fallback": "base"}},
    }
    (folder / "service.yaml").write_text(json.dumps(config))
    return folder / "service.yaml"


def owners_of(way: str, count: int, requests: int, seed: int) -> list[int]:
    """The owner of each request."""
    rng = np.random.default_rng(seed + 2)
    if way == "one":
        return [0] * requests
    weights = 1 / np.arange(1, count + 1) if way == "zipf" else np.ones(count)
    return [int(each) for each in rng.choice(count, size=requests, p=weights / weights.sum())]


async def run(config: Path, way: str, owners: Sequence[str], given: argparse.Namespace) -> Found:
    """All requests of one way, at once."""
    numbers = owners_of(way, len(owners), given.requests, given.seed)
    rng = np.random.default_rng(given.seed + 3)
    requests = [asked(prompt_of(number, rng), given.tokens) for number in numbers]
    async with open_local(config) as system:
        await answers_of(system, requests[:1], "base" if way == "one" else "auto")  # the base is in memory
        started, cpu = time.perf_counter(), time.process_time()
        found = await answers_of(system, requests, owners[0] if way == "one" else "auto")
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    experts = Counter(expert for expert, _ in found)
    right = statistics.fmean(owners[number] == expert for number, (expert, _) in zip(numbers, found, strict=True))
    tokens = sum(n_tokens for _, n_tokens in found)
    return Found(way, seconds, cpu_s, tokens, len(experts), None if way == "one" else right)


def asked(prompt: str, tokens: int) -> GenerateRequest:
    return GenerateRequest(
        messages=(Message("user", prompt),), max_tokens=tokens, sampling=SamplingOptions(ignore_eos=True)
    )


async def answers_of(system: System, requests: Sequence[GenerateRequest], model: str) -> list[tuple[str, int]]:
    """Expert and new tokens of each answer."""

    async def one(reply: Any) -> tuple[str, int]:
        n_tokens = 0
        async for chunk in reply.chunks:
            if chunk.usage is not None:
                n_tokens = chunk.usage.completion_tokens
        return reply.decision.experts[0], n_tokens

    return list(await asyncio.gather(*map(one, system.answers(requests, model=model))))


def table(found: Sequence[Found]) -> str:
    """Medians over the repeats, and the throughput of each way as a share of that of one adapter."""
    lines = [
        "| way | adapters | to the owner | seconds | cpu | tokens/s of CPU | share of one |",
        f"|---|{'---:|' * 6}",
    ]
    speed = {way: statistics.median(e.tokens / e.cpu_s for e in found if e.way == way) for way in WAYS}
    for way in WAYS:
        own = [each for each in found if each.way == way]
        right = "" if own[0].right is None else f"{100 * own[0].right:.1f}%"
        cells = [way, str(own[0].adapters), right, f"{statistics.median(each.seconds for each in own):.1f}"]
        cells += [f"{statistics.median(each.cpu_s for each in own):.1f}", f"{speed[way]:.1f}"]
        cells.append(f"{speed[way] / speed['one']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

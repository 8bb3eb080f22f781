"""Switching experts of one shape on a GPU, from page-locked host memory, against the bandwidth of a plain copy.

    python benchmarks/gpu_switch.py [--size 1.5b 7b 14b] [--minutes 6] [--json PATH]

Needs a CUDA machine with this repository, and no network: models of real shapes with random weights are made here
(`gpu_models.py`). For each size:

    bandwidth  GB/s of copies from page-locked memory to the device, nothing else running
    switch     seconds until another expert's weights are in place, as a share of that bandwidth (aim: at least 0.9),
               and with its first token, a GB (aim: at most 0.04 s)
    hidden     share of a switch in a second slot that answers in the first one hide (aim: at least 0.9)
    many       switches per second over 50 switches among the experts that host memory holds
    vllm       seconds of sleep and wake of the same model at both levels, where vLLM is installed

A part that `--minutes` leave no time for is left out, and the results name it. Without a CUDA device the script says so
and ends with status 0; `--device cpu --size tiny` runs the same on a CPU. The results are JSON, on stdout or in
`--json`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from gpu_latent import described, missing
from gpu_models import SIZES, save_model

from coe.engines.base import ShapeKey
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.slot import HFSlot
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from routers.base import Message

GB: Final = 10**9
MOST_EXPERTS: Final = 6
N_SWITCHES: Final = 50
FIRST_TOKEN: Final = GenerateRequest(messages=(Message("user", "Name a city."),), max_tokens=1)
ANSWER: Final = GenerateRequest(messages=(Message("user", "Name a city."),), max_tokens=128)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*SIZES], default=["1.5b", "7b", "14b"])
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if reason := missing(arguments.device):
        print(f"skipped: {reason}")
        return 0
    results: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": described(arguments.device),
        "bandwidth_gb_s": round(bandwidth(arguments.device) / GB, 2),
    }
    ends = time.monotonic() + 60 * arguments.minutes
    for size in arguments.size:
        with tempfile.TemporaryDirectory() as folder:
            results[size] = asyncio.run(measured(size, Path(folder), arguments.device, results["bandwidth_gb_s"], ends))
    text = json.dumps(results, indent=1)
    if arguments.json is None:
        print(text)
    else:
        arguments.json.write_text(text + "\n")
    return 0


def bandwidth(device: str) -> float:
    """Bytes per second of the fastest of five copies of 1 GB."""
    import torch

    on_gpu = device.startswith("cuda")
    source = torch.empty(GB, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.empty(GB, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        wait(device)
        seconds.append(time.perf_counter() - started)
    return GB / min(seconds)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


async def measured(size: str, folder: Path, device: str, gb_s: float, ends: float) -> dict[str, Any]:
    """The parts of one size."""
    experts = models(size, folder, device)
    gb = sum(file.stat().st_size for file in experts[0].glob("*.safetensors")) / GB
    engine = HFEngine(device, "bfloat16", max_batch=8, host_bytes=2**50)
    first, second = HFSlot(ShapeKey(size), engine), HFSlot(ShapeKey(size), engine)
    results: dict[str, Any] = {"gb": round(gb, 3), "experts": len(experts)}
    parts: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {
        "switch": lambda: switches(first, experts, gb, gb_s),
        "hidden": lambda: hidden(first, second, experts),
        "many": lambda: many(first, experts),
        "vllm": lambda: asyncio.to_thread(vllm_sleep, experts[0], device),
    }
    await first.switch(spec_of(experts[0]), experts[0])
    for expert in experts:  # every copy is read once
        await first.prefetch(spec_of(expert), expert)
    for name, part in parts.items():
        results[name] = await part() if time.monotonic() < ends else "left out: no time"
    await first.close()
    await second.close()
    return results


def models(size: str, folder: Path, device: str) -> list[Path]:
    """As many experts as half of the host's free memory holds copies of, at least two."""
    import psutil  # type: ignore[import-untyped]  # has no stubs of its own

    made = [save_model(folder / "e0", size, 0, device)]
    n_bytes = sum(file.stat().st_size for file in made[0].glob("*.safetensors"))
    room = min(psutil.virtual_memory().available // 2, shutil.disk_usage(folder).free)
    n = max(2, min(MOST_EXPERTS, room // n_bytes))
    return made + [save_model(folder / f"e{seed}", size, seed, device) for seed in range(1, n)]


def spec_of(folder: Path) -> ExpertSpec:
    return ExpertSpec(name=folder.name, kind=Kind.MODEL, source=str(folder))


async def switches(slot: HFSlot, experts: Sequence[Path], gb: float, gb_s: float) -> dict[str, Any]:
    """Medians over three rounds of all experts."""
    alone, with_token = [], []
    for folder in [*experts] * 3:
        started = time.perf_counter()
        expert: Any = await slot.switch(spec_of(folder), folder)
        alone.append(time.perf_counter() - started)
        await text_of(expert, FIRST_TOKEN)
        with_token.append(time.perf_counter() - started)
    seconds = statistics.median(alone)
    return {
        "seconds": round(seconds, 4),
        "of_bandwidth": round(gb / gb_s / seconds, 3),
        "s_a_gb_with_first_token": round(statistics.median(with_token) / gb, 4),
    }


async def hidden(slot: HFSlot, other: HFSlot, experts: Sequence[Path]) -> dict[str, Any]:
    """How much of a switch in another slot the answers of this one hide."""
    await other.switch(spec_of(experts[0]), experts[0])
    expert: Any = await slot.switch(spec_of(experts[0]), experts[0])
    answers, switching, both = [], [], []
    for folder in [*experts[1:], *experts[1:]]:
        answers.append(await timed(answer(expert)))
        switching.append(await timed(other.switch(spec_of(folder), folder)))
        await other.switch(spec_of(experts[0]), experts[0])
        both.append(await timed(together(expert, other, folder)))
    alone_s, switch_s, both_s = map(statistics.median, (answers, switching, both))
    share = min(1.0, 1 - (both_s - alone_s) / switch_s)
    seconds = {"answers_s": alone_s, "switch_s": switch_s, "both_s": both_s}
    return {name: round(value, 4) for name, value in {**seconds, "hidden": share}.items()}


async def together(expert: Any, other: HFSlot, folder: Path) -> None:
    await asyncio.gather(answer(expert), other.switch(spec_of(folder), folder))


async def answer(expert: Any) -> None:
    """Eight answers in a batch."""
    await asyncio.gather(*(text_of(expert, ANSWER) for _ in range(8)))


async def many(slot: HFSlot, experts: Sequence[Path]) -> dict[str, Any]:
    """Fifty switches in turn, each with its first token."""
    started = time.perf_counter()
    for i in range(N_SWITCHES):
        folder = experts[i % len(experts)]
        await text_of(await slot.switch(spec_of(folder), folder), FIRST_TOKEN)
    return {"switches": N_SWITCHES, "per_s": round(N_SWITCHES / (time.perf_counter() - started), 3)}


async def text_of(expert: Any, request: GenerateRequest) -> str:
    return "".join([chunk.text async for chunk in expert.generate(request)])


async def timed(work: Awaitable[Any]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


def vllm_sleep(model: Path, device: str) -> Any:
    """Seconds of sleep and wake in vLLM at both levels; at level 2 the weights are read again."""
    if importlib.util.find_spec("vllm") is None or not device.startswith("cuda"):
        return "left out: no vLLM on a GPU"
    vllm = importlib.import_module("vllm")
    llm = vllm.LLM(str(model), enable_sleep_mode=True, gpu_memory_utilization=0.4, max_model_len=1024)
    found = {}
    for level in (1, 2):
        llm.generate(["Name a city."], use_tqdm=False)
        started = time.perf_counter()
        llm.sleep(level=level)
        slept = time.perf_counter()
        llm.wake_up()
        if level == 2:
            llm.collective_rpc("reload_weights")
        found[f"level {level}"] = {
            "sleep_s": round(slept - started, 4),
            "wake_s": round(time.perf_counter() - slept, 4),
        }
    return found


if __name__ == "__main__":
    sys.exit(main())

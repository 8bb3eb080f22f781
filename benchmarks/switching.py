"""How another expert comes in: loaded by transformers, or its weights replaced in place, from files or host memory.

    python benchmarks/switching.py MODEL_DIR [--experts 3] [--repeats 3] [--dtype float32] [--json PATH]

The experts are copies of the model in MODEL_DIR with other values in its weights, written to a temporary folder. In
each round every way switches through all of them, the ways in turn; then each expert answers one short question, which
must be the same by every way.

    load        unload, then load with transformers; its tokenizer too
    in place    the same model in memory takes the weights from the files (in the system's page cache)
    host copy   ... from copies in memory of the host (`engines.hf.host_bytes`)

`cpu` is the CPU time of this process, which other programs on the machine disturb least.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from coe.engines.base import ShapeKey
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.slot import HFSlot
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from routers.base import Message

QUESTION = GenerateRequest(messages=(Message("user", "Name the capital of France."),), max_tokens=8)
Way = Callable[[Path], Awaitable[Any]]
"""Brings in the expert in a folder, and returns it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [variant(given.model, Path(scratch) / f"expert-{i}", i) for i in range(given.experts)]
        found = asyncio.run(measure(folders, given.dtype, given.repeats))
    n_bytes = sum(file.stat().st_size for file in given.model.glob("*.safetensors"))
    print(f"{given.experts} experts of {n_bytes / 2**20:.0f} MiB on disk, {given.dtype}, {given.repeats} rounds")
    print("| way | seconds | cpu | of load, cpu |\n|---|---:|---:|---:|")
    for name, row in found["ways"].items():
        print(f"| {name} | {row['seconds']:.2f} | {row['cpu_s']:.2f} | {row['cpu_of_load']:.2f} |")
    print(f"same answers: {found['same_answers']}")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def variant(model: Path, folder: Path, number: int) -> Path:
    """A copy of the model whose weights are scaled by a little: other values, the same bytes."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor * (1 + 0.01 * number) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


async def measure(folders: Sequence[Path], dtype: str, repeats: int) -> dict[str, Any]:
    """Medians over experts and rounds."""
    in_place = HFSlot(ShapeKey("any"), HFEngine("cpu", dtype, threads=1))
    host_copy = HFSlot(ShapeKey("any"), HFEngine("cpu", dtype, threads=1, host_bytes=2**40))
    loaded: list[Any] = []

    async def load(folder: Path) -> Any:
        while loaded:
            engine, expert = loaded.pop()
            await engine.unload(expert)
        engine = HFEngine("cpu", dtype, threads=1)  # a new one: it keeps no tokenizer
        loaded.append((engine, await engine.load(spec_of(folder), folder)))
        return loaded[0][1]

    async def from_copy(folder: Path) -> Any:
        if host_copy.expert is not None:
            await host_copy.prefetch(spec_of(folder), folder)  # a copy is read once, in the first round
        return await host_copy.switch(spec_of(folder), folder)

    ways: dict[str, Way] = {
        "load": load,
        "in place": lambda folder: in_place.switch(spec_of(folder), folder),
        "host copy": from_copy,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    answers: dict[Path, set[str]] = {folder: set() for folder in folders}
    for repeat in range(repeats + 1):  # the first round opens the slots and fills the copies
        for name, way in ways.items():
            for folder in folders:
                wall, cpu = time.perf_counter(), time.process_time()
                expert = await way(folder)
                taken = time.perf_counter() - wall, time.process_time() - cpu
                answers[folder].add("".join([chunk.text async for chunk in expert.generate(QUESTION)]))
                if repeat:
                    times[name].append(taken)
    medians = {name: tuple(map(statistics.median, zip(*taken, strict=True))) for name, taken in times.items()}
    rows = {
        name: {"seconds": wall, "cpu_s": cpu, "cpu_of_load": cpu / medians["load"][1]}
        for name, (wall, cpu) in medians.items()
    }
    return {"ways": rows, "same_answers": all(len(texts) == 1 for texts in answers.values())}


def spec_of(folder: Path) -> ExpertSpec:
    return ExpertSpec(name=folder.name, kind=Kind.MODEL, source=str(folder))


if __name__ == "__main__":
    main()

"""Decoding speed with notes of peers, against the bare primary, in one process, interleaved.

    python benchmarks/latent_decoding.py MODEL_DIR [--threads 1] [--repeats 5] [--tokens 64] [--json PATH|-]

Variants: `notes` reads hidden states of two peers through four cross-attentions of width 256 with random weights,
`cache` has key-value entries of two peers' answers, and `latent` leaves notes itself. Each run of a variant stands
between two runs of the bare primary, on the same prompts with the same number of greedy tokens (an end token does not
stop); the ratio is that of tokens per second after the first token of each answer. Medians over the repeats are shown.
"cpu" is the ratio in tokens per second of CPU time, prompts included, which a busy machine disturbs least.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coe.engines.base import Member
from coe.engines.hf.composed import compose
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.latent.artifact import Artifact
from coe.engines.latent.interaction import Interactions
from coe.engines.latent.notes import Notes
from coe.engines.latent.shape import InteractionShape
from coe.types import Chunk, GenerateRequest, PeerNotes
from registry.composed import Composed
from registry.spec import ExpertSpec, Kind

PROMPT = "Number {}: tell me about the history of the town where you were born, and what people do there. "
PEERS = ("first", "second")
Generate = Callable[[GenerateRequest], AsyncIterator[Chunk]]


@dataclass(frozen=True)
class Speed:
    """Tokens per second after the first one of each answer, and per second of CPU time of the whole run."""

    decode: float
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


def write_notes(folder: Path, expert: HFExpert, arguments: argparse.Namespace) -> ExpertSpec:
    """A composed expert of architecture `notes` with random weights."""
    import torch

    decoder = expert.decoder()
    shape = InteractionShape(
        decoder.width,
        decoder.n_layers,
        dict.fromkeys(PEERS, decoder.width),
        shared_width=arguments.shared_width,
        interactions=arguments.interactions,
    )
    module = Interactions(shape)
    for each in module.interactions:
        torch.nn.init.normal_(each.output, std=0.01)
    return write(folder, "notes", {"interaction": shape.document()}, module.state_dict())


def write(folder: Path, architecture: str, settings: dict[str, Any], tensors: dict[str, Any]) -> ExpertSpec:
    """The artifact of a composed expert, and its spec."""
    members = dict.fromkeys(["base", *PEERS], "")
    Artifact.write(folder, Composed(architecture, members, settings), tensors=tensors, card="")
    return ExpertSpec(
        name=architecture,
        kind=Kind.COMPOSED,
        architecture=architecture,
        members=("base", *PEERS),
        source=str(folder),
        settings=settings,
    )


def random_notes(expert: HFExpert, n: int) -> list[PeerNotes]:
    """n notes of each peer."""
    decoder, rng = expert.decoder(), np.random.default_rng(0)
    states = rng.standard_normal((1, n, decoder.width)).astype(np.float16)
    return [PeerNotes(p, Notes(p, states=states, spans=np.full((n, 2), -1, np.int32)).pack()) for p in PEERS]


def random_entries(expert: HFExpert, n: int) -> list[PeerNotes]:
    """n key-value entries of each peer."""
    decoder, rng = expert.decoder(), np.random.default_rng(0)
    size = (decoder.n_layers, decoder.n_kv_heads, n, decoder.head_dim)
    keys = rng.standard_normal(size).astype(np.float16)
    tokens = np.ones(n, np.int32)
    return [PeerNotes(p, Notes(p, keys=keys, values=keys, first=20, tokens=tokens).pack()) for p in PEERS]


async def run(
    generate: Callable[[GenerateRequest], AsyncIterator[Chunk]], requests: Sequence[GenerateRequest]
) -> Speed:
    """The speed of requests that are sent at once."""

    async def one(request: GenerateRequest) -> tuple[float, int]:
        chunks = generate(request)
        await anext(chunks)
        first = time.perf_counter()
        last = [chunk async for chunk in chunks][-1]
        assert last.usage is not None
        return first, last.usage.completion_tokens

    cpu = time.process_time()
    answers = await asyncio.gather(*map(one, requests))
    end, cpu = time.perf_counter(), time.process_time() - cpu
    n_tokens = sum(count for _, count in answers)
    return Speed((n_tokens - len(requests)) / (end - max(first for first, _ in answers)), n_tokens / cpu)


async def measure(arguments: argparse.Namespace) -> list[Result]:
    engine = HFEngine(device=arguments.device, dtype=arguments.dtype, threads=arguments.threads)
    expert = await engine.load(ExpertSpec(name="base", kind=Kind.MODEL, source=str(arguments.model)), arguments.model)
    assert isinstance(expert, HFExpert)
    object.__setattr__(expert.loaded, "eos", frozenset())  # every answer runs to its last token
    with tempfile.TemporaryDirectory() as folder:
        specs = {
            "notes": write_notes(Path(folder) / "notes", expert, arguments),
            "cache": write(Path(folder) / "cache", "cache", {}, {}),
        }
        given = {"notes": random_notes(expert, arguments.notes), "cache": random_entries(expert, arguments.notes)}

        async def of(variant: str, n: int) -> Speed:
            requests = [GenerateRequest(prompt=PROMPT.format(i), max_tokens=arguments.tokens) for i in range(n)]
            if variant == "latent":
                return await run(expert.generate, [replace(each, wants="latent") for each in requests])
            if variant == "bare":
                return await run(expert.generate, requests)
            composed = compose(specs[variant], {"base": Member(expert)}, Path(specs[variant].source))
            return await run(composed.generate, [replace(each, notes=tuple(given[variant])) for each in requests])

        return [result for n in arguments.batch for result in await compare(of, n, arguments.repeats)]


async def compare(of: Callable[[str, int], Awaitable[Speed]], n: int, repeats: int) -> list[Result]:
    """Each variant between two runs of the bare primary."""
    variants = ["notes", "cache", "latent"]
    speeds: dict[str, list[float]] = {v: [] for v in ["bare", *variants]}
    ratios: dict[str, list[float]] = {v: [] for v in variants}
    cpu_ratios: dict[str, list[float]] = {v: [] for v in variants}
    for repeat in range(-1, repeats):  # the first one warms up
        before = await of("bare", n)
        for variant in variants:
            speed, after = await of(variant, n), await of("bare", n)
            print(f"batch {n}, {variant}: {speed.decode:.1f} tok/s, bare {after.decode:.1f}", file=sys.stderr)
            if repeat >= 0:
                speeds["bare"].append(after.decode)
                speeds[variant].append(speed.decode)
                ratios[variant].append(speed.decode / ((before.decode + after.decode) / 2))
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
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--notes", type=int, default=65, help="places of each of the two peers")
    parser.add_argument("--shared-width", type=int, default=256)
    parser.add_argument("--interactions", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", help="file to write the results to, or -")
    arguments = parser.parse_args()
    results = asyncio.run(measure(arguments))
    print(f"{'batch':>5}  {'variant':<8}  {'tok/s':>7}  {'of bare':>7}  {'cpu':>5}  range")
    for r in results:
        print(
            f"{r.batch:>5}  {r.variant:<8}  {r.tokens_per_s:>7.1f}  {r.ratio_to_bare:>7.3f}  "
            f"{r.cpu_ratio_to_bare:>5.3f}  {r.lowest_ratio:.3f}-{r.highest_ratio:.3f}"
        )
    if arguments.json:
        text = json.dumps([asdict(r) for r in results], indent=2)
        sys.stdout.write(text + "\n") if arguments.json == "-" else Path(arguments.json).write_text(text)


if __name__ == "__main__":
    main()

"""Members in step: an answer of a Mixture of Thoughts, or of combined logits, against its members' answers alone.

    python benchmarks/latent_together.py SMOLLM2_DIR GEMMA_DIR ADAPTERS_DIR [--tokens 64] [--repeats 5] [--seconds N]
        [--only TEXT] [--device cpu] [--json PATH|-]

The first two folders are models, such as those of `python -m examples.zoo.fetch`; the third has LoRA adapters of the
first model in its folders (`examples/zoo/adapters`). Interactions are random: their figures do not depend on the
weights. All variants take turns in one process, with one thread, on the same prompts; an end token does not stop.

For each composition: seconds of an answer, the sum of its members' seconds alone, the ratio of both (aim: at most 1.3
for `mot`), tokens/s, and the share of tokens whose scores were combined. Times are CPU seconds of this process, so that
other programs on the machine disturb them least, and the wall clock stands beside them; on another device than a CPU,
all are of the wall clock.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coe.engines.base import Adapter, Expert, Member
from coe.engines.hf.composed.logits import Logits
from coe.engines.hf.composed.mot import Mot
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.latent.artifact import Artifact
from coe.engines.latent.decoders import Decoder
from coe.engines.latent.mot import MotInteractions, documents
from coe.engines.latent.shape import InteractionShape, same_layers
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest
from registry.composed import Composed
from registry.digest import identity
from registry.spec import ExpertSpec, Kind
from routers.base import Message

PROMPTS = (
    "Please book a table for seven people in the name of Anna Lind for the evening of the third of May.",
    "We are four, my name is Omar, and we would like to come on Sunday the 12th of October 2031 if there is room.",
    "How many grams are two and a half kilograms, and what is the date of the last Friday in June of the year 2030?",
)
INTERACTIONS = 4


@dataclass(frozen=True)
class Seconds:
    """Of one answer. cpu: of the wall clock where another device computes."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Line:
    """What was measured of one composition; seconds are medians over repeats and prompts.

    Attributes:
        ratio: of the composition's CPU seconds to the sum of its members'.
        tokens_s: new tokens by CPU second. alone_tokens_s: those of the first member alone.
    """

    composition: str
    members: tuple[str, ...]
    cpu_s: float
    wall_s: float
    members_cpu_s: float
    ratio: float
    tokens_s: float
    alone_tokens_s: float
    notes: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs=2)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after this time")
    parser.add_argument("--only", default="", help="compositions whose name contains this")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="PATH|-")
    args = parser.parse_args()
    adapters = [path for path in sorted(args.adapters.iterdir()) if (path / "adapter_model.safetensors").is_file()]
    lines = asyncio.run(run(args, adapters))
    show(lines)
    if args.json:
        document = json.dumps({"tokens": args.tokens, "lines": [asdict(line) for line in lines]}, indent=1)
        print(document) if args.json == "-" else Path(args.json).write_text(document)


async def run(args: argparse.Namespace, adapters: Sequence[Path]) -> list[Line]:
    engine = HFEngine(device=args.device, dtype=args.dtype, threads=1)
    members = await load(engine, args.models, adapters)
    with tempfile.TemporaryDirectory() as folder:
        every = composed(members, Path(folder))
        compositions = {name: expert for name, expert in every.items() if args.only in name}
        lines = await measure(compositions, members, args.tokens, args.repeats, args.seconds, args.device)
    for model in {id(member.expert): member.expert for member in members.values()}.values():
        await engine.unload(model)
    return lines


async def load(engine: HFEngine, models: Sequence[Path], adapters: Sequence[Path]) -> dict[str, Member]:
    """The models, and three adapters of the first one, by name."""
    members = {}
    for name, path in zip(("smollm2", "gemma"), models, strict=True):
        spec = ExpertSpec(name=name, kind=Kind.MODEL, source=str(path), context_length=2048)
        members[name] = Member(await engine.load(spec, path))
    found = [path for path in adapters if fits(path, members["smollm2"])][:3]
    if len(found) < 3:
        sys.exit(f"there are fewer than three adapters of {models[0]}")
    for path in found:
        spec = ExpertSpec(name=path.name, kind=Kind.ADAPTER, source=str(path), base="smollm2")
        members[path.name] = Member(members["smollm2"].expert, Adapter(spec, path))
    return members


def fits(path: Path, base: Member) -> bool:
    """Whether a folder has an adapter of the model's width."""
    from safetensors import safe_open

    with safe_open(path / "adapter_model.safetensors", framework="pt") as tensors:
        name = next(name for name in tensors.keys() if "q_proj.lora_A" in name)  # noqa: SIM118 # no mapping
        return bool(tensors.get_slice(name).get_shape()[1] == decoder_of(base).width)


def decoder_of(member: Member) -> Decoder:
    assert isinstance(member.expert, HFExpert)
    return member.expert.decoder()


def composed(members: Mapping[str, Member], folder: Path) -> dict[str, Expert]:
    a, b, c = list(members)[2:]
    return {
        "mot: smollm2 reads gemma": mot(members, folder, "smollm2", "gemma"),
        "mot: an adapter reads another": mot(members, folder, a, b),
        "mot: smollm2 reads gemma and an adapter": mot(members, folder, "smollm2", "gemma", a),
        "logits: mean of 2 adapters": logits(members, {"mode": "mean"}, a, b),
        "logits: mean of 3 adapters": logits(members, {"mode": "mean"}, a, b, c),
        "logits: proxy of 2 adapters": logits(members, {"mode": "proxy"}, a, b),
    }


def logits(members: Mapping[str, Member], settings: Mapping[str, Any], *names: str) -> Expert:
    spec = ExpertSpec(name="logits", kind=Kind.COMPOSED, architecture="logits", members=names, settings=settings)
    return Logits(spec, {name: members[name] for name in names}, None)


def mot(members: Mapping[str, Member], folder: Path, *names: str) -> Expert:
    """A composition with random interactions; the first member answers."""
    chosen = {name: members[name] for name in names}
    widths = {name: decoder_of(member).width for name, member in chosen.items()}
    layers = {name: list(same_layers(decoder_of(chosen[name]).n_layers, INTERACTIONS)) for name in names}
    shape = InteractionShape(
        width=widths[names[0]],
        n_layers=decoder_of(chosen[names[0]]).n_layers,
        peers={name: widths[name] for name in names[1:]},
        shared_width=128,
        interactions=INTERACTIONS,
        depths=INTERACTIONS,
        layers="same",
    )
    made = MotInteractions(names, {names[0]: shape})
    specs = [member.expert.spec for member in chosen.values()]
    specs += [member.adapter.spec for member in chosen.values() if member.adapter]
    experts = {spec.name: spec for spec in specs}
    settings = {"reads": "together", "router": "first", "k": len(names), "layers": layers}
    settings |= {"primaries": documents(made.shapes)}
    path = folder / "-".join(names)
    of_members = {name: identity(experts[name], experts) for name in names}
    Artifact.write(path, Composed("mot", of_members, settings), tensors=made.tensors(), card="random")
    spec = ExpertSpec(name="mot", kind=Kind.COMPOSED, architecture="mot", members=names, source=str(path))
    return Mot(spec, chosen, path)


async def measure(
    compositions: Mapping[str, Expert],
    members: Mapping[str, Member],
    n_tokens: int,
    repeats: int,
    seconds_left: float,
    device: str,
) -> list[Line]:
    """Everything once to warm up, then in turns."""
    used = {name for expert in compositions.values() for name in expert.spec.members}
    alone: dict[str, list[Seconds]] = {name: [] for name in members if name in used}
    together: dict[str, list[Seconds]] = {name: [] for name in compositions}
    notes: dict[str, tuple[str, ...]] = {}
    began = time.perf_counter()
    for repeat in range(-1, repeats):
        if repeat > 0 and time.perf_counter() - began > seconds_left:
            break
        print(f"round {repeat + 1} after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        for prompt in PROMPTS if repeat >= 0 else PROMPTS[:1]:
            for name in alone:
                seconds, _ = await answer(members[name].expert, prompt, n_tokens, device, members[name].adapter)
                alone[name] += [seconds] if repeat >= 0 else []
            for name, expert in compositions.items():
                seconds, notes[name] = await answer(expert, prompt, n_tokens, device)
                together[name] += [seconds] if repeat >= 0 else []
    return [line(name, compositions[name], together[name], alone, notes[name], n_tokens) for name in compositions]


async def answer(
    expert: Expert, prompt: str, n_tokens: int, device: str, adapter: Adapter | None = None
) -> tuple[Seconds, tuple[str, ...]]:
    request = GenerateRequest(
        messages=(Message("user", prompt),), max_tokens=n_tokens, sampling=SamplingOptions(ignore_eos=True)
    )
    cpu, wall, notes = time.process_time(), time.perf_counter(), tuple[str, ...]()
    async for chunk in expert.generate(request, adapter):
        notes = chunk.notes
    seconds = time.perf_counter() - wall
    return Seconds(time.process_time() - cpu if device == "cpu" else seconds, seconds), notes


def line(
    name: str,
    expert: Expert,
    seconds: Sequence[Seconds],
    alone: Mapping[str, Sequence[Seconds]],
    notes: tuple[str, ...],
    n_tokens: int,
) -> Line:
    names = expert.spec.members
    of_members = [statistics.median(each.cpu for each in alone[member]) for member in names]
    cpu = statistics.median(each.cpu for each in seconds)
    return Line(
        composition=name,
        members=names,
        cpu_s=round(cpu, 3),
        wall_s=round(statistics.median(each.wall for each in seconds), 3),
        members_cpu_s=round(sum(of_members), 3),
        ratio=round(cpu / sum(of_members), 3),
        tokens_s=round(n_tokens / cpu, 1),
        alone_tokens_s=round(n_tokens / of_members[0], 1),
        notes=notes,
    )


def show(lines: Sequence[Line]) -> None:
    print("| composition | members | s | members alone, s | ratio | tokens/s | first member alone | note |")
    print("|---|---|---|---|---|---|---|---|")
    for each in lines:
        print(
            f"| {each.composition} | {', '.join(each.members)} | {each.cpu_s:.2f} (wall {each.wall_s:.2f}) | "
            f"{each.members_cpu_s:.2f} | {each.ratio:.2f} | {each.tokens_s:.1f} | {each.alone_tokens_s:.1f} | "
            f"{'; '.join(each.notes)} |"
        )


if __name__ == "__main__":
    main()

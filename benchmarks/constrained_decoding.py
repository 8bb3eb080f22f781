"""Constrained decoding by `hf` experts: speed with and without a JSON schema, time to the first token, valid answers.

    python benchmarks/constrained_decoding.py MODEL_DIR [--only speed first valid] [--rounds 5] [--json PATH]

speed   tokens per second for a list of records of each schema against no schema, in adjacent runs of the same batch
        with the same number of tokens; "cpu" is the ratio of tokens per second of CPU time
first   time to the first token: without a schema, with one that is new, and with one that is kept, interleaved; and the
        first schema of a model, which also reads its vocabulary and starts the process that checks schemas
valid   answers at temperature 1, one for each seed, that jsonschema accepts; answers that `--most-tokens` cuts are
        counted apart: they are no JSON
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grammar_cases import SCHEMAS, Schema
from jsonschema import Draft202012Validator, FormatChecker

from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.sampling import SamplingOptions
from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec, Kind
from routers.base import Message

PROMPTS = {"flat": "Describe player {} as JSON.", "nested": "Write order {} as JSON.", "alternatives": "Invoice {}:"}


@dataclass(frozen=True)
class Run:
    """One round of a batch. n_tokens: of all answers. wall_s, cpu_s: until the last has ended."""

    answers: list[list[Chunk]]
    n_tokens: int
    wall_s: float
    cpu_s: float


def request(schema: Schema | None, prompt: str, n_tokens: int, seed: int = 0, **fields: Any) -> GenerateRequest:
    asked = GenerateRequest((Message("user", prompt),), max_tokens=n_tokens, temperature=1.0, seed=seed, **fields)
    return asked if schema is None else replace(asked, format="json", json_schema={"name": "a", "schema": schema})


async def run(expert: HFExpert, requests: Sequence[GenerateRequest]) -> Run:
    """All requests at once."""

    async def one(asked: GenerateRequest) -> list[Chunk]:
        return [chunk async for chunk in expert.generate(asked)]

    wall, cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*map(one, requests))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Run(answers, sum(chunks[-1].usage.completion_tokens for chunks in answers if chunks[-1].usage), wall, cpu)


def many(name: str) -> Schema:
    """A list of records, long enough for an answer of any number of tokens: both sides then generate as many."""
    schema = dict(SCHEMAS[name])
    return {"type": "array", "items": schema, "minItems": 50, "$defs": schema.pop("$defs", {})}


async def speed(expert: HFExpert, batches: Sequence[int], n_tokens: int, rounds: int) -> list[dict[str, Any]]:
    endless = SamplingOptions(ignore_eos=True)
    rows = []
    print(f"{'batch':>5}  {'schema':<13} {'tok/s':>7} {'without':>8}  {'ratio':>5}  {'range':<13} {'cpu':>6}")
    for n in batches:

        async def one(schema: Schema | None, n: int = n) -> Run:
            asked = [request(schema, f"Write record {i} as JSON.", n_tokens, i, sampling=endless) for i in range(n)]
            done = await run(expert, asked)
            if done.n_tokens != n * n_tokens:
                raise RuntimeError("an answer has ended early: the numbers of tokens differ")
            return done

        ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in SCHEMAS}
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in SCHEMAS}
        for number in range(-1, rounds):  # the first one warms up
            before = await one(None)
            for name in SCHEMAS:
                held, after = await one(many(name)), await one(None)
                wall_s, cpu_s = (before.wall_s + after.wall_s) / 2, (before.cpu_s + after.cpu_s) / 2
                before = after
                if number >= 0:
                    ratios[name].append((wall_s / held.wall_s, cpu_s / held.cpu_s))
                    rates[name].append((held.n_tokens / held.wall_s, held.n_tokens / wall_s))
        for name in SCHEMAS:
            (ratio, cpu), (rate, plain) = (medians(found[name]) for found in (ratios, rates))
            low, high = min(r for r, _ in ratios[name]), max(r for r, _ in ratios[name])
            row = {"batch": n, "schema": name, "tokens_per_s": rate, "without": plain, "ratio": ratio, "cpu": cpu}
            rows.append({**row, "lowest": low, "highest": high})
            print(f"{n:5}  {name:<13} {rate:7.1f} {plain:8.1f}  {ratio:5.3f}  {low:.3f}-{high:.3f}   {cpu:6.3f}")
    return rows


def medians(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


async def first(engine: HFEngine, expert: HFExpert, folder: Path, rounds: int) -> dict[str, Any]:
    async def seconds(schema: Schema | None, asked: HFExpert = expert) -> float:
        return (await run(asked, [request(schema, "Describe a player as JSON.", 1)])).wall_s

    found: dict[str, list[float]] = {"first schema of a model": []}
    for _ in range(3):
        other, fresh = HFEngine(device="cpu", threads=1), spec(folder)
        loaded = await other.load(fresh, folder)
        await seconds(None, loaded)
        found["first schema of a model"].append(await seconds(SCHEMAS["flat"], loaded))
        await other.unload(loaded)
    for number in range(rounds):
        for name, schema in SCHEMAS.items():
            new = {**schema, "title": f"new {number}"}  # another text, so that it is not one that is kept
            for label, given in (("none", None), (f"{name}, new", new), (f"{name}, kept", new)):
                found.setdefault(label, []).append(await seconds(given))
    print("ms to the first token: median (lowest to highest)")
    for label, times in found.items():
        low, middle, high = (1e3 * value for value in (min(times), statistics.median(times), max(times)))
        print(f"  {label:<24} {middle:7.0f} ({low:.0f} to {high:.0f})")
    return found


async def valid(expert: HFExpert, n: int, n_tokens: int) -> list[dict[str, Any]]:
    rows = []
    print(f"{'schema':<13} {'complete':>8} {'valid':>6} {'cut':>4} {'distinct':>9} {'tokens':>7}")
    for name, schema in SCHEMAS.items():
        done = await run(expert, [request(schema, PROMPTS[name].format(i), n_tokens, i) for i in range(n)])
        texts = ["".join(chunk.text for chunk in chunks) for chunks in done.answers]
        whole = [text for text, chunks in zip(texts, done.answers, strict=True) if chunks[-1].finish_reason == "stop"]
        check = Draft202012Validator(schema, format_checker=FormatChecker())
        row = {
            "schema": name,
            "complete": len(whole),
            "valid": sum(check.is_valid(json.loads(text)) for text in whole),
            "cut": n - len(whole),
            "distinct": len(set(texts)),
            "tokens": done.n_tokens / n,
            "examples": texts[:3],
        }
        rows.append(row)
        figures = [row[key] for key in ("complete", "valid", "cut", "distinct", "tokens")]
        print("{:<13} {:8} {:6} {:4} {:9} {:7.0f}".format(name, *figures), f"  {texts[0]!r:.70}")
    return rows


def spec(folder: Path) -> ExpertSpec:
    return ExpertSpec(name="expert", kind=Kind.MODEL, source=str(folder))


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    engine = HFEngine(device=given.device, threads=given.threads)
    found: dict[str, Any] = {}
    expert = await engine.load(spec(given.model), given.model)
    await run(expert, [request(SCHEMAS["flat"], "Hello", 1)])  # reads the vocabulary
    if "speed" in given.only:
        found["speed"] = await speed(expert, given.batch, given.tokens, given.rounds)
    if "first" in given.only:
        found["first"] = await first(engine, expert, given.model, given.rounds)
    if "valid" in given.only:
        found["valid"] = await valid(expert, given.answers, given.most_tokens)
    await engine.unload(expert)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="+", choices=("speed", "first", "valid"), default=["speed", "first", "valid"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, for the speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answers", type=int, default=100, help="of each schema, for their validity")
    parser.add_argument("--most-tokens", type=int, default=1000, help="of each of these answers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    found = asyncio.run(measure(given))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

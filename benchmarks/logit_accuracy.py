"""Accuracy of logit composition on queries that need two experts of the zoo.

    python benchmarks/logit_accuracy.py [--rows 40] [--split test] [--method mean ...] [--json PATH|-]

The two right experts of each family (`examples.zoo.families.TWO_SKILLS`) are combined token by token: by the mean of
their log-probabilities, without and with their base, and by proxy, each way round. Single experts on the same rows
stand beside them; the methods of `python -m examples.zoo.two_skills` are measured there. Greedy answers, in
bfloat16 where the CPU multiplies it, else in float32.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from coe.chunks import Joined
from coe.config import load_config
from coe.experts import open_snapshot
from coe.host import Host
from coe.hosting import open_host
from coe.types import Answer
from examples.zoo.aggregator import CONFIG, request
from examples.zoo.families import TWO_SKILLS, Row, Split, TwoSkills
from examples.zoo.plan import SCORE_SEED
from examples.zoo.scoring import grades
from registry.spec import ExpertSpec, Kind

BASE = "smollm2"
AT_ONCE = 8
Members = Callable[[TwoSkills], tuple[str, ...]]
METHODS: Mapping[str, tuple[Members, Mapping[str, Any]]] = {
    "first expert": (lambda pair: pair.experts[:1], {}),
    "second expert": (lambda pair: pair.experts[1:], {}),
    "mean": (lambda pair: pair.experts, {"mode": "mean"}),
    "mean, with the base": (lambda pair: (*pair.experts, BASE), {"mode": "mean"}),
    "proxy: first + second - base": (lambda pair: pair.experts, {"mode": "proxy"}),
    "proxy: second + first - base": (lambda pair: pair.experts[::-1], {"mode": "proxy"}),
}


@dataclass(frozen=True)
class Line:
    """A method on one family. right: share of right answers. combined: share of tokens that were combined; None if not
    stated."""

    family: str
    method: str
    right: float
    n_rows: int
    tokens_out: float
    seconds: float
    combined: float | None
    wrong: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--split", type=Split, default=Split.TEST)
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--json", metavar="PATH|-")
    args = parser.parse_args()
    lines = asyncio.run(measure(args.split, args.rows, args.method or [*METHODS]))
    print("| family | method | right | tokens | s for all rows | combined |")
    print("|---|---|---|---|---|---|")
    for line in lines:
        share = "" if line.combined is None else f"{line.combined:.0%}"
        figures = f"{line.right:.1%} | {line.tokens_out:.1f} | {line.seconds:.0f} | {share}"
        print(f"| {line.family} | {line.method} | {figures} |")
    if args.json:
        document = json.dumps([asdict(line) for line in lines], indent=1, ensure_ascii=False)
        print(document) if args.json == "-" else Path(args.json).write_text(document)


async def measure(split: Split, n: int, methods: Sequence[str]) -> list[Line]:
    config = load_config(CONFIG)
    config = config.model_copy(
        update={
            "engines": config.engines.model_copy(update={"hf": config.engines.hf.model_copy(update={"threads": 1})})
        }
    )
    snapshot = open_snapshot(config)
    added = {spec.name: spec for spec in composed()}
    snapshot = replace(snapshot, experts={**snapshot.experts, **added})
    lines = []
    async with open_host(config, snapshot) as host:
        for family, pair in TWO_SKILLS.items():
            rows = pair.family.rows(split, n, seed=SCORE_SEED)
            for method in methods:
                print(f"{family}: {method}", file=sys.stderr)
                lines.append(await answered(host, method, pair, rows))
    return lines


def composed() -> Iterator[ExpertSpec]:
    """A composed expert for each method and family."""
    for family, pair in TWO_SKILLS.items():
        for method, (members, settings) in METHODS.items():
            if settings:
                yield ExpertSpec(
                    name=name_of(family, method),
                    kind=Kind.COMPOSED,
                    architecture="logits",
                    members=members(pair),
                    settings=settings,
                )


def name_of(family: str, method: str) -> str:
    return re.sub(r"[^a-z]+", "-", f"{family} {method}").strip("-")


async def answered(host: Host, method: str, pair: TwoSkills, rows: Sequence[Row]) -> Line:
    members, settings = METHODS[method]
    expert = name_of(pair.family.name, method) if settings else members(pair)[0]
    places, began = asyncio.Semaphore(AT_ONCE), time.perf_counter()

    async def one(row: Row) -> Answer:
        joined = Joined()
        async with places:
            async for chunk in host.ask(expert, request(row, pair)):
                joined.add(chunk)
        return joined.answer(expert, chunk)

    answers = await asyncio.gather(*map(one, rows))
    scores = grades(pair.family, rows, [answer.text for answer in answers])
    counts = [re.search(r"combined for (\d+) of (\d+) tokens", " ".join(answer.notes)) for answer in answers]
    found = [(int(each[1]), int(each[2])) for each in counts if each]
    return Line(
        pair.family.name,
        method,
        right=statistics.mean(scores),
        n_rows=len(rows),
        tokens_out=statistics.mean(answer.usage.completion_tokens for answer in answers),
        seconds=time.perf_counter() - began,
        combined=sum(n for n, _ in found) / sum(of for _, of in found) if found else None,
        wrong=tuple(answer.text for answer, score in zip(answers, scores, strict=True) if score < 1)[:5],
    )


if __name__ == "__main__":
    main()

"""Seconds of finished runs, asked the same queries in turns: a busy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coe.orchestrator import Orchestrator
from examples.zoo.families import Family, Row, Split
from examples.zoo.latent.asking import request
from examples.zoo.latent.benches import Bench
from examples.zoo.latent.plan import Run
from examples.zoo.latent.runner import opened
from examples.zoo.latent.ways import Way


@dataclass(frozen=True, slots=True)
class Times:
    """Of one method, for each query: seconds of the clock, and of the CPU with all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


async def times_of(
    runs: Sequence[Run], folder: Path, n: int, report: Callable[[str], None] = lambda _: None
) -> dict[str, Times]:
    """Ask `n` test queries of one bench, one at a time, each by all methods before the next query.

    The method that begins changes from query to query. A first query by each method loads its experts, and is not
    counted.

    Raises:
        ValueError: runs of several benches, or a run that is not finished.
    """
    if len({run.bench.name for run in runs}) != 1:
        raise ValueError("seconds are compared on one bench: name it with --bench")
    rows = list(_rows(runs[0].bench, n))
    found = {run.method.name: Times() for run in runs}
    async with AsyncExitStack() as stack:
        ways = {run.method.name: await stack.enter_async_context(opened(run, folder)) for run in runs}
        for name, (way, orchestrator) in ways.items():
            await _timed(*rows[0], way, orchestrator)
            report(f"{name} is loaded")
        for number, (row, family) in enumerate(rows):
            for name in _turn(list(ways), number):
                wall, cpu = await _timed(row, family, *ways[name])
                found[name].wall.append(wall)
                found[name].cpu.append(cpu)
            report(f"query {number + 1} of {len(rows)}")
    return found


def table(found: Mapping[str, Times], against: str) -> str:
    """A markdown table: medians in seconds, and medians of the ratios to `against`, query by query."""
    theirs = found[against]
    lines = [f"| method | s | CPU s | s / {against} | CPU s / {against} |", "|---|---:|---:|---:|---:|"]
    for name, times in found.items():
        cells = [
            f"{statistics.median(times.wall):.2f}",
            f"{statistics.median(times.cpu):.2f}",
            f"{_ratio(times.wall, theirs.wall):.2f}",
            f"{_ratio(times.cpu, theirs.cpu):.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return float(np.median(np.divide(ours, theirs)))


def _rows(bench: Bench, n: int) -> Iterator[tuple[Row, Family]]:
    """`n` queries, the families in turns."""
    by_family = list(zip(bench.families, bench.scored(Split.TEST).values(), strict=True))
    for number in range(n):
        family, rows = by_family[number % len(by_family)]
        yield rows[number // len(by_family) % len(rows)], family


def _turn(names: Sequence[str], number: int) -> Iterable[str]:
    begin = number % len(names)
    return [*names[begin:], *names[:begin]]


async def _timed(row: Row, family: Family, way: Way, orchestrator: Orchestrator) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    await way.of(family).reply(request(row, family), orchestrator).text()
    return time.perf_counter() - wall, time.process_time() - cpu

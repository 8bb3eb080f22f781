"""What the tests of batches share: a service of fake experts, input files, and an executor in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from coe.batch.answering import Answerer, LoadCounter, WorkReport
from coe.batch.claims import Claims
from coe.batch.parts import Job, PartRouter, PlannedPart, open_router, step_part
from coe.batch.run import run_batch
from coe.batch.source import Split
from coe.batch.stages import WorkItem
from coe.config import Config, load_config
from coe.hosting import open_host
from routers.artifacts import save
from routers.encoders.build import build_encoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable

EXPERTS = """
experts:
  - {name: base, kind: model, source: "fake://echo", context_length: 64, size_bytes: 100,
     price: {input_usd_per_mtok: 1, output_usd_per_mtok: 2}}
  - {name: loud, kind: model, source: "fake://upper", context_length: 64, size_bytes: 100}
  - {name: tuned, kind: adapter, base: base, source: "fake://upper", context_length: 64, size_bytes: 1}
  - {name: broken, kind: model, source: "fake://fail?at=load", context_length: 64, size_bytes: 100}
  - {name: flaky, kind: model, source: "fake://fail", context_length: 64, size_bytes: 100}
"""
POLICIES = """
  default: {expert: loud}
  shaky: {expert: broken, fallback: base}
"""


def service(folder: Path, policies: str = POLICIES, more: str = "") -> Path:
    """A configuration with room for one base at a time."""
    (folder / "experts.yaml").write_text(EXPERTS)
    path = folder / "service.yaml"
    path.write_text(f"experts: [experts.yaml]\nhost: {{budget: 100}}\npolicies: {policies}\n{more}")
    return path


def save_router(folder: Path) -> None:
    """A kNN router with the same estimate for every query: base is the best, then loud, tuned, flaky."""
    encoder = build_encoder("hashing:64")
    table = OutcomeTable(
        query_ids=tuple("0123456789"),
        prompts=tuple(f"question {i}" for i in range(10)),
        experts=("base", "loud", "tuned", "flaky"),
        scores=np.array(
            [[1.0] * 4] * 6 + [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4]
        ),
    )
    save(build("knn", encoder, {"k": 10}).fit(table), folder, table=table, encoder=encoder)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    """JSONL; a string is written unchanged."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def openai_row(custom_id: str, text: str, model: str = "auto", **body: Any) -> dict[str, Any]:
    """A batch line for the chat endpoint."""
    content = {"model": model, "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": content}


MIXED: tuple[Mapping[str, Any] | str, ...] = (
    *(
        openai_row(f"row-{i:04d}", f"hello {i}", ("auto", "base", "tuned", "coe/shaky", "broken", "nobdy")[i % 6])
        for i in range(300)
    ),
    "{not json",
    "",
    {"prompt": "a plain row", "model": "base"},
)
"""Rows of every fate: routed, named, adapter, fallback, failing, unknown, corrupt, blank, plain."""


class Stop(BaseException):
    """Ends a run at a chosen moment, as a signal would."""


class InProcess:
    """The executor without Ray.

    stop_after: raise Stop instead of the n-th report.
    """

    def __init__(self, hosts: int = 1, stop_after: int | None = None) -> None:
        self.hosts, self.left = hosts, stop_after
        self.items: list[list[tuple[str, ...]]] = []
        self.routed = self.stepped = 0

    def route(self, job: Job, bundles: Sequence[tuple[Split, ...]]) -> Iterator[PlannedPart]:
        router = PartRouter(job, open_router(job.config, job.snapshot))
        for bundle in bundles:
            for stepped in router.route(bundle):
                self.routed += 1
                self._tick()
                yield stepped

    def step(self, job: Job, stage: int, parts: Sequence[int]) -> Iterator[PlannedPart]:
        for part in parts:
            self.stepped += 1
            yield step_part(job, part, stage)
            self._tick()

    def answer(self, job: Job, stage: int, items: Sequence[WorkItem]) -> Iterator[WorkReport]:
        self.items.append([tuple(dict.fromkeys(unit.expert for unit in item)) for item in items])
        for some in [items] if self.left is None else [[(unit,)] for item in items for unit in item]:
            yield from asyncio.run(self._answer(job, stage, some))
            self._tick()

    async def _answer(self, job: Job, stage: int, items: Sequence[WorkItem]) -> list[WorkReport]:
        """One host for all work items, as the actors of Ray hold one."""
        reports: list[WorkReport] = []
        claims = Claims([item[0].residency for item in items], hosts=1)
        async with open_host(job.config, job.snapshot) as host:
            loads = LoadCounter(host)
            while (claim := claims.claim("host")) is not None:
                following = None if claim.reserved is None else items[claim.reserved][0].residency
                await Answerer(
                    host, job.folder, stage, items[claim.item], reports.append, loads=loads, following=following
                ).run()
        return reports

    def _tick(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Stop


class Quiet:
    """A watcher that records the progress."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, dict[str, int]]] = []
        self.done: dict[tuple[str, str], int] = {}

    def phase(self, name: str, totals: Mapping[str, int]) -> None:
        self.phases.append((name, dict(totals)))

    def advance(self, name: str, done: int, failed: int = 0) -> None:
        key = (self.phases[-1][0], name)
        self.done[key] = self.done.get(key, 0) + done


def run(
    config: Path | Config,
    source: Path | str,
    output: Path | str,
    executor: InProcess | None = None,
    watch: Quiet | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`run_batch` in this process."""

    @contextmanager
    def opened() -> Iterator[InProcess]:
        yield executor or InProcess()

    loaded = config if isinstance(config, Config) else load_config(config)
    return run_batch(loaded, source=str(source), output=str(output), executor=opened, watch=watch or Quiet(), **options)


def records(output: Path) -> dict[str, dict[str, Any]]:
    """results.parquet by id."""
    rows = pq.read_table(output / "results.parquet").to_pylist()
    return {row["id"]: row for row in rows}


def results(output: Path) -> dict[str, bytes]:
    """The bytes of the result files."""
    return {path.name: path.read_bytes() for path in output.glob("results.*")}

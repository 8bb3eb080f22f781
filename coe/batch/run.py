"""A whole run: scan, route, answer stage by stage, merge. An executor does the work: Ray, this process, a rehearsal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from coe.batch.answering import WorkReport
from coe.batch.budget import Budget, check_policy
from coe.batch.errors import BatchError
from coe.batch.joint import assign_parts
from coe.batch.manifest import known_experts, manifest, open_batch_folder
from coe.batch.parts import (
    PARTS,
    Job,
    PlannedPart,
    answers_folder,
    open_router,
    results_name,
    unassigned,
    units_name,
)
from coe.batch.records import plain
from coe.batch.results import merge
from coe.batch.sizes import residency_bytes
from coe.batch.source import Source, Split, read_together, scan
from coe.batch.stages import Unit, WorkItem, plan_work_items
from coe.config import Config
from coe.experts import open_snapshot
from coe.orchestrator import Orchestrator
from coe.policy import AUTO, address
from coe.runs.folder import COMPLETE, RUNNING, RunFolder, status_after
from coe.runs.storage import Folder

READING, ROUTING, ASSIGNING, MERGING = "reading the input", "routing", "assigning", "merging"


class Executor(Protocol):
    """Does the work of a run, in any order, and reports it as it is done.

    hosts: processes that answer in parallel.
    """

    hosts: int

    def route(self, job: Job, bundles: Sequence[tuple[Split, ...]]) -> Iterator[PlannedPart]:
        """Route the splits of each bundle (`parts.PartRouter`)."""

    def step(self, job: Job, stage: int, parts: Sequence[int]) -> Iterator[PlannedPart]:
        """Plan the stage of each part (`parts.step_part`)."""

    def answer(self, job: Job, stage: int, items: Sequence[WorkItem]) -> Iterator[WorkReport]:
        """Answer each work item (`answering.Answerer`)."""


class Watcher(Protocol):
    """Receives the progress of a run."""

    def phase(self, name: str, totals: Mapping[str, int]) -> None:
        """A phase begins. `totals`: the amount of work under each name: rows, parts, or calls by expert."""

    def advance(self, name: str, done: int, failed: int = 0) -> None:
        """`done` more is finished under a name, `failed` of it with errors."""


@dataclass(slots=True)
class _Session:
    """What this process did in the run; one entry of `sessions` in run.json."""

    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    status: str = RUNNING
    seconds: float = 0.0
    phase_s: dict[str, float] = field(default_factory=dict)
    work: WorkReport = field(default_factory=WorkReport)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        record = plain(self)
        work = plain(record.pop("work"))
        return {**record, "answers": work.pop("done"), "failures": work.pop("failed"), **work}


class Batch:
    """One run, in its open folder."""

    def __init__(self, job: Job, run: RunFolder, executor: Executor, watch: Watcher) -> None:
        self._job, self._run, self._executor, self._watch = job, run, executor, watch
        self._session = _Session()
        self._parts: dict[int, PlannedPart] = {}

    def __call__(self) -> dict[str, Any]:
        """Do the work that is left; returns the content of run.json."""
        started = time.perf_counter()
        self._save(RUNNING)
        try:
            self.answer()
            found = self._merge()
            self._session.seconds = time.perf_counter() - started
            self._save(COMPLETE, **found)
        except BaseException as error:
            self._session.seconds = time.perf_counter() - started
            self._save(status_after(error))
            raise
        self._job.folder.remove(PARTS)
        return self._run.run

    def answer(self) -> None:
        """Everything but the merge: route, assign, then answer and step, stage by stage."""
        self._route()
        self._assign()
        stage = 0
        while units := [unit for part in self._parts.values() for unit in part.units]:
            self._answer(stage, units)
            stage += 1
            self._step(stage)

    def _route(self) -> None:
        bundles = read_together(self._job.source)
        with self._phase(ROUTING, {"rows": self._job.source.rows}):
            for stepped in self._executor.route(self._job, bundles):
                self._parts[stepped.part] = stepped
                self._watch.advance("rows", self._job.source.splits[stepped.part].rows)

    def _assign(self) -> None:
        """With a budget: choose the experts of all rows jointly, and plan their first calls."""
        job = self._job
        if job.budget is None:
            return
        parts = [part for part in sorted(self._parts) if unassigned(job.folder, part) is not None]
        if not parts:  # a second rehearsal: the first one assigned them
            return
        with self._phase(ASSIGNING, {"parts": len(parts)}):
            sizes = residency_bytes(job.config, job.snapshot) if job.budget.load_weight else {}
            self._run.run["assignment"] = assign_parts(job.folder, parts, job.budget, job.snapshot, sizes)
            for stepped in self._executor.step(job, 0, parts):
                self._parts[stepped.part] = stepped
                self._watch.advance("parts", 1)

    def _answer(self, stage: int, units: Sequence[Unit]) -> None:
        left = self._unanswered(stage, units)
        totals = Counter({unit.expert: 0 for unit in units})
        for unit in units:
            totals[unit.expert] += unit.calls
        with self._phase(f"answering, stage {stage + 1}", totals):
            for unit in set(units) - set(left):
                self._watch.advance(unit.expert, unit.calls)
            while left:
                self._work(stage, left)
                before, left = len(left), self._unanswered(stage, left)
                if len(left) == before:
                    raise BatchError(
                        f"{before} files of answers are missing, the first of {left[0].expert!r}: the processes that "
                        "answer died repeatedly. Check that they have memory for what they load; --resume continues"
                    )

    def _work(self, stage: int, units: Sequence[Unit]) -> None:
        """Answer the units. Some may be left: the work of a process that dies is not always repeated."""
        for report in self._executor.answer(self._job, stage, plan_work_items(units, self._executor.hosts)):
            self._session.work += report
            for expert, done in report.done.items():
                self._watch.advance(expert, done, report.failed[expert])

    def _unanswered(self, stage: int, units: Sequence[Unit]) -> list[Unit]:
        answered = self._job.folder.names(answers_folder(stage))
        return [unit for unit in units if units_name(unit) not in answered]

    def _step(self, stage: int) -> None:
        """Plan the stage of all parts that had calls."""
        parts = [part.part for part in self._parts.values() if part.units]
        with self._phase(f"planning stage {stage + 1}", {"parts": len(parts)}):
            for stepped in self._executor.step(self._job, stage, sorted(parts)):
                self._parts[stepped.part] = stepped
                self._watch.advance("parts", 1)

    def _merge(self) -> dict[str, Any]:
        parts = [self._parts[number] for number in sorted(self._parts)]
        rows = sum(part.rows for part in parts)
        with self._phase(MERGING, {"rows": rows}):
            counts = merge(
                self._job.folder,
                [results_name(part.part) for part in parts],
                lines=any(part.openai for part in parts),
                on_rows=lambda done: self._watch.advance("rows", done),
            )
        ignored: Counter[str] = Counter()
        for part in parts:
            ignored.update(part.ignored)
        return {"results": plain(counts), "ignored_fields": dict(ignored)}

    @contextmanager
    def _phase(self, name: str, totals: Mapping[str, int]) -> Iterator[None]:
        self._watch.phase(name, totals)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._session.phase_s[name] = round(time.perf_counter() - started, 3)

    def _save(self, status: str, **found: Any) -> None:
        self._session.status = status
        self._run.save(status, self._session.record(), **found)


def open_input(
    config: Config, source: str, model: str, watch: Watcher, budget: Budget | None = None
) -> tuple[Orchestrator, Source]:
    """The router over the configured experts, and the input, cut into splits. Raises as `run_batch`."""
    snapshot = open_snapshot(config)
    router = open_router(config, snapshot)
    if model != AUTO:  # without policies there is no default, but rows may name experts
        policy = address(model, router.policies, config.default_policy, snapshot.experts)
        if budget is not None and policy is not None:
            check_policy(policy, router.policies.values())
    if budget is not None:
        budget.check(snapshot)
    watch.phase(READING, {})
    return router, scan(source, config.batch.part_rows)


def run_batch(
    config: Config,
    *,
    source: str,
    output: str,
    executor: Callable[[], AbstractContextManager[Executor]],
    watch: Watcher,
    model: str = AUTO,
    budget: Budget | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Answer every row of an input file; see the package's docstring.

    Args:
        source, output: local paths or fsspec URLs.
        executor: opened when there is work; `runner.ray_executor` for `coe batch`.
        model: of rows that name none.
        budget: within which the experts of all rows are chosen jointly; None routes each row on its own.
        resume: continue the run that `output` holds.

    Returns:
        The content of run.json: status, manifest, counts by expert, sessions with loads and times.

    Raises:
        InputError: the input cannot be read.
        BudgetError: the rows cannot be assigned within the budget.
        RunFolderError: the folder holds another run, or this one and `resume` is False.
        ConfigError, RegistryError, RouterError: the configuration, the registry or a router is wrong.
        UnknownModel: `model` is neither a policy nor an expert.
    """
    folder = Folder.of(output)
    router, found = open_input(config, source, model, watch, budget)
    snapshot = router.snapshot
    wanted = manifest(config, snapshot, router.policies, found, model, budget)
    with open_batch_folder(folder, wanted, resume=resume) as run:
        if run.status == COMPLETE:
            folder.remove(PARTS)
            return run.run
        run.run |= {"input": found.manifest(), "registry_version": snapshot.version}
        kept = budget and budget.kept(run.run)
        job = Job(folder, found, config, known_experts(snapshot, run.run), model, kept)
        with executor() as working:
            return Batch(job, run, working, watch)()

"""Runs experts on tasks: each base is loaded once, every answer is kept at once, a killed run can be resumed.

    with open_answer_folder(path, plan) as folder:
        report = await run(plan, folder, host.ask)

Failures. A row that cannot be asked (it is too long for the context, say) scores 0. A row on which an engine fails
scores 0 and is asked again when the run is resumed. The run stops where every later row would fail too: weights that
cannot be loaded, no memory, or an expert whose first 8 rows (all, if there are fewer) ended in engine failures.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from coe.errors import CoeError, EngineError, InvalidRequest
from coe.evaluation.answer_folder import AnswerFolder
from coe.evaluation.answer_log import AnswerLog, AnswerRecord
from coe.evaluation.graders import score_of
from coe.evaluation.plan import EvaluationPlan, Question
from coe.evaluation.report import Report, build_report
from coe.orchestrator import AskExpert
from coe.runs.folder import COMPLETE, status_after
from coe.types import Chunk, GenerateRequest, Usage

HOPELESS_AFTER = 8
"""An expert that fails this often before its first answer stops the run."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One expert's counts so far: `done` of `total` rows, their summed `score`, and `failures` among them.

    refusals: failures that asking again would repeat.
    """

    expert: str
    total: int
    done: int = 0
    score: float = 0.0
    failures: int = 0
    refusals: int = 0

    @property
    def mean_score(self) -> float:
        """Mean score of the rows so far; 0 before the first."""
        return self.score / self.done if self.done else 0.0

    def after(self, record: AnswerRecord) -> Progress:
        """The counts with one more answer."""
        failed = record.error is not None
        return Progress(
            self.expert,
            self.total,
            self.done + 1,
            self.score + record.score,
            self.failures + failed,
            self.refusals + (failed and record.final),
        )

    @property
    def is_hopeless(self) -> bool:
        """Whether all answers so far are an engine's failures, and enough to stop."""
        return self.done == self.failures and not self.refusals and self.done >= min(HOPELESS_AFTER, self.total)


@dataclass(slots=True)
class _Run:
    """A session of a run."""

    plan: EvaluationPlan
    folder: AnswerFolder
    ask: AskExpert
    on_progress: Callable[[Progress], None]
    log: AnswerLog = field(init=False)
    records: dict[tuple[str, str, str], AnswerRecord] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=dict)

    def resume(self) -> None:
        """Start from the answers of earlier sessions, without failures that may be asked again."""
        self.progress = {spec.name: Progress(spec.name, self.plan.n_rows) for spec in self.plan.experts}
        for record in self.folder.records:
            if record.final:
                self.add(record)
        for progress in self.progress.values():
            self.on_progress(progress)

    def add(self, record: AnswerRecord) -> Progress:
        """Count a record; returns its expert's progress."""
        self.records[record.key] = record
        progress = self.progress[record.expert] = self.progress[record.expert].after(record)
        return progress

    async def residency(self, questions: Sequence[Question], concurrency: int) -> None:
        """Answer the questions of one base and its adapters, `concurrency` at a time."""
        left = iter([question for question in questions if question.key not in self.records])
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(concurrency):
                    workers.create_task(self.work(left))
        except BaseExceptionGroup as group:
            error = _first(group)
            raise error from error.__cause__

    async def work(self, left: Iterator[Question]) -> None:
        """Answer one question after the other, from an iterator that the workers share."""
        for question in left:
            record = await self.answer(question)
            self.log.append(record)
            progress = self.add(record)
            self.on_progress(progress)
            if progress.is_hopeless:
                raise EngineError(
                    f"{record.expert!r} failed on all of its {progress.done} first rows; the last one: {record.error}"
                )

    def request(self, question: Question) -> GenerateRequest:
        """The request of a question; no client waits for it, and only the whole answer is read."""
        return replace(question.request(self.plan.settings), patient=True, stream=False)

    async def answer(self, question: Question) -> AnswerRecord:
        """Ask and grade; a failure of this row is a record too."""
        started = time.perf_counter()
        try:
            text, usage, cost_usd = await _collect(self.ask(question.expert.name, self.request(question)))
            error, final = None, True
        except CoeError as failure:
            if failure.lasting:
                raise
            text, usage, cost_usd = "", Usage(0, 0), None
            error, final = f"{type(failure).__name__}: {failure}", isinstance(failure, InvalidRequest)
        seconds = time.perf_counter() - started
        # In a thread: a slow grade (SQL) must not delay the other answers.
        score = 0.0 if error else await asyncio.to_thread(score_of, question.task.grader, text, question.row.fields)
        return AnswerRecord(
            run=self.folder.fingerprint,
            expert=question.expert.name,
            task=question.task.name,
            row=question.row.id,
            answer=text,
            score=score,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            seconds=round(seconds, 4),
            error=error,
            final=final,
            cost_usd=cost_usd,
        )


async def run(
    plan: EvaluationPlan,
    folder: AnswerFolder,
    ask: AskExpert,
    *,
    concurrency: int = 64,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    loads: Callable[[], Mapping[str, int]] = Counter,
) -> Report:
    """Ask every expert every row that the folder has no answer for, and write outcomes.parquet and run.json.

    Cancelled or failed at any point, the folder keeps the answers so far, and the same call continues.

    Args:
        ask: `Host.ask`, or a function like it.
        concurrency: questions in flight at most.
        on_progress: called after every answer, and once for each expert at the start.
        loads: returns the loads so far by name, for run.json.

    Raises:
        EngineError: or another error of the engine, where every later row would fail; see the module's docstring.
        DiskFull: an answer cannot be written.
    """
    session = _Run(plan, folder, ask, on_progress)
    session.resume()
    started_at, started, status = datetime.now(UTC), time.perf_counter(), COMPLETE
    try:
        with AnswerLog(folder.answers) as session.log:
            for _, questions in plan.residencies():
                await session.residency(questions, concurrency)
    except BaseException as error:
        status = status_after(error)
        raise
    finally:
        known = {record.key for record in folder.records if record.final}
        new = [record for key, record in session.records.items() if key not in known]
        seconds, tokens = time.perf_counter() - started, sum(record.completion_tokens for record in new)
        this = {
            "started_at": started_at.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "answers": len(new),
            "completion_tokens": tokens,
            "loads": dict(loads()),
            "tokens_per_s": round(tokens / seconds, 1),
        }
        report = build_report(plan, session.records)
        had_work = new or not folder.run.sessions  # a session without work is only recorded where it is the first
        report = replace(report, summary=folder.run.save(status, this if had_work else None, **report.summary))
    report.outcome_table().write(folder.outcomes)
    return report


async def _collect(chunks: AsyncGenerator[Chunk, None]) -> tuple[str, Usage, float | None]:
    texts, usage, cost_usd = [], Usage(0, 0), None
    async with aclosing(chunks):
        async for chunk in chunks:
            texts.append(chunk.text)
            usage, cost_usd = chunk.usage or usage, chunk.cost_usd
    # A lone surrogate (half an emoji) cannot be written as UTF-8.
    return "".join(texts).encode("utf-8", "replace").decode(), usage, cost_usd


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error in a group, at any depth."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error

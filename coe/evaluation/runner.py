"""Runs experts on tasks: each base is loaded once, every answer is kept as it comes, a killed run goes on.

    with open_answer_folder(path, plan) as folder:
        report = await run(plan, folder, host.ask)

Failures. A row that cannot be asked as it is (too long for the context, say) scores 0 for good. A row that an engine
fails on scores 0 and is asked again when the run is resumed. What will not get better by going on stops the run:
weights that cannot be loaded, no memory, or an expert whose first 8 rows (or all, where there are fewer) all ended in
engine failures.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from coe.errors import CoeError, ConfigError, EngineError, InvalidRequest, OutOfMemory, UnknownModel, WeightsError
from coe.evaluation.answer_folder import AnswerFolder
from coe.evaluation.answer_log import AnswerLog, AnswerRecord
from coe.evaluation.plan import EvaluationPlan, Question
from coe.evaluation.report import Report, build_report
from coe.runs.folder import COMPLETE, status_after
from coe.types import Chunk, GenerateRequest, Usage

Ask = Callable[[str, GenerateRequest], AsyncGenerator[Chunk, None]]

HOPELESS_AFTER = 8
"""An expert that fails this often before its first answer stops the run."""
_FATAL = (WeightsError, OutOfMemory, UnknownModel, ConfigError)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an expert is: `done` of `total` rows, `failures` among them."""

    expert: str
    done: int
    total: int
    mean_score: float
    failures: int


@dataclass(slots=True)
class _Tally:
    """One expert's counts so far."""

    total: int
    done: int = 0
    score: float = 0.0
    failures: int = 0
    refusals: int = 0

    def add(self, record: AnswerRecord) -> None:
        self.done += 1
        self.score += record.score
        self.failures += record.error is not None
        self.refusals += record.error is not None and record.final

    @property
    def is_hopeless(self) -> bool:
        """Every answer so far is an engine's failure, and there are enough of them to say so."""
        return self.done == self.failures and not self.refusals and self.done >= min(HOPELESS_AFTER, self.total)


@dataclass(slots=True)
class _Run:
    """A session of a run."""

    plan: EvaluationPlan
    folder: AnswerFolder
    ask: Ask
    on_progress: Callable[[Progress], None]
    log: AnswerLog = field(init=False)
    records: dict[tuple[str, str, str], AnswerRecord] = field(default_factory=dict)
    tallies: dict[str, _Tally] = field(default_factory=dict)
    answered: int = 0

    def resume(self) -> None:
        """Take over the answers of earlier sessions, but for failures that may be asked again."""
        self.tallies = {spec.name: _Tally(self.plan.n_rows) for spec in self.plan.experts}
        for record in self.folder.records:
            if record.final:
                self.records[record.key] = record
                self.tallies[record.expert].add(record)
        for name in self.tallies:
            self.tell(name)

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
        """Answer one question after the other, from an iterator that all workers share."""
        for question in left:
            record = await self.answer(question)
            self.log.append(record)
            self.records[record.key] = record
            self.answered += 1
            tally = self.tallies[record.expert]
            tally.add(record)
            self.tell(record.expert)
            if tally.is_hopeless:
                raise EngineError(
                    f"{record.expert!r} failed on all of its {tally.done} first rows; the last one: {record.error}"
                )

    async def answer(self, question: Question) -> AnswerRecord:
        """Ask, grade, and put both into a record; so a failure of this row."""
        started = time.perf_counter()
        try:
            text, usage, cost_usd = await _collect(self.ask(question.expert.name, question.request(self.plan.settings)))
            error, final = None, True
        except _FATAL:
            raise
        except CoeError as failure:
            text, usage, cost_usd = "", Usage(0, 0), None
            error, final = f"{type(failure).__name__}: {failure}", isinstance(failure, InvalidRequest)
        seconds = time.perf_counter() - started
        # In a thread: a slow grade (SQL) must not hold up the stream of other answers.
        score = 0.0 if error else await asyncio.to_thread(question.task.grader.grade, text, question.row.fields)
        return AnswerRecord(
            run=self.plan.fingerprint,
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

    def tell(self, name: str) -> None:
        tally = self.tallies[name]
        mean = tally.score / tally.done if tally.done else 0.0
        self.on_progress(Progress(name, tally.done, tally.total, mean, tally.failures))


async def run(
    plan: EvaluationPlan,
    folder: AnswerFolder,
    ask: Ask,
    *,
    concurrency: int = 32,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    loads: Callable[[], Mapping[str, int]] = Counter,
) -> Report:
    """Ask every expert every row that the folder has no answer for, and write outcomes.parquet and run.json.

    Cancelled or failed at any point, the answers so far are in the folder, and the same call goes on from there.

    Args:
        ask: `Host.ask`, or anything like it.
        concurrency: most questions in flight at once.
        on_progress: told after every answer, and once an expert at the start.
        loads: loads so far by name, for run.json.

    Raises:
        EngineError: and its kind, where going on makes no sense; see the module's docstring.
        DiskFull: an answer could not be kept.
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
    """The first cause in a group, however deep."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error

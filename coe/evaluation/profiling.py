"""Profiling: from experts' scores on questions to counts by skill, as the registry keeps them.

    rows = table_rows(OutcomeTable.read(path), "mmlupro", identities)      # recorded by others
    rows = run_rows(await run(plan, folder, host.ask), identities)         # measured now
    registry.record(rows)

Symbolic-MoE (arXiv 2503.05641) profiles an expert by +1 for each skill of a question with a right answer and -1 for a
wrong one. Summed score and count hold the same (2 score - count), also for scores between 0 and 1, and the sample size.

Counts are kept by source. A source that is read again replaces its rows, another one adds rows, so measuring is
incremental and nothing counts twice. Counts belong to an expert's content, not to its name. Shrinkage is applied when
they are read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coe.errors import TaskError
from coe.evaluation.answer_folder import OUTCOMES
from coe.evaluation.answer_log import AnswerRecord
from coe.evaluation.digest import json_digest
from coe.evaluation.plan import EvaluationPlan
from coe.evaluation.report import Report
from coe.evaluation.tasks import Task, TaskRow
from coe.runs.folder import RUN
from registry.profiles import Measure, ProfileRow
from routers.outcomes.table import OutcomeTable

Skills = tuple[str, ...]
Counts = dict[tuple[str, str], Measure]
"""(expert, skill) -> what was measured."""


def skills_of_row(task: Task, row: TaskRow) -> Skills:
    """The row's own `skills` (a list of words, or one) or `domain`, else the domain of the task (by default its name).

    Raises:
        TaskError: they are neither a text nor a list of texts.
    """
    stated = row.fields.get("skills") or row.fields.get("domain") or task.domain
    named = [stated] if isinstance(stated, str) else stated
    if not isinstance(named, list) or not all(isinstance(word, str) and word.strip() for word in named):
        raise TaskError(f"task {task.name!r}, row {row.id!r}: `skills` must be a list of words, not {stated!r}")
    return _distinct(named)


def skills_of_table(table: OutcomeTable, column: str = "domain") -> list[Skills]:
    """The skills of each query: the column's text, or each of its texts where it holds lists.

    Raises:
        InvalidOutcomes: there is no such column (with close matches), or it is empty in some rows.
    """
    texts = table.labels(column)
    if column == "domain" or table.frame is None:
        return [_distinct([text]) for text in texts]
    values = [value.tolist() if hasattr(value, "tolist") else value for value in table.frame[column]]
    return [
        _distinct(map(str, value)) if isinstance(value, list | tuple) and value else _distinct([text])
        for value, text in zip(values, texts, strict=True)
    ]


def table_rows(
    table: OutcomeTable, source: str, identities: Mapping[str, str], *, column: str = "domain"
) -> list[ProfileRow]:
    """Counts of a table's experts.

    Args:
        source: the table's name.
        identities: identity of each expert when it was measured.

    Raises:
        InvalidOutcomes: see `skills_of_table`.
    """
    skills = skills_of_table(table, column)
    rows = []
    for number, expert in enumerate(table.experts):
        scores = table.scores[:, number].tolist()
        tokens = None if table.tokens is None else table.tokens[:, number].tolist()
        measures = [Measure(score, 1, None if tokens is None else tokens[query]) for query, score in enumerate(scores)]
        digest = json_digest(sorted(zip(table.query_ids, table.prompts, skills, scores, strict=True)))
        rows += _rows(expert, identities[expert], source, digest, _counted(measures, skills))
    return rows


def run_rows(
    report: Report, identities: Mapping[str, str], skills: Mapping[tuple[str, str], Skills]
) -> list[ProfileRow]:
    """Counts of a complete run's experts, one source for each task.

    Questions on which an engine failed are left out: they do not measure the expert, and the next run asks them again.

    Args:
        skills: (task, row id) -> skills of the row.
    """
    rows = []
    for task in report.plan.tasks:
        for spec in report.plan.experts:
            records = [report.records[spec.name, task.name, row.id] for row in task.rows]
            final = [record for record in records if record.final]
            counts = _counted([_measure(record) for record in final], [skills[task.name, one.row] for one in final])
            digest = run_digest(report.plan, task, failed=[record.row for record in records if not record.final])
            rows += _rows(spec.name, identities[spec.name], source_of(task), digest, counts)
    return rows


def skills_of_tasks(tasks: Iterable[Task]) -> dict[tuple[str, str], Skills]:
    """(task, row id) -> its skills. Raises TaskError like `skills_of_row`."""
    return {(task.name, row.id): skills_of_row(task, row) for task in tasks for row in task.rows}


def source_of(task: Task) -> str:
    """The name of a task as a source."""
    return f"task/{task.name}"


def run_digest(plan: EvaluationPlan, task: Task, *, failed: Collection[str] = ()) -> str:
    """Digest of all questions and settings: an equal run need not be repeated."""
    return json_digest([task.digest, plan.manifest()["settings"], sorted(failed)])


def unmeasured(plan: EvaluationPlan, recorded: Iterable[ProfileRow]) -> tuple[list[str], list[Task]]:
    """The experts of a plan without counts of some task, and those tasks."""
    have = {(row.expert, row.identity, row.source, row.digest) for row in recorded}
    identities = plan.manifest()["experts"]
    lacking = [
        (spec.name, task)
        for spec in plan.experts
        for task in plan.tasks
        if (spec.name, identities[spec.name], source_of(task), run_digest(plan, task)) not in have
    ]
    names = {name for name, _ in lacking}
    wanted = {task.name for _, task in lacking}
    return (
        [spec.name for spec in plan.experts if spec.name in names],
        [task for task in plan.tasks if task.name in wanted],
    )


def measured_identities(outcomes: Path) -> dict[str, str]:
    """Identities of a table's experts when `coe eval` measured them, from the run.json beside it; empty without one."""
    run = outcomes.parent / RUN
    if outcomes.name != OUTCOMES or not run.is_file():
        return {}
    try:
        manifest: Any = json.loads(run.read_text(encoding="utf-8"))["manifest"]["experts"]
        return {str(name): str(identity) for name, identity in manifest.items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # another program's run.json
        return {}


def default_source(outcomes: Path) -> str:
    """The default name of a table: folder and name, since every run has an `outcomes.parquet`."""
    path = outcomes.absolute()
    return f"{path.parent.name}/{path.stem}"


def _counted(measures: Sequence[Measure], skills: Sequence[Skills]) -> dict[str, Measure]:
    counts: dict[str, Measure] = {}
    for measure, words in zip(measures, skills, strict=True):
        for word in words:
            counts[word] = counts[word] + measure if word in counts else measure
    return counts


def _measure(record: AnswerRecord) -> Measure:
    return Measure(record.score, 1, record.completion_tokens, record.seconds)


def _rows(expert: str, identity: str, source: str, digest: str, counts: Mapping[str, Measure]) -> list[ProfileRow]:
    return [ProfileRow(expert, identity, source, digest, skill, measure) for skill, measure in counts.items()]


def _distinct(words: Iterable[str]) -> Skills:
    return tuple(dict.fromkeys(" ".join(word.split()) for word in words))

"""What a run measured: the outcome table, the summary in run.json, means by expert and task."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from coe.answers.refusals import refuses
from coe.answers.thinking import without_thoughts
from coe.evaluation.answer_log import AnswerRecord
from coe.evaluation.plan import Column, EvaluationPlan, PolicyColumn
from routers.outcomes.table import OutcomeTable

Records = Mapping[tuple[str, str, str], AnswerRecord]


@dataclass(frozen=True, slots=True)
class Cell:
    """One expert on one task: mean score of `n` answers, of which `failures` are errors (score 0).

    refusals: answers that refuse or say "I don't know"; the grader scores them as it scores others.
    """

    n: int
    mean_score: float | None
    failures: int
    refusals: int = 0

    @property
    def refusal_share(self) -> float:
        """Share of the answers that refuse."""
        return self.refusals / self.n if self.n else 0.0

    @classmethod
    def of(cls, records: Iterable[AnswerRecord]) -> Cell:
        """The figures of some records; without records there is no mean."""
        listed = list(records)
        mean = sum(record.score for record in listed) / len(listed) if listed else None
        failures = sum(record.error is not None for record in listed)
        refusals = sum(record.error is None and refuses(without_thoughts(record.answer)) for record in listed)
        return cls(len(listed), mean, failures, refusals)


@dataclass(frozen=True)
class Report:
    """Figures of a run, complete or not.

    Attributes:
        cells: (expert, task) -> its figures.
        summary: the content of run.json; before it is written, figures by expert and by task.
    """

    plan: EvaluationPlan
    records: Records = field(repr=False)
    cells: Mapping[tuple[str, str], Cell]
    summary: Mapping[str, Any] = field(repr=False)

    def outcome_table(self) -> OutcomeTable:
        """Rows in the order of tasks and their files, experts in the plan's: the same for any order of answers.

        Costs are left out where an expert, or one that a policy asked, has no price. `dataset` is the task, `answer`
        the right answer.
        """
        import pandas as pd

        plan, experts = self.plan, [spec.name for spec in self.plan.experts]
        rows = [(task, row) for task in plan.tasks for row in task.rows]
        grid = [[self.records[name, task.name, row.id] for name in experts] for task, row in rows]
        return OutcomeTable(
            query_ids=tuple(f"{task.name}/{row.id}" for task, row in rows),
            prompts=tuple(row.prompt for _, row in rows),
            experts=tuple(experts),
            scores=np.array([[record.score for record in line] for line in grid]),
            costs_usd=self._costs(grid),
            tokens=np.array([[float(record.completion_tokens) for record in line] for line in grid]),
            domains=tuple(task.domain for task, _ in rows),
            answers={name: tuple(line[column].answer for line in grid) for column, name in enumerate(experts)},
            frame=pd.DataFrame(
                {"dataset": [task.name for task, _ in rows], "answer": [_text(row.fields["answer"]) for _, row in rows]}
            ),
        )

    def _costs(self, grid: list[list[AnswerRecord]]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]] | None:
        costs = [[_cost(column, r) for column, r in zip(self.plan.experts, line, strict=True)] for line in grid]
        return None if any(None in line for line in costs) else np.array(costs, dtype=np.float64)


def _cost(column: Column, record: AnswerRecord) -> float | None:
    """USD; None where unknown. A failed answer costs nothing, of a policy as of an expert."""
    if isinstance(column, PolicyColumn):
        return 0.0 if record.error is not None else record.cost_usd
    return column.price.cost_usd(record.prompt_tokens, record.completion_tokens) if column.price else None


def build_report(plan: EvaluationPlan, records: Records) -> Report:
    """The figures of a run's records."""
    cells = {
        (spec.name, task.name): Cell.of(
            r for (expert, name, _), r in records.items() if (expert, name) == (spec.name, task.name)
        )
        for spec in plan.experts
        for task in plan.tasks
    }
    summary = {
        "experts": {spec.name: _expert_summary(plan, spec.name, records) for spec in plan.experts},
        "tasks": {task.name: _task_summary(plan, task.name, cells) for task in plan.tasks},
    }
    return Report(plan, records, cells, summary)


def _expert_summary(plan: EvaluationPlan, name: str, records: Records) -> dict[str, Any]:
    spec = next(spec for spec in plan.experts if spec.name == name)
    mine = [record for record in records.values() if record.expert == name]
    answered = [record for record in mine if record.error is None]
    return {
        "ref": spec.ref,
        "digest": spec.digest,
        "base": spec.base,
        "price": spec.price.model_dump() if spec.price else None,
        **asdict(Cell.of(mine)),
        "prompt_tokens": sum(record.prompt_tokens for record in mine),
        "completion_tokens": sum(record.completion_tokens for record in mine),
        "mean_latency_s": round(sum(r.seconds for r in answered) / len(answered), 4) if answered else None,
        "errors": sorted({record.error for record in mine if record.error})[:3],
    }


def _task_summary(plan: EvaluationPlan, name: str, cells: Mapping[tuple[str, str], Cell]) -> dict[str, Any]:
    task = next(task for task in plan.tasks if task.name == name)
    means = {expert: cell.mean_score for (expert, of), cell in cells.items() if of == name}
    return {"digest": task.digest, "domain": task.domain, "n_rows": len(task.rows), "mean_score": means}


def _text(gold: object) -> str:
    return gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False)

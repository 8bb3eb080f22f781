"""A trial of aggregators on validation questions, as in Symbolic-MoE (arXiv 2503.05641).

    trial = trial_of_task(task, recorded, seed=0)         # each question with one right and two wrong answers, shuffled
    report = await run(plan_run(experts, [trial.task]), folder, host.ask)       # every expert aggregates them
    best = best_aggregators(aggregator_scores(report, [trial]))     # the most accurate: overall, and of each label

The answers are recorded ones of the experts. A right answer has score 1, a wrong one score 0, and no text is shown
twice. The prompt is that of the composition `aggregate` (`coe.compose.synthesis`), and the task's grader scores the
result. Unlike in the paper, the aggregator of a label is chosen by accuracy that is shrunk towards the expert's own
mean, so that a label with few questions gets the aggregator that is best over all; of equals, the cheaper one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coe.answers.thinking import without_thoughts
from coe.compose.synthesis import TEMPLATE, synthesis
from coe.errors import TaskError
from coe.evaluation.answer_log import AnswerRecord
from coe.evaluation.digest import json_digest
from coe.evaluation.graders import GoldError, grader_class, score_of
from coe.evaluation.profiling import Skills, skills_of_row, skills_of_table
from coe.evaluation.report import Report
from coe.evaluation.tasks import Task, TaskRow
from coe.types import DEFAULT_MAX_TOKENS, GenerateRequest
from registry.errors import PluginError
from registry.profiles import AGGREGATION, Measure, ProfileRow
from registry.spec import Price
from registry.strengths import own_mean, shrunken, wilson
from routers.base import Message
from routers.errors import InvalidOutcomes
from routers.outcomes.table import OutcomeTable

N_WRONG = 2
"""Wrong answers that are shown beside the right one."""
CHANCE = 1 / (1 + N_WRONG)
"""Accuracy of a random choice among them."""
Recorded = Sequence[tuple[str, float]]
"""Experts' answers to one question: text and score."""


@dataclass(frozen=True)
class Trial:
    """A validation set for aggregators.

    Attributes:
        task: rows that ask to aggregate; ids, answers and grader are those of the questions.
        skills: row id -> labels of the question.
        no_right, few_wrong: how many questions were left out without a right answer, or without two wrong ones.
    """

    task: Task
    skills: Mapping[str, Skills] = field(repr=False)
    no_right: int
    few_wrong: int

    @property
    def source(self) -> str:
        """Its name as a source in the registry."""
        return f"{AGGREGATION}{self.task.name}"


@dataclass(frozen=True, slots=True)
class AggregatorScore:
    """How well one expert aggregates the questions of a label; `label` is None for all questions.

    shrunken: the accuracy, shrunk towards the expert's mean over all labels. low, high: Wilson's 95% interval of the
    accuracy. failures: failed calls (score 0).
    """

    expert: str
    label: str | None
    n: int
    accuracy: float
    shrunken: float
    low: float
    high: float
    mean_cost_usd: float | None
    mean_tokens: float
    mean_seconds: float
    failures: int


@dataclass(frozen=True, slots=True)
class BestAggregators:
    """The best aggregator, over all questions and of each label."""

    overall: AggregatorScore
    by_label: Mapping[str, AggregatorScore]

    @property
    def beats_chance(self) -> bool:
        """Whether the best is better than a random choice, by its 95% interval."""
        return self.overall.low > CHANCE

    def composition(self) -> dict[str, Any]:
        """The setting `composition` of a policy that uses it."""
        default = self.overall.expert
        others = {label: one.expert for label, one in self.by_label.items() if one.expert != default}
        return {"kind": "aggregate", "aggregator": {"default": default, **others} if others else default}


def trial_of_task(
    task: Task,
    recorded: Mapping[str, Recorded],
    *,
    skills: Mapping[str, Skills] | None = None,
    seed: int = 0,
    limit: int | None = None,
    template: str = TEMPLATE,
) -> Trial:
    """A trial on the questions of a task that have one right and enough wrong answers.

    Args:
        recorded: row id -> experts' answers.
        skills: row id -> labels; by default those of `coe.evaluation.profiling.skills_of_row`.
        seed: decides which answers are shown, and in which order, for each question by itself.
        limit: number of questions, evenly over the labels.

    Raises:
        TaskError: no question has the answers; the message counts what is missing.
    """
    usable, no_right, few_wrong = list[tuple[TaskRow, list[str]]](), 0, 0
    for row in task.rows:
        right, wrong = _sides(recorded.get(row.id, ()))
        no_right += not right
        few_wrong += bool(right) and len(wrong) < N_WRONG
        if right and len(wrong) >= N_WRONG:
            usable.append((row, _shuffled(right, wrong, random.Random(f"{seed}/{task.name}/{row.id}"))))
    labels = {row.id: skills[row.id] if skills is not None else skills_of_row(task, row) for row, _ in usable}
    taken = _evenly({row: words[0] for row, words in labels.items()}, limit)
    rows = [
        replace(row, messages=synthesis(GenerateRequest(messages=row.messages), shown, template).messages)
        for row, shown in usable
        if row.id in taken
    ]
    if not rows:
        raise TaskError(
            f"no question of {task.name!r} has one right and {N_WRONG} different wrong answers: of {len(task.rows)}, "
            f"{no_right} have no right one and {few_wrong} too few wrong ones; record the answers of more experts"
        )
    labels = {row.id: labels[row.id] for row in rows}
    digest = json_digest([task.digest, [[row.id, [m.content for m in row.messages], labels[row.id]] for row in rows]])
    return Trial(replace(task, rows=tuple(rows), digest=digest), labels, no_right, few_wrong)


def recorded_answers(table: OutcomeTable, task: Task | None = None) -> dict[str, Recorded]:
    """Row id -> answers of the table's experts. With a task, only its rows, by the ids that `coe eval` gives them.

    Raises:
        InvalidOutcomes: no answers are recorded, or none of the task's questions is in the table.
    """
    if not table.answers:
        raise InvalidOutcomes("the table has no recorded answers (`answer::<expert>`); `coe eval` records them")
    prefix = "" if task is None else f"{task.name}/"
    columns = [
        (table.answers[name], table.scores[:, i]) for i, name in enumerate(table.experts) if name in table.answers
    ]
    found: dict[str, Recorded] = {
        query_id.removeprefix(prefix): [(texts[row], float(scores[row])) for texts, scores in columns]
        for row, query_id in enumerate(table.query_ids)
        if query_id.startswith(prefix)
    }
    if task is not None and not found.keys() & {row.id for row in task.rows}:
        raise InvalidOutcomes(f"the table has no question of task {task.name!r}: their ids would be `{prefix}<row id>`")
    return found


def run_answers(report: Report, task: Task) -> dict[str, Recorded]:
    """Row id -> answers of a run's experts to a task, without failures."""
    return {
        row.id: [
            (record.answer, record.score)
            for spec in report.plan.experts
            if (record := report.records[spec.name, task.name, row.id]).error is None
        ]
        for row in task.rows
    }


def task_of_table(
    table: OutcomeTable, name: str, grader: str, *, column: str = "domain"
) -> tuple[Task, dict[str, Skills]]:
    """The questions of any table as a task, and their labels by row id.

    Args:
        grader: a name in `coe.evaluation.graders.GRADERS`; right is the column `answer`, other columns are its fields.
        column: of the labels.

    Raises:
        InvalidOutcomes: there is no column `answer`, or no such column of labels.
        TaskError: no such grader, or it cannot use a right answer.
    """
    try:
        model = grader_class(grader)
    except PluginError as error:
        raise TaskError(str(error)) from error
    if table.frame is None or "answer" not in table.frame:
        raise InvalidOutcomes("the table has no column `answer` with the right answers")
    grades = model()
    fields = [{str(key): value for key, value in line.items()} for line in table.frame.to_dict(orient="records")]
    rows = tuple(
        TaskRow(query_id, (Message("user", prompt),), line)
        for query_id, prompt, line in zip(table.query_ids, table.prompts, fields, strict=True)
    )
    for row in rows:
        try:
            score_of(grades, "", row.fields)
        except GoldError as error:
            raise TaskError(f"query {row.id!r} of the table cannot be graded by {grader!r}: {error}") from error
    digest = json_digest([grader, [[row.id, row.prompt, str(row.fields["answer"])] for row in rows]])
    task = Task(name, name, rows, grades, max_tokens=DEFAULT_MAX_TOKENS, digest=digest)
    return task, dict(zip(table.query_ids, skills_of_table(table, column), strict=True))


def aggregator_scores(report: Report, trials: Sequence[Trial]) -> list[AggregatorScore]:
    """The scores of each expert, first over all questions, then by label; the best first."""
    labels = {(trial.task.name, row): words for trial in trials for row, words in trial.skills.items()}
    found = []
    for spec in report.plan.experts:
        records = [record for record in report.records.values() if record.expert == spec.name]
        by_label: dict[str, list[AnswerRecord]] = {}
        for record in records:
            for label in labels[record.task, record.row]:
                by_label.setdefault(label, []).append(record)
        mean = own_mean([_measure(records)])
        found.append(_score(spec.name, None, records, spec.price, mean))
        found += [_score(spec.name, label, of, spec.price, mean) for label, of in sorted(by_label.items())]
    return sorted(found, key=lambda one: (one.label is not None, one.label or "", *_order(one)))


def best_aggregators(results: Iterable[AggregatorScore]) -> BestAggregators:
    """The most accurate aggregator over all questions and of each label.

    Of equals, the one that is best over all wins, then the cheaper one in USD, then in tokens.
    """
    listed = list(results)
    best = min((one for one in listed if one.label is None), key=_order)
    by_label: dict[str, AggregatorScore] = {}
    for one in sorted(listed, key=lambda one: (-one.shrunken, one.expert != best.expert, *_order(one))):
        if one.label is not None:
            by_label.setdefault(one.label, one)
    return BestAggregators(best, dict(sorted(by_label.items())))


def trial_rows(report: Report, trials: Sequence[Trial], identities: Mapping[str, str]) -> list[ProfileRow]:
    """Counts of the trials for the registry. A failed aggregation counts: in use, no other expert would answer."""
    rows = []
    for trial in trials:
        for spec in report.plan.experts:
            counts: dict[str, list[AnswerRecord]] = {}
            for row, words in trial.skills.items():
                for label in words:
                    counts.setdefault(label, []).append(report.records[spec.name, trial.task.name, row])
            rows += [
                ProfileRow(spec.name, identities[spec.name], trial.source, trial.task.digest, label, _measure(records))
                for label, records in counts.items()
            ]
    return rows


def _sides(answers: Recorded) -> tuple[list[str], list[str]]:
    """The distinct right texts and the distinct wrong ones, without thoughts, sorted."""
    texts = [(without_thoughts(text), score) for text, score in answers]
    right = sorted({text for text, score in texts if text and score >= 1.0})
    wrong = sorted({text for text, score in texts if text and score <= 0.0} - set(right))
    return right, wrong


def _evenly(labels: Mapping[str, str], limit: int | None) -> set[str]:
    """`limit` row ids, equally many from each label while it has more: the first ones of each."""
    seen: Counter[str] = Counter()
    order = []
    for place, (row, label) in enumerate(labels.items()):
        seen[label] += 1
        order.append((seen[label], place, row))
    return {row for _, _, row in sorted(order)[:limit]}


def _shuffled(right: Sequence[str], wrong: Sequence[str], rng: random.Random) -> list[str]:
    shown = [rng.choice(right), *rng.sample(wrong, N_WRONG)]
    rng.shuffle(shown)
    return shown


def _score(
    expert: str, label: str | None, records: Sequence[AnswerRecord], price: Price | None, mean: float
) -> AggregatorScore:
    n, measure = len(records), _measure(records)
    low, high = wilson(measure)
    costs = None if price is None else [price.cost_usd(one.prompt_tokens, one.completion_tokens) for one in records]
    return AggregatorScore(
        expert=expert,
        label=label,
        n=n,
        accuracy=measure.accuracy,
        shrunken=shrunken(measure, mean),
        low=low,
        high=high,
        mean_cost_usd=None if costs is None else sum(costs) / n,
        mean_tokens=sum(one.completion_tokens for one in records) / n,
        mean_seconds=sum(one.seconds for one in records) / n,
        failures=sum(one.error is not None for one in records),
    )


def _measure(records: Sequence[AnswerRecord]) -> Measure:
    return Measure(
        sum(record.score for record in records),
        len(records),
        float(sum(record.completion_tokens for record in records)),
        sum(record.seconds for record in records),
    )


def _order(one: AggregatorScore) -> tuple[float, float, float, str]:
    cost = float("inf") if one.mean_cost_usd is None else one.mean_cost_usd
    return (-one.shrunken, cost, one.mean_tokens, one.expert)

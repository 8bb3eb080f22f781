"""Counts by skill from tables and runs, and what need not be measured again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from coe.errors import TaskError
from coe.evaluation.answer_log import AnswerRecord
from coe.evaluation.graders.text import Exact
from coe.evaluation.plan import EvaluationPlan, Settings, plan_run
from coe.evaluation.profiling import (
    default_source,
    measured_identities,
    run_digest,
    run_rows,
    skills_of_tasks,
    table_rows,
    unmeasured,
)
from coe.evaluation.report import Report
from coe.evaluation.tasks import Task, TaskRow
from registry.profiles import Measure, ProfileRow, Profiles
from registry.spec import ExpertSpec, Kind
from routers.base import Message
from routers.errors import InvalidOutcomes
from routers.outcomes.table import OutcomeTable

NOW = {"a": "sha256:a", "b": "sha256:b"}


def table(**fields: Any) -> OutcomeTable:
    given: dict[str, Any] = {
        "query_ids": ("1", "2", "3"),
        "prompts": ("one", "two", "three"),
        "experts": ("a", "b"),
        "scores": np.array([[1, 0], [0.5, 0], [0, 1]]),
        "tokens": np.array([[10, 1], [20, 2], [30, 3]]),
        "domains": ("law", "law", "math"),
    }
    return OutcomeTable(**given | fields)


def test_a_table_is_counted_by_its_labels() -> None:
    rows = table_rows(table(), "t", NOW)
    assert Profiles.of_rows(rows).cells == {
        ("a", "law"): Measure(1.5, 2, 30.0),
        ("a", "math"): Measure(0, 1, 30.0),
        ("b", "law"): Measure(0, 2, 3.0),
        ("b", "math"): Measure(1, 1, 3.0),
    }
    assert {(row.source, row.identity) for row in rows if row.expert == "a"} == {("t", "sha256:a")}


def test_another_column_may_hold_several_skills() -> None:
    frame = pd.DataFrame({"skills": [["sql", "dates", "sql"], ["sql"], ["dates "]], "level": [1, 2, 2]})
    found = Profiles.of_rows(table_rows(table(frame=frame, tokens=None), "t", NOW, column="skills"))
    assert found.of("a") == {"sql": Measure(1.5, 2), "dates": Measure(1, 2)}
    assert Profiles.of_rows(table_rows(table(frame=frame), "t", NOW, column="level")).skills == ("1", "2")
    with pytest.raises(InvalidOutcomes, match="no column 'skill' in the table; did you mean 'skills'"):
        table_rows(table(frame=frame), "t", NOW, column="skill")


def test_the_digest_is_of_what_was_read_of_the_expert() -> None:
    def digests(of: OutcomeTable) -> dict[str, str]:
        return {row.expert: row.digest for row in table_rows(of, "any", NOW)}

    first = digests(table())
    assert digests(table().select([2, 0, 1])) == first, "the order of rows is nothing"
    assert digests(table().with_experts(["b"])) == {"b": first["b"]}
    changed = digests(table(scores=np.array([[1, 0], [0.5, 0], [0, 0.5]])))
    assert changed["a"] == first["a"] and changed["b"] != first["b"]
    assert digests(table(domains=("law", "law", "law")))["a"] != first["a"]


def test_what_a_table_is_called() -> None:
    assert default_source(Path("/runs/monday/outcomes.parquet")) == "monday/outcomes"


def test_the_run_beside_a_table_has_the_identities_of_the_experts(tmp_path: Path) -> None:
    outcomes = tmp_path / "outcomes.parquet"
    assert measured_identities(outcomes) == {}
    (tmp_path / "run.json").write_text(json.dumps({"manifest": {"experts": {"a": "sha256:then"}}}))
    assert measured_identities(outcomes) == {"a": "sha256:then"}
    assert measured_identities(tmp_path / "other.parquet") == {}, "the run's table is named so"
    for other in ("[]", "{", '{"manifest": {"experts": 3}}'):
        (tmp_path / "run.json").write_text(other)
        assert measured_identities(outcomes) == {}


def spec(name: str) -> ExpertSpec:
    return ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo", digest=NOW[name])


def task(name: str = "caps", **fields: Any) -> Task:
    rows = tuple(
        TaskRow(id_, (Message("user", id_),), {"id": id_, "prompt": id_, "answer": id_, **fields.get(id_, {})})
        for id_ in ("x", "y", "z")
    )
    return Task(name, "geography", rows, Exact(), digest=f"sha256:{name}")


def test_the_skills_of_a_row_are_its_own_or_the_tasks() -> None:
    found = skills_of_tasks([task(x={"skills": ["sql ", "old  dates", "sql"], "domain": "no"}, y={"domain": "law"})])
    assert found == {("caps", "x"): ("sql", "old dates"), ("caps", "y"): ("law",), ("caps", "z"): ("geography",)}
    for wrong in ([1], [""], {"a": 1}):
        with pytest.raises(TaskError, match="task 'caps', row 'x': `skills` must be a list of words"):
            skills_of_tasks([task(x={"skills": wrong})])


PLAN = plan_run({name: spec(name) for name in NOW}, [task("caps"), task("sums")])


def records(plan: EvaluationPlan, **failed: bool) -> Report:
    """`a` is right on everything, `b` on nothing; rows in `failed` (row id -> final) have no answer."""
    found = {}
    for question in (question for _, questions in plan.residencies() for question in questions):
        error = "EngineError: no" if question.row.id in failed else None
        score = float(question.expert.name == "a" and error is None)
        one = AnswerRecord("run", *question.key, "text", score, 7, 3, 0.5, error, failed.get(question.row.id, True))
        found[question.key] = one
    return Report(plan, found, {}, {})


def test_a_run_is_counted_by_task_and_skill() -> None:
    rows = run_rows(records(PLAN), NOW, skills_of_tasks(PLAN.tasks))
    assert [(row.expert, row.source, row.skill, row.measure) for row in rows] == [
        ("a", "task/caps", "geography", Measure(3, 3, 9.0, 1.5)),
        ("b", "task/caps", "geography", Measure(0, 3, 9.0, 1.5)),
        ("a", "task/sums", "geography", Measure(3, 3, 9.0, 1.5)),
        ("b", "task/sums", "geography", Measure(0, 3, 9.0, 1.5)),
    ]
    assert unmeasured(PLAN, rows) == ([], [])


def test_what_an_engine_failed_on_does_not_count_and_is_asked_again() -> None:
    rows = run_rows(records(PLAN, x=False), NOW, skills_of_tasks(PLAN.tasks))
    assert [row.measure.n for row in rows] == [2, 2, 2, 2]
    assert unmeasured(PLAN, rows) == (["a", "b"], list(PLAN.tasks))


def test_what_an_expert_cannot_take_counts_as_wrong() -> None:
    rows = run_rows(records(PLAN, x=True), NOW, skills_of_tasks(PLAN.tasks))
    assert rows[0].measure == Measure(2, 3, 9.0, 1.5) and unmeasured(PLAN, rows) == ([], [])


def test_only_what_is_missing_is_asked() -> None:
    rows = run_rows(records(PLAN), NOW, skills_of_tasks(PLAN.tasks))
    without_a = [row for row in rows if row.expert != "a"]
    assert unmeasured(PLAN, without_a) == (["a"], list(PLAN.tasks))
    without_sums = [row for row in rows if row.source != "task/sums"]
    assert unmeasured(PLAN, without_sums) == (["a", "b"], [PLAN.tasks[1]])
    other_weights = [replace(row, identity="sha256:old") if row.expert == "b" else row for row in rows]
    assert unmeasured(PLAN, other_weights) == (["b"], list(PLAN.tasks))
    fewer = plan_run({name: spec(name) for name in NOW}, PLAN.tasks, settings=Settings(limit=2))
    assert unmeasured(fewer, rows) == (["a", "b"], list(fewer.tasks))


def test_a_changed_task_is_another_source_of_the_same_name() -> None:
    changed = plan_run({name: spec(name) for name in NOW}, [replace(task(), digest="sha256:new")])
    assert run_digest(changed, changed.tasks[0]) != run_digest(PLAN, PLAN.tasks[0])
    stale = [ProfileRow("a", NOW["a"], "task/caps", run_digest(PLAN, PLAN.tasks[0]), "geography", Measure(1, 1))]
    assert unmeasured(changed, stale)[0] == ["a", "b"]

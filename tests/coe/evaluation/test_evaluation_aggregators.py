"""The trial of aggregators: shown answers, the winner, and the counts for the registry."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from coe.compose import build_composition
from coe.errors import ContextLengthExceeded, TaskError
from coe.evaluation.aggregators import (
    Trial,
    aggregator_scores,
    best_aggregators,
    recorded_answers,
    task_of_table,
    trial_of_task,
    trial_rows,
)
from coe.evaluation.answer_folder import open_answer_folder
from coe.evaluation.graders.text import Contains, Exact
from coe.evaluation.plan import plan_run
from coe.evaluation.report import Report
from coe.evaluation.runner import run
from coe.evaluation.tasks import Task, TaskRow
from coe.types import Chunk, GenerateRequest, Usage
from registry.profiles import Measure, Profiles
from registry.spec import ExpertSpec, Kind, Price
from routers.base import Message
from routers.errors import InvalidOutcomes
from routers.outcomes.table import OutcomeTable

CITIES = {"fr": "Paris", "it": "Rome", "es": "Madrid", "pt": "Lisbon", "at": "Vienna"}
ANSWERS = [("Berlin", 0.0), ("Oslo", 0.0), ("Bern", 0.0), ("Kiev", 0.0)]


def task(*ids: str, **fields: Any) -> Task:
    rows = tuple(
        TaskRow(id_, (Message("system", "Brief."), Message("user", f"Capital of {id_}?")),
            {"id": id_, "answer": CITIES[id_], **fields})
        for id_ in ids or CITIES
    )  # fmt: skip
    return Task("capitals", "geography", rows, Exact(), max_tokens=9, digest="sha256:capitals")


def recorded(**more: Sequence[tuple[str, float]]) -> dict[str, Sequence[tuple[str, float]]]:
    return {id_: [(city, 1.0), *ANSWERS] for id_, city in CITIES.items()} | more


def shown(trial: Trial) -> dict[str, list[str]]:
    """The answers in each prompt, in order."""
    texts = {row.id: row.messages[-1].content for row in trial.task.rows}
    return {
        id_: [line[3:] for line in text.splitlines() if line[:3] in ("1. ", "2. ", "3. ", "4. ")]
        for id_, text in texts.items()
    }


def test_one_right_and_two_different_wrong_answers_are_shown() -> None:
    trial = trial_of_task(task(), recorded())
    assert trial.source == "aggregation/capitals" and trial.skills == dict.fromkeys(CITIES, ("geography",))
    for id_, texts in shown(trial).items():
        assert len(texts) == 3 == len(set(texts)) and texts.count(CITIES[id_]) == 1
        assert set(texts) - {CITIES[id_]} <= {text for text, _ in ANSWERS}
    row = trial.task.rows[0]
    assert row.messages[0] == Message("system", "Brief.") and row.messages[1].content.startswith("Capital of fr?\n")
    assert row.fields["answer"] == "Paris" and (trial.task.grader, trial.task.max_tokens) == (Exact(), 9)


def test_the_seed_decides_what_is_shown_and_a_question_does_not_depend_on_others() -> None:
    first = shown(trial_of_task(task(), recorded(), seed=1))
    assert first == shown(trial_of_task(task(), recorded(), seed=1))
    assert first != shown(trial_of_task(task(), recorded(), seed=2))
    assert shown(trial_of_task(task("es"), recorded(), seed=1)) == {"es": first["es"]}
    reversed_answers = {id_: list(reversed(answers)) for id_, answers in recorded().items()}
    assert shown(trial_of_task(task(), reversed_answers, seed=1)) == first, "whoever said it first"
    places = [texts.index(CITIES[id_]) for seed in range(20) for id_, texts in
              shown(trial_of_task(task(), recorded(), seed=seed)).items()]  # fmt: skip
    assert min(places.count(place) for place in range(3)) > 20


def test_thoughts_are_not_shown_and_texts_not_twice() -> None:
    said = [("<think>is it Paris?</think> Paris", 1.0), ("Rome", 0.0), ("<think>..</think>Rome ", 0.0), ("Oslo", 0.0)]
    trial = trial_of_task(task("fr"), {"fr": said})
    assert sorted(shown(trial)["fr"]) == ["Oslo", "Paris", "Rome"]


def test_questions_without_the_answers_it_takes_are_left_out() -> None:
    answers = recorded(
        fr=[("Rome", 0.0), ("Oslo", 0.0)],
        it=[("Rome", 1.0), ("Oslo", 0.0), ("Oslo", 0.0), ("", 0.0), ("<think>hm", 0.0)],
        es=[("Madrid", 0.9), ("Oslo", 0.1)],
    )
    del answers["pt"]
    trial = trial_of_task(task(), answers)
    assert (list(shown(trial)), trial.no_right, trial.few_wrong) == (["at"], 3, 1)
    with pytest.raises(
        TaskError, match="no question of 'capitals' has one right and 2 different wrong .* of 2, 1 have"
    ):
        trial_of_task(task("fr", "it"), answers)


def test_a_limit_takes_every_label_alike() -> None:
    labels = {"fr": ("a",), "it": ("a",), "es": ("a",), "pt": ("b",), "at": ("b", "a")}
    trial = trial_of_task(task(), recorded(), skills=labels, limit=3)
    assert dict(trial.skills) == {"fr": ("a",), "it": ("a",), "pt": ("b",)}


def test_another_choice_of_answers_is_another_trial() -> None:
    digests = {trial_of_task(task(), recorded(), seed=seed).task.digest for seed in (1, 1, 2)}
    assert len(digests) == 2


def spec(name: str, usd: float = 1.0) -> ExpertSpec:
    price = Price(input_usd_per_mtok=usd, output_usd_per_mtok=usd)
    return ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo", digest=f"sha256:{name}", price=price)


def asking(say: Mapping[str, Any]) -> Any:
    """Experts by name, each a function from the shown answers to its own."""

    async def ask(name: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        lines = [line[3:] for line in request.messages[-1].content.splitlines() if line[1:3] == ". "]
        yield Chunk(say[name](lines), "stop", Usage(100, 2))

    return ask


def right(lines: Sequence[str]) -> str:
    return next(line for line in lines if line in CITIES.values())


def full(lines: Sequence[str]) -> str:
    raise ContextLengthExceeded("full", prompt_tokens=9, max_tokens=9, context_length=9)


async def try_out(
    folder: Path, trial: Trial, say: Mapping[str, Any], usd: Mapping[str, float] = {}
) -> tuple[Report, Trial]:
    plan = plan_run({name: spec(name, usd.get(name, 1.0)) for name in say}, [trial.task])
    with open_answer_folder(folder, plan, resume=True) as opened:
        return await run(plan, opened, asking(say)), trial


async def test_the_expert_that_picks_the_right_answer_wins(tmp_path: Path) -> None:
    say = {"first": lambda lines: lines[0], "picks": right, "full": full, "babbles": lambda lines: "London"}
    report, trial = await try_out(tmp_path, trial_of_task(task(), recorded()), say)
    results = aggregator_scores(report, [trial])
    over_all = {one.expert: one for one in results if one.label is None}
    assert (over_all["picks"].accuracy, over_all["picks"].n, over_all["picks"].failures) == (1.0, 5, 0)
    assert (over_all["full"].accuracy, over_all["full"].failures) == (0.0, 5)
    by_luck = sum(texts[0] == CITIES[id_] for id_, texts in shown(trial).items()) / 5
    assert over_all["first"].accuracy == by_luck < 1
    assert over_all["picks"].mean_cost_usd == pytest.approx(102e-6) and over_all["picks"].mean_tokens == 2
    assert 0.5 < over_all["picks"].low < 0.6 and over_all["picks"].high == 1.0
    assert next(one.expert for one in results if one.label == "geography") == "picks"
    best = best_aggregators(results)
    assert best.composition() == {"kind": "aggregate", "aggregator": "picks"} and best.beats_chance
    rows = trial_rows(report, [trial], plan_identities(report))
    assert {row.source for row in rows} == {"aggregation/capitals"}
    found = Profiles.of_rows(rows)
    assert found.of("picks")["geography"].score == 5 and found.of("full")["geography"].n == 5
    assert isinstance(found.of("babbles")["geography"], Measure)


def plan_identities(report: Report) -> Mapping[str, str]:
    identities: Mapping[str, str] = report.plan.manifest()["experts"]
    return identities


async def test_each_label_has_its_own_winner_and_equals_go_to_the_cheaper(tmp_path: Path) -> None:
    labels = {"fr": ("north",), "it": ("south",), "es": ("south",), "pt": ("south",), "at": ("north",)}
    north = {"Paris", "Vienna"}

    def only(known: set[str]) -> Any:
        return lambda lines: right(lines) if right(lines) in known else "London"

    say = {
        "dear": only(set(CITIES.values()) - north),
        "cheap": only(set(CITIES.values()) - north),
        "north": only(north),
    }
    trial = trial_of_task(task(), recorded(), skills=labels)
    report, _ = await try_out(tmp_path, trial, say, usd={"cheap": 0.5})
    best = best_aggregators(aggregator_scores(report, [trial]))
    assert best.overall.expert == "cheap" and not best.beats_chance
    assert {label: one.expert for label, one in best.by_label.items()} == {"north": "north", "south": "cheap"}
    aggregator = {"default": "cheap", "north": "north"}
    assert best.composition() == {"kind": "aggregate", "aggregator": aggregator}
    build_composition("aggregate", {"aggregator": aggregator})


async def test_equals_on_a_label_leave_it_to_the_best_over_all(tmp_path: Path) -> None:
    """No aggregator is right on `none`; there the cheaper one is no better."""
    labels = dict.fromkeys(CITIES, ("some",)) | {"fr": ("none",)}
    say = {"good": lambda lines: right(lines) if right(lines) != "Paris" else "London", "cheap": lambda lines: "London"}
    trial = trial_of_task(task(), recorded(), skills=labels)
    report, _ = await try_out(tmp_path, trial, say, usd={"cheap": 0.1})
    assert best_aggregators(aggregator_scores(report, [trial])).composition() == {
        "kind": "aggregate",
        "aggregator": "good",
    }


async def test_a_trial_is_resumed(tmp_path: Path) -> None:
    trial = trial_of_task(task(), recorded())
    await try_out(tmp_path, trial, {"picks": right})
    report, _ = await try_out(tmp_path, trial, {"picks": lambda lines: "not asked again"})
    assert aggregator_scores(report, [trial])[0].accuracy == 1.0


def outcomes(**fields: Any) -> OutcomeTable:
    said = {"a": ("B", "A"), "b": ("A", "C"), "c": ("C", "B")}
    given: dict[str, Any] = {
        "query_ids": ("capitals/fr", "other/fr"),
        "prompts": ("France?", "Francs?"),
        "experts": ("a", "b", "c"),
        "scores": np.array([[1, 0, 0], [0, 1, 0]]),
        "answers": said,
        "domains": ("law", "law"),
        "frame": pd.DataFrame({"answer": ["B", "C"]}),
    }
    return OutcomeTable(**given | fields)


def test_a_table_is_a_task_of_its_own() -> None:
    made, labels = task_of_table(outcomes(), "runs/monday", "choice")
    assert labels == {"capitals/fr": ("law",), "other/fr": ("law",)} and made.rows[0].prompt == "France?"
    trial = trial_of_task(made, recorded_answers(outcomes()), skills=labels)
    assert trial.source == "aggregation/runs/monday" and set(shown(trial)["capitals/fr"]) == {"A", "B", "C"}
    assert made.grader.grade("I say (C).", made.rows[1].fields) == 1.0


def test_of_a_task_the_table_has_rows_by_the_runs_ids() -> None:
    assert recorded_answers(outcomes(), task()) == {"fr": [("B", 1.0), ("A", 0.0), ("C", 0.0)]}
    with pytest.raises(InvalidOutcomes, match="no question of task 'capitals': their ids would be `capitals/<row id>`"):
        recorded_answers(outcomes(query_ids=("x/fr", "y/fr")), task())


def test_tables_that_cannot_be_tried() -> None:
    with pytest.raises(InvalidOutcomes, match=r"no recorded answers \(`answer::<expert>`\); `coe eval` records them"):
        recorded_answers(outcomes(answers=None))
    with pytest.raises(InvalidOutcomes, match="no column `answer` with the right answers"):
        task_of_table(outcomes(frame=None), "t", "choice")
    with pytest.raises(TaskError, match="no grader 'letters'; there are: exact"):
        task_of_table(outcomes(), "t", "letters")
    with pytest.raises(TaskError, match="query 'capitals/fr' of the table cannot be graded by 'number'"):
        task_of_table(outcomes(), "t", "number")


def test_a_task_keeps_its_grader() -> None:
    trial = trial_of_task(Task("t", "t", task().rows, Contains()), recorded())
    assert trial.task.grader.grade("It is Paris.", trial.task.rows[0].fields) == 1.0

"""The demo's ends: answers as lines, what differs, what is registered, and next commands that work as printed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from examples.zoo import demo
from examples.zoo.after import next_commands, register
from examples.zoo.demo import CONFIG, ZOO, answer_two_skills, differences
from examples.zoo.families import FAMILIES, TWO_SKILLS, Split
from examples.zoo.outcomes import SHIPPED
from examples.zoo.report import (
    Composed,
    Question,
    Result,
    Results,
    answer_line,
    as_lines,
    fresh_questions,
    fresh_two_skill_questions,
)
from examples.zoo.service import COE, Batched, Served
from registry.store import Registry
from routers.outcomes.table import OutcomeTable

EXPERTS = """
experts:
  - {name: sql, kind: model, source: "fake://sql", description: %s}
  - {name: shell, kind: model, source: "fake://shell"}
"""


@pytest.fixture
def experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("COE_REGISTRY", raising=False)
    file = tmp_path / "experts.yaml"
    file.write_text(EXPERTS % "queries", encoding="utf-8")
    return file


def commands(text: str) -> list[str]:
    """The lines of `next_commands` that a reader types."""
    return [line.strip() for line in text.splitlines() if line.startswith("  ")]


def shell(command: str, folder: Path, path: str) -> str:
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_experts_are_where_the_printed_command_lists_them(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # the environment of the program is not activated
    monkeypatch.chdir(ZOO.parent.parent)
    assert "2 experts" in register(experts)
    assert register(experts) == register(experts)
    [listing] = [line for line in commands(next_commands(CONFIG, tmp_path)) if "registry list" in line]
    listed = shell(listing, Path.cwd(), "/usr/bin:/bin")
    assert "sql" in listed and "shell" in listed


@pytest.mark.parametrize("is_activated", [True, False])
def test_every_printed_command_exists(is_activated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{COE.parent}:/usr/bin:/bin" if is_activated else "/usr/bin:/bin"
    monkeypatch.setenv("PATH", path)
    monkeypatch.chdir(ZOO.parent.parent)
    text = next_commands(CONFIG, tmp_path)
    assert str(tmp_path) in text
    assert len(commands(text)) == 3
    for command in commands(text):
        assert command.startswith("coe ") == is_activated
        words = command.partition("  # ")[0].rstrip()
        assert "Usage" in shell(f"{words} --help", Path.cwd(), path)
        if "--config" in words:
            assert (Path.cwd() / words.split()[-1]).samefile(CONFIG)


def test_other_experts_of_the_same_name_are_not_replaced(experts: Path) -> None:
    register(experts)
    experts.write_text(EXPERTS % "other", encoding="utf-8")
    with Registry() as registry:
        before = registry.snapshot().experts
    said = register(experts)
    assert "sql" in said and "registry apply" in said and "shell" not in said
    with Registry() as registry:
        assert registry.snapshot().experts == before


def test_an_answer_is_one_line_and_shows_what_markup_would_hide() -> None:
    question = fresh_questions(8, 7)[0]
    line = answer_line(question, Result("sql", "SELECT [red]\n1", 1.0, 3), 3, 140)
    assert "\n" not in line
    assert line.startswith("   3 of 140  sql")
    assert "yes" in line and r"\[red]" in line
    assert "no " in answer_line(question, Result("sql", "?", 0.0, 3), 3, 140)


def test_differences_and_lines_hold_all_answers() -> None:
    questions = fresh_questions(8, 7)
    same = [Result("sql", f"answer {q.id}", 1.0, 2) for q in questions]
    other = [Result("sql", "none", 0.0, 1) for _ in questions]
    results = Results(questions, same, other, same)
    assert differences(results, Batched(same, 1.0)) == []
    changed = [*same[:3], Result("shell", same[3].text, 1.0, 2), *same[4:]]
    [line] = differences(results, Batched(changed, 1.0))
    assert "question 3" in line and "sql" in line and "shell" in line
    lines = as_lines(results)
    assert [each["routed"]["text"] for each in lines] == [each.text for each in same]
    assert {each["best_single"]["score"] for each in lines} == {0.0}
    assert lines[5]["family"] == questions[5].family.name


def test_questions_of_two_skills_are_fresh_and_of_all_their_families() -> None:
    questions = fresh_two_skill_questions(8, 7)
    assert [question.id for question in questions] == list(range(8))
    assert sorted(question.family.name for question in questions) == sorted(
        [*TWO_SKILLS, *TWO_SKILLS, *list(TWO_SKILLS)[:2]]
    )
    assert not {question.family.name for question in questions} & set(FAMILIES)
    assert [q.row for q in questions] == [q.row for q in fresh_two_skill_questions(8, 7)]
    assert [q.row for q in questions] != [q.row for q in fresh_two_skill_questions(8, 8)]
    for question in questions:
        rows = TWO_SKILLS[question.family.name].family.rows(Split.FRESH, 3, seed=7)
        assert question.row in rows
        assert question.grade(question.row.answer) == 1


@pytest.mark.parametrize(("policy", "exchange"), [("aggregate", "text"), ("cache", "latent"), ("mot", "latent")])
async def test_the_summary_names_what_composed_experts_exchange(
    policy: str, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "COMPOSITION", policy)
    questions = fresh_two_skill_questions(8, 7)
    asked: list[str] = []

    async def ask(url: str, questions: list[Question], model: str, on_answer: object) -> Served:
        asked.append(model)
        right = 5 if model.startswith("coe/") else 1
        results = [Result(model, q.row.answer, float(i < right), 3) for i, q in enumerate(questions)]
        return Served(results, [1.0] * len(results), 1.0)

    monkeypatch.setattr(demo, "ask_service", ask)
    composed = await answer_two_skills("http://service/v1", "sentiment", questions)
    assert isinstance(composed, Composed)
    assert asked == ["sentiment", f"coe/{policy}"]
    assert composed.summary() == {
        "two_skill_n": 8,
        "two_skill_best_single_right": 1,
        f"two_skill_{exchange}_right": 5,
    }
    assert f"8 fresh questions that need two experts: sentiment, the best single expert, answers 1 right, {policy}" in (
        composed.line()
    )
    assert composed.line().endswith(f"({exchange}) 5")
    lines = composed.as_lines()
    assert [line["prompt"] for line in lines] == [question.row.prompt for question in questions]
    assert [line[policy]["score"] for line in lines] == [1.0] * 5 + [0.0] * 3
    assert sum(line["best_single"]["score"] for line in lines) == 1.0


class Service:
    """A service that answers right where it composes experts or routes, and wrong elsewhere."""

    def __init__(self, config: Path, say: object) -> None:
        assert config == demo.SERVED

    def wait_ready(self) -> str:
        return "http://service/v1"

    def stop(self) -> None:
        pass

    wait_stopped = stop


def test_the_last_line_has_the_figures_of_both_kinds_of_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(url: str, questions: list[Question], model: str, on_answer: object, clients: int = 32) -> Served:
        right = model == "auto" or model.startswith("coe/")
        name = "sql" if model == "auto" else model
        results = [Result(name, q.row.answer if right else "?", float(right), 3) for q in questions]
        return Served(results, [1.0] * len(results), 1.0)

    def batch(config: Path, questions: list[Question], folder: Path, say: object) -> Batched:
        assert config == demo.CONFIG
        return Batched([Result("sql", q.row.answer, 1.0, 3) for q in questions], 2.0)

    monkeypatch.setenv("COE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "prepare", lambda: (OutcomeTable.read(SHIPPED), None))
    monkeypatch.setattr(demo, "register", lambda experts: "registered")
    monkeypatch.setattr(demo, "Service", Service)
    monkeypatch.setattr(demo, "ask_service", ask)
    monkeypatch.setattr(demo, "run_batch", batch)
    assert demo.main(["--n", "8", "--seed", "7"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["n"], summary["routed_accuracy"], summary["best_single_accuracy"]) == (8, 1.0, 0.0)
    assert (summary["two_skill_n"], summary["two_skill_best_single_right"]) == (8, 0)
    assert summary["two_skill_text_right"] == 8
    kept = [json.loads(line) for line in (tmp_path / "zoo/demo/two_skills.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in kept] == [q.row.prompt for q in fresh_two_skill_questions(8, 7)]
    assert len((tmp_path / "zoo/demo/results.jsonl").read_text().splitlines()) == 8

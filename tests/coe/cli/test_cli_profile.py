"""`coe profile` from the command line to the registry, over fake experts, and what `coe registry show` prints of it."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from coe.cli.profile.command import profile
from coe.cli.registry import app as registry_app
from coe.engines.fake import FakeExpert
from coe.errors import ConfigError, TaskError
from registry.errors import RegistryError
from registry.store import Registry
from routers.errors import InvalidOutcomes
from routers.outcomes.table import OutcomeTable

EXPERTS = """
experts:
  - {name: geo, kind: model, source: "fake://script?france=Paris&italy=Rome&default=Oslo"}
  - {name: spain, kind: model, source: "fake://script?spain=Madrid&default=Bern"}
  - {name: lost, kind: model, source: "fake://script?default=Kiev"}
"""
ROWS = [
    {"id": "fr", "prompt": "Capital of France?", "answer": "Paris", "skills": ["north", "old"]},
    {"id": "it", "prompt": "Italy?", "answer": "Rome", "skills": ["south", "old"]},
    {"id": "es", "prompt": "Spain?", "answer": "Madrid"},
]
REGISTRY = "sqlite:///registry.db"

app = typer.Typer()
app.command()(profile)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("experts.yaml").write_text(EXPERTS)
    Path("service.yaml").write_text(f"registry: {REGISTRY}\nhost: {{budget: 1GiB}}\n")
    Path("memory.yaml").write_text("experts: [experts.yaml]\nhost: {budget: 1GiB}\n")
    Path("tasks").mkdir()
    Path("tasks/capitals.yaml").write_text("name: capitals\ndata: capitals.jsonl\ngrader: exact\n")
    Path("tasks/capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    register()
    return tmp_path


def register() -> None:
    done = CliRunner().invoke(registry_app, ["apply", "experts.yaml", "--registry", REGISTRY])
    assert done.exit_code == 0, done.output


def coe_profile(*arguments: str, ok: bool = True) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert not ok or result.exit_code == 0, (result.output, result.exception)
    return result


def on_tasks(*arguments: str, config: str = "service.yaml", ok: bool = True) -> Result:
    return coe_profile("--config", config, "--tasks", "capitals", *arguments, ok=ok)


def counts(name: str) -> dict[str, tuple[float, int]]:
    with Registry(REGISTRY) as registry:
        return {skill: (measure.score, measure.n) for skill, measure in registry.profiles().of(name).items()}


def show(name: str) -> Any:
    done = CliRunner().invoke(registry_app, ["show", name, "--registry", REGISTRY, "--json", "-"])
    return json.loads(done.stdout)["profile"]


def table(path: str, **fields: Any) -> Path:
    given: dict[str, Any] = {
        "query_ids": ("1", "2", "3", "4"),
        "prompts": ("one", "two", "three", "four"),
        "experts": ("geo", "spain"),
        "scores": np.array([[1, 0], [1, 0], [0, 1], [0.5, 1]]),
        "domains": ("law", "law", "math", "math"),
    }
    Path(path).parent.mkdir(exist_ok=True)
    OutcomeTable(**given | fields).write(path)
    return Path(path)


def test_asking_counts_by_skill(service: Path) -> None:
    result = on_tasks()
    assert counts("geo") == {"capitals": (0, 1), "north": (1, 1), "old": (2, 2), "south": (1, 1)}
    assert counts("spain") == {"capitals": (1, 1), "north": (0, 1), "old": (0, 2), "south": (0, 1)}
    with Registry(REGISTRY) as registry:
        cell = registry.profiles().of("geo")["old"]
    assert cell.completion_tokens == 2 and cell.seconds is not None
    (line,) = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("geo")]
    assert line[:5] == ["geo", "5", "80.0%", "old", "76.2%"], "(2 + 10 * 5/7) / 12"


def test_what_was_measured_is_not_asked_again(service: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    generate = FakeExpert.generate

    async def counting(self: FakeExpert, *arguments: Any) -> Any:
        asked.append(self.spec.name)
        async for chunk in generate(self, *arguments):
            yield chunk

    monkeypatch.setattr(FakeExpert, "generate", counting)
    on_tasks("--experts", "geo,spain")
    assert sorted(asked) == ["geo"] * 3 + ["spain"] * 3
    asked.clear()
    again = on_tasks("--json", "out.json")
    assert asked == ["lost"] * 3 and "not run again: geo, spain" in again.stderr
    document = json.loads(Path("out.json").read_text())
    assert document["asked"] == ["lost"] and document["stored_in"] == REGISTRY
    assert {row["expert"] for row in document["rows"]} == {"geo", "spain", "lost"}

    asked.clear()
    before = counts("geo")
    Path("experts.yaml").write_text(EXPERTS.replace("spain=Madrid", "spain=Madrid&france=Paris"))
    register()
    assert counts("spain") == {}, "it is another expert now"
    shown = CliRunner().invoke(registry_app, ["show", "spain", "--registry", REGISTRY]).stdout
    assert "nothing was measured of spain as it is" in shown and "(5 counts are of other versions)" in shown
    on_tasks()
    assert asked == ["spain"] * 3 and counts("spain")["north"] == (1, 1) and counts("geo") == before
    assert show("spain")["counts_of_other_content"] == 5 and show("spain@1")["accuracy"] == 0.2
    asked.clear()
    on_tasks("--fresh", "--experts", "lost")
    assert asked == ["lost"] * 3 and counts("geo") == before


def test_a_table_is_read_once_however_often(service: Path) -> None:
    path = str(table("monday/outcomes.parquet"))
    for _ in range(2):
        coe_profile("--outcomes", path, "--registry", REGISTRY)
    assert counts("geo") == {"law": (2, 2), "math": (0.5, 2)}
    coe_profile(
        "--outcomes", str(table("tuesday/outcomes.parquet", scores=np.ones((4, 2)))), "--config", "service.yaml"
    )
    assert counts("geo") == {"law": (4, 4), "math": (2.5, 4)}
    assert set(show("geo")["sources"]) == {"monday/outcomes", "tuesday/outcomes"}
    coe_profile("--outcomes", path, "--registry", REGISTRY, "--source", "tuesday/outcomes", "--limit", "1")
    assert counts("geo") == {"law": (3, 3), "math": (0.5, 2)}


def test_a_table_of_what_experts_were_is_kept_for_that(service: Path) -> None:
    evaluated = table("run/outcomes.parquet")
    (evaluated.parent / "run.json").write_text(json.dumps({"manifest": {"experts": {"geo": "sha256:then"}}}))
    result = coe_profile("--outcomes", str(evaluated), "--registry", REGISTRY)
    assert "geo has changed since: the counts" in result.stderr
    assert counts("geo") == {} and counts("spain") == {"law": (0, 2), "math": (2, 2)}


def test_experts_that_the_registry_does_not_know(service: Path) -> None:
    path = str(table("t.parquet", experts=("geo", "gpt")))
    error = coe_profile("--outcomes", path, "--registry", REGISTRY, ok=False).exception
    assert isinstance(error, RegistryError)
    assert str(error).endswith("are not in the registry: gpt; --experts geo reads those that it does")
    coe_profile("--outcomes", path, "--registry", REGISTRY, "--experts", "geo")
    assert counts("geo") == {"law": (2, 2), "math": (0.5, 2)}
    nobody = coe_profile("--outcomes", path, "--registry", "sqlite:///empty.db", ok=False).exception
    assert "geo, gpt; register them first" in str(nobody)


def test_the_registry_shows_strengths_and_weaknesses(service: Path) -> None:
    def shown(name: str) -> str:
        return CliRunner().invoke(registry_app, ["show", name, "--registry", REGISTRY]).stdout

    assert "nothing was measured of geo as it is: `coe profile --outcomes FILE`" in shown("geo")
    assert show("geo") is None
    coe_profile("--outcomes", str(table("t.parquet")), "--registry", REGISTRY)
    lines = [" ".join(line.split()) for line in shown("geo").splitlines()]
    law = show("geo")["skills"][0]
    own, others = (2.5 + 1) / (4 + 2), (0 + 10 * (2 + 1) / (4 + 2)) / 12
    assert law["skill"] == "law" and law["accuracy"] == pytest.approx((2 + 10 * own) / 12)
    assert law["others"] == pytest.approx(others) and law["lead"] == pytest.approx((2 + 10 * own) / 12 - others)
    strongest, weakest = (next(i for i, line in enumerate(lines) if line.startswith(w)) for w in ("strong", "weak"))
    assert lines[strongest + 2].startswith("law 65.3%") and lines[strongest + 2].endswith(" 2 41.7% +23.6")
    assert lines[weakest + 2].startswith("math 52.8%")
    assert any(line.startswith("mean 62.5% of 4 counts; measured by") for line in lines)


def test_names_of_skills_are_no_markup(service: Path) -> None:
    result = coe_profile(
        "--outcomes", str(table("t.parquet", domains=("[red]x",) * 2 + ("[/]",) * 2)), "--registry", REGISTRY
    )
    assert "[red]x" in result.stdout and "[/]" in result.stdout
    assert "[red]x" in CliRunner().invoke(registry_app, ["show", "geo", "--registry", REGISTRY]).stdout


def test_the_best_aggregator_is_found_shown_and_kept(service: Path) -> None:
    """One expert knows France and Italy, two do not; `geo` recognises right answers, the others never vary."""
    result = on_tasks("--aggregators", "--seed", "3", "--json", "out.json")
    document = json.loads(Path("out.json").read_text())
    assert document["trials"] == [{"source": "aggregation/capitals", "n": 3, "no_right": 0, "few_wrong": 0}]
    over_all = {one["expert"]: one["accuracy"] for one in document["aggregators"] if one["label"] is None}
    assert over_all == {"geo": pytest.approx(2 / 3), "spain": pytest.approx(1 / 3), "lost": 0}
    assert document["best"] == "geo" and document["by_label"]["capitals"] == "geo", "one question proves nothing"
    said = yaml.safe_load(result.stdout[result.stdout.index("composition:") :])
    assert said == {"composition": document["composition"]}
    assert said["composition"] == {"kind": "aggregate", "aggregator": "geo"}
    assert counts("geo") == {}, "a trial of aggregators is not a profile"
    with Registry(REGISTRY) as registry:
        assert registry.profiles(aggregating=True).of("geo")["north"].score == 1
    assert {one["skill"] for one in show("geo")["aggregating"]} == {"capitals", "north", "old", "south"}
    again = on_tasks("--aggregators", "--seed", "3", "--experts", "geo")
    assert "resuming: 9 answers" in again.stderr


def test_aggregators_by_a_runs_recorded_answers(service: Path) -> None:
    answers = {"geo": ("Paris",), "spain": ("Bern",), "lost": ("Kiev",)}
    recorded = table(
        "run/outcomes.parquet", query_ids=("capitals/fr",), prompts=("Capital of France?",), domains=("geography",),
        experts=tuple(answers), scores=np.array([[1, 0, 0]]), answers=answers,
    )  # fmt: skip
    result = on_tasks("--aggregators", "--outcomes", str(recorded), "--experts", "geo,lost", "--out", "out")
    assert "capitals: 1 questions to aggregate; left out: 2 without a right answer" in result.stderr
    document = json.loads(Path("out/aggregators.json").read_text())
    assert (document["best"], Path("out/trial/answers.jsonl").exists()) == ("geo", True)
    assert not Path("out/answers").exists(), "no call for recorded answers"


def test_aggregators_by_any_table_need_a_grader(service: Path) -> None:
    answers = {"geo": ("A", "B"), "spain": ("B", "C"), "lost": ("C", "A")}
    frame = {"answer": ["A", "C"]}
    recorded = table(
        "mc.jsonl", query_ids=("1", "2"), prompts=("France?", "Spain?"), domains=("x", "y"), experts=tuple(answers),
        scores=np.array([[1, 0, 0], [0, 1, 0]]), answers=answers, frame=pd.DataFrame(frame),
    )  # fmt: skip
    given = ["--aggregators", "--outcomes", str(recorded), "--config", "service.yaml"]
    refused = coe_profile(*given, ok=False)
    assert refused.exit_code == 2 and "--grader" in refused.stderr
    coe_profile(*given, "--grader", "choice", "--source", "mc")
    with Registry(REGISTRY) as registry:
        found = registry.profiles(aggregating=True).of("lost")
        assert {row.source for row in registry.recorded("lost")} == {"aggregation/mc"}
    assert {label: (one.score, one.n) for label, one in found.items()} == {"x": (0, 1), "y": (0, 1)}, (
        "Kiev is no option"
    )


def test_answers_that_make_no_trial(service: Path) -> None:
    without = coe_profile(
        "--aggregators",
        "--outcomes",
        str(table("t.parquet")),
        "--grader",
        "exact",
        "--config",
        "service.yaml",
        ok=False,
    ).exception
    assert isinstance(without, InvalidOutcomes) and "no recorded answers" in str(without)
    Path("experts.yaml").write_text("\n".join(EXPERTS.splitlines()[:4]))
    Path("service.yaml").write_text("registry: sqlite:///two.db\nhost: {budget: 1GiB}\n")
    CliRunner().invoke(registry_app, ["apply", "experts.yaml", "--registry", "sqlite:///two.db"])
    few = on_tasks("--aggregators", ok=False).exception
    assert isinstance(few, TaskError) and "of 3, 0 have no right one and 3 too few wrong ones" in str(few)


def test_a_registry_in_memory_keeps_nothing_and_says_so_first(service: Path) -> None:
    for more in ([], ["--aggregators"]):
        error = on_tasks(*more, config="memory.yaml", ok=False).exception
        assert isinstance(error, ConfigError) and "its registry is in memory and keeps nothing" in str(error)
        assert "or say with --json or --out where the result goes" in str(error)
        assert not Path("coe-home/profiles").exists(), "before any call"
    document = json.loads(on_tasks("--json", "-", config="memory.yaml").stdout)
    assert document["stored_in"] is None and len(document["rows"]) == 12
    on_tasks("--out", "out", config="memory.yaml")
    assert json.loads(Path("out/profile.json").read_text())["rows"][0]["source"] == "task/capitals"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --outcomes FILE to read a table, or --tasks NAMES"),
        (["--outcomes", "t.parquet", "--tasks", "x", "--config", "c"], "either --outcomes or --tasks"),
        (["--tasks", "x"], "give the configuration of the service"),
        (["--outcomes", "t.parquet", "--grader", "choice"], "for --aggregators with --outcomes and without --tasks"),
        (["--tasks", "x", "--config", "service.yaml", "--source", "s"], "are of a table"),
        (["--tasks", "x", "--config", "service.yaml", "--registry", "sqlite://"], "give one of the two"),
    ],
)
def test_flags_that_do_not_go_together(service: Path, arguments: list[str], message: str) -> None:
    result = coe_profile(*arguments, ok=False)
    assert result.exit_code == 2 and message in " ".join(result.stderr.replace("│", "").split())


def test_ctrl_c_keeps_the_answers(service: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, asked = FakeExpert.generate, 0

    async def interrupted(self: FakeExpert, *arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 6:
            signal.raise_signal(signal.SIGINT)
        async for chunk in generate(self, *arguments):
            yield chunk

    monkeypatch.setattr(FakeExpert, "generate", interrupted)
    result = on_tasks("--concurrency", "1", ok=False)
    assert result.exit_code == 130 and "the answers so far are kept" in result.stderr
    assert counts("geo") == {}, "half a run is no profile"
    words = shlex.split(result.stderr.strip().splitlines()[-1])
    assert words[:2] == ["coe", "profile"] and words[-1] == "--resume"
    assert "answers are in the folder" in coe_profile(*words[2:]).stderr
    assert counts("geo")["old"] == (2, 2) and asked < 6 + 9

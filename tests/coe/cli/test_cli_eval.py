"""`coe eval` from the command line to the files, over fake experts."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from coe.cli.evaluate import evaluate
from coe.engines.fake import FakeExpert
from coe.errors import TaskError
from coe.runs.errors import RunFolderError
from registry.errors import DiskFull, UnknownExpert
from routers.outcomes.table import OutcomeTable

EXPERTS = """
experts:
  - {name: geo, kind: model, source: "fake://script?france=It is Paris.&default=Rome"}
  - {name: sums, kind: model, source: "fake://script?default=4"}
"""
CAPITALS = [
    {"id": "fr", "prompt": "Capital of France?", "answer": "Paris"},
    {"id": "it", "prompt": "Italy?", "answer": "Rome"},
]
SUMS = [{"id": n, "prompt": f"{n} + {4 - n}?", "answer": 4} for n in range(3)]

app = typer.Typer()
app.command()(evaluate)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("experts.yaml").write_text(EXPERTS)
    Path("service.yaml").write_text("experts: [experts.yaml]\nhost: {budget: 1GiB}\n")
    for name, grader, rows in (("capitals", "contains", CAPITALS), ("sums", "number", SUMS)):
        folder = Path("configs/tasks") if name == "capitals" else Path("tasks")
        folder.mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(f"name: {name}\ndata: {name}.jsonl\ngrader: {grader}\n")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def coe_eval(*arguments: str, tasks: str = "capitals,sums", output: str = "run") -> Result:
    given = ["--config", "service.yaml", "--tasks", tasks, "--out", output, *arguments]
    return CliRunner().invoke(app, given, catch_exceptions=True)


def test_it_measures_shows_and_says_what_to_do_next(service: Path) -> None:
    result = coe_eval()
    assert result.exit_code == 0, result.output
    table = OutcomeTable.read("run/outcomes.parquet")
    assert dict(zip(table.experts, table.scores.mean(axis=0), strict=True)) == {"geo": 0.4, "sums": 0.6}
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["│", "geo", "│", "100.0%", "│", "0.0%", "│"] in lines
    assert ["│", "sums", "│", "0.0%", "│", "100.0%", "│"] in lines
    assert "n = 2" in result.stdout and "n = 3" in result.stdout
    assert "coe router train --outcomes run/outcomes.parquet --kind category --out router" in result.stderr


def test_refusals_are_shown_and_the_grader_scores_them(service: Path) -> None:
    Path("experts.yaml").write_text(EXPERTS.replace("default=Rome", "default=I do not know."))
    result = coe_eval("--json", "figures.json")
    figures = json.loads(Path("figures.json").read_text())["experts"]
    assert (figures["geo"]["refusals"], figures["sums"]["refusals"]) == (4, 0)
    assert figures["geo"]["mean_score"] == 0.2
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["│", "geo", "│", "50.0%", "│", "0.0%", "│", "80.0%", "│"] in lines


def test_json_goes_to_a_file_or_alone_to_stdout(service: Path) -> None:
    printed = json.loads(coe_eval("--json", "-").stdout)
    assert printed["status"] == "complete" and printed["output"] == "run"
    assert printed["tasks"]["sums"]["mean_score"] == {"geo": 0, "sums": 1}
    assert sum(printed["sessions"][0]["loads"].values()) == 2
    again = coe_eval("--resume", "--json", "figures.json")
    assert "resuming: 10 answers are in the folder" in again.stderr
    assert json.loads(Path("figures.json").read_text()) == printed


def test_experts_and_rows_can_be_chosen(service: Path) -> None:
    assert coe_eval("--experts", "sums, ", "--limit", "1").exit_code == 0
    table = OutcomeTable.read("run/outcomes.parquet")
    assert table.experts == ("sums",) and table.query_ids == ("capitals/fr", "sums/0")


def test_a_folder_with_a_run_needs_resume_and_the_same_settings(service: Path) -> None:
    assert coe_eval().exit_code == 0
    refused = coe_eval()
    assert isinstance(refused.exception, RunFolderError) and "add --resume" in str(refused.exception)
    for more in ((), ("--resume",)):
        other = coe_eval("--limit", "1", *more)
        assert isinstance(other.exception, RunFolderError) and "settings: ~limit None -> 1" in str(other.exception)
    assert coe_eval("--resume").exit_code == 0
    assert coe_eval("--limit", "1", "--resume", output="new").exit_code == 0
    assert len(OutcomeTable.read("run/outcomes.parquet")) == 5 and len(OutcomeTable.read("new/outcomes.parquet")) == 2


def test_wrong_names_are_told(service: Path) -> None:
    wrong_task = coe_eval(tasks="capitls").exception
    assert isinstance(wrong_task, TaskError) and "did you mean 'capitals'" in str(wrong_task)
    wrong_expert = coe_eval("--experts", "sum").exception
    assert isinstance(wrong_expert, UnknownExpert) and "did you mean 'sums'" in str(wrong_expert)
    assert not Path("run").exists()


PRICED = """
experts:
  - {name: geo, kind: model, source: "fake://script?france=It is Paris.&default=Rome",
     price: {input_usd_per_mtok: 1, output_usd_per_mtok: 2}}
  - {name: sums, kind: model, source: "fake://script?default=4", price: {input_usd_per_mtok: 1, output_usd_per_mtok: 2}}
"""
TOGETHER = "both: {expert: geo, composition: {kind: chain, experts: [geo, sums], template: '{question} {draft}'}}"


def test_a_policy_is_one_more_column_with_all_that_it_costs(service: Path) -> None:
    Path("experts.yaml").write_text(PRICED)
    with Path("service.yaml").open("a") as file:
        file.write(f"default_policy: both\npolicies:\n  {TOGETHER}\n")
    result = coe_eval("--experts", "geo,sums,coe/both")
    assert result.exit_code == 0, result.output
    table = OutcomeTable.read("run/outcomes.parquet")
    assert table.experts == ("geo", "sums", "coe/both") and table.answers is not None
    assert table.answers["coe/both"] == ("4",) * 5 and table.scores[:, 2].tolist() == [0, 0, 1, 1, 1]
    # of France: geo reads 3 words and writes 3, sums reads those 6 and writes 1
    assert table.costs_usd is not None and table.tokens is not None
    assert table.costs_usd[0, 2] == pytest.approx((3 + 6 + 2 * (3 + 1)) / 1e6) and table.tokens[0, 2] == 4
    assert table.costs_usd[0, 0] == pytest.approx((3 + 2 * 3) / 1e6)
    assert coe_eval("--experts", "geo,sums,coe/both", "--resume").exit_code == 0  # the same run
    Path("service.yaml").write_text(Path("service.yaml").read_text().replace("{draft}", "or {draft}"))
    changed = coe_eval("--experts", "geo,sums,coe/both", "--resume")
    assert isinstance(changed.exception, RunFolderError) and "experts: ~coe/both" in str(changed.exception)


def test_a_policy_that_does_not_exist_or_may_not_answer_is_told(service: Path) -> None:
    with Path("service.yaml").open("a") as file:
        file.write(f"default_policy: both\npolicies:\n  {TOGETHER}\n")
    unknown = coe_eval("--experts", "coe/bth").exception
    assert isinstance(unknown, UnknownExpert) and "did you mean 'both'" in str(unknown)
    assert coe_eval("--experts", "coe/both").exit_code == 0
    assert OutcomeTable.read("run/outcomes.parquet").costs_usd is None  # prices are unknown
    Path("experts.yaml").write_text(EXPERTS.replace("kind: model,", "kind: model, context_length: 6,"))
    nobody = coe_eval("--experts", "coe/both", output="other")
    assert nobody.exit_code == 0 and "answers failed (score 0)" in nobody.stderr
    strict = coe_eval("--experts", "coe/both", "--resume", "--require", "0.5", output="other")
    assert strict.exit_code == 3
    assert strict.stderr.splitlines()[-1] == (
        "5 of 5 answers failed; --require needs 0.5 of them, so the exit status is 3. The errors: field `error` of "
        "other/answers.jsonl"
    )
    errors = json.loads(Path("other/run.json").read_text())["experts"]["coe/both"]["errors"]
    assert any(
        "InvalidRequest: no expert can take this query: geo, sums (context length: 256 tokens" in error
        for error in errors
    )


def test_failed_answers_are_counted(service: Path) -> None:
    Path("experts.yaml").write_text(EXPERTS.replace("kind: model,", "kind: model, context_length: 257,", 1))
    result = coe_eval()
    assert result.exit_code == 0, result.output
    assert "4 answers failed (score 0); see run.json" in result.stderr


@pytest.mark.parametrize("sampling", [("--temperature", "0.5", "--seed", "3"), ("--seed", "3")])
def test_ctrl_c_keeps_the_answers_and_prints_the_command_that_continues(
    service: Path, monkeypatch: pytest.MonkeyPatch, sampling: tuple[str, ...]
) -> None:
    generate, asked = FakeExpert.generate, 0

    async def interrupted(self: FakeExpert, *arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 7:
            signal.raise_signal(signal.SIGINT)
        async for chunk in generate(self, *arguments):
            yield chunk

    monkeypatch.setattr(FakeExpert, "generate", interrupted)
    result = coe_eval("--concurrency", "1", "--experts", "geo,sums", "--limit", "9", *sampling)
    assert result.exit_code == 130
    command = result.stderr.strip().splitlines()[-1].strip()
    assert "interrupted: the answers so far are kept" in result.stderr
    kept = len(Path("run/answers.jsonl").read_text().splitlines())
    assert 5 <= kept < 10 and json.loads(Path("run/run.json").read_text())["status"] == "interrupted"

    with Path("run/answers.jsonl").open("a") as file:
        file.write('{"run": "cut off he')
    words = shlex.split(command)
    assert words[:2] == ["coe", "eval"]
    resumed = CliRunner().invoke(app, words[2:])
    assert resumed.exit_code == 0, resumed.output
    assert "a half-written answer" in resumed.stderr and f"resuming: {kept} answers" in resumed.stderr
    assert OutcomeTable.read("run/outcomes.parquet").scores.mean(axis=0).tolist() == [0.4, 0.6]


@pytest.mark.parametrize(("place", "is_of_the_run"), [("run/answers.jsonl", True), ("cache/model", False)])
def test_a_full_disk_prints_the_command_that_continues(
    service: Path, monkeypatch: pytest.MonkeyPatch, place: str, is_of_the_run: bool
) -> None:
    async def full(*_: Any, **__: Any) -> None:
        raise DiskFull(Path(place))

    monkeypatch.setattr("coe.cli.evaluate.run_in", full)
    error = coe_eval().exception
    if not is_of_the_run:
        assert isinstance(error, DiskFull)
        return
    assert isinstance(error, RunFolderError)
    assert "no space left to write 'answers.jsonl' in run" in str(error) and "--out on a larger disk" in str(error)
    command = shlex.split(str(error).splitlines()[-1])
    assert command[:2] == ["coe", "eval"] and command[-1] == "--resume"
    assert {"--config", "service.yaml", "--tasks", "capitals,sums", "--out", "run"} == set(command[2:-1])

"""`coe batch` from the command line to the files; killed repeatedly without losing or changing a row."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from coe.batch.errors import InputError
from coe.cli.batch import batch
from coe.config import BatchConfig
from coe.engines.fake import FakeExpert
from coe.errors import ConfigError, UnknownModel
from coe.runs.errors import RunFolderError

EXPERTS = """
experts:
  - {name: geo, kind: model, source: "fake://script?france=Paris&default=Rome", size_bytes: 10}
  - {name: loud, kind: model, source: "fake://upper", size_bytes: 10}
  - {name: broken, kind: model, source: "fake://fail?at=load", size_bytes: 10}
"""
SERVICE = """
experts: [experts.yaml]
host: {budget: 10}
policies:
  default: {expert: geo}
  shaky: {expert: broken, fallback: loud}
"""
ROWS = [
    {"id": "fr", "prompt": "Capital of France?"},
    {"id": "it", "prompt": "Capital of Italy?"},
    {"id": "hi", "prompt": "hello", "model": "loud"},
    {"id": "fall", "prompt": "fall", "model": "coe/shaky"},
    {"id": "down", "prompt": "down", "model": "broken", "user": "me"},
]

app = typer.Typer()
app.command()(batch)


class InProcess:
    """A substitute for Ray; the tests of coe.batch use the real one."""

    addresses: list[str | None]  # set by the fixture

    @classmethod
    @contextmanager
    def opened(cls, config: BatchConfig) -> Iterator[Any]:
        from batch_runs import InProcess as Executor

        cls.addresses.append(config.ray)
        yield Executor()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("coe.batch.runner.ray_executor", InProcess.opened)
    InProcess.addresses = []
    Path("experts.yaml").write_text(EXPERTS)
    Path("service.yaml").write_text(SERVICE)
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{oops\n")
    return tmp_path


def coe_batch(*arguments: str, output: str = "out", source: str = "in.jsonl") -> Result:
    given = ["--config", "service.yaml", "--input", source, "--out", output, *arguments]
    return CliRunner().invoke(app, given)


def test_it_answers_and_says_who_did_what_failed_and_where_the_results_are(place: Path) -> None:
    result = coe_batch("--require", "0.6")
    assert result.exit_code == 0, result.output
    rows = {row["id"]: row for row in pq.read_table("out/results.parquet").to_pylist()}
    assert [rows[name]["answer"] for name in ("fr", "it", "hi", "fall")] == ["Paris", "Rome", "HELLO", "FALL"]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["│", "geo", "│", "2", "│", "1", "│"] in lines and ["│", "loud", "│", "2", "│", "2", "│"] in lines
    assert "answering, stage 1: 2 broken (2 failed), 2 geo, 1 loud" in result.stderr
    assert "1 rows failed: invalid_weights; see their `error` column" in result.stderr
    assert "user has no effect; 1 rows have it" in result.stderr
    assert "Results: out/results.parquet" in result.stderr
    assert result.stderr.splitlines()[-1] == ("2 of 6 rows failed. The errors: column `error` of out/results.parquet")


def test_the_exit_status_says_whether_enough_rows_were_answered_and_resuming_says_the_same(place: Path) -> None:
    failed = coe_batch()
    assert failed.exit_code == 3
    assert failed.stderr.splitlines()[-1] == (
        "2 of 6 rows failed; --require needs all of them, so the exit status is 3. The errors: column `error` of "
        "out/results.parquet"
    )
    assert coe_batch("--resume").exit_code == 3, "nothing is left to do, and nothing else was answered"
    for require, status in (("0.67", 3), ("0.66", 0), ("0", 0), ("1", 3)):
        assert coe_batch("--resume", "--require", require).exit_code == status, require
    printed = coe_batch("--resume", "--json", "-")
    assert printed.exit_code == 3 and json.loads(printed.stdout)["status"] == "complete"
    assert coe_batch("--require", "1.5", output="new").exit_code == 2
    Path("in.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    answered = coe_batch(output="good")
    assert answered.exit_code == 0 and "Results: good/results.parquet" in answered.stderr.splitlines()[-1]


def test_exactly_the_required_share_is_enough(place: Path) -> None:
    rows = [{"id": str(i), "prompt": "x", "model": "loud" if i < 7 else "broken"} for i in range(10)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert coe_batch("--require", "0.7").exit_code == 0 and coe_batch("--resume", "--require", "0.71").exit_code == 3


def test_json_goes_to_a_file_or_alone_to_stdout(place: Path) -> None:
    printed = json.loads(coe_batch("--json", "-").stdout)
    assert printed["status"] == "complete" and printed["output"] == "out"
    assert printed["results"]["experts"] == {"geo": 2, "loud": 2}
    assert coe_batch("--resume", "--json", "figures.json", "--require", "0").exit_code == 0
    assert json.loads(Path("figures.json").read_text()) == printed


def test_the_model_of_rows_that_name_none_and_the_address_can_be_given(place: Path) -> None:
    assert coe_batch("--model", "loud", "--ray", "auto", "--require", "0").exit_code == 0
    rows = {row["id"]: row for row in pq.read_table("out/results.parquet").to_pylist()}
    assert rows["fr"]["expert"] == "loud" and InProcess.addresses == ["auto"]


@pytest.mark.parametrize(
    ("arguments", "source", "error", "message"),
    [
        ((), "nothing.jsonl", InputError, "no such file"),
        (("--model", "lod"), "in.jsonl", UnknownModel, "did you mean 'loud'"),
        (("--config", "other.yaml"), "in.jsonl", ConfigError, "default_policy"),
    ],
)
def test_wrong_arguments_are_refused_in_words(
    place: Path, arguments: tuple[str, ...], source: str, error: type[Exception], message: str
) -> None:
    Path("other.yaml").write_text(SERVICE.replace("default: {", "other: {"))
    result = coe_batch(*arguments, source=source)
    assert isinstance(result.exception, error) and message in str(result.exception)
    assert not Path("out").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(place: Path) -> None:
    coe_batch()
    refused = coe_batch()
    assert isinstance(refused.exception, RunFolderError) and "add --resume" in str(refused.exception)
    other = coe_batch("--resume", "--model", "loud")
    assert isinstance(other.exception, RunFolderError) and "model: auto -> loud" in str(other.exception)


def test_ctrl_c_keeps_the_answers_and_prints_the_command_that_continues(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert coe_batch("--require", "0", output="whole").exit_code == 0
    generate, asked = FakeExpert.generate, 0

    async def interrupted(self: FakeExpert, *arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            signal.raise_signal(signal.SIGINT)
        async for chunk in generate(self, *arguments):
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(FakeExpert, "generate", interrupted)
        result = coe_batch("--model", "auto", "--ray", "auto", "--require", "0")
    assert result.exit_code == 130 and "interrupted: the answers so far are kept" in result.stderr
    assert json.loads(Path("out/run.json").read_text())["status"] == "interrupted"
    words = shlex.split(result.stderr.strip().splitlines()[-1])
    assert words[:2] == ["coe", "batch"] and "--resume" in words
    assert CliRunner().invoke(app, words[2:]).exit_code == 0
    assert Path("out/results.parquet").read_bytes() == Path("whole/results.parquet").read_bytes()


def test_the_command_that_continues_has_the_model_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coe.batch.run.run_batch", stop)
    words = shlex.split(coe_batch("--model", "loud").stderr.strip().splitlines()[-1])
    assert words[-3:] == ["--model", "loud", "--resume"]


def test_the_command_that_continues_repeats_an_option_of_several_values(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coe.batch.run.run_batch", stop)
    limits = ["--capacity", "a=6", "--capacity", "b=7"]
    words = shlex.split(coe_batch("--budget-usd", "1", *limits).stderr.strip().splitlines()[-1])
    assert words[words.index("--capacity") :] == [*limits, "--resume"]


def killed(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of a process and everything it started, found before its parent ends."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=10)


@pytest.mark.slow
@pytest.mark.integration
def test_killed_at_ten_random_moments_and_resumed_the_files_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    (tmp_path / "service.yaml").write_text(f"{SERVICE}\nengines: {{fake: {{token_delay_s: 0.005, capacity: 4}}}}\n")
    models = ("auto", "loud", "coe/shaky", "broken")
    body = {"messages": [{"role": "user", "content": "some words to answer"}]}
    rows = (
        {"custom_id": f"row-{i}", "url": "/v1/chat/completions", "body": {"model": models[i % 4], **body}}
        for i in range(6000)
    )
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | {"COE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def start(output: str, *arguments: str) -> subprocess.Popen[bytes]:
        words = [
            "batch",
            "--config",
            "service.yaml",
            "--input",
            "in.jsonl",
            "--out",
            output,
            "--require",
            "0",
            *arguments,
        ]
        code = "from coe.cli.entry import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
        )

    def found(output: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / output).glob("results.*")}

    started = time.monotonic()
    assert start("whole").wait() == 0
    whole_s = time.monotonic() - started
    rng, kills, in_time = random.Random(7), 0, 0.2 * whole_s
    while kills < 10:
        process = start("cut", *(["--resume"] if (tmp_path / "cut" / "run.json").exists() else []))
        try:
            assert process.wait(timeout=rng.uniform(in_time, whole_s)) == 0
            assert found("cut") == found("whole")  # this run finished: the next kills hit another run
            (tmp_path / "cut").rename(tmp_path / f"through-{kills}")
        except subprocess.TimeoutExpired:
            killed(process)
            kills += 1
            print(f"kill {kills} after {time.monotonic() - started:.0f} s")
    resume = ["--resume"] if (tmp_path / "cut" / "run.json").exists() else []
    assert start("cut", *resume).wait() == 0
    assert found("cut") == found("whole") and set(found("cut")) == {"results.parquet", "results.jsonl"}
    assert pq.read_metadata(tmp_path / "cut" / "results.parquet").num_rows == 6000


def test_a_budget_is_shown_with_its_assignment_and_belongs_to_the_run(place: Path) -> None:
    price = "price: {input_usd_per_mtok: 0, output_usd_per_mtok: 1000}"
    Path("experts.yaml").write_text(EXPERTS.replace("size_bytes: 10}", f"size_bytes: 10, {price}}}"))
    Path("service.yaml").write_text(SERVICE.replace("shaky: {expert: broken, fallback: loud}", "other: {expert: loud}"))
    Path("in.jsonl").write_text("".join(json.dumps(row | {"max_tokens": 10}) + "\n" for row in ROWS[:3]))
    arguments = ["--config", "service.yaml", "--input", "in.jsonl", "--out", "out"]
    result = CliRunner().invoke(app, [*arguments, "--budget-usd", "0.5"])
    assert result.exit_code == 0, result.output
    assert "Assigned jointly within 0.5 USD" in result.output and "Priced at the most tokens" in result.output
    assert json.loads(Path("out/run.json").read_text())["assignment"]["price_usd"] == pytest.approx(0.03)
    other = CliRunner().invoke(app, [*arguments, "--budget-usd", "0.6", "--resume"])
    assert isinstance(other.exception, RunFolderError) and "budget: ~usd 0.5 -> 0.6" in str(other.exception)
    lonely = CliRunner().invoke(app, [*arguments, "--like", "out"])
    assert lonely.exit_code == 2 and "needs --budget-usd" in lonely.output

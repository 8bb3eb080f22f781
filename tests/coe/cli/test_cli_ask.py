"""`coe ask`: the answer on stdout, the expert and the reason on stderr, one clear line for each mistake."""

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coe.cli.app import app, main

EXPERTS = """
experts:
  - {name: loud, kind: model, source: "fake://upper", context_length: 512}
  - {name: capital, kind: model, source: "fake://script?france=Paris", context_length: 512}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    path = tmp_path / "service.yaml"
    path.write_text("experts: [experts.yaml]\nhost: {budget: 1GiB}\npolicies: {default: {expert: loud}}\n")
    return path


@dataclass
class Ended:
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """The command as the shell starts it, in this process."""

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["coe", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


def test_the_answer_is_on_stdout_who_and_why_on_stderr(config: Path) -> None:
    """In a separate process, through the installed command."""
    command = [sys.executable, "-c", "from coe.cli.entry import main; main()", "ask", "hello there", "-c", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "HELLO THERE\n")
    assert "loud (2 tokens" in done.stderr and "chosen by policy default" in done.stderr


def test_json_has_the_decision_and_leaves_stdout_to_it(config: Path) -> None:
    done = CliRunner().invoke(app, ["ask", "of France", "-c", str(config), "-m", "capital", "--json", "-"])
    result = json.loads(done.stdout)
    assert result["text"] == "Paris" and result["expert"] == "capital" and result["policy"] is None
    assert result["usage"] == {"prompt_tokens": 2, "completion_tokens": 1}
    assert result["decision"]["reason"] == "named by the request"


def test_the_question_may_come_from_stdin_with_a_system_message(config: Path) -> None:
    done = CliRunner().invoke(app, ["ask", "-", "-c", str(config), "--system", "be brief"], input="from a pipe")
    assert done.exit_code == 0 and done.stdout.startswith("FROM A PIPE")


def test_who_failed_and_who_was_asked_is_told_beside_the_answer(config: Path) -> None:
    with (config.parent / "experts.yaml").open("a") as file:
        file.write('  - {name: ill, kind: model, source: "fake://fail"}\n')
    policy = "{expert: capital, composition: {kind: chain, experts: [ill, capital, loud]}}"
    config.write_text(config.read_text().replace("{expert: loud}", policy))
    done = CliRunner().invoke(app, ["ask", "of France", "-c", str(config)])
    assert done.exit_code == 0 and "A DRAFT OF THE ANSWER:\nPARIS" in done.stdout
    assert "called: ill, capital, loud" in done.stderr and "fallback" not in done.stderr
    assert "note: ill failed: EngineError: 'ill' failed after 0 tokens" in " ".join(done.stderr.split())
    result = json.loads(CliRunner().invoke(app, ["ask", "of France", "-c", str(config), "--json", "-"]).stdout)
    assert result["asked"] == ["ill", "capital", "loud"] and len(result["notes"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "luod"], "'luod' is not in the registry; did you mean 'loud'?"),
        (["--model", "coe/fast"], "'fast' is not in the configured policies"),
        (["--cost-weight", "inf"], "cost_weight must be a finite number >= 0"),
        (["--allowed", "capital"], "capital"),
        (["--max-tokens", "600"], "max_tokens is 600, but 'loud' has a context of 512 tokens"),
    ],
)
def test_mistakes_get_one_clear_line_and_status_1(
    config: Path, arguments: list[str], message: str, run: Callable[..., Ended]
) -> None:
    done = run("ask", "hello", "--config", str(config), *arguments)
    assert done.status == 1 and done.stdout.strip() == ""
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_config_is_named(tmp_path: Path, run: Callable[..., Ended]) -> None:
    done = run("ask", "hello", "--config", str(tmp_path / "nope.yaml"))
    assert done.status == 1 and "nope.yaml" in done.stderr and "no such file" in done.stderr


def test_help_lists_every_command_and_version_prints_it() -> None:
    help_text = CliRunner().invoke(app, ["--help"]).stdout
    assert all(command in help_text for command in ("registry", "outcomes", "router", "route", "ask", "eval"))
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("coe 0.")


def test_an_interrupt_ends_with_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coe.cli.app.app", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_a_bug_of_ours_is_not_dressed_up_as_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("coe.cli.app.app", broken)
    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "-3"], "Input should be greater than or equal to 1"),
        (["--temperature", "9"], "Input should be less than or equal to 2"),
        (["--temperature", "nan"], "Input should be less than or equal to 2"),
        (["--cost-weight", "-1"], "Input should be greater than or equal to 0"),
    ],
)
def test_flags_out_of_range(config: Path, arguments: list[str], message: str, run: Callable[..., Ended]) -> None:
    done = run("ask", "hello", "--config", str(config), *arguments)
    shown = " ".join(done.stderr.replace("│", " ").split())
    assert done.status == 2 and done.stdout.strip() == "" and message in shown


def test_the_configuration_of_the_folder_is_the_default(
    config: Path, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    missing = " ".join(run("ask", "hello").stderr.replace("│", " ").split())
    assert "no coe.yaml here: `coe init` writes one, or name a configuration with --config" in missing
    config.rename("coe.yaml")
    assert run("ask", "hello").status == 0


def test_a_reader_that_leaves_ends_the_answer_quietly(config: Path) -> None:
    config.write_text(config.read_text() + "engines: {fake: {token_delay_s: 0.02}}\n")
    command = [sys.executable, "-c", "from coe.cli.entry import main; main()", "ask", "word " * 200, "-c", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(4) == b"WORD"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1


class Full(io.StringIO):
    """A stdout on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


class FullAtFlush(io.StringIO):
    """A stdout that buffers, on a full disk."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stdout", [Full, FullAtFlush])
def test_a_full_stdout_is_one_line(
    config: Path, stdout: type[io.StringIO], run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stdout())
    done = run("ask", "hello", "-c", str(config))
    assert done.status == 1
    assert done.stderr.splitlines()[-1] == "error: the output cannot be written: No space left on device"
    assert "Traceback" not in done.stderr


def test_a_result_that_cannot_be_written_names_its_file(config: Path, run: Callable[..., Ended]) -> None:
    done = run("ask", "hello", "-c", str(config), "--json", str(config.parent))
    assert done.status == 1 and f"error: {config.parent}: Is a directory" in done.stderr

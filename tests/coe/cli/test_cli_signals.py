"""SIGTERM ends a long command like Ctrl-C: finished work is kept, and the command that resumes is printed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from terminal import COE

EXPERTS = "experts:\n  - {name: slow, kind: model, source: 'fake://echo', context_length: 64}\n"
CONFIG = (
    "experts: [experts.yaml]\nengines: {fake: {token_delay_s: 0.2, capacity: 1}}\npolicies: {default: {expert: slow}}\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    (tmp_path / "coe.yaml").write_text(CONFIG)
    (tmp_path / "task.yaml").write_text("name: words\ndata: words.jsonl\ngrader: exact\n")
    rows = [f'{{"id": {i}, "prompt": "word{i}", "answer": "word{i}"}}\n' for i in range(40)]
    (tmp_path / "words.jsonl").write_text("".join(rows))
    return tmp_path


def start(folder: Path, *words: str, ignores_interrupts: bool = False) -> "subprocess.Popen[str]":
    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    return subprocess.Popen(
        [*COE, *words], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "COE_HOME": str(folder / "home")},
        preexec_fn=ignore if ignores_interrupts else None,
    )  # fmt: skip


def wait_for_answers(folder: Path, process: "subprocess.Popen[str]") -> None:
    answers = folder / "run" / "answers.jsonl"
    deadline = time.monotonic() + 60
    while not (answers.exists() and len(answers.read_text().splitlines()) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "status", "ignores_interrupts"),
    [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)],
    ids=["sigterm", "ctrl-c", "sigterm-in-a-background-job"],
)
def test_an_evaluation_ends_and_goes_on(
    folder: Path, number: signal.Signals, status: int, ignores_interrupts: bool
) -> None:
    words = ("eval", "--config", "coe.yaml", "--tasks", "task.yaml", "--out", "run")
    process = start(folder, *words, ignores_interrupts=ignores_interrupts)
    wait_for_answers(folder, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "interrupted: the answers so far are kept" in errors and "Traceback" not in errors
    resume = next(line for line in errors.splitlines() if line.strip().startswith("coe eval"))
    (folder / "coe.yaml").write_text(CONFIG.replace("0.2", "0.0"))
    again = start(folder, *resume.split()[1:])
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert "resuming: " in errors and (folder / "run" / "outcomes.parquet").exists()


def test_a_command_without_anything_to_keep_just_ends(folder: Path) -> None:
    (folder / "coe.yaml").write_text(CONFIG.replace("token_delay_s: 0.2", "load_delay_s: 30"))
    process = start(folder, "ask", "hello", "--config", "coe.yaml")
    time.sleep(4)
    assert process.poll() is None
    process.terminate()
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and output == ""
    assert errors.strip() == "interrupted", errors


def test_piped_output_has_no_progress_bars_and_no_escapes(folder: Path) -> None:
    (folder / "coe.yaml").write_text(CONFIG.replace("0.2", "0.0"))
    process = start(folder, "eval", "--config", "coe.yaml", "--tasks", "task.yaml", "--out", "run")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "\x1b" not in output + errors and "━" not in errors and sys.executable not in errors

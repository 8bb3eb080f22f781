"""Where results go: files, links, devices, and text that looks like markup."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from coe.cli.output import emit_json, show_answer, stdout_console


def test_a_fifo_is_written_to_and_stays(tmp_path: Path) -> None:
    fifo, read = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()), daemon=True)
    reader.start()
    emit_json({"answer": 42}, str(fifo))
    reader.join(10)
    assert fifo.is_fifo() and json.loads(read[0]) == {"answer": 42}


def test_a_link_stays_and_its_file_has_the_result(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real.json")
    emit_json([1], str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "real.json").read_text()) == [1]


def test_colons_are_not_emoji(capsys) -> None:
    stdout_console().print("a:b:c and :warning:")
    assert capsys.readouterr().out == "a:b:c and :warning:\n"


@pytest.mark.parametrize(
    ("is_terminal", "shown"),
    [(True, "a\tb\n\\x1b[2Jé\\x07\\x9b1m\\x0d"), (False, "a\tb\n\x1b[2Jé\x07\x9b1m\r")],
)
def test_a_terminal_does_not_act_on_the_text_of_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys, is_terminal: bool, shown: str
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    show_answer("a\tb\n\x1b[2Jé\x07\x9b1m\r")
    assert capsys.readouterr().out == shown

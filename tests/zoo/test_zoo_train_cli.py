"""`python -m examples.zoo.train`: what it refuses, and how an interrupted run of several adapters resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from examples.zoo import train as module
from examples.zoo.card import Score
from examples.zoo.plan import ADAPTERS, GENERALIST, RIVAL, Adapter

app = typer.Typer()
app.command()(module.main)
runner = CliRunner()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Path]]:
    """The trained adapters: name, steps, folder."""
    calls: list[tuple[str, int, Path]] = []

    def fake(adapter: Adapter, *, steps: int, out: Path, **_: Any) -> list[Score]:
        calls.append((adapter.name, steps, out))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [Score(family.name, 120, 0.9, None) for family in adapter.families]

    monkeypatch.setattr(module, "train_adapter", fake)
    return calls


def test_all_means_every_adapter_and_the_rival(trained: list[tuple[str, int, Path]]) -> None:
    first = runner.invoke(app, ["--all"])
    assert first.exit_code == 130
    assert "the same command goes on from here" in first.stderr
    names = list(ADAPTERS)
    assert [name for name, _, _ in trained] == names[:3]

    assert runner.invoke(app, ["--all"]).exit_code == 0
    assert [name for name, _, _ in trained[3:]] == [*names[2:], RIVAL]  # the third was not finished
    assert trained[-1] == (RIVAL, GENERALIST.steps, module.ZOO / "rival" / RIVAL)
    assert {folder for _, _, folder in trained[:-1]} == {module.ZOO / "adapters" / name for name in names}


def test_a_finished_command_starts_again(trained: list[tuple[str, int, Path]], tmp_path: Path) -> None:
    for _ in range(2):
        result = runner.invoke(app, ["--adapter", "sql", "--steps", "3", "--out", str(tmp_path)])
        assert result.exit_code == 0
        assert "sql: sql 90.0% (120 rows)" in result.stdout
    assert trained == [("sql", 3, tmp_path / "sql")] * 2


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--adapter", "sqll"], "no such adapter: sqll"), ([], "give --all")]
)
def test_nothing_is_trained_by_mistake(
    trained: list[tuple[str, int, Path]], arguments: list[str], message: str
) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert trained == []

"""`python -m examples.zoo.fresh`: which model answers which rows, and the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from engine_models import make_tokenizer, save_adapter, save_tiny_model
from typer.testing import CliRunner

from examples.zoo import fresh as module
from examples.zoo import train
from examples.zoo.families import FAMILIES, Row, Split
from examples.zoo.plan import RIVAL

app = typer.Typer()
app.command()(module.main)


class _Model:
    """Answers correctly with the adapter of the family; the rival and all bases answer incorrectly."""

    def __init__(self, adapter: str) -> None:
        self.adapter: str | None = adapter

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        name, self.adapter = self.adapter, None
        yield
        self.adapter = name


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, list[Row]]]:
    calls: list[tuple[str | None, list[Row]]] = []

    def answers(model: _Model, _: None, rows: Sequence[Row], *, max_tokens: int) -> list[str]:
        calls.append((model.adapter, list(rows)))
        return [row.target if model.adapter not in (None, RIVAL) else "no idea" for row in rows]

    def load(base: str, adapter: str) -> tuple[Any, None]:
        return _Model(adapter), None

    monkeypatch.setattr(module, "answers", answers)
    monkeypatch.setattr(module, "_load", load)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_base_has_the_type_that_the_cpu_multiplies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype
) -> None:
    save_tiny_model(tmp_path / "tiny", make_tokenizer())
    adapter = save_adapter(tmp_path / "lora", tmp_path / "tiny")
    monkeypatch.setattr(train, "fetch", lambda base, progress: tmp_path / base)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: dtype is torch.bfloat16)
    monkeypatch.setattr(module, "folder_of", lambda name: adapter)
    model, tokenizer = module._load("tiny", "lora")
    assert model.base_model.model.dtype is dtype
    assert tokenizer.chat_template


def test_every_adapter_and_the_rival_are_asked_the_same_fresh_rows(asked: list[tuple[str | None, list[Row]]]) -> None:
    result = CliRunner().invoke(app, ["--rows", "5", "--seed", "3"])
    assert result.exit_code == 0
    assert [name for name, _ in asked] == [who for name in FAMILIES for who in (name, RIVAL)]
    for (name, ours), (_, rivals) in zip(asked[::2], asked[1::2], strict=True):
        assert ours == rivals == FAMILIES[str(name)].rows(Split.FRESH, 5, seed=3)
    assert result.stdout.splitlines()[:3] == [
        "| family | adapter | rival |",
        "|---|---:|---:|",
        "| sql | 100.0% | 0.0% |",
    ]
    assert result.stdout.splitlines()[-1] == "| mean | 100.0% | 0.0% |"


def test_bases_are_scored_on_request(asked: list[tuple[str | None, list[Row]]]) -> None:
    result = CliRunner().invoke(app, ["--rows", "2", "--base"])
    assert result.exit_code == 0
    assert [name for name, _ in asked[:3]] == ["sql", None, RIVAL]
    assert "| family | adapter | base | rival |" in result.stdout
    assert "| units | 100.0% | 0.0% | 0.0% |" in result.stdout

"""The notes of peers: asked as in serving, kept on disk, shared, and missing where a peer's context is too short."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from composed_training import make_service
from transformers import AutoTokenizer

from coe.config import Config, load_config
from coe.engines.latent.notes import Notes
from coe.experts import open_snapshot
from coe.latent.training.answer_rows import AnswerRow
from coe.latent.training.peers import CollectedNotes, collect_notes
from registry.spec import ExpertSpec, Kind

ROWS = [AnswerRow(str(i), f"is w{i} or w{i + 1} it?", "yes", f"rows:{i}") for i in range(5)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config(make_service(tmp_path_factory.mktemp("service")))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def composed(**settings: Any) -> ExpertSpec:
    return ExpertSpec(
        name="composition",
        kind=Kind.COMPOSED,
        members=("base", "other", "one"),
        architecture="notes",
        source="out",
        settings={"max_answer_tokens": 4, **settings},
    )


def folder_of(service: Config) -> Path:
    return Path(open_snapshot(service).experts["base"].source).parent


def collected(service: Config, spec: ExpertSpec, rows: list[AnswerRow] = ROWS, calls: Any = None) -> CollectedNotes:
    progress = calls if calls is not None else []
    return collect_notes(spec, service, open_snapshot(service), rows, lambda *each: progress.append(each))


def test_every_peer_is_asked_about_every_row_and_only_once(service: Config) -> None:
    calls: list[Any] = []
    found = collected(service, composed(), calls=calls)
    assert [(what, done) for what, done, _ in calls] == [
        (f"notes of {peer}", done) for peer in ("other", "one") for done in range(6)
    ]
    notes = Notes.unpack(found.of(2, "other")[0].data)
    assert (notes.peer, notes.states.shape[2], notes.layers) == ("other", 24, ())  # type: ignore[union-attr]
    tokenizers = [AutoTokenizer.from_pretrained(folder_of(service) / name) for name in ("base", "other")]
    assert len({len(tokenizer("what is it?")["input_ids"]) for tokenizer in tokenizers}) == 2
    again: list[Any] = []
    assert collected(service, composed(), calls=again).of(2, "other") == found.of(2, "other")
    assert again == []


def test_other_settings_of_the_calls_are_asked_again(service: Config, home: Path) -> None:
    def n_files() -> int:
        return len(list(home.rglob("*.safetensors")))

    collected(service, composed())
    assert n_files() == 10
    collected(service, composed(shared_width=8))  # how notes are read does not matter
    assert n_files() == 10
    collected(service, composed(layers={"other": [2]}))
    assert n_files() == 15
    collected(service, composed(reads="prompt"))
    assert n_files() == 25


def test_a_peer_is_asked_in_its_own_wording_about_parts_of_the_text(service: Config) -> None:
    asks = {"other": {"template": "{match} =", "pattern": r"w\d"}}
    found = collected(service, composed(asks=asks), ROWS[:1])
    assert [left.span for left in found.of(0, "other")] == [(3, 5), (9, 11)]
    assert len(found.of(0, "one")) == 1


def test_a_peer_whose_context_is_exceeded_leaves_no_notes(
    service: Config, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    experts = yaml.safe_load((folder_of(service) / "experts.yaml").read_text())["experts"]
    experts[3]["context_length"] = 60  # of the second adapter
    (tmp_path / "experts.yaml").write_text(yaml.safe_dump({"experts": experts}))
    short = service.model_copy(update={"experts": (tmp_path / "experts.yaml",)})
    rows = [*ROWS[:2], AnswerRow("long", "z" * 60, "yes", "rows:9")]
    spec = composed().model_copy(update={"members": ("base", "second")})
    with caplog.at_level(logging.WARNING):
        found = collected(short, spec, rows)
    assert found.too_long == {"second": 1}
    assert [len(found.of(row, "second")) for row in range(3)] == [1, 1, 0]
    assert "1 of the calls to second exceed its context" in caplog.text

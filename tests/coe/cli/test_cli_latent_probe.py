"""`coe latent probe`: the table, the JSON, and errors, on a tiny model with planted knowledge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from engine_models import make_tokenizer
from planted_states import WORDS, class_of, save_planted
from typer.testing import CliRunner

from coe.cli.app import app
from coe.errors import ContextLengthExceeded, TaskError, UnknownModel, Unsupported


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_planted(tmp_path_factory.mktemp("planted"), make_tokenizer())


@pytest.fixture
def folder(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    experts: list[dict[str, Any]] = [
        {"name": "knows", "kind": "model", "source": str(planted)},
        {"name": "away", "kind": "remote", "source": "https://host.example/v1", "context_length": 100},
        {"name": "fake", "kind": "model", "source": "fake://echo", "context_length": 100},
    ]
    (tmp_path / "experts.yaml").write_text(yaml.safe_dump({"experts": experts}))
    config = {
        "experts": ["experts.yaml"],
        "engines": {"hf": {"device": "cpu", "dtype": "float32"}},
        "policies": {"default": {"expert": "knows"}},
    }
    (tmp_path / "coe.yaml").write_text(yaml.safe_dump(config))
    rows = [{"word": word, "told": f"{word} is", "label": class_of(word)} for word in WORDS]
    write_rows(tmp_path, *rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*words: str, expert: str = "knows") -> Result:
    return CliRunner().invoke(app, ["latent", "probe", "--expert", expert, "--rows", "rows.jsonl", *words])


def test_the_table_has_a_line_for_each_wording_and_a_reading(folder: Path) -> None:
    result = run("--raw", "--template", "{word}=", "--column", "told", "--template", "who?", "--layers", "1,4")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert "knows: 24 rows of 24 groups, 2 labels, 4 layers, raw text; 5 folds" in result.stdout
    header = next(line for line in lines if line[:1] == ["wording"])
    assert header == ["wording", "answer", "text", "last", "1/4", "mean", "1/4"]
    table = {line[0]: line for line in lines if line[:1] in (["{word}="], ["{told}"], ["who?"])}
    assert list(table) == ["{word}=", "who?", "{told}"]
    own = table["{word}="]
    assert own[1] == "100" and own[4] == "100" and own[-1] == "readable"
    assert table["who?"][-2:] == ["not", "readable"]
    assert "accuracy in %; chance 50, majority 50" in result.stdout
    assert "Readable at the last prompt token, layer 4 of 4 of '{word}='" in result.stdout
    assert "24 rows: the intervals are wide" in result.stderr


def test_the_json_has_every_cell(folder: Path) -> None:
    result = run("--raw", "--template", "{word}=", "--folds", "4", "--repeats", "2", "--seed", "3", "--json", "-")
    document = json.loads(result.stdout)
    assert document["expert"] == "knows" and document["raw"] and document["labels"] == {"x": 12, "y": 12}
    assert document["settings"] == {
        "layers": [2, 3, 4],
        "places": ["last", "span", "mean"],
        "folds": 4,
        "repeats": 2,
        "seed": 3,
    }
    [wording] = document["wordings"]
    cells = {(cell["place"], cell["layer"]): cell["found"] for cell in wording["cells"]}
    assert len(cells) == 9 and cells["span", 2]["accuracy"] == 1.0 > cells["last", 2]["accuracy"]
    assert wording["best"]["layer"] == 4 and wording["verdict"] == "readable"
    assert 0 < wording["best"]["found"]["low"] < wording["best"]["found"]["high"] == 1.0
    assert document["reading"].startswith("Readable at")
    assert "wording" not in result.stderr


def test_a_chat_template_and_chosen_places(folder: Path) -> None:
    result = run("--template", "{word}", "--places", "span,last", "--layers", "4", "--json", "out.json")
    assert result.exit_code == 0, result.output
    assert "chat template" in result.stdout
    document = json.loads((folder / "out.json").read_text())
    assert document["settings"]["places"] == ["last", "span"] and not document["raw"]
    assert document["wordings"][0]["best"]["found"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--template", "{word}", "--layers", "one"], "'one' is not a list of layers"),
        (["--template", "{word}", "--places", "first"], "no place 'first'; there are last, span, mean"),
        ([], "the rows have no field `prompt`, but word, told, label"),
        (["--template", "{word}", "--folds", "1"], "--folds"),
    ],
)
def test_wrong_options_are_usage_errors(folder: Path, words: list[str], text: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("expert", "error", "text"),
    [
        ("away", Unsupported, "endpoint, which returns no hidden states"),
        ("fake", Unsupported, "it has no weights"),
        ("know", UnknownModel, "did you mean 'knows'"),
    ],
)
def test_experts_that_have_no_states(folder: Path, expert: str, error: type[Exception], text: str) -> None:
    result = run("--template", "{word}", expert=expert)
    assert result.exit_code == 1
    assert isinstance(result.exception, error) and text in str(result.exception)


def test_rows_that_cannot_be_probed(folder: Path) -> None:
    result = run("--template", "{word}", "--limit", "1")
    assert isinstance(result.exception, TaskError) and "all rows have the label 'x'" in str(result.exception)
    result = run("--template", "{nothing}", expert="away")  # before the expert is looked at
    assert isinstance(result.exception, TaskError) and "rows.jsonl:1: there is no field 'nothing'" in str(
        result.exception
    )
    write_rows(folder, *({"prompt": f"{word} " * 200, "label": class_of(word)} for word in WORDS))
    result = run()
    assert isinstance(result.exception, ContextLengthExceeded) and "rows.jsonl:1: " in str(result.exception)
    write_rows(folder, *({"prompt": " ", "label": class_of(word), "word": word} for word in WORDS))
    result = run()
    assert isinstance(result.exception, TaskError) and "rows.jsonl:1: " in str(result.exception)

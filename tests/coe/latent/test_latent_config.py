"""The YAML of a training and its rows: every problem with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coe.errors import TaskError
from coe.latent.config import TrainConfig, read_train_file, trainer_class
from coe.latent.training.answer_rows import AnswerRow, check_apart, read_answer_rows, rows_digest
from registry.documents import parse_document, validate
from registry.errors import InvalidSpec

GOOD = """\
preset: notes
config: service.yaml
members: [general, sql]
train: rows/train.jsonl
valid: rows/valid.jsonl
out: out
"""


def config(text: str, folder: Path) -> TrainConfig:
    return validate(parse_document(text, folder / "train.yaml"), TrainConfig)


def test_paths_start_at_the_file(tmp_path: Path) -> None:
    read = config(GOOD, tmp_path)
    assert (read.config, read.train, read.out) == (
        tmp_path / "service.yaml",
        tmp_path / "rows/train.jsonl",
        tmp_path / "out",
    )
    assert (read.training.steps, read.training.learning_rate, read.training.keep) == (240, 3e-3, 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("notes", "note"), r"train.yaml:1: preset: 'note' is no preset.*did you mean 'notes'"),
        (GOOD.replace("[general, sql]", "[general]"), "train.yaml:3: members: .*at least 2 items"),
        (GOOD.replace("[general, sql]", "[sql, sql]"), "train.yaml:3: members: .*given twice: sql"),
        (GOOD.replace("out: out\n", ""), "train.yaml:1: out: is required"),
        (GOOD + "more: 1\n", "train.yaml:7: more: is not a known field"),
        (GOOD + "training:\n  steps: 0\n", "train.yaml:8: training.steps: .*greater than or equal to 1"),
        (GOOD + "training:\n  keep: .nan\n", "train.yaml:8: training.keep: .*finite"),
        (GOOD + "training:\n  learning_rat: 0.1\n", "train.yaml:8: .*did you mean 'learning_rate'"),
    ],
)
def test_problems_name_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        config(text, tmp_path)


def rows(path: Path, *lines: object, fewest: int = 1) -> tuple[AnswerRow, ...]:
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    )
    return read_answer_rows(path, fewest=fewest)


def row(name: object = "a", prompt: str = "1 + 1 =", answer: str = "2", **more: object) -> dict[str, object]:
    return {"id": name, "prompt": prompt, "answer": answer, **more}


def test_rows_are_read_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    read = rows(path, row(), "", row(7, "a\u2028b", domain="x"))
    assert [(each.id, each.place) for each in read] == [("a", f"{path}:1"), ("7", f"{path}:3")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row(answer=" \n"), "rows.jsonl:2: answer: is empty"),
        (row(prompt=""), "rows.jsonl:2: prompt: .*at least 1 character"),
        ({"id": "b", "prompt": "x"}, "rows.jsonl:2: answer: is required$"),
        ({"id": "b", "prompt": "x", "anwser": "2"}, "answer: is required; 'anwser': did you mean 'answer'?"),
        ({"id": "b", "promtp": "x", "answer": "2"}, "prompt: is required; 'promtp': did you mean 'prompt'?"),
        (row(float("nan")), r"rows.jsonl:2: id: input should be a valid string, got nan \(quote it in JSON\)"),
        ('{"id": 1e999, "prompt": "x", "answer": "2"}', r"id: .* got inf \(quote it in JSON\)"),
        (row(None), "rows.jsonl:2: id: "),
        ("{", "rows.jsonl:2: is not JSON"),
        ("[1]", "rows.jsonl:2: "),
        (row("a"), "rows.jsonl:2: id 'a' is also that of line 1"),
    ],
)
def test_wrong_lines_are_refused(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        rows(tmp_path / "rows.jsonl", row("a"), line)


def test_too_few_rows_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="has 2 rows; a training needs 8 to 1,000,000"):
        rows(tmp_path / "rows.jsonl", row("a"), row("b"), fewest=8)
    with pytest.raises(TaskError, match="there is no such file"):
        read_answer_rows(tmp_path / "none.jsonl", fewest=1)
    with pytest.raises(TaskError, match="a folder"):
        read_answer_rows(tmp_path, fewest=1)


def test_many_wrong_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"\.\.\. and 5 more"):
        rows(tmp_path / "rows.jsonl", *[row(str(number), answer="") for number in range(25)])


def test_validation_rows_are_not_trained_on(tmp_path: Path) -> None:
    train = rows(tmp_path / "train.jsonl", row("a"), row("b", "2 + 2 ="))
    check_apart(train, rows(tmp_path / "valid.jsonl", row("a", "3 + 3 =")))
    with pytest.raises(TaskError, match=r"valid.jsonl:1: the prompt is also that of .*train.jsonl:2 \(1 of 1"):
        check_apart(train, rows(tmp_path / "valid.jsonl", row("z", "2 + 2 =")))


def test_the_digest_of_rows_is_of_their_texts_and_order(tmp_path: Path) -> None:
    one, two = row("a"), row("b", "x", "y")
    digest = rows_digest(rows(tmp_path / "1.jsonl", one, two))
    assert digest == rows_digest(rows(tmp_path / "2.jsonl", {**one, "id": "z"}, two))
    assert digest != rows_digest(rows(tmp_path / "3.jsonl", two, one))
    joined = row("a", one["prompt"][:-1], f"={one['answer']}")  # type: ignore[index]
    assert digest != rows_digest(rows(tmp_path / "4.jsonl", joined, two))


def test_settings_are_those_of_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(GOOD + "settings:\n  interactions: 2\n")
    assert read_train_file(path).settings.interactions == 2
    path.write_text(GOOD + "settings:\n  interaction: 2\n")
    with pytest.raises(InvalidSpec, match="train.yaml:8: settings.interaction: .*did you mean 'interactions'"):
        read_train_file(path)


def test_the_documentation_lists_the_settings_of_each_preset_with_their_defaults() -> None:
    text = (Path(__file__).parents[3] / "docs" / "latent.md").read_text(encoding="utf-8")
    header, _, *lines = text.partition("| setting | `notes` |")[2].partition("\n\n")[0].split("\n")
    presets = ["notes", *(name.strip(" `") for name in header.strip(" |").split("|"))]
    table = {cells[0].strip(" `"): [each.strip() for each in cells[1:]] for cells in map(_cells, lines)}
    assert presets == ["notes", "notes-prompt", "cache", "mot"]
    for column, preset in enumerate(presets):
        model = trainer_class(preset).settings
        stated = {name: cells[column] for name, cells in table.items() if cells[column]}
        assert stated.keys() == model.model_fields.keys(), preset
        for name, default in model().model_dump(mode="json").items():
            if isinstance(default, str | int | bool) and not stated[name].startswith("the default"):
                assert stated[name].strip("`").split(",")[0] == str(default).replace("True", "true"), (preset, name)
            assert (default is None) == stated[name].startswith("none"), (preset, name)


def _cells(line: str) -> list[str]:
    return line.strip().strip("|").split("|")

"""Labelled rows and their wordings: texts, spans, and every problem at its line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from coe.errors import TaskError
from coe.latent.probe import rows as module
from coe.latent.probe.rows import LabelledRow, Wording, read_rows


def write(tmp_path: Path, *rows: Any) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def one(tmp_path: Path, **fields: Any) -> LabelledRow:
    [row] = read_rows(write(tmp_path, fields))
    return row


def test_the_label_is_the_field_label_else_the_answer(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "p", "label": 7, "answer": "seven"}, "", {"prompt": "q", "answer": " eight "})
    first, second = read_rows(file)
    assert (first.label, first.answer, first.place) == ("7", "seven", f"{file}:1")
    assert (second.label, second.answer, second.place) == ("eight", "eight", f"{file}:3")
    assert [row.label for row in read_rows(file, label="prompt")] == ["p", "q"]


def test_groups_are_stated_or_the_word_or_the_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "label": "1", "group": 5, "word": "w"},
        {"prompt": "a", "label": "1", "word": "w"},
        {"prompt": "other", "label": "1", "word": "w"},
        {"prompt": "a", "label": "1"},
    ]
    groups = [row.group for row in read_rows(write(tmp_path, *rows))]
    assert groups[1] == groups[2] and len(set(groups)) == 3


def test_a_wording_fills_fields_and_knows_where_the_word_is(tmp_path: Path) -> None:
    row = one(tmp_path, word="nabox", other="zot", label="7")
    prompt = Wording("{other} plus {word} = ").prompt(row)
    assert (prompt.text, prompt.span, prompt.name) == ("zot plus nabox = ", (9, 14), row.place)
    assert Wording("{other} {not a field}{").prompt(one(tmp_path, other="x", label="7")).text == "x {not a field}{"


def test_a_wording_is_not_a_format_string(tmp_path: Path) -> None:
    row = one(tmp_path, word="{label}", label="7")
    assert Wording("{word}").prompt(row).text == "{label}"
    with pytest.raises(TaskError, match="no field"):
        Wording("{missing}").prompt(row)
    assert Wording("{word.__class__}{label}").prompt(row).text == "{word.__class__}7"


def test_texts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = one(tmp_path, word="abc", label="7")
    monkeypatch.setattr(module, "MOST_TEXT", 9)
    assert Wording("{word}" * 3).prompt(row).text == "abcabcabc"
    with pytest.raises(TaskError, match="more than 9 characters"):
        Wording("{word}" * 4).prompt(row)


def test_the_word_is_found_as_a_whole_word(tmp_path: Path) -> None:
    row = one(tmp_path, prompt="Tim and Ti are here", word="Ti", label="a")
    assert Wording.of_column("prompt").prompt(row).span == (8, 10)
    assert Wording.of_column("prompt").prompt(one(tmp_path, prompt="Tim", word="Ti", label="a")).span is None


def test_a_span_is_of_the_field_prompt(tmp_path: Path) -> None:
    row = one(tmp_path, prompt="Is it red?", span=[6, 9], label="a")
    prompt = Wording("Q: {prompt}").prompt(row)
    assert prompt.span is not None and prompt.text[slice(*prompt.span)] == "red"
    for span in ([3, 3], [-1, 2], [0, 11], [0], "ab", [0, 1.0], [True, 2]):
        with pytest.raises(TaskError, match=r"`span` must be \[start, end\]"):
            one(tmp_path, prompt="Is it red?", span=span, label="a")


def test_every_problem_is_reported_with_its_line(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"prompt": "fine", "label": "a"},
        "{",
        "[]",
        {"prompt": "p"},
        {"prompt": "p", "label": " "},
        {"prompt": "p", "label": ["a"]},
        {"prompt": "p", "label": "a" * 201},
        '{"prompt": "p", "label": "\\ud83d"}',
        "[" * 100_000,
        '{"label": 1' + "0" * 5000 + "}",
        {"prompt": "p", "anwser": "a"},
        {"prompt": "p", "lable": "a"},
        {"prompt": "p", "label": "a", "answer": " "},
        '{"prompt": "p", "label": NaN}',
        '{"prompt": "p", "label": 1e999}',
    )
    with pytest.raises(TaskError) as caught:
        read_rows(file)
    lines = str(caught.value).split("\n")
    expected = ["JSON", "object", "no field 'label'", "empty", "must be a text", "201 characters", "surrogate", "JSON"]
    expected += [
        "digits",
        "there is no field 'label' or 'answer'; the row has 'prompt', 'anwser'; 'anwser': did you mean 'answer'?",
        "'lable': did you mean 'label'?",
        "'answer' is empty: state what the expert should answer, or leave it out",
        "'label' is not a finite number, but nan: leave it out, or quote it in JSON",
        "'label' is not a finite number, but inf",
    ]
    for number, (line, text) in enumerate(zip(lines, expected, strict=True), 2):
        assert line.startswith(f"{file}:{number}: ") and text in line, line


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, *({"prompt": f"p{i}", "label": "a"} for i in range(5)))
    monkeypatch.setattr(module, "MOST_ROWS", 5)
    assert len(read_rows(file)) == 5 and len(read_rows(file, limit=3)) == 3
    monkeypatch.setattr(module, "MOST_ROWS", 4)
    with pytest.raises(TaskError, match="more than 4 rows; --limit 4"):
        read_rows(file)
    assert len(read_rows(file, limit=4)) == 4
    monkeypatch.setattr(module, "MOST_BYTES", 3 * len(file.read_bytes()) // 5)
    assert len(read_rows(file, limit=3)) == 3
    with pytest.raises(TaskError, match=r"rows\.jsonl:4: the rows so far have more than \d+ bytes; use --limit"):
        read_rows(file, limit=4)
    monkeypatch.setattr(module, "MOST_LINE_BYTES", 20)
    with pytest.raises(TaskError, match=r"rows\.jsonl:1: the line has more than 20 bytes"):
        read_rows(file)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_and_an_empty_text_are_errors(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(TaskError, match="no rows"):
        read_rows(file)
    with pytest.raises(TaskError, match="gives an empty text"):
        Wording.of_column("prompt").prompt(one(tmp_path, prompt=" ", label="a"))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_rows(tmp_path / "nowhere.jsonl")
    file = tmp_path / "latin.jsonl"
    file.write_bytes('{"prompt": "é", "label": "a"}'.encode("latin-1"))
    with pytest.raises(TaskError, match="not UTF-8"):
        read_rows(file)


def test_the_rows_of_the_zoo_can_be_probed() -> None:
    rows = read_rows(Path(__file__).parents[3] / "examples" / "zoo" / "probe" / "continents.jsonl")
    assert len({row.group for row in rows}) == len(rows) == 136
    assert min(Counter(row.label for row in rows).values()) >= 20
    assert Wording("Where is {word}?").prompt(rows[0]).text == "Where is China?"


def test_a_long_name_is_cut_in_messages(tmp_path: Path) -> None:
    with pytest.raises(TaskError) as caught:
        read_rows(write(tmp_path, {"prompt": "p"}), label="x" * 100_000)
    assert len(str(caught.value)) < 1000

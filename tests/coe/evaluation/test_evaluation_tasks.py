"""Tasks: what a YAML and a JSONL file mean, and the errors of broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coe.errors import TaskError
from coe.evaluation.tasks import find_tasks, load_task
from routers.base import Message

ROWS = [{"id": "a", "prompt": "2 + 2?", "answer": 4}, {"id": "b", "prompt": "3 + 3?", "answer": 6, "note": "kept"}]
REPOSITORY = Path(__file__).resolve().parents[3]


def write(folder: Path, yaml: str, rows: list[Any] | str = ROWS, name: str = "sums") -> Path:  # type: ignore[assignment]
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(yaml, encoding="utf-8")
    return path


YAML = "name: sums\ndata: sums.jsonl\ngrader: number\n"


def refusal(path: Path) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(path)
    return str(caught.value)


def test_a_task_is_a_yaml_and_a_jsonl_file(tmp_path: Path) -> None:
    asking = 'domain: maths\nmax_tokens: 8\nstop: ["\\n", ";"]\nsystem: Be brief.\n'
    task = load_task(write(tmp_path, YAML + asking + "grader_options: {take: first}\nlicense: MIT\n"))
    assert (task.name, task.domain, task.max_tokens, task.stop) == ("sums", "maths", 8, ("\n", ";"))
    assert [row.id for row in task.rows] == ["a", "b"]
    assert task.rows[0].messages == (Message("system", "Be brief."), Message("user", "2 + 2?"))
    assert task.rows[1].prompt == "3 + 3?" and task.rows[1].fields["note"] == "kept"
    assert task.grader.grade("4, not 5", task.rows[0].fields) == 1
    assert [row.id for row in task.head(1).rows] == ["a"] and task.head(None) is task


def test_conversations_keep_their_own_system_message(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Own."}, {"role": "user", "content": "2?"}]
    chat = [*turns, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "3?"}]
    rows = [{"id": 1, "messages": chat, "answer": 3}, {"id": 2, "messages": chat[1:], "answer": 3}]
    first, second = load_task(write(tmp_path, YAML + "system: Given.\n", rows)).rows
    assert first.id == "1" and first.prompt == "3?"
    assert [message.content for message in first.messages] == ["Own.", "2?", "Yes", "3?"]
    assert [message.content for message in second.messages] == ["Given.", "2?", "Yes", "3?"]


def test_domain_is_the_name_where_none_is_given(tmp_path: Path) -> None:
    assert load_task(write(tmp_path, YAML)).domain == "sums"


def test_blank_lines_and_line_separators_inside_strings_are_no_rows(tmp_path: Path) -> None:
    rows = '\n{"id": "a", "prompt": "2\u2028+ 2?", "answer": 4}\r\n\n'
    assert [row.prompt for row in load_task(write(tmp_path, YAML, rows)).rows] == ["2\u2028+ 2?"]


def test_digest_is_that_of_the_content(tmp_path: Path) -> None:
    base = load_task(write(tmp_path / "a", YAML)).digest
    assert base.startswith("sha256:")
    assert load_task(write(tmp_path / "b", YAML + "description: other\nlicence: MIT\n")).digest == base
    changes = ["max_tokens: 9", "system: x", "domain: x", "stop: [x]", "grader_options: {take: first}"]
    digests = {load_task(write(tmp_path / str(n), YAML + f"{line}\n")).digest for n, line in enumerate(changes)}
    digests |= {load_task(write(tmp_path / "c", YAML, ROWS[:1])).digest, base}
    assert len(digests) == len(changes) + 2


def test_every_bad_row_is_named_with_its_line(tmp_path: Path) -> None:
    rows = "\n".join(
        [
            '{"id": "a", "prompt": "?", "answer": 1}',
            '{"id": "b", "prompt": "?" "answer": 1}',
            '{"id": "c", "prompt": "?"}',
            '{"id": "a", "prompt": "?", "answer": 1}',
            '{"id": "d", "answer": 1}',
            '{"id": "e", "prompt": "?", "messages": [{"role": "user", "content": "?"}], "answer": 1}',
            '{"id": "f", "messages": [{"role": "assistant", "content": "?"}], "answer": 1}',
            '{"id": "g", "messages": [{"role": "robot", "content": "?"}], "answer": 1}',
            '{"id": "h", "prompt": "?", "answer": "one"}',
            "[1]",
            '{"prompt": "?", "answer": 1}',
        ]
    )
    told = refusal(write(tmp_path, YAML, rows)).split("\n")
    data = f"task 'sums': {tmp_path / 'sums.jsonl'}"
    assert [line.partition(": is not JSON")[0] for line in told[:1]] == [f"{data}:2"]
    assert told[1] == f"{data}:3: answer: is required"
    assert told[2] == f"{data}:4: id 'a' is also that of line 1"
    assert told[3] == f"{data}:5: give either `prompt` or `messages`"
    assert told[4] == f"{data}:6: give either `prompt` or `messages`"
    assert told[5] == f"{data}:7: `messages` has no user message"
    assert told[6].startswith(f"{data}:8: messages[0].role: ")
    assert told[7] == f"{data}:9: `answer` must hold one number, not 'one'"
    assert told[8].startswith(f"{data}:10: ")
    assert told[9] == f"{data}:11: id: is required"
    assert len(told) == 10


def test_rows_of_a_data_frame_keep_the_text_of_their_ids(tmp_path: Path) -> None:
    rows = "\n".join(
        [
            '{"id": 1.0, "prompt": "2 + 2?", "messages": NaN, "answer": 4.0, "note": NaN}',
            '{"id": 2, "prompt": null, "messages": [{"role": "user", "content": "?"}], "answer": 5}',
            '{"id": "3.0", "prompt": "?", "answer": 5}',
        ]
    )
    task = load_task(write(tmp_path, YAML, rows))
    assert [row.id for row in task.rows] == ["1", "2", "3.0"] and "note" not in task.rows[0].fields
    assert task.grader.grade("4", task.rows[0].fields) == 1


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"id": 1.5, "prompt": "?", "answer": 1}', "id: must be a string that is not empty, or an integer; got the"),
        ('{"id": NaN, "prompt": "?", "answer": 1}', "id: is required"),
        ('{"id": null, "prompt": "?", "answer": 1}', "id: is missing"),
        ('{"id": true, "prompt": "?", "answer": 1}', "id: must be a string that is not empty, or an integer; got a"),
        ('{"id": "a", "prompt": "?", "answer": NaN}', "answer: is required"),
    ],
)
def test_what_a_data_frame_cannot_mean_is_refused_with_its_line(row: str, told: str, tmp_path: Path) -> None:
    assert f"sums.jsonl:1: {told}" in refusal(write(tmp_path, YAML, row))


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, YAML, "x\n" * 25)).endswith("... and 5 more")


def test_a_broken_gold_query_is_named_with_task_and_row(tmp_path: Path) -> None:
    rows = [{"id": "q", "prompt": "?", "answer": "SELECT x FROM t", "schema_sql": "CREATE TABLE t (a);"}]
    told = refusal(write(tmp_path, YAML.replace("number", "sql"), rows))
    assert told == f"task 'sums': {tmp_path / 'sums.jsonl'}:1: the right query cannot be run: no such column: x"


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        (YAML.replace("number", "numbr"), "sums.yaml:3: grader: there is no grader 'numbr'; did you mean 'number'?"),
        (YAML.replace("number", "magic"), "there are: exact, contains, number, choice, json, sql"),
        (YAML + "max_tokns: 3\n", "sums.yaml:4: max_tokns: is not a known field; did you mean 'max_tokens'?"),
        (YAML + "max_tokens: -3\n", "sums.yaml:4: max_tokens: "),
        (
            YAML + "grader_options:\n  tak: last\n",
            "sums.yaml:5: grader_options.tak: is not a known field; did you mean",
        ),
        (YAML.replace("data: sums.jsonl\n", ""), "data: is required"),
        (YAML.replace("sums.jsonl", "gone.jsonl"), "sums.yaml:2: data: there is no such file: "),
        ("name: [", "sums.yaml:1: is not YAML"),
        (YAML.replace("name: sums", "name: a b"), "sums.yaml:1: name: "),
    ],
)
def test_a_broken_yaml_is_an_error_with_its_place(yaml: str, told: str, tmp_path: Path) -> None:
    assert told in refusal(write(tmp_path, yaml))


def test_data_must_hold_readable_rows(tmp_path: Path) -> None:
    assert "there is no row in this file" in refusal(write(tmp_path, YAML, "\n\n"))
    path = write(tmp_path, YAML)
    (tmp_path / "sums.jsonl").write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in refusal(path)
    assert "there is no such file" in refusal(tmp_path / "gone.yaml")


def test_tasks_are_found_by_name_file_and_folder(tmp_path: Path) -> None:
    write(tmp_path / "one", YAML)
    other = write(tmp_path / "two", YAML.replace("sums", "more"), name="more")
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "none"]
    assert [task.name for task in find_tasks("more, sums,sums", folders)] == ["more", "sums"]
    assert [task.name for task in find_tasks(str(other), [])] == ["more"]
    assert [task.name for task in find_tasks(str(tmp_path / "one"), [])] == ["sums"]
    with pytest.raises(TaskError, match=r"no task 'mre' .*did you mean 'more'"):
        find_tasks("mre", folders)
    with pytest.raises(TaskError, match=r"there are: sums, more|there are: more, sums"):
        find_tasks("xyz", folders)
    with pytest.raises(TaskError, match="no task is named"):
        find_tasks(" , ", folders)
    with pytest.raises(TaskError, match="there is no task"):
        (tmp_path / "empty").mkdir()
        find_tasks(str(tmp_path / "empty"), [])
    copy = write(tmp_path / "three", YAML, name="sums")
    with pytest.raises(TaskError, match="'sums' is also that of"):
        find_tasks(f"sums,{copy}", folders)


def test_shipped_tasks_load() -> None:
    tasks = find_tasks(str(REPOSITORY / "configs" / "tasks"), [])
    assert {task.name: len(task.rows) for task in tasks} == {"arithmetic": 20, "capitals": 20}

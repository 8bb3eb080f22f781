"""Results: sorted by id, each id once, the same bytes for any split; and OpenAI's format."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from coe.batch import results as module
from coe.batch.records import RoutedRow, describe
from coe.batch.results import FINAL, Result, merge, read_note, result, write_run
from coe.errors import EngineError, InvalidRequest
from coe.runs.storage import Folder
from coe.types import Answer, GenerateRequest, Usage
from routers.base import Message, RoutingDecision

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def record(line: int, id: str, endpoint: str | None = CHAT) -> Result:  # noqa: A002
    decision = RoutingDecision(("a",), (1.0,), (0.9,), 0.75, label="sums", reason="best")
    request = GenerateRequest(messages=(Message("user", "hi"),))
    row = RoutedRow(line, id, "auto", endpoint, request, policy="default", decision=decision)
    return result(row, Answer("a", f"answer {line}", "stop", Usage(3, 2), 0.5))


def write(folder: Folder, parts: Sequence[Sequence[Result]]) -> list[str]:
    names = [f"{i}.arrows" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        ordered = sorted(part, key=lambda r: (r["id"], r["line"]))
        write_run(folder, name, ordered, note=name.encode())
        assert read_note(folder, name) == name.encode()
    return names


def merged(folder: Folder) -> list[Result]:
    with folder.open("results.parquet") as file:
        table = pq.read_table(file)
    assert table.schema.equals(FINAL)
    rows: list[Result] = table.to_pylist()
    return rows


@pytest.mark.parametrize("fan_in", [2, 3, 100])
def test_parts_merge_into_one_sorted_file_whatever_the_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fan_in: int
) -> None:
    monkeypatch.setattr(module, "FAN_IN", fan_in)
    monkeypatch.setattr(module, "RUN_ROWS", 3)
    rows = [record(line, f"id-{line * 7919 % 100:03d}") for line in range(1, 101)]
    folder, other = Folder.of(str(tmp_path / "a")), Folder.of(str(tmp_path / "b"))
    told: list[int] = []
    counts = merge(folder, write(folder, [rows[i::7] for i in range(7)]), lines=True, on_rows=told.append)
    assert [row["id"] for row in merged(folder)] == sorted(row["id"] for row in rows)
    assert (counts.rows, counts.experts, counts.errors) == (100, {"a": 100}, {}) and sum(told) == 100
    assert (counts.prompt_tokens, counts.completion_tokens, counts.cost_usd) == (300, 200, 50)
    merge(other, write(other, [rows]), lines=True)
    for name in ("results.parquet", "results.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_part_without_rows_is_no_trouble(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path))
    assert merge(folder, write(folder, [[], [record(1, "a")], []]), lines=False).rows == 1
    assert not folder.exists("results.jsonl")


def test_the_first_row_of_an_id_keeps_it_the_later_ones_are_errors(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path))
    counts = merge(folder, write(folder, [[record(9, "same")], [record(2, "same"), record(5, "same")]]), lines=True)
    first, second, third = merged(folder)
    assert (first["line"], first["answer"], first["error"]) == (2, "answer 2", None)
    assert (second["line"], second["answer"], second["expert"]) == (5, None, None)
    assert third["error"] == {
        "message": "line 9: the id 'same' is that of line 2 already",
        "type": "invalid_request_error",
        "param": None,
        "code": "duplicate_id",
    }
    assert counts.errors == {"duplicate_id": 2}
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["response"]["status_code"] for line in lines] == [200, 400, 400]
    assert len({line["id"] for line in lines}) == 3


def test_a_result_has_the_expert_and_the_reason() -> None:
    assert record(1, "x") == {
        "id": "x",
        "line": 1,
        "model": "auto",
        "policy": "default",
        "expert": "a",
        "answer": "answer 1",
        "reasoning": None,
        "tool_calls": None,
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "usage_estimated": False,
        "cost_usd": 0.5,
        "confidence": 0.75,
        "label": "sums",
        "reason": "best",
        "truncated": False,
        "notes": [],
        "answers": None,
        "error": None,
        "status": 200,
        "endpoint": CHAT,
        "logprobs": None,
        "prompt_logprobs": None,
    }


def test_openai_lines_are_what_the_endpoint_would_have_sent(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path))
    refused = result(RoutedRow(3, "c", "auto", CHAT, error=describe(InvalidRequest("no"))), None)
    down = result(RoutedRow(4, "d", "auto", CHAT, GenerateRequest(prompt="x")), EngineError("down"))
    corrupt = result(RoutedRow(5, "e", "auto", None, error=describe(InvalidRequest("line 5: is not JSON"))), None)
    rows = [record(1, "a"), record(2, "b", COMPLETIONS), refused, down, corrupt]
    merge(folder, write(folder, [rows]), lines=True)
    chat, text, bad, failed, no_request = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert chat["custom_id"] == "a" and chat["error"] is None and chat["response"]["status_code"] == 200
    body = chat["response"]["body"]
    assert (body["object"], body["model"], body["created"]) == ("chat.completion", "a", 0)
    assert body["choices"][0]["message"]["content"] == "answer 1"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert chat["id"].removeprefix("batch_req_") == body["id"].removeprefix("chatcmpl-")
    assert text["response"]["body"]["choices"][0]["text"] == "answer 2"
    assert bad["response"]["status_code"] == 400 and bad["response"]["body"]["error"]["message"] == "no"
    assert failed["response"]["status_code"] == 500 and failed["error"] is None
    assert no_request["response"] is None
    assert no_request["error"] == {"code": "invalid_request", "message": "line 5: is not JSON"}

"""Lines of the input: the request in each, or the error and its place."""

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
from pydantic import BaseModel

from coe.batch.rows import InputRow, parse_row
from coe.batch.source import RawRow, read, scan
from coe.errors import CoeError
from coe.protocol import fields
from coe.protocol.table_values import INTEGERS
from routers.base import Message

EXPERTS = ("geo", "sql")


def parse(row: Any, number: int = 7) -> InputRow:
    content = row if isinstance(row, bytes | dict) else json.dumps(row).encode()
    return parse_row(RawRow(number, content), "auto", EXPERTS)


def as_json(row: Any) -> bytes:
    return json.dumps(row).encode()


CHAT = {"model": "geo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


def test_an_openai_line_for_each_endpoint() -> None:
    row = parse(as_json({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}))
    assert (row.id, row.model, row.endpoint, row.error) == ("a", "geo", "/v1/chat/completions", None)
    assert row.request is not None and row.request.messages == (Message("user", "hi"),)
    assert (row.request.max_tokens, row.request.stream, row.request.seed) == (5, False, None)
    text = {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"model": "auto", "prompt": "Once"}}
    completion = parse(as_json(text)).request
    assert completion is not None and completion.prompt == "Once" and not completion.messages


def test_a_plain_prompt_is_one_user_message_and_takes_the_fields_of_a_chat_request() -> None:
    row = parse(as_json({"id": 3, "prompt": "hi", "temperature": 0.5, "seed": 9, "model": "sql"}))
    assert (row.id, row.model, row.endpoint) == ("3", "sql", None)
    assert row.request is not None and row.query is not None
    assert row.request.messages == (Message("user", "hi"),) and row.query.text == "hi"
    assert (row.request.temperature, row.request.seed) == (0.5, 9)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    told = parse(as_json({"messages": messages})).request
    assert told is not None and [m.role for m in told.messages] == ["system", "user"]


def test_missing_ids_are_line_numbers_that_sort_as_the_input_does() -> None:
    ids = [parse(as_json({"prompt": "x"}), number).id for number in (2, 10, 100_000)]
    assert ids == ["line-0000000002", "line-0000000010", "line-0000100000"] == sorted(ids)


def test_a_sampled_row_has_a_seed_of_its_own_that_does_not_change() -> None:
    seeds = [parse(as_json({"id": name, "prompt": "x", "temperature": 1})).request for name in ("a", "a", "b")]
    values = [request.seed for request in seeds if request is not None]
    assert values[0] == values[1] != values[2] and None not in values


def test_parquet_rows_have_nulls_for_what_is_not_given() -> None:
    row = parse({"id": None, "prompt": "hi", "messages": None, "max_tokens": None, "model": None})
    assert row.error is None and (row.id, row.model) == ("line-0000000007", "auto")
    body = {**CHAT, "messages": [{"role": "user", "content": "hi", "name": None}], "stop": None}
    nested = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    assert parse(nested).error is None
    assert parse({**nested, "body": json.dumps(CHAT)}).request == parse(nested).request


def test_ineffective_fields_are_named_and_allowed_experts_are_kept() -> None:
    row = parse(
        as_json({"prompt": "x", "user": "me", "coe": {"experts": ["geo"], "deadline_s": 3, "cost_weight": 2.0}})
    )
    assert row.error is None and set(row.ignored) == {"user", "coe.deadline_s"}
    assert row.query is not None and row.query.allowed == {"geo"} and row.query.cost_weight == 2.0
    assert row.request is not None and row.request.deadline_s is None
    without = parse(as_json({"prompt": "x", "coe": {"exclude": ["geo"]}}))
    assert without.query is not None and without.query.allowed == {"sql"}


URL = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{not json", "line 7: is not JSON"),
        (b'{"prompt": "\xff"}', "line 7: is not UTF-8: .* at byte 12"),
        (b'{"prompt": "\\ud800"}', "line 7: is not Unicode text"),
        (b"[1, 2]", "line 7: is not a JSON object but an array"),
        (b'"text"', "not a JSON object but a string"),
        (b"[" * 100_000, "line 7: is not JSON"),
        (as_json({"id": "a"}), "either prompt or messages"),
        (as_json({"prompt": "a", "messages": []}), "either prompt or messages"),
        (as_json({"prompt": 3}), "prompt must be a string, got a number"),
        (as_json({"prompt": "a", "id": ""}), "id .* must be a string that is not empty"),
        (as_json({"prompt": "a", "id": True}), "got a boolean"),
        (as_json({"prompt": "a", "model": 3}), "model must be a string"),
        (as_json({"prompt": "a", "max_token": 3}), "did you mean 'max_tokens'"),
        (as_json({"prompt": "a", "max_tokens": "many"}), "max_tokens"),
        (as_json({"prompt": "a", "temperature": 7}), "temperature"),
        (as_json({"prompt": "a", "stream": True}), "stream: a batch writes whole answers"),
        (as_json({"prompt": "a", "n": 2}), "n: 2 is not supported in a batch, only 1: repeat the row"),
        (as_json({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": ["a", "b"]}}), "prompt: several prom"),
        (as_json({"prompt": "a", "coe": {"experts": ["gei"]}}), "did you mean 'geo'"),
        (as_json({"custom_id": "a", "url": URL}), "body must be an object, got null"),
        (as_json({"custom_id": "a", "url": URL, "body": 3}), "body must be an object, got a number"),
        (as_json({"custom_id": "a", "url": "/v1/embeddings", "body": CHAT}), "url must be one of"),
        (as_json({"custom_id": "a", "url": URL, "method": "GET", "body": CHAT}), "method must be 'POST', got 'GET'"),
        (as_json({"custom_id": "a", "url": URL, "body": CHAT, "extra": 1}), "unknown field 'extra'"),
    ],
)
def test_an_error_names_its_line(row: bytes, message: str) -> None:
    error = parse(row).error
    assert isinstance(error, CoeError)
    with pytest.raises(CoeError, match=message):
        raise error
    assert str(error).startswith("line 7: ")


def test_a_wrong_line_keeps_its_id_where_it_has_one() -> None:
    assert parse(as_json({"id": "mine", "prompt": 3})).id == "mine"
    assert parse(as_json({"custom_id": "mine", "url": URL, "body": {}})).id == "mine"
    assert parse(b"{").id == "line-0000000007"


def test_a_huge_line_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.batch.rows._MOST_BYTES", 100)
    assert "has 200 bytes; a row may have 100" in str(parse(b"x" * 200).error)


@pytest.mark.parametrize("as_line", [True, False], ids=["JSONL", "Parquet"])
def test_rows_of_a_data_frame_are_taken_as_they_were_meant(as_line: bool) -> None:
    """A column of integers with a gap is a column of floats in pandas, and the gap is NaN."""
    row: dict[str, Any] = {
        "id": 1.0,
        "prompt": "hi",
        "messages": None,
        "max_tokens": 20.0,
        "seed": 3.0,
        "n": 1.0,
        "temperature": float("nan"),
        "model": float("nan"),
        "stop": float("nan"),
        "coe": {"seed": 5.0, "experts": None, "cost_weight": float("nan")},
    }
    parsed = parse(as_json(row) if as_line else row)
    assert parsed.error is None and parsed.request is not None and parsed.query is not None
    assert (parsed.id, parsed.model) == ("1", "auto")
    assert (parsed.request.max_tokens, parsed.request.seed, parsed.request.temperature) == (20, 3, 0.0)
    assert parsed.query.seed == 5 and parsed.query.cost_weight is None
    line = {"custom_id": 7.0, "method": "POST", "url": URL, "body": {**CHAT, "max_tokens": 5.0, "seed": float("nan")}}
    batch = parse(as_json(line) if as_line else line)
    assert batch.error is None and batch.request is not None and batch.id == "7"
    assert (batch.request.max_tokens, batch.request.seed) == (5, None)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (1, "1"),
        (1.0, "1"),
        (-3.0, "-3"),
        ("1.0", "1.0"),
        ("007", "007"),
        (12345678901234567, "12345678901234567"),
        (float(2**53), str(2**53)),
        (Decimal("12"), "12"),
        (float("nan"), "line-0000000007"),
        (None, "line-0000000007"),
    ],
)
def test_ids_keep_their_text(given: object, text: str) -> None:
    row = parse({"id": given, "prompt": "x"})
    assert (row.id, row.error) == (text, None)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (1.5, "the number 1.5"),
        (float(2**53) + 2, "the number 9007199254740994.0"),
        (float("inf"), "the number inf"),
        (True, "a boolean"),
        ("", "a string"),
        (datetime(2026, 1, 2), "a time"),
        (b"a", "bytes"),
        ([1], "an array"),
    ],
)
def test_an_id_that_is_no_whole_number_is_refused_with_its_line(given: object, why: str) -> None:
    error = parse({"id": given, "prompt": "x"}).error
    assert error is not None and str(error).startswith("line 7: id (custom_id) must be a string") and why in str(error)


@pytest.mark.parametrize("wrong", [20.5, float("inf"), True, "20", float(2**60)])
def test_a_limit_that_is_no_whole_number_is_refused(wrong: object) -> None:
    error = parse({"prompt": "x", "max_tokens": wrong}).error
    assert error is not None and "line 7: " in str(error) and "max_tokens" in str(error)


def test_every_whole_number_of_a_request_may_be_a_float() -> None:
    models: tuple[type[BaseModel], ...] = (fields.ChatFields, fields.CompletionFields, fields.Extension)
    numbers = {
        name for model in models for name, field in model.model_fields.items() if "int" in repr(field.annotation)
    }
    assert numbers - {"coe"} and numbers - INTEGERS - {"coe", "prompt", "messages"} == set()


def test_a_data_frame_round_trip(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        [
            {"custom_id": 1, "prompt": "a", "max_tokens": np.int64(4), "user": pd.Timestamp("2026-01-01")},
            {"custom_id": 2, "prompt": "b", "seed": np.int32(9)},
        ]
    ).rename(columns={"custom_id": "id"})
    frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True, date_format="iso")
    frame.to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        source = scan(str(tmp_path / name), 10)
        rows = [parse_row(raw, "auto", EXPERTS) for _, raws in read(source, source.splits) for raw in raws]
        requests = [row.request for row in rows if row.request is not None]
        assert [row.id for row in rows] == ["1", "2"] and [row.error for row in rows] == [None, None]
        assert [(request.max_tokens, request.seed) for request in requests] == [(4, None), (None, 9)]

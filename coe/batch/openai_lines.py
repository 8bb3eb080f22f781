"""Results in OpenAI's batch format: one line for each request, with the response of the endpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from coe.batch.pieces import result_pieces
from coe.batch.records import usage_of
from coe.batch.rows import COMPLETIONS
from coe.protocol.answers import ChatAnswer, TextAnswer
from coe.types import Answer

CREATED = 0
"""`created` of every response: the same input gives the same file at any time."""


def batch_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of OpenAI's batch output for a result (`results.RESULTS`).

    A failed request has a response with status and error; an input line that is no request has no response.
    """
    token = hashlib.sha256(f"{record['line']}:{record['id']}".encode()).hexdigest()[:24]
    line: dict[str, Any] = {"id": f"batch_req_{token}", "custom_id": record["id"], "response": None, "error": None}
    if record["error"] is None:
        body = _body(record, token)
    elif record["endpoint"] is None:
        return line | {"error": {"code": record["error"]["code"], "message": record["error"]["message"]}}
    else:
        body = {"error": record["error"]}
    return line | {"response": {"status_code": record["status"], "request_id": f"req_{token}", "body": body}}


def _body(record: Mapping[str, Any], token: str) -> dict[str, Any]:
    bodies = TextAnswer if record["endpoint"] == COMPLETIONS else ChatAnswer
    usage = usage_of(record)
    answer = Answer(record["expert"], record["answer"], record["finish_reason"], usage, **result_pieces(record))
    return bodies(token, CREATED, record["expert"]).whole(answer) | _explained(record)


def _explained(record: Mapping[str, Any]) -> dict[str, Any]:
    """The field `coe` of the endpoint: the notes and, if the row requests them, the experts' answers."""
    if not record["notes"] and record["answers"] is None:
        return {}
    answers = {} if record["answers"] is None else {"answers": [_as_sent(each) for each in record["answers"]]}
    return {"coe": {"notes": record["notes"], **answers}}


def _as_sent(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An expert's answer as the endpoint sends it: Parquet has nulls for an answer without tool calls, or estimates."""
    usage = answer["usage"]
    sent = {name: value for name, value in answer.items() if name != "tool_calls" or value is not None}
    return {**sent, "usage": usage and {name: value for name, value in usage.items() if value is not None}}

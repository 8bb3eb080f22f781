"""Results as OpenAI writes them: a line a request, with the response it would have got from the endpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from coe.batch.rows import COMPLETIONS
from coe.protocol.responses import ChatAnswer, TextAnswer, usage_body
from coe.types import Answer, Usage

CREATED = 0
"""`created` of every response: the same input gives the same file, whenever it is answered."""


def batch_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of OpenAI's batch output for a result (`results.RESULTS`).

    A request that failed has a response with its status and error; a line that was no request has no response.
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
    usage = Usage(record["prompt_tokens"], record["completion_tokens"])
    answer = Answer(record["expert"], record["answer"], record["finish_reason"], usage)
    return bodies(token, CREATED, record["expert"]).whole(answer) | _explained(record)


def _explained(record: Mapping[str, Any]) -> dict[str, Any]:
    """The field `coe`, as the endpoint has it: the notes, and, where the row asks for them, the experts' answers."""
    if not record["notes"] and record["answers"] is None:
        return {}
    said = {} if record["answers"] is None else {"answers": [_said(answer) for answer in record["answers"]]}
    return {"coe": {"notes": record["notes"], **said}}


def _said(answer: Mapping[str, Any]) -> dict[str, Any]:
    """One of `coe.protocol.responses.answers_body`, from a row of the column `answers`."""
    tokens = (answer["prompt_tokens"], answer["completion_tokens"])
    usage = None if answer["error"] is not None else usage_body(Usage(*tokens))
    said = {name: answer[name] for name in ("call", "expert", "text", "finish_reason")}
    return {**said, "usage": usage, "cost_usd": answer["cost_usd"], "error": answer["error"]}

"""Reasoning, tool calls and log-probabilities of answers, as columns of part files and results."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from coe.protocol.answers import tool_calls_body
from coe.protocol.decision import json_number
from coe.types import Answer, TokenLogprob
from routers.base import ToolCall

PIECES: Final = [(name, pa.string()) for name in ("reasoning", "tool_calls", "logprobs", "prompt_logprobs")]
"""Columns of an answer in a part file. All but `reasoning` are JSON; what an answer does not have is null."""
TOOL_CALLS: Final = pa.list_(
    pa.struct(
        [
            ("id", pa.string()),
            ("type", pa.string()),
            ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
        ]
    )
)
"""Tool calls in OpenAI's form, in results."""


def pieces_record(answer: Answer) -> dict[str, Any]:
    """The columns `PIECES`."""
    calls = [[call.id, call.name, call.arguments] for call in answer.tool_calls]
    return {
        "reasoning": answer.reasoning or None,
        "tool_calls": json.dumps(calls, ensure_ascii=False) if calls else None,
        "logprobs": _tokens_text(answer.logprobs),
        "prompt_logprobs": _tokens_text(answer.prompt_logprobs),
    }


def pieces_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `Answer`; part files of earlier versions lack the columns."""
    return {
        "reasoning": record.get("reasoning") or "",
        "tool_calls": tuple(ToolCall(*call) for call in json.loads(record.get("tool_calls") or "[]")),
        "logprobs": _tokens(record.get("logprobs")),
        "prompt_logprobs": _tokens(record.get("prompt_logprobs")),
    }


def result_columns(answer: Answer) -> dict[str, Any]:
    """The columns of a result; log-probabilities as in a part file, from which `results.jsonl` is written."""
    calls = tool_calls_body(answer.tool_calls) or None
    return pieces_record(answer) | {"tool_calls": calls}


def result_pieces(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `Answer` from the columns of a result."""
    calls = tuple(ToolCall(call["id"], **call["function"]) for call in record.get("tool_calls") or ())
    return pieces_of({**record, "tool_calls": None}) | {"tool_calls": calls}


def _tokens_text(tokens: Sequence[TokenLogprob]) -> str | None:
    if not tokens:
        return None
    documents = [
        [token.token, json_number(token.logprob), _data_text(token.data), [_top(*one) for one in token.top]]
        for token in tokens
    ]
    return json.dumps(documents, ensure_ascii=False, separators=(",", ":"))


def _tokens(text: str | None) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token,
            None if logprob is None else float(logprob),
            _data(data),
            tuple((each, float(number), _data(inner)) for each, number, inner in top),
        )
        for token, logprob, data, top in json.loads(text or "[]")
    )


def _top(token: str, logprob: float, data: bytes | None) -> list[Any]:
    return [token, json_number(logprob), _data_text(data)]


def _data_text(data: bytes | None) -> str | None:
    return None if data is None else b64encode(data).decode()


def _data(text: str | None) -> bytes | None:
    return None if text is None else b64decode(text)

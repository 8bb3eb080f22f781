"""JSON schemas of what `/v1/responses` returns (`response_output`, `response_events`), for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from coe.protocol.response_schemas import COE, COUNT, TEXT, TEXT_OR_NULL, list_of, object_of, ref

_STATUS: Final = {"enum": ["in_progress", "completed", "incomplete"]}
_INDEX: Final = {
    "output_index": {**COUNT, "description": "Of the item in `output`"},
    "content_index": {**COUNT, "description": "Of the part in the content of the item"},
}
_TOKEN: Final = {"token": TEXT, "logprob": {"type": "number"}, "bytes": list_of(COUNT)}
_LOGPROBS: Final = list_of(
    object_of("A token", {**_TOKEN, "top_logprobs": list_of(object_of("A likely token", _TOKEN))})
)
_TEXT_PART: Final = object_of(
    "Text of the answer",
    {
        "type": {"const": "output_text"},
        "text": TEXT,
        "annotations": {"type": "array", "maxItems": 0},
        "logprobs": _LOGPROBS,
    },
)
_REASONING_PART: Final = object_of(
    "Reasoning, as the model wrote it", {"type": {"const": "reasoning_text"}, "text": TEXT}
)
_ITEM: Final = {
    "anyOf": [
        object_of(
            "The message",
            {
                "id": TEXT,
                "type": {"const": "message"},
                "role": {"const": "assistant"},
                "content": list_of(_TEXT_PART),
                "status": _STATUS,
            },
        ),
        object_of(
            "A call of a function; its result is an item `function_call_output` with the same `call_id`",
            {
                "id": TEXT,
                "type": {"const": "function_call"},
                "call_id": TEXT,
                "name": TEXT,
                "arguments": {"type": "string", "description": "JSON text"},
                "status": _STATUS,
            },
        ),
        object_of(
            "Reasoning",
            {
                "id": TEXT,
                "type": {"const": "reasoning"},
                "summary": {"type": "array", "maxItems": 0},
                "content": list_of(_REASONING_PART),
                "status": _STATUS,
            },
        ),
    ]
}
_USAGE: Final = object_of(
    "Tokens; `estimated` is present where an endpoint reports none. Cached and reasoning tokens are not counted: 0",
    {
        "input_tokens": COUNT,
        "input_tokens_details": object_of("Of the input", {"cached_tokens": COUNT, "cache_write_tokens": COUNT}),
        "output_tokens": COUNT,
        "output_tokens_details": object_of("Of the output", {"reasoning_tokens": COUNT}),
        "total_tokens": COUNT,
        "estimated": {"const": True},
    },
    "estimated",
)
_OR_NULL: Final = {"type": "null"}
RESPONSE_SCHEMAS: Final[Mapping[str, Any]] = {
    "Response": object_of(
        "An answer. Fields of the request are repeated with the values that were in effect",
        {
            "id": TEXT,
            "object": {"const": "response"},
            "created_at": COUNT,
            "completed_at": {"type": ["integer", "null"]},
            "status": {"enum": ["in_progress", "completed", "incomplete", "failed"]},
            "error": {"anyOf": [object_of("Why it failed", {"code": TEXT, "message": TEXT}), _OR_NULL]},
            "incomplete_details": {
                "anyOf": [object_of("Why it is incomplete", {"reason": TEXT_OR_NULL}), _OR_NULL],
                "description": "`max_output_tokens` or `content_filter`",
            },
            "model": {"type": "string", "description": "The expert that answers"},
            "output": list_of(ref("ResponseItem")),
            "usage": {"anyOf": [_USAGE, _OR_NULL]},
            "background": {"const": False},
            "instructions": TEXT_OR_NULL,
            "max_output_tokens": {"type": ["integer", "null"]},
            "max_tool_calls": _OR_NULL,
            "metadata": {"type": "object", "additionalProperties": TEXT},
            "parallel_tool_calls": {"type": "boolean"},
            "previous_response_id": _OR_NULL,
            "reasoning": object_of("How much it reasons", {"effort": TEXT_OR_NULL, "summary": _OR_NULL}),
            "store": {"const": False},
            "temperature": {"type": "number"},
            "text": object_of("The format of the text", {"format": {"type": "object"}}),
            "tool_choice": {"type": ["string", "object"]},
            "tools": list_of({"type": "object"}),
            "top_logprobs": COUNT,
            "top_p": {"type": "number"},
            "truncation": {"const": "disabled"},
            "coe": COE,
        },
        "coe",
    ),
    "ResponseItem": {"description": "A message, a call of a function, or reasoning", **_ITEM},
    "ResponseChunk": object_of(
        "An event of a stream. By `type` it has the response, an item, a part of one, or a piece of text or arguments",
        {
            "type": {"type": "string", "description": "Such as `response.output_text.delta`"},
            "sequence_number": {**COUNT, "description": "Counts the events of a stream from 0"},
            "response": ref("Response"),
            "item": ref("ResponseItem"),
            "item_id": TEXT,
            **_INDEX,
            "part": {"anyOf": [_TEXT_PART, _REASONING_PART]},
            "delta": TEXT,
            "text": TEXT,
            "logprobs": _LOGPROBS,
            "name": TEXT,
            "arguments": TEXT,
            "code": TEXT_OR_NULL,
            "message": TEXT,
            "param": TEXT_OR_NULL,
            "error": {"type": "object", "description": "Of the event `error`: the same as one object"},
        },
        *("response", "item", "item_id", *_INDEX, "part", "delta", "text", "logprobs", "name", "arguments"),
        *("code", "message", "param", "error"),
    ),
}
"""Name -> schema."""

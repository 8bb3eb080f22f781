"""JSON schemas of the response bodies, for the OpenAPI document. `coe.protocol.responses` writes the bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_TEXT: Final = {"type": "string"}
_TEXT_OR_NULL: Final = {"type": ["string", "null"]}
_COUNT: Final = {"type": "integer", "minimum": 0}
_NUMBER_OR_NULL: Final = {"type": ["number", "null"]}
_NAMES: Final = {"type": "array", "items": _TEXT}


def _object(description: str, properties: Mapping[str, Any], *optional: str, others: bool = False) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
        "additionalProperties": others,
    }


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": dict(items)}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [dict(schema), {"type": "null"}]}


_REASON: Final = {"enum": ["stop", "length", "tool_calls", "cancelled"]}
_FUNCTION: Final = _object("The function and its arguments, as JSON text", {"name": _TEXT, "arguments": _TEXT})
_CALL: Final = _object("A call of a tool", {"id": _TEXT, "type": {"const": "function"}, "function": _FUNCTION})
_CALL_PIECE: Final = _object(
    "A piece of a call: texts of one `index` are joined",
    {"index": _COUNT, "id": _TEXT, "type": {"const": "function"}, "function": {**_FUNCTION, "required": []}},
    "id",
    "type",
)
_TOKEN: Final = {
    "token": _TEXT,
    "logprob": _NUMBER_OR_NULL,
    "bytes": {"anyOf": [_list({"type": "integer", "minimum": 0, "maximum": 255}), {"type": "null"}]},
}
_CHAT_LOGPROBS: Final = _object(
    "Log-probabilities of the generated tokens, and of the most likely ones at their places",
    {
        "content": _or_null(
            _list(_object("A token", {**_TOKEN, "top_logprobs": _list(_object("A likely token", _TOKEN))}))
        ),
        "refusal": {"type": "null"},
    },
    "refusal",
)
_LOGPROBS: Final = _object(
    "By token: text, log-probability, the most likely tokens, and the place of its text",
    {
        "tokens": _NAMES,
        "token_logprobs": _list(_NUMBER_OR_NULL),
        "top_logprobs": _or_null(_list(_or_null({"type": "object", "additionalProperties": {"type": "number"}}))),
        "text_offset": _list(_COUNT),
    },
)
_ABOUT: Final = {
    "id": _TEXT,
    "object": _TEXT,
    "created": {"type": "integer", "description": "Seconds since the epoch"},
    "model": {"type": "string", "description": "The expert that answers"},
}
_COE: Final = {
    "type": "object",
    "description": "On request (`coe.answers`, `x-coe-debug`): notes, the answer of each expert, the decision, cost",
}
_MESSAGE: Final = _object(
    "The answer",
    {
        "role": {"const": "assistant"},
        "content": _TEXT_OR_NULL,
        "refusal": {"type": "null"},
        "reasoning_content": _TEXT,
        "tool_calls": _list(_CALL),
    },
    "reasoning_content",
    "tool_calls",
)
_DELTA: Final = _object(
    "A piece of the answer",
    {
        "role": {"const": "assistant"},
        "content": _TEXT_OR_NULL,
        "refusal": {"type": "null"},
        "reasoning_content": _TEXT,
        "tool_calls": _list(_CALL_PIECE),
    },
    "role",
    "content",
    "refusal",
    "reasoning_content",
    "tool_calls",
)


def _choice(description: str, parts: Mapping[str, Any], logprobs: Mapping[str, Any], *, last: bool) -> dict[str, Any]:
    reason = _REASON if last else _or_null(_REASON)
    return _object(
        description,
        {"index": _COUNT, **parts, "logprobs": _or_null(logprobs), "finish_reason": reason},
    )


def _answer(description: str, choice: Mapping[str, Any], *, chunk: bool) -> dict[str, Any]:
    usage = _or_null(_ref("Usage")) if chunk else _ref("Usage")
    optional = ("coe", "usage") if chunk else ("coe",)
    return _object(description, {**_ABOUT, "choices": _list(choice), "usage": usage, "coe": _COE}, *optional)


_VECTOR: Final = {"anyOf": [_list({"type": "number"}), _TEXT]}
SCHEMAS: Final[Mapping[str, Any]] = {
    "Embeddings": _object(
        "The vectors of the inputs, in their order",
        {
            "object": {"const": "list"},
            "data": _list(
                _object(
                    "A vector: numbers, or base64",
                    {"object": {"const": "embedding"}, "index": _COUNT, "embedding": _VECTOR},
                )
            ),
            "model": _TEXT,
            "usage": _object("Tokens of all inputs", {"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
            "coe": {"type": "object", "description": "With `x-coe-debug: true`."},
        },
        "coe",
    ),
    "ChatCompletion": _answer(
        "The answers to a conversation",
        _choice("An answer", {"message": _MESSAGE}, _CHAT_LOGPROBS, last=True),
        chunk=False,
    ),
    "ChatCompletionChunk": _answer(
        "A piece of the answers", _choice("A piece", {"delta": _DELTA}, _CHAT_LOGPROBS, last=False), chunk=True
    ),
    "Completion": _answer("The continuations", _choice("One", {"text": _TEXT}, _LOGPROBS, last=True), chunk=False),
    "CompletionChunk": _answer(
        "A piece of them", _choice("A piece", {"text": _TEXT}, _LOGPROBS, last=False), chunk=True
    ),
    "Usage": _object(
        "Tokens; `estimated` is present where an endpoint reports none",
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "estimated": {"const": True},
        },
        "estimated",
    ),
    "Model": _object(
        "A value of `model`; `coe` has kind, context length, price, capabilities and `residence` of an expert",
        {"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT, "coe": {"type": "object"}},
    ),
    "ModelList": _object("The models", {"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "Route": _object(
        "A routing decision and its inputs",
        {
            "model": _TEXT,
            "object": {"const": "coe.route"},
            "id": _TEXT,
            "policy": _TEXT_OR_NULL,
            "decision": {"type": "object", "description": "The experts in the order of their calls, and why"},
            "estimate": {
                "description": "By expert: expected quality (score in [0, 1]) and cost (USD); null if none was made",
                "type": ["object", "null"],
            },
            "allowed": _NAMES,
            "removed": {"type": "object", "description": "Expert -> the constraint that excludes it"},
            "doubtful": {"type": "object", "description": "Expert -> the constraint that may exclude it"},
            "prompt_tokens": {"type": "object", "additionalProperties": _COUNT},
            "router_digest": _TEXT_OR_NULL,
            "registry_version": {"type": "integer"},
        },
        others=True,
    ),
    "Health": _object(
        "The state of the service",
        {"status": {"enum": ["ok", "unavailable"]}, "problem": _TEXT_OR_NULL},
        others=True,
    ),
    "HostList": _object(
        "What each expert host reports",
        {
            "object": {"enum": ["coe.load", "coe.unload", "coe.residency"]},
            "hosts": _list(
                {"type": "object", "description": "Its pool, and the weights in memory, loaded or unloaded"}
            ),
            "experts": _NAMES,
        },
        "experts",
    ),
    "Error": _object(
        "An error in OpenAI's form",
        {
            "error": _object(
                "What was wrong, where, and what to do",
                {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL},
            )
        },
    ),
}
"""Name -> schema."""

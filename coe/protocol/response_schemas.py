"""JSON schemas of the response bodies, for the OpenAPI document. `coe.protocol.responses` writes the bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

TEXT: Final = {"type": "string"}
TEXT_OR_NULL: Final = {"type": ["string", "null"]}
COUNT: Final = {"type": "integer", "minimum": 0}
_NUMBER_OR_NULL: Final = {"type": ["number", "null"]}
_NAMES: Final = {"type": "array", "items": TEXT}


def object_of(description: str, properties: Mapping[str, Any], *optional: str, others: bool = False) -> dict[str, Any]:
    """An object with these properties; all but the `optional` ones are required."""
    return {
        "type": "object",
        "description": description,
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
        "additionalProperties": others,
    }


def list_of(items: Mapping[str, Any]) -> dict[str, Any]:
    """An array."""
    return {"type": "array", "items": dict(items)}


def ref(name: str) -> dict[str, str]:
    """A schema of the document, by name."""
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [dict(schema), {"type": "null"}]}


_REASON: Final = {"enum": ["stop", "length", "tool_calls", "cancelled"]}
_FUNCTION: Final = object_of("The function and its arguments, as JSON text", {"name": TEXT, "arguments": TEXT})
_CALL: Final = object_of("A call of a tool", {"id": TEXT, "type": {"const": "function"}, "function": _FUNCTION})
_CALL_PIECE: Final = object_of(
    "A piece of a call: texts of one `index` are joined",
    {"index": COUNT, "id": TEXT, "type": {"const": "function"}, "function": {**_FUNCTION, "required": []}},
    "id",
    "type",
)
_TOKEN: Final = {
    "token": TEXT,
    "logprob": _NUMBER_OR_NULL,
    "bytes": {"anyOf": [list_of({"type": "integer", "minimum": 0, "maximum": 255}), {"type": "null"}]},
}
_CHAT_LOGPROBS: Final = object_of(
    "Log-probabilities of the generated tokens, and of the most likely ones at their places",
    {
        "content": _or_null(
            list_of(object_of("A token", {**_TOKEN, "top_logprobs": list_of(object_of("A likely token", _TOKEN))}))
        ),
        "refusal": {"type": "null"},
    },
    "refusal",
)
_LOGPROBS: Final = object_of(
    "By token: text, log-probability, the most likely tokens, and the place of its text",
    {
        "tokens": _NAMES,
        "token_logprobs": list_of(_NUMBER_OR_NULL),
        "top_logprobs": _or_null(list_of(_or_null({"type": "object", "additionalProperties": {"type": "number"}}))),
        "text_offset": list_of(COUNT),
    },
)
_ABOUT: Final = {
    "id": TEXT,
    "object": TEXT,
    "created": {"type": "integer", "description": "Seconds since the epoch"},
    "model": {"type": "string", "description": "The expert that answers"},
}
COE: Final = {
    "type": "object",
    "description": "On request (`coe.answers`, `x-coe-debug`): notes, the answer of each expert, the decision, cost",
}
_MESSAGE: Final = object_of(
    "The answer",
    {
        "role": {"const": "assistant"},
        "content": TEXT_OR_NULL,
        "refusal": {"type": "null"},
        "reasoning_content": TEXT,
        "tool_calls": list_of(_CALL),
    },
    "reasoning_content",
    "tool_calls",
)
_DELTA: Final = object_of(
    "A piece of the answer",
    {
        "role": {"const": "assistant"},
        "content": TEXT_OR_NULL,
        "refusal": {"type": "null"},
        "reasoning_content": TEXT,
        "tool_calls": list_of(_CALL_PIECE),
    },
    "role",
    "content",
    "refusal",
    "reasoning_content",
    "tool_calls",
)


def _choice(description: str, parts: Mapping[str, Any], logprobs: Mapping[str, Any], *, last: bool) -> dict[str, Any]:
    reason = _REASON if last else _or_null(_REASON)
    return object_of(
        description,
        {"index": COUNT, **parts, "logprobs": _or_null(logprobs), "finish_reason": reason},
    )


def _answer(description: str, choice: Mapping[str, Any], *, chunk: bool) -> dict[str, Any]:
    usage = _or_null(ref("Usage")) if chunk else ref("Usage")
    optional = ("coe", "usage") if chunk else ("coe",)
    return object_of(description, {**_ABOUT, "choices": list_of(choice), "usage": usage, "coe": COE}, *optional)


_VECTOR: Final = {"anyOf": [list_of({"type": "number"}), TEXT]}
SCHEMAS: Final[Mapping[str, Any]] = {
    "Embeddings": object_of(
        "The vectors of the inputs, in their order",
        {
            "object": {"const": "list"},
            "data": list_of(
                object_of(
                    "A vector: numbers, or base64",
                    {"object": {"const": "embedding"}, "index": COUNT, "embedding": _VECTOR},
                )
            ),
            "model": TEXT,
            "usage": object_of("Tokens of all inputs", {"prompt_tokens": COUNT, "total_tokens": COUNT}),
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
    "Completion": _answer("The continuations", _choice("One", {"text": TEXT}, _LOGPROBS, last=True), chunk=False),
    "CompletionChunk": _answer(
        "A piece of them", _choice("A piece", {"text": TEXT}, _LOGPROBS, last=False), chunk=True
    ),
    "Usage": object_of(
        "Tokens; `estimated` is present where an endpoint reports none",
        {
            "prompt_tokens": COUNT,
            "completion_tokens": COUNT,
            "total_tokens": COUNT,
            "estimated": {"const": True},
        },
        "estimated",
    ),
    "Model": object_of(
        "A value of `model`; `coe` has kind, context length, price, capabilities and `residence` of an expert",
        {"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT, "coe": {"type": "object"}},
    ),
    "ModelList": object_of("The models", {"object": {"const": "list"}, "data": list_of(ref("Model"))}),
    "Route": object_of(
        "A routing decision and its inputs",
        {
            "model": TEXT,
            "object": {"const": "coe.route"},
            "id": TEXT,
            "policy": TEXT_OR_NULL,
            "decision": {"type": "object", "description": "The experts in the order of their calls, and why"},
            "estimate": {
                "description": "By expert: expected quality (score in [0, 1]) and cost (USD); null if none was made",
                "type": ["object", "null"],
            },
            "utility": {
                "description": "The weights of cost, latency and switches, and `experts`: the utility of each",
                "type": ["object", "null"],
            },
            "allowed": _NAMES,
            "removed": {"type": "object", "description": "Expert -> the constraint that excludes it"},
            "doubtful": {"type": "object", "description": "Expert -> the constraint that may exclude it"},
            "prompt_tokens": {"type": "object", "additionalProperties": COUNT},
            "router_digest": TEXT_OR_NULL,
            "registry_version": {"type": "integer"},
        },
        others=True,
    ),
    "Health": object_of(
        "The state of the service",
        {"status": {"enum": ["ok", "unavailable"]}, "problem": TEXT_OR_NULL},
        others=True,
    ),
    "HostList": object_of(
        "What each expert host reports",
        {
            "object": {"enum": ["coe.load", "coe.unload", "coe.residency"]},
            "hosts": list_of(
                {"type": "object", "description": "Its pool, and the weights in memory, loaded or unloaded"}
            ),
            "experts": _NAMES,
        },
        "experts",
    ),
    "Change": object_of(
        "What an admin call has changed; `served`: whether every gateway uses it",
        {"object": TEXT, "registry_version": {"type": "integer"}},
        others=True,
    ),
    "DecisionList": object_of(
        "The last decisions, the newest first",
        {
            "object": {"const": "coe.decisions"},
            "gateways": COUNT,
            "kept": COUNT,
            "decisions": list_of(
                {"type": "object", "description": "Policy, expert, confidence, cost and estimates of a request"}
            ),
        },
    ),
    "RouterList": object_of(
        "The routers of the policies",
        {
            "object": {"const": "coe.routers"},
            "default_policy": TEXT,
            "policies": list_of({"type": "object", "description": "Weights, training table and curve of its router"}),
        },
    ),
    "Error": object_of(
        "An error in OpenAI's form",
        {
            "error": object_of(
                "What was wrong, where, and what to do",
                {"message": TEXT, "type": TEXT, "param": TEXT_OR_NULL, "code": TEXT_OR_NULL},
            )
        },
    ),
}
"""Name -> schema."""

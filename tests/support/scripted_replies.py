"""What the scripted endpoint answers: text, tool calls, and values for schemas, all from the request alone.

A token is a word with the space before it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

CONTEXT: Final = 4096
"""Words of prompt and answer together."""
CAPABILITIES: Final = (
    *("chat", "tools", "json", "json_schema", "vision"),
    *("logprobs", "prompt_logprobs", "token_prompts", "sampling"),
)
"""What an expert at the scripted endpoint states."""
ANSWERS: Final = {
    "capital of france": "The capital of France is Paris.",
    "capital of italy": "The capital of Italy is Rome.",
    "capital of japan": "The capital of Japan is Tokyo.",
    "capital of peru": "The capital of Peru is Lima.",
}
"""Answers by what a question has; any other question is repeated."""
VALUES: Final[dict[str, Any]] = {"name": "Ada Lovelace", "age": 36, "city": "Paris"}
"""Values of a schema's properties by name."""
_CITIES: Final = ("Paris", "Rome", "Lima")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: text, or calls as (name, arguments)."""

    text: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    reasoning: str | None = None
    reason: str = "stop"


def reply_to(body: dict[str, Any]) -> Reply:
    """The scripted answer of a chat request."""
    messages = body["messages"]
    if calls := _calls(body, messages):
        return Reply(calls=calls, reason="tool_calls")
    results = [text_of(m["content"]) for m in _trailing(messages, "tool")]
    if results:
        return limited(Reply("The tools returned: " + "; ".join(results)), body)
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        return Reply(json.dumps(instance(form["json_schema"]["schema"])))
    if form.get("type") == "json_object":
        return Reply(json.dumps({"name": VALUES["name"], "age": VALUES["age"]}))
    question = next((m for m in reversed(messages) if m["role"] == "user"), {"content": ""})
    images = [p for p in question["content"] if isinstance(p, dict) and p.get("type") == "image_url"]
    text = f"The number of images is {len(images)}." if images else answer_to(text_of(question["content"]))
    thought = "The user asks a question." if body.get("reasoning_effort") not in (None, "none") else None
    return limited(Reply(text, reasoning=thought), body)


def instance(schema: dict[str, Any], root: dict[str, Any] | None = None, name: str = "") -> Any:
    """A value that satisfies a JSON schema of the usual kind; properties take their value by name."""
    root = schema if root is None else root
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return instance(target, root, name)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if options := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return instance(next((o for o in options if o.get("type") != "null"), options[0]), root, name)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = next((k for k in kind if k != "null"), "null") if isinstance(kind, list) else kind
    if kind == "object":
        return {key: instance(inner, root, key) for key, inner in schema.get("properties", {}).items()}
    if kind == "array":
        return [instance(schema.get("items", {"type": "string"}), root, name)] * max(2, schema.get("minItems", 0))
    plain: dict[str, Any] = {"integer": 3, "number": 1.5, "boolean": True, "null": None, "string": "text"}
    return VALUES.get(name, plain[kind])


def _calls(body: dict[str, Any], messages: list[dict[str, Any]]) -> tuple[tuple[str, dict[str, Any]], ...]:
    functions = {tool["function"]["name"]: tool["function"] for tool in body.get("tools") or []}
    choice = body.get("tool_choice", "auto")
    if not functions or choice == "none":
        return ()
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        return ((name, instance(functions[name].get("parameters") or {})),)
    question = next((text_of(m["content"]) for m in reversed(messages) if m["role"] == "user"), "")
    done = {c["function"]["name"] for m in messages for c in m.get("tool_calls") or []}
    named = [
        name for name in functions if "weather" in name.lower() and name not in done and "weather" in question.lower()
    ]
    if named:
        cities = [city for city in _CITIES if city in question] or [VALUES["city"]]
        cities = cities[:1] if body.get("parallel_tool_calls") is False else cities
        return tuple((named[0], instance(functions[named[0]]["parameters"]) | {"city": city}) for city in cities)
    left = [name for name in functions if name not in done]
    if choice == "required" and left:
        return ((left[-1], instance(functions[left[-1]].get("parameters") or {})),)
    return ()


def _trailing(messages: list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for message in reversed(messages):
        if message["role"] != role:
            break
        found.insert(0, message)
    return found


def text_of(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def answer_to(question: str) -> str:
    return next(
        (answer for key, answer in ANSWERS.items() if key in question.lower()), question or "Nothing was asked."
    )


def limited(reply: Reply, body: dict[str, Any]) -> Reply:
    """The reply up to the first stop string and the token limit."""
    text, reason = reply.text, "stop"
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or CONTEXT
    if len(tokens_of(text)) > limit:
        text, reason = "".join(tokens_of(text)[:limit]), "length"
    stops = body.get("stop") or []
    cuts = [text.find(s) for s in ([stops] if isinstance(stops, str) else stops) if s in text]
    text, reason = (text[: min(cuts)], "stop") if cuts else (text, reason)
    return Reply(text, reply.calls, reply.reasoning, reason)


def tokens_of(text: str) -> list[str]:
    """Words, each with the white space before it."""
    return re.findall(r"\s*\S+|\s+\Z", text)

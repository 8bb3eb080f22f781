"""What a chat template reads: messages in the form that templates expect, tools, and variables of the caller."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from coe.types import GenerateRequest
from routers.base import Message

_ALPHANUMERIC: Final = re.compile(r"[^A-Za-z0-9]")
_MISTRAL, _HARMONY, _LLAMA = "mistral", "harmony", "llama3"
_MISTRAL_ID: Final = 9
_NO_EFFORT: Final = "none"
_MOST_DEPTH: Final = 64


def template_variables(
    request: GenerateRequest, special_tokens: Mapping[str, Any], *, answers: str | None = None
) -> dict[str, Any]:
    """The variables of a chat template.

    `reasoning_effort` is passed on (gpt-oss reads it). It also sets `enable_thinking` (Qwen3, SmolLM3) and `thinking`
    (DeepSeek V3.1, Granite), false for "none". `template_kwargs` replace these, and nothing else.

    Args:
        request: with messages.
        special_tokens: name -> text, such as `bos_token`.
        answers: name of the format in which the model calls tools (`coe.engines.parsing.formats`).
    """
    return {
        "documents": None,
        **template_choices(request),
        "messages": list(_documents(request.messages, answers)),
        "tools": [dict(tool) for tool in request.offered] or None,
        "add_generation_prompt": True,
        **special_tokens,
    }


def template_choices(request: GenerateRequest) -> dict[str, Any]:
    """What the caller chooses of a template: the variables of the effort, replaced by `template_kwargs`."""
    effort = request.reasoning_effort
    if effort is None:
        return dict(request.template_kwargs)
    thinks = effort != _NO_EFFORT
    return {"reasoning_effort": effort, "enable_thinking": thinks, "thinking": thinks, **request.template_kwargs}


def _documents(messages: Sequence[Message], answers: str | None) -> Iterator[dict[str, Any]]:
    """The messages as templates of transformers expect them: arguments of calls are objects, results have names."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    for message in _one_call_each(messages) if answers == _LLAMA else messages:
        document = message.document() | {"content": message.content}
        for call in document.get("tool_calls", ()):
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
            call["id"] = _id(call["id"], answers)
        if message.tool_call_id is not None:
            document["tool_call_id"] = _id(message.tool_call_id, answers)
            if message.role == "tool" and (name := names.get(message.tool_call_id)):
                document.setdefault("name", name)
        if answers == _HARMONY and message.reasoning and not (message.content and message.tool_calls):
            document["thinking"] = message.reasoning
        yield document


def _one_call_each(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages with one call each, followed by its results: templates of Llama 3 refuse several in a message."""
    place = 0
    while place < len(messages):
        message, place = messages[place], place + 1
        if len(message.tool_calls) < 2:
            yield message
            continue
        results: dict[str | None, list[Message]] = {}
        while place < len(messages) and messages[place].role == "tool":
            results.setdefault(messages[place].tool_call_id, []).append(messages[place])
            place += 1
        for i, call in enumerate(message.tool_calls):
            yield replace(message, tool_calls=(call,)) if i == 0 else Message("assistant", "", (call,))
            yield from results.pop(call.id, ())
        for others in results.values():
            yield from others


def _arguments(text: str) -> Any:
    """The object in the arguments of a call; text that is none, or a deep one, stays as it is."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) and not _is_deep(value) else text


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MOST_DEPTH):
        level = [entry for each in level for entry in (each.values() if isinstance(each, dict) else each)]
        level = [each for each in level if isinstance(each, (dict, list))]
    return bool(level)


def _id(call_id: str, answers: str | None) -> str:
    """The id of a call; templates of Mistral refuse any that has not exactly nine letters and digits."""
    if answers != _MISTRAL:
        return call_id
    return _ALPHANUMERIC.sub("", call_id)[-_MISTRAL_ID:].rjust(_MISTRAL_ID, "0")

"""What one choice of an event holds: text, reasoning, tool calls. A delta, a whole message, or a completion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from coe.engines.remote.events import MalformedStream

_REASONING: Final = ("reasoning_content", "reasoning", "reasoning_details", "reasoning_text", "thinking", "thoughts")
"""Fields of a message or delta in which servers put reasoning; the first one with text counts, others repeat it."""
_THINKING_PARTS: Final = frozenset({"thinking", "reasoning", "redacted_thinking"})
"""Types of content parts that hold reasoning."""
_TEXTS: Final = ("text", "thinking", "reasoning", "summary", "content")
"""Fields of a part of reasoning that may hold its text."""
_MOST_NESTED: Final = 4
"""Levels of parts within parts of reasoning that are read."""


def first_choice(event: dict[str, Any]) -> dict[str, Any] | None:
    """The first choice of an event, if it has one.

    Raises:
        MalformedStream: `choices` is not a list of objects.
    """
    choices = event.get("choices")
    if not choices:
        return None
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise MalformedStream("`choices` of an event is not a list of objects")
    choice: dict[str, Any] = choices[0]
    if not isinstance(part := choice.get("delta") or choice.get("message") or {}, dict):
        raise MalformedStream(f"`delta` of a choice is not an object but a {type(part).__name__}")
    return choice


def text_of(choice: dict[str, Any]) -> str:
    """The text of a choice. Raises MalformedStream if it is none."""
    part = _part(choice)
    content = choice.get("text") if part is None else part.get("content") or part.get("refusal")
    if isinstance(content, list):  # parts, of which only text is an answer
        content = "".join(str(each.get("text") or "") for each in content if isinstance(each, dict))
    if content is None:
        return ""
    if not isinstance(content, str):
        raise MalformedStream(f"the text of a choice is a {type(content).__name__}")
    return content


def reasoning_of(choice: dict[str, Any]) -> tuple[str, bool]:
    """The reasoning of a choice, and whether it has any: some endpoints hide its text."""
    part = _part(choice) or choice
    content = part.get("content")
    thoughts = [
        each
        for each in (content if isinstance(content, list) else [])
        if isinstance(each, dict) and str(each.get("type")) in _THINKING_PARTS
    ]
    stated = [part[name] for name in _REASONING if part.get(name)]
    texts = ("".join(_texts(value)) for value in (*stated, thoughts))
    return next((text for text in texts if text), ""), bool(stated or thoughts)


def calls_of(choice: dict[str, Any]) -> list[Any]:
    """The tool calls, or pieces of them, that a choice holds; the old form `function_call` as a call of its own.

    Raises:
        MalformedStream: `tool_calls` is not a list.
    """
    part = _part(choice) or choice
    calls = part.get("tool_calls")
    if calls and not isinstance(calls, list):
        raise MalformedStream(f"`tool_calls` is not a list but a {type(calls).__name__}")
    old = part.get("function_call")
    return list(calls) if calls else [{"index": 0, "function": old}] if old else []


def _part(choice: dict[str, Any]) -> dict[str, Any] | None:
    part: dict[str, Any] | None = choice.get("delta") or choice.get("message")
    return part


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """The texts of reasoning: a text, or parts within parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and depth < _MOST_NESTED:
        for each in value:
            yield from _texts(each, depth + 1)
    elif isinstance(value, dict) and depth < _MOST_NESTED:
        found = next((value[name] for name in _TEXTS if value.get(name)), None)
        yield from _texts(found, depth + 1)

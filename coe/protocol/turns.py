"""Messages of a chat request before they are validated: counted, completed, and without fields that have no effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from coe.protocol import bounds
from coe.protocol import fields as f
from coe.protocol.errors import MOST_COUNTED, FieldProblem, InvalidFields
from coe.protocol.problems import Found, refused, wrong

_PLAIN_TURN: Final = frozenset({"role", "content"})
_ABSENT: Final[tuple[object, ...]] = (None, "", [])
"""What stands for an absent field of a message."""


def prepared_turns(messages: object) -> tuple[object, list[Found], set[str]]:
    """The messages without refused or ignored fields, the problems, and the ignored fields.

    Raises:
        InvalidFields: a message has too many fields, or there are too many parts or tool calls.
    """
    if not isinstance(messages, list):
        return messages, [], set()
    turns: list[object] = []
    problems: list[Found] = []
    ignored: set[str] = set()
    n_parts = n_calls = 0
    for i, turn in enumerate(messages):
        if not isinstance(turn, dict):
            turns.append(turn)
            continue
        content = turn.get("content")
        if isinstance(content, list):
            n_parts += len(content)
            ignored |= {f"messages[].content[].{name}" for name in f.IGNORED_IN_PARTS if _any_has(content, name)}
        if content is not None and turn.keys() == _PLAIN_TURN:
            turns.append(turn)
            continue
        if len(turn) > bounds.MOST_FIELDS:
            text = f"has {len(turn):,} fields, at most {bounds.MOST_FIELDS} are read"
            raise InvalidFields(FieldProblem(f"messages[{i}]", "too_many", text))
        n_calls += len(turn["tool_calls"]) if isinstance(turn.get("tool_calls"), list) else 0
        if len(problems) < MOST_COUNTED:
            problems += _turn_problems(turn, f"messages[{i}].")
        ignored |= {f"messages[].{name}" for name in f.IGNORED_IN_MESSAGES if turn.get(name) not in _ABSENT}
        turns.append(_used(_completed(turn)))
    for count, most, what in (
        (n_parts, bounds.MOST_PARTS, "parts of content"),
        (n_calls, bounds.MOST_CALLS, "tool calls"),
    ):
        if count > most:
            text = f"have {count:,} {what}, at most {most:,} are read"
            raise InvalidFields(FieldProblem("messages", "too_many", text))
    return turns, problems, ignored


def _turn_problems(turn: Mapping[str, Any], place: str) -> Iterator[Found]:
    yield from refused(turn, f.REFUSED_IN_MESSAGES, place)
    if turn.get("tool_calls") not in _ABSENT and turn.get("role") in ("system", "developer", "user", "tool"):
        yield wrong(f"{place}tool_calls", "only messages of the assistant have tool calls")


def _completed(turn: dict[str, Any]) -> dict[str, Any]:
    """An assistant message as its model expects it. It may lack a content, and have its reasoning under another name.

    An absent or null content is the empty text, as in vLLM: of an answer that was cut off, or that only calls tools.
    """
    if turn.get("role") != "assistant":
        return turn
    if turn.get("content") is None:
        turn = {**turn, "content": ""}
    if turn.get("reasoning_content") is None and isinstance(turn.get("reasoning"), str):
        turn = {**turn, "reasoning_content": turn["reasoning"]}
    return turn


def _any_has(parts: list[object], name: str) -> bool:
    return any(isinstance(part, dict) and part.get(name) is not None for part in parts)


def _used(turn: dict[str, Any]) -> dict[str, Any]:
    unused = f.REFUSED_IN_MESSAGES.keys() | f.IGNORED_IN_MESSAGES
    return {name: value for name, value in turn.items() if name not in unused}

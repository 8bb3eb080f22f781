"""Conversations in outcome tables: the column `messages`, a list of {role, content} per row, or its JSON text.

The content of an assistant message may be null or absent: an empty answer.

A row with messages stands for the conversation up to its last message; its scores are those of the next answer. Its
prompt is the user turn that weighs most (`routers.conversation.main_text`), which is what routers are trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, get_args, get_type_hints

import numpy as np

from routers.base import Message
from routers.outcomes.cells import is_missing, rows_problem, unicode_problems

if TYPE_CHECKING:
    import pandas as pd

COLUMN: Final = "messages"
MOST_MESSAGES: Final = 4096
"""Most messages of a row."""
Conversation = tuple[Message, ...]
ROLES: Final[tuple[str, ...]] = get_args(get_type_hints(Message)["role"])
"""Roles of messages."""
_KEYS: Final = frozenset({"role", "content"})


def conversations_of(frame: pd.DataFrame, problems: list[str]) -> tuple[Conversation, ...] | None:
    """The conversation of each row, empty where there is none; `None` without such a column. Adds problems by row."""
    if COLUMN not in frame:
        return None
    cells = [() if is_cell_missing(cell) else conversation_of(cell) for cell in frame[COLUMN]]
    bad = np.array([cell is None for cell in cells], dtype=bool)
    what = f"column {COLUMN!r} is not a list of 1 to {MOST_MESSAGES} messages with `role` and `content`, both text,"
    if problem := rows_problem(what, bad):
        problems.append(problem)
    found = tuple(cell or () for cell in cells)
    problems += unicode_problems(["".join(m.content for m in messages) for messages in found], COLUMN)
    return found if any(found) else None


def cells_of(conversations: Sequence[Conversation]) -> list[str | None]:
    """The cells of the column: JSON text, which every file format holds; None where a row has no conversation."""
    return [_text(messages) if messages else None for messages in conversations]


def is_cell_missing(cell: Any) -> bool:
    """Whether a cell has no conversation; an array of messages has one."""
    return not isinstance(cell, np.ndarray | list | tuple) and (is_missing(cell) or cell == "")


def _text(messages: Conversation) -> str:
    return json.dumps([{"role": m.role, "content": m.content} for m in messages], ensure_ascii=False)


def conversation_of(cell: Any) -> Conversation | None:
    """The messages of a list or of JSON text; None if it holds something else."""
    try:
        found = json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, np.ndarray | list | tuple) or not 0 < len(found) <= MOST_MESSAGES:
        return None
    messages = tuple(map(_message, found))
    return None if None in messages else tuple(message for message in messages if message is not None)


def _message(value: Any) -> Message | None:
    """A message; `None` if it is none. An answer without text has no content, as in a chat request."""
    if not isinstance(value, dict):
        return None
    given = {key: content for key, content in value.items() if content is not None}
    if given.get("role") == "assistant":
        given.setdefault("content", "")
    if given.keys() != _KEYS or not all(isinstance(text, str) for text in given.values()):
        return None
    return Message(given["role"], given["content"]) if given["role"] in ROLES else None

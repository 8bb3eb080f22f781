"""Holding back a stream while it may be a refusal."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from coe.answers.refusals import clauses, ends_clause, kind_of, refuses
from coe.answers.thinking import without_thoughts
from coe.types import Chunk

MOST_HELD: Final = 400
"""Characters of an answer that are held back at most, beside thinking text."""


async def held_back(stream: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """The chunks of a stream from its first answering clause on; nothing of one that refuses."""
    held: list[Chunk] = []
    text, holds = "", True
    async with aclosing(stream) as chunks:
        async for chunk in chunks:
            if not holds:
                yield chunk
                continue
            held.append(chunk)
            text += chunk.text
            holds = refuses(without_thoughts(text)) if chunk.finish_reason is not None else may_refuse(text)
            holds = holds and not chunk.tool_calls
            if not holds:
                for one in held:
                    yield one


def may_refuse(text: str) -> bool:
    """Whether the beginning of an answer may become a refusal: no clause of it answers yet."""
    answer = without_thoughts(text)
    if len(answer) > MOST_HELD:
        return False
    found = clauses(answer)
    complete = found if ends_clause(answer) else found[:-1]
    return all(kind_of(clause) != "answers" for clause in complete)

"""Chunks to an answer, and an answer to one chunk; a deadline for chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from coe.errors import DeadlineExceeded
from coe.types import Answer, Chunk, TokenLogprob, ToolCallDelta
from routers.base import ToolCall


class Joined:
    """The pieces of an answer, joined as its chunks arrive."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, list[ToolCallDelta]] = {}
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []

    def add(self, chunk: Chunk) -> None:
        """Add the next chunk."""
        if chunk.text:
            self._text.append(chunk.text)
        if chunk.reasoning:
            self._reasoning.append(chunk.reasoning)
        for piece in chunk.tool_calls:
            self._calls.setdefault(piece.index, []).append(piece)
        self._logprobs += chunk.logprobs
        self._prompt_logprobs += chunk.prompt_logprobs

    def answer(self, expert: str, last: Chunk, cost_usd: float | None = None) -> Answer:
        """The whole answer, after its last chunk."""
        assert last.finish_reason is not None and last.usage is not None  # by the contract of Expert.generate
        return Answer(
            expert,
            "".join(self._text),
            last.finish_reason,
            last.usage,
            cost_usd,
            last.timing,
            notes=last.notes,
            value=last.value,
            reasoning="".join(self._reasoning),
            tool_calls=tuple(_call(self._calls[index]) for index in sorted(self._calls)),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=tuple(self._prompt_logprobs),
        )


def merged(first: Chunk, second: Chunk) -> Chunk:
    """Two chunks in a row as one; the first is not the last of its answer."""
    if first.is_empty:
        return second
    if second.is_empty and second.finish_reason is None:
        return first
    return replace(
        second,
        text=first.text + second.text,
        reasoning=first.reasoning + second.reasoning,
        tool_calls=first.tool_calls + second.tool_calls,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
    )


def whole_chunk(answer: Answer) -> Chunk:
    """An answer as one chunk, which is also the last."""
    calls = [ToolCallDelta(i, call.id, call.name, call.arguments) for i, call in enumerate(answer.tool_calls)]
    return Chunk(
        answer.text,
        answer.finish_reason,
        answer.usage,
        answer.timing,
        answer.cost_usd,
        reasoning=answer.reasoning,
        tool_calls=tuple(calls),
        logprobs=answer.logprobs,
        prompt_logprobs=answer.prompt_logprobs,
        notes=answer.notes,
    )


def last_chunk(chunk: Chunk, answer: Answer) -> Chunk:
    """The last chunk of a stream, with its own pieces, and what the final answer states of the whole."""
    ending = whole_chunk(answer)
    return replace(
        chunk,
        finish_reason=ending.finish_reason,
        usage=ending.usage,
        timing=ending.timing,
        cost_usd=ending.cost_usd,
        value=None,
        notes=ending.notes,
    )


def _call(pieces: list[ToolCallDelta]) -> ToolCall:
    names = ("id", "name", "arguments")
    return ToolCall(*("".join(getattr(piece, name) for piece in pieces) for name in names))


async def until(chunks: AsyncGenerator[Chunk, None], deadline_s: float, name: str) -> AsyncGenerator[Chunk, None]:
    """The same chunks of the expert `name`, until the deadline passes.

    Raises:
        DeadlineExceeded: after `deadline_s` seconds.
    """
    ends = asyncio.get_running_loop().time() + deadline_s
    async with aclosing(chunks):
        while True:
            try:
                async with asyncio.timeout_at(ends) as deadline:  # `wait_for` would make a task for every chunk
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if not deadline.expired():
                    raise
                raise DeadlineExceeded(f"{name!r} did not finish within {deadline_s:g} s") from None
            yield chunk

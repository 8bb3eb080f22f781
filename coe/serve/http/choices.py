"""The choices of one body: chunks of several answers as they arrive, and the bodies that they make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from coe.protocol.answers import (
    AnswerBodies,
    ChatAnswer,
    TextAnswer,
    summed_usage,
    total_usage,
    usage_chunk,
    whole_body,
)
from coe.protocol.parsed import Parsed
from coe.serve.http.call import Call
from coe.types import Answer, Chunk, Usage

_Item = tuple[int, Chunk | Exception | None]


class Choices:
    """The bodies of a request's choices: `n` for each prompt, those of a prompt in a row.

    A greedy answer is generated once and repeated for each of its `n` choices.
    """

    def __init__(self, call: Call, parsed: Parsed, bodies: type[ChatAnswer] | type[TextAnswer]) -> None:
        self._call, self._parsed, self._bodies = call, parsed, bodies
        self._copies = parsed.n // parsed.runs_each
        self._shapes: dict[int, list[AnswerBodies]] = {}
        self._running = len(parsed.requests) * parsed.runs_each
        self._last: list[dict[str, Any]] = []

    def events(self, reply: int, chunk: Chunk) -> list[dict[str, Any]]:
        """The events of a chunk. The last ones of the stream are kept for `ending`."""
        events: list[dict[str, Any]] = []
        if (shapes := self._shapes.get(reply)) is None:
            shapes = self._shapes[reply] = self._shapes_of(reply)
            events += [event for shape in shapes for event in shape.opening()]
        if not chunk.is_empty:
            events += [event for shape in shapes for event in shape.pieces(chunk)]
        if chunk.finish_reason is None:
            return events
        ends = [shape.ending(chunk.finish_reason) for shape in shapes]
        self._running -= 1
        if self._running:
            return events + ends
        self._last = ends
        return events

    def ending(self, more: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The last events: finish reason, and usage if requested; `more` goes into the very last."""
        last = [*self._last]
        if self._parsed.include_usage:
            last.append(usage_chunk(self._shape(0, self._model), self._usage))
        last[-1] |= more
        return last

    def whole(self) -> dict[str, Any]:
        """The whole answer in one body."""
        answers = self._answers
        if len(answers) == self._copies == 1:
            [shape] = self._shapes_of(0)
            return shape.whole(answers[0])
        choices = [shape.choice(answer) for reply, answer in enumerate(answers) for shape in self._shapes_of(reply)]
        return whole_body(self._shape(0, self._model), choices, self._usage)

    @property
    def _answers(self) -> list[Answer]:
        answers = [reply.answer for reply in self._call.replies]
        given = [answer for answer in answers if answer is not None]
        assert len(given) == len(answers)  # after the last chunk of each
        return given

    @property
    def _usage(self) -> Usage:
        """What was read and generated: a prompt counts once, and so does an answer that is repeated."""
        usages, each = [answer.usage for answer in self._answers], self._parsed.runs_each
        return summed_usage(total_usage(usages[i : i + each]) for i in range(0, len(usages), each))

    @property
    def _model(self) -> str:
        """The expert of all choices; the requested model if they are of several."""
        experts = self._call.experts
        return experts[0] if len(experts) == 1 else self._parsed.model

    def _shapes_of(self, reply: int) -> list[AnswerBodies]:
        """The bodies of the choices of a reply; each names its own expert."""
        expert = self._call.replies[reply].expert
        assert expert is not None  # known from the first chunk on
        return [self._shape(reply * self._copies + i, expert) for i in range(self._copies)]

    def _shape(self, index: int, model: str) -> AnswerBodies:
        call = self._call
        return self._bodies(call.id, int(call.started_at), model, self._parsed.include_usage, index)


async def interleaved(streams: Sequence[AsyncGenerator[Chunk, None]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Each chunk with the index of its stream. The first error ends all of them; so does closing this.

    A stream waits while its reader is slow: one chunk of each is held at most.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    items: asyncio.Queue[_Item] = asyncio.Queue(len(streams))
    tasks = [asyncio.create_task(_pump(i, stream, items)) for i, stream in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            index, item = await items.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(index: int, stream: AsyncGenerator[Chunk, None], items: asyncio.Queue[_Item]) -> None:
    try:
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                await items.put((index, chunk))
    except Exception as error:
        await items.put((index, error))
    else:
        await items.put((index, None))

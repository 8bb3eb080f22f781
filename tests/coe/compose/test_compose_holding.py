"""Streams that are held back while they may be refusals."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from coe.compose.holding import MOST_HELD, held_back, may_refuse
from coe.types import Chunk, Usage


async def sent(text: str) -> list[str]:
    """The chunks that are sent of a text that is generated word by word."""

    async def stream() -> AsyncGenerator[Chunk, None]:
        words = text.split(" ")
        for word in words[:-1]:
            yield Chunk(f"{word} ")
        yield Chunk(words[-1], "stop", Usage(1, len(words)))

    return [chunk.text async for chunk in held_back(stream())]


@pytest.mark.parametrize(
    "text",
    [
        "I don't know.",
        "I'm sorry, but I can't help with that. Is there anything else I can help you with?",
        "<think>Paris? Rome?</think> I have no idea.",
        "Ich weiß es nicht.",
    ],
)
async def test_nothing_is_sent_of_a_refusal(text: str) -> None:
    assert await sent(text) == []


@pytest.mark.parametrize("text", ["Paris", "I don't know, but I think it is Paris.", "It is 4. I don't know why.", ""])
async def test_an_answer_is_sent_whole(text: str) -> None:
    assert "".join(await sent(text)) == text


async def test_an_answer_streams_after_its_first_clause() -> None:
    chunks = await sent("The capital is Paris. It lies on the Seine and has many bridges.")
    assert chunks[:4] == ["The ", "capital ", "is ", "Paris. "] and len(chunks) == 13
    assert may_refuse("The capital") and not may_refuse("The capital is Paris. It")
    assert not may_refuse("word " * MOST_HELD)

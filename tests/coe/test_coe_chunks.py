"""Chunks joined to an answer, merged, and an answer as one chunk."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from coe.chunks import Joined, last_chunk, merged, whole_chunk
from coe.compose.holding import held_back
from coe.engines.checked import checked
from coe.serve.cluster.expert_host import coalesce
from coe.types import Answer, Chunk, TokenLogprob, ToolCallDelta, Usage
from routers.base import ToolCall

USAGE = Usage(5, 7)
FIRST = Chunk(
    "",
    reasoning="Look it ",
    prompt_logprobs=(TokenLogprob("Hi", None),),
)
SECOND = Chunk("Let me see. ", reasoning="up.", tool_calls=(ToolCallDelta(0, "call_1", "weather", '{"ci'),))
THIRD = Chunk("", tool_calls=(ToolCallDelta(0, arguments='ty": "Rome"}'), ToolCallDelta(1, "call_2", "time", "{}")))
LAST = Chunk("Done", "tool_calls", USAGE, logprobs=(TokenLogprob("Done", -0.5, b"Done"),))
WHOLE = Answer(
    "e",
    "Let me see. Done",
    "tool_calls",
    USAGE,
    cost_usd=0.25,
    reasoning="Look it up.",
    tool_calls=(ToolCall("call_1", "weather", '{"city": "Rome"}'), ToolCall("call_2", "time", "{}")),
    logprobs=(TokenLogprob("Done", -0.5, b"Done"),),
    prompt_logprobs=(TokenLogprob("Hi", None),),
)


async def stream(*chunks: Chunk) -> AsyncGenerator[Chunk, None]:
    for chunk in chunks:
        yield chunk


def joined(*chunks: Chunk, cost_usd: float | None = None) -> Answer:
    pieces = Joined()
    for chunk in chunks:
        pieces.add(chunk)
    return pieces.answer("e", chunks[-1], cost_usd)


def test_the_pieces_of_every_kind_are_joined_in_order() -> None:
    assert joined(FIRST, SECOND, THIRD, LAST, cost_usd=0.25) == WHOLE


def test_an_answer_as_one_chunk_is_the_same_answer() -> None:
    assert joined(whole_chunk(WHOLE), cost_usd=0.25) == WHOLE


def test_merged_chunks_are_the_same_answer() -> None:
    assert joined(merged(merged(FIRST, SECOND), merged(THIRD, LAST)), cost_usd=0.25) == WHOLE


def test_an_empty_chunk_adds_nothing() -> None:
    assert merged(Chunk(""), SECOND) == SECOND == merged(SECOND, Chunk(""))
    end = Chunk("", "stop", LAST.usage)
    assert merged(Chunk(""), end) == end
    assert merged(SECOND, end).finish_reason == "stop" and merged(SECOND, end).text == SECOND.text


def test_the_last_chunk_of_a_stream_keeps_its_own_pieces_only() -> None:
    last = last_chunk(LAST, WHOLE)
    assert (last.text, last.reasoning, last.tool_calls) == ("Done", "", ())
    assert (last.finish_reason, last.usage, last.cost_usd) == ("tool_calls", USAGE, 0.25)


async def test_a_host_coalesces_every_kind_of_piece() -> None:
    chunks = [chunk async for chunk in coalesce(stream(FIRST, SECOND, THIRD, LAST), lambda: 60.0)]
    assert len(chunks) == 2, "the first at once, the rest with the last"
    assert joined(*chunks, cost_usd=0.25) == WHOLE


async def test_a_tool_call_is_no_refusal_whatever_its_text() -> None:
    sorry = Chunk("I cannot know the weather.")
    call = Chunk("", tool_calls=(ToolCallDelta(0, "call_1", "weather", "{}"),))
    ending = Chunk("", "tool_calls", USAGE)
    assert [chunk async for chunk in held_back(stream(sorry, call, ending))] == [sorry, call, ending]
    assert [chunk async for chunk in held_back(stream(sorry, Chunk("", "stop", USAGE)))] == []


async def test_lone_surrogates_are_replaced_in_every_text() -> None:
    bad = Chunk("a\ud800", "stop", USAGE, reasoning="b\ud800", tool_calls=(ToolCallDelta(0, "c", "d\ud800", "\ud800"),))
    [chunk] = [chunk async for chunk in checked("e", lambda: stream(bad))]
    assert (chunk.text, chunk.reasoning) == ("a?", "b?")
    assert chunk.tool_calls == (ToolCallDelta(0, "c", "d?", "?"),)

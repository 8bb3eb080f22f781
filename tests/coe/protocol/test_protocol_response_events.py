"""The events of a streamed response: whatever the chunks are, the official client puts them together."""

from __future__ import annotations

import random
from typing import Any

import pytest
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from openapi_schemas import schema_problems
from pydantic import TypeAdapter

from coe.chunks import Joined
from coe.protocol.response_events import ResponseEvents
from coe.protocol.response_output import ResponseObject
from coe.protocol.response_request import parse_response
from coe.types import Answer, Chunk, TokenLogprob, ToolCallDelta, Usage

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ECHO = parse_response({"model": "auto", "input": "hi"}).echo
RESPONSE = ResponseObject("id", 1, "e", ECHO)
FAILED = {"message": "it broke", "type": "server_error", "param": None, "code": "engine_error"}


def chunks(rng: random.Random) -> list[Chunk]:
    """Any order of reasoning, text, scores and pieces of calls that an engine may send."""
    found: list[Chunk] = []
    calls = 0
    for i in range(rng.randrange(12)):
        kind = rng.randrange(5)
        if kind == 0:
            found.append(Chunk(f"t{i}", reasoning=f"r{i}" if rng.random() < 0.3 else ""))
        elif kind == 1:
            found.append(Chunk("", reasoning=f"r{i}"))
        elif kind == 2:
            found.append(Chunk(f"t{i}" if rng.random() < 0.5 else "", logprobs=(TokenLogprob(f"t{i}", -0.5, b"t"),)))
        elif kind == 3 and calls:
            found.append(Chunk("", tool_calls=(ToolCallDelta(rng.randrange(calls), arguments=f"a{i}"),)))
        else:
            found.append(Chunk("", tool_calls=(ToolCallDelta(calls, f"c{calls}", "f", rng.choice(["", "{"])),)))
            calls += 1
    return found


def streamed(given: list[Chunk], ending: Any) -> tuple[list[dict[str, Any]], Any]:
    """The events, each checked, and the client's own state after them."""
    reply = ResponseEvents(RESPONSE)
    events = [event for chunk in given for event in reply.chunk(chunk)]
    events += ending(reply)
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    for number, event in enumerate(events):
        assert event["sequence_number"] == number and schema_problems("ResponseChunk", event) == []
        state.handle_event(EVENT.validate_python(event))
    return events, state


@pytest.mark.parametrize("seed", range(60))
def test_the_client_gets_every_piece_and_the_items_of_the_events(seed: int) -> None:
    rng = random.Random(seed)
    last = Chunk("", rng.choice(["stop", "length", "tool_calls"]), Usage(3, 4))  # type: ignore[arg-type]
    given, joined = [*chunks(rng), last], Joined()
    for chunk in given:
        joined.add(chunk)
    answer: Answer = joined.answer("e", last)
    events, _ = streamed(given, lambda reply: reply.ending(answer, 2.0, {}))
    final = events[-1]["response"]
    output = final["output"]
    assert events[-1]["type"] == f"response.{final['status']}" and output

    def text(kind: str) -> str:
        return "".join(item["content"][0]["text"] for item in output if item["type"] == kind)

    assert (text("message"), text("reasoning")) == (answer.text, answer.reasoning)
    calls = [(item["call_id"], item["name"], item["arguments"]) for item in output if item["type"] == "function_call"]
    assert calls == [(call.id, call.name, call.arguments) for call in answer.tool_calls]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["item"] for event in sorted(done, key=lambda event: event["output_index"])] == output
    for index, item in enumerate(output):
        deltas = "".join(event["delta"] for event in events if "delta" in event and event["output_index"] == index)
        assert deltas == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
    whole = RESPONSE.whole(answer, 2.0)
    assert {item["type"] for item in whole["output"]} == {item["type"] for item in output}
    assert (whole["status"], whole["usage"]) == (final["status"], final["usage"])
    assert [item["status"] for item in output[:-1]] == ["completed"] * (len(output) - 1)
    assert output[-1]["status"] == final["status"]


@pytest.mark.parametrize("seed", range(20))
def test_an_error_ends_a_stream_with_the_items_so_far(seed: int) -> None:
    given = [Chunk("a"), *chunks(random.Random(seed))]
    events, _ = streamed(given, lambda reply: reply.failed(500, FAILED))
    error, failed = events[-2:]
    assert (error["type"], error["message"], error["error"]) == ("error", "it broke", FAILED)
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "it broke"}
    text = "".join(item["content"][0]["text"] for item in failed["response"]["output"] if item["type"] == "message")
    assert text == "".join(chunk.text for chunk in given)


def test_a_limit_and_a_wrong_request_have_openais_codes() -> None:
    for status, code in ((429, "rate_limit_exceeded"), (400, "invalid_prompt"), (504, "server_error")):
        events, _ = streamed([Chunk("a")], lambda reply, status=status: reply.failed(status, FAILED))
        assert events[-1]["response"]["error"]["code"] == code

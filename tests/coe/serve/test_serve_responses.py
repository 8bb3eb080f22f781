"""`/v1/responses` through the official client, as one body and as a stream, over fake experts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import openai
import pytest
from api_server import Gateway, Words, expert, gateway
from openai.types.responses import Response, ResponseStreamEvent
from openapi_schemas import schema_problems
from pydantic import BaseModel, TypeAdapter

from coe.engines.fake import FakeExpert
from coe.errors import Rejected
from coe.policy import Policy
from coe.types import Chunk, GenerateRequest, TokenLogprob, ToolCallDelta, Usage

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
SCRIPT = 'fake://script?21 degrees=It is warm.&sunny=@think:Look it up. @call:weather:{"city": "Köln"}&default=hi'
CALLER = expert("caller", SCRIPT, capabilities=frozenset({"chat", "tools"}))
PERSON = expert(
    "person", 'fake://script?default={"name": "Ada", "age": 36}', capabilities=frozenset({"chat", "json_schema"})
)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
QUESTION = "is it sunny?"


class Person(BaseModel):
    name: str
    age: int


async def events_of(there: Gateway, **given: Any) -> list[dict[str, Any]]:
    """The events of a stream: each satisfies the client's types and the OpenAPI document, and they are numbered."""
    body = {"model": "auto", **given, "stream": True}
    events = []
    async with there.http.stream("POST", "/v1/responses", json=body) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        text = (await response.aread()).decode()
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        EVENT.validate_python(events[-1])
        assert schema_problems("ResponseChunk", events[-1]) == []
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events: Iterable[dict[str, Any]]) -> list[str]:
    """Their types; a run of deltas is one."""
    found: list[str] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if not (kind.endswith("delta") and found[-1:] == [kind]):
            found.append(kind)
    return found


def checked(body: dict[str, Any]) -> dict[str, Any]:
    """A body that has what the client's types require, and what the OpenAPI document states."""
    Response.model_validate(body)
    assert schema_problems("Response", body) == []
    return body


async def whole(there: Gateway, **given: Any) -> dict[str, Any]:
    response = await there.http.post("/v1/responses", json={"model": "auto", **given})
    assert response.status_code == 200, response.text
    return checked(response.json())


async def refusal(there: Gateway, **given: Any) -> tuple[int, dict[str, Any]]:
    response = await there.http.post("/v1/responses", json={"model": "auto", "input": "hi", **given})
    error: dict[str, Any] = response.json()["error"]
    return response.status_code, error


async def test_a_text_is_answered_by_the_routed_expert_and_the_request_is_repeated() -> None:
    async with gateway() as g:
        raw = await g.client.responses.with_raw_response.create(
            model="auto",
            instructions="Be loud.",
            input="upper please",
            max_output_tokens=20,
            metadata={"a": "b"},
            extra_body={"coe": {"cost_weight": 0.0}},
        )
        answer = raw.parse()
        assert answer.output_text == "UPPER PLEASE" and answer.model == raw.headers["x-coe-expert"] == "upper"
        assert raw.headers["x-coe-router"] == "default" and answer.id == f"resp_{raw.headers['x-coe-decision-id']}"
        assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
        assert answer.completed_at is not None and answer.completed_at >= answer.created_at
        assert answer.usage is not None and answer.usage.total_tokens == 4 + 2
        assert answer.usage.input_tokens == 4 and answer.usage.output_tokens == 2
        assert (answer.instructions, answer.metadata) == ("Be loud.", {"a": "b"})
        assert (answer.max_output_tokens, answer.temperature, answer.top_p) == (20, 0, 1)
        assert (answer.tools, answer.tool_choice, answer.parallel_tool_calls) == ([], "auto", True)
        assert answer.text is not None and answer.text.format is not None and answer.text.format.type == "text"
        checked(json.loads(raw.text))
        [line] = await g.log.ended(1)
        assert (line.endpoint, line.model, line.expert, line.status) == ("/v1/responses", "auto", "upper", 200)
        assert line.answer is not None and line.answer.text == "UPPER PLEASE" and line.routed is not None


async def test_a_stream_has_the_events_of_openai_in_order_and_ends_with_the_same_response() -> None:
    async with gateway() as g:
        answer = await whole(g, input="one two three")
        events = await events_of(g, input="one two three")
        assert kinds(events) == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "completed",
        ]
        assert [event["delta"] for event in events if "delta" in event] == ["one", " two", " three"]
        assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
        assert events[0]["response"]["output"] == [] and events[0]["response"]["model"] == "echo"
        [item] = events[-1]["response"]["output"]
        assert events[-2]["item"] == item and events[2]["item"] == {**item, "status": "in_progress", "content": []}
        own = ("id", "created_at", "completed_at", "output")
        assert {k: v for k, v in events[-1]["response"].items() if k not in own} == {
            k: v for k, v in answer.items() if k not in own
        }
        assert item["content"] == answer["output"][0]["content"]


async def test_the_client_puts_a_stream_together() -> None:
    async with gateway() as g:
        async with g.client.responses.stream(model="coe/safe", input="upper a b") as stream:
            texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            final = await stream.get_final_response()
        assert "".join(texts) == final.output_text == "UPPER A B" and final.model == "upper"
        assert final.usage is not None and final.usage.output_tokens == 3


async def test_a_call_its_result_and_the_answer() -> None:
    """The items of a response go back as the client gave them, with the results of its calls."""
    async with gateway(experts=[expert("echo"), CALLER]) as g:
        first = await g.client.responses.create(model="auto", input=QUESTION, tools=[TOOL])
        assert first.model == "caller", "only it can call tools"
        assert [item.type for item in first.output] == ["reasoning", "function_call"] and first.output_text == ""
        reasoning, call = first.output
        assert reasoning.type == "reasoning" and reasoning.content and reasoning.content[0].text == "Look it up."
        assert call.type == "function_call" and call.name == "weather" and call.call_id
        assert json.loads(call.arguments) == {"city": "Köln"} and call.status == "completed"
        items: list[Any] = [{"role": "user", "content": QUESTION}, *first.output]
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"})
        second = await g.client.responses.create(model="caller", input=items, tools=[TOOL], store=False)
        assert second.output_text == "It is warm." and [item.type for item in second.output] == ["message"]
        assert len({item.id for response in (first, second) for item in response.output}) == 3
        lines = await g.log.ended(2)
        assert lines[1].routed is not None and lines[1].routed.query is not None
        messages = lines[1].routed.query.messages
        assert [message.role for message in messages] == ["user", "assistant", "tool"]
        assert (messages[1].reasoning, messages[1].tool_calls[0].id) == ("Look it up.", messages[2].tool_call_id)


async def test_a_streamed_call_with_its_reasoning() -> None:
    async with gateway(experts=[expert("echo"), CALLER]) as g:
        events = await events_of(g, input=QUESTION, tools=[TOOL])
        assert kinds(events) == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "reasoning_text.delta",
            "reasoning_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "completed",
        ]
        reasoning, call = events[-1]["response"]["output"]
        assert reasoning["content"] == [{"type": "reasoning_text", "text": "Look it up."}]
        pieces = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
        assert len(pieces) > 1 and "".join(pieces) == call["arguments"] == '{"city": "Köln"}'
        async with g.client.responses.stream(model="auto", input=QUESTION, tools=[TOOL]) as stream:
            final = await stream.get_final_response()
        assert final.output[1].type == "function_call" and final.output[1].parsed_arguments == {"city": "Köln"}


async def test_structured_output_is_parsed_whole_and_streamed() -> None:
    async with gateway(experts=[expert("echo"), PERSON]) as g:
        answer = await g.client.responses.parse(model="auto", input="who?", text_format=Person)
        assert answer.model == "person", "only it can satisfy a schema"
        assert answer.output_parsed == Person(name="Ada", age=36)
        assert answer.text is not None and answer.text.format is not None
        assert answer.text.format.type == "json_schema" and answer.text.format.name == "Person"
        async with g.client.responses.stream(model="auto", input="who?", text_format=Person) as stream:
            final = await stream.get_final_response()
        assert final.output_parsed == Person(name="Ada", age=36)
        again: list[Any] = [{"role": "user", "content": "who?"}, *answer.output, {"role": "user", "content": "and?"}]
        assert (await g.client.responses.parse(model="auto", input=again, text_format=Person)).output_parsed is not None


async def test_an_answer_cut_by_its_limit_is_incomplete() -> None:
    async with gateway(experts=[expert("echo"), CALLER]) as g:
        answer = await whole(g, input="one two three", max_output_tokens=2)
        assert answer["status"] == "incomplete" and answer["completed_at"] is None
        assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
        [item] = answer["output"]
        assert item["status"] == "incomplete" and item["content"][0]["text"] == "one two"
        events = await events_of(g, input="one two three", max_output_tokens=2)
        assert events[-1]["type"] == "response.incomplete" and events[-2]["item"]["status"] == "incomplete"
        # cut while it reasons: there is no message, neither whole nor streamed
        given: Any = {"input": QUESTION, "tools": [TOOL], "max_output_tokens": 2}
        answer, events = await whole(g, **given), await events_of(g, **given)
        for output in (answer["output"], events[-1]["response"]["output"]):
            assert [(item["type"], item["status"]) for item in output] == [("reasoning", "incomplete")]


async def test_an_answer_without_text_has_an_empty_message() -> None:
    async with gateway(experts=[expert("echo")]) as g:
        answer, events = await whole(g, input=""), await events_of(g, input="")
        for output in (answer["output"], events[-1]["response"]["output"]):
            assert output[0]["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
            assert output[0]["status"] == "completed"


async def test_an_error_before_the_first_text_has_its_status_and_one_after_it_ends_the_stream() -> None:
    policies = {"default": Policy("default", Words(("echo", "broken", "half")))}
    async with gateway(policies=policies) as g:
        with pytest.raises(openai.InternalServerError) as failed:
            await g.client.responses.create(model="broken", input="hi", stream=True)
        assert failed.value.code == "engine_error"
        events = await events_of(g, model="half", input="one two three")
        assert kinds(events)[-6:] == [
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "error",
            "failed",
        ]
        error, last = events[-2], events[-1]["response"]
        assert (
            error["code"] == error["error"]["code"] == "engine_error" and error["message"] == last["error"]["message"]
        )
        assert last["status"] == "failed" and last["error"]["code"] == "server_error"
        assert [(item["status"], item["content"][0]["text"]) for item in last["output"]] == [("incomplete", "one two")]
        stream = await g.client.responses.create(model="half", input="one two three", stream=True)
        with pytest.raises(openai.APIError, match="failed after 2 tokens|logged under the id"):
            async for _ in stream:
                pass
        lines = await g.log.ended(3)
        assert [line.error for line in lines] == ["engine_error"] * 3


async def filtered(self: FakeExpert, request: GenerateRequest, adapter: object = None) -> AsyncIterator[Chunk]:
    """An endpoint whose filter stops an answer, before its first text or after it."""
    if "late" not in request.messages[-1].content:
        raise Rejected("a filter refuses it", code="content_filter")
    yield Chunk("Well,")
    raise Rejected("a filter refuses it", code="content_filter")


async def test_an_answer_that_a_filter_stops_is_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeExpert, "generate", filtered)
    async with gateway(experts=[expert("echo")]) as g:
        events = await events_of(g, input="late")
        assert events[-1]["type"] == "response.incomplete"
        assert events[-1]["response"]["incomplete_details"] == {"reason": "content_filter"}
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Well,"
        status, error = await refusal(g, input="now", stream=True)
        assert (status, error["code"]) == (400, "content_filter")


async def mixed(self: FakeExpert, request: GenerateRequest, adapter: object = None) -> AsyncIterator[Chunk]:
    """Text between two stretches of reasoning, two calls whose pieces alternate, and scores."""
    if request.logprobs is not None:
        top = ((" yes", -0.1, b" yes"), (" no", -2.5, None))[: request.logprobs]
        yield Chunk("", logprobs=(TokenLogprob(" yes", -0.1, b" yes", top),))
        yield Chunk(" yes")
        yield Chunk("", logprobs=(TokenLogprob("</s>", float("nan")),))
    else:
        yield Chunk("", reasoning="First.")
        yield Chunk("Hm.", reasoning=" So:")
        yield Chunk("", reasoning="Then.")
        yield Chunk("", tool_calls=(ToolCallDelta(0, "c0", "weather"), ToolCallDelta(1, "c1", "weather", "{")))
        yield Chunk("", tool_calls=(ToolCallDelta(0, arguments="{}"), ToolCallDelta(1, arguments="}")))
    yield Chunk("", "tool_calls" if request.offered else "stop", Usage(2, 1, estimated=True))


async def test_items_of_a_stream_follow_the_chunks_and_calls_may_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeExpert, "generate", mixed)
    async with gateway(experts=[expert("echo", capabilities=frozenset({"chat", "tools"}))]) as g:
        events = await events_of(g, input="hi", tools=[TOOL])
        output = events[-1]["response"]["output"]
        assert [item["type"] for item in output] == ["reasoning", "message", "reasoning", *["function_call"] * 2]
        assert [item["content"][0]["text"] for item in output[:3]] == ["First. So:", "Hm.", "Then."]
        assert [(item["call_id"], item["arguments"]) for item in output[3:]] == [("c0", "{}"), ("c1", "{}")]
        done = [event for event in events if event["type"] == "response.output_item.done"]
        assert [event["item"] for event in sorted(done, key=lambda event: event["output_index"])] == output
        assert [event["item"]["id"] for event in events if event["type"].endswith("item.added")] == [
            item["id"] for item in output
        ]
        answer = await whole(g, input="hi", tools=[TOOL])
        assert [item["type"] for item in answer["output"]] == ["reasoning", "message", *["function_call"] * 2]
        assert answer["usage"]["estimated"] is True


async def test_log_probabilities_are_in_the_text_whole_and_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeExpert, "generate", mixed)
    scored = expert("scored", capabilities=frozenset({"chat", "logprobs"}))
    async with gateway(experts=[expert("echo"), scored]) as g:
        given: Any = {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
        answer, events = await whole(g, **given), await events_of(g, **given)
        assert answer["model"] == "scored", "only it has them"
        yes, end = answer["output"][0]["content"][0]["logprobs"]
        assert (yes["token"], yes["logprob"], bytes(yes["bytes"])) == (" yes", -0.1, b" yes")
        assert [(top["token"], top["logprob"]) for top in yes["top_logprobs"]] == [(" yes", -0.1), (" no", -2.5)]
        assert (end["token"], end["logprob"], end["bytes"]) == ("</s>", -9999, [])
        assert events[-1]["response"]["output"][0]["content"] == answer["output"][0]["content"]
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        assert [(delta["delta"], delta["logprobs"]) for delta in deltas] == [(" yes", [yes]), ("", [end])]


async def test_what_cannot_be_done_is_refused_with_the_reason() -> None:
    async with gateway() as g:
        status, error = await refusal(g, previous_response_id="resp_1")
        assert (status, error["param"], error["code"]) == (400, "previous_response_id", "unsupported_parameter")
        assert "nothing is stored here" in error["message"] and "input" in error["message"]
        for name, value in (("conversation", "conv_1"), ("background", True), ("prompt", {"id": "p"})):
            status, error = await refusal(g, **{name: value})
            assert (status, error["param"]) == (400, name)
        status, error = await refusal(g, tools=[{"type": "web_search"}])
        assert (status, error["param"]) == (400, "tools[0]") and "function" in error["message"]
        with pytest.raises(openai.BadRequestError, match="no_eligible_expert|cannot call tools"):
            await g.client.responses.create(model="auto", input="hi", tools=[TOOL])


async def test_nothing_is_stored_and_a_response_by_its_id_says_so() -> None:
    async with gateway() as g:
        raw = await g.client.responses.with_raw_response.create(model="echo", input="hi", store=True)
        answer = raw.parse()
        assert raw.headers["x-coe-warning"] == "ignored: store" and (answer.model_extra or {})["store"] is False
        raw = await g.client.responses.with_raw_response.create(model="echo", input="hi", store=False)
        assert "x-coe-warning" not in raw.headers
        for reading in (g.client.responses.retrieve, g.client.responses.delete, g.client.responses.cancel):
            with pytest.raises(openai.NotFoundError, match="not stored by this service") as caught:
                await reading(answer.id)
            assert caught.value.code == "response_not_found"
        with pytest.raises(openai.NotFoundError, match="not stored"):
            await g.client.responses.input_items.list(answer.id)
        assert (await g.http.get("/v1/responses")).status_code == 405
        slash = await g.http.post("/v1/responses/", json={"model": "echo", "input": "hi"})
        assert slash.status_code == 404 and "no such endpoint" in slash.json()["error"]["message"]


async def test_the_fields_of_this_service_are_those_of_a_chat() -> None:
    async with gateway() as g:
        own = {"experts": ["upper", "echo"], "exclude": ["echo"], "answers": True, "deadline_s": 20}
        answer = await whole(g, input="hi", coe=own, temperature=0.5, seed=3)
        assert answer["model"] == "upper" and answer["temperature"] == 0.5
        assert [outcome["text"] for outcome in answer["coe"]["answers"]] == ["HI"]
        [line] = await g.log.ended(1)
        assert line.seed == 3
        body = {"model": "auto", "input": "hi", "stream": True}
        text = (await g.http.post("/v1/responses", json=body, headers={"x-coe-debug": "true"})).text
        last = json.loads(text.strip().rpartition("data: ")[2])
        assert last["response"]["coe"]["decision"]["experts"][0] == "echo"
        assert last["response"]["coe"]["timing"]["engine_s"] >= 0
        status, error = await refusal(g, coe={"experts": ["nobody"]})
        assert (status, error["param"], error["code"]) == (400, "coe.experts", "unknown_expert")
        status, error = await refusal(g, model="nobody")
        assert (status, error["code"]) == (404, "model_not_found")


async def test_the_decision_for_a_response_can_be_read_without_an_answer() -> None:
    async with gateway() as g:
        body = {"model": "auto", "input": [{"role": "user", "content": "upper"}]}
        said = (await g.http.post("/v1/route", json=body)).json()
        assert said["decision"]["experts"][0] == "upper" and not g.engine.tally.generations


async def schema_refused(self: FakeExpert, request: GenerateRequest, adapter: object = None) -> AsyncIterator[Chunk]:
    """An engine that cannot compile the schema of a chat."""
    raise Rejected("the schema is wrong", param="response_format")
    yield Chunk("")


async def test_an_error_of_an_engine_names_the_field_of_the_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeExpert, "generate", schema_refused)
    async with gateway(experts=[expert("echo"), PERSON]) as g:
        form = {"type": "json_schema", "name": "p", "schema": {"type": "object"}}
        status, error = await refusal(g, model="person", text={"format": form})
        assert (status, error["param"]) == (400, "text.format")


async def test_a_client_that_leaves_frees_its_place() -> None:
    async with gateway(token_delay_s=0.05) as g:
        stream = await g.client.responses.create(model="echo", input="word " * 200, stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        [line] = await g.log.ended(1)
        assert line.error == "cancelled" and g.service.in_flight == 0

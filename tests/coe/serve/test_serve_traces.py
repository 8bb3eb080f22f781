"""Traces of requests: which spans there are, below which parents, and what they say and do not say."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import openai
import pytest
from api_server import EXPERTS, Words, expert, gateway
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode
from spans import recorded

from coe.compose import Vote
from coe.policy import Policy
from routers.selectors import TopK

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
SERVER = "POST /v1/chat/completions"
SECRET = "a secret of the prompt"


def said(span: ReadableSpan) -> Mapping[str, Any]:
    return span.attributes or {}


async def ask(client: openai.AsyncOpenAI, model: str = "echo", text: str = SECRET, **options: Any) -> Any:
    return await client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


async def test_a_request_is_one_tree_from_arrival_to_the_engine() -> None:
    with recorded() as spans:
        async with gateway() as served:
            answer = await served.client.chat.completions.with_raw_response.create(
                model="auto", messages=[{"role": "user", "content": f"{SECRET} upper"}], max_tokens=30, temperature=0.5
            )
            await spans.ended(SERVER)
    tree = spans.tree()
    tree[SERVER]["chat upper"].pop("coe.queue", None)  # a busy machine
    assert tree == {SERVER: {"coe.route": {}, "chat upper": {"coe.load": {}, "coe.generate": {}}}}
    assert len({span.context.trace_id for span in spans.all if span.context}) == 1

    server, route, call = spans.only(SERVER), spans.only("coe.route"), spans.only("chat upper")
    assert server.kind is SpanKind.SERVER and server.parent is None and server.status.status_code is StatusCode.UNSET
    assert said(server)["http.request.method"] == "POST" and said(server)["http.response.status_code"] == 200
    assert said(server)["url.path"] == said(server)["http.route"] == "/v1/chat/completions"
    assert said(server)["coe.decision_id"] == answer.headers["x-coe-decision-id"]
    assert said(route) == {
        "coe.policy": "default",
        "coe.router": "Words",
        "coe.experts": ("upper",),
        "coe.confidence": pytest.approx(float(answer.headers["x-coe-confidence"]), abs=1e-4),
        "coe.abstained": False,
    }
    usage = answer.parse().usage
    assert call.kind is SpanKind.CLIENT and usage is not None
    assert said(call) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "fake",
        "gen_ai.request.model": "upper",
        "gen_ai.response.model": "upper",
        "gen_ai.request.max_tokens": 30,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "coe.call": "0",
    }
    load, generate = spans.only("coe.load"), spans.only("coe.generate")
    assert said(load)["coe.load.weights"] == ("upper",) and said(load)["coe.load.ways"] == ("open",)
    assert [event.name for event in generate.events] == ["first_token"] and generate.start_time and generate.end_time
    assert generate.start_time <= generate.events[0].timestamp <= generate.end_time
    resource = server.resource.attributes
    assert resource["service.name"] == "coe" and resource["service.instance.id"] == "test-1"
    assert "secret" not in " ".join(span.to_json() for span in spans.all).lower()


async def test_a_request_continues_the_trace_of_its_caller() -> None:
    with recorded() as spans:
        async with gateway() as served:
            await ask(served.client, extra_headers={"traceparent": PARENT, "tracestate": "vendor=1"})
            await ask(served.client, extra_headers={"traceparent": PARENT[:-2] + "00"})  # its caller records nothing
            await ask(served.client, extra_headers={"traceparent": "00-" + 32 * "0" + "-00f067aa0ba902b7-01"})
            await spans.ended(SERVER, 2)
    first, own = spans.named(SERVER)
    assert first.context and first.parent and first.parent.is_remote
    assert f"{first.context.trace_id:032x}" == TRACE and f"{first.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert first.context.trace_state.get("vendor") == "1"
    assert own.parent is None and own.context, "an invalid header begins a trace"
    traces = [f"{span.context.trace_id:032x}" for span in spans.all if span.context and span.name == "coe.generate"]
    assert len(traces) == 2 and traces[0] == TRACE != traces[1], "and the second request is recorded nowhere"


async def test_what_was_in_memory_is_not_loaded_and_what_waited_shows_how_long() -> None:
    with recorded() as spans:
        async with gateway(token_delay_s=0.01, capacity=1) as served:
            await ask(served.client)
            await asyncio.gather(ask(served.client), ask(served.client))
            await spans.ended(SERVER, 3)
    assert len(spans.named("coe.load")) == 1 and len(spans.named("coe.generate")) == 3
    waited = max(spans.named("coe.queue"), key=lambda span: (span.end_time or 0) - (span.start_time or 0))
    assert (waited.end_time or 0) - (waited.start_time or 0) > 10e6


async def test_a_stream_ends_its_spans_with_its_last_byte_and_has_the_time_to_its_first() -> None:
    with recorded() as spans:
        async with gateway(token_delay_s=0.002) as served:
            async for _ in await ask(served.client, stream=True, text="a b c d"):
                pass
            [server] = await spans.ended(SERVER)
    call = spans.only("chat echo")
    first_s = said(call)["gen_ai.response.time_to_first_chunk"]
    assert said(call)["gen_ai.request.stream"] is True
    assert call.start_time and call.end_time and server.end_time
    assert 0 < first_s < (call.end_time - call.start_time) / 1e9 and server.end_time >= call.end_time


async def test_each_call_of_a_composition_has_a_span_below_the_request() -> None:
    names = tuple(f"member{i}" for i in range(3))
    vote = Policy("vote", Words(names), composition=Vote(), select=TopK(3))
    with recorded() as spans:
        async with gateway(experts=[expert(name) for name in names], policies={"default": vote}) as served:
            await ask(served.client, "auto", "yes")
            [server] = await spans.ended(SERVER)
    assert server.context
    calls = [span for span in spans.all if span.name.startswith("chat ")]
    assert sorted(span.name for span in calls) == [f"chat {name}" for name in names]
    assert {span.parent.span_id for span in calls if span.parent} == {server.context.span_id}
    assert len({said(span)["coe.call"] for span in calls}) == 3
    generated = {said(span)["coe.expert"]: span.parent for span in spans.named("coe.generate")}
    ids = {span.name.removeprefix("chat "): span.context and span.context.span_id for span in calls}
    assert {name: parent and parent.span_id for name, parent in generated.items()} == ids


async def test_errors_set_the_status_with_their_code() -> None:
    with recorded() as spans:
        async with gateway() as served:
            for model in ("broken", "unloadable", "no-such-model"):
                with pytest.raises(openai.APIStatusError):
                    await ask(served.client, model)
            await spans.ended(SERVER, 3)
    broken, _, unknown = spans.named(SERVER)
    assert broken.status.status_code is StatusCode.ERROR and broken.status.description == said(broken)["error.type"]
    assert said(unknown)["http.response.status_code"] == 404 and said(unknown)["error.type"] == "model_not_found"
    assert unknown.status.status_code is StatusCode.UNSET, "a client's error is none of the server"
    for name, below in (("broken", "coe.generate"), ("unloadable", "coe.load")):
        call = spans.only(f"chat {name}")
        [on_host] = [s for s in spans.named(below) if said(s)["coe.expert"] == name and said(s).get("error.type")]
        for span in (call, on_host):
            assert span.status.status_code is StatusCode.ERROR
            assert span.status.description == said(span)["error.type"] != ""


async def test_a_stream_that_breaks_off_and_a_client_that_leaves() -> None:
    with recorded() as spans:
        async with gateway(token_delay_s=0.05) as served:
            with pytest.raises(openai.APIError):
                async for _ in await ask(served.client, "half", "a b c d e f", stream=True):
                    pass
            stream = await ask(served.client, "echo", "a b c d e f g h i j k l m", stream=True)
            await anext(aiter(stream))
            await stream.close()
            broken, left = await spans.ended(SERVER, 2)
    assert said(broken)["http.response.status_code"] == 200 and broken.status.status_code is StatusCode.ERROR
    assert said(left)["error.type"] == "cancelled" and left.status.status_code is StatusCode.UNSET
    assert said(spans.only("chat echo"))["error.type"] == "cancelled"


async def test_the_trace_goes_on_to_remote_experts() -> None:
    from coe.engines.remote.body import arguments
    from coe.telemetry.origin import Origin
    from coe.types import GenerateRequest
    from registry.spec import ExpertSpec, Kind

    spec = ExpertSpec(name="far", kind=Kind.REMOTE, source="http://127.0.0.1:1/v1")
    request = GenerateRequest(prompt="a", origin=Origin("r", "k", PARENT, "vendor=1"))
    assert arguments(spec, request)["extra_headers"] == {"traceparent": PARENT, "tracestate": "vendor=1"}
    assert "extra_headers" not in arguments(spec, GenerateRequest(prompt="a"))
    assert "extra_headers" not in arguments(spec, GenerateRequest(prompt="a", origin=Origin("r", "k")))


async def test_nothing_is_recorded_while_traces_are_off() -> None:
    with recorded() as spans:
        pass
    async with gateway(experts=EXPERTS) as served:
        await ask(served.client, extra_headers={"traceparent": PARENT})
    assert spans.all == []

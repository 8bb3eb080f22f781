"""The API through the official client: answers, streams, models and decisions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_server import Gateway, gateway

from coe.types import Usage

QUESTION: list[Any] = [{"role": "user", "content": "hello upper world"}]


async def headers_and_answer(g: Gateway, **options: Any) -> tuple[dict[str, str], Any]:
    raw = await g.client.chat.completions.with_raw_response.create(**{"model": "auto", "messages": QUESTION, **options})
    return dict(raw.headers), raw.parse()


async def test_auto_answers_by_the_expert_that_the_policy_chooses_and_says_so() -> None:
    async with gateway() as g:
        headers, answer = await headers_and_answer(g)
        assert answer.choices[0].message.content == "HELLO UPPER WORLD" and answer.choices[0].finish_reason == "stop"
        assert answer.model == headers["x-coe-expert"] == "upper"
        assert (headers["x-coe-router"], headers["x-coe-confidence"]) == ("default", "0.9000")
        assert answer.id == f"chatcmpl-{headers['x-coe-decision-id']}"
        assert "x-coe-warning" not in headers and "coe" not in answer.model_extra
        assert answer.usage is not None and answer.usage.total_tokens == 6
        [line] = await g.log.ended(1)
        assert (line.id, line.endpoint, line.model) == (headers["x-coe-decision-id"], "/v1/chat/completions", "auto")
        assert (line.expert, line.status, line.error, line.streamed, line.registry_version) == (
            "upper",
            200,
            None,
            False,
            7,
        )
        assert line.answer is not None and line.answer.usage == Usage(3, 3) and line.answer.cost_usd == 9e-6
        assert line.route_s is not None and line.first_s is not None
        assert 0 < line.route_s <= line.first_s <= line.total_s


async def test_an_expert_a_policy_and_a_prompt_without_template() -> None:
    async with gateway() as g:
        headers, answer = await headers_and_answer(g, model="echo")
        assert answer.choices[0].message.content == "hello upper world"
        assert (headers["x-coe-router"], headers["x-coe-confidence"]) == ("direct", "1.0000")
        headers, answer = await headers_and_answer(g, model="coe/safe")
        assert headers["x-coe-router"] == "safe" and answer.model == "upper"
        completion = await g.client.completions.create(model="upper", prompt="Once upon", max_tokens=1, user="u")
        assert (completion.choices[0].text, completion.choices[0].finish_reason) == ("ONCE", "length")
        assert completion.id.startswith("cmpl-") and completion.model == "upper"


async def test_a_stream_comes_chunk_by_chunk_and_ends_with_its_usage() -> None:
    async with gateway(token_delay_s=0.01) as g:
        stream = await g.client.chat.completions.create(
            model="auto", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
        first = await anext(stream)
        assert first.choices[0].delta.role == "assistant" and first.model == "upper"
        assert g.engine.tally.in_flight["upper"] == 1, "the first chunk is there before the last is generated"
        chunks = [chunk async for chunk in stream]
        texts = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
        assert texts == ["HELLO", " UPPER", " WORLD", None]
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 3
        [line] = await g.log.ended(1)
        assert line.streamed and line.expert == "upper" and line.answer is not None and line.error is None


async def test_a_streamed_completion_is_bytes_as_the_protocol_has_them() -> None:
    async with gateway() as g:
        body = {"model": "upper", "prompt": "Grüße dir", "stream": True}
        response = await g.http.post("/v1/completions", json=body)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert (response.headers["x-coe-expert"], response.headers["x-coe-router"]) == ("upper", "direct")
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["GRÜSSE", " DIR", ""]
        assert {chunk["object"] for chunk in chunks} == {"text_completion"} and "usage" not in chunks[0]


async def test_the_clients_own_stream_helper_puts_the_answer_together() -> None:
    async with gateway() as g:
        async with g.client.chat.completions.stream(model="auto", messages=QUESTION) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == "HELLO UPPER WORLD"


async def test_a_request_may_name_who_may_answer() -> None:
    async with gateway() as g:
        _, answer = await headers_and_answer(g, extra_body={"coe": {"exclude": ["upper"], "seed": 3}})
        assert answer.model == "echo"
        _, answer = await headers_and_answer(
            g, extra_body={"coe": {"experts": ["short", "upper"], "exclude": ["upper"]}}
        )
        assert answer.model == "short"
        [first, _] = await g.log.ended(2)
        assert first.routed is not None and first.routed.inputs is not None and first.routed.inputs.seed == 3


async def test_what_has_no_effect_is_said_in_a_header() -> None:
    async with gateway() as g:
        headers, _ = await headers_and_answer(g, user="u", store=True, service_tier="auto")
        assert headers["x-coe-warning"] == "ignored: service_tier, store, user"


async def test_the_fallback_that_stepped_in_is_disclosed() -> None:
    async with gateway() as g:
        question: list[Any] = [{"role": "user", "content": "be broken"}]
        headers, answer = await headers_and_answer(
            g, model="coe/safe", messages=question, extra_headers={"x-coe-debug": "1"}
        )
        assert answer.model == headers["x-coe-expert"] == "echo"
        assert answer.model_extra["coe"]["asked"] == ["broken", "echo"]
        assert answer.model_extra["coe"]["decision"]["experts"] == ["broken"]


async def test_debug_explains_the_decision_and_where_time_and_money_went() -> None:
    async with gateway() as g:
        headers, answer = await headers_and_answer(g, extra_headers={"x-coe-debug": "true"})
        told = answer.model_extra["coe"]
        assert (told["id"], told["policy"], told["router_digest"]) == (
            headers["x-coe-decision-id"],
            "default",
            "sha256:1",
        )
        assert told["decision"]["reason"] == "upper has an estimated quality of 0.900"
        assert told["estimate"]["echo"] == {"quality": 0.5, "cost_usd": None}
        assert (told["asked"], told["cost_usd"], told["registry_version"]) == (["upper"], 9e-6, 7)
        timing = told["timing"]
        assert timing["queue_s"] + timing["load_s"] + timing["engine_s"] + timing["gateway_s"] == pytest.approx(
            timing["total_s"]
        )
        stream = await g.client.chat.completions.create(
            model="auto", messages=QUESTION, stream=True, extra_headers={"x-coe-debug": "true"}
        )
        chunks = [chunk async for chunk in stream]
        explained = [chunk.model_extra["coe"] for chunk in chunks if "coe" in (chunk.model_extra or {})]
        assert len(explained) == 1 and explained[0]["asked"] == ["upper"] and "coe" in (chunks[-1].model_extra or {})


async def test_route_gives_the_same_decision_as_the_answer_and_calls_no_expert() -> None:
    async with gateway() as g:
        body = {"model": "auto", "messages": QUESTION, "user": "u", "coe": {"exclude": ["short"]}}
        routed = await g.http.post("/v1/route", json=body)
        told = routed.json()
        assert not g.engine.tally.generations
        answered = await g.http.post("/v1/chat/completions", json=body, headers={"x-coe-debug": "true"})
        explained = answered.json()["coe"]
        for key in ("decision", "estimate", "allowed", "policy", "router_digest", "registry_version"):
            assert told[key] == explained[key]
        assert told["model"] == "auto" and routed.headers["x-coe-router"] == "default"
        assert "x-coe-expert" not in routed.headers and routed.headers["x-coe-warning"] == "ignored: user"
        prompted = await g.http.post("/v1/route", json={"model": "echo", "prompt": "hi"})
        assert prompted.json()["decision"]["reason"] == "named by the request" and prompted.json()["estimate"] is None
        lines = await g.log.ended(3)
        assert [line.endpoint for line in lines] == ["/v1/route", "/v1/chat/completions", "/v1/route"]
        assert lines[0].routed is not None and lines[0].expert is None and lines[0].answer is None


async def test_route_and_debug_show_what_was_read_of_a_conversation() -> None:
    async with gateway() as g:
        talk = [*QUESTION, {"role": "assistant", "content": "HELLO"}, {"role": "user", "content": "and the others?"}]
        body = {"model": "auto", "messages": talk, "coe": {"session": {"expert": "echo"}}}
        read = (await g.http.post("/v1/route", json=body)).json()["conversation"]
        assert [turn["message"] for turn in read["turns"]] == [0, 2] and read["previous"] == "echo"
        assert sum(turn["weight"] for turn in read["turns"]) == pytest.approx(1.0)
        assert read["prefill_tokens"] > 0 and set(read["switch_price"]) >= {"upper"}
        debug = {"x-coe-debug": "true"}
        answered = await g.http.post("/v1/chat/completions", json=body, headers=debug)
        assert answered.json()["coe"]["conversation"] == read
        refused = await g.http.post("/v1/route", json={**body, "coe": {"session": {"expert": "ecko"}}})
        assert refused.status_code == 400 and "did you mean 'echo'" in refused.json()["error"]["message"]
        single = (await g.http.post("/v1/route", json={"model": "auto", "messages": QUESTION})).json()["conversation"]
        assert [turn["weight"] for turn in single["turns"]] == [1.0] and single["previous"] is None


async def test_the_models_are_listed_and_found() -> None:
    async with gateway() as g:
        models = [model async for model in g.client.models.list()]
        names = [model.id for model in models]
        assert names[:4] == ["auto", "coe/default", "coe/safe", "echo"]
        upper = await g.client.models.retrieve("upper")
        assert upper.model_extra is not None and upper.model_extra["coe"]["tags"] == ["loud"]
        assert upper == models[names.index("upper")]
        policy = (await g.http.get("/v1/models/coe/safe")).json()
        assert (policy["id"], policy["coe"]) == ("coe/safe", {"kind": "policy"})


async def test_health_says_what_is_there() -> None:
    async with gateway() as g:
        response = await g.http.get("/health")
        assert response.status_code == 200
        assert response.json() == {
            "status": "ok",
            "problem": None,
            "registry_version": 7,
            "experts": 6,
            "policies": ["default", "safe"],
            "in_flight": 0,
        }


async def test_metrics_are_told_of_each_request_and_rendered() -> None:
    class Metrics:
        seen: list[str | None] = []  # noqa: RUF012

        def observe(self, finished: Any) -> None:
            self.seen.append(finished.expert)

        async def render(self) -> tuple[bytes, str]:
            return b"coe_requests_total 1\n", "text/plain; version=0.0.4"

    async with gateway(metrics=Metrics()) as g:
        await headers_and_answer(g)
        page = await g.http.get("/metrics")
        assert (page.text, page.headers["content-type"]) == ("coe_requests_total 1\n", "text/plain; version=0.0.4")
        assert Metrics.seen == ["upper"]
    async with gateway() as g:
        assert (await g.http.get("/metrics")).status_code == 404

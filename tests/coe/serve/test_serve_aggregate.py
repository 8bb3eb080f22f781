"""Aggregation through the API: streamed tokens, failed experts, cut inputs and the answer of each expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api_server import Gateway, Words, expert, gateway

from coe.compose import Aggregate, Chain, Composition, SelfConsistency, Vote, ruled_out
from coe.compose.synthesis import synthesis
from coe.engines.fake import FakeEngine
from coe.host import Host
from coe.orchestrator import Orchestrator
from coe.policy import Policy
from coe.protocol.requests import parse_chat
from coe.routing import Routed, route
from coe.serve.decisions.entry import encode
from coe.serve.http.exchange import MOST_NOTES, header_text
from coe.serve.http.metrics import Metrics
from coe.types import GenerateRequest
from registry.store import Snapshot
from routers.base import Query
from routers.selectors import TopK

QUESTION: list[Any] = [{"role": "user", "content": "hello upper world"}]
"""`upper` is the best at it, then echo, short, broken, half, unloadable."""
FAILED = (
    "broken failed: EngineError: 'broken' failed after 0 tokens, as its source 'fake://fail' specifies",
    "half failed: EngineError: 'half' failed after 2 tokens, as its source 'fake://fail?after=2' specifies",
    "unloadable failed: WeightsError",
)
SHOWN = synthesis(
    parse_chat({"model": "x", "messages": QUESTION}).request,
    ["HELLO UPPER WORLD", "hello upper world", "hello upper world"],
)


def offer(g: Gateway, composition: Composition, k: int = 6) -> None:
    """A policy `several` of that composition."""
    now = g.service.orchestrator
    several = Policy("several", now.policies["default"].router, composition=composition, select=TopK(k))
    g.service.update(Orchestrator(now.snapshot, {**now.policies, "several": several}, ask=g.host.ask))


async def ask(g: Gateway, **options: Any) -> tuple[dict[str, str], Any]:
    raw = await g.client.chat.completions.with_raw_response.create(model="coe/several", messages=QUESTION, **options)
    return dict(raw.headers), raw.parse()


async def test_the_response_says_who_failed_and_everybody_is_billed_and_logged() -> None:
    async with gateway(metrics=(metrics := Metrics("g"))) as g:
        offer(g, Aggregate("echo"))
        headers, answer = await ask(g)
        assert answer.choices[0].message.content == SHOWN.messages[-1].content
        assert headers["x-coe-expert"] == answer.model == "echo" and headers["x-coe-notes"] == "; ".join(FAILED)
        assert answer.usage.prompt_tokens == 3 * 3 + len(SHOWN.messages[-1].content.split())
        assert "coe" not in answer.model_extra
        [line] = await g.log.ended(1)
        assert line.answer is not None and line.answer.notes == FAILED
        assert json.loads(encode(line, texts=False))["notes"] == list(FAILED)
        page = metrics.page().decode()
        assert 'coe_prompt_tokens_total{expert="upper",gateway="g"} 3.0' in page and "coe_fallbacks_total{" not in page


async def test_the_aggregators_tokens_stream_and_the_headers_tell_what_is_known_before_them() -> None:
    async with gateway(token_delay_s=0.001) as g:
        offer(g, Aggregate("echo"))
        headers, stream = await ask(g, stream=True, extra_body={"coe": {"answers": True}})
        chunks = [chunk async for chunk in stream]
        pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
        assert len(pieces) > 20 and "".join(pieces) == SHOWN.messages[-1].content
        assert headers["x-coe-notes"] == "; ".join(FAILED) and headers["x-coe-expert"] == "echo"
        told = chunks[-1].model_extra["coe"]
        assert told.keys() == {"notes", "answers"} and told["notes"] == list(FAILED)
        assert [(a["call"], a["expert"]) for a in told["answers"]][-2:] == [
            ("0.5", "unloadable"),
            ("1.aggregator", "echo"),
        ]


@pytest.mark.parametrize("debug", [False, True])
async def test_what_each_expert_said_comes_where_it_is_asked_for(debug: bool) -> None:
    async with gateway() as g:
        offer(g, Aggregate("echo"))
        how: dict[str, Any] = {"extra_headers": {"x-coe-debug": "true"}} if debug else {}
        how = how or {"extra_body": {"coe": {"answers": True}}}
        _, answer = await ask(g, **how)
        answers = {each["call"]: each for each in answer.model_extra["coe"]["answers"]}
        usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
        assert answers["0.0"] == {
            "call": "0.0",
            "expert": "upper",
            "text": "HELLO UPPER WORLD",
            "finish_reason": "stop",
            "usage": usage,
            "cost_usd": 9e-06,
            "error": None,
        }
        assert answers["0.3"]["expert"] == "broken" and answers["0.3"]["text"] is None
        assert answers["0.3"]["error"]["code"] == "engine_error"
        assert "fake://" not in answers["0.5"]["error"]["message"]  # clients do not see where weights are
        assert answer.model_extra["coe"]["notes"] == list(FAILED)
        assert ("asked" in answer.model_extra["coe"]) == debug


async def test_an_expert_that_is_too_late_is_left_out_and_the_rest_do_not_wait() -> None:
    experts = [expert("quick", "fake://script?default=yes"), expert("slow", f"fake://script?default={'so ' * 9999}")]
    snapshot = Snapshot(1, {spec.name: spec for spec in experts})
    host = Host(
        snapshot, {"fake": FakeEngine(token_delay_s=0.01)}, budget_bytes=1, locate=lambda spec: Path("/nowhere")
    )
    router = Words(tuple(snapshot))
    policy = Policy("default", router, composition=Aggregate("quick", expert_deadline_s=0.5), select=TopK(2))
    reply = Orchestrator(snapshot, {"default": policy}, ask=host.ask).answer(GenerateRequest(prompt="is it slow?"))
    assert await reply.text() == "yes" and reply.decision.experts == ("quick", "slow")
    assert reply.notes == ("slow failed: DeadlineExceeded: 'slow' did not finish within 0.5 s",)
    await host.aclose()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_aggregator_that_is_not_allowed_is_not_asked(stream: bool) -> None:
    async with gateway() as g:
        offer(g, Aggregate("short"))
        extra = {"coe": {"experts": ["upper", "echo"]}}
        headers, answer = await ask(g, stream=stream, extra_body=extra)
        assert headers["x-coe-notes"].startswith(
            "short could not aggregate: NotAllowed: 'short' cannot take this request"
        )
        assert headers["x-coe-expert"] == "upper"
        if not stream:
            assert answer.choices[0].message.content == "HELLO UPPER WORLD"
        assert g.engine.tally.generations["short"] == 0
        headers, _ = await ask(g, stream=stream, extra_body={"coe": {"exclude": ["short"]}})
        assert "short could not aggregate" in headers["x-coe-notes"]


async def test_an_aggregator_that_dies_is_replaced_unless_its_text_was_streamed() -> None:
    async with gateway() as g:
        offer(g, Aggregate("half"), k=2)
        headers, answer = await ask(g)
        assert answer.choices[0].message.content == "HELLO UPPER WORLD" and headers["x-coe-expert"] == "upper"
        assert headers["x-coe-notes"].startswith("half could not aggregate: EngineError")
        with pytest.raises(Exception, match="failed after 2 tokens"):
            _, stream = await ask(g, stream=True)
            async for _ in stream:
                pass


async def test_chains_and_samples_answer_through_the_api() -> None:
    async with gateway() as g:
        offer(g, Chain(order="falling", template="{question} / {draft}"), k=2)
        headers, stream = await ask(g, stream=True)
        pieces = [c.choices[0].delta.content or "" async for c in stream if c.choices]
        assert "".join(pieces) == "hello upper world / HELLO UPPER WORLD" and len(pieces) > 5
        assert headers["x-coe-expert"] == "echo"
        offer(g, SelfConsistency(n=3))
        _, answer = await ask(g)
        assert answer.choices[0].message.content == "HELLO UPPER WORLD" and answer.usage.prompt_tokens == 9


async def test_a_vote_tells_who_failed_too() -> None:
    async with gateway() as g:
        offer(g, Vote())
        headers, _ = await ask(g)
        assert headers["x-coe-notes"] == "; ".join(FAILED)


def test_notes_are_one_short_line_of_a_header() -> None:
    assert header_text("b failed:\n naïve\x00 日本") == "b failed: na?ve? ??"
    assert len(header_text("x" * 5000)) == MOST_NOTES and header_text("x" * 5000).endswith("...")


async def test_a_request_for_json_is_aggregated_only_by_an_expert_that_promises_it() -> None:
    async with gateway() as g:
        offer(g, Aggregate("echo"))
        orchestrator = g.service.orchestrator
        json_experts = {
            name: spec.model_copy(update={"capabilities": spec.capabilities | {"json"}}) if name == "upper" else spec
            for name, spec in orchestrator.snapshot.experts.items()
        }
        query = Query(Query.of("hello upper world").messages, format="json")
        [routed] = route([query], orchestrator.policies["several"], Snapshot(7, json_experts), {})
        assert isinstance(routed, Routed) and routed.decision.experts == ("upper",)
        assert ruled_out(routed.composition) == {"echo": "json: it does not promise JSON"}

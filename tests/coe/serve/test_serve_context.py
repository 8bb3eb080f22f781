"""The context constraint through the API: room for the answer, the fallback with room, the log that replays."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from api_server import Gateway, Words, expert, gateway

from coe.orchestrator import Orchestrator
from coe.policy import Policy
from coe.serve.decisions.entry import decode, encode
from coe.serve.decisions.replay import ReplayReport
from coe.serve.http.micro_batch import MicroBatch
from registry.store import Snapshot
from routers.base import Estimate, Query

EXPERTS = (
    expert("small", "fake://upper", context_length=2000),
    expert("large", context_length=8000),
    expert("fallback", "fake://script?default=here", context_length=40_000),
)


@asynccontextmanager
async def contexts() -> AsyncIterator[Gateway]:
    router = Words(("small", "large"))
    policies = {"default": Policy("default", router), "safe": Policy("safe", router, fallback="fallback")}
    async with gateway(experts=EXPERTS, policies=policies) as g:
        yield g


async def ask(g: Gateway, text: str, model: str = "auto", **fields: Any) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
    return await g.http.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize(
    ("words", "fields", "chosen"),
    [
        (1, {}, "small"),
        (1, {"max_tokens": 1999}, "small"),
        (1, {"max_tokens": 5000}, "large"),
        (1, {"max_completion_tokens": 5000, "stream": True}, "large"),
        (1500, {"max_tokens": 400}, "small"),
        (1500, {"max_tokens": 600}, "large"),
        (3000, {}, "large"),
    ],
)
async def test_the_expert_has_room_for_prompt_and_answer(words: int, fields: dict[str, Any], chosen: str) -> None:
    async with contexts() as g:
        answer = await ask(g, "small " * words, **fields)
        assert answer.status_code == 200 and answer.headers["x-coe-expert"] == chosen
        assert "x-coe-notes" not in answer.headers, "chosen at once, not after a failure"
        completion = {"model": "auto", "prompt": "small " * words, **fields}
        completion.pop("max_completion_tokens", None)
        if completion.keys() == {"model", "prompt", *fields}:
            assert (await g.http.post("/v1/completions", json=completion)).headers["x-coe-expert"] == chosen


async def test_the_fallback_with_room_answers_and_a_note_names_the_reasons() -> None:
    async with contexts() as g:
        for fields in ({"max_tokens": 9000}, {"max_tokens": 9000, "stream": True}):
            answer = await ask(g, "small", "coe/safe", **fields)
            assert answer.status_code == 200 and answer.headers["x-coe-expert"] == "fallback"
            assert "9000 tokens for the answer do not fit its 2000" in answer.headers["x-coe-notes"]
        long = await ask(g, "small " * 9000, "coe/safe")
        assert long.json()["choices"][0]["message"]["content"] == "here"
        assert "at least 9000 tokens do not fit its 8000" in long.headers["x-coe-notes"]
        refused = await ask(g, "small " * 9000)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
        message = refused.json()["error"]["message"]
        assert "small (context length: at least 9000" in message and "large (context length: at least" in message
        nobody = await ask(g, "small " * 50_000, "coe/safe")
        assert nobody.status_code == 400 and "fallback (context length: at least" in nobody.json()["error"]["message"]


async def test_the_log_of_such_decisions_replays_identically() -> None:
    async with contexts() as g:
        await ask(g, "small " * 1990, max_tokens=50)
        await ask(g, "small " * 9000, "coe/safe")
        await ask(g, "small")
        report = ReplayReport()
        counts = []
        for i, line in enumerate(await g.log.ended(3)):
            entry = decode(encode(line, texts=True), f"log:{i}")
            report.add(entry)
            assert entry.inputs is not None and entry.query is not None
            counts.append(dict(entry.inputs.prompt_tokens))
        assert (report.repeated, report.differing) == (3, 0)
        assert counts == [{"small": 1990, "large": 1990}, {"small": 9000, "large": 9000}, {}]


async def test_route_shows_the_constraint_that_excludes_an_expert() -> None:
    async with contexts() as g:
        body = {"model": "auto", "messages": [{"role": "user", "content": "small"}], "max_tokens": 5000}
        told = (await g.http.post("/v1/route", json=body)).json()
        assert told["decision"]["experts"] == ["large"] and told["allowed"] == ["fallback", "large"]
        assert told["removed"] == {"small": "context length: 5000 tokens for the answer do not fit its 2000"}
        assert told["doubtful"] == {} == told["prompt_tokens"]
        named = (await g.http.post("/v1/route", json={**body, "model": "small"})).json()
        assert named["removed"] == {} and named["decision"]["experts"] == ["small"]


async def test_a_prompt_that_may_be_counted_is_not_routed_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.serve.http.micro_batch.QUICK_S", 60.0)  # the router is quick, however slow this machine is
    monkeypatch.setattr("coe.serve.http.micro_batch.WAITS_S", 60.0)
    threads: list[str] = []

    class Here(Words):
        def estimate(self, queries: Any) -> Estimate:
            threads.append(threading.current_thread().name)
            return super().estimate(queries)

    snapshot = Snapshot(1, {spec.name: spec for spec in EXPERTS})
    orchestrator = Orchestrator(snapshot, {"default": Policy("default", Here(("small", "large")))}, ask=None)  # type: ignore[arg-type]
    batch, main = MicroBatch(), threading.current_thread().name
    for text in ("hi", "hi", "small " * 1000):  # the first one measures the router
        query = Query.of(text)
        await batch.route(orchestrator, query, "auto", long=orchestrator.may_count(query))
    batch.close()
    assert threads[1] == main != threads[2]

"""A remote expert with several endpoints: local HTTP servers that are dead, slow, limited, broken or well."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from raw_endpoint import DONE, Behaviour, RawEndpoint, Send, answering, event, raw_endpoint

from coe.engines.remote.engine import RemoteEngine, RemoteExpert
from coe.errors import CoeError, Rejected, RemoteError
from coe.types import Chunk, GenerateRequest, Usage
from registry.endpoints import RemoteEndpoint
from registry.spec import ExpertSpec, Kind
from routers.base import Message

HELLO = GenerateRequest(messages=(Message("user", "Hello"),), max_tokens=5)
KEYS = {"A_KEY": "sk-secret-of-a/1", "B_KEY": "sk-secret-of-b/2"}


def usage(prompt: int, completion: int) -> str:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return f"data: {json.dumps({'choices': [], 'usage': counts})}\n\n"


WELL = answering(event("Hi", "stop") + usage(3, 1) + DONE)


def refusal(status: int, *headers: str, message: str = "no") -> Behaviour:
    head = "\r\n".join([f"HTTP/1.1 {status} No", "content-type: application/json", *headers])
    return answering(json.dumps({"error": {"message": message}}), head)


def silent(seconds: float) -> Behaviour:
    async def behave(send: Send) -> None:
        await asyncio.sleep(seconds)

    return behave


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@dataclass
class Far:
    """An expert, and its endpoints that are served."""

    expert: RemoteExpert
    served: list[RawEndpoint] = field(default_factory=list)

    async def ask(self, request: GenerateRequest = HELLO) -> list[Chunk]:
        return [chunk async for chunk in self.expert.generate(request)]

    @property
    def requests(self) -> list[int]:
        return [len(each.requests) for each in self.served]

    @property
    def states(self) -> list[str]:
        return [each["state"] for each in self.expert.endpoint_states()]


@asynccontextmanager
async def far(
    *behaviours: Behaviour | None, listed: dict[int, Any] | None = None, **options: Any
) -> AsyncIterator[Far]:
    """An expert with these endpoints. None: nothing listens there. listed: further fields by position."""
    async with AsyncExitStack() as stack:
        served, endpoints = [], []
        for i, behave in enumerate(behaviours):
            port = free_port() if behave is None else 0
            if behave is not None:
                served.append(await stack.enter_async_context(raw_endpoint(behave)))
                port = served[-1].port
            endpoints.append(RemoteEndpoint(url=f"http://127.0.0.1:{port}/v1", **(listed or {}).get(i, {})))
        spec = ExpertSpec(name="far", kind=Kind.REMOTE, endpoints=endpoints)
        engine = RemoteEngine(**{"timeout_s": 5.0, "retries": 0, "backoff_s": 0.01, "environ": KEYS, **options})
        expert = await engine.load(spec, Path())
        stack.push_async_callback(engine.unload, expert)
        yield Far(expert, served)


@pytest.mark.parametrize(
    "broken",
    [None, refusal(500), refusal(429, "retry-after: 100"), refusal(401), silent(5), answering(""), answering("<html>")],
    ids=["dead", "500", "429", "401", "slow", "cut", "page"],
)
async def test_a_call_that_failed_before_its_text_goes_to_another_endpoint(broken: Behaviour | None) -> None:
    async with far(broken, WELL, timeout_s=0.3) as it:
        began = time.monotonic()
        for _ in range(3):
            assert await it.ask() == [Chunk("Hi"), Chunk("", "stop", Usage(3, 1))]
        assert it.requests[-1] == 3 and it.requests[0] in (1, 3), "the failed one cools down"
        assert time.monotonic() - began < 3


async def test_what_the_endpoint_rejects_is_not_sent_to_another() -> None:
    async with far(refusal(400, message="too hot"), WELL, retries=3) as it:
        with pytest.raises(Rejected, match="too hot"):
            await it.ask()
        assert it.requests == [1, 0] and it.states == ["closed", "closed"]


async def test_a_call_that_produced_text_is_never_repeated() -> None:
    crash = answering(event("Hel") + 'data: {"error": {"message": "crashed", "code": 500}}\n\n')
    async with far(crash, WELL, retries=3) as it:
        chunks = it.expert.generate(HELLO)
        assert (await anext(chunks)).text == "Hel"
        with pytest.raises(RemoteError, match="crashed"):
            await anext(chunks)
        assert it.requests == [1, 0]
        assert await it.ask() and it.requests == [1, 1], "it cools down"


async def test_requests_are_spread_by_weight_with_the_key_and_model_of_each() -> None:
    listed = {0: {"weight": 3, "key_env": "A_KEY"}, 1: {"key_env": "B_KEY", "model": "twin"}}
    async with far(WELL, WELL, listed=listed) as it:
        for _ in range(8):
            await it.ask()
        assert it.requests == [6, 2]
        (head_a, body_a), (head_b, body_b) = (each.requests[0] for each in it.served)
        assert f"Bearer {KEYS['A_KEY']}" in head_a and f"Bearer {KEYS['B_KEY']}" in head_b
        assert (body_a["model"], body_b["model"]) == ("far", "twin")


async def test_all_dead_is_one_error_with_the_last_reason() -> None:
    async with far(None, None, retries=1) as it:
        with pytest.raises(RemoteError, match="cannot be reached") as caught:
            await it.ask()
        assert caught.value.retryable
        assert [each["failed"] for each in it.expert.endpoint_states()] == [1, 1]


async def test_after_failures_in_a_row_an_endpoint_gets_no_requests_until_a_probe_succeeds() -> None:
    well = False

    async def behave(send: Send) -> None:
        await (WELL if well else refusal(500))(send)

    async with far(behave, breaker_failures=2, breaker_open_s=0.3) as it:
        for _ in range(2):
            with pytest.raises(RemoteError, match="HTTP status 500"):
                await it.ask()
        assert it.states == ["open"] and "has failed" in (it.expert.unhealthy() or "")
        short = replace(HELLO, deadline_s=0.05)
        with pytest.raises(RemoteError, match="gets no requests for another .*HTTP status 500") as caught:
            await it.ask(short)
        assert it.requests == [2] and 0 < (caught.value.retry_after_s or 0) <= 0.3
        well = True
        assert len(await it.ask()) == 2, "it waits shortly for the probe"
        assert it.states == ["closed"] and it.expert.unhealthy() is None


async def test_the_attempts_of_one_request_count_as_one_failure() -> None:
    async with far(refusal(500), retries=4, breaker_failures=3) as it:
        with pytest.raises(RemoteError):
            await it.ask()
        assert it.requests == [5] and it.states == ["closed"]


async def test_a_stated_time_holds_for_later_requests_too() -> None:
    async with far(refusal(429, "retry-after: 30")) as it:
        for _ in range(3):
            with pytest.raises(RemoteError) as caught:
                await it.ask()
            assert caught.value.status == 429 and 29 < (caught.value.retry_after_s or 0) <= 30
        assert it.requests == [1]


async def test_the_deadline_counts_over_all_attempts_and_blames_no_endpoint() -> None:
    async with far(silent(5), silent(5), silent(5), retries=5) as it:
        began = time.monotonic()
        with pytest.raises(CoeError):
            await it.ask(replace(HELLO, deadline_s=0.3))
        assert time.monotonic() - began < 1.5
        assert [each["failed"] for each in it.expert.endpoint_states()] == [0, 0, 0]


async def test_tokens_of_a_failed_attempt_are_counted_once_and_stated() -> None:
    paid = answering(usage(7, 5) + 'data: {"error": {"message": "crashed", "code": 500}}\n\n')
    async with far(paid, WELL) as it:
        first = await it.ask()
        assert first[-1].usage == Usage(10, 6) and "12 tokens of failed attempts" in first[-1].notes[0]
        second = await it.ask()
        assert second[-1].usage == Usage(3, 1) and not second[-1].notes
    async with far(paid, paid) as it:
        with pytest.raises(RemoteError, match="crashed") as caught:
            await it.ask()
        assert caught.value.used_tokens == (14, 10)


async def test_no_key_is_in_errors_logs_or_states(caplog: pytest.LogCaptureFixture) -> None:
    words = f"bad key {KEYS['A_KEY']} and {KEYS['B_KEY']}"
    listed = {0: {"key_env": "A_KEY"}, 1: {"key_env": "B_KEY"}}
    with caplog.at_level(logging.DEBUG):
        async with far(
            refusal(500, message=words), refusal(500, message=words), listed=listed, retries=3, breaker_failures=1
        ) as it:
            for _ in range(2):
                with pytest.raises(RemoteError) as caught:
                    await it.ask()
            shown = [str(caught.value), repr(caught.value.__cause__), caught.value.public, it.expert.endpoint_states()]
            shown += [repr(it.expert._pool.endpoints), *(vars(record) for record in caplog.records)]
    ours = [record for record in caplog.records if record.name.startswith(("coe", "stamina"))]
    assert ours and "gets no requests for" in caplog.text
    text = repr(shown)
    assert KEYS["A_KEY"] not in text and KEYS["B_KEY"] not in text


async def test_clients_that_leave_free_their_place_and_blame_no_endpoint() -> None:
    async with far(silent(60), listed={0: {"max_in_flight": 1}}) as it:
        tasks = [asyncio.ensure_future(it.ask()) for _ in range(3)]
        await asyncio.sleep(0.2)
        assert it.requests == [1] and it.expert.endpoint_states()[0]["in_flight"] == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        [state] = it.expert.endpoint_states()
        assert (state["in_flight"], state["failed"], state["state"]) == (0, 0, "closed")

"""A gateway without HTTP: what is recorded of each request, admission, deadlines and health."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from api_server import EXPERTS, Log, Words

from coe.config import ServeConfig
from coe.errors import DeadlineExceeded, InvalidRequest, Overloaded
from coe.orchestrator import Orchestrator
from coe.policy import Policy
from coe.protocol.errors import retry_after_s
from coe.protocol.parsed import Parsed
from coe.protocol.requests import parse_chat
from coe.serve.http import retry_after
from coe.serve.http import service as module
from coe.serve.http.call import Call
from coe.serve.http.refusals import Full
from coe.serve.http.service import Service
from coe.types import Chunk, GenerateRequest, Usage
from registry.store import Snapshot

SNAPSHOT = Snapshot(3, {spec.name: spec for spec in EXPERTS})


class Clock:
    """A clock that advances on request."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Asked:
    """An `ask` that answers in two words and records its calls."""

    word_s = 1.0

    def __init__(self, clock: Clock) -> None:
        self.clock, self.requests = clock, list[GenerateRequest]()

    async def __call__(self, expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        self.clock.now += self.word_s
        yield Chunk("two")
        self.clock.now += self.word_s
        yield Chunk(" words", "stop", Usage(1, 2))


def make(clock: Clock, snapshot: Snapshot = SNAPSHOT, **options: Any) -> tuple[Service, Asked]:
    ask = Asked(clock)
    policies = {"default": Policy("default", Words(tuple(SNAPSHOT)))}
    settings = ServeConfig(deadline_s=60, max_in_flight=2)
    orchestrator = Orchestrator(snapshot, policies, ask=ask)
    return Service(orchestrator, settings=settings, clock=clock, wall=lambda: 1.7e9, **options), ask


def parsed(**given: Any) -> Parsed:
    return parse_chat({"model": "auto", "messages": [{"role": "user", "content": "hi upper"}], **given})


async def answered(service: Service, request: Parsed) -> Call:
    async with service.call("/v1/chat/completions") as call, service.within_deadline(call):
        service.admit(call)
        async with aclosing(service.answer(call, request)) as chunks:
            assert "".join([chunk.text async for _, chunk in chunks]) == "two words"
        call.status = 200
    return call


async def test_what_is_told_of_a_request_has_its_times_and_its_answer() -> None:
    clock, log = Clock(), Log()
    service, ask = make(clock, log=log)
    call = await answered(service, parsed(seed=5, temperature=0.5))
    [line] = log.lines
    assert (line.id, line.started_at, line.registry_version, line.seed) == (call.id, 1.7e9, 3, 5)
    assert (line.route_s, line.first_s, line.total_s) == (0, 2, 2)  # no reader before it ends
    assert line.expert == "upper" and line.answer is not None and line.answer.text == "two words"
    assert (
        ask.requests[0].id == call.id
        and ask.requests[0].deadline_s == pytest.approx(60, abs=1)
        and not ask.requests[0].stream
    )
    service.close()


async def test_a_requests_own_deadline_counts_but_never_beyond_the_services() -> None:
    clock = Clock()
    service, ask = make(clock)
    for own in (10, 600):
        await answered(service, parsed(coe={"deadline_s": own}))
    assert [request.deadline_s for request in ask.requests] == pytest.approx([10, 60], abs=1)
    with pytest.raises(DeadlineExceeded, match="within 0.01 s"):
        async with service.call("/v1/route") as call, service.within_deadline(call):
            await service.route(call, parsed(coe={"deadline_s": 0.01}))
            await asyncio.sleep(5)
    with pytest.raises(TimeoutError, match="another"):
        async with service.call("/v1/route") as call, service.within_deadline(call):
            raise TimeoutError("another")
    service.close()


async def test_places_are_counted_and_given_back_and_the_wait_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_after, "RECENT", 1.0)
    service, ask = make(Clock())
    ask.word_s = 4.5
    async with service.call("/a") as a, service.call("/b") as b:
        service.admit(a)
        async with service.call("/reads its body and takes no place"):
            service.admit(b)
            async with service.call("/c") as c:
                with pytest.raises(Overloaded, match="2 requests are in flight already") as caught:
                    service.admit(c)
                assert retry_after_s(caught.value) == 1
        assert service.in_flight == 2
    assert service.in_flight == 0
    async with service.call("/a") as a, service.call("/b") as b:
        service.admit(a, 2)
        with pytest.raises(Full):
            service.admit(b)
        with pytest.raises(InvalidRequest, match="3 answers in one request; only 2 may be in flight"):
            service.admit(b, 3)
        assert service.in_flight == 2
    assert service.in_flight == 0, "as many places are given back as were taken"
    await answered(service, parsed())
    async with service.call("/a") as a, service.call("/b") as b, service.call("/c") as c:
        service.admit(a)
        service.admit(b)
        with pytest.raises(Full) as full:
            service.admit(c)
    assert retry_after_s(pickle.loads(pickle.dumps(full.value))) == 5, "a place is free every 9 s / 2"
    service.close()


async def test_a_log_or_metrics_that_break_cost_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def write(self, finished: object) -> None:
            raise OSError("disk full")

        def observe(self, finished: object) -> None:
            raise ValueError("no such label")

        async def render(self) -> tuple[bytes, str]:
            return b"", ""

    service, _ = make(Clock(), log=Broken(), metrics=Broken())
    await answered(service, parsed())
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"{what} failed to record a finished request" for what in ("the decision log", "the metrics")]
    service.close()


@pytest.mark.parametrize(
    ("states", "problem"),
    [
        ([{"host": "a", "resident": ["upper"]}], None),
        ([], "no expert host is running"),
        (OSError("gone"), "the expert hosts do not respond"),
        (None, "the expert hosts do not respond"),
    ],
)
async def test_health_is_that_of_the_hosts(
    states: list[dict[str, Any]] | Exception | None, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEALTH_S", 0.01)

    async def health() -> Sequence[dict[str, Any]]:
        if states is None:
            await asyncio.sleep(5)
        if isinstance(states, Exception):
            raise states
        return states or []

    service, _ = make(Clock(), health=health)
    ok, about = await service.health()
    assert (ok, about["problem"], about["experts"]) == (problem is None, problem, 6)
    assert about["status"] == ("ok" if ok else "unavailable")
    service.close()


async def test_without_experts_there_is_no_service() -> None:
    clock = Clock()
    service = Service(Orchestrator(Snapshot(0, {}), {}, ask=Asked(clock)), settings=ServeConfig())
    assert await service.health() == (
        False,
        {
            "status": "unavailable",
            "problem": "no experts are registered",
            "registry_version": 0,
            "experts": 0,
            "policies": [],
            "in_flight": 0,
        },
    )
    service.close()

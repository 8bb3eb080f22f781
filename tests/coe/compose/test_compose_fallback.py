"""The fallback: it is left time of a deadline, and is not called for what it has failed at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from virtual_time import in_virtual_time

from coe.compose import (
    FALLBACK,
    Aggregate,
    Chain,
    Composition,
    ExpertCall,
    ExpertCalls,
    Final,
    Single,
    Vote,
    WithFallback,
    next_step,
)
from coe.compose.base import Done
from coe.compose.fallback import CHOSEN_SHARE
from coe.engines.fake import FakeEngine
from coe.errors import (
    CoeError,
    DeadlineExceeded,
    EngineError,
    HostLost,
    Overloaded,
    Rejected,
    RemoteError,
    WeightsError,
)
from coe.host import Host
from coe.orchestrator import Orchestrator
from coe.policy import Policy
from coe.types import Answer, Chunk, Failure, GenerateRequest, Usage
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Estimate, Message, Query, RoutingDecision

REQUEST = GenerateRequest(messages=(Message("user", "hi"),))
DECISION = RoutingDecision(("a", "b"), (0.6, 0.4), (0.9, 0.8), 0.9)


def failed(error: CoeError, decision: RoutingDecision = DECISION, composition: Composition | None = None) -> Done:
    """What is done once every call of the composition has failed."""
    done: dict[str, Answer | Failure] = {}
    try:
        while isinstance(step := next_step(composition or Single(), REQUEST, decision, done), ExpertCalls):
            done |= {call.id: Failure(call.expert, error) for call in step.calls}
    except CoeError:
        return done
    raise AssertionError("no call can have been answered")


# Not called twice


@pytest.mark.parametrize(
    "error", [EngineError("down"), WeightsError("gone"), Rejected("no"), DeadlineExceeded("late"), RemoteError("502")]
)
@pytest.mark.parametrize("composition", [Single(), Vote(), Chain(), Aggregate(aggregator="c")])
def test_a_fallback_that_failed_as_a_chosen_expert_is_not_called_again(
    error: CoeError, composition: Composition
) -> None:
    with pytest.raises(type(error)):
        next_step(WithFallback(composition, "b"), REQUEST, DECISION, failed(error, composition=composition))
    other = next_step(WithFallback(composition, "c"), REQUEST, DECISION, failed(error, composition=composition))
    assert isinstance(other, ExpertCalls) and [call.expert for call in other.calls] == ["c"]


@pytest.mark.parametrize("error", [Overloaded("busy"), HostLost("died")])
def test_another_process_may_answer(error: CoeError) -> None:
    step = next_step(WithFallback(Single(), "b"), REQUEST, DECISION, failed(error))
    assert isinstance(step, ExpertCalls) and [(call.id, call.expert) for call in step.calls] == [(FALLBACK, "b")]


class Rewords:
    """Asks the first expert for something else than the request does."""

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        if isinstance(outcome := done.get("0"), Failure):
            raise outcome.error
        longer = replace(request, messages=(*request.messages, *request.messages))
        return ExpertCalls((ExpertCall("0", decision.experts[0], longer),), last=True)


def test_a_failure_at_another_prompt_says_nothing_of_the_request_unless_it_lasts() -> None:
    composition = WithFallback(Rewords(), "a")
    step = next_step(composition, REQUEST, DECISION, {"0": Failure("a", Rejected("too long"))})
    assert isinstance(step, ExpertCalls) and [call.expert for call in step.calls] == ["a"]
    with pytest.raises(WeightsError):
        next_step(composition, REQUEST, DECISION, {"0": Failure("a", WeightsError("gone"))})


def test_a_shorter_deadline_of_the_composition_says_nothing_of_the_request() -> None:
    composition = Aggregate(aggregator="b", expert_deadline_s=5)
    done = failed(DeadlineExceeded("late"), composition=composition)
    step = next_step(WithFallback(composition, "b"), REQUEST, DECISION, done)
    assert isinstance(step, ExpertCalls) and [call.expert for call in step.calls] == ["b"]


# Time of a deadline


def test_only_other_experts_leave_time_for_the_fallback() -> None:
    def share(composition: Composition, fallback: str) -> float:
        step = next_step(WithFallback(composition, fallback), REQUEST, DECISION, {})
        assert isinstance(step, ExpertCalls)
        return step.deadline_share

    assert [share(Single(), name) for name in "abc"] == [1.0, CHOSEN_SHARE, CHOSEN_SHARE]
    assert share(Vote(), "a") == CHOSEN_SHARE, "a vote ends in time to be counted"
    fallback = next_step(WithFallback(Single(), "c"), REQUEST, DECISION, failed(EngineError("down")))
    assert isinstance(fallback, ExpertCalls) and fallback.deadline_share == 1.0


SPECS = {
    name: ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo", engine=engine)
    for name, engine in (("chosen", "slow"), ("quick", "fake"), ("also-slow", "slow"))
}
SNAPSHOT = Snapshot(1, SPECS)


class Prefers:
    """A router that estimates the first expert as the best."""

    requires: frozenset[str] = frozenset()

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        return Estimate(tuple(SPECS), np.tile([0.9, 0.1, 0.2], (len(queries), 1)))


def system(delay_s: float, fallback: str | None = "quick") -> Orchestrator:
    """A policy over an expert that needs `delay_s` for each of three words."""
    clock = asyncio.get_running_loop().time
    engines = {"slow": FakeEngine(token_delay_s=delay_s), "fake": FakeEngine(token_delay_s=0.1)}
    host = Host(SNAPSHOT, engines, budget_bytes=0, locate=lambda spec: Path(), clock=clock)
    policy = Policy("default", Prefers(), fallback=fallback)
    return Orchestrator(SNAPSHOT, {"default": policy}, ask=host.ask, clock=clock)


def ask(stream: bool, deadline_s: float | None = 8.0) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", "one two three"),), stream=stream, deadline_s=deadline_s)


@pytest.mark.parametrize("stream", [False, True])
@in_virtual_time
async def test_the_fallback_answers_within_the_deadline_of_a_request_whose_expert_is_slow(stream: bool) -> None:
    clock = asyncio.get_running_loop().time
    began, reply = clock(), system(100.0).answer(ask(stream))
    assert await reply.text() == "one two three" and reply.expert == "quick"
    assert clock() - began == pytest.approx(8.0 * CHOSEN_SHARE + 0.3)
    [note] = reply.notes
    assert note.startswith("chosen failed: DeadlineExceeded: 'chosen' ") and note.endswith(" within 6 s")


@in_virtual_time
async def test_an_answer_that_has_begun_has_the_whole_deadline() -> None:
    """What a client has read cannot be taken back, so the rest is of no use to the fallback."""
    reply = system(2.5).answer(ask(stream=True))
    assert await reply.text() == "one two three" and reply.expert == "chosen" and reply.notes == ()
    whole = system(2.5).answer(ask(stream=False))
    assert await whole.text() == "one two three" and whole.expert == "quick"
    late = system(4.5).answer(ask(stream=True))
    with pytest.raises(DeadlineExceeded, match="'chosen' did not finish within 8 s"):
        await late.text()
    assert late.expert == "chosen"


@pytest.mark.parametrize("stream", [False, True])
@in_virtual_time
async def test_without_another_expert_or_a_deadline_all_time_is_for_the_chosen_one(stream: bool) -> None:
    for fallback in (None, "chosen"):
        reply = system(2.5, fallback).answer(ask(stream))
        assert await reply.text() == "one two three" and reply.expert == "chosen"
        with pytest.raises(DeadlineExceeded, match="'chosen' did not finish within 8 s"):
            await system(100.0, fallback).answer(ask(stream)).text()
    reply = system(1000.0).answer(ask(stream, deadline_s=None))
    assert await reply.text() == "one two three" and reply.expert == "chosen"


@pytest.mark.parametrize("stream", [False, True])
@in_virtual_time
async def test_several_slow_experts_leave_the_fallback_its_time(stream: bool) -> None:
    clock = asyncio.get_running_loop().time
    orchestrator = system(100.0)
    [routed] = orchestrator.route([Query.of("one two three")])
    routed = replace(routed, decision=replace(routed.decision, experts=("chosen", "also-slow")))
    began, reply = clock(), orchestrator.reply(ask(stream), routed)
    assert await reply.text() == "one two three" and reply.asked == ["chosen", "also-slow", "quick"]
    assert clock() - began < 6.5


@in_virtual_time
async def test_a_caller_that_leaves_meanwhile_leaves_nothing_running() -> None:
    ended: list[str] = []

    async def slow(expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        try:
            await asyncio.sleep(100)
            yield Chunk("x", "stop", Usage(1, 1))
        finally:
            ended.append(expert)

    policy = Policy("default", Prefers(), fallback="quick")
    reply = Orchestrator(SNAPSHOT, {"default": policy}, ask=slow).answer(ask(stream=True))
    reading = asyncio.create_task(reply.text())
    await asyncio.sleep(1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert ended == ["chosen"] and reply.done == {}

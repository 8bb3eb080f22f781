"""A router that refuses: a specific error for the caller, unless the policy has a fallback."""

from collections.abc import AsyncGenerator, Sequence

import numpy as np
import pytest

from coe.compose import Single
from coe.errors import Abstained
from coe.orchestrator import Orchestrator
from coe.policy import Policy
from coe.protocol.errors import error_body
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Estimate, Message, Query, RoutingDecision

SNAPSHOT = Snapshot(1, {n: ExpertSpec(name=n, kind=Kind.MODEL, source="fake://echo") for n in ("good", "general")})
REQUEST = GenerateRequest(messages=(Message("user", "hello"),))


class Refusing:
    requires: frozenset[str] = frozenset()

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        nobody = np.zeros((len(queries), 1), dtype=bool)
        reasons = ("out of distribution",) * len(queries)
        return Estimate(("good",), nobody + 0.9, eligible=nobody, abstained=~nobody[:, 0], reasons=reasons)


async def ask(expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
    yield Chunk(f"{expert} says hi", "stop", Usage(1, 1))


async def test_a_refusal_is_reported_with_its_reason_and_no_expert_is_called() -> None:
    reply = Orchestrator(SNAPSHOT, {"default": Policy("default", Refusing())}, ask=ask).answer(REQUEST)
    assert reply.decision.abstained and reply.decision.experts == ()
    with pytest.raises(Abstained, match="the router abstained: out of distribution") as refused:
        await reply.text()
    assert reply.asked == []
    status, body = error_body(refused.value, logged_as="an id")
    assert status == 422 and body["error"]["code"] == "abstained" and "out of distribution" in body["error"]["message"]


async def test_a_fallback_answers_what_the_router_refuses() -> None:
    policies = {"default": Policy("default", Refusing(), fallback="general")}
    reply = Orchestrator(SNAPSHOT, policies, ask=ask).answer(REQUEST)
    assert await reply.text() == "general says hi" and reply.expert == "general"


def test_the_compositions_step_raises_it() -> None:
    with pytest.raises(Abstained, match="nobody is sure"):
        Single().step(REQUEST, RoutingDecision((), (), (), 0.0, abstained=True, reason="nobody is sure"), {})

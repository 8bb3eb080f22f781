"""Finished requests, for the tests of logs and metrics."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from coe.compose import Single
from coe.policy import Policy
from coe.routing import DecisionInputs, Routed
from coe.serve.http.finished import Finished
from coe.types import Answer, Timing, Usage
from routers.base import Estimate, Query, RoutingDecision
from routers.decision import Utility
from routers.selectors import TopK

EXPERTS = ("cheap", "good", "general")
TIMING = Timing(queue_s=0.5, load_s=1.5, engine_s=3.0)


class Recorded:
    """A router with the same estimate for every query."""

    requires: frozenset[str] = frozenset()

    def __init__(self, quality: Mapping[str, float]) -> None:
        self.quality = dict(quality)

    def estimate(self, queries: Any) -> Estimate:
        return Estimate(tuple(self.quality), np.tile(list(self.quality.values()), (len(queries), 1)))


def policy(
    quality: Mapping[str, float] | None = None, name: str = "default", digest: str | None = "sha256:1"
) -> Policy:
    router = Recorded(quality or {"cheap": 0.5, "good": 0.9, "general": 0.1})
    return Policy(name, router=router, router_digest=digest)


def inputs(**changes: Any) -> DecisionInputs:
    estimate = Estimate(EXPERTS, np.array([[0.5, 0.9, 0.1]]), cost_usd=np.array([[0.0, 0.01, 0.002]]))
    return DecisionInputs(
        **{"estimate": estimate, "utility": Utility(), "allowed": frozenset(EXPERTS), "select": TopK(2), **changes}
    )


def routed(text: str = "Which is it?", made_from: DecisionInputs | None = None, by: Policy | None = None) -> Routed:
    made_from = made_from or inputs()
    return Routed(Query.of(text), made_from.decide(), by or policy(), made_from, Single())


def bypassed(expert: str) -> Routed:
    decision = RoutingDecision((expert,), (1.0,), (1.0,), confidence=1.0, reason="named by the request")
    return Routed(Query.of("Hello"), decision, None, None, Single())


def answer(expert: str = "good", cost_usd: float | None = 0.25, timing: Timing | None = TIMING) -> Answer:
    return Answer(expert, "It is.", "stop", Usage(7, 3), cost_usd, timing)


def finished(**changes: Any) -> Finished:
    """A plain, answered request, except for the given fields; its answer is that of its one call."""
    usual: dict[str, Any] = {
        "id": "d-1",
        "endpoint": "/v1/chat/completions",
        "model": "auto",
        "routed": routed(),
        "expert": "good",
        "answer": answer(),
        "error": None,
        "status": 200,
        "streamed": False,
        "seed": None,
        "registry_version": 3,
        "started_at": 1_700_000_000.25,
        "route_s": 0.004,
        "first_s": 2.1,
        "total_s": 5.125,
    }
    given = {**usual, **changes}
    return Finished(**{"done": {"0": given["answer"]} if given["answer"] else {}, **given})

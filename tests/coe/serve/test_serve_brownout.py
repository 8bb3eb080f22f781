"""Brown-out and Retry-After: what an overloaded gateway gives up, when it begins and ends, and what is said of it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from api_server import EXPERTS, Words, expert, gateway
from finished_requests import finished
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from coe.compose import Cascade, Chain, Single, Vote, WithFallback
from coe.config import BrownoutConfig, Config
from coe.policy import Policy
from coe.routing import Routed, route
from coe.serve.decisions.entry import decode, encode
from coe.serve.decisions.replay import Rerouter, replay
from coe.serve.http.brownout import Brownout, BrownoutState, Load, degraded, next_state
from coe.serve.http.metrics import Metrics
from coe.serve.http.retry_after import RetryAfter
from registry.store import Snapshot
from routers.base import Estimate, Message, Query
from routers.decision import Utility
from routers.selectors import Cascade as CheapestFirst
from routers.selectors import TopK

SETTINGS = BrownoutConfig(in_flight_share=0.8, wait_s=10.0, end_share=0.5, end_after_s=5.0)
VOTE = Policy("vote", Words(tuple(spec.name for spec in EXPERTS[:3])), composition=Vote(), select=TopK(3))


def states(*looks: tuple[float, float, float], settings: BrownoutConfig = SETTINGS) -> list[bool]:
    """Whether it is active after each look: (seconds, share, wait)."""
    state, found = BrownoutState(), []
    for now_s, share, wait_s in looks:
        state = next_state(state, Load(share, wait_s), now_s, settings)
        found.append(state.active)
    return found


def test_it_begins_at_either_threshold() -> None:
    assert states((0, 0.79, 9.9)) == [False]
    assert states((0, 0.8, 0)) == states((0, 0, 10)) == [True]
    assert states((0, 0, 1e9), settings=BrownoutConfig()) == [False], "waits do not count"


def test_it_ends_only_after_the_load_has_been_low_for_a_time_so_it_does_not_flap() -> None:
    assert states((0, 1, 0), (1, 0.45, 0), (6, 0.45, 0)) == [True, True, True], "0.45 is not below half of 0.8"
    assert states((0, 1, 0), (1, 0.3, 0), (5.9, 0.3, 0), (6, 0.3, 0)) == [True, True, True, False]
    assert states((0, 1, 0), (1, 0.3, 0), (4, 0.5, 0), (6, 0.3, 0), (10, 0.3, 0), (11, 0.3, 0)) == [True] * 5 + [False]
    assert states((0, 1, 0), (1, 0.3, 6.0), (9, 0.3, 6.0)) == [True] * 3, "waits are above half of 10 s"
    share = [0.85 if i % 2 else 0.75 for i in range(40)]
    assert states(*[(i / 2, each, 0.0) for i, each in enumerate(share)]) == [False] + [True] * 39


def test_what_a_policy_gives_up() -> None:
    less = degraded(VOTE, SETTINGS)
    assert less.select == TopK(1) and isinstance(less.composition, Single)
    assert less.degraded.endswith("one expert is called once")
    cheapest = CheapestFirst(threshold=0.5, k=3)
    assert degraded(replace(VOTE, select=cheapest, composition=Cascade()), SETTINGS).select == replace(cheapest, k=1)
    chain = Chain(experts=("echo", "upper"))
    assert degraded(replace(VOTE, composition=chain), SETTINGS).composition is chain, "its stages are the answer"
    alone = Policy("alone", Words(("echo",)))
    assert degraded(alone, SETTINGS) is alone
    cheap = BrownoutConfig(one_expert=False, cost_weight=3.0)
    less = degraded(replace(VOTE, utility=Utility(cost_weight=1.0)), cheap)
    assert (less.least_cost_weight, less.select) == (3.0, TopK(3)) and "cheaper experts" in less.degraded
    thrifty = replace(VOTE, utility=Utility(cost_weight=5.0))
    assert degraded(thrifty, cheap) is thrifty


class Priced:
    """Two experts: the better one costs more."""

    requires: frozenset[str] = frozenset()
    costs: Any = np.array([[0.1, 0.0]])

    def estimate(self, queries: Any) -> Estimate:
        return Estimate(("upper", "echo"), np.array([[0.9, 0.8]]), cost_usd=self.costs)


def routed(policy: Policy, **fields: Any) -> Routed:
    snapshot = Snapshot(1, {name: expert(name) for name in ("upper", "echo", "short")})
    [one] = route([Query((Message("user", "hi"),), **fields)], policy, snapshot, {})
    assert isinstance(one, Routed)
    return one


def test_the_cost_weight_is_raised_whatever_the_request_states_and_only_where_costs_are_known() -> None:
    policy = degraded(Policy("p", Priced()), BrownoutConfig(cost_weight=2.0))
    assert routed(Policy("p", Priced())).decision.experts == ("upper",)
    assert routed(policy).decision.experts == routed(policy, cost_weight=0.0).decision.experts == ("echo",)
    unknown = Priced()
    unknown.costs = None
    assert routed(replace(policy, router=unknown)).decision.experts == ("upper",)


def test_a_degraded_decision_replays_from_its_log_line() -> None:
    policy = degraded(VOTE, BrownoutConfig(cost_weight=2.0))
    one = routed(policy)
    line = encode(finished(routed=one), texts=True)
    assert json.loads(line)["inputs"]["degraded"] == policy.degraded
    entry = decode(line, "log:1")
    assert entry.inputs is not None and entry.inputs.degraded == policy.degraded
    rerouter = Rerouter({"vote": VOTE}, Snapshot(1, {name: expert(name) for name in ("upper", "echo", "short")}))
    report = replay([entry], rerouter)
    assert (report.repeated, report.differing) == (1, 0)
    assert rerouter.by_policy["vote"].same_choice == 1
    assert "degraded" not in json.loads(encode(finished(routed=routed(VOTE)), texts=True))["inputs"]


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_without_settings_nothing_is_looked_at() -> None:
    def never() -> float:
        raise AssertionError

    off = Brownout(None, wait_s=never, clock=Clock())
    off.look(1.0)
    assert not off.active


def test_waits_are_looked_at_a_few_times_a_second_and_it_ends_without_requests() -> None:
    clock, looks = Clock(), 0

    def wait_s() -> float:
        nonlocal looks
        looks += 1
        return 0.0

    brownout = Brownout(SETTINGS, wait_s=wait_s, clock=clock)
    for _ in range(100):
        brownout.look(1.0)
    assert looks == 1 and brownout.active
    brownout.look(0.0)
    assert brownout.active
    clock.now_s = 5.0
    assert not brownout.active


async def test_an_overloaded_gateway_calls_one_expert_says_so_and_recovers() -> None:
    settings = {"max_in_flight": 8, "brownout": {"in_flight_share": 0.375, "end_after_s": 0.0}}
    policies = {"default": VOTE, "safe": replace(VOTE, name="safe", fallback="echo")}
    body: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "coe": {"answers": True}}
    metrics = Metrics("g")
    async with gateway(token_delay_s=0.2, settings=settings, policies=policies, metrics=metrics) as there:

        async def post(**fields: Any) -> Any:
            return await there.http.post("/v1/chat/completions", json={**body, **fields})

        before = await post()
        assert len(before.json()["coe"]["answers"]) == 3 and "x-coe-degraded" not in before.headers
        one, two = (asyncio.ensure_future(post(messages=[{"role": "user", "content": "a b c d"}])) for _ in range(2))
        while there.service.in_flight < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        third, stream, route_only = await asyncio.gather(
            post(), post(stream=True), there.http.post("/v1/route", json=body), return_exceptions=False
        )
        assert len(third.json()["coe"]["answers"]) == 1
        for degraded_one in (third, stream):
            assert degraded_one.headers["x-coe-degraded"] == "true"
            assert "one expert is called once" in degraded_one.headers["x-coe-notes"]
        assert "one expert is called once" in third.json()["coe"]["notes"][0]
        assert route_only.headers.get("x-coe-degraded") == "true"
        assert len((await one).json()["coe"]["answers"]) == 3, "what had begun goes on"
        await two
        after = await post()
        assert len(after.json()["coe"]["answers"]) == 3 and "x-coe-degraded" not in after.headers
    page = metrics.page().decode()
    found = {
        s.name: s.value
        for f in text_string_to_metric_families(page)
        for s in f.samples
        if s.name == "coe_degraded_total"
    }
    assert found == {"coe_degraded_total": 3.0}


def test_refused_clients_return_one_after_the_other_as_places_become_free() -> None:
    retry = RetryAfter(4)
    for _ in range(200):
        retry.ended(8.0)
    assert [round(retry.seconds(1, 100.0, 0.0)) for _ in range(3)] == [2, 4, 6]
    assert round(retry.seconds(2, 100.0, 0.0)) == 10
    assert round(retry.seconds(1, 109.0, 0.0)) == 3, "one second is left of the ten"
    assert round(retry.seconds(1, 200.0, 40.0)) == 10, "the hosts' queue has grown beyond the mean"
    assert max(retry.seconds(1, 300.0, 0.0) for _ in range(10_000)) == pytest.approx(16.0), "bounded"


async def test_the_queue_of_a_full_host_says_when_to_return() -> None:
    async with gateway(token_delay_s=0.1, capacity=1) as there:
        there.host._queue._max_waiting = 3
        ask = {"model": "echo", "messages": [{"role": "user", "content": "one two three four five six seven eight"}]}
        await there.http.post("/v1/chat/completions", json=ask)  # 0.8 s
        waiting = [asyncio.ensure_future(there.http.post("/v1/chat/completions", json=ask)) for _ in range(4)]
        while len(there.host._queue) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        refused = await there.http.post("/v1/chat/completions", json=ask)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "3", "3 requests of 0.8 s"
        await asyncio.gather(*waiting)


@pytest.mark.parametrize(
    "given",
    [
        {"in_flight_share": 0},
        {"in_flight_share": 1.1},
        {"wait_s": -1},
        {"end_share": 1},
        {"cost_weight": float("inf")},
        {"k": 1},
    ],
)
def test_wrong_settings_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BrownoutConfig(**given)


def test_it_names_policies_that_exist() -> None:
    policies = {"default": {"expert": "echo"}}
    assert Config(policies=policies, serve={"brownout": {"policies": ["default"]}}).serve.brownout  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="fast not among"):
        Config(policies=policies, serve={"brownout": {"policies": ["fast"]}})  # type: ignore[arg-type]


def test_the_fallback_stays() -> None:
    one = routed(degraded(replace(VOTE, fallback="echo"), SETTINGS))
    assert isinstance(one.composition, WithFallback) and isinstance(one.composition.composition, Single)
    assert len(one.decision.experts) == 1

"""Replay: a logged decision is reproduced to the last bit, and one that is not is found and named."""

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_requests import EXPERTS, bypassed, finished, inputs, policy, routed
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coe.policy import Policy
from coe.routing import DecisionInputs, Routed, route
from coe.serve.decisions.entry import Entry, decode, encode
from coe.serve.decisions.log import read_log
from coe.serve.decisions.replay import ReplayReport, Rerouter, replay
from coe.serve.http.finished import Finished
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Estimate, Query
from routers.decision import Utility
from routers.errors import NoEligibleExpert
from routers.selectors import Cascade, Dynamic, Selector, TopK

SNAPSHOT = Snapshot(1, {name: ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo") for name in EXPERTS})


def entry(request: Finished, *, texts: bool = False, **changed: Any) -> Entry:
    """The log entry of a request; `changed` tampers with the decision or its inputs."""
    document = json.loads(encode(request, texts=texts))
    for path, value in changed.items():
        section, _, name = path.partition("__")
        document[section][name] = value
    return decode(json.dumps(document).encode(), "log.jsonl:1")


def again(*entries: Entry, rerouter: Rerouter | None = None) -> ReplayReport:
    return replay(entries, rerouter)


# Few distinct values, so that ties, NaN and zeros of both signs are common.
QUALITIES = st.sampled_from([0.0, -0.0, 0.1, 0.1 + 0.2, 0.3, 1.0, np.nan]) | st.floats(0, 1)
SECONDS = st.sampled_from([0.0, 0.5]) | st.floats(0, 100)


@st.composite
def _inputs(draw: st.DrawFn) -> DecisionInputs:
    m = draw(st.integers(1, 6))
    experts = tuple(f"expert-{j}" for j in range(m))
    dtype = draw(st.sampled_from([np.float64, np.float32]))
    maybe = st.none()

    def row(
        values: st.SearchStrategy[Any], kind: Any = dtype, size: tuple[int, ...] = (1, m)
    ) -> st.SearchStrategy[Any]:
        if kind is np.float32:
            values = values.map(lambda value: float(np.float32(value)))
        return arrays(kind, size, elements=values)

    cost_weight = draw(st.sampled_from([0.0, 0.5]) | st.floats(0, 10))
    costs = row(st.floats(0, 2) if cost_weight else st.floats(0, 2) | st.just(np.nan))
    estimate = Estimate(
        experts,
        draw(row(QUALITIES)),
        cost_usd=draw(costs if cost_weight else maybe | costs),
        ood=draw(maybe | row(st.floats(0, 1), size=(1,))),
        labels=draw(maybe | st.tuples(st.text(max_size=5))),
        eligible=draw(maybe | row(st.booleans(), kind=np.bool_)),
        abstained=draw(maybe | row(st.booleans(), kind=np.bool_, size=(1,))),
        confidence=draw(maybe | row(st.floats(0, 1) | st.just(np.nan), size=(1,))),
        reasons=draw(maybe | st.tuples(st.text(max_size=5))),
        truncated=draw(maybe | row(st.booleans(), kind=np.bool_, size=(1,))),
    )
    return DecisionInputs(
        estimate,
        Utility(cost_weight, draw(st.sampled_from([0.0, 0.1]) | st.floats(0, 10))),
        allowed=draw(st.frozensets(st.sampled_from([*experts, "stranger"]), min_size=1)),
        select=draw(_selectors(costs=estimate.cost_usd is not None and bool(np.isfinite(estimate.cost_usd).all()))),
        load_s=draw(st.dictionaries(st.sampled_from(experts), SECONDS)),
        seed=draw(maybe | st.integers(0, 2**64)),
    )


def _selectors(*, costs: bool) -> st.SearchStrategy[Selector]:
    k = st.integers(1, 4)
    kinds: list[st.SearchStrategy[Selector]] = [st.builds(TopK, k=k), st.builds(Dynamic, p=st.floats(0, 1), k=k)]
    if costs:
        kinds.append(st.builds(Cascade, tolerance=st.floats(0, 1), threshold=st.floats(0, 1), k=k))
    return st.one_of(kinds)


@settings(max_examples=400, deadline=None)
@given(made_from=_inputs())
def test_any_decision_comes_out_the_same_to_the_last_bit(made_from: DecisionInputs) -> None:
    try:
        request = finished(routed=routed(made_from=made_from))
    except NoEligibleExpert:
        return  # then there was no decision to log
    logged = entry(request)
    assert logged.inputs is not None and request.routed is not None
    # Both compared by their bits: 0.0 and -0.0 are equal, and NaN is never equal to itself.
    assert repr(logged.decision) == repr(request.routed.decision) == repr(logged.inputs.decide())
    replayed = again(logged)
    assert (replayed.repeated, replayed.differing) == (1, 0), replayed.differences


class Noisy:
    """A router with a different estimate for every query, in float32 as in trained routers."""

    requires: frozenset[str] = frozenset()

    def estimate(self, queries: Any) -> Estimate:
        rng = np.random.default_rng(len(queries))
        shape = (len(queries), len(EXPERTS))
        quality = rng.random(shape).astype(np.float32).round(1)
        return Estimate(EXPERTS, quality, cost_usd=rng.random(shape), confidence=rng.random(len(queries)))


def test_a_log_of_decisions_made_side_by_side_replays_identically(tmp_path: Path) -> None:
    """In one batch, each with its own cost weight, seed and allowed experts, as a gateway under load decides."""
    variants = product((None, 0.0, 0.7), (None, 3), (None, frozenset({"good", "general"})), range(25))
    queries = [
        Query.of(f"{n}", cost_weight=cost_weight, seed=seed, allowed=allowed)
        for cost_weight, seed, allowed, n in variants
    ]
    by = Policy("noisy", Noisy(), utility=Utility(0.1, 0.05), select=TopK(2))
    lines = []
    for batch in (queries, [query for query in queries if query.seed is None]):  # all at once only without seeds
        for outcome in route(batch, by, SNAPSHOT, {"good": 2.0, "cheap": 0.1}):
            assert isinstance(outcome, Routed)
            lines.append(encode(finished(routed=outcome), texts=False))
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(lines))
    replayed = replay(read_log([path], pytest.fail))
    assert (replayed.entries, replayed.repeated, replayed.differing) == (450, 450, 0)


def test_a_named_expert_and_a_refused_request_are_no_decisions() -> None:
    refused = finished(routed=None, expert=None, answer=None, error="overloaded", status=429)
    replayed = again(entry(finished(routed=bypassed("good"))), entry(refused), entry(finished()))
    assert (replayed.entries, replayed.named, replayed.refused, replayed.repeated) == (3, 1, 1, 1)


@pytest.mark.parametrize(
    ("field", "value", "now"),
    [
        ("experts", ["cheap", "good"], ["good", "cheap"]),
        ("weights", [0.5, 0.5], None),
        ("scores", [0.9, 0.5000000000000001], [0.9, 0.5]),
        ("confidence", 0.91, 0.9),
        ("confidence", "NaN", 0.9),
        ("label", "maths", None),
        ("abstained", True, False),
        ("truncated", True, False),
        ("reason", "because", "good has an estimated quality of 0.900"),
    ],
)
def test_a_tampered_decision_is_found_and_named(field: str, value: Any, now: Any) -> None:
    replayed = again(entry(finished(), **{f"decision__{field}": value}))
    [difference] = replayed.differences
    assert (replayed.differing, replayed.repeated) == (1, 0)
    assert (difference.place, difference.id, difference.field) == ("log.jsonl:1", "d-1", field)
    assert difference.logged == value and (now is None or difference.now == now)


def test_a_line_from_before_truncation_was_told_replays() -> None:
    document = json.loads(encode(finished(), texts=False))
    del document["decision"]["truncated"], document["inputs"]["truncated"]
    old = decode(json.dumps(document).encode(), "log.jsonl:1")
    assert old.decision is not None and not old.decision.truncated
    assert again(old).repeated == 1


def test_a_line_from_before_there_were_selectors_replays() -> None:
    document = json.loads(encode(finished(), texts=False))
    del document["inputs"]["select"]
    document["inputs"]["k"] = 2
    old = decode(json.dumps(document).encode(), "log.jsonl:1")
    assert old.inputs is not None and old.inputs.select == TopK(2)
    assert old.decision is not None and old.decision.quality == (0.9, 0.5)
    assert again(old).repeated == 1


def test_tampered_decision_inputs_are_found_by_what_they_lead_to() -> None:
    replayed = again(entry(finished(), inputs__quality=[0.5, 0.4, 0.1]))
    assert {difference.field for difference in replayed.differences} >= {"experts", "scores", "confidence", "reason"}


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("allowed", ["stranger"], "NoEligibleExpert: allowed experts: stranger may answer"),
        ("seed", -1, "ValueError"),
    ],
)
def test_decision_inputs_of_which_no_decision_can_be_made_are_a_difference(field: str, value: Any, why: str) -> None:
    [difference] = again(entry(finished(), **{f"inputs__{field}": value})).differences
    assert difference.field == "decision" and difference.logged == ["good", "cheap"]
    assert why in str(difference.now)


def test_differences_beyond_a_thousand_are_only_counted() -> None:
    replayed = ReplayReport()
    bad = entry(finished(), decision__confidence=0.1, decision__label="x")
    for _ in range(700):
        replayed.add(bad)
    assert replayed.differing == 700 and len(replayed.differences) == 1000


def rerouted(entries: Iterable[Entry], *policies: Policy) -> Rerouter:
    rerouter = Rerouter({each.name: each for each in policies}, SNAPSHOT)
    again(*entries, rerouter=rerouter)
    return rerouter


def test_the_same_router_chooses_the_same_and_nothing_drifts() -> None:
    logged = [entry(finished(routed=routed(f"{i}", replace(inputs(), select=TopK()))), texts=True) for i in range(600)]
    [of] = rerouted(logged, policy()).by_policy.values()
    assert (of.routed, of.same_choice, of.same_router) == (600, 600, 600)
    assert (of.no_eligible_expert, of.largest_drift) == (0, 0.0)


def test_another_router_is_told_apart_with_what_it_changes() -> None:
    logged = [entry(finished(), texts=True)]
    other = policy({"cheap": 0.95, "good": 0.8, "new": 1.0, "general": np.nan}, digest="sha256:2")
    of = rerouted(logged, other).by_policy["default"]
    assert (of.routed, of.same_choice, of.same_router) == (1, 0, 0)
    assert of.largest_drift == pytest.approx(0.45)


def test_estimates_without_a_common_expert_have_no_drift() -> None:
    snapshot = Snapshot(1, {"new": SNAPSHOT.experts["good"].model_copy(update={"name": "new"})})
    rerouter = Rerouter({"default": policy({"new": 1.0})}, snapshot)
    again(entry(finished(), texts=True), rerouter=rerouter)
    assert rerouter.by_policy["default"].largest_drift is None


def test_load_times_are_those_that_were_logged() -> None:
    """A policy with a latency weight then chose a resident expert; routed again, it does the same."""
    estimate = Estimate(EXPERTS, np.array([[0.5, 0.9, 0.1]]))
    then = DecisionInputs(estimate, Utility(latency_weight=0.1), frozenset(EXPERTS), TopK(), load_s={"good": 30.0})
    patient = replace(policy(), utility=Utility(latency_weight=0.1))
    logged = entry(finished(routed=routed(made_from=then, by=patient)), texts=True)
    assert logged.decision is not None and logged.decision.experts == ("cheap",)
    assert rerouted([logged], patient).by_policy["default"].same_choice == 1


def test_entries_that_cannot_be_routed_again_are_counted() -> None:
    gone = Routed(
        Query.of("Hi", allowed=frozenset({"gone"})), routed().decision, policy(), inputs(), routed().composition
    )
    logged = [
        entry(finished(), texts=False),
        entry(finished(routed=routed(by=policy(name="old"))), texts=True),
        entry(finished(routed=gone), texts=True),
        entry(finished(routed=bypassed("good")), texts=True),
    ]
    rerouter = rerouted(logged, policy())
    assert (rerouter.without_text, rerouter.unknown_policy) == (1, 1)
    assert rerouter.by_policy["default"].no_eligible_expert == rerouter.by_policy["default"].routed == 1


def test_impossible_load_times_are_a_difference_and_no_choice() -> None:
    broken = entry(finished(), texts=True, inputs__load_s={"good": -1.0})
    rerouter = Rerouter({"default": policy()}, SNAPSHOT)
    [difference] = again(broken, rerouter=rerouter).differences
    assert "load_s must be finite" in str(difference.now)
    assert rerouter.by_policy["default"].same_choice == 0

"""decide: utilities, constraints, ties, and the fields of a decision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routers.base import Estimate
from routers.decision import Utility, decide
from routers.errors import NoEligibleExpert, RouterError

EXPERTS = ("small", "medium", "large")


def estimate(quality, cost=None, **kwargs):
    cost_usd = None if cost is None else np.asarray(cost, dtype=float)
    return Estimate(EXPERTS, np.asarray(quality, dtype=float), cost_usd, **kwargs)


ONE = estimate([[0.5, 0.7, 0.8]], [[0.001, 0.01, 0.1]])


def test_the_best_quality_wins_where_cost_is_free():
    [decision] = decide(ONE)
    assert decision.experts == ("large",)
    assert decision.scores == (0.8,)
    assert decision.weights == (1.0,)
    assert decision.confidence == 0.8
    assert (decision.label, decision.abstained) == (None, False)
    assert decision.reason == "large has an estimated quality of 0.800"


def test_a_cost_weight_prices_quality_against_cost():
    [decision] = decide(ONE, utility=Utility(cost_weight=2.0))
    assert decision.experts == ("medium",)
    assert decision.scores[0] == pytest.approx(0.7 - 2.0 * 0.01)
    assert decide(ONE, utility=Utility(cost_weight=100.0))[0].experts == ("small",)


def test_latency_weight_prices_the_wait_for_a_load():
    loads = {"large": 3.0, "medium": 0.5, "of another host": 9.0}
    [decision] = decide(ONE, utility=Utility(latency_weight=0.1), load_s=loads)
    assert decision.experts == ("medium",)
    assert decision.scores[0] == pytest.approx(0.7 - 0.1 * 0.5)
    assert decide(ONE, load_s=loads)[0].experts == ("large",)


def test_each_query_has_its_own_utility_and_its_own_allowed_experts():
    three = estimate([[0.5, 0.7, 0.8]] * 3, [[0.001, 0.01, 0.1]] * 3)
    utilities = [Utility(), Utility(cost_weight=2.0), Utility()]
    decisions = decide(three, utility=utilities, allowed=[None, None, {"small"}])
    assert [d.experts[0] for d in decisions] == ["large", "medium", "small"]


def test_allowed_for_all_is_a_collection_of_names():
    two = estimate([[0.5, 0.7, 0.8]] * 2)
    for allowed in ({"small", "medium"}, ["medium"], ("medium", "nobody knows me")):
        assert [d.experts for d in decide(two, allowed=allowed)] == [("medium",)] * 2


def test_k_experts_come_best_first_with_weights_of_their_utilities():
    [decision] = decide(ONE, k=2)
    assert decision.experts == ("large", "medium")
    assert decision.weights[0] / decision.weights[1] == pytest.approx(np.e)  # 0.1 apart
    assert sum(decision.weights) == pytest.approx(1)
    assert len(decide(ONE, k=9)[0].experts) == 3
    assert decide(estimate([[0.4, 0.4, 0.4]]), k=3)[0].weights == pytest.approx((1 / 3,) * 3)


def test_ties_go_to_the_cheaper_then_to_the_first():
    assert decide(estimate([[0.5, 0.5, 0.5]]))[0].experts == ("small",)
    assert decide(estimate([[0.5, 0.5, 0.5]], [[3, 1, 1]]))[0].experts == ("medium",)
    assert decide(estimate([[0.5, 0.5, 0.5]], [[3, 1, np.nan]]), k=3)[0].experts == ("medium", "small", "large")
    noise = estimate([[0.1 + 0.2, 0.3, 0.0]], [[2, 1, 1]])  # 0.30000000000000004 is no better than 0.3
    assert decide(noise)[0].experts == ("medium",)


def test_ties_go_to_chance_with_an_rng_and_better_experts_still_win():
    many = estimate([[0.5, 0.5, 0.4]] * 200)
    firsts = [d.experts[0] for d in decide(many, rng=np.random.default_rng(0))]
    assert firsts == [d.experts[0] for d in decide(many, rng=np.random.default_rng(0))]
    assert 60 < firsts.count("small") < 140
    assert "large" not in firsts


def test_only_eligible_experts_are_chosen_whatever_the_cost_weight():
    mapped = estimate([[0.5, 0.7, 0.8]], [[1, 1, 1]], eligible=np.array([[True, False, False]]), reasons=("mapped",))
    [decision] = decide(mapped, k=3, utility=Utility(cost_weight=0.1))
    assert (decision.experts, decision.reason) == (("small",), "mapped")


def test_constraints_that_empty_the_routers_choice_fall_back_to_the_best_allowed_and_say_so():
    confidence = np.array([0.99])
    eligible = np.array([[True, False, False]])
    mapped = estimate([[0.5, 0.7, 0.8]], eligible=eligible, reasons=("mapped",), confidence=confidence)
    assert decide(mapped)[0].confidence == 0.99
    [decision] = decide(mapped, allowed={"medium", "large"})
    assert decision.experts == ("large",)
    assert decision.confidence == 0.8  # 0.99 belongs to another expert
    assert decision.reason == (
        "mapped; the constraints exclude small; best of the allowed: large has an estimated quality of 0.800"
    )
    [silent] = decide(estimate([[0.5, 0.7, 0.8]], eligible=np.zeros((1, 3), dtype=bool)))
    assert silent.reason.startswith("the constraints exclude every choice of the router; best of the allowed: large")


def test_labels_abstention_and_confidence_are_passed_on():
    told = estimate(
        [[0.5, 0.7, 0.8]] * 2,
        labels=("math", "general"),
        abstained=np.array([False, True]),
        confidence=np.array([0.25, 1.0 + 1e-12]),
        reasons=("sure", "unsure"),
    )
    first, second = decide(told)
    assert (first.label, first.abstained, first.confidence, first.reason) == ("math", False, 0.25, "sure")
    assert (second.label, second.abstained, second.confidence, second.reason) == ("general", True, 1.0, "unsure")


def test_no_queries_give_no_decisions():
    assert decide(estimate(np.zeros((0, 3)))) == []
    assert decide(estimate(np.zeros((0, 3))), allowed=[], utility=[], rng=np.random.default_rng(0)) == []


def test_nan_quality_is_no_option():
    assert decide(estimate([[0.5, np.nan, 0.4]]), k=3)[0].experts == ("small", "large")
    with pytest.raises(NoEligibleExpert, match="query 2 of 2: quality: the router's estimate is NaN for medium, large"):
        decide(estimate([[0.5, 0.1, 0.1], [0.5, np.nan, np.nan]]), allowed=["medium", "large"])


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (["huge"], "^allowed experts: huge may answer, but this router only knows small, medium, large$"),
        ([], "allowed experts: no expert may answer"),
        ([frozenset()], "allowed experts: no expert may answer"),
    ],
)
def test_no_allowed_expert_is_an_error_that_names_the_constraint(allowed, message):
    with pytest.raises(NoEligibleExpert, match=message):
        decide(ONE, allowed=allowed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be a whole number >= 1"),
        ({"allowed": "small"}, "not the string 'small'"),
        ({"allowed": [None, None]}, "2 entries in allowed for 1 queries"),
        ({"allowed": [["small"], "large"]}, "2 entries in allowed for 1 queries"),
        ({"utility": [Utility(), Utility()]}, "2 utilities for 1 queries"),
        ({"load_s": {"small": -1.0}}, "finite seconds"),
        ({"load_s": {"small": np.inf}}, "finite seconds"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments, message):
    with pytest.raises(RouterError, match=message):
        decide(ONE, **arguments)


def test_allowed_that_mixes_names_and_collections_is_refused():
    with pytest.raises(RouterError, match="mixes names and collections"):
        decide(estimate([[0.5, 0.7, 0.8]] * 2), allowed=[["small"], "large"])


def test_a_cost_weight_needs_costs():
    with pytest.raises(RouterError, match="this router knows no costs"):
        decide(estimate([[0.5, 0.7, 0.8]]), utility=Utility(cost_weight=1.0))
    with pytest.raises(RouterError, match="the cost of medium is unknown"):
        decide(estimate([[0.5, 0.7, 0.8]], [[1, np.nan, 1]]), utility=Utility(cost_weight=1.0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), k=st.integers(1, 5))
def test_a_batch_decides_as_its_queries_alone_and_as_brute_force(seed, n, k):
    rng = np.random.default_rng(seed)
    quality, cost = rng.random((n, 4)).round(1), rng.random((n, 4)).round(1)
    names = ("a", "b", "c", "d")
    rates = [Utility(cost_weight=float(rng.integers(3)) / 2) for _ in range(n)]
    allowed = [set(rng.choice(names, rng.integers(1, 5), replace=False).tolist()) for _ in range(n)]
    together = decide(Estimate(names, quality, cost), utility=rates, allowed=allowed, k=k)
    for i, decision in enumerate(together):
        alone = decide(Estimate(names, quality[[i]], cost[[i]]), utility=rates[i], allowed=allowed[i], k=k)
        assert [decision] == alone
        utility = (quality[i] - rates[i].cost_weight * cost[i]).round(9)
        ranked = sorted((-utility[j], cost[i, j], j) for j in range(4) if names[j] in allowed[i])
        assert decision.experts == tuple(names[j] for *_, j in ranked[:k])


def test_a_decision_tells_that_the_end_of_its_query_was_not_read():
    estimate = Estimate(("a",), np.ones((2, 1)), truncated=np.array([True, False]))
    assert [decision.truncated for decision in decide(estimate)] == [True, False]

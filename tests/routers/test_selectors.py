"""Selectors: which experts are called and in which order, by hand and for any estimate."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from routers.base import Estimate
from routers.decision import Utility, decide
from routers.errors import InvalidSettings, RouterError
from routers.evaluation.thresholds import cascade_for_cost, dynamic_for_calls
from routers.selectors import SELECTORS, Cascade, Dynamic, Recruit, Selector, TopK, build_selector, selector_document

EXPERTS = ("small", "medium", "large", "huge")


def estimate(quality, cost=None, **kwargs) -> Estimate:
    cost_usd = None if cost is None else np.asarray(cost, dtype=float)
    return Estimate(EXPERTS[: len(quality[0])], np.asarray(quality, dtype=float), cost_usd, **kwargs)


ONE = estimate([[0.5, 0.7, 0.8, 0.75]], [[1e-3, 1e-2, 1e-1, 1.0]])


def chosen(select: Selector, of: Estimate = ONE, **kwargs) -> tuple[str, ...]:
    return decide(of, select=select, **kwargs)[0].experts


def test_top_k_is_what_k_is_short_for():
    assert chosen(TopK(3)) == decide(ONE, k=3)[0].experts == ("large", "huge", "medium")
    with pytest.raises(RouterError, match="give either select or k"):
        decide(ONE, select=TopK(), k=1)


def test_dynamic_adds_experts_until_one_of_them_is_likely_right():
    # in order: 0.8, then 1 - 0.2 * 0.25 = 0.95, then 1 - 0.2 * 0.25 * 0.3 = 0.985
    assert chosen(Dynamic(p=0.8)) == ("large",)
    assert chosen(Dynamic(p=0.81)) == ("large", "huge")
    assert chosen(Dynamic(p=0.95)) == ("large", "huge")
    assert chosen(Dynamic(p=0.96)) == ("large", "huge", "medium")
    assert chosen(Dynamic(p=0.96, k=2)) == ("large", "huge")
    assert chosen(Dynamic(p=1.0, k=9)) == ("large", "huge", "medium", "small")
    assert chosen(Dynamic(p=0.0)) == ("large",)


def test_dynamic_asks_more_where_the_router_is_less_sure():
    two = estimate([[0.95, 0.5], [0.55, 0.5]])
    assert [len(d.experts) for d in decide(two, select=Dynamic(p=0.9))] == [1, 2]


def test_cascade_starts_with_the_cheapest_that_is_within_the_tolerance_of_the_best():
    assert chosen(Cascade(tolerance=0.0)) == ("large",)
    assert chosen(Cascade(tolerance=0.1)) == ("medium",)
    assert chosen(Cascade(tolerance=0.3)) == ("small",)


def test_cascade_starts_with_the_cheapest_of_sufficient_quality_or_with_the_best_if_none_is():
    assert chosen(Cascade(threshold=0.6)) == ("medium",)
    assert chosen(Cascade(threshold=0.6, tolerance=0.05)) == ("large",)
    assert chosen(Cascade(threshold=0.9)) == ("large",)


def test_cascade_goes_on_to_dearer_and_better_experts_and_ends_with_the_best():
    assert chosen(Cascade(tolerance=0.3, k=4)) == ("small", "medium", "large")  # huge costs more and is no better
    assert chosen(Cascade(tolerance=0.3, k=2)) == ("small", "large")
    assert chosen(Cascade(tolerance=0.1, k=4)) == ("medium", "large")


def test_cascade_compares_by_utility_and_its_first_expert_bears_the_confidence():
    told = estimate([[0.5, 0.7, 0.8, 0.75]], [[1e-3, 1e-2, 1e-1, 1.0]], confidence=np.array([0.99]))
    assert chosen(Cascade(tolerance=0.1, k=4), told, utility=Utility(cost_weight=2.0)) == (
        "medium",
    )  # 0.68 is the best now
    assert decide(told, select=Cascade(tolerance=0.0))[0].confidence == 0.99
    [cheap] = decide(told, select=Cascade(tolerance=0.3, k=2))
    assert (cheap.confidence, cheap.quality, cheap.scores) == (0.5, (0.5, 0.8), (0.5, 0.8))


def test_cascade_without_costs_says_what_to_do():
    with pytest.raises(RouterError, match="a cascade asks cheap experts first, but this router knows no costs: train"):
        decide(estimate([[0.5, 0.7]]), select=Cascade(tolerance=0.1))
    with pytest.raises(RouterError, match="the cost of medium is unknown: use another selector"):
        decide(estimate([[0.5, 0.7]], [[1.0, np.nan]]), select=Cascade(tolerance=0.1))


def test_a_cascade_compares_as_exactly_as_its_threshold_is_given():
    quality = np.array([[0.1, 0.9]], dtype=np.float32)  # a little more than 0.1, and less than the threshold
    of = Estimate(("a", "b"), quality, np.array([[1.0, 2.0]]))
    select = Cascade(threshold=float(quality[0, 0]) + 1e-12)
    again = Estimate(("a", "b"), quality.astype(np.float64), of.cost_usd)
    assert chosen(select, of) == chosen(select, again) == ("b",)


def test_ties_in_a_cascade():
    same_cost = estimate([[0.5, 0.7, 0.7]], [[1.0, 1.0, 1.0]])
    assert chosen(Cascade(tolerance=0.5, k=3), same_cost) == ("medium",)
    same_quality = estimate([[0.7, 0.7, 0.7]], [[3.0, 1.0, 2.0]])
    assert chosen(Cascade(tolerance=0.0, k=3), same_quality) == ("medium",)


def weighted(weights, quality=(0.5, 0.7, 0.8, 0.75), cost=None) -> Estimate:
    return estimate([quality], cost, weights=np.array([weights], dtype=float))


def test_recruits_are_those_of_most_weight_whatever_their_quality():
    decision = decide(weighted([3.0, 1.0, 0.0, 2.0]), select=Recruit(2))[0]
    assert decision.experts == ("small", "huge") and decision.weights == (0.6, 0.4)
    assert decision.quality == (0.5, 0.75)
    assert chosen(Recruit(9), weighted([3.0, 1.0, 0.0, 2.0])) == ("small", "huge", "medium")  # zero weight, no vote
    assert chosen(Recruit(2), weighted([1.0, 1.0, 1.0, 0.0])) == ("large", "medium")  # equal: by utility
    assert chosen(Recruit(2), weighted([0.0] * 4)) == ("large", "huge")


def test_without_weights_of_the_router_recruits_are_the_top_k():
    assert decide(ONE, select=Recruit(3)) == decide(ONE, k=3)


def test_recruits_are_among_the_allowed():
    of = weighted([3.0, 1.0, 0.0, 2.0])
    assert chosen(Recruit(2), of, allowed={"medium", "large", "huge"}) == ("huge", "medium")
    assert decide(of, select=Recruit(2), allowed={"large"})[0].weights == (1.0,)


def test_a_price_takes_its_share_of_a_recruits_weight():
    # utilities 0.4 of 0.8 and 0.6 of 0.6: half of 3 is left, all of 2
    of = weighted([3.0, 2.0], quality=(0.8, 0.6), cost=[[0.4, 0.0]])
    assert decide(of, select=Recruit(2))[0].weights == (0.6, 0.4)
    priced = decide(of, select=Recruit(2), utility=Utility(cost_weight=1.0))[0]
    assert priced.experts == ("medium", "small") and priced.weights == pytest.approx((4 / 7, 3 / 7))


def test_draws_with_replacement_follow_the_weights_and_repeat_with_the_seed():
    of = weighted([0.7, 0.2, 0.1, 0.0])
    select = Recruit(3, draw="replacement", seed=5)
    assert decide(of, select=select) == decide(of, select=select)
    rng = np.random.default_rng(0)
    drawn = [decide(of, select=select, rng=rng)[0].experts for _ in range(2000)]
    assert all(len(experts) == 3 for experts in drawn)
    shares = [np.mean([experts.count(name) for experts in drawn]) / 3 for name in EXPERTS]
    assert shares == pytest.approx([0.7, 0.2, 0.1, 0.0], abs=0.02)
    assert ("small", "small", "small") in drawn  # 0.343 of the time
    assert chosen(Recruit(3, "replacement"), of, allowed={"huge"}) == ("huge",)


LEVELS = st.sampled_from([0.0, 0.1, 0.2, 0.35, 0.5, 0.50001, 0.75, 0.9, 1.0])


@st.composite
def estimates(draw) -> Estimate:
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    quality, cost = draw(arrays(np.float64, shape, elements=LEVELS)), draw(arrays(np.float64, shape, elements=LEVELS))
    return estimate(quality, cost, eligible=draw(arrays(np.bool_, shape)))


SELECTED = st.one_of(
    st.builds(TopK, k=st.integers(1, 5)),
    st.builds(Dynamic, p=st.floats(0, 1), k=st.integers(1, 5)),
    st.builds(Cascade, tolerance=st.floats(0, 1), threshold=st.floats(0, 1), k=st.integers(1, 5)),
    st.builds(Recruit, k=st.integers(1, 5)),
)


@settings(max_examples=50, deadline=None)
@given(of=estimates(), select=SELECTED)
def test_any_selector_asks_some_candidates_once_each_and_at_most_k(of: Estimate, select: Selector):
    everybody = decide(of, k=len(of.experts))
    for i, (decision, all_) in enumerate(zip(decide(of, select=select), everybody, strict=True)):
        assert 1 <= len(decision.experts) <= select.k
        assert len(set(decision.experts)) == len(decision.experts)
        assert set(decision.experts) <= set(all_.experts)
        assert decision.quality == tuple(of.quality[i, of.experts.index(name)] for name in decision.experts)
        assert decide(of.row(i), select=select) == [decision]


@settings(max_examples=50, deadline=None)
@given(of=estimates(), p=st.floats(0, 1), k=st.integers(1, 5))
def test_dynamic_takes_the_shortest_prefix_that_reaches_p(of: Estimate, p: float, k: int):
    for got, best in zip(decide(of, select=Dynamic(p, k)), decide(of, k=k), strict=True):
        size = len(got.experts)
        assert got.experts == best.experts[:size]
        reached = 1 - np.cumprod(1 - np.array(best.quality))
        assert all(reached[: size - 1] < p)
        assert size == len(best.experts) or reached[size - 1] >= p


@settings(max_examples=50, deadline=None)
@given(of=estimates(), tolerance=st.floats(0, 1), k=st.integers(1, 5))
def test_a_cascade_rises_in_cost_and_quality_up_to_the_best(of: Estimate, tolerance: float, k: int):
    for i, (path, best) in enumerate(zip(decide(of, select=Cascade(tolerance, k=k)), decide(of), strict=True)):
        costs = [of.cost_usd[i, of.experts.index(name)] for name in path.experts]  # type: ignore[index]
        assert all(a < b for a, b in pairwise(costs)) and all(a < b for a, b in pairwise(path.quality))
        assert path.quality[0] >= best.quality[0] - tolerance - 1e-11
        if k > 1:
            assert path.quality[-1] == pytest.approx(best.quality[0], abs=1e-11)


@pytest.mark.parametrize(
    "select",
    [TopK(3), Dynamic(0.75, 4), Cascade(tolerance=0.1), Cascade(threshold=0.5, k=2), Recruit(2, "replacement", 7)],
)
def test_a_selector_is_a_value_that_its_document_gives_back(select: Selector):
    assert build_selector(selector_document(select)) == select
    assert math.inf not in selector_document(select).values()


def test_selectors_by_name_with_defaults():
    assert build_selector("best") == TopK(1)
    assert build_selector("dynamic", k=3) == Dynamic(k=3)
    assert build_selector({"kind": "dynamic", "p": 0.5}, k=3) == Dynamic(0.5, 3)
    assert set(SELECTORS) == {"top-k", "dynamic", "cascade", "recruit"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("dynamc", "no selector 'dynamc'; did you mean 'dynamic'\\? there are: best, top-k, dynamic, cascade"),
        ({"k": 3}, "no selector None"),
        ({"kind": "dynamic", "q": 0.5}, "selector 'dynamic' has no setting q; it has: p, k"),
        ({"kind": "dynamic", "p": 1.5}, r"p must be a number in \[0, 1\], got 1.5"),
        ({"kind": "dynamic", "p": "high"}, "p must be a number"),
        ({"kind": "dynamic", "p": math.nan}, "p must be a number"),
        ({"kind": "top-k", "k": 0}, "k must be a whole number >= 1"),
        ({"kind": "recruit", "draw": "lots"}, "draw must be 'top' or 'replacement'"),
        ({"kind": "recruit", "seed": -1}, "seed must be a whole number >= 0"),
        ({"kind": "top-k", "k": 2.0}, "k must be a whole number >= 1"),
        ({"kind": "top-k", "k": True}, "k must be a whole number >= 1"),
        ({"kind": "best", "k": 2}, "asks one expert, not k=2"),
        ("cascade", "needs `tolerance`"),
    ],
)
def test_documents_that_make_no_sense_are_refused(document, message):
    with pytest.raises(InvalidSettings, match=message):
        build_selector(document)


def test_the_p_of_a_dynamic_selector_is_solved_for_a_budget_of_calls():
    three = estimate([[0.9, 0.5, 0.5], [0.6, 0.5, 0.5], [0.4, 0.3, 0.2]])
    # after one expert 0.9, 0.6, 0.4; after two 0.95, 0.8, 0.58
    assert dynamic_for_calls(three, 4 / 3, k=3).p == pytest.approx(0.58)
    assert dynamic_for_calls(three, 1, k=3).p == pytest.approx(0.4)
    assert dynamic_for_calls(three, 3, k=3).p == 1.0
    with pytest.raises(RouterError, match="calls must be >= 1"):
        dynamic_for_calls(three, 0.5, k=3)


@settings(max_examples=50, deadline=None)
@given(of=estimates(), calls=st.floats(1, 5), k=st.integers(1, 4))
def test_a_solved_p_meets_its_budget(of: Estimate, calls: float, k: int):
    solved = dynamic_for_calls(of, calls, k=k)
    assert np.mean([len(d.experts) for d in decide(of, select=solved)]) <= calls + 1e-9


def test_the_tolerance_of_a_cascade_is_the_least_that_meets_a_cost():
    two = estimate([[0.5, 0.7], [0.5, 0.9]], [[1.0, 3.0], [1.0, 3.0]])
    assert cascade_for_cost(two, 2.0).tolerance == pytest.approx(0.2)
    assert cascade_for_cost(two, 3.0).tolerance == 0.0
    assert cascade_for_cost(two, 2.5, costs_usd=[[2.0, 3.0], [2.0, 3.0]], k=2).tolerance == pytest.approx(0.2)
    with pytest.raises(RouterError, match="even the cheapest experts cost 1 USD per query, more than 0.5"):
        cascade_for_cost(two, 0.5)


@settings(max_examples=50, deadline=None)
@given(of=estimates(), budget=st.floats(0, 1))
def test_a_solved_tolerance_meets_its_budget(of: Estimate, budget: float):
    try:
        solved = cascade_for_cost(of, budget)
    except RouterError:
        return
    costs = of.cost_usd
    assert costs is not None
    firsts = [of.experts.index(d.experts[0]) for d in decide(of, select=solved)]
    assert np.mean(costs[np.arange(len(of)), firsts]) <= budget + 1e-12

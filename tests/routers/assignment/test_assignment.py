"""Joint assignments: never above budget or capacity, at least as good as rounding allows, and bounds that hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routers.assignment.joint import Assignment, assign, budget_points
from routers.assignment.problem import DualPrices, Infeasible, Problem, upper_bound
from routers.errors import RouterError


def drawn(seed: int, n: int, m: int, *, limited: bool = False, loads: bool = False) -> Problem:
    """A random problem of few queries, with a budget between the cheapest and the best assignment."""
    rng = np.random.default_rng(seed)
    allowed = rng.random((n, m)) < 0.8
    allowed[np.arange(n), rng.integers(m, size=n)] = True
    price = np.round(rng.lognormal(0.0, 1.0, (n, m)), 2)
    least = np.where(allowed, price, np.inf).min(axis=1).sum()
    capacity = np.full(m, np.inf)
    if limited:
        capacity[: m - 1] = rng.integers(1, n + 1, size=m - 1)
        allowed[:, m - 1] = True
        least = np.maximum(least, price[:, m - 1].sum())
    return Problem(
        np.round(rng.random((n, m)), 2),
        price,
        allowed,
        float(least * (1 + rng.random())),
        capacity,
        np.arange(m) // 2,
        np.round(rng.random((m + 1) // 2), 2) * loads,
    )


def best(problem: Problem) -> float:
    """The objective of the best assignment, of all that there are."""
    n, m = problem.shape
    found = -np.inf
    for columns in itertools.product(range(m), repeat=n):
        chosen = np.array(columns)
        if problem.allowed[np.arange(n), chosen].all() and is_within(problem, chosen):
            found = max(found, problem.worth(chosen))
    return found


def is_within(problem: Problem, chosen: np.ndarray) -> bool:
    counts = np.bincount(chosen, minlength=problem.shape[1])
    return problem.price_of(chosen) <= problem.spendable_usd and bool((counts <= problem.capacity).all())


def check(problem: Problem, found: Assignment) -> None:
    rows = np.arange(problem.shape[0])
    assert problem.allowed[rows, found.chosen].all() and is_within(problem, found.chosen)
    assert found.quality == pytest.approx(problem.quality[rows, found.chosen].sum())
    assert found.upper_bound >= found.quality - found.load_cost - 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from([0, 20_000]))
def test_assignments_keep_the_limits_and_bounds_hold_for_the_best_one(
    seed: int, limited: bool, loads: bool, most_linear: int
) -> None:
    problem = drawn(seed, 5, 4, limited=limited, loads=loads)
    found = assign(problem, most_linear=most_linear)
    check(problem, found)
    exact = best(problem)
    assert found.quality - found.load_cost <= exact + 1e-9 <= found.upper_bound + 1e-6
    if not loads and not limited:  # one query is split by the linear programme; a whole query is worth 1 at most
        assert found.quality > exact - 1.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 5), st.integers(0, 3))
def test_any_prices_give_a_bound(seed: int, usd: float, loaded: int) -> None:
    problem = drawn(seed, 4, 4, limited=True, loads=True)
    prices = DualPrices(usd, np.where(np.isfinite(problem.capacity), 0.3, 0.0))
    assert upper_bound(problem, prices, np.array([loaded & 1, loaded & 2]).astype(bool)) >= best(problem) - 1e-9


def test_many_queries_reach_the_bound_by_both_methods() -> None:
    problem = drawn(1, 3_000, 6)
    linear, bisection = assign(problem), assign(problem, most_linear=0)
    for found in (linear, bisection):
        check(problem, found)
        assert found.gap < 0.05 and found.price_usd > 0.999 * problem.budget_usd
    assert (linear.method, bisection.method) == ("linear programme", "bisection")
    assert linear.prices.usd == pytest.approx(bisection.prices.usd, rel=1e-3)
    # At the dual price, nearly every query on its own makes the same choice.
    alone = problem.reduced(DualPrices.free(6, linear.prices.usd)).argmax(axis=1)
    assert (alone != linear.chosen).sum() <= 3


def test_capacities_move_the_queries_that_lose_least() -> None:
    problem = drawn(2, 2_000, 5)
    limited = Problem(
        problem.quality, problem.price_usd, np.ones((2_000, 5), bool), np.inf, np.array([100.0, 300, np.inf, 50, 2_000])
    )
    linear, bisection = assign(limited), assign(limited, most_linear=0)
    for found in (linear, bisection):
        check(limited, found)
        assert np.bincount(found.chosen, minlength=5)[[0, 1, 3]].tolist() == [100, 300, 50]
    assert linear.gap < 1e-6 and bisection.gap < 0.01 * bisection.quality
    assert linear.prices.capacity[0] > 0 and linear.prices.usd == 0.0


def test_a_load_that_few_queries_need_is_not_worth_it() -> None:
    quality = np.tile([0.5, 0.4], (100, 1))
    quality[:5] = [0.5, 0.9]  # five queries gain 2.0 by the second expert
    one = np.zeros((100, 2))
    for cost, loads in ((1.9, 2), (2.1, 1)):
        problem = Problem(quality, one, np.ones((100, 2), bool), load_cost=np.array([1.0, cost]))
        found = assign(problem)
        assert found.loaded.sum() == loads and found.gap == pytest.approx(0.0, abs=1e-9)
        assert found.load_cost == (1.0 + cost if loads == 2 else 1.0)
    # An adapter of a base that is loaded anyway costs nothing more.
    shared = Problem(quality, one, np.ones((100, 2), bool), residency=np.zeros(2, int), load_cost=np.array([50.0]))
    assert np.bincount(assign(shared).chosen).tolist() == [95, 5]


def test_equal_qualities_go_to_the_cheaper_expert_and_no_budget_takes_the_best() -> None:
    problem = Problem(np.array([[0.5, 0.5, 0.4]]), np.array([[2.0, 1.0, 0.1]]), np.ones((1, 3), bool))
    assert assign(problem).chosen.tolist() == [1] and assign(problem).prices.usd == 0.0
    assert assign(problem.with_budget(0.1)).chosen.tolist() == [2]
    assert assign(problem.with_budget(0.1)).quality == 0.4


def test_impossible_budgets_and_capacities_are_refused_with_the_least_budget() -> None:
    problem = drawn(3, 50, 4)
    least = np.where(problem.allowed, problem.price_usd, np.inf).min(axis=1).sum()
    for most_linear in (0, 100):
        with pytest.raises(Infeasible, match="cheapest experts of all queries cost") as caught:
            assign(problem.with_budget(least * 0.99), most_linear=most_linear)
        assert caught.value.needed_usd == pytest.approx(least)
        assert assign(problem.with_budget(least), most_linear=most_linear).price_usd == pytest.approx(least)


def test_budgets_from_the_cheapest_to_the_best_buy_ever_more_at_falling_prices() -> None:
    problem = drawn(4, 500, 5)
    points = list(budget_points(problem, 6))
    assert len(points) == 6 and points[-1].quality == pytest.approx(problem.scores.max(axis=1).sum())
    assert points[0].price_usd == pytest.approx(problem.usd[problem.allowed].min(), rel=1e9)  # feasible
    qualities = [point.quality for point in points]
    assert qualities == sorted(qualities)
    gains = [point.quality_per_usd for point in points]
    assert gains == sorted(gains, reverse=True) and gains[-1] == 0.0
    assert all(point.price_usd <= point.budget_usd * (1 + 1e-9) for point in points)


def test_wrong_arrays_are_refused() -> None:
    one = np.ones((2, 2))
    with pytest.raises(RouterError, match="one shape"):
        Problem(one, np.ones((2, 3)), one.astype(bool))
    with pytest.raises(RouterError, match="no allowed expert"):
        Problem(one, one, np.zeros((2, 2), bool))
    with pytest.raises(RouterError, match="price of an allowed expert"):
        Problem(one, -one, one.astype(bool))
    with pytest.raises(RouterError, match="quality of an allowed expert"):
        Problem(one * np.nan, one, one.astype(bool))
    with pytest.raises(RouterError, match="numbers >= 0"):
        Problem(one, one, one.astype(bool), -1.0)

"""Tight capacities and budgets: an assignment is found wherever there is one, and every refusal is proven."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from routers.assignment import exchange, lagrange
from routers.assignment.joint import assign, budget_points
from routers.assignment.problem import DualPrices, Infeasible, Problem, upper_bound

METHODS = [0, 20_000]
"""Most queries of the linear programme: bisection alone, or both."""


def planted(seed: int, n: int, m: int, slack: float) -> Problem:
    """Capacities that a hidden assignment fills to the last place, and its price times the slack as the budget."""
    rng = np.random.default_rng(seed)
    hidden, rows = rng.integers(m, size=n), np.arange(n)
    allowed = rng.random((n, m)) < 0.5
    allowed[rows, hidden] = True
    price = rng.random((n, m))
    capacity = np.bincount(hidden, minlength=m).astype(float)
    return Problem(rng.random((n, m)), price, allowed, float(price[rows, hidden].sum() * slack), capacity)


def is_within(problem: Problem, chosen: np.ndarray) -> bool:
    counts = np.bincount(chosen, minlength=problem.shape[1])
    allowed = problem.allowed[np.arange(chosen.size), chosen].all()
    return bool(allowed and (counts <= problem.capacity).all() and problem.price_of(chosen) <= problem.spendable_usd)


def least_usd(problem: Problem) -> float:
    """The price of the cheapest assignment within finite capacities, by another algorithm; infinite without one."""
    places = np.repeat(np.arange(problem.shape[1]), problem.capacity.astype(int))
    price = np.where(problem.allowed, problem.price_usd, np.inf)[:, places]
    try:
        return float(price[linear_sum_assignment(price)].sum()) if places.size >= len(price) else np.inf
    except ValueError:  # infeasible
        return np.inf


@pytest.mark.parametrize("most_linear", METHODS)
@pytest.mark.parametrize("slack", [1.0, 1.001, 1.05, 1.5])
def test_planted_assignments_that_fill_every_place_are_all_solved(slack: float, most_linear: int) -> None:
    for seed in range(12):
        problem = planted(seed, 20 + 5 * seed, 3 + seed % 3, slack)
        found = assign(problem, most_linear=most_linear)
        assert is_within(problem, found.chosen)
        assert found.quality <= found.upper_bound + 1e-6 and found.gap < 0.1 * problem.shape[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 4), st.sampled_from(METHODS))
def test_few_queries_are_assigned_wherever_brute_force_finds_an_assignment(
    seed: int, n: int, m: int, most_linear: int
) -> None:
    rng = np.random.default_rng(seed)
    allowed = rng.random((n, m)) < 0.7
    allowed[np.arange(n), rng.integers(m, size=n)] = True
    capacity = np.where(rng.random(m) < 0.3, np.inf, rng.integers(0, n + 1, m))
    problem = Problem(rng.normal(size=(n, m)).round(2), rng.random((n, m)).round(1), allowed, np.inf, capacity)
    every = [np.array(columns) for columns in itertools.product(range(m), repeat=n)]
    prices = [problem.price_of(chosen) for chosen in every if is_within(problem, chosen)]
    if not prices:
        with pytest.raises(Infeasible, match="queries can go to") as caught:
            assign(problem, most_linear=most_linear)
        assert caught.value.needed_usd is None
        return
    for price in {min(prices), float(np.median(prices))}:  # slack 1.0
        limited = problem.with_budget(price)
        found = assign(limited, most_linear=most_linear)
        assert is_within(limited, found.chosen) and found.upper_bound >= problem.quality_of(found.chosen) - 1e-9
    if min(prices) > 0:
        with pytest.raises(Infeasible, match="cheapest") as caught:
            assign(problem.with_budget(min(prices) * 0.99), most_linear=most_linear)
        assert caught.value.needed_usd == pytest.approx(min(prices))


def test_two_queries_that_must_swap_are_swapped() -> None:
    """Single moves find no room: the query that gains most by the free place must take the other one's."""
    allowed = np.array([[False, True, True]] * 2)
    problem = Problem(
        np.array([[0, 0.195, 0.542], [0, 0.818, 0.014]]),
        np.array([[0, 0.2, 0.0], [0, 0.7, 0.2]]),
        allowed,
        0.55,
        np.array([np.inf, np.inf, 1.0]),
    )
    assert [assign(problem, most_linear=most).chosen.tolist() for most in METHODS] == [[1, 2]] * 2


@pytest.mark.parametrize("most_linear", METHODS)
def test_the_least_budget_is_exact_and_is_enough(most_linear: int) -> None:
    for seed in range(4):
        problem = planted(seed, 60, 4, 1.0)
        least = least_usd(problem)
        assert least > problem.cheapest_usd
        with pytest.raises(Infeasible, match="cheapest assignment within the capacities costs") as caught:
            assign(problem.with_budget(least * 0.999), most_linear=most_linear)
        assert caught.value.needed_usd == pytest.approx(least)
        found = assign(problem.with_budget(least), most_linear=most_linear)
        assert found.price_usd == pytest.approx(least) and np.isfinite(found.upper_bound)


def test_budgets_start_at_the_cheapest_assignment_within_the_capacities() -> None:
    problem = planted(5, 80, 4, 1.0)
    points = list(budget_points(problem, 4))
    assert len(points) == 4 and points[0].budget_usd == pytest.approx(least_usd(problem))


def test_a_search_that_ends_early_claims_no_least_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = planted(1, 300, 5, 1.0)
    problem = problem.with_budget(problem.cheapest_usd)
    within = exchange.settled(problem, lagrange.best_quality(problem), -problem.scores)
    full = exchange._cancelled
    monkeypatch.setattr(exchange, "_cancelled", lambda problem, chosen, cost, most: full(problem, chosen, cost, 1))
    with pytest.raises(
        Infeasible, match=r"in the work allowed: it costs .* at least, and one of .* was found"
    ) as caught:
        exchange.affordable(problem, within, DualPrices.free(5))
    assert caught.value.needed_usd is None


def test_a_surplus_goes_by_way_of_another_expert() -> None:
    """Query 0 can go to the middle expert alone of the others, which must give query 1 away."""
    allowed = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 0]], dtype=bool)
    problem = Problem(np.zeros((3, 3)), np.ones((3, 3)), allowed, capacity=np.ones(3))
    assert exchange.settled(problem, np.array([0, 1, 0]), np.where(allowed, 0.0, np.inf)).tolist() == [1, 2, 0]


def limited(allowed: list[list[int]], capacity: list[float]) -> Problem:
    shape = np.shape(allowed)
    return Problem(
        np.ones(shape),
        np.ones(shape),
        np.array(allowed, dtype=bool),
        capacity=np.array(capacity),
        experts=("big", "small", "code")[: shape[1]],
    )


@pytest.mark.parametrize("most_linear", METHODS)
@pytest.mark.parametrize(
    ("allowed", "capacity", "message"),
    [
        ([[1, 0]] * 3 + [[1, 1]], [2, 9], "3 queries can go to big alone, and its capacity is 2: raise it"),
        (
            [[1, 1]] * 9,
            [5, 3.5],
            r"9 queries can go to big, small alone, and their capacities allow 8 \(big 5, small 3\)",
        ),
        ([[1, 1, 0]] * 5 + [[0, 0, 1]], [2, 2, np.inf], r"5 queries can go to big, small alone, .* allow 4"),
    ],
)
def test_capacities_that_are_too_small_are_named(
    allowed: list[list[int]], capacity: list[float], message: str, most_linear: int
) -> None:
    with pytest.raises(Infeasible, match=message) as caught:
        assign(limited(allowed, capacity), most_linear=most_linear)
    assert caught.value.needed_usd is None


def test_budgets_close_to_the_cheapest_assignment_have_a_bound_that_means_something() -> None:
    problem = planted(7, 400, 5, 1.0)
    found = assign(problem.with_budget(least_usd(problem) * 1.0005), most_linear=0)
    assert found.gap < 0.02 * found.quality
    assert upper_bound(problem, found.prices, found.loaded) >= found.quality

"""Dual prices by bisection: the price of the budget, and with capacities one price for each full expert.

The spend of the choices `argmax_j quality_ij - price * usd_ij` falls as the price rises, so the price that spends the
budget is found by bisection (Fisher, Management Science 27(1), 1981, on Lagrangian relaxation). A query with the same
choice at both ends of the interval keeps it inside, so only the others are looked at again. With capacities each full
expert has a price, too, found by descent on the dual by coordinates.
"""

from __future__ import annotations

import numpy as np

from routers.assignment.exchange import settled
from routers.assignment.moves import cheaper
from routers.assignment.problem import Columns, DualPrices, Floats, Problem, upper_bound

_STEPS = 100
_NARROW = 1e-12
_LIMITED_STEPS = 24
_SWEEPS, _STEADY = 20, 1e-6
"""Rounds over the experts with capacities, and the change of prices at which they end."""
_EPSILON = 1e-9
_TIE = 1e-12


def solve(problem: Problem) -> tuple[Columns, DualPrices]:
    """An assignment within budget and capacities, and its dual prices.

    Raises:
        Infeasible: the budget is below the cheapest assignment, or the capacities leave queries without an expert; or,
            with capacities and a budget close to the cheapest assignment of very many queries, none was found.
    """
    problem.check()
    return _limited(problem) if problem.is_limited else _unlimited(problem)


def _unlimited(problem: Problem) -> tuple[Columns, DualPrices]:
    scores, usd, budget = problem.scores, problem.usd, problem.spendable_usd
    m = problem.shape[1]
    low_choice = best_quality(problem)
    if problem.price_of(low_choice) <= budget:
        return low_choice, DualPrices.free(m)
    low, high = 0.0, 1.0 / max(float(usd.mean()), 1e-12)
    while problem.price_of(high_choice := _choice(scores, usd, high)) > budget and high < 1e15:
        low, high = high, high * 8
    if low:
        low_choice = _choice(scores, usd, low)
    if problem.price_of(high_choice) > budget:  # prices so close that no weight separates them
        prices = DualPrices.free(m, high)
        return cheaper(problem, high_choice, prices), prices
    chosen = high_choice.copy()
    rows = np.flatnonzero(low_choice != high_choice)
    scores, usd, at_low, at_high = scores[rows], usd[rows], low_choice[rows], high_choice[rows]
    settled = problem.price_of(chosen) - _spend(usd, at_high)
    for _ in range(_STEPS):
        if not rows.size or high - low <= _NARROW * high:
            break
        middle = (low + high) / 2
        choice = _choice(scores, usd, middle)
        if settled + _spend(usd, choice) <= budget:
            high, at_high, chosen[rows] = middle, choice, choice
        else:
            low, at_low = middle, choice
        same = at_low == at_high
        settled += _spend(usd[same], at_high[same])
        rows, scores, usd = rows[~same], scores[~same], usd[~same]
        at_low, at_high = at_low[~same], at_high[~same]
    return chosen, DualPrices.free(m, high)


def best_quality(problem: Problem) -> Columns:
    """(n,) the expert of highest quality of each query; of equal ones the cheapest."""
    equal = problem.scores >= problem.scores.max(axis=1, keepdims=True) - _TIE
    return np.asarray(np.where(equal, problem.usd, np.inf).argmin(axis=1), dtype=np.intp)


def _choice(scores: Floats, usd: Floats, price: float) -> Columns:
    return np.asarray((scores - price * usd).argmax(axis=1), dtype=np.intp)


def _spend(usd: Floats, chosen: Columns) -> float:
    return float(usd[np.arange(chosen.size), chosen].sum())


def _limited(problem: Problem) -> tuple[Columns, DualPrices]:
    """Bisection over the price of the budget; each step starts from the capacities' prices of the one before."""
    chosen, capacity = _balanced(problem, 0.0, np.zeros(problem.shape[1]))
    if problem.price_of(chosen) <= problem.spendable_usd:
        return chosen, DualPrices(0.0, capacity)
    tried = [DualPrices(0.0, capacity)]
    low, high = 0.0, 1.0 / max(float(problem.usd.mean()), 1e-12)
    chosen, capacity = _balanced(problem, high, capacity)
    while problem.price_of(chosen) > problem.spendable_usd and high < 1e15:
        tried.append(DualPrices(high, capacity))
        low, high = high, high * 8
        chosen, capacity = _balanced(problem, high, capacity)
    if problem.price_of(chosen) > problem.spendable_usd:  # the budget is close to the cheapest assignment
        every = np.ones(problem.load_cost.size, dtype=bool)
        found = min(tried, key=lambda prices: upper_bound(problem, prices, every))
        return cheaper(problem, chosen, found), found
    prices = capacity
    for _ in range(_LIMITED_STEPS):
        middle = (low + high) / 2
        choice, prices = _balanced(problem, middle, prices)
        if problem.price_of(choice) <= problem.spendable_usd:
            high, chosen, capacity = middle, choice, prices
        else:
            low = middle
    return chosen, DualPrices(high, capacity)


def _balanced(problem: Problem, price: float, start: Floats) -> tuple[Columns, Floats]:
    """Choices within the capacities at a price of the budget, and (m,) prices of capacity.

    One expert at a time gets the lowest price at which its capacity suffices, the others' prices given: descent on the
    dual by coordinates. It may stop short of the best prices; the rest of the surplus is then exchanged (`settled`).
    """
    base = problem.scores - price * problem.usd
    n = problem.shape[0]
    limited = np.flatnonzero(problem.capacity < n)
    capacity = np.where(problem.capacity < n, start, 0.0)
    for _ in range(_SWEEPS):
        before = capacity.copy()
        for column in limited:
            others = base - capacity
            others[:, column] = -np.inf
            margin = base[:, column] - others.max(axis=1)
            most = int(problem.capacity[column])
            threshold = -np.partition(-margin, most)[most]  # of the best query that has no place; finite: `check`
            capacity[column] = max(0.0, threshold + _EPSILON)
        if np.abs(capacity - before).max(initial=0.0) <= _STEADY:
            break
    values = base - capacity
    return settled(problem, np.asarray(values.argmax(axis=1), dtype=np.intp), -values), capacity

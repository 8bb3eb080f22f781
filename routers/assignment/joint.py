"""The joint assignment: which residencies are loaded, where each query goes, and how far that is from best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from routers.assignment import lagrange, linear
from routers.assignment.exchange import cheapest, settled
from routers.assignment.moves import better, frugal
from routers.assignment.problem import Columns, DualPrices, Infeasible, Mask, Problem, upper_bound

MOST_LINEAR = 20_000
"""Most queries for which the linear programme is solved; beyond, the dual prices come from bisection."""
_MOST_CHANGES = 200


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """An assignment of n queries within budget and capacities.

    Attributes:
        chosen: (n,) columns of experts.
        quality: sum of predicted quality. price_usd: sum of predicted prices.
        load_cost: quality given up for loads. loaded: (r,) the residencies that are loaded.
        upper_bound: no assignment has a higher `quality - load_cost`.
        prices: dual prices; `prices.usd` is the quality that one more USD buys.
        method: `linear programme` or `bisection`.
    """

    chosen: Columns
    quality: float
    price_usd: float
    load_cost: float
    loaded: Mask
    upper_bound: float
    prices: DualPrices
    method: str

    @property
    def gap(self) -> float:
        """Quality by which an assignment could be better at most."""
        return max(0.0, self.upper_bound - (self.quality - self.load_cost))


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """What a budget buys: the price and the quality of its assignment, and the quality that one more USD buys."""

    budget_usd: float
    price_usd: float
    quality: float
    quality_per_usd: float


def assign(problem: Problem, *, most_linear: int = MOST_LINEAR) -> Assignment:
    """Assign all queries jointly; the same problem always gives the same assignment.

    With load costs, residencies are closed and opened one at a time while that raises the objective (as bisection
    values it), then the queries are assigned within the open ones.

    Raises:
        Infeasible: no assignment meets the budget and the capacities.
    """
    if not problem.shape[0]:
        nothing = np.empty(0, dtype=np.intp)
        prices = DualPrices.free(problem.shape[1])
        return Assignment(nothing, 0.0, 0.0, 0.0, problem.loads_of(nothing), 0.0, prices, "bisection")
    opened = _opened(problem) if problem.load_cost.any() else np.ones(problem.load_cost.size, dtype=bool)
    within = problem.within(opened)
    by_programme = problem.shape[0] <= most_linear
    chosen, prices = linear.solve(within) if by_programme else lagrange.solve(within)
    chosen = better(within, frugal(within, chosen))
    loaded = problem.loads_of(chosen)
    return Assignment(
        chosen,
        problem.quality_of(chosen),
        problem.price_of(chosen),
        float(problem.load_cost[loaded].sum()),
        loaded,
        upper_bound(problem, prices, loaded),
        prices,
        "linear programme" if by_programme else "bisection",
    )


def budget_points(problem: Problem, count: int) -> Iterator[BudgetPoint]:
    """What budgets from the cheapest assignment to the best one buy, in `count` equal steps, by bisection.

    Raises:
        Infeasible: the capacities allow no assignment.
    """
    if not problem.shape[0]:
        return
    free = problem.with_budget(np.inf)
    most = assign(free, most_linear=0).price_usd
    least = _cheapest_usd(free)
    for step in range(count):
        budget = least + (most - least) * step / (count - 1)
        try:
            found = assign(problem.with_budget(budget), most_linear=0)
        except Infeasible:  # the cheapest assignment of very many queries was not found again
            continue
        yield BudgetPoint(budget, found.price_usd, found.quality, found.prices.usd)


def _cheapest_usd(problem: Problem) -> float:
    """The price of the cheapest assignment within the capacities, or of one that is nearly so."""
    if not problem.is_limited:
        return problem.cheapest_usd
    cost = np.where(problem.allowed, problem.usd, np.inf)
    within = settled(problem, np.asarray(cost.argmin(axis=1), dtype=np.intp), cost)
    return problem.price_of(cheapest(problem.with_budget(0.0), within)[0])


def _opened(problem: Problem) -> Mask:
    """(r,) the residencies to load, by local search from all of them."""
    opened = np.ones(problem.load_cost.size, dtype=bool)
    value = problem.worth(lagrange.solve(problem)[0])
    for _ in range(_MOST_CHANGES):
        best = None
        for residency in range(opened.size):
            changed = opened.copy()
            changed[residency] = not changed[residency]
            if changed.any() and (other := _value(problem, changed)) is not None and other > value + 1e-9:
                best, value = changed, other
        if best is None:
            return opened
        opened = best
    return opened


def _value(problem: Problem, opened: Mask) -> float | None:
    """The objective with these residencies open; None if they allow no assignment."""
    try:
        within = problem.within(opened)
        chosen, _ = lagrange.solve(within)
    except Infeasible:
        return None
    return problem.worth(chosen)

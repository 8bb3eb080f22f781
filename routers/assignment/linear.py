"""The linear programme of a joint assignment by HiGHS (through SciPy), rounded by its dual prices.

Without the binary constraints a basic solution has as many queries that are split between experts as there are binding
constraints besides `sum_j x_ij = 1`: one for the budget and one for each full expert. All others are whole already. A
split query goes to its largest share; what is then above a capacity or the budget is exchanged (`exchange`).

The whole programme of 20,000 queries and 10 experts takes the solver minutes. Nearly all of its columns are zero in any
good solution, so it is solved by column generation: the first columns are those that come close to the best at the
prices of the bisection, and columns that the new dual prices favour are added until none is left. The last solution is
that of the whole programme.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from routers.assignment import lagrange
from routers.assignment.exchange import settled
from routers.assignment.moves import better, cheaper, frugal
from routers.assignment.problem import Columns, DualPrices, Floats, Infeasible, Mask, Problem

_FIRST_OPEN = 1_000
"""Queries that have more than one expert in the first programme."""
_ROUNDS = 60
_TOLERANCE = 1e-7
_SECONDS = 120.0
"""Most seconds of one programme."""


def solve(problem: Problem) -> tuple[Columns, DualPrices]:
    """An assignment within budget and capacities, and the dual prices of the linear programme.

    With capacities it is the better one of the rounded solution and the assignment of the bisection. Where the solver
    finds no solution in time, the latter and its prices.

    Raises:
        Infeasible: as `lagrange.solve`.
    """
    start, prices = lagrange.solve(problem)
    columns = _first_columns(problem, start, prices)
    share = None
    for _ in range(_ROUNDS):
        found = _programme(problem, columns)
        if found is None:
            if columns is problem.allowed:
                break
            columns = problem.allowed
            continue
        share, prices = found
        reduced = problem.reduced(prices)
        best = np.where(columns, reduced, -np.inf).max(axis=1, keepdims=True)
        missing = (reduced > best + _TOLERANCE) & ~columns
        if not missing.any():
            break
        columns = columns | missing
    if share is None:
        return start, prices
    whole = settled(problem, share.argmax(axis=1).astype(np.intp), -problem.reduced(prices))
    try:
        whole = cheaper(problem, whole, prices)
    except Infeasible:  # the search ended before the cheapest assignment
        return start, prices
    if not problem.is_limited:
        return whole, prices
    return max((better(problem, frugal(problem, each)) for each in (whole, start)), key=problem.quality_of), prices


def _first_columns(problem: Problem, chosen: Columns, prices: DualPrices) -> Mask:
    """(n, m) the best column of each query at the prices of the bisection, and close ones of the closest queries."""
    reduced = problem.reduced(prices)
    best = reduced.max(axis=1)
    columns = reduced >= best[:, None]
    columns[np.arange(chosen.size), chosen] = True
    others = np.where(columns, -np.inf, reduced).max(axis=1)
    margin = best - others
    width = np.partition(margin, _FIRST_OPEN)[_FIRST_OPEN] if margin.size > _FIRST_OPEN else np.inf
    return np.asarray(columns | (reduced >= best[:, None] - width) & problem.allowed, dtype=bool)


def _programme(problem: Problem, allowed: Mask) -> tuple[Floats, DualPrices] | None:
    """(n, m) shares and dual prices of the programme with some columns; None if it has no solution."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix

    alone = allowed.sum(axis=1) == 1
    share = np.where(alone[:, None] & allowed, 1.0, 0.0)
    several = np.flatnonzero(~alone)
    number, columns = np.nonzero(allowed[several])
    rows = several[number]
    usd, count = problem.usd[rows, columns], np.arange(rows.size)
    spent, taken = float((problem.usd * share).sum()), share.sum(axis=0)
    limits, bounds = _limits(problem, columns, usd, spent, taken)
    if (bounds < -_TOLERANCE).any():
        return None
    if not rows.size:
        return share, DualPrices.free(problem.shape[1])
    found = linprog(
        -problem.quality[rows, columns],
        A_ub=csr_matrix(limits) if len(limits) else None,
        b_ub=bounds.clip(0.0) if len(limits) else None,
        A_eq=csr_matrix((np.ones(rows.size), (number, count)), shape=(several.size, rows.size)),
        b_eq=np.ones(several.size),
        bounds=(0, None),
        method="highs",
        options={"time_limit": _SECONDS},
    )
    if found.x is None:
        return None
    share[rows, columns] = found.x
    return share, _prices(problem, -found.ineqlin.marginals if len(limits) else np.empty(0))


def _limits(problem: Problem, columns: Columns, usd: Floats, spent: float, taken: Floats) -> tuple[Any, Floats]:
    """Rows of the budget, in mean prices, and of the capacities; and what the fixed queries leave of each."""
    limits, bounds = [], []
    if np.isfinite(problem.budget_usd):
        scale = _scale(problem)
        limits.append(usd / scale)
        bounds.append((problem.budget_usd - spent) / scale)
    for column in np.flatnonzero(np.isfinite(problem.capacity)):
        limits.append((columns == column).astype(float))
        bounds.append(float(problem.capacity[column] - taken[column]))
    return np.array(limits).reshape(len(limits), usd.size), np.array(bounds)


def _scale(problem: Problem) -> float:
    """Prices are divided by the mean price: the solver's tolerances are absolute."""
    return max(float(problem.usd.mean()), 1e-300)


def _prices(problem: Problem, marginals: Floats) -> DualPrices:
    marginals = np.maximum(marginals, 0.0)
    usd, capacity = 0.0, np.zeros(problem.shape[1])
    if np.isfinite(problem.budget_usd):
        usd, marginals = float(marginals[0]) / _scale(problem), marginals[1:]
    capacity[np.isfinite(problem.capacity)] = marginals
    return DualPrices(usd, capacity)

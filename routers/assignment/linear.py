"""The linear programme of a joint assignment by HiGHS (through SciPy), rounded by its dual prices.

Without the binary constraints a basic solution has as many queries that are split between experts as there are binding
constraints besides `sum_j x_ij = 1`: one for the budget and one for each full expert. All others are whole already.

The whole programme of 20,000 queries and 10 experts takes the solver minutes. Nearly all of its columns are zero in any
good solution, so it is solved by column generation: the first columns are those that come close to the best at the
prices of the bisection, and columns that the new dual prices favour are added until none is left. The last solution is
that of the whole programme.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from routers.assignment import lagrange
from routers.assignment.moves import cheaper
from routers.assignment.problem import Columns, DualPrices, Floats, Infeasible, Mask, Problem

_WHOLE = 1 - 1e-6
_FIRST_OPEN = 1_000
"""Queries that have more than one expert in the first programme."""
_ROUNDS = 60
_TOLERANCE = 1e-7
_SECONDS = 120.0
"""Most seconds of one programme."""
_NONE = "no assignment meets the budget and the capacities together: raise one of them, or allow more experts"


def solve(problem: Problem) -> tuple[Columns, DualPrices]:
    """An assignment within budget and capacities, and the dual prices of the linear programme.

    Raises:
        Infeasible: no assignment, or no whole one near the linear programme's, meets the budget and the capacities.
    """
    lagrange.check_cheapest(problem)
    columns = _first_columns(problem)
    for _ in range(_ROUNDS):
        found = _programme(problem, columns)
        if found is None:
            if columns is problem.allowed:
                raise Infeasible(_NONE)
            columns = problem.allowed
            continue
        share, prices = found
        reduced = problem.reduced(prices)
        best = np.where(columns, reduced, -np.inf).max(axis=1, keepdims=True)
        missing = (reduced > best + _TOLERANCE) & ~columns
        if not missing.any():
            break
        columns = columns | missing
    return cheaper(problem, _rounded(problem, share, prices)), prices


def _first_columns(problem: Problem) -> Mask:
    """(n, m) the best column of each query at the prices of the bisection, and close ones of the closest queries."""
    try:
        chosen, prices = lagrange.solve(problem)
    except Infeasible:  # the capacities are tight: the programme itself decides
        return problem.allowed
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


def _rounded(problem: Problem, share: Floats, prices: DualPrices) -> Columns:
    """Whole queries as they are; split ones go to the best expert at the dual prices that has room."""
    chosen = np.asarray(share.argmax(axis=1), dtype=np.intp)
    split = np.flatnonzero(share[np.arange(chosen.size), chosen] < _WHOLE)
    whole = np.ones(chosen.size, dtype=bool)
    whole[split] = False
    room = problem.capacity - np.bincount(chosen[whole], minlength=problem.shape[1])
    reduced = problem.reduced(prices)[split]
    for row, values in zip(split, reduced, strict=True):
        column = int(np.where(room >= 1, values, -np.inf).argmax())
        if room[column] < 1 or not problem.allowed[row, column]:
            raise Infeasible("no assignment within the capacities was found: raise one of them, or allow more experts")
        chosen[row] = column
        room[column] -= 1
    return chosen

"""Moves of single queries to other experts, in the order of what they yield per USD."""

from __future__ import annotations

import numpy as np

from routers.assignment.exchange import affordable
from routers.assignment.problem import Columns, DualPrices, Floats, Problem

_PASSES = 50
_MOST_MOVES = 200_000
"""Most moves that are looked at in a pass; the next pass finds the others."""


def cheaper(problem: Problem, chosen: Columns, prices: DualPrices) -> Columns:
    """The assignment within the budget, of one within the capacities: least quality lost per USD saved first.

    Single moves to cheaper experts, then exchanges (`exchange`).

    Raises:
        Infeasible: the budget is below the cheapest assignment, or none was found (`exchange.affordable`).
    """
    chosen = chosen.copy()
    for _ in range(_PASSES):
        excess = problem.price_of(chosen) - problem.spendable_usd
        if excess <= 0:
            return chosen
        lost, saved, room = *_changes(problem, chosen), _room(problem, chosen)
        possible = (saved < 0) & (room >= 1)
        rate = np.where(possible, lost / np.where(possible, saved, 1.0), np.inf)  # both are negative, or a free gain
        moved = False
        for row, column in _ordered(rate):
            if room[column] >= 1:
                room[column] -= 1
                room[chosen[row]] += 1
                excess += saved[row, column]
                chosen[row], moved = column, True
                if excess <= 0:
                    break
        if not moved:
            break
    if problem.price_of(chosen) <= problem.spendable_usd:
        return chosen
    return affordable(problem, chosen, prices)


def frugal(problem: Problem, chosen: Columns) -> Columns:
    """The assignment with each query at the cheapest expert of at least the same quality that has no capacity."""
    rows = np.arange(chosen.size)
    as_good = problem.scores >= problem.scores[rows, chosen][:, None] - SMALLEST_GAIN
    as_good &= np.isinf(problem.capacity) & problem.allowed
    as_good[rows, chosen] = True
    return np.asarray(np.where(as_good, problem.usd, np.inf).argmin(axis=1), dtype=np.intp)


def better(problem: Problem, chosen: Columns) -> Columns:
    """The assignment with what is left of the budget spent: moves to better experts, most quality per USD first."""
    chosen = chosen.copy()
    for _ in range(_PASSES):
        left = problem.spendable_usd - problem.price_of(chosen)
        gained, usd = _changes(problem, chosen)
        room = _room(problem, chosen)
        possible = (gained > SMALLEST_GAIN) & (usd <= left) & (room >= 1)
        rate = np.full(possible.shape, np.inf)
        np.divide(-gained, np.maximum(usd, 1e-300), out=rate, where=possible)
        moved = False
        for row, column in _ordered(rate):
            if usd[row, column] <= left and room[column] >= 1:
                room[column] -= 1
                room[chosen[row]] += 1
                left -= usd[row, column]
                chosen[row], moved = column, True
        if not moved:
            return chosen
    return chosen


SMALLEST_GAIN = 1e-9
"""A move that gains less is rounding."""


def _changes(problem: Problem, chosen: Columns) -> tuple[Floats, Floats]:
    """(n, m) change of quality and of USD if a query moves; -inf quality where it may not."""
    rows = np.arange(chosen.size)
    now, usd = problem.scores[rows, chosen], problem.usd[rows, chosen]
    return problem.scores - now[:, None], np.where(problem.allowed, problem.usd - usd[:, None], np.inf)


def _room(problem: Problem, chosen: Columns) -> Floats:
    return problem.capacity - np.bincount(chosen, minlength=problem.shape[1])


def _ordered(rate: Floats) -> list[tuple[int, int]]:
    """The best move of each query, (query, expert), lowest rate first; without those of infinite rate."""
    column = rate.argmin(axis=1)
    value = rate[np.arange(len(rate)), column]
    rows = np.flatnonzero(value < np.inf)
    if rows.size > _MOST_MOVES:
        rows = rows[np.argpartition(value[rows], _MOST_MOVES)[:_MOST_MOVES]]
    rows = rows[value[rows].argsort(kind="stable")]
    return list(zip(rows.tolist(), column[rows].tolist(), strict=True))

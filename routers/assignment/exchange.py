"""Exchanges of queries between several experts at once, where capacities leave no room for single moves.

The experts are the nodes of a graph; the edge from j to k is the least change of cost if a query of j moves to k. With
capacities alone the assignment is a transportation problem, so both searches below are exact (Ahuja, Magnanti and
Orlin, "Network Flows", 1993, chapters 7 and 9):

- An expert above its capacity gives queries away along a path that ends at one with room. Without such a path no
  assignment is within the capacities: the queries of the experts that can be reached have no other experts.
- An assignment within the capacities that has no cycle of negative cost has the least cost. Where an expert has room, a
  path is a cycle, too. So an assignment without a cycle that saves money is the cheapest one.

All queries for which an exchange pays are exchanged at once.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from routers.assignment.problem import Columns, DualPrices, Floats, Infeasible, Problem

_SHARE = 16
"""A path moves a sixteenth of the surplus at once, so a small one takes the cheapest path query by query."""
_WEIGHTS, _RISE = 8, 4.0
"""Prices of the budget at which exchanges that lose little quality are looked for, and their ratio."""
_EXCHANGES = 200
"""Most exchanges at one of these prices."""
_WORK = 10**10
"""Most entries of the (n, m) costs that are read in search of the cheapest assignment, a minute or so."""


def settled(problem: Problem, chosen: Columns, cost: Floats) -> Columns:
    """The assignment within the capacities, along paths of least cost.

    Args:
        cost: (n, m), infinite where not allowed.

    Raises:
        Infeasible: no assignment is within the capacities.
    """
    if not problem.is_limited:
        return chosen
    graph = _Graph(problem, chosen, cost)
    while (graph.room < 0).any():
        path = graph.path()
        start, end = path[0], path[-1]
        surplus, room = int(-graph.room[start]), graph.room[end]
        graph.move(path, int(min(max(1, surplus // _SHARE), room)))
    return graph.chosen


def affordable(problem: Problem, chosen: Columns, prices: DualPrices) -> Columns:
    """The assignment within the budget, of one within the capacities: exchanges that lose little quality per USD first.

    Raises:
        Infeasible: the cheapest assignment costs more (`needed_usd` is its price), or none was found within the work.
    """
    weight = prices.usd or 1.0 / max(float(problem.usd.mean()), 1e-300)
    for _ in range(_WEIGHTS):
        chosen, _ = _cancelled(problem, chosen, weight * problem.usd - problem.scores, _EXCHANGES)
        if problem.price_of(chosen) <= problem.spendable_usd:
            return chosen
        weight *= _RISE
    chosen, proven = cheapest(problem, chosen)
    price = problem.price_of(chosen)
    if price <= problem.spendable_usd:
        return chosen
    budget = f"the budget of {problem.budget_usd:.6g} USD"
    if proven:
        within = " within the capacities" if problem.is_limited else ""
        raise Infeasible(f"the cheapest assignment{within} costs {price:.6g} USD, more than {budget}", price)
    raise Infeasible(
        f"no assignment within the capacities and {budget} was found in the work allowed: it costs "
        f"{problem.cheapest_usd:.6g} USD at least, and one of {price:.6g} USD was found"
    )


def cheapest(problem: Problem, chosen: Columns) -> tuple[Columns, bool]:
    """An assignment within the budget or the cheapest one, from one within the capacities; and if it is the cheapest.

    Neither is reached where that takes more exchanges than the work allows.
    """
    n, m = problem.shape
    return _cancelled(problem, chosen, np.where(problem.allowed, problem.usd, np.inf), max(1_000, _WORK // (n * m)))


def _cancelled(problem: Problem, chosen: Columns, cost: Floats, most: int) -> tuple[Columns, bool]:
    """The assignment after exchanges that lower the cost, until it is affordable; and whether none is left."""
    graph = _Graph(problem, chosen, cost)
    for _ in range(most):
        excess = problem.price_of(graph.chosen) - problem.spendable_usd
        if excess <= 0:
            break
        cycle = graph.cycle()
        if cycle is None or not graph.exchange(cycle, excess):
            return graph.chosen, True
    return graph.chosen, False


class _Graph:
    """The experts, and the least change of cost from each to each; `room` is negative above the capacity."""

    def __init__(self, problem: Problem, chosen: Columns, cost: Floats) -> None:
        self.chosen = chosen.copy()
        self._problem, self._cost = problem, cost
        m = problem.shape[1]
        self._least = np.full((m, m), np.inf)
        self.room = np.floor(problem.capacity) - np.bincount(chosen, minlength=m)
        self._update(range(m))

    def path(self) -> list[int]:
        """Experts from one above its capacity to one with room, along the least losses."""
        least = self._least.clip(0.0)  # no cycle of negative length
        length = np.where(self.room < 0, 0.0, np.inf)
        before = np.full(length.size, -1)
        for _ in range(length.size):
            ways = length[:, None] + least
            best = ways.argmin(axis=0)
            shorter = ways.min(axis=0) < length
            if not shorter.any():
                break
            length = np.where(shorter, ways.min(axis=0), length)
            before[shorter] = best[shorter]
        end = int(np.where(self.room >= 1, length, np.inf).argmin())
        if self.room[end] < 1 or length[end] == np.inf:
            raise self._infeasible(np.flatnonzero(length < np.inf))
        path = [end]
        while before[path[-1]] >= 0:
            path.append(int(before[path[-1]]))
        return path[::-1]

    def cycle(self) -> list[int] | None:
        """Experts of an exchange that lowers the cost, the first one again at the end of a cycle; None without one."""
        m = self.room.size
        ways = np.full((m + 1, m + 1), np.inf)  # the last node: a place that is free
        ways[:m, :m] = self._least
        ways[:m, m][self.room >= 1] = 0.0
        ways[m, :m] = 0.0
        length, before, shorter = np.zeros(m + 1), np.full(m + 1, -1), np.zeros(m + 1, dtype=bool)
        for _ in range(m + 1):
            longer = length[:, None] + ways
            best = longer.argmin(axis=0)
            least = longer.min(axis=0)
            shorter = least < length - self._rounding()
            if not shorter.any():
                return None
            length = np.where(shorter, least, length)
            before[shorter] = best[shorter]
        node = int(np.flatnonzero(shorter)[0])
        for _ in range(m + 1):  # back into the cycle
            node = int(before[node])
        cycle = [node]
        while before[cycle[-1]] != node:
            cycle.append(int(before[cycle[-1]]))
        cycle = cycle[::-1]
        if m in cycle:
            at = cycle.index(m)
            return cycle[at + 1 :] + cycle[:at]
        return [*cycle, cycle[0]]

    def exchange(self, cycle: list[int], excess: float) -> bool:
        """Move as many queries along a cycle as lower the cost, and no more than save the excess; False if none."""
        orders = self._orders(cycle)
        most = min(rows.size for rows in orders)
        if cycle[0] != cycle[-1]:
            most = int(min(most, self.room[cycle[-1]]))
        change, saved = np.zeros(most), np.zeros(most)
        for (start, end), rows in zip(pairwise(cycle), orders, strict=True):
            rows = rows[:most]
            change += self._cost[rows, end] - self._cost[rows, start]
            saved += self._problem.usd[rows, start] - self._problem.usd[rows, end]
        count = int((change < -self._rounding()).cumprod().sum())
        enough = np.flatnonzero(saved[:count].cumsum() >= excess)
        self.move(cycle, int(enough[0]) + 1 if enough.size else count)
        return count > 0

    def move(self, path: list[int], count: int) -> None:
        """Move up to `count` queries along each edge of a path or cycle, least change of cost first."""
        orders = self._orders(path)
        count = min(count, *(rows.size for rows in orders))
        for (start, end), rows in zip(pairwise(path), orders, strict=True):
            self.chosen[rows[:count]] = end
            self.room[start] += count
            self.room[end] -= count
        self._update(set(path))

    def _orders(self, path: list[int]) -> list[Columns]:
        """The queries that can move along each edge, least change of cost first."""
        orders = []
        for start, end in pairwise(path):
            rows = np.flatnonzero((self.chosen == start) & self._problem.allowed[:, end])
            change = self._cost[rows, end] - self._cost[rows, start]
            orders.append(rows[change.argsort(kind="stable")])
        return orders

    def _update(self, columns: range | set[int]) -> None:
        for column in columns:
            mine = self._cost[self.chosen == column]
            self._least[column] = (mine - mine[:, [column]]).min(axis=0, initial=np.inf)
            self._least[column, column] = np.inf

    def _rounding(self) -> float:
        """Rounding error of the length of a way: no shortest one is longer than 0, so chosen costs bound its edges."""
        chosen = self._cost[np.arange(self.chosen.size), self.chosen]
        return float(1e-15 * (self.room.size + 1) * np.abs(chosen).max(initial=0.0))

    def _infeasible(self, full: Columns) -> Infeasible:
        return self._problem.too_many(int(np.isin(self.chosen, full).sum()), full)

"""A joint assignment as arrays, and the upper bound that dual prices give."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from routers.errors import RouterError

Floats = NDArray[np.float64]
Columns = NDArray[np.intp]
Mask = NDArray[np.bool_]
SLACK = 1e-12
"""Relative rounding error of a sum of prices: a budget that is the sum of chosen prices holds for them."""

_MOST_NAMES = 8
"""Most experts that an error names."""


class Infeasible(RouterError):
    """No assignment meets the budget and the capacities, or none was found.

    needed_usd: the price of the cheapest assignment, proven; None where it is unknown or the capacities are the reason.
    """

    def __init__(self, message: str, needed_usd: float | None = None) -> None:
        super().__init__(message)
        self.needed_usd = needed_usd


@dataclass(frozen=True, eq=False)
class Problem:
    """n queries, m experts and r residencies.

    Attributes:
        quality: (n, m) predicted score of each expert on each query, finite where allowed.
        price_usd: (n, m) predicted USD, >= 0 where allowed.
        allowed: (n, m) the experts that may answer; each row has one at least.
        budget_usd: for all queries; infinite if there is none.
        capacity: (m,) most queries of each expert; infinite if there is no limit. By default no limit.
        residency: (m,) the residency of each expert, 0 to r - 1; by default each has its own.
        load_cost: (r,) quality given up for the load of a residency, >= 0; by default 0.
        experts: their names, for messages; by default `expert 0` and so on.

    Raises:
        RouterError: an array of the wrong shape, or a wrong number.
    """

    quality: Floats
    price_usd: Floats
    allowed: Mask
    budget_usd: float = np.inf
    capacity: Floats = field(default_factory=lambda: np.empty(0))
    residency: Columns = field(default_factory=lambda: np.empty(0, dtype=np.intp))
    load_cost: Floats = field(default_factory=lambda: np.empty(0))
    experts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        m = self.quality.shape[1]
        if not self.capacity.size:
            object.__setattr__(self, "capacity", np.full(m, np.inf))
        if not self.residency.size:
            object.__setattr__(self, "residency", np.arange(m))
        if not self.load_cost.size:
            object.__setattr__(self, "load_cost", np.zeros(int(self.residency.max(initial=-1)) + 1))
        if not self.experts:
            object.__setattr__(self, "experts", tuple(f"expert {column}" for column in range(m)))
        if not self.quality.shape == self.price_usd.shape == self.allowed.shape:
            raise RouterError("quality, price_usd and allowed must have one shape: (queries, experts)")
        if self.capacity.shape != (m,) or self.residency.shape != (m,) or len(self.experts) != m:
            raise RouterError(f"capacity, residency and experts must have one entry for each of {m} experts")
        if not self.allowed.any(axis=1).all():
            raise RouterError("a query has no allowed expert")
        if not np.isfinite(self.quality[self.allowed]).all():
            raise RouterError("the quality of an allowed expert is not finite")
        prices = self.price_usd[self.allowed]
        if not np.isfinite(prices).all() or (prices < 0).any():
            raise RouterError("the price of an allowed expert must be a finite number >= 0")
        if not self.budget_usd >= 0 or (self.capacity < 0).any() or not (self.load_cost >= 0).all():
            raise RouterError("budget, capacities and load costs must be numbers >= 0")

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return self.allowed.shape[0], self.allowed.shape[1]

    @property
    def spendable_usd(self) -> float:
        """The budget, with the rounding error of a sum."""
        return self.budget_usd * (1 + SLACK)

    @property
    def is_limited(self) -> bool:
        """Whether any expert has a capacity."""
        return bool(np.isfinite(self.capacity).any())

    @cached_property
    def cheapest_usd(self) -> float:
        """The price of the cheapest experts of all queries: no assignment is cheaper."""
        return float(np.where(self.allowed, self.price_usd, np.inf).min(axis=1).sum())

    @cached_property
    def scores(self) -> Floats:
        """(n, m) quality; -inf where not allowed."""
        return np.where(self.allowed, self.quality, -np.inf)

    @cached_property
    def usd(self) -> Floats:
        """(n, m) price; 0 where not allowed, so that products with it are finite."""
        return np.where(self.allowed, self.price_usd, 0.0)

    def within(self, opened: Mask) -> Problem:
        """The same problem with the experts of the opened residencies (r,) only.

        Raises:
            Infeasible: a query has no expert left.
        """
        if opened.all():
            return self
        allowed = self.allowed & opened[self.residency]
        if not allowed.any(axis=1).all():
            raise Infeasible("a query has no allowed expert among those that are loaded")
        return replace(self, allowed=allowed)

    def check(self) -> None:
        """Raise Infeasible where a budget or a capacity alone makes it impossible."""
        alone = self.allowed[self.allowed.sum(axis=1) == 1].sum(axis=0)
        for column in np.flatnonzero(alone > self.capacity):
            raise self.too_many(int(alone[column]), np.array([column]))
        n, m = self.shape
        if np.floor(self.capacity).sum() < n:
            raise self.too_many(n, np.arange(m))
        if self.cheapest_usd > self.spendable_usd:
            raise Infeasible(
                f"the cheapest experts of all queries cost {self.cheapest_usd:.6g} USD, more than the budget of "
                f"{self.budget_usd:.6g} USD",
                self.cheapest_usd,
            )

    def too_many(self, count: int, columns: Columns) -> Infeasible:
        """The error where `count` queries have no experts but these, which have too little capacity."""
        names = [self.experts[column] for column in columns[:_MOST_NAMES]]
        more = f" and {len(columns) - _MOST_NAMES} more" if len(columns) > _MOST_NAMES else ""
        limits = np.floor(self.capacity[columns])
        if len(columns) == 1:
            allow = f"its capacity is {limits[0]:,.0f}"
        else:
            each = ", ".join(f"{name} {limit:,.0f}" for name, limit in zip(names, limits, strict=False))
            allow = f"their capacities allow {limits.sum():,.0f} ({each}{more})"
        return Infeasible(
            f"{count:,} queries can go to {', '.join(names)}{more} alone, and {allow}: raise it, or allow more experts"
        )

    def with_budget(self, budget_usd: float) -> Problem:
        """The same problem with another budget."""
        return replace(self, budget_usd=budget_usd)

    def quality_of(self, chosen: Columns) -> float:
        """Sum of the predicted quality of (n,) chosen experts."""
        return float(self.scores[np.arange(chosen.size), chosen].sum())

    def price_of(self, chosen: Columns) -> float:
        """Sum of their prices, USD."""
        return float(self.usd[np.arange(chosen.size), chosen].sum())

    def loads_of(self, chosen: Columns) -> Mask:
        """(r,) the residencies of the chosen experts."""
        loaded = np.zeros(self.load_cost.size, dtype=bool)
        loaded[self.residency[np.unique(chosen)]] = True
        return loaded

    def worth(self, chosen: Columns) -> float:
        """The objective: quality less the cost of loads."""
        return self.quality_of(chosen) - float(self.load_cost[self.loads_of(chosen)].sum())

    def reduced(self, prices: DualPrices) -> Floats:
        """(n, m) quality - price of the budget * USD - price of the expert's capacity; -inf where not allowed."""
        return self.scores - prices.usd * self.usd - prices.capacity


@dataclass(frozen=True, slots=True, eq=False)
class DualPrices:
    """What one more of each bound is worth.

    usd: quality per USD of budget. capacity: (m,) quality per query of capacity.
    """

    usd: float
    capacity: Floats

    @classmethod
    def free(cls, m: int, usd: float = 0.0) -> Self:
        """Without a price on capacity."""
        return cls(usd, np.zeros(m))


def upper_bound(problem: Problem, prices: DualPrices, loaded: Mask) -> float:
    """No assignment is worth more: the Lagrangian dual at any prices >= 0.

    With multipliers t_ir >= 0 of `x_ij <= y_r(j)` whose sum over queries is at most the load cost of r, the bound is

        usd * budget + sum_j capacity_j * price_j + sum_i max_j (reduced_ij - t_i,r(j))

    The multipliers are chosen in closed form. A loaded residency takes from its queries what they lose without it, in
    proportion; another one takes what queries would gain by it. Where it was right to load exactly these, all sums hold
    with equality and the bound is tight. Without load costs this is the dual of the linear programme.

    Args:
        loaded: (r,) the residencies that the assignment loads; any gives a valid bound.
    """
    reduced = problem.reduced(prices)
    bound = prices.usd * problem.budget_usd if prices.usd else 0.0
    bound += float(sum(p * c for p, c in zip(prices.capacity, problem.capacity, strict=True) if p))
    if not problem.load_cost.any():
        return bound + float(reduced.max(axis=1).sum())
    n, r = len(reduced), problem.load_cost.size
    best = np.full((n, r), -np.inf)
    for column, residency in enumerate(problem.residency):
        np.maximum(best[:, residency], reduced[:, column], out=best[:, residency])
    within = np.where(loaded, best, -np.inf)
    first = within.argmax(axis=1)
    rows = np.arange(n)
    top = within[rows, first]
    within[rows, first] = -np.inf
    gain = np.zeros(n)  # of a query that no loaded one can take: none
    some = np.isfinite(top)
    gain[some] = np.minimum(top[some] - within.max(axis=1)[some], 1e9)  # the only loaded one is worth any share
    charge = np.zeros((n, r))
    paid = np.bincount(first, gain, minlength=r).astype(np.float64)
    charge[rows, first] = gain * _scale(problem.load_cost, paid)[first]
    left = best[rows, first] - charge[rows, first]
    for residency in np.flatnonzero(~loaded):
        more = np.zeros(n)
        more[some] = np.maximum(best[some, residency] - left[some], 0.0)
        charge[:, residency] = more * _scale(problem.load_cost[[residency]], more.sum(keepdims=True))
    return bound + float((best - charge).max(axis=1).sum())


def _scale(load_cost: Floats, gains: Floats) -> Floats:
    """The share of the gains that a load cost pays for, at most all."""
    return np.where(gains > load_cost, load_cost / np.where(gains > 0, gains, 1.0), 1.0)

"""Cost-quality curves: the same estimates decided at every cost weight. Pure functions over (n_queries, n_experts).

A point of a curve is (mean cost in USD per query, accuracy). Notation as in `routers.evaluation.metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from routers.evaluation.metrics import DRAWS, Floats, Picks, picked
from routers.ranking import Ranking

COST_WEIGHTS = 200
"""Number of cost weights in a sweep."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The results of n queries at t cost weights.

    Attributes:
        cost_weights: (t,) ascending, the first is 0.
        scores, costs: (t, n) recorded scores and costs (USD) of the experts chosen at each cost weight.
    """

    cost_weights: Floats
    scores: Floats
    costs: Floats

    @property
    def accuracy(self) -> Floats:
        """(t,) mean score at each cost weight."""
        return np.asarray(self.scores.mean(axis=1))

    @property
    def mean_cost(self) -> Floats:
        """(t,) USD per query at each cost weight."""
        return np.asarray(self.costs.mean(axis=1))

    @classmethod
    def joined(cls, parts: Sequence[Sweep]) -> Sweep:
        """Sweeps of different queries at the same cost weights, concatenated."""
        return cls(
            parts[0].cost_weights, *(np.concatenate([getattr(p, a) for p in parts], 1) for a in ("scores", "costs"))
        )


def choose(
    quality: Floats, costs: Floats | None, eligible: NDArray[np.bool_] | None = None, cost_weight: float = 0.0
) -> Picks:
    """(n,) the choice that `routers.decision.decide` makes with k = 1.

    Args:
        quality, costs: (n, m) predicted; costs may be `None` where the cost weight is 0.
        eligible: (n, m); `None` means all. A row without any eligible expert leaves all.
    """
    weighed = quality if costs is None or not cost_weight else quality - cost_weight * costs
    utility = np.asarray(weighed, dtype=np.float64)
    return Ranking.of(~np.isnan(utility), eligible, costs).first(utility)


def cost_weight_grid(
    quality: Floats, costs: Floats, eligible: NDArray[np.bool_] | None = None, count: int = COST_WEIGHTS
) -> Floats:
    """(t,) cost weights, from 0 to where every query goes to its cheapest expert, at equal steps of predicted cost.

    A query switches from its expert b to a cheaper expert j at the cost weight (q_b - q_j) / (c_b - c_j); the lowest
    of these weights comes first.

    Args:
        quality, costs: (n, m) predicted.
        eligible: (n, m); `None` means all.
    """
    at, drops = _switches(quality, costs, eligible)
    if not len(at):
        return np.zeros(1)
    order = np.argsort(at, kind="stable")
    fallen = np.cumsum(drops[order])
    steps = np.searchsorted(fallen, np.linspace(0, fallen[-1], max(count - 2, 2)))
    return np.unique(np.concatenate([[0.0], at[order][np.minimum(steps, len(at) - 1)], [2.0 * at.max()]]))


def _switches(quality: Floats, costs: Floats, eligible: NDArray[np.bool_] | None) -> tuple[Floats, Floats]:
    """Cost weights at which queries switch to a cheaper expert, and how much their predicted cost drops there."""
    rows, now = np.arange(len(quality)), choose(quality, costs, eligible)
    found: list[tuple[Floats, Floats]] = []
    for _ in range(quality.shape[1] - 1):
        cheaper_by = costs[rows, now][:, None] - costs
        possible = cheaper_by > 0 if eligible is None else (cheaper_by > 0) & eligible
        rates = np.full(quality.shape, np.inf)
        np.divide(quality[rows, now][:, None] - quality, cheaper_by, out=rates, where=possible)
        rates[np.isnan(rates)] = np.inf
        then = rates.argmin(axis=1)
        switches = np.isfinite(rates[rows, then])
        if not switches.any():
            break
        found.append((rates[rows, then][switches], cheaper_by[rows, then][switches]))
        now = np.where(switches, then, now)
    at, drops = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else (np.zeros(0), np.zeros(0))
    return at.clip(0.0), drops


def sweep(
    quality: Floats,
    predicted_costs: Floats,
    eligible: NDArray[np.bool_] | None,
    scores: Floats,
    costs: Floats,
    cost_weights: Floats | None = None,
) -> Sweep:
    """Decide the same estimates at every cost weight.

    Args:
        quality, predicted_costs, eligible: (n, m) predicted by the router.
        scores, costs: (n, m) recorded of the experts.
        cost_weights: (t,); `None` means `cost_weight_grid`.
    """
    grid = cost_weight_grid(quality, predicted_costs, eligible) if cost_weights is None else cost_weights
    ranking = Ranking.of(~np.isnan(quality - predicted_costs), eligible, predicted_costs)
    picks = [ranking.first(quality - cost_weight * predicted_costs) for cost_weight in grid]
    return Sweep(grid, np.stack([picked(scores, p) for p in picks]), np.stack([picked(costs, p) for p in picks]))


def hull(costs: ArrayLike, accuracies: ArrayLike) -> tuple[Floats, Floats]:
    """Corners of the upper, non-decreasing, concave hull of points, by ascending cost.

    Points on an edge are reached by sending each query to one of the two ends at random.

    Args:
        costs, accuracies: (t,) points.
    """
    x, y = np.asarray(costs, dtype=np.float64), np.asarray(accuracies, dtype=np.float64)
    corners: list[tuple[float, float]] = []
    for i in np.lexsort((-y, x)):
        point = (float(x[i]), float(y[i]))
        if corners and point[1] <= corners[-1][1]:
            continue  # costs more and is no better
        while len(corners) > 1 and _below(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    return np.array([c for c, _ in corners]), np.array([a for _, a in corners])


def _below(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> bool:
    """Whether the middle point is on or below the line from left to right."""
    return (middle[1] - left[1]) * (right[0] - left[0]) <= (right[1] - left[1]) * (middle[0] - left[0])


def aiq(costs: ArrayLike, accuracies: ArrayLike, c_min: float, c_max: float) -> float | None:
    """AIQ = (1 / (c_max - c_min)) * integral of the hull from c_min to c_max (RouterBench, arXiv 2403.12031).

    The bounds are the mean costs of the cheapest and of the most expensive single expert of the pool, so that routers
    over the same pool are comparable; RouterBench's own code uses the bounds of the curves plotted together. To the
    right of the hull accuracy is constant; to the left it follows the line to (0, 0): some queries are not answered.

    Returns:
        A mean accuracy in [0, 1]; `None` if all experts cost the same.
    """
    if not c_max > c_min:
        return None
    x, y = hull(costs, accuracies)
    if x[0] > 0:
        x, y = np.concatenate([[0.0], x]), np.concatenate([[0.0], y])
    inside = x[(x > c_min) & (x < c_max)]
    at = np.concatenate([[c_min], inside, [c_max]])
    return float(np.trapezoid(np.interp(at, x, y), at) / (c_max - c_min))


def band(curve: Sweep, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95) -> tuple[Floats, Floats]:
    """(t,) bounds of the accuracy at each cost weight: percentiles over resampled queries.

    Each draw resamples the same queries at every cost weight, as counts: one matrix product covers all of them.
    """
    n, rng = curve.scores.shape[1], np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1.0 / n), size=draws).astype(np.float32)
    means = counts @ curve.scores.T.astype(np.float32) / n  # (draws, t)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)

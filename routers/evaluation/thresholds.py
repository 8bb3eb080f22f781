"""Thresholds of selectors, solved for a budget: pure functions of estimates.

The estimates must be out-of-fold estimates of *training* queries: a router is overconfident on queries that it was
trained on, and a threshold picked on the queries that it is evaluated on is biased.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from routers.base import Estimate, Floats
from routers.decision import Utility, decide
from routers.errors import RouterError
from routers.selectors import Cascade, Dynamic, Selector, known_costs


def dynamic_for_calls(
    estimate: Estimate, calls: float, *, k: int, utility: Utility | Sequence[Utility] = Utility()
) -> Dynamic:
    """The largest p at which a `dynamic` selector asks at most `calls` experts per query on average.

    It asks 1 + #{j < k: P_ij < p} experts for query i, where P_ij is the probability that one of the first j is right.
    So p is the P_ij with exactly as many smaller ones as the budget allows; no search is needed.

    Args:
        estimate: n queries, out-of-fold.
        calls: mean number of experts asked, at least 1.
        k: the most experts per query.

    Raises:
        RouterError: a budget of less than one call per query, which no selector can meet.
    """
    if not calls >= 1:
        raise RouterError(f"every query asks at least one expert: calls must be >= 1, got {calls}")
    steps = np.sort(np.concatenate([_reached(d.quality)[:-1] for d in decide(estimate, utility=utility, k=k)]))
    spare = int(np.floor((calls - 1) * len(estimate) + 1e-9))
    return Dynamic(p=1.0 if spare >= len(steps) else float(steps[spare]), k=k)


def cascade_for_cost(
    estimate: Estimate,
    cost_usd: float,
    *,
    costs_usd: ArrayLike | None = None,
    k: int = 1,
    utility: Utility | Sequence[Utility] = Utility(),
) -> Cascade:
    """The smallest tolerance at which the first experts of a `cascade` selector cost at most `cost_usd` per query.

    Args:
        estimate: n queries, out-of-fold, with costs.
        costs_usd: (n, m) recorded costs that the budget applies to; `None` means the estimated ones.

    Raises:
        RouterError: costs are unknown, or the cheapest experts exceed the budget.
    """
    estimated = known_costs(estimate, "a cascade asks cheap experts first", "use another selector")
    paid = estimated if costs_usd is None else np.asarray(costs_usd, dtype=np.float64)
    ranked = decide(estimate, utility=utility, k=len(estimate.experts))
    tolerances = np.unique([0.0, *(decision.scores[0] - score for decision in ranked for score in decision.scores)])

    def cost(index: int) -> float:
        return float(_first_costs(estimate, paid, Cascade(tolerance=tolerances[index], k=k), utility).mean())

    low, high = 0, len(tolerances) - 1
    if cost(high) > cost_usd:
        raise RouterError(
            f"even the cheapest experts cost {cost(high):.3g} USD per query, more than {cost_usd:.3g}: raise the budget"
        )
    while low < high:  # cost falls as the tolerance grows
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= cost_usd else (middle + 1, high)
    return Cascade(tolerance=float(tolerances[low]), k=k)


def _reached(quality: Sequence[float]) -> Floats:
    """Probability that one of the first j + 1 is right."""
    return np.asarray(1.0 - np.cumprod(1.0 - np.clip(quality, 0.0, 1.0)))


def _first_costs(estimate: Estimate, paid: Floats, select: Selector, utility: Utility | Sequence[Utility]) -> Floats:
    """(n,) cost of the first expert of each decision."""
    decisions = decide(estimate, utility=utility, select=select)
    columns = [estimate.experts.index(decision.experts[0]) for decision in decisions]
    return np.asarray(paid[np.arange(len(paid)), columns])

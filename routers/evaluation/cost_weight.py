"""The cost weight that meets a target, solved on out-of-fold estimates of training rows.

A cost weight picked on the curve of the queries that it is reported for is biased: it is the luckiest of many. So
`out_of_fold` routes every training row by a router trained on the other folds, `solve` finds the cost weight there, and
`routers.evaluation.cross_validation.cross_validate` does both inside each of its outer folds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from routers.errors import InvalidSettings, RouterError
from routers.evaluation import curves, metrics
from routers.evaluation.recorded_routing import Routing, route
from routers.factory import TrainableRouter
from routers.outcomes.table import OutcomeTable

Factory = Callable[[], TrainableRouter]
"""Makes an unfitted router."""


@dataclass(frozen=True, slots=True)
class MeetBudget:
    """The highest accuracy at a mean cost of at most `usd` per query."""

    name: ClassVar[str] = "budget"
    usd: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.usd) and self.usd > 0):
            raise InvalidSettings(f"a budget must be a positive number of USD per query, got {self.usd}")


@dataclass(frozen=True, slots=True)
class SaveCost:
    """The lowest mean cost at which the router is no worse than the best single expert.

    margin: required accuracy above the best single expert's on the training rows, in standard errors of the paired
        difference. It compensates for taking the cheapest of many cost weights, which favours lucky ones.
    """

    name: ClassVar[str] = "save-cost"
    margin: float = 1.0

    def __post_init__(self) -> None:
        if not np.isfinite(self.margin):
            raise InvalidSettings(f"a margin must be a finite number of standard errors, got {self.margin}")


Target = MeetBudget | SaveCost


@dataclass(frozen=True, slots=True)
class Solution:
    """A solved cost weight, with its results on the rows that it was solved on.

    Attributes:
        accuracy, mean_cost: on those rows; best_single, best_single_cost: of the best single expert there.
        met: whether any cost weight reaches the target. If none does, `cost_weight` is the one of lowest cost for a
            budget, and the one of highest accuracy for a saving.
    """

    cost_weight: float
    accuracy: float
    mean_cost: float
    best_single: float
    best_single_cost: float
    met: bool

    def to_json(self, target: Target) -> dict[str, Any]:
        """The form that an artifact stores."""
        return {"target": {"name": target.name, **asdict(target)}, **asdict(self)}


def solve(curve: curves.Sweep, target: Target, best_scores: metrics.Floats, best_costs: metrics.Floats) -> Solution:
    """The cost weight of a sweep that best meets a target.

    Args:
        curve: n rows at t cost weights, routed out of fold.
        best_scores, best_costs: (n,) of the best single expert on those rows.
    """
    accuracy, cost = curve.accuracy, curve.mean_cost
    if isinstance(target, MeetBudget):
        within = cost <= target.usd
        index = int(np.where(within, accuracy, -np.inf).argmax() if within.any() else cost.argmin())
    else:
        gain = curve.scores - best_scores
        error = gain.std(axis=1) / np.sqrt(gain.shape[1])
        within = gain.mean(axis=1) >= target.margin * error
        index = int(np.where(within, cost, np.inf).argmin() if within.any() else accuracy.argmax())
    return Solution(
        cost_weight=float(curve.cost_weights[index]),
        accuracy=float(accuracy[index]),
        mean_cost=float(cost[index]),
        best_single=float(best_scores.mean()),
        best_single_cost=float(best_costs.mean()),
        met=bool(within.any()),
    )


def solve_on(routing: Routing, table: OutcomeTable, target: Target) -> Solution:
    """The cost weight that meets a target on a table that was routed out of fold.

    Raises:
        RouterError: the table has no costs, or the router predicts none.
    """
    if table.costs_usd is None:
        raise RouterError(
            "solving a cost weight needs costs, but the table has none: add `cost::<expert>` columns, or give --prices"
        )
    curve = routing.sweep(table)
    if curve is None:
        raise RouterError(
            "solving a cost weight needs predicted costs, but this kind of router predicts none: use another kind"
        )
    best = np.full(len(table), metrics.best_single(table.scores.mean(axis=0)))
    return solve(curve, target, metrics.picked(table.scores, best), metrics.picked(table.costs_usd, best))


def out_of_fold(make_router: Factory, table: OutcomeTable, folds: NDArray[np.int64]) -> Routing:
    """Every row of a table, routed by a router trained on the other folds; rows in the order of the table."""
    names = np.unique(folds)
    parts = {int(f): route(make_router().fit(table.select(folds != f)), table.select(folds == f)) for f in names}
    return _in_order(parts, folds)


def inner_routings(
    make_router: Factory,
    table: OutcomeTable,
    folds: NDArray[np.int64],
    on_fit: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, OutcomeTable, Routing]]:
    """For each outer fold: the rows of all other folds, routed out of fold by routers that never saw the outer fold.

    A router trained without folds f and g serves both: it routes g for the outer fold f, and f for the outer fold g.
    So K folds take K (K - 1) / 2 trainings instead of K (K - 1).

    Args:
        on_fit: called after each training.

    Yields:
        K times (outer fold, its training rows, their routing).
    """
    names = [int(fold) for fold in np.unique(folds)]
    parts: dict[int, dict[int, Routing]] = {fold: {} for fold in names}
    for i, f in enumerate(names):
        for g in names[i + 1 :]:
            router = make_router().fit(table.select((folds != f) & (folds != g)))
            on_fit()
            parts[f][g] = route(router, table.select(folds == g))
            parts[g][f] = route(router, table.select(folds == f))
    for fold in names:
        rows = folds != fold
        yield fold, table.select(rows), _in_order(parts[fold], folds[rows])


def _in_order(parts: dict[int, Routing], folds: NDArray[np.int64]) -> Routing:
    """The routings of single folds, joined in the order of the table's rows."""
    order = np.concatenate([np.flatnonzero(folds == fold) for fold in parts])
    return Routing.joined(list(parts.values())).taken(np.argsort(order))

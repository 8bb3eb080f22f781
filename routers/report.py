"""RouterReport: a router beside the experts it chooses from, and beside the marks it cannot reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from routers import metrics
from routers.outcomes import OutcomeTable
from routers.reference import Reference

_NOTE = {"in_json": False}


@dataclass(frozen=True, slots=True)
class RouterReport:
    """One router on one table; accuracies are mean scores in [0, 1], costs USD a query, `None` what is unknown.

    Attributes:
        best_single: accuracy of the expert that was best on the training rows; dataset_oracle: of the expert that was
            best on the training rows of each query's true domain; oracle: of the best expert of each query.
        gain_over_best_single: accuracy - best_single, with its 95% paired bootstrap interval.
        gap_recovered: (accuracy - best_single) / (oracle - best_single).
        route_ms_p50: median milliseconds to encode and decide one query alone, nothing cached.
        baselines: name -> accuracy, for rows of a table.
        baseline_costs: name -> mean cost.
        expert_use: expert -> share of the queries it was given.
        quality_ece: ECE of the score that the router expected, against the actual score.
        abstained: share of the queries on which the router abstained.
    """

    router: str
    kind: str
    n_queries: int
    n_experts: int
    accuracy: float
    best_single: float | None
    dataset_oracle: float | None
    oracle: float
    gain_over_best_single: float | None
    gain_ci95_low: float | None
    gain_ci95_high: float | None
    gap_recovered: float | None
    mean_cost: float | None
    best_single_cost: float | None
    route_ms_p50: float | None
    baselines: Mapping[str, float]
    baseline_costs: Mapping[str, float | None] = field(metadata=_NOTE)
    expert_use: Mapping[str, float] = field(metadata=_NOTE)
    quality_ece: float = field(metadata=_NOTE)
    abstained: float = field(metadata=_NOTE)

    def to_json(self) -> dict[str, Any]:
        """The object that `coe router cv` and `coe router eval` write."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("in_json", True)}


@dataclass(frozen=True, slots=True)
class Line:
    """What a way of choosing experts came to: (n,) scores, and (n,) costs where they are known."""

    scores: NDArray[np.float64]
    costs: NDArray[np.float64] | None

    @classmethod
    def of(cls, table: OutcomeTable, picks: NDArray[np.intp]) -> Self:
        """What the picked experts (n,) scored and cost."""
        costs = table.costs_usd
        return cls(metrics.picked(table.scores, picks), None if costs is None else metrics.picked(costs, picks))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The parts, end to end."""
        costs = [part.costs for part in parts if part.costs is not None]
        return cls(np.concatenate([part.scores for part in parts]), np.concatenate(costs) if costs else None)

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    @property
    def mean_cost(self) -> float | None:
        """USD a query."""
        return None if self.costs is None else float(self.costs.mean())


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router did with n queries.

    Attributes:
        picks: (n,) chosen experts, as columns of the table.
        quality: (n,) the score that the router expected of them.
        abstained: (n,) bool.
    """

    picks: NDArray[np.intp]
    quality: NDArray[np.float64]
    abstained: NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The parts, end to end."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def marks_of(table: OutcomeTable, reference: Reference | None) -> dict[str, Line]:
    """Random, best single, dataset oracle and oracle, as far as they can be known."""
    costs = table.costs_usd
    marks = {"random": Line(table.scores.mean(axis=1), None if costs is None else costs.mean(axis=1))}
    if reference is not None:
        best = metrics.best_single(reference.mean_scores)
        marks["best_single"] = Line.of(table, np.full(len(table), best))
        if table.domains is not None and reference.by_domain:
            picks = metrics.dataset_oracle(table.domains, reference.by_domain, best)
            marks["dataset_oracle"] = Line.of(table, picks)
    return marks | {"oracle": Line.of(table, metrics.oracle(table.scores, costs))}


def report(
    name: str,
    kind: str,
    table: OutcomeTable,
    routing: Routing,
    lines: Mapping[str, Line],
    route_ms: float,
    seed: int,
) -> RouterReport:
    """Compare a routing of the table's n queries with the marks in `lines`; `seed` is the bootstrap's."""
    routed, best, dataset = Line.of(table, routing.picks), lines.get("best_single"), lines.get("dataset_oracle")
    low, high = metrics.paired_bootstrap(routed.scores, best.scores, seed=seed) if best else (None, None)
    oracle = lines["oracle"].accuracy
    return RouterReport(
        router=name,
        kind=kind,
        n_queries=len(table),
        n_experts=len(table.experts),
        accuracy=routed.accuracy,
        best_single=best.accuracy if best else None,
        dataset_oracle=dataset.accuracy if dataset else None,
        oracle=oracle,
        gain_over_best_single=routed.accuracy - best.accuracy if best else None,
        gain_ci95_low=low,
        gain_ci95_high=high,
        gap_recovered=metrics.gap_recovered(routed.accuracy, best.accuracy, oracle) if best else None,
        mean_cost=routed.mean_cost,
        best_single_cost=best.mean_cost if best else None,
        route_ms_p50=route_ms,
        baselines={label: line.accuracy for label, line in lines.items()},
        baseline_costs={label: line.mean_cost for label, line in lines.items()},
        expert_use=metrics.expert_use(routing.picks, table.experts),
        quality_ece=metrics.expected_calibration_error(routing.quality, routed.scores),
        abstained=float(routing.abstained.mean()),
    )

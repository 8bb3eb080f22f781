"""Lines of a report: what ways of choosing experts came to on a table, and the marks that every router is beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from routers.evaluation import metrics
from routers.outcomes.reference import Reference
from routers.outcomes.table import OutcomeTable


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

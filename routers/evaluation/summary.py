"""Report rows: scores and costs of a way to choose experts, and those of the baselines of every report."""

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
class ReportRow:
    """Result of a way to choose experts: (n,) scores, and (n,) costs in USD or `None` if unknown."""

    scores: NDArray[np.float64]
    costs: NDArray[np.float64] | None

    @classmethod
    def of(cls, table: OutcomeTable, picks: NDArray[np.intp]) -> Self:
        """The recorded scores and costs of the picked experts, (n,) columns of the table."""
        costs = table.costs_usd
        return cls(metrics.picked(table.scores, picks), None if costs is None else metrics.picked(costs, picks))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The parts, concatenated."""
        costs = [part.costs for part in parts if part.costs is not None]
        return cls(np.concatenate([part.scores for part in parts]), np.concatenate(costs) if costs else None)

    def answered(self, mask: NDArray[np.bool_]) -> Self:
        """The same with score and cost 0 where the (n,) mask is False: a refused query."""
        return type(self)(self.scores * mask, None if self.costs is None else self.costs * mask)

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    @property
    def mean_cost(self) -> float | None:
        """USD per query."""
        return None if self.costs is None else float(self.costs.mean())


def baselines_of(table: OutcomeTable, reference: Reference | None) -> dict[str, ReportRow]:
    """name -> row of random, best single, dataset oracle and oracle.

    Best single needs a reference; dataset oracle needs a reference with domains, and domains in the table.
    """
    costs = table.costs_usd
    rows = {"random": ReportRow(table.scores.mean(axis=1), None if costs is None else costs.mean(axis=1))}
    if reference is not None:
        best = metrics.best_single(reference.mean_scores)
        rows["best_single"] = ReportRow.of(table, np.full(len(table), best))
        if table.domains is not None and reference.by_domain:
            picks = metrics.dataset_oracle(table.domains, reference.by_domain, best)
            rows["dataset_oracle"] = ReportRow.of(table, picks)
    return rows | {"oracle": ReportRow.of(table, metrics.oracle(table.scores, costs))}

"""Comparison of two routers on the same queries, query by query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from routers.errors import InvalidOutcomes
from routers.evaluation import metrics
from routers.evaluation.summary import ReportRow
from routers.outcomes.table import OutcomeTable


@dataclass(frozen=True, slots=True)
class Comparison:
    """A router compared with a reference; scores in [0, 1], costs in USD per query, `None` if costs are unknown.

    Attributes:
        gain: accuracy minus that of the reference, with its 95% paired bootstrap interval.
        wins, losses, ties: queries on which the router scores more, less, or the same.
        cost_gain: mean cost minus that of the reference, with its interval; negative if the router is cheaper.
    """

    router: str
    reference: str
    n_queries: int
    accuracy: float
    gain: float
    gain_ci95_low: float
    gain_ci95_high: float
    wins: int
    losses: int
    ties: int
    mean_cost: float | None
    cost_gain: float | None
    cost_gain_ci95_low: float | None
    cost_gain_ci95_high: float | None

    def to_json(self) -> dict[str, Any]:
        """The object that `coe router compare` writes."""
        return asdict(self)


def compare(router: str, ours: ReportRow, reference: str, theirs: ReportRow, *, seed: int = 0) -> Comparison:
    """Compare two results on the same n queries; `seed` is that of the bootstrap."""
    difference = ours.scores - theirs.scores
    low, high = metrics.paired_bootstrap(ours.scores, theirs.scores, seed=seed)
    costs: tuple[float | None, float | None, float | None] = (None, None, None)
    if ours.costs is not None and theirs.costs is not None:
        mean = float(ours.costs.mean() - theirs.costs.mean())
        costs = (mean, *metrics.paired_bootstrap(ours.costs, theirs.costs, seed=seed))
    return Comparison(
        router=router,
        reference=reference,
        n_queries=len(difference),
        accuracy=ours.accuracy,
        gain=float(difference.mean()),
        gain_ci95_low=low,
        gain_ci95_high=high,
        wins=int((difference > 0).sum()),
        losses=int((difference < 0).sum()),
        ties=int((difference == 0).sum()),
        mean_cost=ours.mean_cost,
        cost_gain=costs[0],
        cost_gain_ci95_low=costs[1],
        cost_gain_ci95_high=costs[2],
    )


def row_of_picks(table: OutcomeTable, picks: Mapping[str, str | None], *, source: str) -> ReportRow:
    """Scores and costs of recorded picks on a table; `None` is a refused query, which scores and costs 0.

    Args:
        picks: query id -> expert, for at least every query of the table.
        source: where the picks come from, for messages.

    Raises:
        InvalidOutcomes: queries without a pick, or picked experts that are not in the table.
    """
    if missing := [name for name in table.query_ids if name not in picks]:
        raise InvalidOutcomes(
            f"{source} has no pick for {len(missing):,} of {len(table):,} queries, for example {missing[0]!r}: "
            "compare routers on the table that they were measured on"
        )
    column_of = {name: column for column, name in enumerate(table.experts)}
    if unknown := sorted({pick for q in table.query_ids if (pick := picks[q]) is not None and pick not in column_of}):
        raise InvalidOutcomes(f"{source} picks experts that are not in the table: {', '.join(unknown)}")
    chosen = [picks[name] for name in table.query_ids]
    row = ReportRow.of(table, np.array([0 if name is None else column_of[name] for name in chosen], dtype=np.intp))
    return row.answered(np.array([name is not None for name in chosen]))

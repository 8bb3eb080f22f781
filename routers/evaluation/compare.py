"""Two routers on the same queries: what one gains over the other, query by query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from routers.errors import InvalidOutcomes
from routers.evaluation import metrics
from routers.evaluation.summary import Line
from routers.outcomes.table import OutcomeTable


@dataclass(frozen=True, slots=True)
class Comparison:
    """A router beside a reference; scores in [0, 1], costs USD a query, `None` where costs are unknown.

    Attributes:
        gain: accuracy less that of the reference, with its 95% paired bootstrap interval.
        wins, losses, ties: queries on which it scored more, less, or the same.
        cost_gain: mean cost less that of the reference, with its interval; below 0 it is cheaper.
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


def compare(router: str, ours: Line, reference: str, theirs: Line, *, seed: int = 0) -> Comparison:
    """Compare what two routings of the same n queries came to; `seed` is the bootstrap's."""
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


def line_of_picks(table: OutcomeTable, picks: Mapping[str, str | None], *, source: str) -> Line:
    """What recorded picks came to on a table; `None` is a refused query, which scores and costs 0.

    Args:
        picks: query id -> expert, for every query of the table at least.
        source: where they come from, for messages.

    Raises:
        InvalidOutcomes: queries without a pick, or experts that are not in the table.
    """
    if missing := [name for name in table.query_ids if name not in picks]:
        raise InvalidOutcomes(
            f"{source} has no pick for {len(missing):,} of {len(table):,} queries, {missing[0]!r} for one: compare "
            "routers on the table that they were measured on"
        )
    column_of = {name: column for column, name in enumerate(table.experts)}
    if strangers := sorted({pick for q in table.query_ids if (pick := picks[q]) is not None and pick not in column_of}):
        raise InvalidOutcomes(f"{source} picks experts that are not in the table: {', '.join(strangers)}")
    chosen = [picks[name] for name in table.query_ids]
    line = Line.of(table, np.array([0 if name is None else column_of[name] for name in chosen], dtype=np.intp))
    answered = np.array([name is not None for name in chosen])
    return Line(line.scores * answered, None if line.costs is None else line.costs * answered)

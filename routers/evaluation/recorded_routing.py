"""A router's choices on the n queries of a table, with its estimates, so that other cost weights can be tried."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Router, RoutingDecision
from routers.conversation import estimate as estimate_conversations
from routers.decision import Utility, decide
from routers.encoders.build import CachedEncoder
from routers.errors import RouterError
from routers.evaluation import curves, metrics
from routers.factory import TrainableRouter
from routers.outcomes.table import OutcomeTable
from routers.selectors import Selector

BATCH = 1024
"""Queries per call of `estimate`: bounds the memory of (n_queries, n_training_rows) arrays inside routers."""
TIMED_QUERIES = 21
"""Queries timed one by one for `route_ms`."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Routing:
    """Predictions and choices of a router for n queries and the m experts of a table.

    Attributes:
        quality: (n, m) expected scores, columns as in the table.
        costs: (n, m) expected USD per query, or `None`.
        eligible: (n, m) experts that the router lets answer, or `None` for all.
        picks: (n,) first choices, as columns of the table.
        abstained, truncated: (n,).
        refused: (n,) no expert is asked: score 0 at cost 0.
        scores, spent: (n,) score and USD of a composition; `None` if the first choice alone answers.
        calls: (n,) experts asked; `None` means one per query.
    """

    quality: metrics.Floats
    costs: metrics.Floats | None
    eligible: Mask | None
    picks: metrics.Picks
    abstained: Mask
    truncated: Mask
    refused: Mask
    scores: metrics.Floats | None = None
    spent: metrics.Floats | None = None
    calls: metrics.Floats | None = None

    @property
    def expected(self) -> metrics.Floats:
        """(n,) expected score of the first choice."""
        return metrics.picked(self.quality, self.picks)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The parts, concatenated."""
        return cls(*(_end_to_end([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def taken(self, rows: NDArray[np.intp]) -> Self:
        """The rows of an index array, in that order."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: array[rows] for name, array in arrays.items() if array is not None})

    def sweep(self, table: OutcomeTable, cost_weights: metrics.Floats | None = None) -> curves.Sweep | None:
        """The cost-quality curve on the routed table; `None` if costs are unknown or not predicted."""
        if self.costs is None or table.costs_usd is None or not np.isfinite(self.costs).all():
            return None
        answered = ~self.refused[:, None]
        recorded = table.scores * answered, table.costs_usd * answered
        return curves.sweep(self.quality, self.costs, self.eligible, *recorded, cost_weights)


@dataclass(frozen=True, slots=True)
class Composed:
    """Result of a composition on n decisions: (n,) scores, (n,) USD or `None`, (n,) experts asked."""

    scores: metrics.Floats
    costs: metrics.Floats | None
    calls: metrics.Floats


Compose = Callable[[OutcomeTable, Sequence[RoutingDecision]], Composed]
"""Replays a composition over the recorded answers of a table's rows, given a decision for each row."""


@dataclass(frozen=True, slots=True)
class Choosing:
    """How estimates become answers: `select` picks experts at `utility` (the best by default), `compose` combines their
    recorded answers; `composition` is its name in reports."""

    utility: Utility = Utility()
    select: Selector | None = None
    compose: Compose | None = None
    composition: str = "single"

    @property
    def top_k(self) -> int:
        """The most experts asked per query."""
        return 1 if self.select is None else self.select.k

    def at(self, cost_weight: float) -> Self:
        """The same at another cost weight."""
        return replace(self, utility=replace(self.utility, cost_weight=cost_weight))


def route(router: Router, table: OutcomeTable, choosing: Choosing = Choosing()) -> Routing:
    """Route every row of a table; the router sees prompts, conversations and features only.

    Raises:
        RouterError: the router needs features that the table lacks, or a cost weight > 0 without known costs.
    """
    if missing := sorted(router.requires - set(table.features)):
        raise RouterError(
            f"the table has no features {', '.join(missing)}, which this router requires: add them to the table "
            "(`OutcomeTable.features`), or run `coe router` with the experts that compute them"
        )
    queries, parts = table.queries(), []
    for start in range(0, len(table), BATCH):
        rows = np.arange(start, min(start + BATCH, len(table)))
        estimated = estimate_conversations(router, queries[start : start + BATCH])
        parts.append(_chosen(estimated, table, rows, choosing))
    return Routing.joined(parts)


def route_ms(
    router: TrainableRouter, table: OutcomeTable, utility: Utility, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median milliseconds to route one query, over queries spread over the table; the encoder cache is bypassed."""
    encoder = getattr(router, "encoder", None)
    rows = np.linspace(0, len(table) - 1, min(TIMED_QUERIES, len(table))).astype(int)
    queries, times = table.select(rows).queries(), []
    with encoder.bypassed() if isinstance(encoder, CachedEncoder) else nullcontext():
        for query in (queries[0], *queries):  # the first call loads and warms up
            before = clock()
            decide(estimate_conversations(router, [query]), utility=utility, allowed=table.experts)
            times.append(clock() - before)
    return 1e3 * median(times[1:])


def _chosen(estimate: Estimate, table: OutcomeTable, rows: NDArray[np.intp], choosing: Choosing) -> Routing:
    decisions = decide(estimate, utility=choosing.utility, allowed=table.experts, select=choosing.select)
    columns = [estimate.experts.index(name) for name in table.experts]
    column_of = {name: column for column, name in enumerate(table.experts)}
    truncated = estimate.truncated
    first = [decision.experts[0] if decision.experts else table.experts[0] for decision in decisions]
    routing = Routing(
        quality=np.asarray(estimate.quality[:, columns], dtype=np.float64),
        costs=None if estimate.cost_usd is None else np.asarray(estimate.cost_usd[:, columns], dtype=np.float64),
        eligible=None if estimate.eligible is None else estimate.eligible[:, columns],
        picks=np.array([column_of[name] for name in first], dtype=np.intp),
        abstained=np.array([decision.abstained for decision in decisions], dtype=bool),
        truncated=np.zeros(len(decisions), dtype=bool) if truncated is None else np.asarray(truncated, dtype=bool),
        refused=np.array([not decision.experts for decision in decisions], dtype=bool),
    )
    return routing if choosing.compose is None else _composed(routing, table.select(rows), decisions, choosing.compose)


def _composed(routing: Routing, table: OutcomeTable, decisions: Sequence[RoutingDecision], compose: Compose) -> Routing:
    """The routing with scores, USD and calls of a composition; refused queries have 0 of each."""
    asked = np.flatnonzero(~routing.refused)
    scores, spent, calls = np.zeros(len(decisions)), np.zeros(len(decisions)), np.zeros(len(decisions))
    composed = compose(table.select(asked), [decisions[row] for row in asked])
    scores[asked], calls[asked] = composed.scores, composed.calls
    if composed.costs is None:
        return replace(routing, scores=scores, calls=calls)
    spent[asked] = composed.costs
    return replace(routing, scores=scores, spent=spent, calls=calls)


def _end_to_end(values: Sequence[Any]) -> Any:
    """The arrays, concatenated; `None` if one is `None`."""
    return None if any(value is None for value in values) else np.concatenate(values)

"""What a router is worth on a table: beside the experts it chooses from, and beside the marks it cannot reach.

The router sees each query's prompt and nothing else of the table. The best single expert and the dataset oracle are
chosen on training rows and scored on the rows at hand; the oracle and random need no training.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from statistics import median

import numpy as np
from numpy.typing import NDArray

from routers import metrics
from routers.base import Router, TrainableRouter
from routers.decide import Utility, decide
from routers.encoders import CachedEncoder
from routers.errors import EvaluatingOnTrainingData, InvalidOutcomes, RouterError
from routers.outcomes import OutcomeTable
from routers.reference import Reference
from routers.report import Line, RouterReport, Routing, marks_of, report

Factory = Callable[[], TrainableRouter]
"""Makes an unfitted router."""
BATCH = 1024
"""Queries routed at once: bounds what a router's (n_queries, n_training_rows) arrays take."""
TIMED_QUERIES = 21


def evaluate(
    router: TrainableRouter,
    table: OutcomeTable,
    *,
    name: str = "",
    reference: Reference | None = None,
    train_table: OutcomeTable | None = None,
    baselines: Mapping[str, Factory] | None = None,
    experts: Sequence[str] | None = None,
    utility: Utility = Utility(),
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> RouterReport:
    """Score a fitted router on a table that it was not trained on.

    Args:
        name: what the report calls it; its kind where empty.
        reference: of the training table, as its artifact keeps it; without it (and without `train_table`) there is no
            best single expert to compare with.
        train_table: the training table itself, in place of `reference`; `baselines` are trained on it.
        baselines: name -> factory of further routers to show.
        experts: evaluate on this part of the router's experts.
        utility: how quality is traded against cost.
        seed: of the bootstrap.
        clock: seconds, for `route_ms_p50`.

    Raises:
        InvalidOutcomes: the table lacks one of the experts.
        RouterError: `experts` that the router does not know, features that it needs and a table does not have, or
            baselines without their training table.

    Warns:
        EvaluatingOnTrainingData: rows of the table were trained on.
    """
    pool = tuple(experts or router.experts)
    if strangers := [name for name in pool if name not in router.experts]:
        known = ", ".join(router.experts)
        raise RouterError(f"this router was not trained on {', '.join(strangers)}; it knows: {known}")
    table = table.with_experts(pool)
    if train_table is not None:
        train_table = train_table.with_experts(pool)
        reference = Reference.of(train_table)
    if reference is not None:
        reference = reference.with_experts(pool)
        _warn_of_overlap(reference, table)
    lines = marks_of(table, reference)
    if baselines:
        if train_table is None:
            raise RouterError("baselines have to be trained: give train_table")
        lines |= _trained(baselines, train_table, table, utility)
    routing = _route(router, table, utility)
    elapsed = _route_ms(router, table, utility, clock)
    return report(name or router.kind, router.kind, table, routing, lines, elapsed, seed)


def cross_validate(
    make_router: Factory,
    table: OutcomeTable,
    folds: NDArray[np.int64],
    *,
    name: str = "",
    baselines: Mapping[str, Factory] | None = None,
    utility: Utility = Utility(),
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> RouterReport:
    """Train on all folds but one, route the one left out, pool all of them. See `evaluate` for the arguments.

    Args:
        folds: (n,) fold of each row, two different ones at least.

    Raises:
        InvalidOutcomes: folds of a wrong length or fewer than two.
    """
    if len(folds) != len(table) or len(np.unique(folds)) < 2:
        raise InvalidOutcomes(f"cross-validation needs two folds or more, and one for each of the {len(table)} rows")
    order, parts, lines = [], [], list[dict[str, Line]]()
    for fold in np.unique(folds):
        train, test = table.select(folds != fold), table.select(folds == fold)
        router = make_router().fit(train)
        parts.append(_route(router, test, utility))
        lines.append(marks_of(test, Reference.of(train)) | _trained(baselines or {}, train, test, utility))
        order.append(np.flatnonzero(folds == fold))
    elapsed = _route_ms(router, test, utility, clock)
    rows = table.select(np.concatenate(order))
    pooled = {label: Line.joined([part[label] for part in lines]) for label in lines[0]}
    return report(name or router.kind, router.kind, rows, Routing.joined(parts), pooled, elapsed, seed)


def stratified_folds(labels: Sequence[str], n_folds: int = 5, *, seed: int = 0) -> NDArray[np.int64]:
    """(n,) folds 0 .. n_folds - 1 of nearly equal size, every label spread over them as evenly as it can be."""
    if n_folds < 2 or n_folds > len(labels):
        raise InvalidOutcomes(f"{len(labels)} rows cannot be split into {n_folds} folds")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    ordered = sorted(shuffled, key=lambda row: labels[row])  # stable: shuffled within a label
    folds = np.empty(len(labels), dtype=np.int64)
    folds[ordered] = np.arange(len(labels)) % n_folds
    return folds


def _trained(
    baselines: Mapping[str, Factory], train: OutcomeTable, test: OutcomeTable, utility: Utility
) -> dict[str, Line]:
    return {n: Line.of(test, _route(make().fit(train), test, utility).picks) for n, make in baselines.items()}


def _route(router: Router, table: OutcomeTable, utility: Utility) -> Routing:
    if missing := sorted(router.requires - set(table.features)):
        raise RouterError(f"this router needs features that the table does not have: {', '.join(missing)}")
    queries = table.queries()
    parts = []
    for start in range(0, len(table), BATCH):
        estimate = router.estimate(queries[start : start + BATCH])
        decisions = decide(estimate, utility=utility, allowed=table.experts)
        chosen = [decision.experts[0] for decision in decisions]
        parts.append(
            Routing(
                picks=np.array([table.experts.index(name) for name in chosen], dtype=np.intp),
                quality=metrics.picked(estimate.quality, [estimate.experts.index(name) for name in chosen]),
                abstained=np.array([decision.abstained for decision in decisions]),
            )
        )
    return Routing.joined(parts)


def _route_ms(router: TrainableRouter, table: OutcomeTable, utility: Utility, clock: Callable[[], float]) -> float:
    """Median milliseconds of single queries, spread over the table; encoded afresh, since a live query is new."""
    encoder = getattr(router, "encoder", None)
    rows = np.linspace(0, len(table) - 1, min(TIMED_QUERIES, len(table))).astype(int)
    queries, times = table.select(rows).queries(), []
    with encoder.bypassed() if isinstance(encoder, CachedEncoder) else nullcontext():
        for query in (queries[0], *queries):  # the first loads and warms up
            before = clock()
            decide(router.estimate([query]), utility=utility, allowed=table.experts)
            times.append(clock() - before)
    return 1e3 * median(times[1:])


def _warn_of_overlap(reference: Reference, table: OutcomeTable) -> None:
    seen = int(reference.seen(table.query_ids).sum())
    if seen:
        warnings.warn(
            f"{seen} of {len(table)} queries were trained on: the figures flatter this router. Evaluate on other rows, "
            "or cross-validate (`coe router cv`)",
            EvaluatingOnTrainingData,
            stacklevel=3,
        )

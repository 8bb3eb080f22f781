"""Evaluation of routers on a table, by cross-validation or on held-out rows, compared with experts and baselines.

A router sees the prompt of each query and nothing else of the table. The best single expert and the dataset oracle are
chosen on training rows and scored on the evaluated rows; the oracle and random need no training.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from routers.encoders.build import Encoder
from routers.errors import BaselineLeftOut, EvaluatingOnTrainingData, InvalidOutcomes, RouterError
from routers.evaluation.cost_weight import Factory, Solution, Target, inner_routings, solve_on
from routers.evaluation.recorded_routing import Choosing, Routing, route, route_ms
from routers.evaluation.report import Heading, RouterReport, report, row_of
from routers.evaluation.summary import ReportRow, baselines_of
from routers.factory import TrainableRouter, build, settings_of
from routers.numeric.folds import stratified_folds
from routers.outcomes.reference import Reference
from routers.outcomes.table import OutcomeTable

__all__ = [
    "BASELINE_KINDS",
    "Factory",
    "cross_validate",
    "cross_validate_all",
    "evaluate",
    "standard_baselines",
    "stratified_folds",
    "warn_of_overlap",
]

BASELINE_KINDS = ("knn", "category")
"""Kinds that every router is compared with, at their default settings."""
T = TypeVar("T")


def standard_baselines(encoder: Encoder | None, *, seed: int = 0) -> dict[str, Factory]:
    """kNN and category at their default settings; none without an encoder, since both read text."""
    if encoder is None:
        return {}
    seeds = {kind: {"seed": seed} if "seed" in settings_of(kind) else {} for kind in BASELINE_KINDS}
    return {kind: partial(build, kind, encoder, seeds[kind]) for kind in BASELINE_KINDS}


def evaluate(
    router: TrainableRouter,
    table: OutcomeTable,
    *,
    name: str = "",
    reference: Reference | None = None,
    train_table: OutcomeTable | None = None,
    baselines: Mapping[str, Factory] | None = None,
    experts: Sequence[str] | None = None,
    choosing: Choosing = Choosing(),
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> RouterReport:
    """Score a fitted router on a table that it was not trained on.

    Args:
        name: of the router in the report; its kind if empty.
        reference: of the training table, as the artifact stores it; without it (and without `train_table`) there is no
            best single expert to compare with.
        train_table: the training table itself, instead of `reference`; `baselines` are trained on it.
        baselines: name -> factory of further routers to compare with; one that cannot be trained is left out with a
            warning.
        experts: evaluate on this subset of the router's experts.
        choosing: how estimates become answers; baselines use its utility alone.
        seed: of the bootstrap.
        clock: seconds, for `route_ms_p50`.

    Raises:
        InvalidOutcomes: the table lacks one of the experts.
        RouterError: `experts` that the router does not know, features that it requires and the table lacks, or
            baselines without their training table.

    Warns:
        EvaluatingOnTrainingData: rows of the table were trained on.
        BaselineLeftOut: a baseline could not be trained on the training table.
    """
    pool = tuple(experts or router.experts)
    if unknown := [name for name in pool if name not in router.experts]:
        known = ", ".join(router.experts)
        raise RouterError(f"this router was not trained on {', '.join(unknown)}; its experts are: {known}")
    table = table.with_experts(pool)
    if train_table is not None:
        train_table = train_table.with_experts(pool)
        reference = Reference.of(train_table)
    if reference is not None:
        reference = reference.with_experts(pool)
        warn_of_overlap(reference, table)
    rows = baselines_of(table, reference)
    if baselines:
        if train_table is None:
            raise RouterError("baselines need their training table: give train_table")
        for label, make in baselines.items():
            if fitted := _or_warn(label, partial(_fitted, make, train_table)):
                rows[label] = row_of(table, route(fitted, table, Choosing(choosing.utility)))
    utility = choosing.utility
    heading = Heading(
        name or router.kind,
        router.kind,
        cost_weights=(utility.cost_weight,),
        top_k=choosing.top_k,
        composition=choosing.composition,
        route_ms=route_ms(router, table, utility, clock),
        seed=seed,
    )
    return report(heading, table, route(router, table, choosing), rows)


def cross_validate(
    make_router: Factory,
    table: OutcomeTable,
    folds: NDArray[np.int64],
    *,
    name: str = "",
    baselines: Mapping[str, Factory] | None = None,
    choosing: Choosing = Choosing(),
    target: Target | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> RouterReport:
    """`cross_validate_all` for one router; its name in the report is its kind if `name` is empty."""
    (found,) = cross_validate_all(
        {name: make_router},
        table,
        folds,
        baselines=baselines,
        choosing=choosing,
        target=target,
        seed=seed,
        clock=clock,
    )
    return found if name else replace(found, router=found.kind)


def cross_validate_all(
    routers: Mapping[str, Factory],
    table: OutcomeTable,
    folds: NDArray[np.int64],
    *,
    baselines: Mapping[str, Factory] | None = None,
    choosing: Choosing = Choosing(),
    target: Target | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[RouterReport]:
    """Train on all folds but one, route the one left out, pool all folds. See `evaluate` for the other arguments.

    With a target, the cost weight of each fold is solved on the other folds by a cross-validation inside them; the cost
    weight of `choosing` then applies to the baselines only.

    Args:
        routers: name -> factory.
        folds: (n,) fold of each row; at least two different ones, three with a target.
        baselines: name -> factory of further routers, at the cost weight of `choosing`. A factory that is also among
            `routers` is trained once.
        on_progress: called with (trainings done, trainings in all), first with none done.

    Raises:
        InvalidOutcomes: folds of a wrong length, or too few.
    """
    checked = _checked(folds, table, 2 if target is None else 3)
    shared = target is None and choosing.compose is None
    trained = [*routers.values()] if shared else []
    others = {label: make for label, make in (baselines or {}).items() if not any(make is one for one in trained)}
    count = _Counter(_trainings(len(np.unique(checked)), len(routers), len(others), target), on_progress)
    folded = _FoldedTable(table, checked, count)
    runs = {name: folded.run(make, choosing, target) for name, make in routers.items()}
    rows = folded.baselines()
    run_of: dict[int, _PooledRun | None] = {id(make): runs[name] for name, make in routers.items()}
    for label, make in (baselines or {}).items():
        if label in others:
            run_of[id(make)] = _or_warn(label, partial(folded.run, make, Choosing(choosing.utility)))
        if (run := run_of[id(make)]) is not None:
            rows[label] = row_of(folded.rows, run.routing)
    last = table.select(folded.folds == folded.names[-1])
    reports = []
    for name, run in runs.items():
        heading = Heading(
            name,
            run.router.kind,
            cost_weights=run.cost_weights,
            target=target,
            solutions=run.solutions,
            top_k=choosing.top_k,
            composition=choosing.composition,
            route_ms=route_ms(run.router, last, replace(choosing.utility, cost_weight=run.cost_weights[-1]), clock),
            seed=seed,
        )
        reports.append(report(heading, folded.rows, run.routing, rows))
    return reports


class _Counter:
    """Counts trainings and reports each one."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None]) -> None:
        self._total, self._on_progress, self._done = total, on_progress, 0
        on_progress(0, total)

    def __call__(self) -> None:
        self._done += 1
        self._on_progress(self._done, self._total)


def _trainings(n_folds: int, n_routers: int, n_baselines: int, target: Target | None) -> int:
    inner = 0 if target is None else n_folds * (n_folds - 1) // 2
    return n_routers * (n_folds + inner) + n_baselines * n_folds


@dataclass(frozen=True, slots=True)
class _PooledRun:
    """A router over all folds: its routing, rows in the order of the folds, and the router of the last fold."""

    router: TrainableRouter
    routing: Routing
    cost_weights: tuple[float, ...]
    solutions: tuple[Solution, ...]


@dataclass(frozen=True, slots=True)
class _FoldedTable:
    """A table split into folds, and the counter of trainings on it."""

    table: OutcomeTable
    folds: NDArray[np.int64]
    count: _Counter

    @property
    def names(self) -> list[int]:
        return [int(fold) for fold in np.unique(self.folds)]

    @property
    def rows(self) -> OutcomeTable:
        """The table in the order of the folds."""
        return self.table.select(np.argsort(self.folds, kind="stable"))

    def baselines(self) -> dict[str, ReportRow]:
        """Baselines pooled over folds; best single and dataset oracle are chosen on the rows outside each fold."""
        parts = [
            baselines_of(self.table.select(self.folds == fold), Reference.of(self.table.select(self.folds != fold)))
            for fold in self.names
        ]
        return {label: ReportRow.joined([part[label] for part in parts]) for label in parts[0]}

    def run(self, make: Factory, choosing: Choosing, target: Target | None = None) -> _PooledRun:
        """A router over all folds; with a target, each fold at its own solved cost weight."""
        solutions = {}
        if target is not None:
            for fold, train, routing in inner_routings(make, self.table, self.folds, self.count):
                solutions[fold] = solve_on(routing, train, target)
        parts, cost_weights = [], []
        for fold in self.names:
            router = make().fit(self.table.select(self.folds != fold))
            self.count()
            at = choosing.at(solutions[fold].cost_weight) if target is not None else choosing
            parts.append(route(router, self.table.select(self.folds == fold), at))
            cost_weights.append(at.utility.cost_weight)
        in_use = tuple(cost_weights) if target is not None else (choosing.utility.cost_weight,)
        return _PooledRun(router, Routing.joined(parts), in_use, tuple(solutions.values()))


def _checked(folds: NDArray[np.int64], table: OutcomeTable, least: int) -> NDArray[np.int64]:
    if len(folds) != len(table) or len(np.unique(folds)) < least:
        some = {2: "at least two folds", 3: "at least three folds to solve a cost weight inside it"}[least]
        raise InvalidOutcomes(f"cross-validation needs {some}, and one fold number for each of the {len(table)} rows")
    return np.asarray(folds)


def _fitted(make: Factory, table: OutcomeTable) -> TrainableRouter:
    return make().fit(table)


def _or_warn(label: str, train: Callable[[], T]) -> T | None:
    """The trained baseline, or `None` with a warning if it cannot be trained on this table."""
    try:
        return train()
    except RouterError as error:
        warnings.warn(f"the baseline {label} is left out: {error}", BaselineLeftOut, stacklevel=3)
        return None


def warn_of_overlap(reference: Reference, table: OutcomeTable) -> None:
    """Warn (EvaluatingOnTrainingData) if rows of a table were trained on."""
    seen = int(reference.seen(table.query_ids).sum())
    if seen:
        warnings.warn(
            f"{seen} of {len(table)} queries were trained on, so the figures of this router are too high: evaluate on "
            "other rows, or cross-validate (`coe router cv`)",
            EvaluatingOnTrainingData,
            stacklevel=3,
        )

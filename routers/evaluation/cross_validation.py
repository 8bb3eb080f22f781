"""What a router is worth on a table: beside the experts it chooses from, and beside the marks it cannot reach.

The router sees each query's prompt and nothing else of the table. The best single expert and the dataset oracle are
chosen on training rows and scored on the rows at hand; the oracle and random need no training.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from routers.decision import Utility
from routers.encoders.build import Encoder
from routers.errors import BaselineLeftOut, EvaluatingOnTrainingData, InvalidOutcomes, RouterError
from routers.evaluation.cost_weight import Factory, Solution, Target, inner_routings, solve_on
from routers.evaluation.recorded_routing import Choosing, Compose, Routing, route, route_ms
from routers.evaluation.report import Heading, RouterReport, line_of, report
from routers.evaluation.summary import Line, marks_of
from routers.factory import TrainableRouter, build, settings_of
from routers.outcomes.reference import Reference
from routers.outcomes.table import OutcomeTable
from routers.selectors import Selector

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
"""Learned routers that stand beside every other one, at their default settings."""


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
    utility: Utility = Utility(),
    select: Selector | None = None,
    compose: Compose | None = None,
    composition: str = "single",
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> RouterReport:
    """Score a fitted router on a table that it was not trained on.

    Args:
        name: what the report calls it; its kind where empty.
        reference: of the training table, as its artifact keeps it; without it (and without `train_table`) there is no
            best single expert to compare with.
        train_table: the training table itself, in place of `reference`; `baselines` are trained on it.
        baselines: name -> factory of further routers to show; one that cannot be trained is left out with a warning.
        experts: evaluate on this part of the router's experts.
        utility: how quality is traded against cost.
        select: who is asked, the best by default.
        compose: what they come to together, from recorded answers; composition: its name.
        seed: of the bootstrap.
        clock: seconds, for `route_ms_p50`.

    Raises:
        InvalidOutcomes: the table lacks one of the experts.
        RouterError: `experts` that the router does not know, features that it needs and a table does not have, or
            baselines without their training table.

    Warns:
        EvaluatingOnTrainingData: rows of the table were trained on.
        BaselineLeftOut: a baseline could not be trained on the training table.
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
        warn_of_overlap(reference, table)
    marks = marks_of(table, reference)
    if baselines:
        if train_table is None:
            raise RouterError("baselines have to be trained: give train_table")
        for label, make in baselines.items():
            if fitted := _fitted(label, make, train_table):
                marks[label] = line_of(table, route(fitted, table, Choosing(utility)))
    routing = route(router, table, Choosing(utility, select, compose))
    heading = Heading(
        name or router.kind,
        router.kind,
        cost_weights=(utility.cost_weight,),
        top_k=1 if select is None else select.k,
        composition=composition,
        route_ms=route_ms(router, table, utility, clock),
        seed=seed,
    )
    return report(heading, table, routing, marks)


def cross_validate(
    make_router: Factory,
    table: OutcomeTable,
    folds: NDArray[np.int64],
    *,
    name: str = "",
    baselines: Mapping[str, Factory] | None = None,
    utility: Utility = Utility(),
    target: Target | None = None,
    select: Selector | None = None,
    compose: Compose | None = None,
    composition: str = "single",
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> RouterReport:
    """`cross_validate_all` for one router; it is called after its kind where `name` is empty."""
    (found,) = cross_validate_all(
        {name: make_router},
        table,
        folds,
        baselines=baselines,
        utility=utility,
        target=target,
        select=select,
        compose=compose,
        composition=composition,
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
    utility: Utility = Utility(),
    target: Target | None = None,
    select: Selector | None = None,
    compose: Compose | None = None,
    composition: str = "single",
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[RouterReport]:
    """Train on all folds but one, route the one left out, pool all of them. See `evaluate` for the arguments.

    With a target the cost weight of each fold is solved on the other folds alone, by a cross-validation inside them;
    the cost weight of `utility` is not used for the routers then, only for the baselines.

    Args:
        routers: name -> factory.
        folds: (n,) fold of each row; two different ones at least, three with a target.
        baselines: name -> factory of further routers to show at the cost weight of `utility`. A factory that is also
            among `routers` is trained once.
        on_progress: called with (trainings done, trainings in all), the first time with none done.

    Raises:
        InvalidOutcomes: folds of a wrong length, or too few.
    """
    checked = _checked(folds, table, 2 if target is None else 3)
    shared = target is None and compose is None
    trained = [*routers.values()] if shared else []
    others = {label: make for label, make in (baselines or {}).items() if not any(make is one for one in trained)}
    count = _Counter(_trainings(len(np.unique(checked)), len(routers), len(others), target), on_progress)
    plan = _Plan(table, checked, Choosing(utility, select, compose), count)
    plain = _Plan(table, checked, Choosing(utility), count)
    runs = {name: plan.run(make, target) for name, make in routers.items()}
    marks = plan.marks()
    run_of = {id(make): runs[name] for name, make in routers.items()}
    for label, make in (baselines or {}).items():
        run = _baseline(label, make, plain) if label in others else run_of[id(make)]
        if run is not None:
            marks[label] = line_of(plan.rows, run.routing)
    last = table.select(plan.folds == plan.names[-1])
    reports = []
    for name, run in runs.items():
        heading = Heading(
            name,
            run.router.kind,
            cost_weights=run.cost_weights,
            target=target,
            solutions=run.solutions,
            top_k=1 if select is None else select.k,
            composition=composition,
            route_ms=route_ms(run.router, last, replace(utility, cost_weight=run.cost_weights[-1]), clock),
            seed=seed,
        )
        reports.append(report(heading, plan.rows, run.routing, marks))
    return reports


class _Counter:
    """Counts trainings aloud."""

    def __init__(self, total: int, tell: Callable[[int, int], None]) -> None:
        self._total, self._tell, self._done = total, tell, 0
        tell(0, total)

    def __call__(self) -> None:
        self._done += 1
        self._tell(self._done, self._total)


def _trainings(n_folds: int, n_routers: int, n_baselines: int, target: Target | None) -> int:
    inner = 0 if target is None else n_folds * (n_folds - 1) // 2
    return n_routers * (n_folds + inner) + n_baselines * n_folds


@dataclass(frozen=True, slots=True)
class _Run:
    """A router over all folds: the rows in the order of the folds, and the router of the last one."""

    router: TrainableRouter
    routing: Routing
    cost_weights: tuple[float, ...]
    solutions: tuple[Solution, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """A table in folds, and how queries are answered."""

    table: OutcomeTable
    folds: NDArray[np.int64]
    choosing: Choosing
    count: _Counter

    @property
    def names(self) -> list[int]:
        return [int(fold) for fold in np.unique(self.folds)]

    @property
    def rows(self) -> OutcomeTable:
        """The table in the order of the folds."""
        return self.table.select(np.argsort(self.folds, kind="stable"))

    def marks(self) -> dict[str, Line]:
        """The marks of all folds; best single and dataset oracle chosen on the rows outside each."""
        parts = [
            marks_of(self.table.select(self.folds == fold), Reference.of(self.table.select(self.folds != fold)))
            for fold in self.names
        ]
        return {label: Line.joined([part[label] for part in parts]) for label in parts[0]}

    def run(self, make: Factory, target: Target | None = None) -> _Run:
        """A router over all folds, each at its own cost weight where there is a target."""
        solutions = {}
        if target is not None:
            for fold, train, routing in inner_routings(make, self.table, self.folds, self.count):
                solutions[fold] = solve_on(routing, train, target)
        utility, parts, cost_weights = self.choosing.utility, [], []
        for fold in self.names:
            router = make().fit(self.table.select(self.folds != fold))
            self.count()
            at = replace(utility, cost_weight=solutions[fold].cost_weight) if target is not None else utility
            parts.append(route(router, self.table.select(self.folds == fold), replace(self.choosing, utility=at)))
            cost_weights.append(at.cost_weight)
        alike = tuple(cost_weights) if target is not None else (utility.cost_weight,)
        return _Run(router, Routing.joined(parts), alike, tuple(solutions.values()))


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


def _checked(folds: NDArray[np.int64], table: OutcomeTable, least: int) -> NDArray[np.int64]:
    if len(folds) != len(table) or len(np.unique(folds)) < least:
        some = {2: "two folds or more", 3: "three folds or more to solve a cost weight inside it"}[least]
        raise InvalidOutcomes(f"cross-validation needs {some}, and one for each of the {len(table)} rows")
    return np.asarray(folds)


def _fitted(label: str, make: Factory, train: OutcomeTable) -> TrainableRouter | None:
    try:
        return make().fit(train)
    except RouterError as error:
        _warn_left_out(label, error)
        return None


def _baseline(label: str, make: Factory, plan: _Plan) -> _Run | None:
    try:
        return plan.run(make)
    except RouterError as error:
        _warn_left_out(label, error)
        return None


def _warn_left_out(label: str, error: RouterError) -> None:
    warnings.warn(f"the baseline {label} is left out: {error}", BaselineLeftOut, stacklevel=4)


def warn_of_overlap(reference: Reference, table: OutcomeTable) -> None:
    """Warn (EvaluatingOnTrainingData) where rows of a table were trained on."""
    seen = int(reference.seen(table.query_ids).sum())
    if seen:
        warnings.warn(
            f"{seen} of {len(table)} queries were trained on: the figures flatter this router. Evaluate on other rows, "
            "or cross-validate (`coe router cv`)",
            EvaluatingOnTrainingData,
            stacklevel=3,
        )

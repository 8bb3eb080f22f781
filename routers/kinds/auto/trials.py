"""Evaluate candidates on inner folds within a time limit: each routes rows that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from routers.errors import RouterError
from routers.evaluation import metrics
from routers.evaluation.recorded_routing import Routing, route
from routers.factory import TrainableRouter, build, reads_text, settings_of
from routers.kinds.auto.candidates import Candidate, ScoreboardRow
from routers.kinds.auto.selection import Trial

if TYPE_CHECKING:
    from routers.encoders.build import Encoder
    from routers.outcomes.table import OutcomeTable


@dataclass(frozen=True, slots=True)
class Deadline:
    """The time limit.

    clock: gives seconds; started: its value at the start; minutes: the limit, `None` for none.
    """

    clock: Callable[[], float]
    started: float
    minutes: float | None

    def problem(self, needed_s: float) -> str | None:
        """Why a step of `needed_s` seconds does not fit; `None` where it does."""
        if self.minutes is None:
            return None
        left = 60 * self.minutes - (self.clock() - self.started)
        if left <= 0:
            return f"the budget of {self.minutes:g} minutes is spent"
        if needed_s > left:
            return f"it would take {needed_s:.0f} s more, and {left:.0f} s of the budget are left"
        return None


@dataclass(frozen=True, slots=True)
class Workshop:
    """Builds candidates.

    encoders: by name, the first one for candidates that name none; defaults: settings for kinds that have them.
    """

    encoders: Mapping[str, Encoder]
    defaults: Mapping[str, Any]

    def encoder_name(self, candidate: Candidate) -> str | None:
        """The encoder of a candidate; `None` where it reads no text."""
        if not reads_text(candidate.kind):
            return None
        return candidate.encoder or next(iter(self.encoders))

    def built(self, candidate: Candidate) -> TrainableRouter:
        """The unfitted router; raises RouterError where its settings cannot be used."""
        known, name = settings_of(candidate.kind), self.encoder_name(candidate)
        settings = {key: value for key, value in self.defaults.items() if key in known} | dict(candidate.settings)
        if name is not None and name not in self.encoders:
            raise RouterError(f"no encoder {name!r} was given; there are: {', '.join(self.encoders)}")
        return build(candidate.kind, None if name is None else self.encoders[name], settings)


def tried(
    candidates: Iterable[Candidate],
    workshop: Workshop,
    table: OutcomeTable,
    folds: NDArray[np.intp],
    deadline: Deadline,
    *,
    seed: int,
) -> Iterator[tuple[ScoreboardRow, Trial | None]]:
    """A row for each candidate, and its trial where all folds were run.

    The first candidate is the baseline: its errors are raised. It ignores the time limit, and so do the candidates
    after it until one is finished: a selection without any would say nothing about the table.

    Args:
        folds: (n,) inner fold of each row.
        seed: of the intervals.
    """
    base: Trial | None = None
    finished = 0
    seconds_of: dict[tuple[str, str | None], float] = {}  # a fold of the last candidate of a kind and encoder
    for candidate in candidates:
        key = candidate.kind, candidate.encoder
        before = deadline.clock()
        limit = deadline if finished > 1 else replace(deadline, minutes=None)
        found = _trial(candidate, workshop, table, folds, limit, seconds_of.get(key, 0.0), required=base is None)
        seconds = deadline.clock() - before
        if isinstance(found, str):
            yield ScoreboardRow(candidate, skipped=found), None
            continue
        base, finished = base or found, finished + 1
        seconds_of[key] = seconds / len(np.unique(folds))
        yield _row(candidate, found, base, seconds, seed), found


def _trial(
    candidate: Candidate,
    workshop: Workshop,
    table: OutcomeTable,
    folds: NDArray[np.intp],
    deadline: Deadline,
    seconds: float,
    *,
    required: bool,
) -> Trial | str:
    """The trial, or why it was not completed.

    seconds: time of a fold of the last candidate of this kind and encoder, 0 for the first.
    """
    quality, won = np.empty(table.scores.shape), np.empty(len(table))
    numbers = np.unique(folds)
    for done, fold in enumerate(numbers):
        problem = deadline.problem((len(numbers) - done) * seconds)
        if problem is not None:
            return problem
        before, outer = deadline.clock(), folds == fold
        try:
            routing = _routed(workshop.built(candidate), table.select(~outer), table.select(outer))
        except RouterError as error:
            if required:
                raise
            return str(error)
        quality[outer] = routing.quality
        won[outer] = metrics.picked(table.scores[outer], routing.picks)
        seconds = deadline.clock() - before
    return Trial(quality, won)


def _routed(router: TrainableRouter, train: OutcomeTable, test: OutcomeTable) -> Routing:
    router.fit(train)
    return route(router, test)


def _row(candidate: Candidate, trial: Trial, base: Trial, seconds: float, seed: int) -> ScoreboardRow:
    low, high = metrics.paired_bootstrap(trial.won, base.won, seed=seed)
    score = float(trial.won.mean())
    return ScoreboardRow(candidate, score, score - float(base.won.mean()), low, high, seconds)

"""Replay: every logged decision is made again, from what it was made from; nothing is left to compare but the result.

With the policies of today, what was asked is routed anew too, which says what a new router would have changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from coe.policy import Policy
from coe.routing import DecisionInputs, Routed, route
from coe.serve.decisions.entry import Entry, decision_document
from registry.store import Snapshot
from routers.base import Estimate, Query, RoutingDecision
from routers.errors import RouterError

_BATCH: Final = 256
"""Queries that are routed anew at once."""
_MOST_DIFFERENCES: Final = 1000
"""Differences that a report holds; more are only counted."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A field of a decision that did not come out as it was logged; both values as in the log."""

    place: str
    id: str
    field: str
    logged: Any
    now: Any


@dataclass(slots=True)
class Replayed:
    """What came of making logged decisions again.

    Attributes:
        repeated: decisions that are identical in every field; differing: those that are not.
        named: requests whose caller named the expert, which is no decision of a policy.
        refused: requests that ended before anybody was chosen.
        differences: field by field, the first thousand.
    """

    entries: int = 0
    repeated: int = 0
    differing: int = 0
    named: int = 0
    refused: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """Make the decision of an entry again."""
        self.entries += 1
        if entry.decision is None:
            self.refused += 1
        elif entry.inputs is None:
            self.named += 1
        elif found := differences(entry, entry.inputs, entry.decision):
            self.differing += 1
            self.differences += found[: _MOST_DIFFERENCES - len(self.differences)]
        else:
            self.repeated += 1


def differences(entry: Entry, inputs: DecisionInputs, logged: RoutingDecision) -> list[Difference]:
    """Each field of the decision that comes out otherwise now."""
    try:
        now = inputs.decide()
    except (RouterError, ValueError) as error:  # ValueError: a seed that NumPy refuses
        return [Difference(entry.place, entry.id, "decision", list(logged.experts), f"{type(error).__name__}: {error}")]
    was, is_ = decision_document(logged), decision_document(now)
    return [
        Difference(entry.place, entry.id, name, was[name], is_[name]) for name in was if _differ(was[name], is_[name])
    ]


@dataclass(slots=True)
class Anew:
    """How a policy of today decides what was asked then.

    Attributes:
        routed: entries of this policy that were routed anew.
        same_choice: those for which the same experts come out, in the same order.
        same_router: those that were decided by the router of today, by its digest.
        nobody: those that nobody may answer today.
        largest_drift: of the estimated quality of any expert that both know; None where there is none.
    """

    routed: int = 0
    same_choice: int = 0
    same_router: int = 0
    nobody: int = 0
    largest_drift: float | None = None


class Rerouter:
    """Routes logged queries anew, many at once. Load times are taken as they were logged.

    Attributes:
        without_text: entries whose text was not logged; unknown_policy: those of policies that are not there today.
    """

    def __init__(self, policies: Mapping[str, Policy], snapshot: Snapshot) -> None:
        self.by_policy: dict[str, Anew] = {}
        self.without_text = self.unknown_policy = 0
        self._policies, self._snapshot = policies, snapshot
        self._waiting: dict[str, list[tuple[Query, DecisionInputs, Entry]]] = {}

    def add(self, entry: Entry) -> None:
        """Take an entry; it is counted when there are enough for a batch, or at `flush`."""
        if entry.inputs is None or entry.policy is None:
            return
        if entry.query is None:
            self.without_text += 1
        elif entry.policy not in self._policies:
            self.unknown_policy += 1
        else:
            waiting = self._waiting.setdefault(entry.policy, [])
            waiting.append((entry.query, entry.inputs, entry))
            if len(waiting) >= _BATCH:
                self._route(entry.policy)

    def flush(self) -> None:
        """Route what waits."""
        for name in list(self._waiting):
            self._route(name)

    def _route(self, name: str) -> None:
        policy, waiting = self._policies[name], self._waiting.pop(name)
        anew = self.by_policy.setdefault(name, Anew())
        outcomes = route([query for query, _, _ in waiting], policy, self._snapshot, {})
        for (_, inputs, entry), outcome in zip(waiting, outcomes, strict=True):
            anew.routed += 1
            anew.same_router += entry.router_digest == policy.router_digest
            if isinstance(outcome, Routed):
                assert outcome.inputs is not None  # a policy decided
                now = replace(outcome.inputs, load_s=inputs.load_s)
                anew.same_choice += entry.decision is not None and _choice(now) == entry.decision.experts
                drifts = [anew.largest_drift, _drift(inputs.estimate, now.estimate)]
                anew.largest_drift = max((drift for drift in drifts if drift is not None), default=None)
            else:
                anew.nobody += 1


def replay(entries: Iterable[Entry], rerouter: Rerouter | None = None) -> Replayed:
    """Make every decision again, one entry at a time; with a rerouter, route what was asked anew."""
    replayed = Replayed()
    for entry in entries:
        replayed.add(entry)
        if rerouter is not None:
            rerouter.add(entry)
    if rerouter is not None:
        rerouter.flush()
    return replayed


def _differ(was: object, now: object) -> bool:
    """As they are written: NaN is NaN, 0.0 is not -0.0."""
    return json.dumps(was) != json.dumps(now)


def _choice(inputs: DecisionInputs) -> tuple[str, ...] | None:
    try:
        return inputs.decide().experts
    except RouterError:  # load times that nobody can have logged; `Replayed` names them
        return None


def _drift(was: Estimate, now: Estimate) -> float | None:
    """The largest change of a quality that is known in both."""
    qualities = dict(zip(now.experts, now.quality[0], strict=True))
    common = [
        (quality, qualities[name])
        for name, quality in zip(was.experts, was.quality[0], strict=True)
        if name in qualities
    ]
    changes = [abs(float(new) - float(old)) for old, new in common if not (np.isnan(old) or np.isnan(new))]
    return max(changes, default=None)

"""Replay: recompute every logged decision from its logged inputs, and compare.

Given the current policies, the logged queries are also routed again, which shows what a new router would change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from coe.policy import Policy
from coe.protocol.decision import decision_document
from coe.routing import DecisionInputs, Routed, route
from coe.serve.decisions.entry import Entry
from coe.tokens import TokenCounter, Tokenizers
from registry.store import Snapshot
from routers.base import Estimate, Query, RoutingDecision
from routers.errors import RouterError

_BATCH: Final = 256
"""Queries routed per batch."""
_MOST_DIFFERENCES: Final = 1000
"""Most differences a report lists; more are only counted."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A field of a decision that differs from the log; both values as in the log."""

    place: str
    id: str
    field: str
    logged: Any
    now: Any


@dataclass(slots=True)
class ReplayReport:
    """The result of recomputing logged decisions.

    Attributes:
        repeated: number of decisions identical in every field; differing: number of the others.
        named: requests whose caller named the expert, so no policy decided.
        refused: requests that ended before a decision.
        differences: field by field, the first thousand.
    """

    entries: int = 0
    repeated: int = 0
    differing: int = 0
    named: int = 0
    refused: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """Recompute the decision of an entry."""
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
    """Each field of the recomputed decision that differs from the log."""
    try:
        now = inputs.decide()
    except (RouterError, ValueError) as error:  # ValueError: a seed that NumPy refuses
        return [Difference(entry.place, entry.id, "decision", list(logged.experts), f"{type(error).__name__}: {error}")]
    was, is_ = decision_document(logged), decision_document(now)
    return [
        Difference(entry.place, entry.id, name, was[name], is_[name]) for name in was if _differ(was[name], is_[name])
    ]


@dataclass(slots=True)
class Rerouted:
    """How a current policy routes the logged queries.

    Attributes:
        routed: number of entries of this policy routed again.
        same_choice: entries with the same experts in the same order.
        same_router: entries decided by the current router, by its digest.
        no_eligible_expert: entries that no expert may answer now.
        largest_drift: largest change in estimated quality of an expert known to both; None if there is none.
    """

    routed: int = 0
    same_choice: int = 0
    same_router: int = 0
    no_eligible_expert: int = 0
    largest_drift: float | None = None


class Rerouter:
    """Routes logged queries again, in batches, with the logged load times.

    Attributes:
        without_text: entries logged without text; unknown_policy: entries of policies that no longer exist.
    """

    def __init__(self, policies: Mapping[str, Policy], snapshot: Snapshot) -> None:
        self.by_policy: dict[str, Rerouted] = {}
        self.without_text = self.unknown_policy = 0
        self._policies, self._snapshot = policies, snapshot
        self._counter = TokenCounter(snapshot, Tokenizers())
        self._waiting: dict[str, list[tuple[Query, DecisionInputs, Entry]]] = {}

    def add(self, entry: Entry) -> None:
        """Queue an entry; a full batch is routed at once, the rest at `flush`."""
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
        """Route the queued entries."""
        for name in list(self._waiting):
            self._route(name)

    def _route(self, name: str) -> None:
        policy, waiting = self._policies[name], self._waiting.pop(name)
        rerouted = self.by_policy.setdefault(name, Rerouted())
        outcomes = route([query for query, _, _ in waiting], policy, self._snapshot, {}, self._counter)
        for (_, inputs, entry), outcome in zip(waiting, outcomes, strict=True):
            rerouted.routed += 1
            rerouted.same_router += entry.router_digest == policy.router_digest
            if isinstance(outcome, Routed):
                assert outcome.inputs is not None  # a policy decided
                now = replace(outcome.inputs, load_s=inputs.load_s)
                if inputs.degraded:  # an overloaded service decided otherwise than the policy does
                    now = replace(now, utility=inputs.utility, select=inputs.select)
                rerouted.same_choice += entry.decision is not None and _choice(now) == entry.decision.experts
                drifts = [rerouted.largest_drift, _drift(inputs.estimate, now.estimate)]
                rerouted.largest_drift = max((drift for drift in drifts if drift is not None), default=None)
            else:
                rerouted.no_eligible_expert += 1


def replay(entries: Iterable[Entry], rerouter: Rerouter | None = None) -> ReplayReport:
    """Recompute every decision, one entry at a time; with a rerouter, also route the queries again."""
    replayed = ReplayReport()
    for entry in entries:
        replayed.add(entry)
        if rerouter is not None:
            rerouter.add(entry)
    if rerouter is not None:
        rerouter.flush()
    return replayed


def _differ(was: object, now: object) -> bool:
    """Equality as written: NaN equals NaN, 0.0 differs from -0.0."""
    return json.dumps(was) != json.dumps(now)


def _choice(inputs: DecisionInputs) -> tuple[str, ...] | None:
    try:
        return inputs.decide().experts
    except RouterError:  # impossible load times; `ReplayReport` lists them
        return None


def _drift(was: Estimate, now: Estimate) -> float | None:
    """The largest change of a quality known to both."""
    qualities = dict(zip(now.experts, now.quality[0], strict=True))
    common = [
        (quality, qualities[name])
        for name, quality in zip(was.experts, was.quality[0], strict=True)
        if name in qualities
    ]
    changes = [abs(float(new) - float(old)) for old, new in common if not (np.isnan(old) or np.isnan(new))]
    return max(changes, default=None)

"""Brown-out: what an overloaded gateway gives up before it answers 429 (`serve.brownout`).

    load ─ next_state ─▶ active? ─▶ policies with one expert each, and a higher cost weight

Whether it is active is a pure function of the state before, the load and the time, with hysteresis: it begins at a
threshold, and ends once the load has been below a part of it for some seconds. What a degraded policy decides with is
in the inputs of its decisions, so the decision log replays them.

The term and the idea: Klein et al., Brownout: Building More Robust Cloud Applications, ICSE 2014.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from coe.compose import Aggregate, Cascade, SelfConsistency, Single, Vote, WeightedVote
from coe.config import BrownoutConfig
from coe.orchestrator import Orchestrator
from coe.policy import Policy
from routers.selectors import Selector, TopK

LOOK_S: Final = 0.2
"""Least seconds between two looks at the predicted waits, which cost more than a request."""
_OF_SEVERAL: Final = (Vote, WeightedVote, Cascade, SelfConsistency, Aggregate)
"""Compositions that call several experts, or one several times, for one answer; others have stages of their own."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Load:
    """The load of a gateway. share: of `serve.max_in_flight`. wait_s: the longest predicted wait for an expert."""

    share: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class BrownoutState:
    """Whether a brown-out is active, and since when the load has been low enough to end it; None: it is not."""

    active: bool = False
    low_since_s: float | None = None


def next_state(state: BrownoutState, load: Load, now_s: float, settings: BrownoutConfig) -> BrownoutState:
    """The state after a look at the load."""
    pairs = [(load.share, settings.in_flight_share), (load.wait_s, settings.wait_s)]
    pressure = max(value / most for value, most in pairs if most is not None)
    if pressure >= 1.0:
        return BrownoutState(active=True)
    if not state.active or pressure >= settings.end_share:
        return replace(state, low_since_s=None)
    since_s = now_s if state.low_since_s is None else state.low_since_s
    return BrownoutState() if now_s - since_s >= settings.end_after_s else BrownoutState(True, since_s)


def degraded(policy: Policy, settings: BrownoutConfig) -> Policy:
    """The policy during a brown-out, which says so in `Policy.degraded`; itself if there is nothing to give up."""
    changes: dict[str, Any] = {}
    given_up = []
    several = isinstance(policy.composition, _OF_SEVERAL)
    if settings.one_expert and (policy.select.k > 1 or several):
        changes["select"] = _one(policy.select)
        if several:
            changes["composition"] = Single()
        given_up.append("one expert is called once")
    if settings.cost_weight is not None and settings.cost_weight > policy.utility.cost_weight:
        changes["least_cost_weight"] = settings.cost_weight
        given_up.append("cheaper experts are preferred")
    if not changes:
        return policy
    return replace(policy, **changes, degraded=f"the service is overloaded: {' and '.join(given_up)}")


class Brownout:
    """The brown-out of one gateway. Use inside one event loop.

    Args:
        settings: None: it never begins.
        wait_s: the longest predicted wait for an expert now.
        clock: monotonic seconds.
    """

    def __init__(
        self, settings: BrownoutConfig | None, *, wait_s: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        self._settings, self._wait_s, self._clock = settings, wait_s, clock
        self._state, self._share = BrownoutState(), 0.0
        self._looked_at, self._seen_s = float("-inf"), 0.0
        self._made: tuple[Orchestrator, Orchestrator] | None = None  # one, and the same with degraded policies

    @property
    def active(self) -> bool:
        """Whether it is active now, also where no request has come since the last look."""
        if self._settings is None or not self._state.active:
            return False
        return next_state(self._state, Load(self._share, self._seen_s), self._clock(), self._settings).active

    @property
    def longest_wait_s(self) -> float:
        """The longest predicted wait, at most `LOOK_S` old."""
        now_s = self._clock()
        if now_s - self._looked_at >= LOOK_S:
            self._looked_at, self._seen_s = now_s, self._wait_s()
        return self._seen_s

    def look(self, share: float) -> None:
        """Look at the load: as requests come, and as they end. share: of `serve.max_in_flight` that is in flight."""
        if self._settings is None:
            return
        before, self._share = self._state, share
        self._state = next_state(before, Load(share, self.longest_wait_s), self._clock(), self._settings)
        if self._state.active != before.active:
            told = "begins" if self._state.active else "ends"
            logger.warning("brown-out %s: %.0f%% in flight, waits up to %.1f s", told, 100 * share, self._seen_s)

    def applied(self, orchestrator: Orchestrator) -> Orchestrator:
        """The orchestrator that routes a request now."""
        if self._settings is None or not self._state.active:
            return orchestrator
        return self._degraded(orchestrator, self._settings)

    def _degraded(self, orchestrator: Orchestrator, settings: BrownoutConfig) -> Orchestrator:
        if self._made is None or self._made[0] is not orchestrator:
            policies = {
                name: degraded(policy, settings) if settings.policies is None or name in settings.policies else policy
                for name, policy in orchestrator.policies.items()
            }
            self._made = orchestrator, orchestrator.with_policies(policies)
        return self._made[1]


def _one(select: Selector) -> Selector:
    """The selector for one expert; a plug-in's without that setting is replaced by the best expert."""
    chosen: Any = select
    return replace(chosen, k=1) if "k" in getattr(chosen, "__dataclass_fields__", {}) else TopK(1)

"""The composition of a decision for the fallback: no expert that the router knows can take the query."""

from __future__ import annotations

from dataclasses import replace

from coe.compose.ballots import give_up
from coe.compose.base import Done, ExpertCall, ExpertCalls, Final
from coe.compose.fallback import FALLBACK
from coe.compose.notes import emptiness
from coe.types import Failure, GenerateRequest
from routers.base import RoutingDecision


class FallbackOnly:
    """Call the fallback, the one expert of the decision; a note says why. Raises its error."""

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The fallback's call, then its answer."""
        [expert] = decision.experts
        outcome = done.get(FALLBACK)
        if outcome is None:
            return ExpertCalls(
                (ExpertCall(FALLBACK, expert, request, request.wants),), last=True, notes=(decision.reason,)
            )
        if isinstance(outcome, Failure):
            raise give_up(decision, done)
        return Final(replace(outcome, notes=(decision.reason, *outcome.notes, *emptiness(outcome))))

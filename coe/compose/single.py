"""`single`: the best expert answers; if it fails, the next one of the decision does."""

from __future__ import annotations

from dataclasses import replace

from coe.compose.base import Done, ExpertCall, ExpertCalls, Final, no_expert
from coe.compose.notes import failures
from coe.errors import InvalidRequest
from coe.types import Answer, Failure, GenerateRequest
from routers.base import RoutingDecision


class Single:
    """Call `decision.experts` one after the other until one answers.

    An InvalidRequest is raised at once: another expert would refuse the request as well.
    """

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The first answer is final; after a failure, the next expert is called."""
        last: Failure | None = None
        for position, expert in enumerate(decision.experts):
            outcome = done.get(str(position))
            if isinstance(outcome, Answer):
                return Final(replace(outcome, notes=failures(done)))
            if outcome is None:
                return ExpertCalls((ExpertCall(str(position), expert, request),), last=True, notes=failures(done))
            last = outcome
            if isinstance(outcome.error, InvalidRequest):
                break
        if last is None:
            raise no_expert(decision)
        raise last.error

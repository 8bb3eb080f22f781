"""`single`: the best expert answers; if it fails, the next one of the decision does."""

from __future__ import annotations

from dataclasses import replace

from coe.compose.ballots import give_up
from coe.compose.base import Done, ExpertCall, ExpertCalls, Final
from coe.compose.notes import emptiness, failures
from coe.errors import Scope
from coe.seam import scope_of
from coe.types import Answer, GenerateRequest
from routers.base import RoutingDecision


class Single:
    """Call `decision.experts` one after the other until one answers.

    An error of scope REQUEST is raised at once: no expert can take the request.
    """

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The first answer is final; after a failure, the next expert is called."""
        for position, expert in enumerate(decision.experts):
            outcome = done.get(str(position))
            if isinstance(outcome, Answer):
                return Final(replace(outcome, notes=(*failures(done), *outcome.notes, *emptiness(outcome))))
            if outcome is None:
                call = ExpertCall(str(position), expert, request, request.wants)
                return ExpertCalls((call,), last=True, notes=failures(done))
            if scope_of(outcome.error) is Scope.REQUEST:
                break
        raise give_up(decision, done)

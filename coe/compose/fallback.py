"""The fallback of a policy: one expert that answers when everything that a composition chose has failed."""

from __future__ import annotations

from dataclasses import replace

from coe.compose.base import Composition, Done, ExpertCall, ExpertCalls, Final
from coe.compose.notes import failures
from coe.errors import CoeError, InvalidRequest
from coe.types import Answer, Failure, GenerateRequest
from routers.base import RoutingDecision

FALLBACK = "fallback"
"""Id of the call that goes to the fallback."""


class WithFallback:
    """`composition`, and behind it one more expert.

    A request that is wrong in itself (InvalidRequest) is refused at once: another expert would not mend it.
    """

    def __init__(self, composition: Composition, expert: str) -> None:
        self.composition, self.expert = composition, expert

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The composition's step; where it gives up, the fallback is asked. Raises the fallback's error."""
        try:
            return self.composition.step(request, decision, done)
        except InvalidRequest:
            raise
        except CoeError:
            outcome = done.get(FALLBACK)
        if isinstance(outcome, Answer):
            return Final(replace(outcome, notes=failures(done)))
        if isinstance(outcome, Failure):
            raise outcome.error
        return ExpertCalls((ExpertCall(FALLBACK, self.expert, request),), last=True, notes=failures(done))

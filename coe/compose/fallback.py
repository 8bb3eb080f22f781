"""The fallback of a policy: one expert that answers if all experts of the composition failed."""

from __future__ import annotations

from dataclasses import replace

from coe.compose.base import Composition, Done, ExpertCall, ExpertCalls, Final
from coe.compose.notes import failures
from coe.errors import CoeError, InvalidRequest
from coe.types import Answer, Failure, GenerateRequest
from routers.base import RoutingDecision

FALLBACK = "fallback"
"""Id of the call to the fallback."""


class WithFallback:
    """`composition`, then one more expert if it fails.

    An InvalidRequest is raised at once: another expert would refuse the request as well.
    """

    def __init__(self, composition: Composition, expert: str) -> None:
        self.composition, self.expert = composition, expert

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The composition's step; a call to the fallback if that raises. Raises the fallback's error."""
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

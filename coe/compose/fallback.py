"""The fallback of a policy: one expert that answers if all experts of the composition failed."""

from __future__ import annotations

from dataclasses import replace

from coe.compose.ballots import give_up
from coe.compose.base import Composition, Done, ExpertCall, ExpertCalls, Final, next_step
from coe.compose.notes import emptiness, failures
from coe.errors import CoeError, CompositionError, Scope
from coe.types import Answer, Failure, GenerateRequest
from routers.base import RoutingDecision

FALLBACK = "fallback"
"""Id of the call to the fallback."""


class WithFallback:
    """`composition`, then one more expert if it fails.

    An error of scope REQUEST is raised at once: no expert can take the request.
    """

    def __init__(self, composition: Composition, expert: str) -> None:
        self.composition, self.expert = composition, expert

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The composition's step; a call to the fallback if that raises. Raises the error of both (`give_up`)."""
        try:
            return next_step(self.composition, request, decision, done)
        except CoeError as error:
            if error.scope is Scope.REQUEST:
                raise
            notes = (*failures(done), *_own(error))
        outcome = done.get(FALLBACK)
        if isinstance(outcome, Answer):
            return Final(replace(outcome, notes=(*notes, *emptiness(outcome))))
        if isinstance(outcome, Failure):
            raise give_up(decision, done)
        return ExpertCalls((ExpertCall(FALLBACK, self.expert, request),), last=True, notes=notes)


def _own(error: CoeError) -> tuple[str, ...]:
    """A note for a composition that failed by itself; the notes of failed experts cover all other errors."""
    return (f"{error.client_text}",) if isinstance(error, CompositionError) else ()

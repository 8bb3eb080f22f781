"""The fallback of a policy: one expert that answers if all experts of the composition failed."""

from __future__ import annotations

from dataclasses import replace

from coe.compose.ballots import give_up
from coe.compose.base import Composition, Done, ExpertCall, ExpertCalls, Final, next_step
from coe.compose.notes import emptiness, failures
from coe.errors import CoeError, CompositionError, Scope
from coe.seam import scope_of
from coe.types import Answer, Failure, GenerateRequest
from routers.base import RoutingDecision

FALLBACK = "fallback"
"""Id of the call to the fallback."""
CHOSEN_SHARE = 0.75
"""Share of a request's deadline by which other experts must have answered, or begun to: the rest is the fallback's."""


class WithFallback:
    """`composition`, then one more expert if it fails.

    An error of scope REQUEST is raised at once: no expert can take the request. So is the composition's error if the
    fallback was called by it with the same request, and failed: only another process could answer that (scope PROCESS).
    """

    def __init__(self, composition: Composition, expert: str) -> None:
        self.composition, self.expert = composition, expert

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The composition's step; a call to the fallback if that raises. Raises the error of both (`give_up`)."""
        try:
            return self._in_time(next_step(self.composition, request, decision, done))
        except CoeError as error:
            if error.scope is Scope.REQUEST or self._has_failed(request, decision, done):
                raise
            notes = (*failures(done), *_own(error))
        outcome = done.get(FALLBACK)
        if isinstance(outcome, Answer):
            return Final(replace(outcome, notes=(*notes, *outcome.notes, *emptiness(outcome))))
        if isinstance(outcome, Failure):
            raise give_up(decision, done)
        return ExpertCalls((ExpertCall(FALLBACK, self.expert, request, request.wants),), last=True, notes=notes)

    def _in_time(self, step: ExpertCalls | Final) -> ExpertCalls | Final:
        """The step, with time left for the fallback, unless it calls nothing else."""
        if isinstance(step, Final) or {call.expert for call in step.calls} == {self.expert}:
            return step
        return replace(step, deadline_share=CHOSEN_SHARE)

    def _has_failed(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> bool:
        """Whether the composition has called the fallback in vain, so that another call would fail too.

        `done` has no requests, so the steps are taken again.
        """
        known: dict[str, Answer | Failure] = {}
        while True:
            try:
                step = next_step(self.composition, request, decision, known)
            except CoeError:
                return False
            if isinstance(step, Final) or any(call.id not in done for call in step.calls):
                return False
            for call in step.calls:
                known[call.id] = outcome = done[call.id]
                if call.expert == self.expert and isinstance(outcome, Failure) and _lasts(outcome, call, request):
                    return True


def _own(error: CoeError) -> tuple[str, ...]:
    """A note for a composition that failed by itself; the notes of failed experts cover all other errors."""
    return (f"{error.client_text}",) if isinstance(error, CompositionError) else ()


def _lasts(failure: Failure, call: ExpertCall, request: GenerateRequest) -> bool:
    """Whether a failure of this call foretells that of a call with the request, whose seed and stream do not matter."""
    if isinstance(failure.error, CoeError) and failure.error.lasting:
        return True
    alike = replace(call.request, seed=request.seed, stream=request.stream) == request and call.wants == request.wants
    return alike and scope_of(failure.error) is not Scope.PROCESS

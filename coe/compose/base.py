"""Composition: what is done with the chosen experts, as a pure step function.

    step(request, decision, {})          -> ExpertCalls: who to ask first
    step(request, decision, {id: ...})   -> ExpertCalls: who to ask next, or Final: the answer

The caller runs the calls and calls again with everything done so far. One form serves three callers: online, the
orchestrator runs the calls side by side and streams the last one; in a batch, calls are grouped by expert; in an
evaluation, `done` is filled from recorded answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from coe.errors import Abstained, CoeError, InvalidRequest
from coe.types import Answer, Failure, GenerateRequest, Wants
from routers.base import RoutingDecision

CallId = str
Done = Mapping[CallId, Answer | Failure]


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """One call to one expert.

    id: unique within the composition of a request. wants: what the call returns; a call that wants something its
    expert's engine cannot produce fails with Unsupported before anything runs.
    """

    id: CallId
    expert: str
    request: GenerateRequest
    wants: Wants = "text"


@dataclass(frozen=True, slots=True)
class ExpertCalls:
    """Questions that may run side by side.

    last: there is one call, and its text is the final text: it may be streamed as it comes. The step after its answer
        is final, with what the request took in all.
    notes: what is known already of how the answer comes about (`Answer.notes`): a stream says it before its text.
    """

    calls: tuple[ExpertCall, ...]
    last: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Final:
    """The composition is done."""

    answer: Answer


class Composition(Protocol):
    """Pure and stateless: everything it knows is in its arguments.

    Raises the error of the last Failure when no expert answered. One that asks others than the decision's experts has
    their names in an attribute `experts` (see `named_experts`).
    """

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """What to do next, given everything done so far."""
        ...


def named_experts(composition: Composition) -> tuple[str, ...]:
    """The experts that a composition calls by name, whomever a decision holds."""
    return tuple(getattr(composition, "experts", None) or ())


def nobody(decision: RoutingDecision) -> CoeError:
    """The error of a decision without experts: the router abstained, or the request leaves nobody."""
    if decision.abstained:
        return Abstained(f"no expert is trusted with this request: {decision.reason}")
    return InvalidRequest(f"no expert may answer this request: {decision.reason}")

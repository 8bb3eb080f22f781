"""Composition: how the chosen experts answer, as a pure step function.

    step(request, decision, {})          -> ExpertCalls: the first calls
    step(request, decision, {id: ...})   -> ExpertCalls: the next calls, or Final: the answer

The caller runs the calls, and steps again with all results so far. One form serves three callers: online, the
orchestrator runs the calls side by side and streams the last one; in a batch, calls are grouped by expert; in an
evaluation, `done` is filled from recorded answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from coe.errors import Abstained, CoeError, CompositionError, Rejected
from coe.seam import is_interrupt, text_of
from coe.types import Answer, Failure, GenerateRequest, Wants
from routers.base import RoutingDecision

CallId = str
Done = Mapping[CallId, Answer | Failure]


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """One call to one expert.

    id: unique within the composition of a request. wants: what the call returns; a call that wants something its
    expert's engine cannot produce fails with Unsupported before anything runs. peers: of a composed expert whose peers
        are called before it (`ExpertSpec.is_staged`), those to call; None calls all.
    """

    id: CallId
    expert: str
    request: GenerateRequest
    wants: Wants = "text"
    peers: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class ExpertCalls:
    """Calls that may run side by side.

    last: the only call, whose text is the final text, so that it may stream. The step after its answer is Final, with
        the usage and cost of the whole request.
    held: the text of the last call is held back while it may be a refusal; if it is one, nothing of it is sent, and the
        next step may return more calls.
    deadline_share: share of the request's deadline, counted from its start, by which the calls must have ended, or
        streamed their first text; what is left is for the calls after them.
    notes: what is known so far of how the answer comes about (`Answer.notes`); a stream sends it before the text.
    """

    calls: tuple[ExpertCall, ...]
    last: bool = False
    held: bool = False
    notes: tuple[str, ...] = ()
    deadline_share: float = 1.0


@dataclass(frozen=True, slots=True)
class Final:
    """The composition is done."""

    answer: Answer


class Composition(Protocol):
    """A pure, stateless function: all it knows is in its arguments.

    Raises the error of the last Failure if no expert answered. A composition that calls experts other than the
    decision's lists their names in an attribute `experts` (see `named_experts`).
    """

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The next calls, or the answer, given all results so far."""
        ...


def next_step(
    composition: Composition, request: GenerateRequest, decision: RoutingDecision, done: Done
) -> ExpertCalls | Final:
    """The composition's step, checked: a composition may come from another package.

    Raises:
        CoeError: what the step raises.
        CompositionError: with the name of the class: another exception that it raises, or a result of a wrong type,
            without a call, or with a call that is done already (such a composition never ends).
    """
    try:
        step: Any = composition.step(request, decision, done)
    except CoeError:
        raise
    except BaseException as error:  # third-party code may raise anything
        if is_interrupt(error):
            raise
        raise _broken(composition, f"raised {type(error).__name__}: {text_of(error)}") from error
    if isinstance(step, Final) and isinstance(step.answer, Answer):
        return step
    if not isinstance(step, ExpertCalls) or not all(isinstance(call, ExpertCall) for call in step.calls):
        raise _broken(composition, f"must return ExpertCalls or Final, not {type(step).__name__}")
    if not step.calls or any(call.id in done for call in step.calls):
        raise _broken(composition, "must return at least one call, and none that is done already")
    if step.last and len(step.calls) != 1:
        raise _broken(composition, f"must return one call with `last`, not {len(step.calls)}")
    return step


def _broken(composition: Composition, what: str) -> CompositionError:
    return CompositionError(f"{_shown(composition)}: `step` {what}", public="the composition of the policy failed")


def _shown(composition: Composition) -> str:
    """The class of a composition, without the wrappers of this package around it."""
    inner: Any = composition
    while type(inner).__module__.startswith("coe.compose.") and hasattr(inner, "composition"):
        inner = inner.composition
    return f"composition {type(inner).__module__}.{type(inner).__qualname__}"


def named_experts(composition: Composition) -> tuple[str, ...]:
    """The experts that a composition calls by name, whatever the decision."""
    return tuple(getattr(composition, "experts", None) or ())


def no_expert(decision: RoutingDecision) -> CoeError:
    """The error for a decision without experts: the router abstained, or the request rules out every expert."""
    if decision.abstained:
        return Abstained(f"the router abstained: {decision.reason}")
    return Rejected(f"no expert can take this request: {decision.reason}")

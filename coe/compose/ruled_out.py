"""Experts that a composition names and a request rules out: they are not called."""

from __future__ import annotations

from collections.abc import Mapping

from coe.compose.base import Composition, Done, ExpertCalls, Final, named_experts, next_step
from coe.compose.fallback import WithFallback
from coe.errors import NotAllowed
from coe.types import Answer, Failure, GenerateRequest
from routers.base import RoutingDecision


class Without:
    """`composition`, for which calls to the experts in `barred` fail without being made.

    barred: expert named by the composition -> why it cannot take the request, such as
        `allowed experts: the caller does not allow it`.
    """

    def __init__(self, composition: Composition, barred: Mapping[str, str]) -> None:
        self.composition, self.barred = composition, dict(barred)

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The composition's step, with its barred calls failed."""
        known: dict[str, Answer | Failure] = dict(done)
        while True:
            following = next_step(self.composition, request, decision, known)
            if isinstance(following, Final):
                return following
            refused = [call for call in following.calls if call.expert in self.barred]
            if not refused:
                return following
            for call in refused:
                known[call.id] = Failure(call.expert, self._error(call.expert))

    def _error(self, expert: str) -> NotAllowed:
        return NotAllowed(f"{expert!r} cannot take this request: {self.barred[expert]}")


def without(composition: Composition, removed: Mapping[str, str]) -> Composition:
    """The composition without calls to ruled-out experts.

    Args:
        removed: expert -> why the request rules it out; only experts that the composition names matter.
    """
    barred = {name: removed[name] for name in named_experts(composition) if name in removed}
    return Without(composition, barred) if barred else composition


def ruled_out(composition: Composition) -> Mapping[str, str]:
    """The `removed` from which `without` builds this composition again; a fallback around it is ignored."""
    inner = composition.composition if isinstance(composition, WithFallback) else composition
    return inner.barred if isinstance(inner, Without) else {}

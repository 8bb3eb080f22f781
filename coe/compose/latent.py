"""`latent`: the chosen experts leave notes of their hidden states, and a composed expert answers with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from coe.compose.base import Done, ExpertCalls, Final, no_expert
from coe.compose.settings import check_name
from coe.compose.single import Single
from coe.types import GenerateRequest
from routers.base import RoutingDecision


@dataclass(frozen=True, slots=True)
class Latent:
    """The decision's experts leave notes, and a composed expert reads them while it answers.

    As `aggregate`, with hidden states or key-value entries in place of texts (docs/latent.md). Of the experts that the
    router chooses, those that are peers of the composed expert are called; without one, its first member answers alone.
    If the composed expert fails, the decision's experts answer, the best one first.

    expert: a composed expert of the architecture `notes` or `cache`.
    """

    expert: str

    def __post_init__(self) -> None:
        check_name("expert", self.expert)

    @property
    def experts(self) -> tuple[str, ...]:
        """The composed expert."""
        return (self.expert,)

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The call to the composed expert, whose peers are the decision's experts; then its answer."""
        if not decision.experts:
            raise no_expert(decision)
        others = tuple(name for name in decision.experts if name != self.expert)
        step = Single().step(request, replace(decision, experts=(self.expert, *others)), done)
        if isinstance(step, ExpertCalls) and step.calls[0].expert == self.expert:
            return replace(step, calls=(replace(step.calls[0], peers=others),))
        return step

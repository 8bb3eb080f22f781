"""Who is called by a method, and what is done with the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from coe.compose import Aggregate, Chain, Composition, Single, Vote
from coe.orchestrator import Orchestrator, Reply
from coe.types import GenerateRequest
from examples.zoo.latent.benches import Bench
from examples.zoo.latent.methods import AGGREGATE, BEST, CHAIN, PRIMARY, ROUTED, VOTE, Method
from examples.zoo.latent.service import COMPOSED, TRAINED
from examples.zoo.two_skills import ROUTED as ROUTER
from examples.zoo.two_skills import given

_ONE: Final = Single()


@dataclass(frozen=True, slots=True)
class Way:
    """Experts that are given and a composition over them; no experts: the policy of the zoo's router."""

    experts: tuple[str, ...] = ()
    composition: Composition = _ONE

    def reply(self, request: GenerateRequest, orchestrator: Orchestrator) -> Reply:
        """The reply to one request, not yet read."""
        if self.experts:
            return orchestrator.reply(request, given(request, self.experts, self.composition))
        return orchestrator.answer(request, model=f"coe/{ROUTER}")


def way_of(method: Method, bench: Bench, *, best: str | None = None) -> Way:
    """How a method answers the queries of a bench.

    Args:
        best: the member with the most right validation answers, for BEST.
    """
    if method.name == ROUTED:
        return Way()
    if method.name == PRIMARY:
        return Way((bench.primary,))
    if method.name == BEST:
        assert best is not None
        return Way((best,))
    if method.name == VOTE:
        return Way(bench.members, Vote())
    if method.name == CHAIN:
        order = (*bench.peers, bench.primary)
        return Way(order, Chain(experts=order))
    if method.shows_answers:
        return Way(bench.peers, Aggregate(bench.primary if method.name == AGGREGATE else TRAINED))
    return Way((COMPOSED if method.preset else TRAINED,), _ONE)

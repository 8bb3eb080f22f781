"""Who is called by a method, and what is done with the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from coe.compose import Aggregate, Chain, Composition, Latent, Single, Vote
from coe.orchestrator import Orchestrator, Reply
from coe.types import GenerateRequest
from examples.zoo.families import Family
from examples.zoo.latent.benches import Bench
from examples.zoo.latent.methods import AGGREGATE, BEST, CHAIN, PRIMARY, ROUTED, VOTE, Method
from examples.zoo.latent.service import COMPOSED, TRAINED
from examples.zoo.two_skills import ROUTED as ROUTER
from examples.zoo.two_skills import given
from registry.spec import STAGED_ARCHITECTURES

_ONE: Final = Single()


@dataclass(frozen=True, slots=True)
class Way:
    """Experts that are given and a composition over them; no experts: the policy of the zoo's router.

    by_family: ways of families that have experts of their own.
    """

    experts: tuple[str, ...] = ()
    composition: Composition = _ONE
    by_family: Mapping[str, Way] = field(default_factory=dict)

    def of(self, family: Family) -> Way:
        """The way of a family."""
        return self.by_family.get(family.name, self)

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
    by_family = {family: _way(method, bench, peers, best) for family, peers in bench.right.items()}
    return replace(_way(method, bench, bench.peers, best), by_family=by_family)


def _way(method: Method, bench: Bench, peers: tuple[str, ...], best: str | None) -> Way:
    if method.name == ROUTED:
        return Way()
    if method.name == PRIMARY:
        return Way((bench.primary,))
    if method.name == BEST:
        assert best is not None
        return Way((best,))
    if method.name == VOTE:
        return Way((bench.primary, *peers), Vote())
    if method.name == CHAIN:
        order = (*peers, bench.primary)
        return Way(order, Chain(experts=order))
    if method.shows_answers:
        return Way(peers, Aggregate(bench.primary if method.name == AGGREGATE else TRAINED))
    if bench.right and method.architecture in STAGED_ARCHITECTURES:
        return Way(peers, Latent(COMPOSED))
    return Way((COMPOSED if method.preset else TRAINED,), _ONE)

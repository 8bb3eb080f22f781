"""Routing: a policy decides for queries, and every decision keeps its inputs.

The decision log stores the inputs (`DecisionInputs`), and `coe replay` decides again from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from coe.compose import Composition, Single, WithFallback, named_experts, without
from coe.engines import capabilities
from coe.errors import InvalidRequest
from coe.policy import Policy
from registry.spec import ExpertSpec
from registry.store import Snapshot
from routers.base import Estimate, Query, RoutingDecision
from routers.constraints import CONTEXT_LENGTH, check, prune
from routers.decision import Utility, decide
from routers.errors import RouterError
from routers.selectors import Selector, TopK


@dataclass(frozen=True, slots=True)
class DecisionInputs:
    """The arguments of `routers.decision.decide` for one query.

    Attributes:
        estimate: one row.
        load_s: seconds to load each expert at that moment; empty if the policy has no latency weight.
        allowed: the experts that satisfy the constraints.
        seed: breaks ties at random; `None` takes the cheaper expert, then the first.
    """

    estimate: Estimate
    utility: Utility
    allowed: frozenset[str]
    select: Selector = field(default_factory=TopK)
    load_s: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None

    def decide(self) -> RoutingDecision:
        """The decision; the same inputs always give the same one."""
        return decide(
            self.estimate,
            utility=self.utility,
            load_s=self.load_s,
            allowed=self.allowed,
            select=self.select,
            rng=None if self.seed is None else np.random.default_rng(self.seed),
        )[0]


@dataclass(frozen=True, slots=True)
class Routed:
    """A query with its decision.

    Attributes:
        policy: the policy that decided; None if the caller named the expert.
        inputs: the inputs of the decision; None if the caller named the expert.
        composition: how the chosen experts answer. Includes the policy's fallback if the caller allows it. An expert
            that the composition names and that cannot take the query is skipped.
    """

    query: Query
    decision: RoutingDecision
    policy: Policy | None
    inputs: DecisionInputs | None
    composition: Composition


def route(
    queries: Sequence[Query], policy: Policy, snapshot: Snapshot, load_s: Mapping[str, float]
) -> list[Routed | RouterError]:
    """The decision for each query, or the error of a query that no expert can take; the others are not affected."""
    outcomes: dict[int, Routed | RouterError] = {}
    engines = capabilities(snapshot.experts)
    answerable: list[tuple[int, Query, frozenset[str]]] = []
    for i, query in enumerate(queries):
        try:
            answerable.append((i, query, prune([query], snapshot.experts, engines=engines)[0]))
        except RouterError as error:
            outcomes[i] = error
    if answerable:
        estimate = policy.router.estimate([query for _, query, _ in answerable])
        inputs = [
            DecisionInputs(
                estimate.row(row), _utility(policy, query), allowed, policy.select, load_s, _seed(policy, query)
            )
            for row, (_, query, allowed) in enumerate(answerable)
        ]
        for (i, query, _), made_from, decided in zip(answerable, inputs, _decide_all(estimate, inputs), strict=True):
            outcomes[i] = (
                decided
                if isinstance(decided, RouterError)
                else Routed(query, decided, policy, made_from, _composition(policy, query, snapshot.experts))
            )
    return [outcomes[i] for i in range(len(queries))]


def bypass(query: Query, expert: str, experts: Mapping[str, ExpertSpec]) -> Routed:
    """The decision for a query whose caller named the expert; nothing is estimated.

    Raises:
        InvalidRequest: `query.allowed` does not contain the expert, or the expert cannot take the query.
    """
    if query.allowed is not None and expert not in query.allowed:
        raise InvalidRequest(f"`model` is {expert!r}, which is not among the allowed experts {sorted(query.allowed)}")
    why = _check(query, experts).get(expert)
    if why is not None and not why.startswith(CONTEXT_LENGTH):  # an estimate; the engine counts exactly
        raise InvalidRequest(f"{expert!r} cannot take this request: {why}")
    decision = RoutingDecision((expert,), (1.0,), (1.0,), confidence=1.0, reason="named by the request")
    return Routed(query, decision, None, None, Single())


def _check(query: Query, experts: Mapping[str, ExpertSpec]) -> Mapping[str, str]:
    """Expert -> why the query rules it out, what its engine cannot do included."""
    return check(query, experts, engines=capabilities(experts)).removed


def _utility(policy: Policy, query: Query) -> Utility:
    return policy.utility if query.cost_weight is None else replace(policy.utility, cost_weight=query.cost_weight)


def _seed(policy: Policy, query: Query) -> int | None:
    """The query's own seed; if it has none and the policy's selector draws, one derived from its text.

    It is logged with the decision, so that a draw replays.
    """
    if query.seed is not None or not policy.select.draws:
        return query.seed
    digest = hashlib.sha256(f"{policy.select}\n{query.text}".encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:6], "big")


def _decide_all(
    estimate: Estimate, inputs: Sequence[DecisionInputs]
) -> list[RoutingDecision] | list[RoutingDecision | RouterError]:
    """All decisions in one call, which is much cheaper; one by one only if that call fails."""
    if all(inputs.seed is None for inputs in inputs):
        try:
            return decide(
                estimate,
                utility=[inputs.utility for inputs in inputs],
                load_s=inputs[0].load_s,
                allowed=[inputs.allowed for inputs in inputs],
                select=inputs[0].select,
            )
        except RouterError:
            pass  # one of them fails; decided one by one, the others do not
    return [_decide(inputs) for inputs in inputs]


def _decide(inputs: DecisionInputs) -> RoutingDecision | RouterError:
    try:
        return inputs.decide()
    except RouterError as error:
        return error


def _composition(policy: Policy, query: Query, experts: Mapping[str, ExpertSpec]) -> Composition:
    """The composition for one query.

    Experts named by a composition obey the same constraints as routed ones. One that cannot take the query is skipped:
    an error would discard the answers of the others. The fallback is not part of the decision. It answers only if every
    chosen expert failed before its first text; a batch runs it as one more stage.
    """
    composition, fallback = policy.composition, policy.fallback
    if named_experts(composition):
        removed = _check(query, experts)
        composition = without(composition, {e: why for e, why in removed.items() if not why.startswith(CONTEXT_LENGTH)})
    if fallback is None or (query.allowed is not None and fallback not in query.allowed):
        return composition
    return WithFallback(composition, fallback)

"""Routing: a policy decides for queries, and every decision keeps its inputs.

The decision log stores the inputs (`DecisionInputs`), and `coe replay` decides again from them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from coe.compose import Composition, FallbackOnly, Single, WithFallback, named_experts, without
from coe.compose.one_answer import as_one_answer
from coe.engines import capabilities
from coe.errors import CoeError, InvalidRequest, RoutingFailed
from coe.policy import Always, Policy
from coe.seam import is_interrupt, text_of
from coe.switching import switches
from coe.tokens import TokenCounter
from registry.spec import ExpertSpec
from registry.store import Snapshot
from routers.base import EMBEDDING, Estimate, Query, RoutingDecision
from routers.constraints import CONTEXT_LENGTH, TOKEN_PROMPTS, Eligible, check, no_eligible
from routers.conversation import Weighed, read
from routers.decision import Switch, Utility, decide, utilities_of
from routers.errors import NoEligibleExpert, RouterError
from routers.selectors import Selector, TopK

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecisionInputs:
    """The arguments of `routers.decision.decide` for one query.

    Attributes:
        estimate: one row.
        load_s: seconds to load each expert at that moment; empty if the policy has no latency weight.
        allowed: the experts that satisfy the constraints.
        seed: breaks ties at random; `None` takes the cheaper expert, then the first.
        prompt_tokens: expert -> tokens of the prompt by its own tokenizer, where the context constraint counted them.
        fallback: the policy's fallback, if it satisfies the constraints and no expert that the router knows does: it is
            the decision.
        why: why no other expert can take the query, if the fallback is the decision.
        turns: the user turns that `estimate` was read from, the oldest first; empty where the router failed.
        degraded: what the policy gave up for an overloaded service (`Policy.degraded`); "": nothing.
        switch: what leaving the expert of the previous turns costs; `None` if there is none, or switches are free.
    """

    estimate: Estimate
    utility: Utility
    allowed: frozenset[str]
    select: Selector = field(default_factory=TopK)
    load_s: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    prompt_tokens: Mapping[str, int] = field(default_factory=dict)
    fallback: str | None = None
    why: str = ""
    turns: tuple[Weighed, ...] = ()
    switch: Switch | None = None
    degraded: str = ""

    def decide(self) -> RoutingDecision:
        """The decision; the same inputs always give the same one."""
        if self.fallback is not None:
            return RoutingDecision((self.fallback,), (1.0,), (0.0,), 0.0, reason=self.why, fallback=True)
        return decide(
            self.estimate,
            utility=self.utility,
            load_s=self.load_s,
            switch=[self.switch],
            allowed=self.allowed,
            select=self.select,
            rng=None if self.seed is None else np.random.default_rng(self.seed),
        )[0]

    def utilities(self) -> Mapping[str, float]:
        """The utility of each expert of the router, by which `decide` ranks; empty if the fallback is the decision."""
        if self.fallback is not None:
            return {}
        [row] = utilities_of(self.estimate, self.utility, self.load_s, [self.switch])
        return dict(zip(self.estimate.experts, row.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Routed:
    """A query with its decision.

    Attributes:
        policy: the policy that decided; None if the caller named the expert.
        inputs: the inputs of the decision; None if the caller named the expert.
        composition: how the chosen experts answer. Includes the policy's fallback if the caller allows it and it can
            take the query. An expert that the composition names and that cannot take the query is skipped.
        eligible: the experts that can take the query, and why the others cannot; None if the caller named the expert.
    """

    query: Query
    decision: RoutingDecision
    policy: Policy | None
    inputs: DecisionInputs | None
    composition: Composition
    eligible: Eligible | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the caller should know of the decision (`Answer.notes`)."""
        return (self.inputs.degraded,) if self.inputs is not None and self.inputs.degraded else ()


def route(
    queries: Sequence[Query],
    policy: Policy,
    snapshot: Snapshot,
    load_s: Mapping[str, float],
    counter: TokenCounter | None = None,
) -> list[Routed | RouterError | CoeError]:
    """The decision for each query, or the error of a query that no expert can take; the others are not affected.

    If the router fails on a query, the policy's fallback answers it.

    Args:
        counter: counts prompt tokens near the limit of a context; `None` leaves those cases to the experts.
    """
    if any(_unreadable(query, policy) for query in queries):
        return _readable_alone(queries, policy, snapshot, load_s, counter)
    engines = capabilities(snapshot.experts)
    found = [
        check(
            query,
            snapshot.experts,
            engines=engines,
            count=counter.of(query) if counter else None,
            drained=snapshot.drained,
        )
        for query in queries
    ]
    outcomes: dict[int, Routed | RouterError | CoeError] = {
        i: no_eligible(query, eligible)
        for i, (query, eligible) in enumerate(zip(queries, found, strict=True))
        if not eligible.experts
    }
    rows = [i for i in range(len(queries)) if i not in outcomes]
    decided = _decided([queries[i] for i in rows], [found[i] for i in rows], policy, snapshot, load_s)
    outcomes |= zip(rows, decided, strict=True)
    return [outcomes[i] for i in range(len(queries))]


def _unreadable(query: Query, policy: Policy) -> bool:
    return TOKEN_PROMPTS in query.needs and not isinstance(policy.router, Always)


def _readable_alone(
    queries: Sequence[Query],
    policy: Policy,
    snapshot: Snapshot,
    load_s: Mapping[str, float],
    counter: TokenCounter | None,
) -> list[Routed | RouterError | CoeError]:
    """Like `route`, with an error in place of each query of token ids: no router can read them."""
    rows = [i for i, query in enumerate(queries) if not _unreadable(query, policy)]
    routed = dict(zip(rows, route([queries[i] for i in rows], policy, snapshot, load_s, counter), strict=True))
    return [routed[i] if i in routed else _ids_refused(query) for i, query in enumerate(queries)]


def _ids_refused(query: Query) -> InvalidRequest:
    where = "input" if query.embeds else "prompt"
    error = InvalidRequest(
        f"{where}: token ids are of one expert's tokenizer, and a router cannot read them: name the expert as `model`, "
        "or send text"
    )
    error.param = where if query.embeds else None  # the caller adds which prompt
    return error


def _decided(
    queries: Sequence[Query],
    found: Sequence[Eligible],
    policy: Policy,
    snapshot: Snapshot,
    load_s: Mapping[str, float],
) -> list[Routed | RouterError | CoeError]:
    """The decisions for queries that some expert can take. If the router fails, each is routed alone."""
    if not queries:
        return []
    try:
        estimate, inputs = _inputs(queries, found, policy, snapshot, load_s)
        decided = _decide_all(estimate, inputs)
    except BaseException as error:  # a router may come from another package
        if is_interrupt(error):
            raise
        if len(queries) > 1:
            pairs = zip(queries, found, strict=True)
            alone = (_decided([query], [one], policy, snapshot, load_s) for query, one in pairs)
            return [outcome for [outcome] in alone]
        return [_without_router(queries[0], found[0], policy, load_s, error)]
    return [_routed(*each[:2], policy, *each[2:]) for each in zip(queries, found, inputs, decided, strict=True)]


def _without_router(
    query: Query, eligible: Eligible, policy: Policy, load_s: Mapping[str, float], error: BaseException
) -> Routed | RouterError | CoeError:
    """The fallback's answer to a query on which the router failed; the error if the fallback cannot take the query."""
    kind = type(error).__name__
    if policy.fallback not in eligible.experts:
        if isinstance(error, RouterError | CoeError):
            return error
        failed = RoutingFailed(f"the router of policy {policy.name!r} failed: {kind}: {text_of(error)}")
        failed.__cause__ = error
        return failed
    known = isinstance(error, RouterError | CoeError)  # its message says it all
    traceback = None if known else error
    logger.error("the router of policy %r failed: %s: %s", policy.name, kind, text_of(error), exc_info=traceback)
    inputs = DecisionInputs(
        Estimate((policy.fallback,), np.zeros((1, 1))),
        policy.utility,
        frozenset({policy.fallback}),
        policy.select,
        load_s,
        fallback=policy.fallback,
        degraded=policy.degraded,
        why=f"the router failed: {kind}; the fallback {policy.fallback} answers",
    )
    return Routed(query, inputs.decide(), policy, inputs, FallbackOnly(), eligible)


def _inputs(
    queries: Sequence[Query],
    found: Sequence[Eligible],
    policy: Policy,
    snapshot: Snapshot,
    load_s: Mapping[str, float],
) -> tuple[Estimate, list[DecisionInputs]]:
    """The estimate of all queries, and the inputs of each decision, which hold its row. The router is called once."""
    seen = read(policy.router, queries, policy.reads)
    estimate = seen.estimate
    utilities = [_utility(policy, query, estimate) for query in queries]
    allowed = [eligible.among(estimate.experts) for eligible in found]
    moved = switches(queries, seen, utilities, allowed, snapshot)
    rows = [
        DecisionInputs(
            estimate.row(row),
            utilities[row],
            allowed[row],
            policy.select,
            load_s,
            _seed(policy, query),
            prompt_tokens=eligible.counted,
            turns=seen.readings[row].turns,
            switch=moved[row],
            degraded=policy.degraded,
        )
        for row, (query, eligible) in enumerate(zip(queries, found, strict=True))
    ]
    return estimate, rows


def _routed(
    query: Query,
    eligible: Eligible,
    policy: Policy,
    inputs: DecisionInputs,
    decided: RoutingDecision | RouterError,
) -> Routed | RouterError:
    """The decision with its composition; that for the fallback if the router knows no expert that can answer."""
    if isinstance(decided, NoEligibleExpert):
        known = [e for e in inputs.estimate.experts if query.allowed is None or e in query.allowed]
        error = decided if not known or eligible.experts & set(known) else no_eligible(query, eligible, known)
        if policy.fallback not in eligible.experts:
            return error
        inputs = replace(inputs, fallback=policy.fallback, why=f"{error}; the fallback {policy.fallback} answers")
        return Routed(query, inputs.decide(), policy, inputs, FallbackOnly(), eligible)
    if isinstance(decided, RouterError):
        return decided
    return Routed(query, decided, policy, inputs, _composition(query, policy, eligible, inputs, decided), eligible)


def bypass(query: Query, expert: str, experts: Mapping[str, ExpertSpec]) -> Routed:
    """The decision for a query whose caller named the expert; nothing is estimated.

    Raises:
        InvalidRequest: `query.allowed` does not contain the expert, or the expert cannot take the query.
    """
    if query.allowed is not None and expert not in query.allowed:
        raise InvalidRequest(f"`model` is {expert!r}, which is not among the allowed experts {sorted(query.allowed)}")
    why = check(query, experts, engines=capabilities(experts)).removed.get(expert)
    if why is not None and not why.startswith(CONTEXT_LENGTH):  # the engine reports all numbers
        hint = "; send texts to /v1/embeddings" if EMBEDDING in experts[expert].capabilities else ""
        raise InvalidRequest(f"{expert!r} cannot take this request: {why}{hint}")
    decision = RoutingDecision((expert,), (1.0,), (1.0,), confidence=1.0, reason="named by the request")
    return Routed(query, decision, None, None, Single())


def _utility(policy: Policy, query: Query, estimate: Estimate) -> Utility:
    weight = policy.utility.cost_weight if query.cost_weight is None else query.cost_weight
    if policy.least_cost_weight and estimate.cost_usd is not None and np.isfinite(estimate.cost_usd).all():
        weight = max(weight, policy.least_cost_weight)
    return policy.utility if weight == policy.utility.cost_weight else replace(policy.utility, cost_weight=weight)


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
                switch=[inputs.switch for inputs in inputs],
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


def _composition(
    query: Query, policy: Policy, eligible: Eligible, inputs: DecisionInputs, decision: RoutingDecision
) -> Composition:
    """The composition for one query.

    Experts named by a composition obey the same constraints as routed ones, except the context length: they may get
    another prompt. One that cannot take the query is skipped: an error would discard the answers of the others. The
    fallback is not part of the decision. It answers only if every chosen expert failed before its first text; a batch
    runs it as one more stage. If there is none, and only the chosen experts can count the prompt, another expert takes
    its place. A request for tool calls or log-probabilities gets the answer of one expert.
    """
    composition, fallback = as_one_answer(policy.composition, query.needs), policy.fallback
    if named_experts(composition):
        removed = {e: why for e, why in eligible.removed.items() if not why.startswith(CONTEXT_LENGTH)}
        composition = without(composition, removed)
    if fallback is None or fallback in eligible.removed:
        fallback = _spare(eligible, inputs, decision)
    return composition if fallback is None else WithFallback(composition, fallback)


def _spare(eligible: Eligible, inputs: DecisionInputs, decision: RoutingDecision) -> str | None:
    """The best expert that surely has room, for a decision whose experts may all find the prompt too long."""
    if not decision.experts or not eligible.unsure.issuperset(decision.experts):
        return None
    sure = inputs.allowed - eligible.unsure
    if sure.isdisjoint(inputs.estimate.experts):
        return None
    second = _decide(replace(inputs, allowed=sure, select=TopK()))
    return second.experts[0] if isinstance(second, RoutingDecision) and second.experts else None

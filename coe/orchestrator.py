"""How a request is answered, end to end: estimate -> decide -> compose.

    orchestrator = Orchestrator(snapshot, policies, ask=host.ask)
    reply = orchestrator.answer(request, model="auto")
    async for chunk in reply.chunks: ...     # reply.decision says who was chosen and why; reply.expert, who answers

`ask` is a local Host, a handle to one elsewhere, or a recording: nothing here knows which.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from coe.compose import Ask, Composition, Final, Single
from coe.errors import CoeError, ConfigError, EngineError, InvalidRequest
from coe.policy import AUTO, Policy, address, bypass, only
from coe.types import Answer, Chunk, Failure, GenerateRequest
from registry.errors import UnknownExpert
from registry.store import Snapshot
from routers.base import Query, RoutingDecision, decide
from routers.constraints import prune

AskExpert = Callable[[str, GenerateRequest], AsyncGenerator[Chunk, None]]


@dataclass(slots=True)
class Reply:
    """A decision, and the chunks of the answer as they come.

    Attributes:
        policy: name of the policy that decided; None when the caller named the expert.
        expert: who answers, from the first chunk on; another than decided when the fallback stepped in.
        answer: the whole answer with its cost, after the last chunk.
    """

    decision: RoutingDecision
    policy: str | None
    chunks: AsyncGenerator[Chunk, None] = field(init=False, repr=False)
    expert: str | None = None
    answer: Answer | None = None

    async def text(self) -> str:
        """Wait for the whole answer."""
        async with aclosing(self.chunks):
            return "".join([chunk.text async for chunk in self.chunks])


class Orchestrator:
    """Routes requests over a snapshot of experts, and composes their answers.

    Args:
        policies: by name; `default_policy` answers `model: "auto"`, `coe/<name>` addresses the others.
        ask: `(expert, request) -> chunks`.
        load_s: expected seconds to load each expert now, asked for by policies with patience.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        policies: Mapping[str, Policy],
        *,
        ask: AskExpert,
        default_policy: str = "default",
        load_s: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.snapshot, self.policies, self.default_policy = snapshot, dict(policies), default_policy
        self._ask, self._load_s = ask, load_s
        for policy in self.policies.values():
            if policy.fallback is not None and policy.fallback not in snapshot.experts:
                raise ConfigError(
                    f"fallback of policy {policy.name!r}: {UnknownExpert(policy.fallback, snapshot.experts)}"
                )

    def route(self, queries: Sequence[Query], model: str = AUTO) -> list[RoutingDecision]:
        """Who answers each query; asks nobody.

        Raises:
            UnknownModel: `model` is neither a policy nor an expert; with close matches.
            NoEligibleExpert: the constraints leave nobody; the message names them.
        """
        policy = address(model, self.policies, self.default_policy, self.snapshot)
        if policy is None:
            return [bypass(query, model) for query in queries]
        return decide(
            policy.router.estimate(queries),
            utility=[policy.utility if q.dial is None else replace(policy.utility, dial=q.dial) for q in queries],
            load_s=self._load_s() if policy.utility.patience else {},
            allowed=prune(queries, self.snapshot.experts),
            k=policy.k,
        )

    def answer(self, request: GenerateRequest, *, model: str = AUTO, query: Query | None = None) -> Reply:
        """Route one request now; it is answered while `chunks` of the reply is iterated.

        `query` carries what a request does not: allowed experts, dial, tools. By default it is the conversation alone.
        """
        return self.answers([request], model=model, queries=None if query is None else [query])[0]

    def answers(
        self, requests: Sequence[GenerateRequest], *, model: str = AUTO, queries: Sequence[Query] | None = None
    ) -> list[Reply]:
        """Route many requests at once, which is much cheaper than one by one; iterate the replies side by side."""
        queries = queries or [_query_of(request) for request in requests]
        policy = address(model, self.policies, self.default_policy, self.snapshot)
        replies = []
        for request, query, decision in zip(requests, queries, self.route(queries, model), strict=True):
            replies.append(reply := Reply(decision, policy.name if policy else None))
            reply.chunks = self._answer(request, reply, policy, query)
        return replies

    async def _answer(
        self, request: GenerateRequest, reply: Reply, policy: Policy | None, query: Query
    ) -> AsyncGenerator[Chunk, None]:
        """The composition's chunks; a failure before the first one is the fallback's to mend, where it may."""
        attempts = [(policy.composition if policy else Single(), reply.decision)]
        fallback = policy.fallback if policy else None
        if fallback and fallback not in reply.decision.experts and (query.allowed is None or fallback in query.allowed):
            attempts.append((Single(), only(fallback, "the chosen experts failed")))
        while attempts:
            composition, decision = attempts.pop(0)
            try:
                async with aclosing(self._compose(composition, request, decision, reply)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except CoeError as error:
                # Nothing may have been streamed, and another expert would not mend a wrong request.
                if not attempts or reply.expert is not None or isinstance(error, InvalidRequest):
                    raise

    async def _compose(
        self, composition: Composition, request: GenerateRequest, decision: RoutingDecision, reply: Reply
    ) -> AsyncGenerator[Chunk, None]:
        """Step until final: asks run side by side, the last one streams."""
        done: dict[str, Answer | Failure] = {}
        while True:
            step = composition.step(request, decision, done)
            if isinstance(step, Final):
                reply.expert, reply.answer = step.answer.expert, step.answer
                yield Chunk(step.answer.text, step.answer.finish_reason, step.answer.usage)
                return
            if not step.last:
                outcomes = await asyncio.gather(*(self._whole(ask) for ask in step.asks))
                done.update(zip((ask.id for ask in step.asks), outcomes, strict=True))
                continue
            [ask] = step.asks
            async with aclosing(self._stream(ask, done)) as chunks:
                async for chunk in chunks:
                    reply.expert = ask.expert
                    yield chunk
            outcome = done[ask.id]
            if isinstance(outcome, Answer):
                reply.answer = outcome
                return
            if reply.expert is not None:  # what a client has seen cannot be taken back
                raise outcome.error

    async def _whole(self, ask: Ask) -> Answer | Failure:
        """The whole answer of an ask whose text is only an ingredient of the final one."""
        done: dict[str, Answer | Failure] = {}
        async with aclosing(self._stream(ask, done)) as chunks:
            async for _ in chunks:
                pass
        return done[ask.id]

    async def _stream(self, ask: Ask, done: dict[str, Answer | Failure]) -> AsyncGenerator[Chunk, None]:
        """Chunks of one ask, and its outcome into `done`."""
        text = ""
        try:
            async with aclosing(self._ask(ask.expert, ask.request)) as chunks:
                async for chunk in chunks:
                    text += chunk.text
                    if chunk.finish_reason is not None:
                        done[ask.id] = self._finished(ask.expert, text, chunk)
                    yield chunk
            if ask.id not in done:
                raise EngineError(f"{ask.expert!r} stopped without finishing its answer")
        except CoeError as error:
            done[ask.id] = Failure(ask.expert, error)

    def _finished(self, expert: str, text: str, last: Chunk) -> Answer:
        assert last.finish_reason is not None and last.usage is not None  # by the contract of Expert.generate
        price = self.snapshot.experts[expert].price
        cost = price.cost_usd(last.usage.prompt_tokens, last.usage.completion_tokens) if price else None
        return Answer(expert, text, last.finish_reason, last.usage, cost)


def _query_of(request: GenerateRequest) -> Query:
    return Query(messages=request.messages) if request.messages else Query.of(request.prompt or "")

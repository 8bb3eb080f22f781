"""How a request is answered, end to end: estimate -> decide -> compose.

    orchestrator = Orchestrator(snapshot, policies, ask=host.ask)
    reply = orchestrator.answer(request, model="auto")
    async for chunk in reply.chunks: ...     # reply.decision says who was chosen and why; reply.expert, who answers

`ask` is a local Host, a handle to one elsewhere, or a recording: nothing here knows which.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from coe.compose import ExpertCall, Final
from coe.errors import CoeError, ConfigError, EngineError
from coe.policy import AUTO, Policy, address
from coe.routing import Routed, bypass, route
from coe.types import Answer, Chunk, Failure, GenerateRequest
from registry.errors import UnknownExpert
from registry.store import Snapshot
from routers.base import Message, Query, RoutingDecision
from routers.errors import RouterError

LEAST_S = 1e-3
"""A deadline that has passed: whoever is asked says so at once."""
AskExpert = Callable[[str, GenerateRequest], AsyncGenerator[Chunk, None]]


@dataclass(slots=True)
class Reply:
    """A decision, and the chunks of the answer as they come.

    Attributes:
        asked: the experts that were asked so far, in order. done: what they answered, by the id of the call.
        notes: what is known so far of how the answer comes about (`Answer.notes`); whole after the last chunk.
        expert: who answers, from the first chunk on; another than decided when the fallback stepped in.
        answer: the whole answer with its cost, after the last chunk.
    """

    routed: Routed
    chunks: AsyncGenerator[Chunk, None] = field(init=False, repr=False)
    expert: str | None = None
    answer: Answer | None = None
    asked: list[str] = field(default_factory=list)
    done: dict[str, Answer | Failure] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def decision(self) -> RoutingDecision:
        """Who was chosen, and why."""
        return self.routed.decision

    @property
    def policy(self) -> str | None:
        """Name of the policy that decided; None when the caller named the expert."""
        return self.routed.policy.name if self.routed.policy else None

    async def text(self) -> str:
        """Wait for the whole answer."""
        async with aclosing(self.chunks):
            return "".join([chunk.text async for chunk in self.chunks])


class Orchestrator:
    """Routes requests over a snapshot of experts, and composes their answers.

    Args:
        policies: by name; `default_policy` answers `model: "auto"`, `coe/<name>` addresses the others.
        ask: `(expert, request) -> chunks`.
        load_s: expected seconds to load each expert now, asked for by policies with latency weight.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        policies: Mapping[str, Policy],
        *,
        ask: AskExpert,
        default_policy: str = "default",
        load_s: Callable[[], Mapping[str, float]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.snapshot, self.policies, self.default_policy = snapshot, dict(policies), default_policy
        self._ask, self._load_s, self._clock = ask, load_s, clock
        for policy in self.policies.values():
            if policy.fallback is not None and policy.fallback not in snapshot.experts:
                raise ConfigError(
                    f"fallback of policy {policy.name!r}: {UnknownExpert(policy.fallback, snapshot.experts)}"
                )

    def route(self, queries: Sequence[Query], model: str = AUTO) -> list[Routed]:
        """Who answers each query; asks nobody.

        Raises:
            UnknownModel: `model` is neither a policy nor an expert; with close matches.
            NoEligibleExpert: the constraints leave nobody; the message names them.
        """
        outcomes = self.route_each(queries, model)
        for outcome in outcomes:
            if not isinstance(outcome, Routed):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, Routed)]

    def route_each(self, queries: Sequence[Query], model: str = AUTO) -> list[Routed | RouterError | CoeError]:
        """Like `route`, with the error in the place of each query that nobody may answer. Raises UnknownModel."""
        policy = address(model, self.policies, self.default_policy, self.snapshot)
        if policy is None:
            return [self._bypass(query, model) for query in queries]
        return [*route(queries, policy, self.snapshot, self._load_s() if policy.utility.latency_weight else {})]

    def answer(self, request: GenerateRequest, *, model: str = AUTO, query: Query | None = None) -> Reply:
        """Route one request now; it is answered while `chunks` of the reply is iterated.

        `query` carries what a request does not: allowed experts, cost weight, tools. By default it is the conversation
        alone.
        """
        return self.answers([request], model=model, queries=None if query is None else [query])[0]

    def answers(
        self, requests: Sequence[GenerateRequest], *, model: str = AUTO, queries: Sequence[Query] | None = None
    ) -> list[Reply]:
        """Route many requests at once, which is much cheaper than one by one; iterate the replies side by side."""
        routed = self.route(queries or [query_of(request) for request in requests], model)
        return [self.reply(*pair) for pair in zip(requests, routed, strict=True)]

    def reply(self, request: GenerateRequest, routed: Routed) -> Reply:
        """The answer to a request that is routed already, while `chunks` is iterated."""
        reply = Reply(routed)
        reply.chunks = self._compose(request, reply)
        return reply

    def _bypass(self, query: Query, expert: str) -> Routed | CoeError:
        try:
            return bypass(query, expert, self.snapshot.experts)
        except CoeError as error:
            return error

    async def _compose(self, request: GenerateRequest, reply: Reply) -> AsyncGenerator[Chunk, None]:
        """Step until final: calls run side by side, the last one streams where somebody reads it as it comes."""
        done, began = reply.done, self._clock()
        while True:
            step = reply.routed.composition.step(request, reply.decision, done)
            if isinstance(step, Final):
                yield _ended(reply, step.answer, step.answer.text)
                return
            reply.asked += [call.expert for call in step.calls]
            reply.notes = step.notes
            if not (step.last and request.stream):
                outcomes = await asyncio.gather(
                    *(self.whole(self._in_time(call, request, began)) for call in step.calls)
                )
                done.update(zip((call.id for call in step.calls), outcomes, strict=True))
                continue
            [call] = step.calls
            async with aclosing(self._stream(self._in_time(call, request, began), done)) as chunks:
                async for chunk in chunks:
                    reply.expert = call.expert
                    if chunk.finish_reason is None:
                        yield chunk
            outcome = done[call.id]
            if isinstance(outcome, Answer):
                final = reply.routed.composition.step(request, reply.decision, done)
                assert isinstance(final, Final)  # by the contract of `ExpertCalls.last`
                yield _ended(reply, final.answer, chunk.text)
                return
            if reply.expert is not None:  # what a client has seen cannot be taken back
                raise outcome.error

    def _in_time(self, call: ExpertCall, request: GenerateRequest, began: float) -> ExpertCall:
        """The call, no longer than what is left of the request's deadline."""
        if request.deadline_s is None:
            return call
        left = max(request.deadline_s - (self._clock() - began), LEAST_S)
        return replace(call, request=replace(call.request, deadline_s=min(call.request.deadline_s or left, left)))

    async def whole(self, call: ExpertCall) -> Answer | Failure:
        """The whole answer of a call that nobody reads as it comes."""
        done: dict[str, Answer | Failure] = {}
        whole = replace(call, request=replace(call.request, stream=False))
        async with aclosing(self._stream(whole, done)) as chunks:
            async for _ in chunks:
                pass
        return done[call.id]

    async def _stream(self, call: ExpertCall, done: dict[str, Answer | Failure]) -> AsyncGenerator[Chunk, None]:
        """Chunks of one call, and its outcome into `done`."""
        text = ""
        try:
            async with aclosing(self._ask(call.expert, replace(call.request, wants=call.wants))) as chunks:
                async for chunk in chunks:
                    text += chunk.text
                    if chunk.finish_reason is not None:
                        done[call.id] = self._finished(call.expert, text, chunk)
                    yield chunk
            if call.id not in done:
                raise EngineError(f"{call.expert!r} stopped without finishing its answer")
        except CoeError as error:
            done[call.id] = Failure(call.expert, error)

    def _finished(self, expert: str, text: str, last: Chunk) -> Answer:
        assert last.finish_reason is not None and last.usage is not None  # by the contract of Expert.generate
        price = self.snapshot.experts[expert].price
        cost = price.cost_usd(last.usage.prompt_tokens, last.usage.completion_tokens) if price else None
        return Answer(expert, text, last.finish_reason, last.usage, cost, last.timing, value=last.value)


def _ended(reply: Reply, answer: Answer, text: str) -> Chunk:
    """The last chunk of a reply, with what is left of its text."""
    reply.expert, reply.answer, reply.notes = answer.expert, answer, answer.notes
    return Chunk(text, answer.finish_reason, answer.usage, answer.timing, answer.cost_usd)


def query_of(request: GenerateRequest) -> Query:
    """What a router sees of a request: the conversation, and the format that is asked for."""
    messages = request.messages or (Message("user", request.prompt or ""),)
    return Query(messages, format=request.format)

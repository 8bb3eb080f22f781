"""How one request is answered, end to end.

    orchestrator = Orchestrator(snapshot, policies, ask=host.ask)
    reply = orchestrator.answer(request, model="auto")      # steps 1 to 4: no expert is called yet
    async for chunk in reply.chunks: ...                    # steps 5 to 8: calls experts, streams the answer

The steps, each with its file (ARCHITECTURE.md uses the same numbers):

    1. `model` names a policy (`auto`, `coe/<policy>`), an expert or an alias      coe/policy.py
    2. constraints remove the experts that cannot take the query, with reasons     routers/constraints.py
    3. the policy's router estimates the quality and cost of the others            routers/kinds/
    4. `decide` ranks them by utility and selects some; `coe/routing.py` keeps     routers/decision.py
       the inputs of the decision, so that it can be logged and replayed
    5. the policy's composition returns the next calls, or the final answer:       coe/compose/
       a pure step function of the results so far
    6. each call goes to `ask`: a host in this process, or a pool of host          coe/host.py,
       processes                                                                   coe/serve/cluster/
    7. the host schedules the call, loads and leases weights, and its engine       coe/scheduler.py, coe/memory/,
       generates                                                                   coe/engines/
    8. results go back to step 5; the last call streams while it is generated
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, field, replace

from coe.chunks import Joined, last_chunk, whole_chunk
from coe.compose import ExpertCall, ExpertCalls, Final, next_step
from coe.compose.deadline import begun_within, left_s, within
from coe.compose.holding import held_back
from coe.compose.one_answer import as_one_echo
from coe.compose.with_peers import with_peers
from coe.errors import CoeError, CompositionError, ConfigError, DeadlineExceeded, EngineError, ExpertDrained
from coe.expert_spans import call_span
from coe.policy import AUTO, Policy, address
from coe.routing import Routed, bypass, route
from coe.seam import expert_error, is_interrupt
from coe.tokens import TokenCounter, Tokenizers
from coe.types import Answer, Chunk, Failure, GenerateRequest
from registry.errors import UnknownExpert
from registry.store import Snapshot
from routers.base import Query, RoutingDecision
from routers.errors import RouterError

AskExpert = Callable[[str, GenerateRequest], AsyncGenerator[Chunk, None]]
"""`(expert, request) -> chunks`. Raises CoeError; other exceptions are translated (`coe.seam`)."""


@dataclass(slots=True)
class Reply:
    """A routed request. Iterating `chunks` calls the experts and fills in the other fields.

    Attributes:
        routed: the decision, with its inputs and its composition.
        chunks: the answer's text as it is generated; the last chunk has the finish reason, usage and cost.
        expert: the expert whose text is sent, known from the first chunk; after a failure it differs from
            `decision.experts[0]`.
        answer: the complete answer with its cost, after the last chunk.
        asked: the experts called so far, in order. done: their results so far, by the id of the call.
        streamed: id of the call whose text is sent as it is generated; None: there is none. earlier_s: seconds until
            that call began, spent by calls of earlier steps.
        notes: what is known so far of how the answer comes about; complete (`Answer.notes`) after the last chunk.
    """

    routed: Routed
    chunks: AsyncGenerator[Chunk, None] = field(init=False, repr=False)
    expert: str | None = None
    answer: Answer | None = None
    asked: list[str] = field(default_factory=list)
    done: dict[str, Answer | Failure] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    streamed: str | None = None
    earlier_s: float = 0.0

    @property
    def decision(self) -> RoutingDecision:
        """The chosen experts, and why they were chosen."""
        return self.routed.decision

    @property
    def policy(self) -> str | None:
        """Name of the policy that decided; None if the request named an expert."""
        return self.routed.policy.name if self.routed.policy else None

    async def text(self) -> str:
        """Run to the end, and return the whole text."""
        async with aclosing(self.chunks):
            return "".join([chunk.text async for chunk in self.chunks])


class Orchestrator:
    """Routes requests over a snapshot of the registry, and runs the composition of each decision.

    Args:
        policies: by name; `default_policy` serves `model: "auto"`, and `coe/<name>` addresses any of them.
        ask: calls one expert: `(expert, request) -> chunks`.
        load_s: expected seconds to load each expert now; read only for policies with a latency weight.
        tokenizers: those of the experts, for the context constraint; kept by the caller across orchestrators.

    Raises:
        ConfigError: the fallback of a policy is not a registered expert.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        policies: Mapping[str, Policy],
        *,
        ask: AskExpert,
        default_policy: str = "default",
        load_s: Callable[[], Mapping[str, float]] = dict,
        tokenizers: Tokenizers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.snapshot, self.policies, self.default_policy = snapshot, dict(policies), default_policy
        self._ask, self._load_s, self._clock = ask, load_s, clock
        self._counter = TokenCounter(snapshot, tokenizers or Tokenizers())
        for policy in self.policies.values():
            if policy.fallback is not None and policy.fallback not in snapshot.experts:
                raise ConfigError(
                    f"fallback of policy {policy.name!r}: {UnknownExpert(policy.fallback, snapshot.experts)}"
                )

    def with_drained(self, drained: Mapping[str, str]) -> Orchestrator:
        """The same with other drained experts: expert -> why it takes no new requests."""
        other = copy(self)
        other.snapshot = self.snapshot.with_drained(drained)
        return other

    def with_policies(self, policies: Mapping[str, Policy]) -> Orchestrator:
        """The same with other policies over the same experts; tokens are counted together."""
        other = copy(self)
        other.policies = dict(policies)
        return other

    def route(self, queries: Sequence[Query], model: str = AUTO) -> list[Routed]:
        """The decision for each query. No expert is called.

        Raises:
            UnknownModel: `model` is neither a policy nor an expert nor an alias of one; with close matches.
            ExpertDrained: it is an expert that takes no new requests.
            NoEligibleExpert: the constraints remove every expert; the message names them.
        """
        outcomes = self.route_each(queries, model)
        for outcome in outcomes:
            if not isinstance(outcome, Routed):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, Routed)]

    def route_each(self, queries: Sequence[Query], model: str = AUTO) -> list[Routed | RouterError | CoeError]:
        """Like `route`, with an error in place of each query that no expert can take. Raises UnknownModel."""
        model = self.snapshot.resolve(model)
        policy = address(model, self.policies, self.default_policy, self.snapshot.experts)
        if policy is None:
            return [self._bypass(query, model) for query in queries]
        load_s = self._load_s() if policy.utility.latency_weight else {}
        return [*route(queries, policy, self.snapshot, load_s, self._counter)]

    def may_count(self, query: Query) -> bool:
        """Whether routing may count tokens of this query, or read many texts, so that it should not run on an event
        loop."""
        return (query.embeds and len(query.messages) > 1) or self._counter.may_count(query)

    def answer(self, request: GenerateRequest, *, model: str = AUTO, query: Query | None = None) -> Reply:
        """Route one request now; iterate `chunks` of the reply for the answer.

        Args:
            query: adds what a request does not carry: allowed experts, cost weight, tools. By default the query is the
                conversation alone.

        Raises:
            UnknownModel, NoEligibleExpert: like `route`. Errors of experts are raised while `chunks` is iterated.
        """
        return self.answers([request], model=model, queries=None if query is None else [query])[0]

    def answers(
        self, requests: Sequence[GenerateRequest], *, model: str = AUTO, queries: Sequence[Query] | None = None
    ) -> list[Reply]:
        """Route many requests in one call; iterate the replies side by side.

        One call encodes them as one batch. Encoded one by one beside an engine that generates, two thread pools compete
        for the same cores: nearly three times the CPU time on two cores.
        """
        routed = self.route(queries or [query_of(request) for request in requests], model)
        return [self.reply(*pair) for pair in zip(requests, routed, strict=True)]

    def reply(self, request: GenerateRequest, routed: Routed) -> Reply:
        """The reply to a request that is already routed."""
        composition = as_one_echo(routed.composition) if request.echo else routed.composition
        composition = with_peers(composition, self.snapshot.experts)
        if composition is not routed.composition:
            routed = replace(routed, composition=composition)
        reply = Reply(routed)
        reply.chunks = self._compose(request, reply)
        return reply

    async def whole(self, call: ExpertCall) -> Answer | Failure:
        """The complete result of one call, without streaming."""
        done: dict[str, Answer | Failure] = {}
        if call.request.stream:
            call = replace(call, request=replace(call.request, stream=False))
        async with aclosing(self._stream(call, done)) as chunks:
            async for _ in chunks:
                pass
        return done[call.id]

    def _bypass(self, query: Query, expert: str) -> Routed | CoeError:
        try:
            if expert in self.snapshot.drained:
                raise ExpertDrained(expert, self.snapshot.drained[expert])
            return bypass(query, expert, self.snapshot.experts)
        except CoeError as error:
            return error

    async def _compose(self, request: GenerateRequest, reply: Reply) -> AsyncGenerator[Chunk, None]:
        """Step until the answer is final. Calls of a step run side by side; the last one streams if the request does.

        After a streamed call one more step computes total usage, cost and notes; it must return Final. A batch takes
        the same last step.
        """
        done, began = reply.done, self._clock()
        while True:
            step = next_step(reply.routed.composition, request, reply.decision, done)
            if isinstance(step, Final):
                yield whole_chunk(_end(reply, step.answer))
                return
            reply.asked += [call.expert for call in step.calls]
            reply.notes = (*reply.routed.notes, *step.notes)
            if not (step.last and request.stream):
                seconds = left_s(request, self._clock() - began, step.deadline_share)
                outcomes = await asyncio.gather(*(self.whole(within(call, seconds)) for call in step.calls))
                done.update(zip((call.id for call in step.calls), outcomes, strict=True))
                continue
            [call] = step.calls
            reply.streamed, reply.earlier_s = call.id, self._clock() - began
            async with aclosing(self._shown(step, request, reply.earlier_s, done)) as chunks:
                async for chunk in chunks:
                    reply.expert = call.expert
                    if chunk.finish_reason is None:
                        yield chunk
            outcome = done[call.id]
            if step.held and reply.expert is None:
                continue  # it refused, or failed: nothing is sent
            if isinstance(outcome, Answer):
                final = next_step(reply.routed.composition, request, reply.decision, done)
                if not isinstance(final, Final):
                    raise CompositionError(
                        "the composition returned more calls after its last one (see `ExpertCalls.last`)"
                    )
                yield last_chunk(chunk, _end(reply, final.answer))
                return
            if reply.expert is not None:  # the client has seen text, which cannot be taken back
                raise outcome.error

    def _shown(
        self, step: ExpertCalls, request: GenerateRequest, elapsed_s: float, done: dict[str, Answer | Failure]
    ) -> AsyncGenerator[Chunk, None]:
        """What a client gets of the last call: nothing if it refuses (`held`) or is late (`deadline_share`)."""
        [call] = step.calls
        stream = self._stream(within(call, left_s(request, elapsed_s)), done)
        chunks = held_back(stream) if step.held else stream
        begin_s = left_s(request, elapsed_s, step.deadline_share)
        if begin_s is None or step.deadline_share >= 1:
            return chunks

        def late() -> None:
            done[call.id] = Failure(call.expert, DeadlineExceeded(f"{call.expert!r} sent nothing within {begin_s:g} s"))

        return begun_within(chunks, begin_s, late)

    async def _stream(self, call: ExpertCall, done: dict[str, Answer | Failure]) -> AsyncGenerator[Chunk, None]:
        """The chunks of one call; its result goes into `done`, an error as a Failure."""
        joined, request = Joined(), call.request
        if request.wants != call.wants:
            request = replace(request, wants=call.wants)
        span = call_span(self.snapshot.experts, call.expert, call.id, request)
        if span is not None:
            request = span.request
        try:
            async with aclosing(self._ask(call.expert, request)) as chunks:
                async for chunk in chunks:
                    joined.add(chunk)
                    if span is not None:
                        span.saw(chunk)
                    if chunk.finish_reason is not None:
                        done[call.id] = joined.answer(call.expert, chunk, self._cost_usd(call.expert, chunk))
                    yield chunk
            if call.id not in done:
                raise EngineError(f"{call.expert!r} stopped without finishing its answer")
        except BaseException as error:
            if span is not None:
                span.failed(error)
            if is_interrupt(error):
                raise
            done[call.id] = Failure(call.expert, expert_error(call.expert, error))
        finally:
            if span is not None:
                span.end()

    def _cost_usd(self, expert: str, last: Chunk) -> float | None:
        price, usage = self.snapshot.experts[expert].price, last.usage
        assert usage is not None  # by the contract of Expert.generate
        return price.cost_usd(usage.prompt_tokens, usage.completion_tokens) if price else None


def _end(reply: Reply, answer: Answer) -> Answer:
    """Note the final answer, with the notes of its decision."""
    if reply.routed.notes:
        answer = replace(answer, notes=(*reply.routed.notes, *answer.notes))
    reply.expert, reply.answer, reply.notes = answer.expert, answer, answer.notes
    return answer


def query_of(request: GenerateRequest) -> Query:
    """What a router sees of a request: the conversation, tools, the limit of the answer, the capabilities it needs."""
    return Query(
        request.read,
        tools=request.offered,
        format=request.format,
        max_tokens=request.max_tokens,
        raw=request.prompt is not None,
        needs=request.needs,
    )

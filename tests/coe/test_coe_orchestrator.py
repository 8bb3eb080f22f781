"""How a request is answered: the chosen expert, the stream, and the fallback when an expert fails."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from coe.compose import Composition, ExpertCall, ExpertCalls, Final, Single, Vote, build_composition
from coe.compose.base import Done
from coe.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    Rejected,
    UnknownModel,
    Unsupported,
)
from coe.orchestrator import Orchestrator
from coe.policy import Policy
from coe.types import Answer, Chunk, Failure, GenerateRequest, Usage
from registry.spec import ExpertSpec, Kind, Price
from registry.store import Snapshot
from routers.base import Estimate, Message, Query, RoutingDecision
from routers.decision import Utility
from routers.errors import NoEligibleExpert
from routers.selectors import TopK

SPECS = [
    ExpertSpec(
        name="cheap", kind=Kind.MODEL, source="fake://echo", price=Price(input_usd_per_mtok=1, output_usd_per_mtok=2)
    ),
    ExpertSpec(name="good", kind=Kind.MODEL, source="fake://echo"),
    ExpertSpec(name="general", kind=Kind.MODEL, source="fake://echo"),
]
SNAPSHOT = Snapshot(version=1, experts={spec.name: spec for spec in SPECS})


@dataclass
class Table:
    """A router with a given estimate."""

    quality: Mapping[str, float] = field(default_factory=lambda: {"cheap": 0.5, "good": 0.9, "general": 0.1})
    cost: Mapping[str, float] = field(default_factory=lambda: {"cheap": 0.0, "good": 1.0, "general": 0.5})
    requires: frozenset[str] = frozenset()

    def estimate(self, queries: object) -> Estimate:
        n = len(queries)  # type: ignore[arg-type]
        rows = np.tile(list(self.quality.values()), (n, 1))
        return Estimate(tuple(self.quality), rows, cost_usd=np.tile(list(self.cost.values()), (n, 1)))


class Backend:
    """An `ask` that answers with the expert's name, word by word, or fails as configured."""

    def __init__(
        self, fail: Mapping[str, BaseException] | None = None, fail_late: Mapping[str, Exception] | None = None
    ):
        self.fail, self.fail_late = dict(fail or {}), dict(fail_late or {})
        self.asked: list[str] = []
        self.closed: list[str] = []

    async def __call__(self, expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.asked.append(expert)
        try:
            if expert in self.fail:
                raise self.fail[expert]
            yield Chunk(f"{expert} ")
            await asyncio.sleep(0)
            if expert in self.fail_late:
                raise self.fail_late[expert]
            yield Chunk("says hi", "stop", Usage(10, 3))
        finally:
            self.closed.append(expert)


def orchestrator(backend: Backend, **policies: Policy) -> Orchestrator:
    return Orchestrator(SNAPSHOT, policies or {"default": Policy("default", Table())}, ask=backend)


REQUEST = GenerateRequest(messages=(Message("user", "hi"),))


async def test_auto_asks_the_best_expert_and_streams_it() -> None:
    backend = Backend()
    reply = orchestrator(backend).answer(REQUEST)
    assert reply.decision.experts == ("good",) and backend.asked == []
    assert [chunk.text async for chunk in reply.chunks] == ["good ", "says hi"]
    assert reply.expert == "good" and reply.policy == "default"
    assert reply.answer is not None and reply.answer.text == "good says hi" and reply.answer.cost_usd is None


async def test_a_cascade_sends_nothing_of_a_refusal_and_calls_the_others() -> None:
    says = {"good": "I don't know.", "cheap": "Paris", "general": "Rome"}

    async def ask(expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        for word in says[expert].split(" ")[:-1]:
            yield Chunk(f"{word} ")
        yield Chunk(says[expert].split(" ")[-1], "stop", Usage(10, 3))

    policy = Policy("default", Table(), select=TopK(3), composition=build_composition("cascade", {"confidence": 0.9}))
    for stream in (True, False):
        reply = Orchestrator(SNAPSHOT, {"default": policy}, ask=ask).answer(replace(REQUEST, stream=stream))
        assert await reply.text() == "Paris"
        assert reply.asked[0] == "good" and reply.expert == "cheap"
        assert reply.notes == ("good gave no answer (refusal)",)
    says["good"] = "I believe it is Lyon."
    reply = Orchestrator(SNAPSHOT, {"default": policy}, ask=ask).answer(replace(REQUEST, stream=True))
    assert [chunk.text async for chunk in reply.chunks] == ["I ", "believe ", "it ", "is ", "Lyon."]
    assert reply.asked == ["good"]


async def test_the_answer_carries_its_cost_where_the_price_is_known() -> None:
    reply = orchestrator(Backend()).answer(REQUEST, model="cheap")
    assert await reply.text() == "cheap says hi"
    assert reply.answer is not None and reply.answer.cost_usd == pytest.approx((10 * 1 + 3 * 2) / 1e6)
    assert reply.policy is None and reply.decision.reason == "named by the request"


async def test_a_requests_own_cost_weight_and_allowed_experts_override_the_policy() -> None:
    system = orchestrator(Backend())
    weighted = Query.of("hi", cost_weight=1.0)
    only = Query.of("hi", allowed=frozenset({"general"}))
    assert [r.decision.experts for r in system.route([weighted, only, Query.of("hi")])] == [
        ("cheap",),
        ("general",),
        ("good",),
    ]


async def test_latency_weight_prices_the_time_to_load() -> None:
    policy = Policy("default", Table(), utility=Utility(latency_weight=0.1))
    system = Orchestrator(SNAPSHOT, {"default": policy}, ask=Backend(), load_s=lambda: {"good": 5.0})
    assert system.route([Query.of("hi")])[0].decision.experts == ("cheap",)


async def test_named_policies_are_addressed_by_name() -> None:
    frugal = Policy("frugal", Table(), utility=Utility(cost_weight=1.0))
    system = orchestrator(Backend(), default=Policy("default", Table()), frugal=frugal)
    assert system.answer(REQUEST, model="coe/frugal").decision.experts == ("cheap",)


@pytest.mark.parametrize(
    ("model", "message"),
    [("godo", "did you mean 'good'"), ("coe/defualt", "did you mean 'default'"), ("nothing-like-it", "is not in")],
)
async def test_an_unknown_model_is_refused_with_a_suggestion(model: str, message: str) -> None:
    with pytest.raises(UnknownModel, match=message):
        orchestrator(Backend()).answer(REQUEST, model=model)


async def test_naming_an_expert_that_is_not_allowed_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not among the allowed"):
        orchestrator(Backend()).answer(REQUEST, model="good", query=Query.of("hi", allowed=frozenset({"cheap"})))


async def test_no_expert_left_names_the_constraint() -> None:
    with pytest.raises(NoEligibleExpert, match="tools"):
        orchestrator(Backend()).route([Query.of("hi", tools=({"type": "function"},))])


async def test_a_failure_before_the_first_chunk_is_mended_by_the_next_expert_and_then_the_fallback() -> None:
    backend = Backend(fail={"good": EngineError("down"), "cheap": EngineError("down too")})
    reply = orchestrator(backend, default=Policy("default", Table(), select=TopK(2), fallback="general")).answer(
        REQUEST
    )
    assert await reply.text() == "general says hi"
    assert backend.asked == reply.asked == ["good", "cheap", "general"]
    assert reply.decision.experts == ("good", "cheap") and reply.expert == "general"


async def test_without_a_fallback_the_last_failure_is_raised() -> None:
    backend = Backend(fail={"good": EngineError("down")})
    with pytest.raises(EngineError, match="down"):
        await orchestrator(backend).answer(REQUEST).text()


async def test_a_failing_fallback_raises_its_own_error() -> None:
    backend = Backend(fail={"good": EngineError("down"), "general": EngineError("also down")})
    with pytest.raises(EngineError, match="also down"):
        await orchestrator(backend, default=Policy("default", Table(), fallback="general")).answer(REQUEST).text()


async def test_a_fallback_that_the_caller_did_not_allow_stays_out() -> None:
    backend = Backend(fail={"good": EngineError("down")})
    system = orchestrator(backend, default=Policy("default", Table(), fallback="general"))
    with pytest.raises(EngineError, match="down"):
        await system.answer(REQUEST, query=Query.of("hi", allowed=frozenset({"good"}))).text()
    assert backend.asked == ["good"]


async def test_a_failure_after_the_first_chunk_is_raised_what_was_streamed_stays() -> None:
    backend = Backend(fail_late={"good": EngineError("died")})
    reply = orchestrator(backend, default=Policy("default", Table(), select=TopK(2), fallback="general")).answer(
        REQUEST
    )
    seen = []
    with pytest.raises(EngineError, match="died"):
        async for chunk in reply.chunks:
            seen.append(chunk.text)  # chunks before the error count  # noqa: PERF401
    assert seen == ["good "] and backend.asked == ["good"]


def too_long(expert: str, context: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(expert, prompt_tokens=900, max_tokens=200, context_length=context)


@pytest.mark.parametrize("error", [too_long("good", 1000), Rejected("a filter"), InvalidRequest("raised by an engine")])
@pytest.mark.parametrize("stream", [True, False])
async def test_what_one_expert_rejects_another_may_answer(error: Exception, stream: bool) -> None:
    backend = Backend(fail={"good": error, "cheap": error})
    system = orchestrator(backend, default=Policy("default", Table(), select=TopK(2), fallback="general"))
    reply = system.answer(replace(REQUEST, stream=stream))
    assert await reply.text() == "general says hi"
    assert backend.asked == ["good", "cheap", "general"]
    assert reply.notes[0].startswith("good failed: ") and reply.notes[1].startswith("cheap failed: ")


async def test_what_every_expert_rejects_is_the_fault_of_the_request() -> None:
    backend = Backend(fail={name: too_long(name, 1000 + len(name)) for name in ("good", "cheap", "general")})
    system = orchestrator(backend, default=Policy("default", Table(), select=TopK(2), fallback="general"))
    with pytest.raises(ContextLengthExceeded, match=r"900 tokens and max_tokens is 200.*'general'.*1007"):
        await system.answer(REQUEST).text()
    assert backend.asked == ["good", "cheap", "general"]
    backend.fail["cheap"] = EngineError("down")  # and might have taken it
    with pytest.raises(EngineError, match="down"):
        await system.answer(REQUEST).text()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        MemoryError(),
        RecursionError("deep"),
        StopIteration(3),
        SystemExit(2),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_any_exception_of_an_expert_is_answered_by_the_fallback(error: BaseException) -> None:
    backend = Backend(fail={"good": error})
    reply = orchestrator(backend, default=Policy("default", Table(), fallback="general")).answer(REQUEST)
    assert await reply.text() == "general says hi"
    assert reply.notes[0].startswith("good failed: ") and "a bug" not in reply.notes[0]
    with pytest.raises(EngineError, match="'good' failed: "):
        await orchestrator(backend).answer(REQUEST, model="good").text()


async def test_closing_the_reply_closes_the_expert() -> None:
    backend = Backend()
    reply = orchestrator(backend).answer(REQUEST)
    await anext(reply.chunks)
    await reply.chunks.aclose()
    assert backend.closed == ["good"]


async def test_a_stream_that_ends_without_an_end_is_an_error_not_an_answer() -> None:
    async def cut(expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk("half")

    system = Orchestrator(SNAPSHOT, {"default": Policy("default", Table())}, ask=cut)
    with pytest.raises(EngineError, match="without finishing"):
        await system.answer(REQUEST).text()


async def test_a_composition_of_several_asks_them_side_by_side_and_gives_the_final_answer() -> None:
    class Join:
        def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
            if len(done) < 2:
                return ExpertCalls(tuple(ExpertCall(name, name, request) for name in ("cheap", "good")))
            texts = [a.text if isinstance(a, Answer) else f"<{a.error}>" for a in done.values()]
            return Final(Answer("joined", " | ".join(texts), "stop", Usage(1, 1)))

    backend = Backend(fail={"cheap": EngineError("down")})
    reply = orchestrator(backend, default=Policy("default", Table(), composition=Join())).answer(REQUEST)
    assert await reply.text() == "<down> | good says hi"
    assert reply.expert == "joined"


class Draft:
    """A draft by `cheap`, finished by `good`, whose text streams; the usage of both is added up."""

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        if "draft" not in done:
            return ExpertCalls((ExpertCall("draft", "cheap", request),))
        if (last := done.get("last")) is None:
            return ExpertCalls((ExpertCall("last", "good", request),), last=True)
        assert isinstance(last, Answer)
        first = done["draft"]
        tokens = last.usage.completion_tokens + (first.usage.completion_tokens if isinstance(first, Answer) else 0)
        note = () if isinstance(first, Answer) else (f"{first.expert} failed",)
        return Final(replace(last, usage=Usage(last.usage.prompt_tokens, tokens), notes=note))


async def test_what_streams_last_ends_with_what_the_whole_request_took() -> None:
    backend = Backend()
    reply = orchestrator(backend, default=Policy("default", Table(), composition=Draft())).answer(REQUEST)
    chunks = [chunk async for chunk in reply.chunks]
    assert "".join(chunk.text for chunk in chunks) == "good says hi" and len(chunks) > 1
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert reply.answer is not None and chunks[-1].usage == reply.answer.usage
    draft, last = reply.done["draft"], reply.done["last"]
    assert isinstance(draft, Answer) and isinstance(last, Answer) and draft.text == "cheap says hi"
    assert reply.answer.usage.completion_tokens == draft.usage.completion_tokens + last.usage.completion_tokens
    assert reply.asked == ["cheap", "good"] and reply.expert == "good"


async def test_an_answer_notes_who_failed_on_the_way() -> None:
    backend = Backend(fail={"cheap": EngineError("down")})
    reply = orchestrator(backend, default=Policy("default", Table(), composition=Draft())).answer(REQUEST)
    assert await reply.text() == "good says hi"
    assert reply.answer is not None and reply.answer.notes == ("cheap failed",)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("failing", "empty"), [({}, "good"), ({"good": EngineError("down")}, "general")])
async def test_an_empty_answer_is_noted(failing: dict[str, BaseException], empty: str, stream: bool) -> None:
    async def ask(expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        if expert in failing:
            raise failing[expert]
        yield Chunk(" ", "stop", Usage(10, 1))

    failed = tuple(f"{name} failed: EngineError: {error}" for name, error in failing.items())
    policy = Policy("default", Table(), fallback="general")
    reply = Orchestrator(SNAPSHOT, {"default": policy}, ask=ask).answer(replace(REQUEST, stream=stream))
    assert await reply.text() == " "
    assert reply.answer is not None and reply.notes == reply.answer.notes
    assert reply.notes == (*failed, f"{empty} gave an empty answer")


async def test_each_call_gets_the_rest_of_the_deadline() -> None:
    now, deadlines = [100.0], []

    async def slow(expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        deadlines.append(request.deadline_s)
        now[0] += 4.0
        yield Chunk("x", "stop", Usage(1, 1))

    policies = {"default": Policy("default", Table(), composition=Draft())}
    system = Orchestrator(SNAPSHOT, policies, ask=slow, clock=lambda: now[0])
    await system.answer(replace(REQUEST, deadline_s=10.0)).text()
    assert deadlines == [10.0, 6.0]
    await system.answer(replace(REQUEST, deadline_s=3.0)).text()
    assert deadlines[2:] == [3.0, pytest.approx(1e-3)]  # too late: every call fails with that


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_with_echo_is_that_of_one_expert(stream: bool) -> None:
    backend = Backend()
    policy = Policy("default", Table(), select=TopK(2), composition=Vote(), fallback="general")
    asked = GenerateRequest(prompt="hi", echo=True, stream=stream)
    reply = orchestrator(backend, default=policy).answer(asked)
    assert await reply.text() == "good says hi" and backend.asked == ["good"]
    assert "combines texts, not echo" in reply.notes[0]


async def test_many_requests_are_routed_in_one_batch_and_answered_side_by_side() -> None:
    sizes: list[int] = []

    class Counting(Table):
        def estimate(self, queries: object) -> Estimate:
            sizes.append(len(queries))  # type: ignore[arg-type]
            return super().estimate(queries)

    backend = Backend()
    system = orchestrator(backend, default=Policy("default", Counting()))
    replies = system.answers([REQUEST] * 5)
    assert sizes == [5] and backend.asked == []
    assert await asyncio.gather(*(reply.text() for reply in replies)) == ["good says hi"] * 5


async def test_raw_prompts_are_routed_by_their_text() -> None:
    reply = orchestrator(Backend()).answer(GenerateRequest(prompt="once upon"))
    assert reply.decision.experts == ("good",)


def test_a_fallback_that_is_not_registered_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="fallback of policy 'default'.*did you mean 'general'"):
        orchestrator(Backend(), default=Policy("default", Table(), fallback="generel"))


def test_single_without_experts_says_why() -> None:
    nobody = RoutingDecision((), (), (), 0.0, reason="nobody is there")
    with pytest.raises(InvalidRequest, match="nobody is there"):
        Single().step(REQUEST, nobody, {})


def test_single_is_pure_the_same_arguments_give_the_same_step() -> None:
    decision = RoutingDecision(("a", "b"), (0.5, 0.5), (1.0, 1.0), 1.0)
    step: Callable[[Done], ExpertCalls | Final] = lambda done: Single().step(REQUEST, decision, done)  # noqa: E731
    assert step({}) == step({}) == ExpertCalls((ExpertCall("0", "a", REQUEST),), last=True)
    assert step({"0": Failure("a", EngineError("x"))}) == ExpertCalls(
        (ExpertCall("1", "b", REQUEST),), last=True, notes=("a failed: EngineError: x",)
    )


def test_an_unknown_composition_lists_those_that_exist() -> None:
    composition: Composition = build_composition("single")
    assert isinstance(composition, Single)
    with pytest.raises(ConfigError, match="did you mean 'single'"):
        build_composition("singel")


async def test_a_cancelled_vote_ends_every_call() -> None:
    under_way, ended = set[str](), set[str]()

    async def never(expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        assert not request.stream  # no reader of the stream
        under_way.add(expert)
        try:
            await asyncio.sleep(60)
            yield Chunk("too late")
        finally:
            ended.add(expert)

    policy = Policy("default", Table(), composition=Vote(), select=TopK(3))
    reply = Orchestrator(SNAPSHOT, {"default": policy}, ask=never).answer(REQUEST)
    waiting = asyncio.create_task(reply.text())
    while len(under_way) < 3:  # set from within  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert reply.asked == ["good", "cheap", "general"] and reply.expert is None
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended == under_way


async def test_a_policy_that_votes_returns_the_best_of_the_majority_and_the_fallback_when_all_fail() -> None:
    policy = Policy("default", Table(), composition=Vote(), select=TopK(2), fallback="general")
    reply = orchestrator(Backend(fail={"good": EngineError("down")}), default=policy).answer(REQUEST)
    assert await reply.text() == "cheap says hi" and reply.expert == "cheap" and reply.asked == ["good", "cheap"]
    backend = Backend(fail={"good": EngineError("down"), "cheap": EngineError("down too")})
    reply = orchestrator(backend, default=policy).answer(REQUEST)
    assert await reply.text() == "general says hi" and reply.asked == ["good", "cheap", "general"]


class ByVector:
    """Asks the decision's experts for an embedding of the request, then the one with the shortest for its text."""

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        vectors = [ExpertCall(f"0.{name}", name, request, wants="embedding") for name in decision.experts]
        if not done:
            return ExpertCalls(tuple(vectors))
        answer = done.get("1")
        if isinstance(answer, Answer):
            return Final(answer)
        known = {o.expert: o.value for o in done.values() if isinstance(o, Answer) and o.value is not None}
        return ExpertCalls((ExpertCall("1", min(known, key=lambda name: len(known[name])), request),), last=True)


async def test_a_call_may_want_something_else_than_text_and_its_value_reaches_the_composition() -> None:
    wanted: list[tuple[str, str]] = []

    async def ask(expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        wanted.append((expert, request.wants))
        if request.wants == "text":
            yield Chunk(expert, "stop", Usage(1, 1))
        elif expert == "cheap":
            raise Unsupported("no embeddings")
        else:
            yield Chunk("", "stop", Usage(1, 0), value=expert.encode())

    policy = Policy("default", Table(), ByVector(), select=TopK(3))
    system = Orchestrator(SNAPSHOT, {"default": policy}, ask=ask)
    assert await system.answer(REQUEST).text() == "good"
    assert sorted(wanted[:3]) == [("cheap", "embedding"), ("general", "embedding"), ("good", "embedding")]
    assert wanted[3:] == [("good", "text")]

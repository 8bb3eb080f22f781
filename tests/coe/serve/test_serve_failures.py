"""Whatever an expert raises or an endpoint sends: the fallback answers, else the client gets one clear error."""

from __future__ import annotations

import asyncio
import builtins
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from api_server import Gateway, gateway
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_endpoint import DONE, Behaviour, answering, event, raw_endpoint

import coe.errors
from coe.compose import build_composition
from coe.engines.base import Capabilities
from coe.engines.fake import FakeEngine
from coe.engines.remote.engine import RemoteEngine
from coe.errors import CoeError, ContextLengthExceeded, EngineError, Scope
from coe.host import Host
from coe.orchestrator import Orchestrator
from coe.policy import Always, Policy
from coe.protocol.errors import error_body
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Estimate, Message, Query
from routers.selectors import TopK

BAD = ExpertSpec(name="bad", kind=Kind.MODEL, source="/nowhere", engine="odd")
GOOD = ExpertSpec(name="good", kind=Kind.MODEL, source="fake://upper")
EXPERTS = (BAD, GOOD)
POLICIES = {"default": Policy("default", Always("bad"), fallback="good"), "alone": Policy("alone", Always("bad"))}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
REQUEST = GenerateRequest(messages=(Message("user", "hello"),))
SECRET = "secret-of-the-server"


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError(SECRET)


class Handle(EngineError):
    """Cannot be pickled, and its constructor takes other arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("held", public="short")
        self.handle = lambda: one + two


class Wild(EngineError, status=299, code=""):
    pass


@dataclass
class OddEngine:
    """Raises or yields what it is given, at a place of choice."""

    error: Any
    at: str = "first"
    capabilities = Capabilities(streaming=True)
    capacity = 8
    spec = BAD

    def footprint(self, spec: ExpertSpec) -> int:
        self._fail("footprint")
        return 0

    async def load(self, spec: ExpertSpec, path: Path) -> Any:
        self._fail("load")
        return self if self.at != "loaded" else self.error

    async def unload(self, expert: Any) -> None:
        self._fail("unload")

    def generate(self, request: GenerateRequest, adapter: Any = None) -> Any:
        self._fail("generate")
        return self._chunks() if self.at != "iterator" else self.error

    async def _chunks(self) -> AsyncIterator[Any]:
        self._fail("first")
        if self.at == "yield":
            yield self.error
        yield Chunk("half")
        self._fail("second")
        try:
            yield Chunk("", "stop", Usage(1, 1))
        finally:
            self._fail("close")

    def _fail(self, place: str) -> None:
        if self.at == place:
            raise self.error


def exceptions() -> list[BaseException]:
    """One of each built-in exception but those of the user, and some that behave badly."""
    kinds = [kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, BaseException)]
    made: list[BaseException] = [
        Mute(),
        Handle(1, 2),
        Wild("odd"),
        asyncio.CancelledError(SECRET),
        asyncio.IncompleteReadError(b"", 3),
        ExceptionGroup("several", [ValueError(SECRET), ExceptionGroup("more", [KeyError("x")])]),
        BaseExceptionGroup("one", [SystemExit(SECRET)]),
        coe.errors.InvalidRequest("not by this one"),
        coe.errors.UnknownModel("gone"),
        coe.errors.ConfigError(SECRET),
        ContextLengthExceeded("bad", prompt_tokens=9, max_tokens=1, context_length=8),
        coe.errors.Overloaded("full"),
        ValueError("\ud800 \x1b[31m\r\nx-injected: 1" + "x" * 1_000_000),
    ]
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        if kind in (KeyboardInterrupt, GeneratorExit):
            continue
        try:
            made.append(kind(SECRET))
        except TypeError:  # needs other arguments
            continue
    return made


EXCEPTIONS = exceptions()
PLACES = ("load", "generate", "first")
BROKEN: list[tuple[str, Any]] = [
    ("loaded", None),
    ("loaded", object()),
    ("iterator", None),
    ("iterator", [Chunk("x")]),
    ("iterator", asyncio.sleep),
    ("yield", None),
    ("yield", "text"),
    ("yield", Chunk(None)),  # type: ignore[arg-type]
    ("yield", Chunk("", "stop")),
    ("yield", Chunk("", "because", Usage(1, 1))),  # type: ignore[arg-type]
]


def system(engine: OddEngine) -> Orchestrator:
    snapshot = Snapshot(1, {spec.name: spec for spec in EXPERTS})
    host = Host(snapshot, {"odd": engine, "fake": FakeEngine()}, budget_bytes=1000, locate=lambda spec: Path())  # type: ignore[dict-item]
    return Orchestrator(snapshot, POLICIES, ask=host.ask)


def check_told(error: BaseException) -> None:
    """One error of the expert, which a client can read, and which tells nothing of the server."""
    assert isinstance(error, CoeError) and error.scope is not Scope.REQUEST
    status, body = error_body(error, logged_as="4711")
    assert 400 <= status < 600 and body["error"]["code"] != "internal_error"
    text = json.dumps(body, ensure_ascii=False)
    text.encode()
    assert SECRET not in text and "Traceback" not in text and len(text) < 10_000 and "\\u001b" not in text


def check_answered(engine: OddEngine, stream: bool) -> None:
    async def run() -> None:
        request = GenerateRequest(messages=REQUEST.messages, stream=stream)
        reply = system(engine).answer(request)
        assert await asyncio.wait_for(reply.text(), 10) == "HELLO"
        assert reply.expert == "good" and len(reply.notes) == 1
        assert reply.notes[0].startswith("bad failed: ") and SECRET not in reply.notes[0]
        for model in ("bad", "coe/alone"):
            with pytest.raises(CoeError) as caught:
                await asyncio.wait_for(system(engine).answer(request, model=model).text(), 10)
            check_told(caught.value)

    asyncio.run(run())


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda error: type(error).__name__)
def test_any_exception_of_an_engine_leads_to_the_fallback(error: BaseException, at: str) -> None:
    check_answered(OddEngine(error, at), stream=at != "load")


@pytest.mark.parametrize(("at", "given"), BROKEN)
def test_an_engine_that_breaks_its_contract_leads_to_the_fallback(at: str, given: Any) -> None:
    check_answered(OddEngine(given, at), stream=False)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([Exception, ValueError, OSError, EngineError, coe.errors.Rejected, coe.errors.RemoteError]),
    st.lists(st.text() | st.integers() | st.binary() | st.none(), max_size=3),
    st.sampled_from((*PLACES, "footprint")),
    st.booleans(),
)
def test_exceptions_with_any_arguments_lead_to_the_fallback(
    kind: type[Exception], arguments: list[Any], at: str, stream: bool
) -> None:
    check_answered(OddEngine(kind(*arguments), at), stream)


@pytest.mark.parametrize("error", EXCEPTIONS[:6], ids=lambda error: type(error).__name__)
def test_a_failure_in_the_middle_ends_a_stream_and_is_mended_in_a_whole_answer(error: BaseException) -> None:
    async def run() -> None:
        reply = system(OddEngine(error, "second")).answer(REQUEST)
        seen = []
        with pytest.raises(CoeError) as caught:
            async for chunk in reply.chunks:
                seen.append(chunk.text)  # chunks before the error count  # noqa: PERF401
        assert seen == ["half"]
        check_told(caught.value)
        whole = GenerateRequest(messages=REQUEST.messages, stream=False)
        assert await system(OddEngine(error, "second")).answer(whole).text() == "HELLO"

    asyncio.run(run())


@pytest.mark.parametrize("at", ["close", "unload"])
async def test_a_failure_after_the_answer_takes_nothing_back(at: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = OddEngine(ValueError("late"), at)
    snapshot = Snapshot(1, {spec.name: spec for spec in EXPERTS})
    host = Host(snapshot, {"odd": engine}, budget_bytes=1000, locate=lambda spec: Path())  # type: ignore[dict-item]
    assert [chunk.text async for chunk in host.ask("bad", REQUEST)] == ["half", ""]
    await host.aclose()
    assert "ValueError: late" in caplog.text and not host.in_flight["bad"]


async def test_an_expert_whose_size_is_not_known_does_not_stop_the_others() -> None:
    snapshot = Snapshot(1, {spec.name: spec for spec in EXPERTS})
    engines: Any = {"odd": OddEngine(ValueError("no size"), "footprint"), "fake": FakeEngine()}
    host = Host(snapshot, engines, budget_bytes=1000, locate=lambda spec: Path())

    async def ask(name: str) -> str:
        return "".join([chunk.text async for chunk in host.ask(name, REQUEST)])

    outcomes = await asyncio.gather(*map(ask, ["bad", "good"] * 5), return_exceptions=True)
    assert outcomes[1::2] == ["HELLO"] * 5 and all(isinstance(each, EngineError) for each in outcomes[::2])
    assert host.load_s().keys() == {"bad", "good"} and host.fits_free("bad")


class Both:
    """A router that chooses both experts."""

    requires: frozenset[str] = frozenset()

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        return Estimate(("bad", "good"), np.full((len(queries), 2), 0.5))


@pytest.mark.parametrize("kind", ["vote", "weighted-vote", "cascade", "single", "aggregate", "chain"])
async def test_every_composition_answers_with_the_experts_that_are_left(kind: str) -> None:
    snapshot = Snapshot(1, {spec.name: spec for spec in EXPERTS})
    engines: Any = {"odd": OddEngine(SystemExit(SECRET)), "fake": FakeEngine(answers={"hello": "4"})}
    host = Host(snapshot, engines, budget_bytes=1000, locate=lambda spec: Path())
    composition = build_composition(kind, {"aggregator": "bad"} if kind == "aggregate" else {})
    policy = Policy("default", Both(), composition=composition, select=TopK(2))
    reply = Orchestrator(snapshot, {"default": policy}, ask=host.ask).answer(REQUEST)
    assert await reply.text() == "4" and reply.expert == "good"
    assert reply.notes[0].startswith("bad failed: EngineError: 'bad' failed: SystemExit")


# Over HTTP


async def refused(g: Gateway, **options: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        await g.client.chat.completions.create(**{"model": "auto", "messages": HELLO, **options})
    return caught.value


@pytest.mark.parametrize("stream", [False, True])
async def test_clients_get_the_fallback_or_one_error_in_openais_shape(stream: bool) -> None:
    engine = OddEngine(None)
    async with gateway(experts=EXPERTS, engines={"odd": engine}, policies=POLICIES) as g:
        for engine.error in EXCEPTIONS:
            body = {"model": "auto", "messages": HELLO, "stream": stream}
            response = await g.http.post("/v1/chat/completions", json=body)
            assert response.status_code == 200 and "HELLO" in response.text, engine.error
            assert response.headers["x-coe-notes"].startswith("bad failed: ")
            assert SECRET not in response.text + str(response.headers) and "x-injected" not in response.headers
            error = await refused(g, model="bad", stream=stream)
            assert error.code and error.code != "internal_error" and SECRET not in error.message


FAR_POLICIES = {"default": Policy("default", Always("far"), fallback="good"), "alone": Policy("alone", Always("far"))}


def refusal(status: int, *headers: str, message: str = "no") -> Behaviour:
    head = "\r\n".join([f"HTTP/1.1 {status} No", "content-type: application/json", *headers])
    return answering(json.dumps({"error": {"message": message}}), head)


@pytest.mark.parametrize(
    ("behave", "status"),
    [
        *((refusal(status), 400) for status in (400, 422)),
        (refusal(413), 413),
        *((refusal(status), 502) for status in (401, 402, 403, 404, 405, 500, 503)),
        (refusal(302, "location: http://127.0.0.1:9/v1"), 502),
        (refusal(429), 429),
        (answering("<html>Log in</html>"), 502),
        (answering("data: {broken"), 502),
        (answering(event(None, "content_filter")), 502),
    ],
)
async def test_an_endpoint_that_refuses_is_answered_by_the_fallback(behave: Behaviour, status: int) -> None:
    async with raw_endpoint(behave) as endpoint:
        engines = {"remote": RemoteEngine(retries=0, timeout_s=5)}
        async with gateway(experts=(endpoint.spec(), GOOD), engines=engines, policies=FAR_POLICIES) as g:
            for stream in (False, True):
                body = {"model": "auto", "messages": HELLO, "stream": stream}
                response = await g.http.post("/v1/chat/completions", json=body)
                assert response.status_code == 200 and "HELLO" in response.text
                assert response.headers["x-coe-notes"].startswith("far failed: R")
                for model in ("far", "coe/alone"):
                    error = await refused(g, model=model, stream=stream)
                    assert error.status_code == status and "'far'" in error.message
                    assert "127.0.0.1" not in error.message


async def test_operators_find_the_whole_under_the_id_that_the_client_has(caplog: pytest.LogCaptureFixture) -> None:
    async with raw_endpoint(refusal(500, message="disk 7 of 10.0.0.3 is full")) as endpoint:
        engines = {"remote": RemoteEngine(retries=0)}
        async with gateway(experts=(endpoint.spec(), GOOD), engines=engines, policies=FAR_POLICIES) as g:
            error = await refused(g, model="far")
            id_ = error.response.headers["x-coe-decision-id"]
            assert id_ in error.message and "10.0.0.3" not in error.message
            [line] = [record.getMessage() for record in caplog.records if id_ in record.getMessage()]
            assert "disk 7 of 10.0.0.3 is full" in line
            caplog.clear()
            await g.client.chat.completions.create(model="auto", messages=HELLO)
            assert "disk 7 of 10.0.0.3 is full" in caplog.text, "also if the fallback answers"


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_rate_limit_is_passed_on_with_its_time(status: int, stream: bool) -> None:
    async with raw_endpoint(refusal(status, "retry-after: 17")) as endpoint:
        engines = {"remote": RemoteEngine(retries=2, timeout_s=5)}
        async with gateway(experts=(endpoint.spec(), GOOD), engines=engines, policies=FAR_POLICIES) as g:
            error = await refused(g, model="coe/alone", stream=stream)
            assert error.status_code == status and error.response.headers["retry-after"] == "17"
            assert len(endpoint.requests) == 1, "the client waits, or another expert answers"
            body = {"model": "auto", "messages": HELLO, "stream": stream}
            response = await g.http.post("/v1/chat/completions", json=body)
            assert response.status_code == 200 and "HELLO" in response.text and "retry-after" not in response.headers


async def test_estimated_usage_is_marked_in_both_shapes() -> None:
    async with raw_endpoint(answering(event("Hi ") + event("you", "stop") + DONE)) as endpoint:
        engines = {"remote": RemoteEngine(retries=0)}
        async with gateway(experts=(endpoint.spec(), GOOD), engines=engines, policies=FAR_POLICIES) as g:
            body: dict[str, Any] = {"model": "far", "messages": HELLO}
            expected = {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9, "estimated": True}
            assert (await g.http.post("/v1/chat/completions", json=body)).json()["usage"] == expected
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            response = await g.http.post("/v1/chat/completions", json=body)
            assert json.loads(response.text.split("\n\n")[-3].removeprefix("data: "))["usage"] == expected
            counted = await g.http.post("/v1/chat/completions", json={"model": "good", "messages": HELLO})
            assert "estimated" not in counted.json()["usage"]


@pytest.mark.parametrize("at", [*PLACES, "footprint"])
@pytest.mark.parametrize("kind", [ValueError, EngineError, coe.errors.Rejected])
def test_control_characters_of_an_error_do_not_reach_a_terminal(kind: type[Exception], at: str) -> None:
    check_answered(OddEngine(kind("\x1b[2J\x9b1m"), at), stream=at != "load")

"""RemoteEngine against a real HTTP server on this machine that sends server-sent events and fails on request."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from coe.engines.base import Adapter
from coe.engines.fake import FakeEngine
from coe.engines.remote.attempts import Attempts
from coe.engines.remote.engine import RemoteEngine, RemoteExpert
from coe.engines.remote.errors import is_transient, stated_wait_s, translated
from coe.errors import CoeError, ConfigError, DeadlineExceeded, EngineError, InvalidRequest, RemoteError
from coe.host import Host
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

HELLO = GenerateRequest(messages=(Message("system", "Be brief."), Message("user", "Hello")), max_tokens=9)


@dataclass
class Endpoint:
    """The behaviour of the server by model name, and the requests it received."""

    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    streaming: threading.Event = field(default_factory=threading.Event)
    disconnected: threading.Event = field(default_factory=threading.Event)

    def spec(self, model: str, **fields: Any) -> ExpertSpec:
        source = f"http://127.0.0.1:{self.port}/v1"
        return ExpertSpec(name="far", kind=Kind.REMOTE, source=source, model=model, **fields)

    def tries(self, model: str) -> int:
        return sum(body["model"] == model for body in self.bodies)

    async def answer(self, request: Request, chat: bool) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        model = body["model"]
        kind, _, detail = model.partition("-")
        if kind == "status":
            return refuse(int(detail))
        if kind == "flaky" and self.tries(model) == 1:
            return refuse(int(detail), **{"retry-after": "0"})
        if kind == "slow":
            await asyncio.sleep(1)
        return StreamingResponse(self.events(kind, chat), media_type="text/event-stream")

    async def events(self, kind: str, chat: bool) -> AsyncIterator[str]:
        def event(text: str | None, reason: str | None = None) -> str:
            content = {"delta": {"content": text}} if chat else {"text": text or ""}
            return sse({"choices": [{"index": 0, "finish_reason": reason, **content}]})

        if chat:
            yield event(None)  # as OpenAI does: the role alone
        if kind == "empty":
            return
        yield event("Hel")
        yield event("lo!")
        if kind == "cut":
            return
        if kind == "broken":
            raise RuntimeError("the server dies")
        if kind == "garbled":
            yield "data: {not json\n\n"
        if kind == "error":
            yield sse({"error": {"message": "the model crashed", "code": 500}})
        if kind == "endless":
            try:
                while True:
                    await asyncio.sleep(0.01)
                    self.streaming.set()
                    yield event(" more")
            finally:
                self.disconnected.set()
        yield event(None, {"long": "length", "filter": "content_filter"}.get(kind, "stop"))
        if kind != "uncounted":
            usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
            yield sse({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps({'id': 'x', 'object': 'chunk', 'created': 0, 'model': 'm', **data})}\n\n"


def refuse(status: int, **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"message": f"refused with {status}"}}, status_code=status, headers=headers)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    end, app = Endpoint(), FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await end.answer(request, chat=True)

    @app.post("/v1/completions")
    async def plain(request: Request) -> Response:
        return await end.answer(request, chat=False)

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    end.port = server.servers[0].sockets[0].getsockname()[1]
    yield end
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture
def engine() -> RemoteEngine:
    return RemoteEngine(backoff_s=0.01)


async def ask(engine: RemoteEngine, spec: ExpertSpec, request: GenerateRequest = HELLO) -> list[Chunk]:
    expert = await engine.load(spec, Path())
    try:
        return [chunk async for chunk in expert.generate(request)]
    finally:
        await engine.unload(expert)


async def test_an_answer_streams_and_ends_with_the_servers_usage(endpoint: Endpoint, engine: RemoteEngine) -> None:
    assert await ask(engine, endpoint.spec("good")) == [
        Chunk("Hel"),
        Chunk("lo!"),
        Chunk("", "stop", Usage(7, 2)),
    ]
    body = endpoint.bodies[-1]
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["stream"]) == (9, 0.0, 1.0, True)
    assert not {"stop", "seed"} & body.keys()
    assert endpoint.headers[-1]["authorization"] == "Bearer none"
    assert engine.footprint(endpoint.spec("good")) == 0


async def test_settings_and_plain_prompts_are_passed_on(endpoint: Endpoint, engine: RemoteEngine) -> None:
    request = GenerateRequest(prompt="Once", temperature=0.5, top_p=0.9, stop=("\n",), seed=4)
    assert "".join(c.text for c in await ask(engine, endpoint.spec("good"), request)) == "Hello!"
    body = endpoint.bodies[-1]
    assert (body["prompt"], body["stop"], body["seed"], body["top_p"]) == ("Once", ["\n"], 4, 0.9)
    assert "messages" not in body


async def test_a_json_object_is_asked_for_where_the_request_does(endpoint: Endpoint, engine: RemoteEngine) -> None:
    await ask(engine, endpoint.spec("json-asked"), replace(HELLO, format="json"))
    await ask(engine, endpoint.spec("json-not"))
    asked, plain = endpoint.bodies[-2:]
    assert asked["response_format"] == {"type": "json_object"} and "response_format" not in plain


async def test_a_full_answer_says_so(endpoint: Endpoint, engine: RemoteEngine) -> None:
    assert (await ask(engine, endpoint.spec("long")))[-1].finish_reason == "length"


async def test_without_usage_the_tokens_are_estimated_from_the_texts(endpoint: Endpoint, engine: RemoteEngine) -> None:
    assert (await ask(engine, endpoint.spec("uncounted")))[-1].usage == Usage(13, 3)  # 5 of text and 4 a message


async def test_the_key_comes_from_the_named_variable(endpoint: Endpoint) -> None:
    spec = endpoint.spec("good", api_key_env="FAR_KEY")
    await ask(RemoteEngine(environ={"FAR_KEY": "secret"}), spec)
    assert endpoint.headers[-1]["authorization"] == "Bearer secret"
    with pytest.raises(ConfigError, match="set the environment variable FAR_KEY") as info:
        await ask(RemoteEngine(environ={"FAR_KEY": " "}), spec)
    assert "secret" not in str(info.value)


@pytest.mark.parametrize(
    ("status", "error", "match", "tries"),
    [
        (400, InvalidRequest, "rejects the request.*refused with 400", 1),
        (401, RemoteError, "rejects requests without a key; set its api_key_env", 1),
        (403, RemoteError, "rejects requests without a key", 1),
        (404, RemoteError, "does not know the model 'status-404'", 1),
        (413, InvalidRequest, "too large", 1),
        (418, RemoteError, "HTTP status 418", 1),
        (422, InvalidRequest, "rejects the request", 1),
        (429, RemoteError, "HTTP status 429", 3),
        (500, RemoteError, "HTTP status 500", 3),
        (503, RemoteError, "HTTP status 503", 3),
    ],
)
async def test_refusals_are_explained_and_only_passing_ones_retried(
    endpoint: Endpoint, engine: RemoteEngine, status: int, error: type[CoeError], match: str, tries: int
) -> None:
    with pytest.raises(error, match=match) as info:
        await ask(engine, endpoint.spec(f"status-{status}"))
    assert endpoint.tries(f"status-{status}") == tries
    assert info.value.retryable == (tries > 1)


@pytest.mark.parametrize("status", [429, 500])
async def test_a_passing_failure_is_retried(endpoint: Endpoint, engine: RemoteEngine, status: int) -> None:
    assert (await ask(engine, endpoint.spec(f"flaky-{status}")))[-1].finish_reason == "stop"
    assert endpoint.tries(f"flaky-{status}") == 2


async def test_silence_and_an_absent_server_are_retryable_errors(endpoint: Endpoint) -> None:
    with pytest.raises(RemoteError, match="timed out") as info:
        await ask(RemoteEngine(timeout_s=0.2, retries=0), endpoint.spec("slow"))
    assert info.value.retryable
    absent = ExpertSpec(name="far", kind=Kind.REMOTE, source="http://127.0.0.1:9/v1")
    with pytest.raises(RemoteError, match="cannot be reached") as info:
        await ask(RemoteEngine(retries=1, backoff_s=0), absent)
    assert info.value.retryable


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("cut", "closed the stream before its end"),
        ("broken", "closed the connection in the middle of its answer"),
        ("garbled", "failed in the middle of its answer: .*JSONDecodeError"),
        ("error", "failed in the middle of its answer: APIError: the model crashed"),
        ("filter", "ended with finish_reason .content_filter"),
    ],
)
async def test_a_failure_after_text_was_shown_is_not_retried(
    endpoint: Endpoint, engine: RemoteEngine, kind: str, match: str
) -> None:
    expert = await engine.load(endpoint.spec(kind), Path())
    seen: list[str] = []

    async def read() -> None:
        seen.extend([chunk.text async for chunk in keep(expert.generate(HELLO), seen)])

    with pytest.raises(RemoteError, match=match):
        await read()
    assert "".join(seen) == "Hello!"
    assert endpoint.tries(kind) == 1
    await engine.unload(expert)


async def keep(chunks: AsyncIterator[Chunk], seen: list[str]) -> AsyncIterator[Chunk]:
    async for chunk in chunks:
        seen.append(chunk.text)
        yield chunk


async def test_a_stream_that_ends_before_any_text_is_retried(endpoint: Endpoint, engine: RemoteEngine) -> None:
    with pytest.raises(RemoteError, match="closed the stream"):
        await ask(engine, endpoint.spec("empty"))
    assert endpoint.tries("empty") == 3


async def test_closing_the_iterator_closes_the_http_stream(endpoint: Endpoint, engine: RemoteEngine) -> None:
    expert = await engine.load(endpoint.spec("endless"), Path())
    answer = expert.generate(HELLO)
    assert (await anext(answer)).text == "Hel"
    assert not endpoint.disconnected.is_set()
    await answer.aclose()  # type: ignore[attr-defined]
    assert await asyncio.to_thread(endpoint.disconnected.wait, 10)
    await engine.unload(expert)


async def test_cancelling_the_task_closes_the_http_stream(endpoint: Endpoint, engine: RemoteEngine) -> None:
    endpoint.streaming.clear()
    endpoint.disconnected.clear()
    expert = await engine.load(endpoint.spec("endless"), Path())

    async def read() -> None:
        async for _ in expert.generate(HELLO):
            pass

    task = asyncio.create_task(read())
    assert await asyncio.to_thread(endpoint.streaming.wait, 60)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(endpoint.disconnected.wait, 10)
    await engine.unload(expert)


async def test_a_deadline_closes_the_http_stream_and_frees_the_place(endpoint: Endpoint, engine: RemoteEngine) -> None:
    endpoint.disconnected.clear()
    spec = endpoint.spec("endless", context_length=1000)
    host = Host(Snapshot(1, {"far": spec}), {"remote": engine}, budget_bytes=0, locate=lambda spec: Path())
    with pytest.raises(DeadlineExceeded, match="did not finish within 0.5 s"):
        async for _ in host.ask("far", replace(HELLO, deadline_s=0.5)):
            pass
    assert await asyncio.to_thread(endpoint.disconnected.wait, 10)
    [state] = host.endpoints()
    assert not host.in_flight and (state["in_flight"], state["failed"]) == (0, 0)
    await host.aclose()


async def test_adapters_and_unloaded_experts_are_refused(endpoint: Endpoint, engine: RemoteEngine) -> None:
    expert = await engine.load(endpoint.spec("good"), Path())
    adapter = Adapter(ExpertSpec(name="sql", kind=Kind.ADAPTER, source="adapters/sql", base="far"), Path())
    with pytest.raises(InvalidRequest, match="takes no adapters: serve 'sql' there"):
        await anext(expert.generate(HELLO, adapter))
    await engine.unload(expert)
    await engine.unload(expert)
    with pytest.raises(EngineError, match="was unloaded"):
        await anext(expert.generate(HELLO))
    fake = await FakeEngine().load(endpoint.spec("good"), Path())
    with pytest.raises(TypeError, match="not loaded by this engine"):
        await engine.unload(fake)
    with pytest.raises(ConfigError, match="timeouts must be positive"):
        RemoteEngine(retries=-1)


async def test_openais_own_endpoint_takes_the_new_name_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []

    async def create(self: Any, **options: Any) -> Any:
        sent.append(options)
        raise openai.OpenAIError("enough")

    monkeypatch.setattr("openai.resources.chat.completions.AsyncCompletions.create", create)
    spec = ExpertSpec(name="gpt", kind=Kind.REMOTE, source="https://api.openai.com/v1")
    with pytest.raises(RemoteError, match="enough"):
        await ask(RemoteEngine(), spec)
    assert sent[0]["max_completion_tokens"] == 9
    assert "max_tokens" not in sent[0]


# Every error of the client is translated


def example(kind: type[Exception]) -> Exception:
    """An instance of one of openai's exception classes, made without its constructor's arguments."""
    error = kind.__new__(kind)
    Exception.__init__(error, "made for a test")
    error.message = "made for a test"  # type: ignore[attr-defined]
    error.code = None  # type: ignore[attr-defined]
    statuses = {"ConflictError": 409, "RateLimitError": 429, "InternalServerError": 500}
    error.status_code = statuses.get(kind.__name__, 400)  # type: ignore[attr-defined]
    return error


KINDS = sorted(
    (k for k in list(vars(openai).values()) if isinstance(k, type) and issubclass(k, Exception)),
    key=lambda k: k.__name__,
)
PASSING = {
    "APIConnectionError",
    "APIError",
    "APITimeoutError",
    "ConflictError",
    "InternalServerError",
    "RateLimitError",
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
async def test_every_exception_of_the_client_is_translated(
    kind: type[Exception], engine: RemoteEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ExpertSpec(name="far", kind=Kind.REMOTE, source="https://example.org/v1")
    expert = await engine.load(spec, Path())
    error = example(kind)

    async def fail(self: Attempts, place: Any) -> Any:
        raise error

    monkeypatch.setattr(Attempts, "_open", fail)
    engine_error = translated(error, spec)
    assert engine_error.retryable == (kind.__name__ in PASSING)
    assert "'far' (https://example.org/v1)" in str(engine_error)
    with pytest.raises(type(engine_error)) as info:
        await anext(RemoteExpert.generate(expert, HELLO))
    assert info.value.__cause__ is error
    await engine.unload(expert)


def test_the_list_of_the_clients_exceptions_is_not_empty() -> None:
    assert {openai.OpenAIError, openai.RateLimitError, openai.LengthFinishReasonError} <= set(KINDS)


def test_an_exhausted_account_is_not_retried() -> None:
    error = example(openai.RateLimitError)
    assert is_transient(error)
    error.code = "insufficient_quota"  # type: ignore[attr-defined]
    assert not is_transient(error)


@pytest.mark.parametrize(
    ("header", "wait"),
    [("2", 2.0), ("9999", 3600.0), ("-1", 0.0), ("nan", None), ("Wed, 21 Oct 2026", None), (None, None)],
)
def test_the_endpoint_says_when_to_try_again(header: str | None, wait: float | None) -> None:
    error = example(openai.RateLimitError)
    error.response = Response(headers={"retry-after": header} if header else None)  # type: ignore[attr-defined]
    assert stated_wait_s(error) == wait

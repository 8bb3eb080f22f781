"""Refusals of endpoints: whose fault they are, when to try again, and that no message has a secret."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from raw_endpoint import Send, answering, event, raw_endpoint

from coe.engines.remote.engine import RemoteEngine
from coe.engines.remote.redaction import for_clients, for_log, redacted
from coe.errors import CoeError, ConfigError, Rejected, RemoteError
from coe.protocol.errors import error_body, retry_after_s
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from routers.base import Message

HELLO = GenerateRequest(messages=(Message("user", "Hello"),), max_tokens=5)
KEY = "sk-very-secret/key+1"


def refusal(status: int, message: str = "no", *headers: str, **error: Any) -> Any:
    head = "\r\n".join([f"HTTP/1.1 {status} No", "content-type: application/json", *headers])
    return answering(json.dumps({"error": {"message": message, **error}}), head)


async def failure(behave: Any, request: GenerateRequest = HELLO, **options: Any) -> CoeError:
    async with raw_endpoint(behave) as endpoint:
        engine = RemoteEngine(**{"retries": 0, "timeout_s": 5.0, "environ": {"FAR_KEY": KEY}, **options})
        expert = await engine.load(endpoint.spec(api_key_env="FAR_KEY"), Path())
        try:
            with pytest.raises(CoeError) as caught:
                async for _ in expert.generate(request):
                    pass
        finally:
            await engine.unload(expert)
    return caught.value


@pytest.mark.parametrize(
    ("status", "fields", "kind", "told"),
    [
        (400, {}, Rejected, (400, "invalid_request")),
        (422, {}, Rejected, (400, "invalid_request")),
        (413, {}, Rejected, (413, "invalid_request")),
        (400, {"code": "context_length_exceeded"}, Rejected, (400, "context_length_exceeded")),
        (400, {"code": "content_filter"}, Rejected, (400, "content_filter")),
        (400, {"code": "insufficient_balance"}, RemoteError, (502, "remote_error")),
        (401, {}, RemoteError, (502, "remote_error")),
        (402, {}, RemoteError, (502, "remote_error")),
        (403, {}, RemoteError, (502, "remote_error")),
        (404, {}, RemoteError, (502, "remote_error")),
        (405, {}, RemoteError, (502, "remote_error")),
        (429, {}, RemoteError, (429, "remote_error")),
        (429, {"code": "insufficient_quota"}, RemoteError, (502, "remote_error")),
        (500, {}, RemoteError, (502, "remote_error")),
        (503, {}, RemoteError, (502, "remote_error")),
    ],
)
async def test_only_a_rejected_request_has_the_status_of_one(
    status: int, fields: dict[str, Any], kind: type[CoeError], told: tuple[int, str]
) -> None:
    error = await failure(refusal(status, **fields))
    assert type(error) is kind and (error.status, error.code) == told


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("30", 30, 30), ("0.2", 1, 1), ("-5", 1, 1), ("999999999", 3600, 3600), ("1e999", 1, 1), ("soon", 1, 1)],
)
async def test_when_to_try_again_is_passed_on_within_sane_bounds(
    status: int, header: str, least: int, most: int
) -> None:
    error = await failure(refusal(status, "later", f"retry-after: {header}"))
    assert error.retryable
    if header in ("1e999", "soon") and status == 503:
        assert error.status == 502, "nothing is known of when"
    else:
        assert error.status == status and least <= (retry_after_s(error) or 0) <= most


async def test_a_date_says_when_to_try_again() -> None:
    error = await failure(refusal(429, "later", f"retry-after: {in_seconds(100)}"))
    assert 95 <= (retry_after_s(error) or 0) <= 101
    past = await failure(refusal(429, "later", f"retry-after: {in_seconds(-100)}"))
    assert retry_after_s(past) == 1


async def test_a_long_wait_is_left_to_the_caller_and_a_short_one_is_not() -> None:
    tries = 0

    async def later(send: Send) -> None:
        nonlocal tries
        tries += 1
        wait = "30" if tries == 1 else "0"
        await refusal(429, "later", f"retry-after: {wait}")(send)

    began = time.monotonic()
    error = await failure(later, retries=5)
    assert tries == 1 and error.retry_after_s == 30 and time.monotonic() - began < 5
    await failure(later, retries=2)
    assert tries == 4


async def test_a_batch_waits_as_long_as_the_endpoint_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.engines.remote.attempts._SHORT_WAIT_S", -1.0)  # every wait is a long one
    tries = 0

    async def later(send: Send) -> None:
        nonlocal tries
        tries += 1
        await refusal(429, "later", "retry-after: 0")(send)

    await failure(later, retries=2)
    assert tries == 1
    await failure(later, GenerateRequest(messages=HELLO.messages, patient=True), retries=2)
    assert tries == 4


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 429, 500, 503, 307])
async def test_a_key_in_an_endpoints_words_reaches_neither_clients_nor_logs(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    words = (
        f"bad key {KEY}; headers: {{'Authorization': 'Bearer {KEY}', 'x-api-key': '{KEY}', 'cookie': 'sid=abc123'}} at "
        "https://admin:hunter22@10.0.0.7:8000/v1 \x1b[31mred\r\nX-Injected: 1"
    )
    error = await failure(refusal(status, words, f"location: https://u:{KEY}@elsewhere/?k={KEY}"))
    with caplog.at_level(logging.ERROR):
        logging.getLogger("test").error("failed", exc_info=error)
    _, body = error_body(error, logged_as="4711")
    shown = [str(error), error.public or "", json.dumps(body), caplog.text]
    for text in shown:
        assert KEY not in text and "sk-very" not in text and "hunter22" not in text and "abc123" not in text
    assert "\x1b" not in str(error) and "\n" not in str(error)
    assert "127.0.0.1" not in json.dumps(body) and "10.0.0.7" not in json.dumps(body)
    assert str(error) in caplog.text, "operators read the whole"


async def test_a_key_in_an_error_event_is_hidden_too() -> None:
    error = await failure(answering(event("Hi") + f'data: {{"error": {{"message": "key {KEY} is bad"}}}}\n\n'))
    assert KEY not in str(error) and "key *** is bad" in str(error)
    assert error.client_text == "the endpoint of 'far' reported an error"


async def test_the_reason_of_a_rejection_is_for_the_client_if_it_has_no_secret() -> None:
    error = await failure(refusal(400, "temperature must be 1, see https://docs.example.org/x"))
    assert error.client_text == "'far' rejects the request: temperature must be 1, see (URL)"
    error = await failure(refusal(400, "x" * 5_000_000))
    assert len(error.client_text or "") < 300 and len(str(error)) < 2500
    page = answering("<html><h1>Bad gateway</h1></html>", "HTTP/1.1 400 Bad\r\ncontent-type: text/html")
    assert (await failure(page)).client_text == "'far' rejects the request"


def test_what_counts_as_a_secret() -> None:
    assert redacted(f"a {KEY} b", [KEY]) == "a *** b"
    assert redacted("sk-very-secret%2Fkey%2B1", [KEY]) == "***"
    assert redacted("authorization: Basic dXNlcjpwdw==", []) == "authorization: Basic ***"
    assert redacted('{"api_key": "abcdef"}', []) == '{"api_key": "***"}'
    assert redacted("https://u:p@h/v1", []) == "https://***@h/v1"
    assert redacted("a basic question about tokens: none", []) == "a basic question about tokens: none"
    assert for_clients(f"the key {KEY}", [KEY]) is None and for_clients("", []) is None
    assert for_log("a\nb\x1b[0m", []) == "a b?[0m"


async def test_a_source_with_a_password_is_a_clear_error() -> None:
    spec = ExpertSpec.model_construct(name="old", kind=Kind.REMOTE, source="https://user:hunter22@host/v1")
    with pytest.raises(ConfigError, match="has a user name or password: register it again without") as caught:
        await RemoteEngine().load(
            ExpertSpec(name="old", kind=Kind.REMOTE, source="https://host/v1").model_copy(
                update={"source": spec.source}
            ),
            Path(),
        )
    assert "hunter22" not in str(caught.value)

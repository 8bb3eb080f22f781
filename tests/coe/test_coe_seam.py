"""What third-party code raises: one error of the expert, which clients, logs and other processes can read."""

from __future__ import annotations

import asyncio
import logging
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coe.errors import (
    CoeError,
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    OutOfMemory,
    Rejected,
    RemoteError,
    Scope,
    WeightsError,
)
from coe.protocol.errors import error_body
from coe.seam import expert_error, is_interrupt, one_line, portable, seam, text_of
from registry.errors import DigestMismatch

TOO_LONG = ContextLengthExceeded("a", prompt_tokens=9, max_tokens=2, context_length=10)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Unpicklable(EngineError):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}", public="short")
        self.handle = lambda: None


class Mine(Rejected, code="content_filter", status=413):
    pass


FOREIGN: list[BaseException] = [
    ValueError("odd"),
    Mute(),
    StopIteration(1),
    RecursionError("deep"),
    SystemExit(3),
    asyncio.CancelledError(),
    ExceptionGroup("two", [ValueError("a"), ValueError("b")]),
    BaseException("bare"),
    KeyError("\x1b[31mred\r\nSet-Cookie: a=b"),
]


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
def test_a_foreign_exception_is_an_engine_error_of_its_expert(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    found = expert_error("sql", error)
    assert isinstance(found, EngineError) and found.scope is Scope.EXPERT
    assert str(found).startswith(f"'sql' failed: {type(error).__name__}")
    assert found.client_text == f"'sql' failed: {type(error).__name__}", "its message stays on the server"
    assert "\x1b" not in str(found) and "\n" not in str(found)
    assert str(pickle.loads(pickle.dumps(found))) == str(found)
    [record] = caplog.records
    assert record.levelno == logging.ERROR and record.exc_info is not None and record.exc_info[1] is error
    status, body = error_body(found, logged_as="4711")
    assert status == 500 and body["error"]["code"] == "engine_error" and "4711" in body["error"]["message"]


def test_kinds_that_have_a_class_of_their_own() -> None:
    assert isinstance(expert_error("sql", MemoryError()), OutOfMemory)
    assert isinstance(expert_error("sql", DigestMismatch("differs")), WeightsError)
    assert expert_error("sql", TOO_LONG) is TOO_LONG
    assert expert_error("sql", ExceptionGroup("tasks", [TOO_LONG])) is TOO_LONG


def test_the_cause_of_an_error_stays_and_the_log_has_what_clients_do_not_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = WeightsError("/srv/model is torn")
    error.__cause__ = ValueError("byte 7")
    with pytest.raises(WeightsError) as caught, seam("sql"):
        raise error
    assert caught.value is error and str(error.__cause__) == "byte 7"
    assert "expert 'sql' failed: /srv/model is torn" in caplog.text
    caplog.clear()
    with pytest.raises(ContextLengthExceeded), seam("sql"):
        raise TOO_LONG
    assert not caplog.records, "clients read all of it"
    with pytest.raises(EngineError) as translated, seam("sql"):
        raise KeyError("odd")
    assert isinstance(translated.value.__cause__, KeyError)


def test_an_expert_never_fails_for_all_experts() -> None:
    error = InvalidRequest("no such role")
    found = expert_error("sql", error)
    assert isinstance(found, Rejected) and found.scope is Scope.EXPERT
    assert (str(found), found.status, found.code) == ("no such role", 400, "invalid_request")


@pytest.mark.parametrize(
    ("error", "kind", "stated"),
    [
        (Unpicklable("a", "b"), EngineError, (500, "engine_error", "short")),
        (Mine("a filter"), Rejected, (413, "content_filter", None)),
        (RemoteError("x", retryable=True, status=429, retry_after_s=7), RemoteError, (429, "remote_error", None)),
    ],
    ids=["unpicklable", "of another package", "ours"],
)
def test_every_error_can_cross_processes_as_a_class_that_all_know(
    error: CoeError, kind: type[CoeError], stated: tuple[Any, ...]
) -> None:
    sent = portable(error)
    assert type(sent) is kind
    for each in (sent, pickle.loads(pickle.dumps(sent))):
        assert (str(each), each.retryable, each.retry_after_s) == (str(error), error.retryable, error.retry_after_s)
        assert (each.status, each.code, each.public) == stated


async def test_only_the_cancellation_of_this_task_is_no_failure() -> None:
    assert not is_interrupt(asyncio.CancelledError()) and is_interrupt(KeyboardInterrupt())
    seen: list[bool] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            seen.append(is_interrupt(error))
            raise

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert seen == [True]


@given(st.text(), st.integers(4, 100))
def test_a_message_is_one_printable_line(text: str, most: int) -> None:
    line = one_line(text, most)
    assert len(line) <= most
    assert not any(each in line for each in "\n\r\x1b\x00\u2028\u202e\x85") and "\t" not in line
    line.encode()
    assert text_of(ValueError(text))


def test_a_message_of_megabytes_is_cut() -> None:
    assert len(text_of(ValueError("x" * 10_000_000))) == 2000

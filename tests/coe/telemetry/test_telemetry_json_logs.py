"""JSON logs: each line is one object, with the ids of the request that was handled when it was written."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from api_server import gateway
from spans import recorded

from coe.serve.cluster.observing import attributed
from coe.telemetry.json_logs import use_json, use_text
from coe.telemetry.origin import Handled, Origin, bind, handled_now
from coe.types import GenerateRequest


class Lines:
    """What is logged, as parsed lines."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def all(self) -> list[dict[str, Any]]:
        text = self._stream.getvalue()
        assert not text or text.endswith("\n")
        return [json.loads(line) for line in text.splitlines()]

    def of(self, logger: str) -> list[dict[str, Any]]:
        return [line for line in self.all if line["logger"] == logger]


@pytest.fixture
def lines() -> Iterator[Lines]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    use_json([handler])
    logger = logging.getLogger("coe")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield Lines(stream)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        use_text()


def test_a_line_is_one_object_whatever_the_message_holds(lines: Lines) -> None:
    log = logging.getLogger("coe.test")
    log.warning("two\nlines, %s and \x1b[31m a lone surrogate \ud800", {"a": 1})
    try:
        raise ValueError("why\nnot")
    except ValueError:
        log.exception("it failed")
    log.info("x" * 1_000_000, extra={"fields": {"n": 1, "odd": object}})
    first, second, third = lines.all
    assert list(first) == ["time", "level", "logger", "event"]
    assert first["level"] == "warning" and first["logger"] == "coe.test" and first["time"].endswith("Z")
    assert first["event"].startswith("two\nlines, {'a': 1}")
    assert second["level"] == "error" and "ValueError: why" in second["exception"]
    assert third["n"] == 1 and len(third["event"]) == 10_000


async def test_lines_have_the_ids_of_their_own_request_though_many_are_handled_at_once(lines: Lines) -> None:
    async with gateway(token_delay_s=0.002) as served:

        async def ask(number: int) -> str:
            answer = await served.client.chat.completions.with_raw_response.create(
                model="unloadable" if number % 2 else "echo",
                messages=[{"role": "user", "content": f"a private prompt {number}"}],
                extra_headers={"x-request-id": f"client-{number}"},
            )
            return answer.headers["x-coe-decision-id"]

        answered = await asyncio.gather(*(ask(number) for number in range(20)), return_exceptions=True)
        await served.log.ended(20)
    access = {line["request_id"]: line for line in lines.of("coe.access")}
    assert len(access) == 20
    for number, decision in enumerate(answered):
        line = access[f"client-{number}"]
        assert line["event"] == "request" and line["endpoint"] == "/v1/chat/completions" and line["seconds"] > 0
        if number % 2:
            assert line["status"] >= 500 and line["model"] == "unloadable" and line["error"]
        else:
            assert line["decision_id"] == decision and line["expert"] == line["model"] == "echo"
            assert line["status"] == 200 and line["completion_tokens"] > 0 and "key" not in line
    failed = lines.of("coe.serve.http.call")
    assert sorted(line["request_id"] for line in failed) == sorted(f"client-{n}" for n in range(1, 20, 2))
    assert {line["decision_id"] for line in failed} == {access[line["request_id"]]["decision_id"] for line in failed}
    assert "private" not in json.dumps([line for line in lines.all if "exception" not in line])


async def test_a_request_without_an_id_gets_one_and_a_traced_one_its_trace(lines: Lines) -> None:
    with recorded() as spans:
        async with gateway() as served:
            await served.client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "a"}])
            [server] = await spans.ended("POST /v1/chat/completions")
    [line] = lines.of("coe.access")
    assert server.context and line["trace_id"] == f"{server.context.trace_id:032x}"
    assert line["request_id"] == (server.attributes or {})["coe.request_id"] != ""


async def test_a_task_that_outlives_its_request_writes_lines_without_its_ids(lines: Lines) -> None:
    handled = bind(Handled("d", "r"))
    ended = asyncio.Event()

    async def watch() -> None:
        await ended.wait()
        logging.getLogger("coe.engines.watch").warning("the engine is gone")

    watching = asyncio.create_task(watch())
    handled.over = True
    ended.set()
    await watching
    [line] = lines.all
    assert "request_id" not in line and "decision_id" not in line and handled_now() is None


async def test_a_host_attributes_its_lines_by_what_the_request_carries(lines: Lines) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    origin = Origin("r1", "key-1", f"00-{trace}-00f067aa0ba902b7-01")

    async def call(request: GenerateRequest) -> None:
        with attributed(request):
            logging.getLogger("coe.host").info("loading")
        logging.getLogger("coe.host").info("idle")

    await asyncio.create_task(call(GenerateRequest(prompt="a", id="d1-2", origin=origin)))
    await asyncio.create_task(call(GenerateRequest(prompt="a", id="d2")))
    first, idle, second, _ = lines.all
    assert "request_id" not in idle
    assert (first["request_id"], first["decision_id"], first["key"], first["trace_id"]) == (
        "r1",
        "d1-2",
        "key-1",
        trace,
    )
    assert "request_id" not in second

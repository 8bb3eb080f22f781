"""The HTTP side of a request, message by message."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from api_server import Words
from starlette.requests import ClientDisconnect

from coe.config import ServeConfig
from coe.errors import DeadlineExceeded, EngineError
from coe.orchestrator import Orchestrator
from coe.policy import Policy
from coe.protocol.requests import parse_chat
from coe.serve.http.exchange import Exchange, _event, disclosed
from coe.serve.http.service import Service
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

SNAPSHOT = Snapshot(1, {"a": ExpertSpec(name="a", kind=Kind.MODEL, source="fake://echo")})


def service(policy: str = "default") -> Service:
    def ask(expert: str, request: GenerateRequest) -> Any:
        raise AssertionError("no expert call here")

    policies = {policy: Policy(policy, Words(("a",)))}
    return Service(Orchestrator(SNAPSHOT, policies, ask=ask, default_policy=policy), settings=ServeConfig())


class Wire:
    """An ASGI connection: messages from the client and to it."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.coming, self.sent = list(messages), list[dict[str, Any]]()

    async def receive(self) -> Any:
        await asyncio.sleep(0)
        if not self.coming:
            raise RuntimeError("the connection is gone")
        return self.coming.pop(0)

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("goodbye", [[{"type": "http.disconnect"}], []], ids=["message", "exception"])
async def test_work_is_stopped_when_the_client_leaves_however_that_is_told(goodbye: list[dict[str, Any]]) -> None:
    stopped = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            await asyncio.sleep(0)  # closing may take a while
            stopped.set()

    wire = Wire({"type": "http.request"}, *goodbye)
    async with service().call("/") as call:
        with pytest.raises(ClientDisconnect):
            await Exchange(call, {"type": "http", "headers": []}, wire.receive, wire.send).unless_gone(work())
        assert stopped.is_set()


async def test_an_error_after_a_whole_answer_is_noted_and_not_sent() -> None:
    wire = Wire()
    async with service().call("/") as call:
        exchange = Exchange(call, {"type": "http", "headers": []}, wire.receive, wire.send)
        await exchange.json({"ok": True})
        count = len(wire.sent)
        await exchange.fail(DeadlineExceeded("late"))
        assert (len(wire.sent), call.error, call.status) == (count, "deadline_exceeded", 200)


async def test_an_error_within_a_stream_ends_it() -> None:
    wire = Wire()
    async with service().call("/") as call:
        exchange = Exchange(call, {"type": "http", "headers": []}, wire.receive, wire.send)
        await exchange.events({"text": "é"})
        await exchange.fail(EngineError("died"))
        await exchange.fail(DeadlineExceeded("after the end"))
    start, first, last = wire.sent
    assert (start["status"], first["body"], first["more_body"]) == (200, 'data: {"text":"é"}\n\n'.encode(), True)
    assert last["body"].startswith(b'data: {"error":{"message":"died"') and not last["more_body"]


async def test_a_policys_name_fits_into_a_header_whatever_it_is() -> None:
    gateway = service("größer\r\nx-evil: 1")
    async with gateway.call("/") as call, gateway.within_deadline(call):
        request = {"model": "auto", "messages": [{"role": "user", "content": "x"}]}
        await gateway.route(call, parse_chat(request))
    assert disclosed(call)["x-coe-router"] == "gr%C3%B6%C3%9Fer%0D%0Ax-evil%3A 1"
    assert "x-coe-truncated" not in disclosed(call)
    [routed] = call.decisions
    call.decisions = [replace(routed, decision=replace(routed.decision, truncated=True))]
    assert disclosed(call)["x-coe-truncated"] == "true"
    gateway.close()


@pytest.mark.parametrize(
    "value",
    [
        'é\u2028\x00\x7f<>&"\\/',
        "\ud800 alone",
        float("inf"),
        -0.0,
        1e-7,
        10**30,
        0.1 + 0.2,
        True,
        None,
        [],
        {},
        {"a": [1]},
    ],
)
def test_an_event_is_one_line_with_the_value_that_json_reads(value: Any) -> None:
    event = _event({"value": value, "text": "x"})
    assert event.startswith(b"data: {") and event.endswith(b"}\n\n") and event.count(b"\n") == 2
    expected = value.replace("\ud800", "?") if isinstance(value, str) else value
    assert json.loads(event[6:]) == {"value": expected, "text": "x"}

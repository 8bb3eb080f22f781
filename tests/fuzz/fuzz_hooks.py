"""Streams for schemathesis, which rarely generates requests for them and does not check their events."""

from __future__ import annotations

import json
import zlib
from typing import Any

import schemathesis


@schemathesis.hook
def before_call(ctx: Any, case: Any, kwargs: Any) -> None:
    """Half of the requests with `"stream": false` become streams: generated examples are nearly all without."""
    body = case.body
    if isinstance(body, dict) and body.get("stream") is False and zlib.crc32(repr(body).encode()) % 2:
        case.body = {**body, "stream": True}


@schemathesis.check
def stream_is_whole(ctx: Any, response: Any, case: Any) -> None:
    """A stream is JSON events: chunks with one finish reason for each choice, then `[DONE]`; or its last event is an
    error, which is not one of the server. That of a response is numbered and ends with the response."""
    if "text/event-stream" not in response.headers.get("content-type", [""])[0]:
        return
    if response.text.startswith("event: "):
        _response_is_whole(response.text)
        return
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    if events[-1].startswith('{"error":'):
        error = json.loads(events[-1])["error"]
        assert error["message"] and error["type"] != "server_error", error
        return
    assert events[-1] == "[DONE]", f"the last of {len(events)} events is {events[-1][:200]!r}"
    chunks = [json.loads(event) for event in events[:-1]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    indices = {choice["index"] for choice in choices}
    finished = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert sorted(finished) == sorted(indices), f"choices {indices}, finished {finished}"


def _response_is_whole(text: str) -> None:
    events = [json.loads(block.partition("\ndata: ")[2]) for block in text.split("\n\n") if block]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    last = events[-1]["response"]
    assert last["status"] in ("completed", "incomplete") or last["error"]["code"] != "server_error", last

"""Checks of schemathesis for streams, which it does not read itself."""

from __future__ import annotations

import json
from typing import Any

import schemathesis


@schemathesis.check
def stream_is_whole(ctx: Any, response: Any, case: Any) -> None:
    """A stream is JSON events: chunks that end with a finish reason for each choice, or an error; then `[DONE]`."""
    if "text/event-stream" not in response.headers.get("content-type", [""])[0]:
        return
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]", f"the last event is {events[-1][:200]!r}"
    chunks = [json.loads(event) for event in events[:-1]]
    if "error" in chunks[-1]:
        assert chunks[-1]["error"]["message"]
        return
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    indices = {choice["index"] for choice in choices}
    finished = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert sorted(finished) == sorted(indices), f"choices {indices}, finished {finished}"

"""W3C trace context of an incoming request (https://www.w3.org/TR/trace-context/): hostile input, so checked whole."""

from __future__ import annotations

import re
from typing import Final

MOST_STATE: Final = 512
"""Most characters of `tracestate` that are passed on, as the standard asks."""
_PARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_STATE: Final = re.compile(r"[\x20-\x7e]*", re.ASCII)


def trace_context(parents: list[str], states: list[str]) -> tuple[str, str]:
    """The `traceparent` and `tracestate` of a request, from all headers of these names; "" for what is invalid.

    A request with an invalid traceparent begins a trace of its own, as the standard asks.
    """
    if len(parents) != 1 or len(parents[0]) > MOST_STATE:
        return "", ""
    match = _PARENT.fullmatch(parents[0].strip())
    if match is None:
        return "", ""
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return "", ""
    state = ",".join(states)
    usable = len(state) <= MOST_STATE and _STATE.fullmatch(state) is not None
    return f"00-{trace_id}-{span_id}-{flags}", state if usable else ""
